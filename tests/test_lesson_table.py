"""The README's table of lessons: made from the notebooks, up to date, and refused where a notebook does not say what it needs."""

import json
import re

import nbformat
import pytest

from labkit.errors import UserError
from labkit.lesson_table import BEGIN, END, lesson_table, with_table, write_table
from labkit.paths import NOTEBOOKS, ROOT

FIRST = "# 7 · A title\n\nA sentence.\n\nLecture: *A section* · weeks 10 to 11\n\nMeasured: 62 s and 1,234 MiB at the peak"


@pytest.fixture
def lesson(tmp_path):
    def make(first=FIRST):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(first)])
        for points in (3, 4.5):
            cell = nbformat.v4.new_code_cell("check(f)")
            cell.metadata["nbgrader"] = {"grade": True, "points": points, "grade_id": f"x-{points}"}
            notebook.cells.append(cell)
        notebook.cells.append(nbformat.v4.new_code_cell("f = 1", metadata={"nbgrader": {"grade": False}}))
        nbformat.write(notebook, tmp_path / "07_a.ipynb")
        return tmp_path
    return make


def test_the_readme_s_table_is_that_of_the_notebooks():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert with_table(readme, lesson_table(NOTEBOOKS)) == readme


def test_a_row_says_what_the_notebook_says(lesson):
    row = lesson_table(lesson()).splitlines()[-1]
    assert row == "| 10 to 11 | [7 · A title](notebooks/07_a.ipynb) | *A section* | 62 | 1,234 | 2 | 7.5 |"


def test_a_lesson_that_was_not_measured_yet_has_a_row(lesson):
    assert "| - | - |" in lesson_table(lesson(re.sub("Measured: .*", "Measured: not yet", FIRST)))


def test_the_points_of_the_table_are_those_of_the_metadata():
    for line, path in zip(lesson_table(NOTEBOOKS).splitlines()[2:], sorted(NOTEBOOKS.glob("*.ipynb")), strict=True):
        graded = [c["metadata"]["nbgrader"] for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if "nbgrader" in c["metadata"]]
        exercises, points = re.findall(r"\| (\d+) \| ([\d.]+) \|$", line)[0]
        assert (int(exercises), float(points)) == (sum(c["grade"] for c in graded), sum(c["points"] for c in graded if c["grade"]))


@pytest.mark.parametrize("missing", ["# 7", "Lecture:", "Measured:"])
def test_a_first_cell_without_a_line_is_named(lesson, missing):
    with pytest.raises(UserError, match="07_a.ipynb: its first cell has no line"):
        lesson_table(lesson("\n".join(line for line in FIRST.splitlines() if not line.startswith(missing))))


def test_the_table_is_written_between_the_marks_and_nowhere_else(lesson, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    write_table(readme, lesson())
    text = readme.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{BEGIN}\n") and text.endswith(f"{END}\nafter\n")
    assert "A title" in text and "old" not in text
    write_table(readme, tmp_path)
    assert readme.read_text(encoding="utf-8") == text


def test_a_readme_without_marks_is_refused():
    with pytest.raises(UserError, match="no place for the table"):
        with_table("nothing", "| table |")
