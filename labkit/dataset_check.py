"""The checker of datasets: everything that is wrong with a folder of demonstrations, each with its file, its entry and its fix."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from labkit.demonstrations import ABOUT, ACTIONS, FORMAT, IMAGES, LANGUAGE, SPLITS, counts, read_json
from labkit.errors import UserError
from labkit.instructions import unknown_words
from labkit.tabletop.arm import HIGH, LOW
from labkit.tabletop.camera import OBSERVATION_SIZE

_POSE = ("x", "y", "z", "roll", "pitch", "yaw")
_WAYPOINT = (*_POSE, "grip")
_AGAIN = "record the episode again, or remove it from both JSON files"
_ROUNDING = 1e-6
_HUGE = 1e9


@dataclass(frozen=True)
class Problem:
    """Something wrong with a dataset.

    file: path inside the dataset.   place: entry, id and decision, "" for the whole file.   message: what is wrong and what mends it.
    warning: True where the dataset can be used as it is.
    """

    file: str
    place: str
    message: str
    warning: bool = False

    def __str__(self):
        return self.in_folder("")

    def in_folder(self, folder) -> str:
        """The problem in one line, its file named from where `folder` is."""
        where = (Path(folder) / self.file).as_posix() + (f", {self.place}" if self.place else "")
        return f"{'warning: ' if self.warning else ''}{where}: {self.message}"


def validate(folder) -> list[Problem]:
    """Everything that is wrong with the dataset in `folder`, in the order of its files; an empty list where all is well.

    Raises UserError where there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no dataset in {folder}: name a folder that has {', '.join(SPLITS)} in it")
    return _Check(folder).problems


