"""The students' bundle: the lessons with stubs instead of solutions, the package without what grades, the data, and a README of its own.

What an assignment is, and its id, are in assignment.py; how a solution is taken out of a notebook is in labkit/student_copies.py.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

from labkit import __version__
from labkit.errors import UserError
from labkit.exercises.judging import printable
from labkit.grading.assignment import Assignment
from labkit.notebooks import list_notebooks
from labkit.paths import DATA, ROOT
from labkit.student_copies import RELEASE, without_solutions
from labkit.submission.cells import read_notebook, source_of

ABOUT = "release.json"
# It shows how to use the course, so it comes along with every assignment.
INTRODUCTION = "00_start_here"
# Of the package: what is for instructors, and what needs the tests.
LEFT_OUT = ("labkit/grading/", "labkit/commands/release.py", "labkit/commands/grade.py", "labkit/commands/test.py")
# Named one by one: assignments and rosters lie in the same folder.
DATA_PARTS = ("claims.json", "demonstrations", "sweeps", "tiny_clip", "tiny_clip_policy", "tiny_vla")
TOP = ("LICENSE", "environment.yml", "pyproject.toml")
_HIDDEN = re.compile(r"^[ \t]*### BEGIN HIDDEN TESTS\n.*?^[ \t]*### END HIDDEN TESTS\n", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"(BEGIN|END) (SOLUTION|HIDDEN TESTS|MARK SCHEME)")
_TITLE = re.compile(r"^# (.+)$", re.MULTILINE)
# A zip file says when each of its files was made; these were made whenever.
_NO_TIME = (1980, 1, 1, 0, 0, 0)
# What requirements.txt says of packages that students do not need.
_NOT_FOR_STUDENTS = ("# test:", "# grade:")
_LEFTOVERS = (".pyc", ".tmp", ".unfinished")

README = """# {title}

Assignment `{name}`, release `{release}`.{due}

## Start

You need Python 3.11, 3.12 or 3.13 and about 3 GB of disk; no GPU, no robot, and no network once it is installed. In this folder:

```bash
python3 -m labkit lab
```

makes `.venv`, installs `requirements.txt` into it and opens JupyterLab. On Windows write `py` for `python3`. Inside conda
(`conda env create -f environment.yml`, `conda activate labkit`) or another environment that has the packages, none is made.
`python3 -m labkit doctor` says what works on your machine, `python3 -m labkit --help` what else there is.

## Work

`lab` opens your own copies of the lessons, in `work/`; they are never overwritten. Where a cell says `YOUR CODE HERE`, put your lines in place of
that line and of the `raise` below it; where one says `YOUR ANSWER HERE`, write your answer. The cell under an exercise checks it in milliseconds,
as often as you like, and names the mistake that it recognises. Without a solution the lesson goes on with the library's version.

Leave the exercises' cells where they are: they are found by their names, not by what is written in them. Cells of your own do no harm, but an
exercise's cell can only use the set-up cell and the exercises before it, and not peft, bitsandbytes or scikit-learn: for some exercises these are
the answer. `python3 -m labkit lab --reset 04` makes a copy afresh, and keeps yours.

## Hand in

1. Save the notebook (Ctrl+S).
2. Run its last cell. It runs what you saved, the set-up cell and the exercises' cells, in a fresh process as the grader does, and prints a receipt.
3. Hand in from `work/`, under the same names:

{files}

The checks here are public. The grader asks other cases as well, so a solution that fits these cases only is not enough. Written questions are read
by a person.

## What is in it

| notebook | | exercises | questions | points |
| --- | --- | ---: | ---: | ---: |
{rows}
"""


@dataclass(frozen=True)
class Lesson:
    """One notebook of a bundle.   exercises, questions: id -> points, of those that are graded."""

    notebook: str
    title: str
    exercises: dict[str, float]
    questions: dict[str, float]

    @property
    def points(self) -> float:
        """All that it gives."""
        return sum(self.exercises.values()) + sum(self.questions.values())


def lessons(assignment: Assignment, also=()) -> list[Lesson]:
    """The lessons of the assignment's bundle in the order of their names: its notebooks, the introduction, and `also` (stems), not graded."""
    wanted = {*assignment.notebooks, *also, INTRODUCTION}
    found = []
    for path in list_notebooks(assignment.source):
        if path.stem in wanted:
            heading = _TITLE.search("\n".join(map(source_of, read_notebook(path)["cells"][:1])))
            exercises = {exercise.id: exercise.points for notebook, exercise in assignment.exercises if notebook == path.stem}
            questions = {question.id: question.points for question in assignment.questions if question.notebook == path.stem}
            found.append(Lesson(path.stem, heading.group(1) if heading else path.stem, exercises, questions))
    return found


