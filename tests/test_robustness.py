"""Conditions differ from the demonstrations' in one thing each; a noisy camera changes pictures and nothing else."""

from dataclasses import replace

import numpy as np
import pytest

from labkit import rollouts
from labkit.policy import Decision
from labkit.robustness import CONDITIONS, Condition, NoisyCamera, under
from labkit.tabletop import Tabletop


class Recorder:
    """A policy that keeps what it is shown and goes home."""

    def __init__(self):
        self.seen = []

    def decide(self, observations, instructions=None):
        self.seen.append((observations, instructions))
        n = len(observations)
        waypoints = np.tile([0.0, 0.3, 0.3, 0, 0, 0, 0], (n, 1))
        return Decision(np.zeros((n, 4), int), waypoints[:, :4], waypoints, np.full((n, 4), np.nan), 0.0)


def test_each_condition_differs_in_one_thing():
    usual = CONDITIONS["as trained"]
    assert usual == Condition(usual.about)
    for name, one in CONDITIONS.items():
        changed = [field for field in ("variation", "held_out_phrasing", "noise") if getattr(one, field) != getattr(usual, field)]
        assert len(changed) == (name != "as trained"), name
        if changed == ["variation"]:
            fields = [f for f in vars(one.variation) if getattr(one.variation, f) != getattr(usual.variation, f)]
            assert len(fields) == 1
    assert len({replace(one, about="") for one in CONDITIONS.values()}) == len(CONDITIONS)


def test_the_noise_of_the_camera_has_the_size_it_says_and_leaves_the_rest_alone():
    observation = {**Tabletop("pick").reset(seed=0)[0], "previous_rgb": np.full((48, 48, 3), 128, np.uint8)}
    recorder = Recorder()
    NoisyCamera(recorder, 15.0).decide([observation], ["pick up"])
    (seen,), said = recorder.seen[0]
    assert said == ["pick up"] and seen["depth"] is observation["depth"]
    assert (seen["previous_rgb"].astype(float) - 128).std() == pytest.approx(15, rel=0.05)
    assert not np.array_equal(seen["rgb"], observation["rgb"]) and seen["rgb"].dtype == np.uint8
    again = Recorder()
    NoisyCamera(again, 15.0).decide([observation])
    assert np.array_equal(again.seen[0][0][0]["rgb"], seen["rgb"])


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_condition_is_carried_out_on_the_usual_episodes(name):
    recorder = Recorder()
    found = under(recorder, "pick", name, 2, progress=False)
    assert list(found.seeds) == [rollouts.EVALUATION_SEED, rollouts.EVALUATION_SEED + 1]
    first = recorder.seen[0][0][0]
    expected = Tabletop("pick", CONDITIONS[name].variation, CONDITIONS[name].held_out_phrasing).reset(seed=rollouts.EVALUATION_SEED)[0]
    assert first["instruction"] == expected["instruction"]
    assert np.array_equal(first["rgb"], expected["rgb"]) == (name != "noise")


def test_an_unknown_condition_is_refused():
    with pytest.raises(ValueError, match="as trained, camera"):
        under(Recorder(), "pick", "fog", 1)
