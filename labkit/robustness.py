"""The conditions under which the lab compares policies: each differs from the demonstrations' in one thing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from labkit.rollouts import Rollouts, rollout
from labkit.tabletop import Variation

# Objects stand at the rim of the area in which demonstrations have them.
RIM = ((-0.17, -0.12), (0.17, -0.12), (-0.17, 0.05), (0.17, 0.05), (0.0, -0.12))


@dataclass(frozen=True)
class Condition:
    """about: what differs, for a table.   noise: standard deviation of what the camera's pixels gain, in grey levels of 255."""

    about: str
    variation: Variation = Variation()
    held_out_phrasing: bool = False
    noise: float = 0.0


CONDITIONS = {
    "as trained": Condition("nothing"),
    "camera": Condition("camera 8 cm to the side", Variation(camera_shift=(0.08, 0.0, 0.0))),
    "light": Condition("30 % of the light", Variation(light=0.3)),
    "layout": Condition("objects at the rim of their area", Variation(places=RIM)),
    "distractors": Condition("five objects in place of three", Variation(objects=5)),
    "noise": Condition("pixels with noise of 15 grey levels", noise=15.0),
    "phrasing": Condition("sentence patterns that training never used", held_out_phrasing=True),
}


class NoisyCamera:
    """A policy that sees every picture through a noisy sensor."""

    def __init__(self, policy, noise: float, seed: int = 0):
        """noise: standard deviation in grey levels of 255."""
        self.policy, self.noise, self.rng = policy, noise, np.random.default_rng(seed)

    def decide(self, observations, instructions=None):
        """As the policy's own, for pictures with noise."""
        return self.policy.decide([self._seen(o) for o in observations], instructions)

    def _seen(self, observation):
        pictures = {name: observation[name] for name in ("rgb", "previous_rgb") if observation.get(name) is not None}
        noisy = {name: np.clip(np.rint(p + self.rng.normal(0, self.noise, p.shape)), 0, 255).astype(np.uint8) for name, p in pictures.items()}
        return {**observation, **noisy}


def under(policy, task: str, condition: str, episodes: int = 100, progress: bool = True) -> Rollouts:
    """Closed-loop results under one of CONDITIONS, on the same episodes for every policy.   Raises ValueError for another condition."""
    if condition not in CONDITIONS:
        raise ValueError(f"the conditions are {', '.join(CONDITIONS)}, not {condition!r}")
    one = CONDITIONS[condition]
    policy = NoisyCamera(policy, one.noise) if one.noise else policy
    return rollout(policy, task, episodes, variation=one.variation, held_out_phrasing=one.held_out_phrasing, progress=progress)
