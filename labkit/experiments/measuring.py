"""What several experiments do alike: read shipped demonstrations, count successes, thin out a loss curve. It is no experiment itself."""

from __future__ import annotations

import numpy as np

from labkit.demonstrations import Demonstration, read
from labkit.paths import DATA
from labkit.rollouts import rollout
from labkit.tabletop.tasks import PRETRAINING_TASKS

# The splits that nothing is trained on.
OTHERS = ("validation", "test")


def shipped(name: str, splits: tuple[str, ...] = ("train",)) -> list[Demonstration]:
    """The demonstrations that come with the course.   name: a folder of data/demonstrations: a new task, "dim" or "replay"."""
    return [demonstration for split in splits for demonstration in read(DATA / "demonstrations" / name, split)]


def counted(policy, task: str, episodes: int, **options) -> int:
    """Number of successful episodes.   options: of `rollout`."""
    return int(rollout(policy, task, episodes, progress=False, **options).success.sum())


def counted_on_old_tasks(policy, episodes: int, **options) -> dict[str, int]:
    """Number of successful episodes, of `episodes` on each task of the pretraining.   options: of `rollout`."""
    return {task: counted(policy, task, episodes, **options) for task in PRETRAINING_TASKS}


def counted_on_layouts_of(policy, demonstrations: list[Demonstration]) -> int:
    """Number of successes on the very layouts of the demonstrations, which are all of one task."""
    seeds = np.array([d.seed for d in demonstrations])
    whole = rollout(policy, demonstrations[0].task, int(np.ptp(seeds)) + 1, seed=int(seeds.min()), progress=False)
    return int(whole.success[seeds - seeds.min()].sum())


def thinned(losses: list[float]) -> list[float]:
    """Mean of every ten steps, in nats."""
    return [round(float(np.mean(losses[i : i + 10])), 4) for i in range(0, len(losses), 10)]
