"""Records in the forms that other programs read: a table, Canvas, Gradescope, nbgrader. Grades nothing and leaves the records alone."""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Iterable
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from labkit.errors import UserError
from labkit.grading.feedback import duration
from labkit.grading.pages import clean, csv_text, names_of, percent, points
from labkit.grading.results import Graded, file_name, write_whole

GRADES, CANVAS, GRADESCOPE, GRADEBOOK = "grades.csv", "canvas.csv", "gradescope", "gradebook.db"
# Without it Excel takes UTF-8 for something else.
BOM = "\ufeff"


def write_grades(folder: Path, records: Iterable[Graded]) -> Path:
    """Write FOLDER/grades.csv: one row a student, one column an item; empty where a question has no mark. Returns its path."""
    records = list(records)
    names, items = names_of(records), list(dict.fromkeys(item for graded in records for item in graded.items))
    rows = [["student", *items, "total", "out_of", "late_minutes", "penalty", "unmarked", "submitted", "problems"]]
    for g in records:
        earned = [g.earned(item) if item in g.items else None for item in items]
        rows.append([names[g.student], *earned, g.total, g.out_of, g.late.minutes, f"{g.late.penalty:g}", len(g.unmarked), g.submitted,
                     " | ".join(g.problems)])
    return _write(Path(folder) / GRADES, BOM + csv_text(rows))


def write_canvas(folder: Path, records: Iterable[Graded], title: str = "", roster: Iterable = ()) -> Path:
    """Write FOLDER/canvas.csv, as Canvas's gradebook imports it (instructure/canvas-lms, lib/gradebook_importer.rb). Returns its path.

    title: the assignment's as Canvas has it, with its number, "LoRA (4711)", where there are two of the same name.
    roster: objects with `id` and `name`; Canvas finds a student by SIS User ID, SIS Login ID or name, so a submission's student is the id.
    """
    records = list(records)
    names, known = names_of(records), {student.id: student.name for student in roster}
    title = title or (records[0].assignment if records else "")
    rows = [["Student", "ID", "SIS User ID", "SIS Login ID", "Section", title], ["Points Possible", "", "", "", "", _most(records)]]
    for graded in records:
        # Canvas takes every row whose first cell has these words for the row of maxima.
        name = (known.get(graded.student) or names[graded.student]).replace("Points Possible", "Points-Possible")
        rows.append([name, "", names[graded.student], names[graded.student], "", graded.total])
    return _write(Path(folder) / CANVAS, csv_text(rows))


def gradescope(graded: Graded) -> dict:
    """What Gradescope's results.json holds for this submission (gradescope-autograders.readthedocs.io, specs). All of it is plain text."""
    by_hand = {override.item: override.reason for override in graded.overrides}
    tests = [_test(graded, v.exercise, v.sentence, by_hand) | {"status": _passed(graded, v.exercise, v.points)} for v in graded.verdicts]
    for q in graded.questions:
        if q.answer and graded.earned(q.question) is None:
            # Without a score, so that it does not look like a mark of 0.
            said = f"Not marked yet: {points(q.points)} points."
            tests.append({"name": q.question, "output": said, "output_format": "text", "visibility": "visible"})
        else:
            tests.append(_test(graded, q.question, q.comment or ("" if q.answer else "Not answered."), by_hand))
    found = {
        "score": graded.total, "output": clean(_overall(graded)), "output_format": "text", "test_output_format": "text", "test_name_format": "text",
        "visibility": "visible", "stdout_visibility": "hidden", "tests": tests,
        "extra_data": {"digest": graded.digest, "release": graded.release, "isolation": graded.isolation},
    }  # fmt: skip
    if p := graded.performance:
        tests.append(_test(graded, "performance", p.message, by_hand) | {"status": _passed(graded, "performance", p.points)})
        rates = {"success (%)": p.success, "retention (%)": p.retention}
        found["leaderboard"] = [{"name": name, "value": round(100 * rate[0], 1)} for name, rate in rates.items() if rate]
    return found


def _test(graded, item, output, by_hand):
    reason = f" Set by hand: {by_hand[item]}" if item in by_hand else ""
    return {"name": item, "score": graded.earned(item) or 0, "max_score": graded.items[item], "output": clean(output + reason).strip(),
            "output_format": "text", "visibility": "visible"}


def _passed(graded, item, most):
    return "passed" if graded.earned(item) >= most else "failed"


def _overall(graded):
    lines = list(graded.problems)
    if graded.late.minutes:
        lines.append(f"Late by {duration(graded.late.minutes)}: {percent(graded.late.penalty)} of the points is taken off.")
    if graded.unmarked:
        lines.append(f"Written answers without a mark: {len(graded.unmarked)}. They count 0 until then.")
    return "\n".join([*lines, f"Isolation: {graded.isolation}."])


