"""The README's table of lessons, made from the notebooks themselves, so that it cannot say anything else than they do."""

from __future__ import annotations

import re
from pathlib import Path

from labkit.errors import UserError
from labkit.notebooks import list_notebooks

BEGIN, END = "<!-- the table of lessons, by `python3 -m labkit run --inplace` -->", "<!-- end of the table of lessons -->"
_HEAD = "| week | notebook | lecture | seconds | MiB | exercises | points |\n| --- | --- | --- | ---: | ---: | ---: | ---: |\n"
_TITLE = re.compile(r"^# (?P<title>.+)$", re.MULTILINE)
_PLACE = re.compile(r"^Lecture: (?P<section>.+) · weeks? (?P<week>.+)$", re.MULTILINE)
_MEASURED = re.compile(r"^Measured: (?:(?P<seconds>[\d,]+) s and (?P<mib>[\d,]+) MiB|not yet)", re.MULTILINE)


def lesson_table(folder: Path) -> str:
    """The table in Markdown, a row for each notebook of `folder`.

    Week, title and section of the lecture stand in a notebook's first cell, and so does what its last execution took; exercises and points are
    counted (nbgrader's metadata; written questions are marked by a person and counted as exercises).
    Raises UserError for a first cell that does not say so.
    """
    return _HEAD + "".join(_row(path) for path in list_notebooks(folder))


def _row(path):
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    first = notebook.cells[0].source
    found = {}
    for pattern, line in ((_TITLE, "# N · Title"), (_PLACE, "Lecture: section · week N"), (_MEASURED, "Measured: N s and N MiB")):
        match = pattern.search(first)
        if match is None:
            raise UserError(f"{path.name}: its first cell has no line `{line}`; write one (`run --inplace` fills the measured one).")
        found |= match.groupdict()
    points = [cell.metadata["nbgrader"]["points"] for cell in notebook.cells if cell.metadata.get("nbgrader", {}).get("grade")]
    link = f"[{found['title']}](notebooks/{path.name})"
    row = (found["week"], link, found["section"], found["seconds"] or "-", found["mib"] or "-", len(points), f"{sum(points):g}")
    return f"| {' | '.join(map(str, row))} |\n"


def with_table(readme: str, table: str) -> str:
    """The README's text with `table` between its two marks.   Raises UserError where the marks are missing."""
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise UserError(f"README.md has no place for the table of lessons: write {BEGIN} and {END} around it.")
    return f"{head}{begin}\n\n{table}\n{end}{tail}"


def write_table(readme: Path, folder: Path) -> None:
    """Make the table of `folder` again in the file `readme`."""
    readme.write_text(with_table(readme.read_text(encoding="utf-8"), lesson_table(folder)), encoding="utf-8")
