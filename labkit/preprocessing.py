"""Raw recordings: a camera and a robot that log by clocks of their own, the faults they suffer, and the way from them to training samples.

What a finished demonstration is, and its files, are in demonstrations.py; the operators are in recording.py and teleoperation.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from labkit.actions import small_action
from labkit.demonstrations import Samples
from labkit.tabletop import Tabletop, Variation
from labkit.tabletop import arm as arms
from labkit.tabletop.experts import OPERATORS, Operator, next_waypoint

FAULTS = ("late stamps", "dropped frames", "idle commands", "failed episodes")
FRAME_SECONDS = 0.1
# A person looks before each command.
THINK_SECONDS = 0.5
LATE_SECONDS = (0.4, 1.2)
LONGEST_LATE = 1.5
DROPPED = 0.4
OLDEST_FRAME = 0.3
IDLE_METRES = 0.01
IDLE_COMMANDS = 2
CLUMSY = Operator("clumsy", noise=0.04)


@dataclass(frozen=True, eq=False)
class Recording:
    """One raw episode: two logs, each stamped by its own clock, in seconds.

    The camera's log. frame_times: (F,).   frames: (F, 48, 48, 3) uint8.
    The robot's log. pose_times: (P,) every 0.05 s.   tips: (P, 3) of the pad in metres.   holding: (P,) bool, the vacuum sensor.
    command_times: (n,).   commands: (n, 7) waypoints, as in `Tabletop.step`.
    """

    instruction: str
    operator: str
    seed: int
    success: bool
    frame_times: np.ndarray
    frames: np.ndarray
    pose_times: np.ndarray
    tips: np.ndarray
    holding: np.ndarray
    command_times: np.ndarray
    commands: np.ndarray


def record_raw(task: str, operator="expert", *, seed: int, idle: int = 0, variation: Variation = Variation()) -> Recording:
    """Log one episode under an operator (as in `recording.record`), whether it succeeds or not.

    idle: how many commands send the tip to where it is, before the operator begins.   Raises KeyError for an unknown operator.
    """
    env, rng = Tabletop(task, variation), np.random.default_rng([seed, 1])
    decide = OPERATORS[operator] if isinstance(operator, str) else operator
    observation, _ = env.reset(seed=int(seed))
    env.arm.speed = getattr(decide, "speed", arms.SPEED)
    camera = env.camera.shifted(variation.camera_shift)
    poses, frames, commands, over = [], [], [], False

    def log():
        if len(poses) % round(FRAME_SECONDS / arms.CONTROL_SECONDS) == 0:
            frames.append(env.photograph(camera)[0])
        poses.append((env.arm.end_effector[:3], env.arm.held is not None))

    env.arm.on_control_step = log
    log()
    while not over:
        env.wait(THINK_SECONDS)
        if idle:
            commands.append((len(poses), np.array([*env.arm.end_effector, float(env.arm.held is not None)])))
            idle -= 1
            continue
        if isinstance(decide, Operator):
            waypoint = next_waypoint(env.episode.command, env.episode.scene, env.start, env.state, decide, rng)
        else:
            waypoint = decide(env, observation)
        commands.append((len(poses), np.clip(waypoint, arms.LOW, arms.HIGH)))
        observation, _, terminated, truncated, info = env.step(waypoint)
        over = terminated or truncated
    times = arms.CONTROL_SECONDS * np.arange(len(poses))
    when, waypoints = zip(*commands, strict=True)
    return Recording(
        env.episode.instruction, getattr(decide, "name", "person"), int(seed), info["success"], FRAME_SECONDS * np.arange(len(frames)),
        np.stack(frames), times, np.stack([tip for tip, _ in poses]), np.array([held for _, held in poses]),
        arms.CONTROL_SECONDS * (np.array(when) - 1), np.stack(waypoints),
    )


def record_session(task: str, episodes: int, seed: int, faults=(), operator="expert") -> list[Recording]:
    """Record `episodes` successes from the seeds seed, seed + 1, ..., with the faults that are named.

    "failed episodes" adds half as many episodes that a clumsy operator failed; the other faults are those of `with_fault`.
    Raises ValueError for an unknown fault.
    """
    unknown = sorted(set(faults) - set(FAULTS))
    if unknown:
        raise ValueError(f"unknown fault {unknown[0]!r}; the faults are {', '.join(FAULTS)}")
    rng, idle = np.random.default_rng([seed, 2]), IDLE_COMMANDS if "idle commands" in faults else 0
    wanted = {True: (episodes, operator), False: (episodes // 2 if "failed episodes" in faults else 0, CLUMSY)}
    made = []
    for success, (count, who) in wanted.items():
        found = 0
        while found < count:
            one = record_raw(task, who, seed=seed, idle=idle)
            seed += 1
            if one.success == success:
                found += 1
                made.append(one)
    for fault in faults:
        made = [with_fault(one, fault, rng) for one in made]
    return made


def with_fault(recording: Recording, fault: str, rng: np.random.Generator) -> Recording:
    """The recording after something went wrong with its logs.

    "late stamps": the robot's entries are stamped 0.4 to 1.2 s too late, all by as much.   "dropped frames": 40 % of the frames are lost,
    never the first.   The other two happen while recording, and change nothing here.
    """
    if fault == "late stamps":
        late = rng.uniform(*LATE_SECONDS)
        return replace(recording, pose_times=recording.pose_times + late, command_times=recording.command_times + late)
    if fault == "dropped frames":
        kept = rng.random(len(recording.frames)) >= DROPPED
        kept[0] = True
        return replace(recording, frames=recording.frames[kept], frame_times=recording.frame_times[kept])
    return recording


def image_motion(recording: Recording, times: np.ndarray) -> np.ndarray:
    """(T,) how much the picture is changing at `times` of the camera's clock: mean absolute difference of a frame from the one before it,
    for each second between the two, in grey levels of 255."""
    frames = recording.frames.astype(np.float32)
    change = np.abs(np.diff(frames, axis=0)).mean((1, 2, 3)) / np.diff(recording.frame_times)
    return np.interp(times, (recording.frame_times[1:] + recording.frame_times[:-1]) / 2, change, left=0.0, right=0.0)


def arm_speed(recording: Recording, times: np.ndarray) -> np.ndarray:
    """(T,) speed of the tip in m/s at `times` of the robot's clock."""
    speed = np.linalg.norm(np.diff(recording.tips, axis=0), axis=1) / np.diff(recording.pose_times)
    return np.interp(times, (recording.pose_times[1:] + recording.pose_times[:-1]) / 2, speed, left=0.0, right=0.0)


