"""Synthetic paths: the robot that drives to their labels arrives, and the pictures are those it would have seen."""

import numpy as np
import pytest

from labkit.recording import record_episode
from labkit.synthetic_paths import synthetic_paths
from labkit.tabletop import Tabletop
from labkit.tabletop.tasks import meaning


def paths_of(samples):
    found = {}
    for row, id in enumerate(samples.ids):
        found.setdefault(id.rpartition("/")[0], []).append(row)
    return found


@pytest.mark.parametrize("legs", [None, 2, 3])
def test_driving_the_labels_does_what_the_sentence_says(legs):
    samples = synthetic_paths(3, seed=50, paths=3, legs=legs)
    for name, rows in paths_of(samples).items():
        env = Tabletop("navigate")
        env.reset(seed=int(name.split("-")[1]))
        command = meaning(samples.instructions[rows[0]], env.episode.scene)
        assert command is not None and legs in (None, len(rows)) and len(rows) == len(command.steps)
        env.reset(seed=int(name.split("-")[1]), options={"scene": env.episode.scene, "command": command})
        for row in rows:
            _, _, terminated, _, info = env.step(samples.actions[row])
        assert terminated and info["success"]


def test_pictures_are_those_of_a_recording_before_and_after_the_first_leg():
    samples = synthetic_paths(1, seed=7, paths=1, frames=2)
    env = Tabletop("navigate")
    driven = record_episode(env, "expert", 7)
    assert np.array_equal(samples.images[0, 0], driven.images[0]) and not samples.images[0, 1].any()
    assert np.array_equal(samples.images[1, 1], driven.images[0])
    # The arm comes home before every picture: nothing on the table has moved.
    assert np.abs(samples.images[1, 0].astype(int) - driven.images[1]).max() <= 3


def test_the_same_seed_gives_the_same_samples_and_paths_of_a_scene_differ():
    first, again = synthetic_paths(2, seed=9, paths=4), synthetic_paths(2, seed=9, paths=4)
    assert first.ids == again.ids and first.instructions == again.instructions and np.array_equal(first.actions, again.actions)
    said = {first.instructions[rows[0]] for name, rows in paths_of(first).items() if name.startswith("synthetic-9-")}
    assert len(said) == 4 and not first.holding.any()
