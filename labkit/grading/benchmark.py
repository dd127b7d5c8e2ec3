"""How fast grading is, how much memory it takes, and how that compares with running the same cells by nbclient. Nothing here is a test.

The submissions are copies of one lesson's solutions, some of them broken in the ways that students break them.
"""

from __future__ import annotations

import copy
import json
import os
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from labkit.grading.assignment import Assignment, PerformanceTask
from labkit.grading.grade import course_of, grade_all, job_of
from labkit.grading.results import read_records, read_seconds
from labkit.grading.sandbox import Isolation
from labkit.grading.submissions import find_submissions
from labkit.notebooks import find_notebook
from labkit.paths import NOTEBOOKS
from labkit.student_copies import without_solutions
from labkit.submission.cells import SETUP_TAG, grade_id, read_notebook

LESSON = "04"
SECRET = "a secret for the benchmark alone"
_BY_NBCLIENT = 3
# What becomes of a solution, and in how many of a thousand: most are right, some stay stubs, and about one notebook in a hundred does not end.
_KINDS = {"solved": 600, "stub": 120, "None": 107, "SyntaxError": 60, "NameError": 60, "noisy": 50, "endless": 3}
_BROKEN = {
    "None": "def {entry}(*arguments):\n    return None\n", "SyntaxError": "def {entry}(:\n", "NameError": "def {entry}(*a):\n    return undefined\n",
    "noisy": "print('x' * 1_000_000)\n", "endless": "while True:\n    pass\n",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One timed run.   seconds: without the start of the zygotes, which took `start`.   median: of a submission.   peak_mib: of the whole tree."""

    name: str
    submissions: int
    seconds: float
    start: float
    median: float
    peak_mib: float

    def __str__(self):
        rate = self.submissions / self.seconds
        return (f"{self.name:<24} {self.submissions:>5} submissions in {self.seconds:6.1f} s = {rate:5.1f} a second, median "
                f"{1000 * self.median:4.0f} ms each, after {self.start:.0f} s of starting; at most {self.peak_mib:,.0f} MiB")


def run_benchmark(isolation: Isolation, lanes: int, count: int = 200, many: int = 1000) -> Iterator[str]:
    """Yield lines as they are measured: solved submissions without and with everything that is written, `many` mixed ones, and the peer."""
    lesson = find_notebook(LESSON, NOTEBOOKS)
    assignment = Assignment("benchmark", f"Benchmark: {lesson.stem}", (lesson.stem,))
    source = read_notebook(lesson)
    with tempfile.TemporaryDirectory(prefix="labkit-benchmark-") as folder:
        out = Path(folder)
        write_submissions(source, out / "solved", count, mixed=False)
        write_submissions(source, out / "mixed", many, mixed=True)
        yield f"{lesson.stem}, isolation {isolation}, {lanes} lanes"
        plain = _timed("records only", assignment, isolation, lanes, out / "solved", out / "a", pages=False)
        yield str(plain)
        yield str(_timed("everything on", assignment, isolation, lanes, out / "solved", out / "b", pages=True))
        yield str(_timed("mixed quality", assignment, isolation, lanes, out / "mixed", out / "c", pages=True))
        yield f"{'adapters':<24} {by_adapters():.1f} s each, 200 episodes, one lane"
        seconds = by_nbclient(source)
        yield (f"{'peer: nbclient':<24} {seconds:.2f} s a submission, one after the other, the same cells and checks in one kernel each "
               f"(median of {_BY_NBCLIENT}): ratio {seconds * plain.submissions / plain.seconds:.0f}")


def write_submissions(source: dict, folder: Path, count: int, mixed: bool) -> None:
    """Write `count` students' notebooks: solved, or broken as in _KINDS, always the same ones."""
    rng, stubs = random.Random(0), without_solutions(copy.deepcopy(source))
    empty = {grade_id(cell): cell["source"] for cell in stubs["cells"] if grade_id(cell)}
    for number in range(count):
        notebook = {**source, "cells": []}
        for cell in source["cells"]:
            cell = {**cell, **({"outputs": [], "execution_count": None} if cell["cell_type"] == "code" else {})}
            if mixed and cell["cell_type"] == "code" and cell["metadata"].get("nbgrader", {}).get("solution"):
                [kind] = rng.choices(list(_KINDS), _KINDS.values())
                cell["source"] = _as(kind, "".join(cell["source"]), empty[grade_id(cell)])
            notebook["cells"].append(cell)
        place = folder / f"student-{number:04d}" / "lesson.ipynb"
        place.parent.mkdir(parents=True)
        place.write_text(json.dumps(notebook), encoding="utf-8")


def _as(kind, solution, stub):
    entry = next(line for line in solution.split("\n") if line.startswith(("def ", "class "))).split()[1].split("(")[0].rstrip(":")
    if kind == "noisy":
        return solution + "\n" + _BROKEN[kind]
    return {"solved": solution, "stub": stub}.get(kind) or _BROKEN[kind].format(entry=entry)


def _timed(name, assignment, isolation, lanes, submissions, out, pages):
    from labkit.grading import class_report, exports, feedback

    started: list[float] = []
    with peak_memory() as peak:
        begun = time.perf_counter()
        course = course_of(assignment, SECRET, isolation)
        jobs = [job_of(one, course) for one in find_submissions(submissions, assignment)]
        reading = time.perf_counter() - begun
        grade_all(jobs, course, out, lanes, on_ready=lambda: started.append(time.perf_counter()))
        if pages:
            records = read_records(out)
            exports.write_grades(out, records)
            feedback.write_feedback(out, records, assignment.title)
            class_report.write_report(out, records, assignment.title)
            exports.write_gradescope(out, records)
            exports.write_canvas(out, records, assignment.title)
        ended = time.perf_counter()
    median = float(np.median(list(read_seconds(out).values())))
    return Run(name, len(jobs), reading + ended - started[0], started[0] - begun - reading, median, peak[0])


def by_nbclient(source: dict) -> float:
    """Seconds of a submission by the usual way: a kernel that runs the set-up cell, the exercise cells and their checks."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.reads(json.dumps(source), as_version=4)
    notebook.cells = [cell for cell in notebook.cells if cell.cell_type == "code" and (SETUP_TAG in cell.metadata.get("tags", []) or grade_id(cell))]
    taken = []
    for _ in range(_BY_NBCLIENT):
        begun = time.perf_counter()
        NotebookClient(copy.deepcopy(notebook), timeout=300, kernel_name="python3").execute()
        taken.append(time.perf_counter() - begun)
    return float(np.median(taken))


def by_adapters(count: int = 3) -> float:
    """Median seconds to grade an adapter that ruins the policy: no episode ends before its last decision, so that none takes longer."""
    import torch
    from safetensors.torch import save

    from labkit.grading.performance import AdapterGrader

    grader = AdapterGrader(PerformanceTask("stack", 10.0, ("pick", "put", "move", "beside")), SECRET, "benchmark")
    drawn, tensors = torch.Generator().manual_seed(0), {}
    for layer, (out, width) in grader.layers.items():
        if "language_model" in layer:
            for half, shape in (("A", (16, width)), ("B", (out, 16))):
                tensors[f"base_model.model.{layer}.lora_{half}.weight"] = torch.randn(shape, generator=drawn)
    grader.grade(save(tensors))  # rolls out the untouched policy, too, once for all
    taken = []
    for _ in range(count):
        begun = time.perf_counter()
        grader.grade(save(tensors))
        taken.append(time.perf_counter() - begun)
    return float(np.median(taken))


@contextmanager
def peak_memory(seconds: float = 0.5) -> Iterator[list[float]]:
    """A list whose one number is, at the end, the most MiB that this process and all below it held at once, shared pages counted once."""
    peak, ended = [0.0], threading.Event()

    def watch():
        while not ended.wait(seconds):
            peak[0] = max(peak[0], _held())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        ended.set()
        watcher.join()


def _held():
    total, this = 0, psutil.Process(os.getpid())
    for process in (this, *this.children(recursive=True)):
        try:
            found = process.memory_full_info()
            total += getattr(found, "pss", found.uss)  # proportional: a page that n processes share counts 1/n in each
        except psutil.Error:
            pass
    return total / 2**20
