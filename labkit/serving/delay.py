"""A policy that takes its time while the world goes on: closed-loop runs in which each waypoint comes late, and success against the delay.

The delay is simulated time, whatever this machine needs, so that a run repeats; how long a policy really thinks is in `Rollouts.milliseconds`.
"""

from __future__ import annotations

import time

import numpy as np

from labkit.rollouts import EVALUATION_SEED, LATENCY_SAMPLES, Rollouts, lock_step
from labkit.tabletop import Tabletop, Variation
from labkit.tabletop.arm import CONTROL_SECONDS, STEPS_PER_CONTROL


def let_pass(env: Tabletop, seconds: float) -> None:
    """Let the world go on while the arm keeps still, to the nearest step of the physics, 5 ms.

    `Tabletop.wait` counts in control steps of 50 ms and takes a picture; the difference between two ways to quantise is smaller than that.
    """
    import mujoco

    whole, rest = divmod(round(seconds * STEPS_PER_CONTROL / CONTROL_SECONDS), STEPS_PER_CONTROL)
    env.arm.wait(whole * CONTROL_SECONDS)
    if rest:
        mujoco.mj_step(env.model, env.data, rest)


class DelayedTabletop(Tabletop):
    """The table with a slow policy at it: between the picture and the start of the motion it asked for, `delay` seconds go by."""

    def __init__(self, task: str = "pick", variation: Variation = Variation(), held_out_phrasing: bool = False, delay: float = 0.0, **options):
        """delay: seconds, for every decision.   options: as of `Tabletop`.   Raises ValueError for a delay that is negative or not finite."""
        if not 0 <= delay < np.inf:
            raise ValueError(f"a delay is a number of seconds, 0 or more, not {delay}")
        super().__init__(task, variation, held_out_phrasing, **options)
        self.delay = delay

    def step(self, action):
        if self.episode is not None:
            let_pass(self, self.delay)
        return super().step(action)


def rollout_with_delay(policy, task: str, delay: float, episodes: int = 100, seed: int = EVALUATION_SEED, variation: Variation = Variation(),
                       held_out_phrasing: bool = False, batch: int = 100, progress: bool = True) -> Rollouts:
    """As `rollouts.rollout`, on a table where every decision takes `delay` seconds; with 0, the same result.

    variation: `Variation(belt_speed=...)` for objects that move.   Raises ValueError for an unknown task or a negative delay.
    """
    from tqdm.auto import tqdm

    begun, parts, seen = time.perf_counter(), [], []
    with tqdm(total=episodes, desc=f"{task}, {1000 * delay:.0f} ms late", unit="episode", disable=not progress, leave=False) as bar:
        for first in range(0, episodes, batch):
            seeds = np.arange(first, min(first + batch, episodes)) + seed
            environments = [DelayedTabletop(task, variation, held_out_phrasing, delay) for _ in seeds]
            observations = [env.reset(seed=int(s))[0] for env, s in zip(environments, seeds)]
            seen += observations[: LATENCY_SAMPLES - len(seen)]
            parts.append((seeds, *lock_step(policy, environments, observations, bar.update)))
    seeds, success, decisions, errors = (np.concatenate(column) for column in zip(*parts))
    milliseconds = np.array([1000 * policy.decide([o]).seconds for o in seen])
    return Rollouts(task, success, seeds, decisions, errors, milliseconds, time.perf_counter() - begun)


def success_against_delay(policy, task: str, delays=(0.0, 0.1, 0.2, 0.3, 0.4, 0.5), **options) -> dict[float, Rollouts]:
    """{delay in seconds: Rollouts}, all on the same episodes, so that `rollouts.compare` can pair them.   options: of `rollout_with_delay`."""
    return {float(delay): rollout_with_delay(policy, task, delay, **options) for delay in delays}
