"""Demonstrations: one recorded episode as arrays, and the lab sheet's folder layout, written and read.

    dataset/
    ├── dataset.json              what this is: format, environment, command and recipe that made it, units, counts
    └── train/                    and validation/ and test/, laid out alike
        ├── images/               ID-K-rgb.png (8 bits a channel) and ID-K-depth.png (16 bits, millimetres) of decision K
        ├── language_commands.json    a list with one entry an episode: what was asked, by whom it was done, how it ended
        └── actions.json              a list with one entry an episode: its decisions

How an episode is recorded is in recording.py; what may be wrong with such a folder is found by dataset_check.py.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from labkit.actions import small_action
from labkit.errors import UserError
from labkit.instructions import Command
from labkit.tabletop import ENV_ID
from labkit.tabletop.arm import SPEED
from labkit.tabletop.camera import OBSERVATION_SIZE

FORMAT = 1
SPLITS = ("train", "validation", "test")
LANGUAGE, ACTIONS, ABOUT, IMAGES = "language_commands.json", "actions.json", "dataset.json", "images"
UNITS = {
    "depth": "millimetres along the optical axis, 0 where the ray hits nothing",
    "joints": "x y z in metres, roll pitch yaw in radians, before the decision",
    "end_effector": "pose of the pad's tip along the motion: x y z in metres, roll pitch yaw in radians",
    "action": "waypoint x y z in metres, roll pitch yaw in radians, grip (above 0.5: vacuum on)",
    "speed": "metres a second",
    "seconds": "duration of the motion, simulated",
}


@dataclass(frozen=True, eq=False)
class Demonstration:
    """One episode of n decisions. Row k of an array is what the robot saw and did at decision k.

    images: (n, 48, 48, 3) uint8.   depth: (n, 48, 48) float32 metres.   holding: (n,) bool, the vacuum sensor.
    joints: (n, 6) x, y, z in metres, roll, pitch, yaw in radians.   actions: (n, 7) waypoints: the same six, and grip.
    poses: n arrays (about 12, 6), the tip along the motion.   rewards: (n,).   seconds: (n,) how long each motion took.
    seed, speed (m/s), variation (what differs from `Variation()`): with the actions, all that replaying the episode needs.
    command: the instruction's meaning, where it is known.
    """

    id: str
    split: str
    instruction: str
    task: str
    operator: str
    success: bool
    images: np.ndarray
    depth: np.ndarray
    holding: np.ndarray
    joints: np.ndarray
    actions: np.ndarray
    poses: list[np.ndarray]
    rewards: np.ndarray
    seconds: np.ndarray
    seed: int | None = None
    speed: float = SPEED
    variation: dict = field(default_factory=dict)
    command: Command | None = None

    def __len__(self):
        return len(self.actions)


@dataclass
class Samples:
    """What fine-tuning learns from, one row a decision.

    instructions: N sentences.   images: (N, H, W, 3) uint8.   holding: (N,) bool.   actions: (N, 4) x, y, z in metres, grip.
    """

    instructions: list[str]
    images: np.ndarray
    holding: np.ndarray
    actions: np.ndarray

    def __len__(self):
        return len(self.instructions)


def samples(demonstrations: Iterable[Demonstration], failures: bool = False) -> Samples:
    """The decisions of the successful demonstrations (of all with `failures`), one under the other, in their order.

    Raises ValueError where nothing is left.
    """
    kept = [d for d in demonstrations if d.success or failures]
    if not kept:
        raise ValueError("there is no successful demonstration to learn from")
    return Samples(
        [d.instruction for d in kept for _ in range(len(d))],
        np.concatenate([d.images for d in kept]),
        np.concatenate([d.holding for d in kept]),
        np.concatenate([small_action(d.actions) for d in kept]),
    )


def write(folder, demonstrations: Iterable[Demonstration], *, recipe: dict | None = None, command: str = "",
          provenance: dict | None = None) -> dict:
    """Write demonstrations into a dataset folder as they come, or go on with one of the same recipe. Returns what dataset.json says.

    A kill at any moment leaves every whole episode readable: an episode's images come first, then its entry in actions.json, then the
    one in language_commands.json that makes it count, each file replaced in one step; dataset.json says `complete` at the end.
    recipe: how the demonstrations are made; a folder is continued only under the same one, but for the number of `episodes`.
    command: the command line that made it.   provenance: more entries for dataset.json, such as the freeze.
    Raises UserError where the folder holds something else, ValueError for an id that is there already or cannot be a file's name.
    """
    folder = Path(folder)
    about = {"format": FORMAT, "environment": ENV_ID, "command": command, "recipe": recipe or {}, "image_size": OBSERVATION_SIZE,
             "units": UNITS, **(provenance or {"freeze": None}), "complete": False, "counts": {}}
    _refuse_another(folder, about)
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / ABOUT, json.dumps(about, indent=2))
    splits = {name: _Split(folder / name) for name in SPLITS}
    for demonstration in demonstrations:
        if any(demonstration.id in split.ids for split in splits.values()):
            raise ValueError(f"{folder} has an episode {demonstration.id!r} already")
        splits[demonstration.split].add(demonstration)
    about.update(complete=True, counts=counts(folder))
    _replace(folder / ABOUT, json.dumps(about, indent=2))
    return about


def progress(folder) -> tuple[int, int]:
    """Successes and attempts recorded in `folder` so far: where `record(..., done=...)` goes on. (0, 0) where there is no dataset."""
    if not (Path(folder) / ABOUT).is_file():
        return 0, 0
    first = read_json(Path(folder) / ABOUT).get("recipe", {}).get("seed", 0)
    entries = [entry for name in SPLITS for entry in read_json(Path(folder) / name / LANGUAGE, missing=[])]
    seeds = [entry["seed"] for entry in entries if isinstance(entry.get("seed"), int)]
    return sum(entry.get("success") is True for entry in entries), max(seeds, default=first - 1) + 1 - first


def counts(folder) -> dict:
    """{split: {"episodes": ..., "successes": ..., "decisions": ...}} of a dataset that validates, from its entries."""
    found = {}
    for name in SPLITS:
        successes = {entry["id"]: entry["success"] for entry in read_json(Path(folder) / name / LANGUAGE, missing=[])}
        entries = [entry for entry in read_json(Path(folder) / name / ACTIONS, missing=[]) if entry["id"] in successes]
        decisions = sum(len(entry["decisions"]) for entry in entries)
        found[name] = {"episodes": len(entries), "successes": sum(successes.values()), "decisions": decisions}
    return found


class _Split:
    """One split's folder. Entries are kept as text, one a line, so that adding an episode to hundreds costs a copy, not an encoding."""

    def __init__(self, folder):
        self.folder = folder
        (folder / IMAGES).mkdir(parents=True, exist_ok=True)
        language = read_json(folder / LANGUAGE, missing=[])
        self.ids = {entry["id"] for entry in language}
        # An action entry without its sentence was cut off by a kill; the episode is recorded again.
        actions = [entry for entry in read_json(folder / ACTIONS, missing=[]) if entry["id"] in self.ids]
        self.lines = {ACTIONS: [_line(e) for e in actions], LANGUAGE: [_line(e) for e in language]}
        for name in self.lines:
            self._save(name)

    def add(self, d: Demonstration):
        if not re.fullmatch(r"[\w.-]+", d.id):
            raise ValueError(f"the id {d.id!r} cannot name a file: use letters, digits, dots, dashes and underscores")
        decisions = []
        for k in range(len(d)):
            rgb, depth = f"{IMAGES}/{d.id}-{k}-rgb.png", f"{IMAGES}/{d.id}-{k}-depth.png"
            _save_png(self.folder / rgb, d.images[k])
            _save_png(self.folder / depth, np.rint(d.depth[k] * 1000).astype(np.uint16))
            decisions.append({
                "rgb": rgb, "depth": depth, "holding": bool(d.holding[k]), "joints": d.joints[k].tolist(), "action": d.actions[k].tolist(),
                "end_effector": np.asarray(d.poses[k]).tolist(), "seconds": float(d.seconds[k]), "reward": float(d.rewards[k]),
            })  # fmt: skip
        entry = {"id": d.id, "instruction": d.instruction, "task": d.task, "operator": d.operator, "success": bool(d.success),
                 "seed": d.seed, "variation": d.variation, "command": command_facts(d.command)}
        self._add(ACTIONS, {"id": d.id, "speed": d.speed, "decisions": decisions})
        self._add(LANGUAGE, entry)
        self.ids.add(d.id)

    def _add(self, name, entry):
        self.lines[name].append(_line(entry))
        self._save(name)

    def _save(self, name):
        _replace(self.folder / name, "[\n" + ",\n".join(self.lines[name]) + "\n]")


