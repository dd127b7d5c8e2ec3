"""The tasks: which commands a scene allows, where each leads to, and when it counts as done."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import permutations

import numpy as np

from labkit.instructions import COLOURS, EXTREMES, FRAMES, SHAPES, ZONES, Command, sentences, words
from labkit.tabletop.scene import (
    BIN_HALF,
    FORWARD_PLACE,
    HALF_HEIGHT,
    ZONE_PLACES,
    Scene,
)

BESIDE_GAP = 0.09
FLOOR = 0.004
HOVER = 0.15
_CLEAR = 0.085


@dataclass(frozen=True)
class State:
    """What is true on the table at one moment.

    positions: (n, 3) centres in metres.   yaws: (n,) radians.   held: index of the object on the pad, or None.
    reached: (k, 3) where the tip has been sent so far, one row a decision.
    """

    positions: np.ndarray
    yaws: np.ndarray
    held: int | None = None
    reached: np.ndarray = field(default_factory=lambda: np.zeros((0, 3)))


@dataclass(frozen=True)
class Task:
    """One kind of task. group: `pretraining`, `new` (for the lessons) or `lab`.   decisions: waypoints allowed.   about: one line."""

    name: str
    group: str
    decisions: int
    about: str


TASKS = {
    task.name: task
    for task in (
        Task("pick", "pretraining", 2, "pick up the named object"),
        Task("put", "pretraining", 3, "put the named object in the named bin"),
        Task("put_held_out", "new", 3, "put, with colour-object-bin combinations that pretraining never showed"),
        Task("move", "pretraining", 3, "move the named object to the left, the middle or the right"),
        Task("beside", "pretraining", 3, "place the named object beside another"),
        Task("stack", "new", 3, "stack the named object on a block: a relation never trained"),
        Task("forward", "new", 3, "move the named object forward: an unseen destination word"),
        Task("spatial", "new", 2, "pick up the leftmost, rightmost, nearest or farthest object"),
        Task("align", "lab", 3, "put the named block in the named bin, square with its walls: needs the wrist's yaw"),
        Task("navigate", "lab", 3, "visit two or three landmarks in the order of the instruction; a wrong leg ends the episode"),
        Task("assemble", "lab", 6, "two steps over three objects, in the order of the instruction"),
    )
}
PRETRAINING_TASKS = tuple(name for name, task in TASKS.items() if task.group == "pretraining")


def task_named(name: str) -> Task:
    """Raises ValueError that lists the tasks."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; the tasks are {', '.join(TASKS)}")
    return TASKS[name]


def is_held_out(command: Command) -> bool:
    """True for the fifth of all colour-object-bin combinations of `put` that pretraining leaves out (15 of 75)."""
    if command.task != "put":
        return False
    colour, shape = command.object
    return (COLOURS.index(colour) + 2 * SHAPES.index(shape) + COLOURS.index(command.destination)) % 5 == 0


def commands(task: str, scene: Scene) -> list[Command]:
    """Every command of this task that makes sense in the scene, in a fixed order; may be empty."""
    names = [thing.name for thing in scene.things]
    if task == "pick":
        return [Command("pick", name) for name in names]
    if task in ("put", "put_held_out"):
        pairs = [Command("put", name, tray.colour) for name in names for tray in scene.bins]
        return [c for c in pairs if is_held_out(c) == (task == "put_held_out")]
    if task == "move":
        return [Command("move", name, zone) for name in names for zone in ZONES]
    if task == "beside":
        return [Command("beside", a, b) for a, b in permutations(names, 2) if _is_free(scene, a, b)]
    if task == "stack":
        return [Command("stack", a, b) for a, b in permutations(names, 2) if b[1] == "block"]
    if task == "forward":
        return [Command("forward", name) for name in names]
    if task == "spatial":
        return [Command("spatial", scene.things[extreme_index(scene, word)].name, word) for word in EXTREMES]
    if task == "align":
        return [Command("align", name, tray.colour) for name in names if name[1] == "block" for tray in scene.bins]
    if task == "navigate":
        landmarks = [tray.colour for tray in scene.bins] + names
        return [
            Command("navigate", steps=tuple(Command("go", destination=d) for d in path))
            for legs in (2, 3) for path in permutations(landmarks, legs)
        ]
    if task == "assemble":
        return [
            Command("assemble", steps=(Command("put", a, tray.colour), Command("stack", b, c)))
            for a, b, c in permutations(names, 3) if c[1] == "block" for tray in scene.bins
        ]
    raise ValueError(f"unknown task {task!r}; the tasks are {', '.join(TASKS)}")


def meaning(text: str, scene: Scene) -> Command | None:
    """The command of this scene that a sentence says, in any of our phrasings and with or without a "please"; None where none fits."""
    polite = {word for frame in FRAMES.trained + FRAMES.held_out for word in words(frame.replace("{s}", ""))}
    said = [word for word in words(text) if word not in polite]
    for task in TASKS:
        for command in commands(task, scene):
            ways = sentences(command, False, scene.unique_colours) + sentences(command, True, scene.unique_colours)
            if said in map(words, ways):
                return command
    return None


def extreme_index(scene: Scene, word: str) -> int:
    """Which object the word means: leftmost, rightmost (by x), nearest, farthest (from the camera, by y)."""
    sign, axis = {"leftmost": (1, "x"), "rightmost": (-1, "x"), "nearest": (1, "y"), "farthest": (-1, "y")}[word]
    return int(np.argmin([sign * getattr(thing, axis) for thing in scene.things]))