def write_gradescope(folder: Path, records: Iterable[Graded]) -> list[Path]:
    """Write FOLDER/gradescope/STUDENT.json for every record.   Returns the paths."""
    return [_write(Path(folder) / GRADESCOPE / f"{file_name(graded.student)}.json",
                   json.dumps(gradescope(graded), indent=1, ensure_ascii=False) + "\n") for graded in records]


def write_gradebook(folder: Path, records: Iterable[Graded], deadline: datetime | None = None, roster: Iterable = ()) -> Path:
    """Write FOLDER/gradebook.db through nbgrader's own API, anew every time (its ids are random).   Returns its path.

    Cells are called as in the source notebooks. nbgrader's sums know no late penalty, so it is in the grades' extra credit, as a negative number.
    Raises UserError where nbgrader is not installed.
    """
    try:
        from nbgrader.api import Gradebook
        from sqlalchemy import URL
    except ImportError as error:
        raise UserError(f"The gradebook is written by nbgrader, which is not installed ({error}): `python3 -m pip install nbgrader`.") from None

    records, path = list(records), Path(folder) / GRADEBOOK
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    unfinished.unlink(missing_ok=True)
    try:
        with _programs_of_this_python(), Gradebook(URL.create("sqlite", database=str(unfinished))) as gradebook:
            _fill(gradebook, records, deadline, {student.id: student for student in roster})
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


@contextmanager
def _programs_of_this_python():
    """The folder of this interpreter's programs first in PATH: nbgrader calls one, `alembic`, and the environment may not be activated."""
    before = os.environ.get("PATH", os.defpath)
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), before])
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _fill(gradebook, records, deadline, roster):
    from nbgrader.api import Student, SubmittedAssignment
    from nbgrader.utils import parse_utc

    names, name = names_of(records), records[0].assignment if records else "assignment"
    assignment = gradebook.add_assignment(name, duedate=deadline)
    cells = {item: cell for graded in records for item, cell in _cells(graded).items()}
    notebooks = {notebook: gradebook.update_or_create_notebook(notebook, name).id for notebook, *_ in cells.values()}
    graded_cells = {}
    for item, (notebook, cell, kind, most) in cells.items():
        graded_cells[item] = gradebook.add_grade_cell(cell, notebook, name, max_score=most, cell_type=kind).id
    # In one transaction: gradebook.add_submission commits, and reads the whole assignment again, for every student.
    rows = []
    for graded in records:
        student, id = roster.get(graded.student), names[graded.student]
        first, _, last = (student.name if student else "").rpartition(" ")
        rows.append(Student(id=id, first_name=clean(first), last_name=clean(last), email=student and clean(student.email)))
        submission = SubmittedAssignment(assignment_id=assignment.id, student_id=id, timestamp=parse_utc(graded.submitted or None))
        rows += [submission, *_grades(graded, submission, notebooks, graded_cells)]
    gradebook.db.add_all(rows)
    gradebook.db.commit()


def _cells(graded):
    """Item -> (notebook, the name of its cell there, the cell's kind, points)."""
    found = {v.exercise: (graded.notebooks.get(v.exercise, "exercises"), f"{v.exercise}-check", "code", v.points) for v in graded.verdicts}
    found |= {q.question: (q.notebook, q.question, "markdown", q.points) for q in graded.questions}
    return found | ({"performance": ("performance", "performance", "code", graded.performance.points)} if graded.performance else {})


def _grades(graded, submission, notebooks, cells):
    """The submission's notebooks and, in them, one grade an item."""
    from nbgrader.api import Grade, SubmittedNotebook

    parts = {notebook: SubmittedNotebook(notebook_id=id, assignment=submission) for notebook, id in notebooks.items()}
    by_hand, rest, grades = {override.item for override in graded.overrides}, graded.total, []
    for item, (notebook, _, kind, _) in _cells(graded).items():
        earned = graded.earned(item)
        score = {"manual_score" if kind == "markdown" or item in by_hand else "auto_score": earned}
        lost = (earned or 0) * graded.late.penalty
        rest -= (earned or 0) - lost
        grades.append(Grade(cell_id=cells[item], notebook=parts[notebook], needs_manual_grade=item in graded.unmarked, extra_credit=-lost, **score))
    if grades:
        max(grades, key=lambda grade: grade.manual_score or grade.auto_score or 0).extra_credit += rest  # a total is rounded
    return [*parts.values(), *grades]


def _most(records):
    return max((graded.out_of for graded in records), default=0)


def _write(path, text):
    write_whole(path, text)
    return path