def motions(recording: Recording) -> tuple[np.ndarray, np.ndarray]:
    """Both records of the same motion, (T,) each, at the same readings of their clocks, every 0.05 s from 0 on.

    Logarithms: how large the arm looks depends on where it is, when it moves does not.
    """
    last = max(recording.frame_times[-1], recording.pose_times[-1])
    times = np.arange(0.0, last, arms.CONTROL_SECONDS)
    return np.log1p(image_motion(recording, times)), np.log1p(10 * arm_speed(recording, times))


def lag_correlations(image, speed, longest: int) -> np.ndarray:
    """(longest + 1,) correlation of image[t] with speed[t + lag], over the t for which both exist, for each lag from 0 to `longest`.

    image, speed: (T,), sampled at the same times.   A record that is constant over its part correlates with nothing: 0.
    """
    image, speed = np.asarray(image, np.float64), np.asarray(speed, np.float64)
    found = np.zeros(longest + 1)
    for lag in range(longest + 1):
        a, b = image[: len(image) - lag], speed[lag:]
        if a.std() > 0 and b.std() > 0:
            found[lag] = np.corrcoef(a, b)[0, 1]
    return found


def seconds_late(recording: Recording, correlations=lag_correlations) -> float:
    """How many seconds the robot's stamps come later than the camera's, between 0 and 1.5: the lag at which the two motions agree best.

    correlations: what to use in place of `lag_correlations`.
    """
    image, speed = (torch.from_numpy(record) for record in motions(recording))
    found = np.asarray(correlations(image, speed, round(LONGEST_LATE / arms.CONTROL_SECONDS)), np.float64)
    return arms.CONTROL_SECONDS * int(np.argmax(np.nan_to_num(found, nan=-1.0)))


