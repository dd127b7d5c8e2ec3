"""The robot at work: many episodes in lock step, one batched forward a decision; success with intervals, paired comparison."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from labkit.instructions import say
from labkit.tabletop import Tabletop, Variation
from labkit.tabletop.experts import next_waypoint
from labkit.tabletop.tasks import commands, task_named

EVALUATION_SEED = 1_000_000
LATENCY_SAMPLES = 20
INSTRUCTIONS = ("own", "another")


@dataclass(frozen=True)
class Rollouts:
    """Closed-loop results of one policy on one task.

    success: (N,) bool.   seeds: (N,) the episodes, so that two policies can be compared on the same ones.   decisions: (N,) int.
    position_error: (N,) metres between the first waypoint and the expert's, in the table's plane.
    milliseconds: one policy call at batch 1, several times.   seconds: wall clock of the whole.
    """

    task: str
    success: np.ndarray
    seeds: np.ndarray
    decisions: np.ndarray
    position_error: np.ndarray
    milliseconds: np.ndarray
    seconds: float

    @property
    def rate(self) -> float:
        """Share of successful episodes."""
        return float(self.success.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the success rate."""
        return wilson(int(self.success.sum()), len(self.success))

    def __str__(self):
        low, high = self.interval
        return f"{self.task}: {100 * self.rate:.0f} % of {len(self.success)} episodes succeed (95 % interval {100 * low:.0f} to {100 * high:.0f} %)"


@dataclass(frozen=True)
class Comparison:
    """Policy b minus policy a on the same episodes.   difference and interval: in success rate.   p: exact McNemar, two-sided."""

    difference: float
    low: float
    high: float
    only_a: int
    only_b: int
    episodes: int
    p: float

    def __str__(self):
        return (f"{100 * self.difference:+.0f} points on {self.episodes} shared episodes (95 % interval {100 * self.low:+.0f} to "
                f"{100 * self.high:+.0f}; {self.only_b} episodes only the second solves, {self.only_a} only the first; p = {self.p:.3g})")


