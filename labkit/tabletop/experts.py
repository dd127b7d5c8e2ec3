"""Scripted operators: they see the true state and give the next waypoint, each in a style of their own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from labkit.instructions import Command
from labkit.tabletop.arm import SPEED
from labkit.tabletop.scene import HALF_HEIGHT, HOME, Scene
from labkit.tabletop.tasks import State, current_step, destination, index_of, leg_target

RELEASE_CLEARANCE = 0.006


@dataclass(frozen=True)
class Operator:
    """Habits of one operator.

    approach: (roll, pitch) radians, how the tool leans when it comes down.   grasp_yaw: radians, added to the wrist's yaw.
    grasp_offset: (x, y) metres from the object's centre where the pad lands.   place_offset: (x, y) metres from the goal.
    speed: m/s.   noise: metres, standard deviation of every waypoint's x and y.
    """

    name: str = "expert"
    approach: tuple[float, float] = (0.0, 0.0)
    grasp_yaw: float = 0.0
    grasp_offset: tuple[float, float] = (0.0, 0.0)
    place_offset: tuple[float, float] = (0.0, 0.0)
    speed: float = SPEED
    noise: float = 0.0


EXPERT = Operator()
OPERATORS = {
    operator.name: operator
    for operator in (
        EXPERT,
        Operator("ana", (0.08, 0.0), 0.3, (0.008, 0.004), (0.014, 0.008), 0.8, 0.002),
        Operator("ben", (0.0, -0.05), -0.2, (-0.008, 0.003), (-0.014, -0.008), 1.1, 0.003),
        Operator("chi", (-0.06, 0.04), 0.0, (0.002, -0.008), (0.008, -0.014), 0.6, 0.002),
    )
}


def next_waypoint(command: Command, scene: Scene, start: State, state: State, operator: Operator = EXPERT, rng=None) -> np.ndarray:
    """(7,) x, y, z in metres, roll, pitch, yaw in radians, grip: what this operator does next to carry out `command`.

    Raises ValueError where the operator is noisy and no `rng` (numpy Generator) is given.
    """
    step = current_step(command, scene, start, state)
    if step.task == "go":
        waypoint = np.array([*leg_target(step, scene, state), 0.0, 0.0, 0.0, 0.0])
    elif state.held == index_of(scene, step.object) and step.task not in ("pick", "spatial"):
        waypoint = _placing(step, scene, state, operator)
    elif state.held is None or state.held == index_of(scene, step.object):
        waypoint = _grasping(step, scene, state, operator)
    else:
        waypoint = _putting_back(scene, state)
    if operator.noise:
        if rng is None:
            raise ValueError(f"the operator {operator.name!r} is noisy: pass rng=numpy.random.default_rng(seed)")
        waypoint[:2] += rng.normal(0.0, operator.noise, 2)
    return waypoint


def _grasping(step, scene, state, operator):
    index = index_of(scene, step.object)
    x, y, z = state.positions[index]
    dx, dy = operator.grasp_offset
    yaw = _square(state.yaws[index]) if step.task == "align" else operator.grasp_yaw
    return np.array([x + dx, y + dy, z + HALF_HEIGHT[step.object[1]], *operator.approach, yaw, 1.0])


def _placing(step, scene, state, operator):
    x, y, surface, yaw = destination(step, scene, state)
    dx, dy = (0.0, 0.0) if step.task == "stack" else operator.place_offset
    # An object gripped off its centre hangs off the pad's centre: the operator sees that and aims with the object, not the pad.
    hx, hy = HOME[:2] - state.positions[state.held][:2]
    tip = surface + 2 * HALF_HEIGHT[step.object[1]] + RELEASE_CLEARANCE
    return np.array([x + hx + dx, y + hy + dy, tip, 0.0, 0.0, _square(yaw) if step.task == "align" else 0.0, 0.0])


def _putting_back(scene, state):
    """The wrong object hangs on the pad: set it down at the near edge, out of the way."""
    shape = scene.things[state.held].shape
    return np.array([0.0, -0.195, 2 * HALF_HEIGHT[shape] + RELEASE_CLEARANCE, 0.0, 0.0, 0.0, 0.0])


def _square(yaw):
    """The same orientation of a square thing within an eighth of a turn, so that the wrist turns as little as it can."""
    return (yaw + np.pi / 4) % (np.pi / 2) - np.pi / 4