def pair_decisions(success, command_times, moves, switches, frame_times, oldest: float, shortest: float) -> list[list[int]]:
    """Which command belongs to which frame, of one episode whose two clocks agree.

    success: bool.   command_times: (n,) s.   moves: (n,) m, how far each command sends the tip.   switches: (n,) bool, whether it
    switches the vacuum.   frame_times: (F,) s, ascending.   oldest: s.   shortest: m.
    Returns [command, frame] for each command that is worth learning: the newest frame that is not later than the command, and not more
    than `oldest` before it. A command that moves less than `shortest` and switches nothing is left out, and so is a failed episode.
    """
    if not success:
        return []
    newest = np.searchsorted(frame_times, command_times, side="right") - 1
    pairs = []
    for command, frame in enumerate(newest):
        idle = moves[command] < shortest and not switches[command]
        if not idle and frame >= 0 and command_times[command] - frame_times[frame] <= oldest:
            pairs.append([command, int(frame)])
    return pairs


def held_out_rows(episodes: torch.Tensor, order: torch.Tensor, count: int) -> torch.Tensor:
    """(N,) bool: which decisions come from the first `count` episodes of `order`.   episodes: (N,) int.   order: (E,) int, shuffled."""
    return (episodes[:, None] == order[None, :count]).any(dim=1)


def commanded(recording: Recording) -> tuple[np.ndarray, np.ndarray]:
    """moves (n,) in metres, how far each command sends the tip from where it is; switches (n,) bool, whether it switches the vacuum."""
    now = _rows_at(recording.pose_times, recording.command_times)
    moves = np.linalg.norm(recording.commands[:, :3] - recording.tips[now], axis=1)
    vacuum = recording.commands[:, 6] > 0.5
    return moves, vacuum != np.concatenate([[False], vacuum[:-1]])


def cleaned(recordings, correlations=lag_correlations, pair=pair_decisions) -> Samples:
    """Training samples with clocks aligned, stale frames, idle commands and failed episodes left out.

    correlations, pair: what to use in place of `lag_correlations` and `pair_decisions`.   Raises ValueError where nothing is left.
    """
    rows = []
    for one in recordings:
        # A stamp that means a frame's own moment may miss it by rounding.
        times = one.command_times - seconds_late(one, correlations) + 1e-6
        moves, switches = commanded(one)
        pairs = pair(one.success, times.tolist(), moves.tolist(), switches.tolist(), one.frame_times.tolist(), OLDEST_FRAME, IDLE_METRES)
        rows += [(one, command, frame) for command, frame in pairs]
    return _as_samples(rows)


def as_recorded(recordings) -> Samples:
    """Training samples by counting: every command goes with the frame whose number its time stamp says, at ten frames a second."""
    return _as_samples([
        (one, command, min(round(float(time) / FRAME_SECONDS), len(one.frames) - 1))
        for one in recordings for command, time in enumerate(one.command_times)
    ])  # fmt: skip


def _as_samples(rows):
    if not rows:
        raise ValueError("no decision is left to learn from")
    holding = [one.holding[_rows_at(one.pose_times, one.command_times[[command]])[0]] for one, command, _ in rows]
    return Samples([one.instruction for one, _, _ in rows], np.stack([one.frames[frame] for one, _, frame in rows]), np.array(holding),
                   small_action(np.stack([one.commands[command] for one, command, _ in rows])))


def _rows_at(pose_times, times):
    return np.clip(np.searchsorted(pose_times, np.asarray(times) + 1e-6, side="right") - 1, 0, len(pose_times) - 1)
