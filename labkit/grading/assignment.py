"""What is graded, until when, and for whom: an assignment and the small file that describes it. What students handed in is in submissions.py.

data/assignments/weeks-10-to-12.toml is an example with every key.
"""

from __future__ import annotations

import copy
import csv
import hashlib
import io
import json
import math
import re
import tomllib
from dataclasses import dataclass, field
from datetime import date, datetime, time, timedelta
from functools import cached_property
from pathlib import Path

from labkit.errors import UserError
from labkit.exercises.exercise import Exercise, exercises_of
from labkit.grading.results import Late
from labkit.notebooks import find_notebook, list_notebooks
from labkit.paths import NOTEBOOKS
from labkit.student_copies import without_solutions
from labkit.submission.cells import grade_id, read_notebook, source_of

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DAY = timedelta(days=1)


@dataclass(frozen=True)
class Student:
    """One line of the roster.   id: what results go by.   name, email: "" where the roster has none."""

    id: str
    name: str = ""
    email: str = ""


@dataclass(frozen=True)
class PerformanceTask:
    """What a submitted adapter is rolled out on.   task, retention_tasks: names of labkit.tabletop.tasks.

    episodes: of the new task; the old ones share as many.

    points: at most.   size_mib: of the adapter's file, at most.
    """

    task: str
    points: float
    retention_tasks: tuple[str, ...] = ()
    episodes: int = 100
    size_mib: float = 16.0


@dataclass(frozen=True)
class WrittenQuestion:
    """A question that a person marks.   id: the `grade_id` of the cell that the answer is written in."""

    notebook: str
    id: str
    points: float