class _Check:
    """One pass over one dataset; whatever it meets goes on the list, and it goes on."""

    def __init__(self, folder):
        self.folder = folder
        self.problems = []
        self.seen = {}  # (what, its value) -> (split, place) of the episode that had it first
        about = self._about()
        self.interrupted = about.get("complete") is False
        for path in sorted(folder.iterdir()):
            if path.is_dir() and path.name not in SPLITS and not path.name.startswith("."):
                self._add(path.name, "", f"unknown split: rename the folder to one of {', '.join(SPLITS)}, or move it out of the dataset")
        for split in SPLITS:
            self._split(split)
        if about.get("complete") is True and not self._errors():
            self._compare_counts(about.get("counts"))

    def _add(self, file, place, message, warning=False):
        self.problems.append(Problem(file, place, message, warning))

    def _errors(self):
        return [problem for problem in self.problems if not problem.warning]

    # The pieces, from the whole folder down to one number.

    def _about(self):
        about = self._load(ABOUT, dict, "put it back, or nobody will know how the dataset was made", True)
        if about is None:
            return {}
        if about.get("format") != FORMAT:
            self._add(ABOUT, "format", f"is {about.get('format')!r}, this labkit reads {FORMAT}: record the dataset again")
        if about.get("complete") is False:
            self._add(ABOUT, "complete", "the recording was interrupted, its whole episodes count: run its `command` again to go on", True)
        return about

    def _compare_counts(self, stated):
        found = counts(self.folder)
        if stated != found:
            text = f"states {json.dumps(stated)}, the files hold {json.dumps(found)}: correct it, or bring the episodes back"
            self._add(ABOUT, "counts", text, True)

    def _split(self, split):
        # A recording that was killed may have come no further than this; a finished one always has both files.
        language = self._load(f"{split}/{LANGUAGE}", list, "put it back (`[]` for no episodes)", self.interrupted)
        actions = self._load(f"{split}/{ACTIONS}", list, "put it back (`[]` for no episodes)", self.interrupted)
        spoken = self._by_id(f"{split}/{LANGUAGE}", language or [])
        moved = self._by_id(f"{split}/{ACTIONS}", actions or [])
        named = set()
        for id, (place, entry) in spoken.items():
            self._language(f"{split}/{LANGUAGE}", place, entry)
            self._leak(split, place, id, entry)
            if actions is not None and id not in moved:
                self._add(f"{split}/{LANGUAGE}", place, f"has no entry in {ACTIONS}: add it there, or remove it here")
        for number, (id, (place, entry)) in enumerate(moved.items()):
            success = spoken[id][1].get("success") if id in spoken else None
            self._actions(split, place, entry, success, named)
            if language is not None and id not in spoken:
                cut_off = self.interrupted and number == len(moved) - 1
                fix = "run the recording again to complete it" if cut_off else "add it there, or remove it here"
                self._add(f"{split}/{ACTIONS}", place, f"has no entry in {LANGUAGE}: {fix}", cut_off)
        if actions is not None:
            self._unnamed_images(split, named)

    def _load(self, file, kind, fix, missing_is_warning=False):
        path = self.folder / file
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            self._add(file, "", f"is missing: {fix}", missing_is_warning)
            return None
        except (ValueError, OSError, RecursionError) as error:
            self._add(file, "", f"is not JSON ({error}): mend that place, or record the dataset again")
            return None
        if not isinstance(content, kind):
            self._add(file, "", f"holds a {type(content).__name__}, expected a {kind.__name__}: record the dataset again")
            return None
        return content

    def _by_id(self, file, entries):
        """{id: (place, entry)} of the entries that have an id of their own."""
        found = {}
        for index, entry in enumerate(entries):
            id = entry.get("id") if isinstance(entry, dict) else None
            if not isinstance(entry, dict):
                self._add(file, f"entry {index}", f"is a {type(entry).__name__}, expected an object with an id: {_AGAIN}")
            elif not isinstance(id, str) or not id.strip():
                self._add(file, f"entry {index}", f"the id is {id!r}, expected a text of its own: give it the one it has in the other file")
            elif id in found:
                text = f"duplicate id, {found[id][0]} has it too: remove one, or give it another id in both files"
                self._add(file, f"entry {index} ({id})", text)
            else:
                found[id] = (f"entry {index} ({id})", entry)
        return found

    def _language(self, file, place, entry):
        instruction = entry.get("instruction")
        if not isinstance(instruction, str) or not instruction.strip():
            self._add(file, place, f"empty instruction ({instruction!r}): write what the robot was asked to do")
        elif unknown_words(instruction):
            strange = ", ".join(unknown_words(instruction))
            self._add(file, place, f"words outside the vocabulary of the tiny VLA: {strange}; say it in others", True)
        for key in ("task", "operator"):
            if not isinstance(entry.get(key), str) or not entry[key].strip():
                self._add(file, place, f"the {key} is {entry.get(key)!r}, expected a name: write it")
        if not isinstance(entry.get("success"), bool):
            self._add(file, place, f"success is {entry.get('success')!r}, expected true or false: write how the episode ended")

    def _leak(self, split, place, id, entry):
        """An episode in two splits makes the test score a lie, also under another id."""
        marks = [("episode", id)]
        if isinstance(entry.get("task"), str) and isinstance(entry.get("seed"), int):
            marks.append((f"scene of {entry['task']}, seed", entry["seed"]))
        for what, value in marks:
            first, where = self.seen.setdefault((what, value), (split, place))
            if first != split:
                text = f"the {what} {value} is in two splits, {first}/{LANGUAGE}, {where} has it too: remove one"
                self._add(f"{split}/{LANGUAGE}", place, text)
                return

    def _actions(self, split, place, entry, success, named):
        file, decisions = f"{split}/{ACTIONS}", entry.get("decisions")
        if not isinstance(decisions, list) or not decisions:
            found = "empty" if decisions == [] else type(decisions).__name__
            self._add(file, place, f"decisions is {found}, expected a list with at least one: {_AGAIN}")
            return
        for k, decision in enumerate(decisions):
            where = f"{place}, decision {k}"
            if not isinstance(decision, dict):
                self._add(file, where, f"is a {type(decision).__name__}, expected an object: {_AGAIN}")
                continue
            for key, mode in (("rgb", "RGB"), ("depth", "I;16")):
                self._image(split, where, key, decision.get(key), mode, named)
            if not isinstance(decision.get("holding"), bool):
                self._add(file, where, f"holding is {decision.get('holding')!r}, expected true or false: {_AGAIN}")
            self._row(file, where, "joints", decision.get("joints"), _POSE)
            self._row(file, where, "action", decision.get("action"), _WAYPOINT, LOW, HIGH)
            poses = decision.get("end_effector")
            if not isinstance(poses, list) or not poses:
                self._add(file, where, f"end_effector is {poses!r}, expected a list of poses: {_AGAIN}")
            for p, pose in enumerate(poses if isinstance(poses, list) else []):
                self._row(file, where, f"end_effector {p}", pose, _POSE)
            for key in ("reward", "seconds"):
                self._row(file, where, key, [decision.get(key)], (key,))
        last = decisions[-1].get("reward") if isinstance(decisions[-1], dict) else None
        if isinstance(success, bool) and isinstance(last, (int, float)) and success != (last > 0):
            text = f"the last reward is {last}, but {LANGUAGE} says success {str(success).lower()}: correct the one that is wrong"
            self._add(file, place, text)

    def _row(self, file, place, key, values, names, low=None, high=None):
        """A list of numbers: is it one, how many, are they finite, are they inside the workspace?"""
        if not isinstance(values, list) or len(values) != len(names):
            count = f"{len(values)} numbers" if isinstance(values, list) else f"{values!r}"
            self._add(file, place, f"{key}: {count}, expected {len(names)} ({' '.join(names)}): {_AGAIN}")
            return
        for i, (name, value) in enumerate(zip(names, values, strict=True)):
            what = key if name == key else f"{key}: {name}"
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                self._add(file, place, f"{what} is {value!r}, expected a number: {_AGAIN}")
            elif not -_HUGE < value < _HUGE:  # NaN compares false
                self._add(file, place, f"{what} is {value if isinstance(value, float) else 'huge'}, expected a finite number: {_AGAIN}")
            elif low is not None and not low[i] - _ROUNDING <= value <= high[i] + _ROUNDING:
                unit = "" if name == "grip" else " m" if name in "xyz" else " rad"
                text = f"{what} is {value:g}{unit}, outside the workspace ({low[i]:.4g} to {high[i]:.4g}{unit}): correct it, or {_AGAIN}"
                self._add(file, place, text)

    def _image(self, split, place, key, name, mode, named):
        from PIL import Image

        if not isinstance(name, str) or not name.startswith(IMAGES + "/") or ".." in name or not name.isprintable():
            self._add(f"{split}/{ACTIONS}", place, f"{key} is {name!r}, expected a file in {IMAGES}/: name the image")
            return
        named.add(name)
        file, path, size = f"{split}/{name}", self.folder / split / name, (OBSERVATION_SIZE, OBSERVATION_SIZE)
        place = f"{ACTIONS} {place}"
        if not os.path.isfile(path):  # unlike Path.is_file it takes any name, however long
            self._add(file, place, f"is missing: put the {key} image back; or {_AGAIN}")
            return
        try:
            with Image.open(path) as image:
                found = (image.format, image.mode, image.size)
                if found[2] == size:
                    image.load()
        except Exception as error:  # Pillow has half a dozen kinds for a broken file
            self._add(file, place, f"cannot be read as PNG ({error}): put a good copy back; or {_AGAIN}")
            return
        if found[0] != "PNG":
            self._add(file, place, f"is a {found[0]} file, expected PNG: save it as PNG without loss; or {_AGAIN}")
        if found[2] != size:
            self._add(file, place, f"is {found[2][0]} x {found[2][1]} pixels, expected {size[0]} x {size[1]}: {_AGAIN}")
        if found[1] != mode:
            wanted = {"RGB": "RGB, 8 bits a channel", "I;16": "one channel of 16 bits, in millimetres"}[mode]
            self._add(file, place, f"has the mode {found[1]}, expected {mode} ({wanted}): {_AGAIN}")

    def _unnamed_images(self, split, named):
        folder = self.folder / split / IMAGES
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if f"{IMAGES}/{path.name}" not in named:
                self._add(f"{split}/{IMAGES}/{path.name}", "", "no entry names this image: remove it, or bring its episode back", True)


def summary(folder) -> dict:
    """What a dataset that validates holds: `counts` by split, `kilobytes` of content, `unknown_words` {word: how often}."""
    folder = Path(folder)
    said = [entry["instruction"] for split in SPLITS for entry in read_json(folder / split / LANGUAGE, missing=[])]
    return {
        "counts": counts(folder),
        "kilobytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1000,
        "unknown_words": dict(Counter(unknown_words(" ".join(said)))),
    }
