"""What an attack is: a notebook that was handed in, what it is after, and where. The attacks themselves are in the files beside.

An attack's cells say @COURSE@ for the instructor's folder (a made-up one: see `make_course`) and @PORT@ for a server that listens on this machine.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from labkit.exercises.exercise import exercises_of
from labkit.paths import NOTEBOOKS
from labkit.student_copies import without_solutions
from labkit.submission.cells import SETUP_TAG, grade_id, read_notebook, source_of

LESSON = "04_lora_parameter_counting"

# What an attack is after, and so what is looked for afterwards.
POINTS = "more points than its right answers earn"
TOLD = "a secret in the feedback"
FILES = "the instructor's files are changed"
LEFT = "a process is left behind"
STOPPED = "the submission after it is not graded"
LOST = "its right answers get no points, because grading broke off"
ENDLESS = "grading does not end"
REACHED = "a call that can harm others is carried out"
RAW = "feedback that acts on whoever reads it: escape sequences, HTML, formulas, a flood"
AIMS = (POINTS, TOLD, FILES, LEFT, STOPPED, LOST, ENDLESS, REACHED, RAW)

# An attack that only has to reach something says so with these words.
OPEN = "the wall is open"
# Words that stand where no student may look; whoever says them has looked.
SECRET, TOKEN, CAROLS, GRADE = "hush-9471-the-secret", "hush-3350-the-token", "hush-8126-carols-work", "hush-6620-carols-grade"
HUSH = (SECRET, TOKEN, CAROLS, GRADE)
TOKEN_VARIABLE = "COURSE_UPLOAD_TOKEN"

WRONG = {
    "lora-layer": "class LoRALinear(torch.nn.Module):\n    def __init__(self, weight, rank, alpha):\n        super().__init__()\n",
    "lora-count": "def count_lora(shapes, rank):\n    return 0\n",
    "lora-merge": "def merged(weight, A, B, alpha):\n    return torch.zeros_like(weight)\n",
    "lora-rank-needed": "def rank_needed(update, share):\n    return 0\n",
}


@dataclass(frozen=True)
class Attack:
    """One submission.   tries: what it does, in a sentence.   cells: exercise id -> what its cell holds in place of a solution.

    setup: lines after those of the set-up cell.   change: what is done to the finished notebook, in place.
    spoils: exercises that are solved, but that the attack may cost the student who hands it in; all other solved ones keep their points.
    """

    name: str
    aim: str
    tries: str
    cells: dict[str, str] = field(default_factory=dict)
    setup: str = ""
    change: Callable[[dict], None] = lambda notebook: None
    spoils: tuple[str, ...] = ()

    def __str__(self):
        return self.name

    @property
    def honest(self) -> list:
        """The exercises that it solves, and may expect points for."""
        return [exercise for exercise in exercises_of(LESSON) if exercise.id not in self.cells]

    def notebook(self, course: Path, port: int = 0) -> dict:
        """What is handed in."""
        notebook = solved()
        for cell in notebook["cells"]:
            if grade_id(cell) in self.cells:
                cell["source"] = self.cells[grade_id(cell)]
            elif is_setup(cell):
                cell["source"] += "\n" + self.setup
        self.change(notebook)
        text = json.dumps(notebook)
        return json.loads(text.replace("@COURSE@", str(course)).replace("@PORT@", str(port)))


def on_count(name, aim, tries, source, **more) -> Attack:
    """An attack in the cell of `count_lora(shapes, rank)`, which returns a number."""
    return Attack(name, aim, tries, {"lora-count": source}, **more)


def on_merge(name, aim, tries, source, **more) -> Attack:
    """An attack in the cell of `merged(weight, A, B, alpha)`, which returns a matrix."""
    return Attack(name, aim, tries, {"lora-merge": source}, **more)


@cache
def _released():
    source = read_notebook(NOTEBOOKS / f"{LESSON}.ipynb")
    solutions = {grade_id(cell): source_of(cell) for cell in source["cells"] if cell["cell_type"] == "code"}
    copied = without_solutions(copy.deepcopy(source))
    asked = {exercise.id: exercise for exercise in exercises_of(LESSON)}
    kept = []
    for cell in copied["cells"]:
        id = grade_id(cell) or ""
        if is_setup(cell):
            cell["source"] = source_of(cell)
        elif id in asked and cell["cell_type"] == "code":
            cell["source"] = solutions[id]
        elif id.removesuffix("-check") in asked:
            exercise = asked[id.removesuffix("-check")]
            cell["source"] = f"assert check({exercise.entry}) == {exercise.points}"
            cell["metadata"]["nbgrader"]["points"] = exercise.points
        else:  # demonstrations, which take minutes and count for nothing
            continue
        kept.append(cell)
    return {**copied, "cells": kept}


def solved() -> dict:
    """The student's copy of the lesson with every exercise solved: set-up, exercises, and a check that fails under each."""
    return copy.deepcopy(_released())


def is_setup(cell: dict) -> bool:
    """Whether it is the set-up cell."""
    return SETUP_TAG in cell["metadata"].get("tags", [])


def code_cell(source: str, **metadata) -> dict:
    """A cell that a student has added."""
    return {"cell_type": "code", "execution_count": None, "metadata": metadata, "outputs": [], "source": source}


def make_course(folder: Path) -> Path:
    """What an instructor's disk holds and a student may neither read nor change: the secret, the package, other students' work and grades."""
    carol = solved()
    carol["metadata"]["author"] = CAROLS
    contents = {
        "secret": SECRET, "home/.profile": "", "package/check.py": "def check(entry):\n    return 0\n", "results/carol.json": f'{{"{GRADE}": 15}}',
        "submissions/carol/04.ipynb": json.dumps(carol), "submissions/mallory/04.ipynb": "{}",
    }  # fmt: skip
    for name, text in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def state_of(folder: Path) -> dict:
    """Everything that can be seen of a folder: name -> kind and mode, time of change, content."""
    found = {}
    for path in sorted([folder, *folder.rglob("*")]):
        about = path.lstat()
        is_file = path.is_file() and not path.is_symlink()
        # A folder's own time changes with the scratch files of whoever works beside it.
        found[str(path)] = (about.st_mode, about.st_uid, about.st_mtime_ns if is_file else 0, path.read_bytes() if is_file else b"")
    return found
