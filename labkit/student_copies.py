"""Students' copies of the notebooks: stubs instead of solutions, outputs cleared, never overwritten.

A solution stands between lines that hold `### BEGIN SOLUTION` and `### END SOLUTION`, as nbgrader has it (nbgrader.preprocessors.ClearSolutions),
so nbgrader can release the same source; a test holds its copy and ours together. What nbgrader takes out besides, we take out, too.
"""

from __future__ import annotations

import json
import os
from datetime import datetime
from pathlib import Path

from labkit.errors import UserError
from labkit.notebooks import list_notebooks

BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
CODE_STUB = ("# YOUR CODE HERE", "raise NotImplementedError()")
TEXT_STUB = ("YOUR ANSWER HERE",)
_GRADERS_ONLY = ("HIDDEN TESTS", "MARK SCHEME")
# In the metadata `labkit` of a notebook that was given out in a bundle: the bundle's id.
RELEASE = "release"


def without_solutions(notebook):
    """The student's version of a notebook (a dict as in the file, or an nbformat node), changed in place and returned.

    Every solution region becomes a stub with the region's indentation, outputs and execution counts go, and cells that nbgrader counts
    on can be neither deleted nor, where they ask for no solution, edited. One that students' bundles hold is a student's version already, and
    stays as it is.   Raises UserError, naming the cell, for a region without its other end.
    """
    about = notebook.get("metadata", {})
    if RELEASE in about.get("labkit", {}):
        return notebook
    about.pop("widgets", None)  # what the widgets showed is output, too
    for number, cell in enumerate(notebook["cells"], start=1):
        graded, stub = cell["metadata"].get("nbgrader", {}), CODE_STUB if cell["cell_type"] == "code" else TEXT_STUB
        text = "".join(cell["source"])  # a list of lines in the file
        source = _replaced(text, "SOLUTION", stub, number)
        if graded.get("solution") and source == text:
            source = "\n".join(stub)  # without a region all of it is the solution
        for name in _GRADERS_ONLY:
            source = _replaced(source, name, (), number)
        cell["source"] = source
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
        if graded.get("solution") or graded.get("grade") or graded.get("locked"):
            cell["metadata"]["deletable"] = False
            if not graded.get("solution"):
                cell["metadata"]["editable"] = False
    return notebook


def _replaced(source, name, stub, number):
    """`source` with every region called `name` replaced by the lines of `stub` at its indentation."""
    kept, inside = [], False
    for line in source.split("\n"):
        if f"BEGIN {name}" in line or f"END {name}" in line:
            if inside == (f"BEGIN {name}" in line):
                raise UserError(f"cell {number}: `{line.strip()}` without its other end; put the missing line in.")
            inside = not inside
            if inside:
                indentation = line[: len(line) - len(line.lstrip())]
                kept += [indentation + words for words in stub]
        elif not inside:
            kept.append(line)
    if inside:
        raise UserError(f"cell {number}: `BEGIN {name}` without `END {name}`; put the missing line in.")
    return "\n".join(kept)


def student_copy(source_path: Path, target_path: Path) -> None:
    """Write the student's version of the notebook at `source_path` to `target_path`."""
    target_path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target_path.with_suffix(".unfinished")
    try:
        notebook = without_solutions(json.loads(source_path.read_text(encoding="utf-8")))
        unfinished.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except UserError as error:
        raise UserError(f"{source_path}, {error}") from None
    os.replace(unfinished, target_path)  # whatever interrupts, a student never meets half a notebook


def make_student_copies(source: Path, target: Path) -> list[Path]:
    """Copy every notebook of the folder `source` that `target` does not have; what a student has is never touched. Returns the new ones."""
    new = [target / path.name for path in list_notebooks(source) if not (target / path.name).exists()]
    for copy in new:
        student_copy(source / copy.name, copy)
    return new


def reset_student_copy(source_path: Path, target: Path) -> tuple[Path, Path | None]:
    """Make the copy of `source_path` in the folder `target` afresh. Returns it, and where the student's version lies (None without one)."""
    copy, kept = target / source_path.name, None
    fresh = copy.with_suffix(".fresh")
    student_copy(source_path, fresh)
    if copy.exists():
        kept = copy.with_name(f"{copy.stem}.{datetime.now():%Y-%m-%d_%H%M%S_%f}.ipynb")
        copy.rename(kept)
    os.replace(fresh, copy)
    return copy, kept