def _refuse_another(folder, about):
    """Raise UserError unless `folder` is empty, absent, without an episode, or the same recipe's dataset and no longer than wanted."""
    if not (folder / ABOUT).is_file():
        if folder.is_dir() and any(path.suffix != ".tmp" for path in folder.iterdir()):
            raise UserError(f"{folder} is not empty and has no {ABOUT}: choose another folder")
        return
    if progress(folder) == (0, 0):
        return
    there, wanted = read_json(folder / ABOUT).get("recipe", {}), json.loads(json.dumps(about["recipe"]))
    for key in sorted({*there, *wanted} - {"episodes"}):
        if there.get(key) != wanted.get(key):
            raise UserError(f"{folder} was recorded with {key} {json.dumps(there.get(key))}, not {json.dumps(wanted.get(key))}: "
                            f"choose another folder, or remove this one to record it afresh")
    if there.get("episodes", 0) > wanted.get("episodes", 0):
        raise UserError(f"{folder} is a recording of {there['episodes']} episodes, more than {wanted.get('episodes', 0)}: "
                        f"choose another folder")


def _save_png(path, array):
    from PIL import Image

    Image.fromarray(array).save(path, optimize=True)


def _replace(path, text):
    """Write a text file so that at every moment there is the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text + "\n", encoding="utf-8", newline="\n")
    os.replace(temporary, path)


def _line(entry):
    return json.dumps(entry, separators=(",", ":"), ensure_ascii=False)


def command_facts(command: Command | None) -> dict | None:
    """A command as JSON has it, without the fields that are empty."""
    if command is None:
        return None
    return {name: value for name, value in asdict(command).items() if any(value)} | (
        {"steps": [command_facts(step) for step in command.steps]} if command.steps else {})


def read(folder, split: str | None = None, limit: int | None = None, failures: bool = False) -> list[Demonstration]:
    """The demonstrations of one split, or of all, in the order of recording; failed ones only with `failures`.

    limit: at most so many.   Raises UserError that names file, entry and fix for a folder that is not a dataset or is broken;
    ValueError for an unknown split.
    """
    folder = Path(folder)
    if split is not None and split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; the splits are {', '.join(SPLITS)}")
    if not folder.is_dir():
        raise UserError(f"there is no dataset in {folder}: record one with `python -m labkit record --out {folder}`")
    found = []
    for name in SPLITS if split is None else (split,):
        place = folder / name
        actions = {entry["id"]: entry for entry in read_json(place / ACTIONS)}
        for index, entry in enumerate(read_json(place / LANGUAGE)):
            if len(found) == limit:
                return found
            if failures or entry["success"]:
                try:
                    found.append(_demonstration(place, entry, actions[entry["id"]]))
                except (KeyError, TypeError, ValueError, OSError, SyntaxError) as error:
                    raise UserError(f"{place / ACTIONS}, episode {entry.get('id')} (entry {index} of {LANGUAGE}) cannot be read "
                                    f"({error!r}): `python -m labkit validate {folder}` says what to mend") from error
    return found


def read_json(path: Path, missing=None):
    """The content of a JSON file, or `missing`, where that is given and there is no file. Raises UserError that names file and fix."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if missing is not None:
            return missing
        raise UserError(f"{path} is missing: a dataset needs it; record the dataset again or put the file back") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): mend that place or record the dataset again") from error


def _demonstration(folder, language, actions):
    rows = actions["decisions"]
    columns = ("joints", "action", "reward", "seconds")
    joints, waypoints, rewards, seconds = (np.array([row[key] for row in rows], np.float64) for key in columns)
    return Demonstration(
        language["id"], folder.name, language["instruction"], language["task"], language["operator"], language["success"],
        np.stack([_read_png(folder / row["rgb"]) for row in rows]),
        np.stack([_read_png(folder / row["depth"]) for row in rows]).astype(np.float32) / 1000,
        np.array([row["holding"] for row in rows], bool), joints, waypoints,
        [np.array(row["end_effector"], np.float64) for row in rows], rewards, seconds,
        language.get("seed"), actions.get("speed", SPEED), language.get("variation", {}), command_from_facts(language.get("command")),
    )


def _read_png(path):
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image)


def command_from_facts(facts) -> Command | None:
    """The command whose `command_facts` these are."""
    if not facts:
        return None
    plain = {name: tuple(value) if isinstance(value, list) else value for name, value in facts.items() if name != "steps"}
    return Command(**plain, steps=tuple(command_from_facts(step) for step in facts.get("steps", ())))
