"""Which cells of a saved notebook count: the set-up cell and one cell for each exercise, found by nbgrader's `grade_id`."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from labkit.errors import UserError

MAX_NOTEBOOK = 20 * 2**20
MAX_CELL = 1_000_000
SETUP_TAG = "setup"


@dataclass(frozen=True)
class Cells:
    """What is run of a notebook.   setup: the set-up cell's source.   exercises: exercise id -> the source of its cell, in the order of the page.

    problems: exercise id -> why there is no cell to run.
    """

    setup: str
    exercises: dict[str, str]
    problems: dict[str, str]

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits over the sources: the same in the student's hands and in the grader's."""
        return hashlib.sha256(json.dumps([self.setup, self.exercises], sort_keys=True).encode()).hexdigest()[:12]


def read_notebook(path: Path) -> dict:
    """The notebook as a dict.   Raises UserError, one sentence, for a file that is none."""
    path = Path(path)
    try:
        if not path.is_file():
            raise UserError(f"{path} does not exist: name the notebook as it is called in the file list.")
        if path.stat().st_size > MAX_NOTEBOOK:
            raise UserError(f"{path} has {path.stat().st_size / 2**20:.0f} MiB, at most {MAX_NOTEBOOK // 2**20} are read: "
                            "clear its outputs and save it.")
        notebook = json.loads(path.read_text(encoding="utf-8-sig"))
        cells = notebook["cells"]
        if not isinstance(cells, list) or not all(isinstance(cell, dict) for cell in cells):
            raise TypeError("its cells are no list of cells")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its name and who may read it.") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is no notebook ({type(error).__name__}: {str(error)[:100]}): save it again, or start from a fresh copy.") from None
    return notebook


def cells_of(notebook: dict, exercise_ids) -> Cells:
    """Find what is run.   exercise_ids: those that the assignment asks for.   Missing and repeated cells become problems, not errors."""
    code = [cell for cell in notebook["cells"] if cell.get("cell_type") == "code"]
    setups = [source_of(cell) for cell in code if SETUP_TAG in _tags(cell)]
    exercises, problems = {}, {}
    for cell in code:
        id = grade_id(cell)
        if id in exercise_ids and id in exercises:
            problems[id] = "there are two cells with its name: delete the copy"
        elif id in exercise_ids:
            exercises[id] = source_of(cell)
    long = f"longer than the {MAX_CELL:,} characters that are read: take data and outputs out of it"
    for id, source in exercises.items():
        if len(source) > MAX_CELL:
            problems[id] = f"its cell is {long}"
    if sum(map(len, setups)) > MAX_CELL:
        problems |= {id: f"the set-up cell is {long}" for id in exercise_ids}
    for id in exercise_ids:
        if id not in exercises:
            problems[id] = "its cell is missing: take it from a fresh copy of the notebook"
    return Cells("\n".join(setups), {id: source for id, source in exercises.items() if id not in problems}, problems)


def exercise_ids_of(notebook: dict) -> list[str]:
    """The exercises whose cells the notebook has, in the order of the page."""
    from labkit.exercises.exercise import all_exercises

    known = all_exercises()
    found = [grade_id(cell) for cell in notebook["cells"] if cell.get("cell_type") == "code"]
    return list(dict.fromkeys(id for id in found if id in known))


def grade_id(cell: dict) -> str | None:
    """The name that nbgrader's metadata gives the cell, or None."""
    nbgrader = _metadata(cell).get("nbgrader")
    id = nbgrader.get("grade_id") if isinstance(nbgrader, dict) else None
    return id if isinstance(id, str) else None


def source_of(cell: dict) -> str:
    """The cell's text with line ends as \\n; a notebook may keep it in one string or in a list of lines."""
    source = cell.get("source", "")
    text = "".join(map(str, source)) if isinstance(source, list) else str(source)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _tags(cell):
    tags = _metadata(cell).get("tags")
    return tags if isinstance(tags, list) else []


def _metadata(cell):
    metadata = cell.get("metadata")
    return metadata if isinstance(metadata, dict) else {}
