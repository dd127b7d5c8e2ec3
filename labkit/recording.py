"""Recording: episodes under scripted or human operators, as `Demonstration`s, each with its split. Their files are in demonstrations.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields

import numpy as np

from labkit.demonstrations import SPLITS, Demonstration
from labkit.tabletop import Tabletop, Variation
from labkit.tabletop import arm as arms
from labkit.tabletop.experts import OPERATORS, Operator, next_waypoint
from labkit.tabletop.tasks import task_named

SHARES = (80, 10, 10)
POSES_A_DECISION = 12
_DECIMALS = 6
_PATIENCE = 50


def split_of(index: int, shares: tuple[int, int, int] = SHARES) -> str:
    """The split of success number `index`: the one that lags furthest behind its share.

    It depends on nothing else, so a recording can be continued or made longer, and every sum(shares) episodes the shares are exact.
    """
    counts, total = [0, 0, 0], sum(shares)
    for i in range(index % total + 1):
        lag = [share * (i + 1) - total * count for share, count in zip(shares, counts, strict=True)]
        chosen = lag.index(max(lag))
        counts[chosen] += 1
    return SPLITS[chosen]


def record(task, operator="expert", *, episodes: int, seed: int, variation: Variation = Variation(), shares=SHARES,
           keep_failures: bool = True, done: tuple[int, int] = (0, 0)) -> Iterator[Demonstration]:
    """Record until `episodes` have succeeded, from the seeds seed, seed + 1, ...; failed ones are yielded too, unless told otherwise.

    task: a name or several, in turn.   operator: an `Operator`, the name of one, a callable (env, observation) -> (7,) waypoint
    (a person at the keyboard, say), or several, in turn.   shares: of train, validation and test.
    done: successes and attempts already made (`progress`), to go on from there.
    Raises ValueError for an unknown task or operator, or one that fails 50 times in a row.
    """
    tasks = [task_named(name).name for name in ([task] if isinstance(task, str) else task)]
    operators = [_operator(one) for one in (operator if isinstance(operator, (list, tuple)) else [operator])]
    if len(shares) != len(SPLITS) or min(shares) < 0 or sum(shares) < 1:
        raise ValueError(f"the shares are {shares}: three whole numbers for {', '.join(SPLITS)} are needed, not all zero")
    # A generator of its own, so that a wrong name is refused here and not when the first episode is asked for.
    return _record(tasks, operators, episodes, seed, variation, shares, keep_failures, *done)


def _record(tasks, operators, episodes, seed, variation, shares, keep_failures, successes, attempts):
    environments = {name: Tabletop(name, variation) for name in tasks}
    failed = 0
    while successes < episodes:
        env = environments[tasks[successes % len(tasks)]]
        who = operators[successes // len(tasks) % len(operators)]
        demonstration = record_episode(env, who, seed + attempts, split_of(successes, shares))
        attempts += 1
        successes += demonstration.success
        failed = 0 if demonstration.success else failed + 1
        if demonstration.success or keep_failures:
            yield demonstration
        if failed == _PATIENCE:
            raise ValueError(f"the operator {demonstration.operator!r} failed {env.task!r} {failed} times in a row: "
                             f"choose another operator or an easier variation")


def record_episode(env: Tabletop, operator, seed: int, split: str = "train") -> Demonstration:
    """One episode of `env` from `seed` under `operator` (as in `record`), whether it succeeds or not."""
    seed = int(seed)
    observation, info = env.reset(seed=seed)
    decide, rng = _operator(operator), np.random.default_rng([seed, 1])
    env.arm.speed = getattr(decide, "speed", arms.SPEED)
    path, rows, over = [], [], False
    env.arm.on_control_step = lambda: path.append(env.arm.end_effector)
    while not over:
        if isinstance(decide, Operator):
            waypoint = next_waypoint(env.episode.command, env.episode.scene, env.start, env.state, decide, rng)
        else:
            waypoint = decide(env, observation)
        # The robot carries out the very numbers that are stored, so that a replay is the same episode to the last pixel.
        waypoint = _rounded(np.clip(waypoint, arms.LOW, arms.HIGH))
        path.clear()
        seen = observation
        observation, reward, terminated, truncated, info = env.step(waypoint)
        thinned = np.linspace(0, len(path) - 1, min(POSES_A_DECISION, len(path))).round().astype(int)
        rows.append((seen["rgb"], seen["depth"], bool(seen["holding"]), _rounded(seen["joints"]), waypoint, reward,
                     len(path) * arms.CONTROL_SECONDS, _rounded([path[i] for i in thinned])))
        over = terminated or truncated
    *columns, poses = zip(*rows, strict=True)
    images, depth, holding, joints, actions, rewards, seconds = map(np.stack, columns)
    episode, name = env.episode, getattr(decide, "name", getattr(decide, "__name__", type(decide).__name__))
    return Demonstration(
        f"{episode.task}-{seed}", split, episode.instruction, episode.task, name, info["success"],
        images, depth, holding, joints, actions, list(poses), rewards, _rounded(seconds), seed, env.arm.speed,
        _differences(episode.variation), episode.command,
    )


def _operator(who):
    if isinstance(who, str) and who not in OPERATORS:
        raise ValueError(f"unknown operator {who!r}; the operators are {', '.join(OPERATORS)}")
    return OPERATORS[who] if isinstance(who, str) else who


def _differences(variation):
    """The fields of a variation that are not the default, as JSON has them."""
    values = {f.name: getattr(variation, f.name) for f in fields(variation) if getattr(variation, f.name) != f.default}
    return json.loads(json.dumps(values))


def _rounded(values):
    return np.round(np.asarray(values, dtype=np.float64), _DECIMALS) + 0.0  # + 0.0 turns -0.0 into 0.0