def bundle(assignment: Assignment, also=()) -> dict[str, bytes]:
    """Every file of the students' bundle, name with slashes -> content; the same repository gives the same bytes.

    also: stems of notebooks that come along without being graded.
    Raises UserError, naming file and place, for a region without its other end, and for a part of the repository that is missing.
    """
    found = lessons(assignment, also)
    files = {f"notebooks/{lesson.notebook}.ipynb": _notebook(assignment, lesson.notebook) for lesson in found}
    files |= {name: _package_file(path) for name, path in _package()}
    files |= {path.relative_to(ROOT).as_posix(): path.read_bytes() for part in DATA_PARTS for path in _files(DATA / part)}
    files |= {name: _existing(ROOT / name).read_bytes() for name in TOP}
    files["requirements.txt"] = _requirements()
    files["README.md"] = _readme(assignment, found).encode()
    about = {"assignment": assignment.name, "title": assignment.title, RELEASE: assignment.release, "labkit": __version__}
    files[ABOUT] = _json(about | {"lessons": [asdict(lesson) for lesson in found]})
    return dict(sorted(files.items()))


def _notebook(assignment, stem):
    path = assignment.source / f"{stem}.ipynb"
    notebook = read_notebook(path)
    try:
        notebook = without_solutions(notebook)
    except UserError as error:
        raise UserError(f"{path}, {error}") from None
    for number, cell in enumerate(notebook["cells"], start=1):
        _refuse_marks(f"{path}, cell {number}", source_of(cell))
    about = notebook.setdefault("metadata", {})
    about["labkit"] = {**about.get("labkit", {}), "assignment": assignment.name, RELEASE: assignment.release}
    return _json(notebook)


def _package():
    """(name in the bundle, path) of every file of the package that students get."""
    for path in _files(ROOT / "labkit"):
        name = path.relative_to(ROOT).as_posix()
        if path.suffix in (".py", ".json") and not name.startswith(LEFT_OUT):
            yield name, path


def _package_file(path):
    if path.parent.name != "exercises":
        return path.read_bytes()
    text = without_hidden_tests(path.read_text(encoding="utf-8"))
    _refuse_marks(path, text)
    return text.encode()


def without_hidden_tests(source: str) -> str:
    """A Python source without the lines between `### BEGIN HIDDEN TESTS` and `### END HIDDEN TESTS`, both included."""
    return _HIDDEN.sub("", source)


def _refuse_marks(place, text):
    mark = _MARK.search(text)
    if mark:
        raise UserError(f"{place}: `{mark.group()}` without its other end, or not on a line of its own; put that right.")


def _files(path):
    """The file, or those of the folder and below; nothing that Python, an editor or a system left there."""
    found = [_existing(path)] if not path.is_dir() else sorted(p for p in path.rglob("*") if p.is_file())
    return [p for p in found if p.suffix not in _LEFTOVERS and not any(part.startswith(".") for part in p.relative_to(ROOT).parts)]


def _existing(path):
    if not path.is_file():
        raise UserError(f"{path} is missing: release from a complete copy of the repository.")
    return path


