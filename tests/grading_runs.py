"""Submissions of the LoRA lesson made by hand, zygotes that start quickly, and a look at what a run leaves behind, for the tests of grading."""

import json
import tempfile
import time
from dataclasses import replace

import psutil
import pytest

from labkit.grading import isolation
from labkit.grading.assignment import Assignment
from labkit.grading.grade import Course, job_of
from labkit.grading.results import write_record
from labkit.grading.sandbox import chosen_isolation
from labkit.grading.submissions import find_submissions
from labkit.paths import NOTEBOOKS
from labkit.submission.cells import SETUP_TAG, grade_id, read_notebook, source_of

LORA, SECRET = "04_lora_parameter_counting", "nobody outside these tests knows it"
SOURCE = read_notebook(NOTEBOOKS / f"{LORA}.ipynb")
SOLUTIONS = {grade_id(cell): source_of(cell) for cell in SOURCE["cells"]
             if cell["cell_type"] == "code" and cell["metadata"].get("nbgrader", {}).get("solution")}
ASSIGNMENT = Assignment("lora", "LoRA", (LORA,))
MATRICES = "def count_lora(shapes, rank):\n    return sum(rank * o * i for o, i in shapes)"
# Python runs it when it starts: what a zygote imports and the notebooks made here do not need is there already, and empty.
QUICK_ZYGOTE = """
import importlib.machinery, sys, types
if "labkit.grading.zygote" in sys.orig_argv:
    for name in ("matplotlib", "matplotlib.pyplot", "scipy", "scipy.stats", "transformers"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
"""


def cell(source, id=None, tags=(), kind="code"):
    """A cell as nbformat has it.   id: its name for nbgrader."""
    metadata = {"tags": list(tags)} | ({"nbgrader": {"grade_id": id, "solution": True, "schema_version": 3}} if id else {})
    return {"cell_type": kind, "metadata": metadata, "source": source} | ({"outputs": [], "execution_count": None} if kind == "code" else {})


def notebook(changed=(), setup="import torch", answer="Because of the rank.", before=(), after=()):
    """A notebook with the set-up, the four exercises solved, and the question answered.

    changed: exercise id -> another source, None for no such cell.   before, after: further cells.
    """
    sources = SOLUTIONS | dict(changed)
    exercises = [cell(source, id) for id, source in sources.items() if source is not None]
    cells = [cell(setup, tags=[SETUP_TAG]), *before, *exercises, cell(answer, "lora-question", kind="markdown"), *after]
    return {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": cells}


def hand_in(folder, student, content):
    """Write a notebook (a dict, or anything else as bytes) as this student's.   Returns the folder."""
    path = folder / student / f"{LORA}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


def class_of(folder, count):
    """Submissions of a small class: solved, wrong in one exercise, with a cell that raises, or with one that is missing, in turn."""
    kinds = [{}, {"lora-count": MATRICES}, {"lora-merge": "1 / 0"}, {"lora-layer": None}]
    for number in range(count):
        hand_in(folder, f"student{number:02}", notebook(kinds[number % len(kinds)], answer=f"Answer {number}."))
    return folder


def jobs_of(folder, course):
    """The jobs of a folder of submissions, by student."""
    return [job_of(submission, course) for submission in find_submissions(folder, course.assignment)]


def course(assignment=ASSIGNMENT, how=None, secret=SECRET, setups=()):
    """A course of these tests.   how: an Isolation; the strongest that works here by default."""
    return Course(assignment, secret, how or chosen_isolation(), tuple(setups))


def records(out):
    """name -> bytes of everything in RESULTS/submissions."""
    return {path.name: path.read_bytes() for path in (out / "submissions").iterdir()}


def as_written(folder, graded):
    """The bytes that a record becomes."""
    return write_record(folder, replace(graded)).read_bytes()


def needs_zygote():
    """Skip where this machine has no tier with a zygote."""
    found = isolation.probe()
    if found.tier == isolation.NONE:
        pytest.skip(f"no tier with a zygote works here: {found.layers}")


def quick_imports(patch, folder):
    """Zygotes that are started from here on import torch alone, in a quarter of the time, and all temporary files are in `folder`/tmp.

    Returns that folder.
    """
    place = folder / "tmp"
    place.mkdir()
    run_first(folder, "")
    patch.setenv("PYTHONPATH", str(folder / "first"))
    patch.setenv("TMPDIR", str(place))
    patch.setattr(tempfile, "tempdir", str(place))
    return place


def run_first(folder, more):
    """Have every Python that is started after `quick_imports` of this folder run these lines first."""
    (folder / "first").mkdir(exist_ok=True)
    (folder / "first" / "sitecustomize.py").write_text(QUICK_ZYGOTE + more)


def processes_of(place):
    """Zygotes and workers whose folder lies in `place`: it stands in their command lines."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(str(place) in part for part in process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_for(happened, seconds=60):
    """Wait until happened() is true.   Raises AssertionError after `seconds`."""
    until = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.01)
    return found


def assert_nothing_left(place, folders=True):
    """No zygote and no worker runs any more, and (folders) no temporary folder of theirs is there."""
    wait_for(lambda: not processes_of(place))
    assert not folders or not list(place.glob("labkit-*"))