@dataclass(frozen=True)
class Assignment:
    """What is graded.   notebooks: stems, as in `04_lora_parameter_counting`.   deadline: with its offset; None: nothing is late.

    grace_minutes, penalty_per_day, most_penalty: see `late`; the last two are shares of the points (0 to 1).
    points: exercise or question id -> points instead of those in the notebook.   leave_out: ids that are not graded.
    roster: empty where everybody may hand in.   source: the folder of the notebooks with their solutions.
    """

    name: str
    title: str
    notebooks: tuple[str, ...]
    deadline: datetime | None = None
    grace_minutes: float = 0.0
    penalty_per_day: float = 0.0
    most_penalty: float = 1.0
    points: dict[str, float] = field(default_factory=dict)
    leave_out: tuple[str, ...] = ()
    roster: tuple[Student, ...] = ()
    performance: PerformanceTask | None = None
    source: Path = NOTEBOOKS

    @cached_property
    def exercises(self) -> list[tuple[str, Exercise]]:
        """(notebook, exercise) in the lessons' order; each exercise has the points that it gives here."""
        return [(notebook, self._with_points(exercise)) for notebook in self.notebooks for exercise in exercises_of(notebook)
                if exercise.id not in self.leave_out]

    def _with_points(self, exercise):
        if exercise.id not in self.points:
            return exercise
        own = copy.copy(exercise)  # other assignments share the original
        own.points = self.points[exercise.id]
        return own

    @cached_property
    def questions(self) -> list[WrittenQuestion]:
        """The written questions in the lessons' order."""
        asked = [question for notebook in self.notebooks for question in questions_of(self.source / f"{notebook}.ipynb")]
        return [WrittenQuestion(q.notebook, q.id, self.points.get(q.id, q.points)) for q in asked if q.id not in self.leave_out]

    @cached_property
    def release(self) -> str:
        """Twelve hexadecimal digits over what students are given to fill in: the stubs, and the cells that check them.

        A mended sentence, a later deadline and other points change nothing; another exercise does.
        """
        cells = [[notebook, *_nbgrader_cells(self.source / f"{notebook}.ipynb")] for notebook in self.notebooks]
        return hashlib.sha256(json.dumps(cells, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def out_of(self) -> float:
        """The most that can be reached."""
        performance = self.performance.points if self.performance else 0
        return sum(exercise.points for _, exercise in self.exercises) + sum(question.points for question in self.questions) + performance


def questions_of(path: Path) -> list[WrittenQuestion]:
    """The written questions of a source notebook: markdown cells that nbgrader has answered and graded by hand.

    Raises UserError for a file that is no notebook.
    """
    found = []
    for cell in read_notebook(path)["cells"]:
        nbgrader = cell["metadata"].get("nbgrader", {})
        if cell["cell_type"] == "markdown" and nbgrader.get("grade") and nbgrader.get("solution"):
            found.append(WrittenQuestion(path.stem, nbgrader["grade_id"], nbgrader["points"]))
    return found


def _nbgrader_cells(path):
    """[grade_id, source] of every cell that nbgrader knows, as students get it."""
    return [[grade_id(cell), source_of(cell)] for cell in without_solutions(read_notebook(path))["cells"] if grade_id(cell)]


def default_assignment(source: Path = NOTEBOOKS) -> Assignment:
    """Every lesson that has exercises, without a deadline and for everybody."""
    notebooks = tuple(path.stem for path in list_notebooks(source) if exercises_of(path.stem))
    return Assignment("all-lessons", "All lessons", notebooks, source=source)


def late(assignment: Assignment, submitted: datetime | None) -> Late:
    """How late a submission is, and what that costs.

    Not later than the grace after the deadline: nothing. Later: `penalty_per_day` for every day begun since the deadline itself, `most_penalty`
    at most. Without a deadline or a time nothing is late.   submitted: with its offset; ValueError without.
    """
    if submitted is not None and submitted.utcoffset() is None:
        raise ValueError(f"{submitted} has no offset from UTC: whether it is late depends on it")
    if assignment.deadline is None or submitted is None or submitted <= assignment.deadline:
        return Late()
    after = submitted - assignment.deadline
    minutes = -(-after // timedelta(minutes=1))
    if after <= timedelta(minutes=assignment.grace_minutes):
        return Late(minutes, 0.0)
    days = -(-after // _DAY)
    return Late(minutes, round(min(assignment.most_penalty, days * assignment.penalty_per_day), 6))


def read_assignment(path: Path, source: Path = NOTEBOOKS) -> Assignment:
    """The assignment that a TOML file describes.   source: where its notebooks lie.

    Raises UserError, one sentence with the file, the key and the fix, for whatever in it cannot be meant.
    """
    path = Path(path)
    table = _Table(path, _toml(path))
    name = table.take("name", str, path.stem)
    if not _NAME.fullmatch(name):
        table.fail("name", f"{name!r} is no name for files and tables", "use letters, digits, hyphens, underscores and dots, at most 64")
    values = {
        "name": name,
        "title": table.take("title", str, name),
        "notebooks": _notebooks(table, source),
        "deadline": _deadline(table),
        "grace_minutes": table.number("grace_minutes", 0.0, 0, math.inf),
        "penalty_per_day": table.number("penalty_per_day", 0.0, 0, 1),
        "most_penalty": table.number("most_penalty", 1.0, 0, 1),
        "points": _points(table),
        "leave_out": table.names("leave_out"),
        "roster": _roster(table),
        "performance": _performance(table),
        "source": source,
    }
    table.nothing_left()
    assignment = Assignment(**values)
    _check_ids(table, assignment)
    return assignment


def _toml(path):
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: name the file that describes the assignment.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its name and who may read it.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not written in UTF-8: save it in that encoding.") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"{path} is no TOML ({str(error) or 'nested too deeply'}): compare it with "
                        "data/assignments/weeks-10-to-12.toml.") from None


_KINDS = {str: "text in quotes", list: "a list in square brackets", dict: "a table", int: "a whole number", float: "a number"}


class _Table:
    """A table of the file: what is taken from it is checked, what is left is unknown."""

    def __init__(self, path, values, prefix=""):
        self.path, self.values, self.prefix, self.known = path, dict(values), prefix, []

    def fail(self, key, fault, fix):
        raise UserError(f"{self.path}, {self.prefix}{key}: {fault}; {fix}.")

    def take(self, key, kind, default):
        self.known.append(key)
        value = self.values.pop(key, default)
        right = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
        if value is not default and not right:
            self.fail(key, f"{value!r} is not {_KINDS[kind]}", f"write {_KINDS[kind]}")
        return value

    def number(self, key, default, low, high, kind=float):
        value = self.take(key, kind, default)
        if value is None:
            self.fail(key, "missing", f"write {_KINDS[kind]}")
        if not low <= value <= high or math.isinf(value):
            self.fail(key, f"{value!r} is not possible", f"write {_KINDS[kind]} " + (
                f"of {low} or more" if math.isinf(high) else f"from {low} to {high}"))
        return value

    def names(self, key, default=()):
        values = self.take(key, list, default)
        for value in values:
            if not isinstance(value, str):
                self.fail(key, f"{value!r} is not {_KINDS[str]}", "write names in quotes")
            if values.count(value) > 1:
                self.fail(key, f"{value!r} stands there twice", "leave it in once")
        return tuple(values)

    def nothing_left(self):
        for key in self.values:
            self.fail(key, "nothing is called so", f"take it out, or write one of {', '.join(self.known)}")


def _notebooks(table, source):
    given = table.names("notebooks")
    if not given:
        table.fail("notebooks", "missing or empty", 'name at least one lesson, as in ["04_lora_parameter_counting"]')
    found = []
    for name in given:
        try:
            stem = find_notebook(name, source).stem
        except UserError as error:
            table.fail("notebooks", f"{name!r} is not one lesson", str(error).rstrip("."))
        if stem in found:
            table.fail("notebooks", f"{name!r} is {stem}, which stands there already", "leave it in once")
        if not exercises_of(stem) and not questions_of(source / f"{stem}.ipynb"):
            table.fail("notebooks", f"{stem} has neither exercises nor questions", "take it out")
        found.append(stem)
    return tuple(found)


def _deadline(table):
    table.known.append("deadline")
    deadline = table.values.pop("deadline", None)
    example = "write it with its offset from UTC and without quotes, as in 2026-03-27T23:59:00+01:00"
    if deadline is not None and not isinstance(deadline, datetime):
        plain = isinstance(deadline, (date, time))
        table.fail("deadline", f"{deadline if plain else repr(deadline)} is not a date with a time", example)
    if deadline is not None and deadline.utcoffset() is None:
        table.fail("deadline", f"{deadline} has no offset from UTC, so nobody knows when it is", example)
    return deadline


def _points(table):
    points = _Table(table.path, table.take("points", dict, {}), "points.")
    found = {id: points.number(id, None, 0, math.inf) for id in list(points.values)}
    for id, value in found.items():
        if value == 0:
            points.fail(id, "0 points", f'put "{id}" into leave_out instead')
    return found


def _check_ids(table, assignment):
    """What `points` and `leave_out` name must be in the assignment's notebooks."""
    exercises = [exercise.id for notebook in assignment.notebooks for exercise in exercises_of(notebook)]
    questions = [question.id for notebook in assignment.notebooks for question in questions_of(assignment.source / f"{notebook}.ipynb")]
    for key in ("points", "leave_out"):
        for id in getattr(assignment, key):
            if id not in exercises + questions:
                table.fail(f"{key}.{id}" if key == "points" else key, f"no exercise or question of these notebooks is called {id!r}",
                           f"write one of {', '.join(exercises + questions)}")
    if not assignment.exercises and not assignment.questions and assignment.performance is None:
        table.fail("leave_out", "nothing is left to grade", "take something out of the list")


def _performance(table):
    given = table.take("performance", dict, None)
    if given is None:
        return None
    from labkit.tabletop.tasks import TASKS

    inside = _Table(table.path, given, "performance.")
    task, retention = inside.take("task", str, ""), inside.names("retention_tasks")
    for key, names in (("task", [task]), ("retention_tasks", retention)):
        for name in names:
            if name not in TASKS:
                inside.fail(key, f"{name!r} is no task", f"write one of {', '.join(TASKS)}")
    if task in retention:
        inside.fail("retention_tasks", f"{task!r} is the new task itself", "take it out")
    found = PerformanceTask(
        task, inside.number("points", None, 0, math.inf), retention, inside.number("episodes", 100, 1, 10_000, int),
        inside.number("size_mib", 16.0, 0.001, 1024),
    )  # fmt: skip
    inside.nothing_left()
    return found


def _roster(table):
    name = table.take("roster", str, None)
    if name is None:
        return ()
    try:
        return read_roster(table.path.parent / name)
    except UserError as error:
        raise UserError(f"{table.path}, roster: {error}") from None


def read_roster(path: Path) -> tuple[Student, ...]:
    """The students of a CSV file with the columns id, name and email, in any order; other columns do not matter.

    The separator may be a comma, a semicolon or a tab. Only the id is needed.   Raises UserError, one sentence with the line and the fix.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its name, which is relative to the assignment's file.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not written in UTF-8: save it as 'CSV UTF-8'.") from None
    header = text.partition("\n")[0]
    separator = max(",;\t", key=header.count)
    try:
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        rows = [(lines.line_num, [cell.strip() for cell in row]) for row in lines]
    except csv.Error as error:
        raise UserError(f"{path} is no CSV ({error}): save it again from your spreadsheet as 'CSV UTF-8'.") from None
    rows = [(number, row) for number, row in rows if any(row)]
    columns = [cell.lower() for cell in rows[0][1]] if rows else []
    if "id" not in columns:
        raise UserError(f"{path}, line 1: no column is called id; the first line has to name the columns, as in id,name,email.")
    for name in ("id", "name", "email"):
        if columns.count(name) > 1:
            raise UserError(f"{path}, line 1: {columns.count(name)} columns are called {name}; leave one.")
    students, seen = [], {}
    for number, row in rows[1:]:
        cells = dict(zip(columns, row))
        student = Student(cells.get("id", ""), cells.get("name", ""), cells.get("email", ""))
        if not student.id:
            raise UserError(f"{path}, line {number}: no id; fill it in, or take the line out.")
        if not student.id.isprintable():
            raise UserError(f"{path}, line {number}: the id has control characters; type it anew.")
        if student.id in seen:
            raise UserError(f"{path}, line {number}: the id {student.id} is in line {seen[student.id]}, too; every student needs an own one.")
        seen[student.id] = number
        students.append(student)
    if not students:
        raise UserError(f"{path} names no student: write one line for each below the first, or take the roster out of the assignment.")
    return tuple(students)
