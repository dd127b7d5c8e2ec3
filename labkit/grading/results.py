"""What grading one submission came to: the record, and the folder that holds the records. What is made of them is in the modules beside.

    RESULTS/submissions/STUDENT.json   one record, the same bytes whenever the same submission is graded again
    RESULTS/times/STUDENT.json         seconds, which are never the same
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

from labkit.errors import UserError
from labkit.exercises.judging import Verdict

RECORDS, TIMES = "submissions", "times"
_LONGEST_NAME = 80
_HASHED = re.compile(r"-[0-9a-f]{8}$")


@dataclass(frozen=True)
class Question:
    """One written question as it was answered.   earned: None until a person has marked it.   comment: the marker's."""

    question: str
    notebook: str
    points: float
    answer: str
    earned: float | None = None
    comment: str = ""


@dataclass(frozen=True)
class Performance:
    """What a submitted adapter reached on hidden episodes.   message: one sentence; the only thing said where the adapter was refused (earned 0).

    success, retention: (rate, low, high) with 95 % Wilson intervals, None where it was refused.
    """

    task: str
    points: float
    earned: float
    message: str
    success: tuple[float, float, float] | None = None
    retention: tuple[float, float, float] | None = None
    episodes: int = 0


@dataclass(frozen=True)
class Late:
    """How late a submission came, in minutes after the deadline, and the share of its points that this costs (0 to 1)."""

    minutes: int = 0
    penalty: float = 0.0


@dataclass(frozen=True)
class Override:
    """Points set by hand, with the reason, which stays in the record.   item: an exercise's or question's id, or "performance"."""

    item: str
    earned: float
    reason: str
    by: str = ""


@dataclass(frozen=True)
class Graded:
    """One submission's record.

    student: the name results go by.   release: the id of the bundle that the assignment gave out.   isolation: the tier it was run in.
    submitted: ISO 8601 with offset, or "".   files: what was graded, relative to the submissions.   set_aside: older ones of the same student.
    digest: over everything that was graded.   problems: sentences about files and cells, for the student.
    verdicts: one for each exercise of the assignment, notebook by notebook.   notebooks: exercise id -> notebook.
    """

    student: str
    assignment: str
    release: str
    isolation: str
    submitted: str = ""
    files: tuple[str, ...] = ()
    set_aside: tuple[str, ...] = ()
    digest: str = ""
    problems: tuple[str, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    notebooks: dict[str, str] = field(default_factory=dict)
    questions: tuple[Question, ...] = ()
    performance: Performance | None = None
    late: Late = Late()
    overrides: tuple[Override, ...] = ()

    def earned(self, item: str) -> float | None:
        """Points of an exercise, a question or "performance", an override before anything else; None for a question that nobody has marked."""
        for override in reversed(self.overrides):
            if override.item == item:
                return override.earned
        for verdict in self.verdicts:
            if verdict.exercise == item:
                return verdict.earned
        for question in self.questions:
            if question.question == item:
                return question.earned
        if item == "performance" and self.performance is not None:
            return self.performance.earned
        raise KeyError(f"{self.student} has no {item!r}")

    @property
    def items(self) -> dict[str, float]:
        """Everything that gives points, and how many at most, in the assignment's order."""
        found = {verdict.exercise: verdict.points for verdict in self.verdicts} | {q.question: q.points for q in self.questions}
        return found | ({"performance": self.performance.points} if self.performance else {})

    @property
    def total(self) -> float:
        """Points after the late penalty, questions without a mark counted as 0; rounded to hundredths."""
        return round(sum(self.earned(item) or 0 for item in self.items) * (1 - self.late.penalty), 2)

    @property
    def out_of(self) -> float:
        """The most that could be reached."""
        return sum(self.items.values())

    @property
    def unmarked(self) -> list[str]:
        """Questions that nobody has marked and that were answered."""
        return [q.question for q in self.questions if q.answer and self.earned(q.question) is None]


def write_record(folder: Path, graded: Graded, seconds: float | None = None) -> Path:
    """Write one record, whole or not at all, and its time where one is given.   Returns the record's path."""
    text = json.dumps({**asdict(graded), "total": graded.total, "out_of": graded.out_of}, indent=1, ensure_ascii=False) + "\n"
    path = record_path(folder, graded.student)
    write_whole(path, text)
    if seconds is not None:
        write_whole(folder / TIMES / path.name, json.dumps({"seconds": round(seconds, 4)}) + "\n")
    return path


def record_path(folder: Path, student: str) -> Path:
    """Where a student's record lies. Names that no file can have are spelled with what is safe and made unique by a hash."""
    return folder / RECORDS / f"{file_name(student)}.json"


def file_name(student: str) -> str:
    """A file name without extension that belongs to this student alone, on every system."""
    safe = re.sub(r"[^\w.@+-]", "_", student)[:_LONGEST_NAME].strip(".")
    # Windows and macOS do not tell capitals apart, and see two spellings of an accent as one.
    plain = safe == student and safe != "" and safe.isascii() and safe == safe.lower() and not _HASHED.search(safe)
    return safe if plain else f"{safe}-{hashlib.sha256(student.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there with all of its text or, whatever interrupts, not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with open(unfinished, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_record(path: Path) -> Graded:
    """One record.   Raises UserError, one sentence, for a file that is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        named = {"verdicts": Verdict, "questions": Question, "overrides": Override}
        values = {name: found[name] for name in Graded.__dataclass_fields__}
        values |= {name: tuple(kind(**item) for item in values[name]) for name, kind in named.items()}
        values |= {name: tuple(values[name]) for name in ("files", "set_aside", "problems")}
        if values["performance"] is not None:
            spans = {name: tuple(values["performance"][name] or ()) or None for name in ("success", "retention")}
            values["performance"] = Performance(**values["performance"] | spans)
        return Graded(**values | {"late": Late(**values["late"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no record of a submission ({type(error).__name__}: {str(error)[:100]}): grade that student again.") from None


def read_records(folder: Path) -> list[Graded]:
    """All records of a results folder, by student.   Raises UserError where there is none."""
    paths = sorted((folder / RECORDS).glob("*.json"))
    if not paths:
        raise UserError(f"{folder / RECORDS} has no record: `python3 -m labkit grade SUBMISSIONS --out {folder}` makes them.")
    return sorted((read_record(path) for path in paths), key=lambda graded: graded.student)


def read_seconds(folder: Path) -> dict[str, float]:
    """Student's file name -> seconds; what is missing or unreadable is left out."""
    found = {}
    for path in sorted((folder / TIMES).glob("*.json")):
        try:
            found[path.stem] = float(json.loads(path.read_text(encoding="utf-8"))["seconds"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found