def wilson(successes: int, episodes: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a success rate (Wilson 1927).   Raises ValueError for no episodes."""
    if episodes < 1:
        raise ValueError("an interval needs at least one episode")
    share = successes / episodes
    centre = (share + z * z / (2 * episodes)) / (1 + z * z / episodes)
    half = z / (1 + z * z / episodes) * np.sqrt(share * (1 - share) / episodes + z * z / (4 * episodes**2))
    # At the ends of the scale the interval ends there, too: rounding must not leave the rate outside it.
    return (0.0 if successes == 0 else float(centre - half), 1.0 if successes == episodes else float(centre + half))


def compare(a: Rollouts, b: Rollouts) -> Comparison:
    """Compare two policies that ran the same episodes; pairing removes the luck of the draw.

    The interval is Newcombe's hybrid score interval for paired proportions (Statistics in Medicine 17, 1998, method 10).
    Raises ValueError where tasks or seeds differ.
    """
    from scipy.stats import binomtest

    if a.task != b.task or not np.array_equal(a.seeds, b.seeds):
        raise ValueError(f"only the same episodes can be paired: {a.task} with {len(a.seeds)} seeds against {b.task} with {len(b.seeds)}")
    n = len(a.seeds)
    both, only_a = int((a.success & b.success).sum()), int((a.success & ~b.success).sum())
    only_b, neither = int((~a.success & b.success).sum()), int((~a.success & ~b.success).sum())
    p1, p2 = b.rate, a.rate
    (l1, u1), (l2, u2) = b.interval, a.interval
    spread = (both + only_a) * (both + only_b) * (neither + only_a) * (neither + only_b)
    agreement = both * neither - only_a * only_b
    # The continuity correction that distinguishes method 10 from method 8.
    agreement = max(agreement - n / 2, 0.0) if agreement > 0 else agreement
    correlation = agreement / np.sqrt(spread) if spread else 0.0
    down = np.sqrt(max(0.0, (p1 - l1) ** 2 - 2 * correlation * (p1 - l1) * (u2 - p2) + (u2 - p2) ** 2))
    up = np.sqrt(max(0.0, (u1 - p1) ** 2 - 2 * correlation * (u1 - p1) * (p2 - l2) + (p2 - l2) ** 2))
    p = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    return Comparison(p1 - p2, float(p1 - p2 - down), float(p1 - p2 + up), only_a, only_b, n, float(p))


def rollout(policy, task: str, episodes: int = 100, seed: int = EVALUATION_SEED, variation: Variation = Variation(),
            held_out_phrasing: bool = False, instruction: str = "own", batch: int = 100, progress: bool = True) -> Rollouts:
    """Run `episodes` episodes with seeds seed, seed + 1, ... and count the successes.

    policy: anything with `decide(observations) -> Decision`; from an episode's second decision on, an observation also has `previous_rgb`, the
    picture before the last one.   batch: how many episodes share a forward pass.
    instruction: "own", or "another" to give the policy another valid instruction of the same scene (the control that asks
    whether it listens).   Raises ValueError for an unknown task.
    """
    from tqdm.auto import tqdm

    if instruction not in INSTRUCTIONS:
        raise ValueError(f"instruction is 'own' or 'another', not {instruction!r}")
    task_named(task)
    begun, parts, seen = time.perf_counter(), [], []
    with tqdm(total=episodes, desc=task, unit="episode", disable=not progress, leave=False) as bar:
        for first in range(0, episodes, batch):
            seeds = np.arange(first, min(first + batch, episodes)) + seed
            environments = [Tabletop(task, variation, held_out_phrasing) for _ in seeds]
            observations = [env.reset(seed=int(s))[0] for env, s in zip(environments, seeds)]
            if instruction == "another":
                observations = [{**o, "instruction": _another(env, int(s))} for env, o, s in zip(environments, observations, seeds)]
            seen += observations[: LATENCY_SAMPLES - len(seen)]
            parts.append((seeds, *lock_step(policy, environments, observations, bar.update)))
    seeds, success, decisions, errors = (np.concatenate(column) for column in zip(*parts))
    milliseconds = np.array([1000 * policy.decide([o]).seconds for o in seen])
    return Rollouts(task, success, seeds, decisions, errors, milliseconds, time.perf_counter() - begun)


def lock_step(policy, environments, observations, on_episode=lambda: None):
    """Run episodes side by side: all environments take their decision number k in one forward pass; those that are done leave the batch.

    environments: reset `Tabletop`s, which end where their episodes end.   observations: their first ones; what these say as `instruction`
    is what the policy hears throughout.   on_episode: called at the end of each.
    Returns success (N,) bool, decisions (N,) int, and the first waypoint's distance from the expert's (N,) in metres.
    """
    observations = list(observations)
    count = len(environments)
    success, decisions, errors = np.zeros(count, bool), np.zeros(count, int), np.zeros(count)
    running = list(range(count))
    while running:
        waypoints = policy.decide([observations[i] for i in running]).waypoints
        still = []
        for i, waypoint in zip(running, waypoints):
            env = environments[i]
            if decisions[i] == 0:
                expert = next_waypoint(env.episode.command, env.episode.scene, env.start, env.state)
                errors[i] = np.hypot(*(waypoint - expert)[:2])
            said = observations[i]["instruction"]
            observation, _, terminated, truncated, info = env.step(waypoint)
            observations[i] = {**observation, "instruction": said, "previous_rgb": observations[i]["rgb"]}
            success[i], decisions[i] = info["success"], info["decisions"]
            if terminated or truncated:
                on_episode()
            else:
                still.append(i)
        running = still
    return success, decisions, errors


def _another(env, seed):
    """Another instruction that is valid in this scene: same task where it can be, so only the words differ."""
    rng = np.random.default_rng([seed, 13])
    episode = env.episode
    others = [c for c in commands(episode.task, episode.scene) if c != episode.command and c.object != episode.command.object]
    others = others or [c for c in commands("pick", episode.scene) if c.object != episode.command.object]
    return say(others[rng.integers(len(others))], rng, unique_colours=episode.scene.unique_colours)


def blind_success(task: str, episodes: int = 200, seed: int = EVALUATION_SEED, variation: Variation = Variation()) -> Rollouts:
    """Chance: the noise-free expert carries out a command drawn at random among those the scene allows for this task.

    It knows everything but the instruction, so this is what can be had without language.
    """
    rng = np.random.default_rng([seed, 17])
    success, decisions = np.zeros(episodes, bool), np.zeros(episodes, int)
    for i in range(episodes):
        env = Tabletop(task, variation)
        env.reset(seed=seed + i)
        options = commands(task, env.episode.scene)
        guess, over = options[rng.integers(len(options))], False
        while not over:
            waypoint = next_waypoint(guess, env.episode.scene, env.start, env.state)
            _, _, terminated, truncated, info = env.step(waypoint)
            over = terminated or truncated
        success[i], decisions[i] = info["success"], info["decisions"]
    return Rollouts(task, success, np.arange(episodes) + seed, decisions, np.full(episodes, np.nan), np.array([]), 0.0)
