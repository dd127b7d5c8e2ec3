"""What students handed in: one `Submission` each, with the notebook that counts for every lesson. Runs and grades nothing.

Whose a file is: the roster's student that its folder or name means, otherwise the name itself (lms.py). In what was given, a folder is a
student's, and so is a file or a zip that lies beside others; what is in a student's own zip is that student's, whatever it is called.
A zip that is itself given on the command line is taken for an export, unless it is called after a student of the roster.

Which notebook counts: for every lesson the newest that can be read. Newer is what was handed in later by the export's own times; then by
Canvas's number of the upload; then by the file's time, to the minute; then by the number of the copy in its name, as in `04_lora (2).ipynb`;
then by its name. A submission's time is that of the newest file that counts. Times of files on the disk say nothing about being late.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from labkit.errors import UserError
from labkit.exercises.exercise import exercises_of
from labkit.exercises.judging import printable
from labkit.grading import lms
from labkit.grading.archives import MIB, File, list_files, shown
from labkit.grading.assignment import Assignment, questions_of
from labkit.grading.lms import PLAIN, Claim, Roster
from labkit.grading.release import from_another_release
from labkit.notebooks import list_notebooks
from labkit.student_copies import TEXT_STUB
from labkit.submission.cells import grade_id, source_of

LONGEST_ANSWER = 20_000
# A student's: notebooks looked into, bytes of them, sentences said about them.
MAX_NOTEBOOKS, MAX_BYTES, MAX_PROBLEMS = 60, 256 * MIB, 20
_NOTEBOOK = (".ipynb", ".ipynb.txt", ".ipynb.json")  # as some browsers save them
_ADAPTER, _ZIP = (".safetensors",), (".zip",)
_OTHER_ARCHIVES = (".7z", ".rar", ".tar", ".gz", ".tgz", ".bz2", ".xz")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_WRAPPERS = ("submitted", "submissions", "work", "notebooks")
_OURS = ("work", "notebooks", "labkit")  # folders of the bundle that students are given
_SHIPPED = "tiny_vla"  # the base model's, which is in the bundle, too
_COPY = re.compile(r"[ _-]*\((\d{1,4})\)$|-(?:copy)?(\d{1,4})$", re.IGNORECASE)


@dataclass(frozen=True)
class Submission:
    """What one student handed in.   student: the roster's id, otherwise a name.   submitted: with its offset, None where nobody knows.

    notebooks: lesson's stem -> the file that counts, read when it is needed.   adapters: safetensors files, the newest first.
    set_aside: names of files that a newer one takes the place of.   problems: sentences for the student.
    """

    student: str
    submitted: datetime | None
    notebooks: dict[str, File]
    adapters: tuple[File, ...] = ()
    set_aside: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the files that count."""
        return tuple(file.name for file in (*self.notebooks.values(), *self.adapters[:1]))