def index_of(scene: Scene, name: tuple[str, str]) -> int:
    """Index of the object called (colour, shape).   Raises ValueError where the scene has none."""
    names = [thing.name for thing in scene.things]
    if name not in names:
        raise ValueError(f"there is no {' '.join(name)} on the table, only {', '.join(' '.join(n) for n in names)}")
    return names.index(name)


def _bin(scene, colour):
    for tray in scene.bins:
        if tray.colour == colour:
            return tray
    raise ValueError(f"there is no {colour} bin on the table, only {', '.join(tray.colour for tray in scene.bins)}")


def beside_place(x: float, y: float) -> tuple[float, float]:
    """Where `beside` puts an object: 9 cm from the reference at (x, y), on the side towards the table's middle."""
    return (x + BESIDE_GAP if x < 0 else x - BESIDE_GAP, y)


def _is_free(scene, moved, reference):
    ref = scene.things[index_of(scene, reference)]
    place = np.array(beside_place(ref.x, ref.y))
    others = [t for t in scene.things if t.name not in (moved, reference)]
    return all(np.hypot(*(place - (t.x, t.y))) >= _CLEAR for t in others)


def destination(command: Command, scene: Scene, state: State) -> np.ndarray:
    """(4,) where the object of `command` should go: x, y, height of the surface under it in metres, yaw in radians."""
    if command.task in ("put", "align"):
        tray = _bin(scene, command.destination)
        return np.array([tray.x, tray.y, FLOOR, tray.yaw])
    if command.task == "move":
        return np.array([*ZONE_PLACES[command.destination], 0.0, 0.0])
    if command.task == "forward":
        return np.array([*FORWARD_PLACE, 0.0, 0.0])
    if command.task in ("beside", "stack"):
        reference = index_of(scene, command.destination)
        x, y, z = state.positions[reference]
        if command.task == "beside":
            return np.array([*beside_place(x, y), 0.0, 0.0])
        return np.array([x, y, z + HALF_HEIGHT[command.destination[1]], state.yaws[reference]])
    raise ValueError(f"the task {command.task!r} moves no object to a place")


def leg_target(command: Command, scene: Scene, state: State) -> np.ndarray:
    """(3,) where one leg of a path leads: above a bin or above an object, in metres."""
    if isinstance(command.destination, tuple):
        x, y, _ = state.positions[index_of(scene, command.destination)]
    else:
        tray = _bin(scene, command.destination)
        x, y = tray.x, tray.y
    return np.array([x, y, HOVER])


def is_done(command: Command, scene: Scene, start: State, state: State) -> bool:
    """Did the robot do what the command says?   start: the state at the beginning of the episode."""
    if command.task == "navigate":
        return len(state.reached) >= len(command.steps) and _legs_done(command, scene, state) == len(command.steps)
    if command.task == "assemble":
        return all(is_done(step, scene, start, state) for step in command.steps)
    index = index_of(scene, command.object)
    if command.task in ("pick", "spatial"):
        return state.held == index
    if state.held == index:
        return False
    return _is_placed(command, scene, start, state, index)


def _is_placed(command, scene, start, state, index):
    x, y, z = state.positions[index]
    half = HALF_HEIGHT[command.object[1]]
    goal = destination(command, scene, state)
    if command.task in ("put", "align"):
        tray = _bin(scene, command.destination)
        c, s = np.cos(tray.yaw), np.sin(tray.yaw)
        across, along = c * (x - tray.x) + s * (y - tray.y), -s * (x - tray.x) + c * (y - tray.y)
        inside = max(abs(across), abs(along)) < BIN_HALF and z < half + 0.05
        return bool(inside and (command.task == "put" or yaw_error(state.yaws[index], tray.yaw) < np.radians(8)))
    if command.task in ("move", "forward"):
        return bool(np.hypot(x - goal[0], y - goal[1]) < 0.05 and z < half + 0.015)
    reference = index_of(scene, command.destination)
    rx, ry, rz = state.positions[reference]
    if command.task == "beside":
        still = np.hypot(*(state.positions[reference] - start.positions[reference])[:2]) < 0.03
        return bool(np.hypot(x - rx, y - ry) < 0.125 and z < half + 0.015 and rz < HALF_HEIGHT[command.destination[1]] + 0.015 and still)
    height = rz + HALF_HEIGHT[command.destination[1]] + half
    return bool(np.hypot(x - rx, y - ry) < 0.035 and abs(z - height) < 0.012)


def yaw_error(yaw: float, wanted: float) -> float:
    """Angle between two square things, in radians: 0 to pi/4, since a block looks the same every quarter turn."""
    turn = (yaw - wanted) % (np.pi / 2)
    return min(turn, np.pi / 2 - turn)


def has_failed(command: Command, scene: Scene, state: State) -> bool:
    """True where nothing can mend the episode: a wrong leg of a path."""
    return command.task == "navigate" and _legs_done(command, scene, state) < min(len(state.reached), len(command.steps))


def _legs_done(command, scene, state):
    done = 0
    for leg, tip in zip(command.steps, state.reached):
        if np.hypot(*(leg_target(leg, scene, state) - tip)[:2]) > 0.05:
            break
        done += 1
    return done


def current_step(command: Command, scene: Scene, start: State, state: State) -> Command:
    """The part of a multi-step command that comes next; a plain command is its own only step."""
    if command.task == "navigate":
        return command.steps[min(_legs_done(command, scene, state), len(command.steps) - 1)]
    if command.task == "assemble":
        return next((s for s in command.steps if not is_done(s, scene, start, state)), command.steps[-1])
    return command