def _requirements():
    """Without what only the tests and the grader need: students install half as much, and nothing that only Linux has."""
    lines = _existing(ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    return "".join(line for line in lines if not any(who in line for who in _NOT_FOR_STUDENTS)).encode()


def _readme(assignment, found):
    rows = [f"| [{lesson.notebook}](notebooks/{lesson.notebook}.ipynb) | {lesson.title} | "
            + (f"{len(lesson.exercises)} | {len(lesson.questions)} | {lesson.points:g} |" if lesson.points else "- | - | - |") for lesson in found]
    handed_in = [f"   - `{lesson.notebook}.ipynb`" for lesson in found if lesson.points]
    task = assignment.performance
    if task:
        handed_in.append(f"   - your LoRA adapter for the task `{task.task}` as one safetensors file of at most {task.size_mib:g} MiB "
                         f"({task.points:g} points; loaded with alpha = 2 * rank, as `lora()` makes it; a configuration beside it is not read)")
    return README.format(title=assignment.title, name=assignment.name, release=assignment.release, due=_due(assignment),
                         files="\n".join(handed_in), rows="\n".join(rows))


def _due(assignment):
    if assignment.deadline is None:
        return ""
    said = f" Due {assignment.deadline.isoformat(' ', 'minutes')} (with its offset from UTC)."
    if assignment.penalty_per_day:
        said += (f" After {assignment.grace_minutes:g} more minutes, every day begun costs {100 * assignment.penalty_per_day:g} % of the points, "
                 f"{100 * assignment.most_penalty:g} % at most.")
    return said


def _json(value):
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def zipped(files: dict[str, bytes], folder: str) -> bytes:
    """A zip file with everything in one folder; the same files give the same bytes."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(f"{folder}/{name}", _NO_TIME), content, zipfile.ZIP_DEFLATED)
    return packed.getvalue()


def write(files: dict[str, bytes], out: Path, replace: bool = False, also_zip: bool = False) -> list[Path]:
    """Write a bundle to the folder `out`, whole or not at all.   Returns what was written: the folder, and `out`.zip where it is asked for.

    replace: an earlier bundle may make room.   Raises UserError, one sentence, for a place that is taken or cannot be written.
    """
    out = Path(out).resolve()
    packed = out.with_name(out.name + ".zip") if also_zip else None
    _refuse_place(out, packed, replace)
    unfinished, old = (out.with_name(f".{out.name}.{os.getpid()}.{kind}") for kind in ("unfinished", "old"))
    unfinished_zip = unfinished.with_name(unfinished.name + ".zip")
    try:
        for name, content in files.items():
            (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
            (unfinished / name).write_bytes(content)
        if packed:
            unfinished_zip.write_bytes(zipped(files, out.name))
        if out.exists():
            out.rename(old)
        unfinished.rename(out)
        if packed:
            os.replace(unfinished_zip, packed)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): name a folder that is yours, on a disk with 50 MB free.") from None
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        for left in (unfinished, old):
            shutil.rmtree(left, ignore_errors=True)
        unfinished_zip.unlink(missing_ok=True)
    return [out, packed] if packed else [out]


def _refuse_place(out, packed, replace):
    for source in ("labkit", "notebooks", "data"):
        if out.is_relative_to(ROOT / source):
            raise UserError(f"{out} is inside {source}/, which the bundle is made from: name a folder elsewhere.")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: name a folder.")
    if packed and packed.exists() and not replace:
        raise UserError(f"{packed} is there already: add --force to replace it, or name another folder.")
    inside = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if not inside:
        return
    release = _release_in(out)
    if release is None:
        raise UserError(f"{out} is not empty and holds no bundle: name a new or an empty folder.")
    if not replace:
        raise UserError(f"{out} holds the bundle {release} already: add --force to replace it, or name another folder.")
    strange = [name for name in inside if name not in (ABOUT, "README.md", "requirements.txt", "labkit", "notebooks", "data", *TOP)]
    if strange:
        raise UserError(f"{out} also holds {strange[0]}, which no bundle has: move it away, or name another folder.")


def _release_in(folder):
    """The id of the bundle that lies in a folder, or None."""
    try:
        return str(json.loads((folder / ABOUT).read_text(encoding="utf-8"))[RELEASE])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def from_another_release(notebook: dict, assignment: Assignment) -> str:
    """One sentence for a student whose notebook was given out with another bundle than the assignment's; empty where it was not.

    Empty, too, where the notebook does not say where it comes from: its exercises are found by their names anyway.
    """
    about = notebook.get("metadata")
    about = about.get("labkit") if isinstance(about, dict) else None
    said = {name: about.get(name) for name in ("assignment", RELEASE)} if isinstance(about, dict) else {}
    release, name = (printable(value)[:64] if isinstance(value, str) else "" for value in (said.get(RELEASE), said.get("assignment")))
    if not release or release == assignment.release:
        return ""
    return (f"This notebook comes from release {release}{f' of {name}' if name else ''}, and release {assignment.release} of {assignment.name} is "
            "graded: copy your answers into a notebook of that release.")