def find_submissions(paths: Path | str | Iterable[Path | str], assignment: Assignment) -> list[Submission]:
    """Every student's submission, by student.   paths: folders, zips and notebooks, one or several.

    A file `submitted.csv` (student, submitted) in a given folder says when work came, for exports without times.
    Raises UserError where a path does not exist, or nothing was handed in. What is wrong with one student's files is among their problems.
    """
    paths = [Path(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
    roster, lessons = Roster(assignment.roster), _lessons(assignment.source)
    claimed, times, problems = [], {}, defaultdict(list)
    for place, path in enumerate(paths):
        export = _Export(path, f"{path.name}/" if len(paths) > 1 else "", assignment, roster, lessons)
        claimed += [(place, claim, file) for claim, file in export.claims()]
        times |= {roster.find(Claim(PLAIN, name))[0] or name: moment for name, moment in export.times.items()}
    students = _students({(place, claim) for place, claim, _ in claimed}, roster, problems)
    works = defaultdict(list)
    for place, claim, file in claimed:
        works[students[place, claim]].append((claim, file))
    if not works:
        raise UserError(f"{', '.join(map(str, paths))} holds no submission: name a folder with a folder for each student, an export of your "
                        "learning platform, or a notebook.")
    return [_Examination(assignment, lessons, problems[student]).of(student, works[student], times.get(student)) for student in sorted(works)]


def read_notebook(file: File) -> dict:
    """The notebook in a file, with nothing but text in its cells.   Raises UserError, one sentence, for what is none."""
    return _parsed(file.read(), shown(file.name))


def read_answer(notebook: dict, question_id: str) -> str:
    """The text written for a question, 20,000 characters at most; "" where its cell is missing, empty, or as it was given out.

    A cell that was split in two has its name twice: the parts are joined. What kind of cell it was made does not matter.
    """
    stub = "\n".join(TEXT_STUB)
    parts = [source_of(cell).strip().removeprefix(stub).strip() for cell in notebook["cells"] if grade_id(cell) == question_id]
    return "\n\n".join(filter(None, parts))[:LONGEST_ANSWER]


class _Export:
    """One given path: its files, without folders that only wrap them, and what it says about whose they are.

    times: student's name -> when, as an instructor's list says.
    """

    def __init__(self, path, prefix, assignment, roster, lessons):
        listing = list_files(path, prefix)
        self.files, self.folders = listing.files, listing.folders
        self.name, self.roster, self.zone = assignment.name, roster, lms.zone_of(assignment.deadline)
        # One that begins another one comes after it.
        self.lessons = re.compile("|".join(map(_loosely, sorted(lessons, key=len, reverse=True))), re.IGNORECASE)
        self.root = path.resolve().name if path.is_dir() else path.stem
        self.nbgrader = self.root == "submitted"
        # In a folder it is the instructor's; a zip may be a student's.
        lists = [file for file in self.files if file.parts == (lms.TIMES,) and path.is_dir()]
        self.times = lms.read_times(lists[0], self.zone) if lists else {}
        self.whole = self._is_student(self.root) or "labkit" in self._tops()
        while not self.whole and self._is_wrapped():
            self._unwrap()

    def _is_student(self, name):
        return self.roster.find(Claim(PLAIN, name))[0] is not None

    def _tops(self):
        """The folders that everything lies in, whether they stand in the listing or only in the names of files."""
        return {parts[0] for parts in (*self.folders, *(file.parts for file in self.files if len(file.parts) > 1))}

    def _is_wrapped(self):
        """Whether everything lies in one folder that is no student's."""
        tops = self._tops()
        if len(tops) != 1 or any(len(file.parts) == 1 and _is_work(file) for file in self.files):
            return False
        (top,) = tops
        if lms.claim_of(top, self.zone) or self._is_student(top):
            return False
        beside = {file.parts[1] for file in self.files if len(file.parts) == 2}
        folders = {parts[1] for parts in (*self.folders, *(file.parts for file in self.files if len(file.parts) > 2)) if len(parts) > 1}
        work = any(len(file.parts) == 2 and _is_work(file) for file in self.files)
        return (
            top in (*_WRAPPERS, self.root)
            or lms.METADATA in beside
            or any(lms.claim_of(name, self.zone) for name in beside | folders)
            # A student's own folder that holds several folders and no notebook is nbgrader's.
            or (len(folders) > 1 and not work and not self.nbgrader)
        )

    def _unwrap(self):
        (top,) = self._tops()
        self.files = [replace(file, parts=file.parts[1:]) for file in self.files if len(file.parts) > 1]
        self.folders = [parts[1:] for parts in self.folders if len(parts) > 1]
        self.nbgrader = self.nbgrader or top == "submitted"
        self.whole = top in _OURS or "labkit" in self._tops()

    def claims(self):
        """(claim, file) of everything that is somebody's; (claim, None) for a folder without a file."""
        if self.whole:
            return [(Claim(PLAIN, self.root), file) for file in self.files or [None]]
        listed, files, tops = self._listed(), self.files, self._tops()
        if self.nbgrader and any(parts[1:2] == (self.name,) for parts in (*self.folders, *(file.parts for file in files))):
            files = [file for file in files if file.parts[1:2] == (self.name,)]  # the others are of other assignments
            tops = {parts[0] for parts in self.folders if parts[1:2] == (self.name,)}
        stamps = {file.parts[:2]: lms.timestamp_of(file, self.zone) for file in files if self.nbgrader and file.parts[2:] == (lms.TIMESTAMP,)}
        claims = []
        for file in files:
            top, flat = file.parts[0], len(file.parts) == 1
            found = listed.get(top) or _some(lms.claim_of(top, self.zone))
            if not found and (not flat or _is_work(file) or file.fault):  # beside the students' files lie lists and pages, too
                found = [Claim(PLAIN, self._called(top) if flat else top, submitted=stamps.get(file.parts[:2]))]
            claims += [(claim, file) for claim in found]
        for top in tops - {file.parts[0] for file in files}:
            claims += [(claim, None) for claim in listed.get(top) or [lms.claim_of(top, self.zone) or Claim(PLAIN, top)]]
        return claims

    def _listed(self):
        """Folder -> claims, from Gradescope's list; without one that can be read, students are called as their folders are."""
        for file in self.files:
            if file.parts == (lms.METADATA,):
                try:
                    return lms.gradescope_claims(file, self.zone)
                except UserError:
                    break
        return {}

    def _called(self, name):
        """Whose file lies beside others: what its name says besides the lesson's, otherwise what the folder or zip is called."""
        stem = _stem(name)
        if stem in ("adapter", "adapter_model"):
            return self.root
        rest, found = self.lessons.subn("", stem, count=1)
        return (_COPY.sub("", rest).strip(" _-.") or self.root) if found else stem


def _some(claim):
    return [] if claim is None else [claim]


def _loosely(stem):
    """A form that finds a lesson's name however its words are joined, with its number or without."""
    number, _, words = stem.partition("_")
    return rf"(?<![^\W_])(?:{re.escape(number)}[\W_]*)?" + r"[\W_]*".join(map(re.escape, words.split("_"))) + r"(?![^\W_])"


def _stem(name):
    suffix = next((suffix for suffix in (*_NOTEBOOK[::-1], *_ADAPTER, *_ZIP) if name.lower().endswith(suffix)), "")
    return name[: len(name) - len(suffix)]


def _is_work(file):
    """Whether what lies there, a zip itself and not what is in it, is what students hand in."""
    return file.parts[-1].lower().endswith((*_NOTEBOOK, *_ADAPTER, *_ZIP, *_OTHER_ARCHIVES))


def _students(claims, roster, problems):
    """(place, claim) -> student.   Where two names of one export mean the same student of the roster, only one that is its id does."""
    claims = sorted(claims, key=lambda pair: (pair[0], pair[1].kind, pair[1].identity, pair[1].order))
    meant = {pair: roster.find(pair[1]) for pair in claims}
    rivals = defaultdict(set)
    for (place, claim), (id, _) in meant.items():
        rivals[place, claim.kind, id].add(claim.identity)
    students = {}
    for (place, claim), (id, exactly) in meant.items():
        names = rivals[place, claim.kind, id]
        if id is not None and len(names) > 1 and not exactly:
            sentence = f"More than one name here means {shown(id)} of the roster ({', '.join(map(shown, sorted(names)))}): " \
                       f"this is graded as {shown(claim.unmatched)}."
            if sentence not in problems[claim.unmatched]:
                problems[claim.unmatched].append(sentence)
            id = None
        students[place, claim] = claim.unmatched if id is None else id
    return students


def _lessons(source):
    """Lesson's stem -> the names of the cells that its notebook has and no other."""
    return {
        path.stem: {exercise.id for exercise in exercises_of(path.stem)} | {question.id for question in questions_of(path)}
        for path in list_notebooks(source)
    }  # fmt: skip


def _newness(work):
    """What the rule at the top of this file compares."""
    claim, file = work
    copies = _COPY.search(_stem(file.basename))
    number = int(next(filter(None, copies.groups()))) if copies else 0
    return claim.submitted.timestamp() if claim.submitted else float("-inf"), claim.order, file.modified, number, file.name


class _Examination:
    """Looks into one student's files, the newest first."""

    def __init__(self, assignment, lessons, problems):
        self.assignment, self.lessons, self.problems = assignment, lessons, list(problems)
        self.notebooks, self.adapters, self.set_aside, self.elsewhere, self.others = {}, [], [], [], []
        self.moments, self.count, self.bytes = [], 0, 0

    def of(self, student, works, told):
        """The submission.   told: when it came, from the instructor's list; before everything else where it is there."""
        works = sorted(((claim, file) for claim, file in works if file is not None), key=_newness, reverse=True)
        for claim, file in works:
            self._look_at(claim, file)
        self._say_what_is_missing()
        moments = self.moments or [claim.submitted for claim, _ in works if claim.submitted]
        submitted = told or max(moments, default=None)
        if submitted is None and self.assignment.deadline and any(claim.late for claim, _ in works):
            self.problems.append("It is marked as late, but nothing says how late: no points are taken off for that.")
        if len(self.problems) > MAX_PROBLEMS:
            self.problems[MAX_PROBLEMS:] = [f"And {len(self.problems) - MAX_PROBLEMS} more of this kind."]
        # In the lessons' order, whatever the order they were found in.
        notebooks = {stem: self.notebooks[stem] for stem in self.assignment.notebooks if stem in self.notebooks}
        return Submission(student, submitted, notebooks, tuple(self.adapters), tuple(self.set_aside), tuple(self.problems))

    def _look_at(self, claim, file):
        name = file.basename.lower()
        if file.fault:
            if name.endswith((*_NOTEBOOK, *_ADAPTER, *_ZIP)) or "." not in name:
                self.problems.append(file.fault)
        elif name.endswith(_NOTEBOOK):
            self._look_into(claim, file)
        elif name.endswith(_ADAPTER) and _SHIPPED not in file.name.split("/"):
            self.adapters.append(file)
            if len(self.adapters) == 1 and self.assignment.performance:
                self._counts(claim)
            elif self.assignment.performance:
                self._set_aside(file, self.adapters[0], "adapter")
        elif name.endswith(_OTHER_ARCHIVES):
            self.problems.append(f"{shown(file.name)} is an archive that is not opened: hand in the notebooks, or a zip of them.")
        elif name.endswith(_PICKLED) and self.assignment.performance:
            self.problems.append(f"{shown(file.name)} is not opened, because such files can run code: save the adapter as safetensors.")
        else:
            self.others.append(file)

    def _look_into(self, claim, file):
        if self.count == MAX_NOTEBOOKS or self.bytes > MAX_BYTES:
            sentence = f"Only the {self.count} newest notebooks were looked into: hand in one for each lesson."
            self.problems += [] if sentence in self.problems else [sentence]
            return
        self.count += 1
        try:
            data = file.read()
            self.bytes += len(data)
            notebook = _parsed(data, shown(file.name))
        except UserError as error:
            self.problems.append(str(error))
            return
        lesson = _lesson_of(notebook, self.lessons)
        if lesson is None:
            self.problems.append(f"{shown(file.name)} has no cell of a lesson: work in a copy of the notebook that was given out and keep its cells.")
        elif lesson not in self.assignment.notebooks:
            self.elsewhere.append(file)
        elif lesson in self.notebooks:
            self._set_aside(file, self.notebooks[lesson], lesson)
        else:
            self.notebooks[lesson] = file
            self._counts(claim)
            self.problems += _remarks(notebook, shown(file.name), self.assignment)

    def _counts(self, claim):
        self.moments += [claim.submitted] if claim.submitted else []

    def _set_aside(self, file, newer, what):
        self.set_aside.append(file.name)
        self.problems.append(f"Of two files for {what} the newest counts, {shown(newer.name)}; {shown(file.name)} is set aside.")

    def _say_what_is_missing(self):
        missing = [stem for stem in self.assignment.notebooks if stem not in self.notebooks]
        if missing and not self.notebooks:
            there = f" Handed in: {_names(self.others)}." if self.others else ""
            self.problems.append(f"No notebook of this assignment was found.{there}")
        elif missing:
            self.problems.append(f"No notebook was found for {', '.join(missing)}.")
        if self.elsewhere:
            self.problems.append(f"Not part of this assignment, so not graded: {_names(self.elsewhere)}.")


def _names(files):
    some = [shown(file.name) for file in sorted(files, key=lambda file: file.name)[:5]]
    return ", ".join(some) + (f" and {len(files) - len(some)} more" if len(files) > len(some) else "")


def _parsed(data, name):
    again = "save it again in JupyterLab and hand that in, or start from a fresh copy"
    if not data.strip(b"\x00 \t\r\n"):
        raise UserError(f"{name} is an empty file: {again}.")
    try:
        notebook = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is no notebook ({printable(type(error).__name__ + ': ' + str(error)[:80])}): {again}.") from None
    if not isinstance(notebook, dict):
        raise UserError(f"{name} is no notebook (a {type(notebook).__name__}): {again}.")
    if isinstance(notebook.get("worksheets"), list):
        raise UserError(f"{name} is a notebook of format 3, which is not read: open it in JupyterLab, save it and hand that in.")
    cells = notebook.get("cells")
    if not isinstance(cells, list) or not cells:
        raise UserError(f"{name} has no cells: {again}.")
    for number, cell in enumerate(cells, start=1):
        source = cell.get("source", "") if isinstance(cell, dict) else None
        if not isinstance(source, str) and not (isinstance(source, list) and all(isinstance(line, str) for line in source)):
            raise UserError(f"{name}, cell {number}, is no cell with a text: {again}.")
    return notebook


def _lesson_of(notebook, lessons):
    """The lesson that most of the notebook's named cells are from; None without one."""
    ids = {grade_id(cell) for cell in notebook["cells"]}
    count, lesson = max(((len(ids & own), stem) for stem, own in lessons.items()), key=lambda found: found[0], default=(0, None))
    return lesson if count else None


def _remarks(notebook, name, assignment):
    """What is unusual about a notebook that is graded all the same."""
    metadata, remarks = _dict(notebook.get("metadata")), []
    if notebook.get("nbformat") != 4:
        remarks.append(f"{name} says it has format {_short(notebook.get('nbformat'))}, not 4; it is graded by the names of its cells.")
    language = _dict(metadata.get("kernelspec")).get("language") or _dict(metadata.get("language_info")).get("name") or "python"
    if not (isinstance(language, str) and "python" in language.lower()):
        remarks.append(f"{name} was saved with a kernel for {_short(language)}; its cells are run with Python.")
    if other := from_another_release(notebook, assignment):
        remarks.append(f"{name}: {other}")
    return remarks


def _dict(value):
    return value if isinstance(value, dict) else {}


def _short(value):
    return printable(str(value)[:40]) if isinstance(value, (str, int, float)) else type(value).__name__
