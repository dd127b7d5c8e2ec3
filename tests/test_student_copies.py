"""Properties of students' copies: no line of a solution is left, nothing of the student's is lost, and nbgrader makes the same of them.

The judge is nbgrader itself: its `generate_assignment` and its `validate` run as real processes.
"""

import os
import re
import subprocess
import sys

import nbformat
import pytest

from labkit import student_copies
from labkit.errors import UserError
from labkit.paths import NOTEBOOKS
from labkit.processes import course_environment
from labkit.student_copies import make_student_copies, reset_student_copy, student_copy

LESSONS = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
COURSE = ["small", *LESSONS]
RIGHT = """targets = labels[:, 1:]
supervised = targets != -100
scores = torch.log_softmax(logits[:, :-1], dim=-1)[supervised]
return -scores.gather(-1, targets[supervised].unsqueeze(-1)).mean()"""
WRONG = "return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction='sum')"


def graded(id, **settings):
    """nbgrader's metadata of one cell."""
    base = {"grade": False, "grade_id": id, "locked": False, "schema_version": 3, "solution": False, "task": False}
    return {"nbgrader": {**base, **settings}}


def code(source, metadata=None, **parts):
    return nbformat.v4.new_code_cell(source, metadata=metadata or {}, **parts)


def text(source, metadata=None):
    return nbformat.v4.new_markdown_cell(source, metadata=metadata or {})


def notebook_of(*cells):
    notebook = nbformat.v4.new_notebook(cells=list(cells))
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return notebook


def region(lines, spaces=4):
    return "\n".join(" " * spaces + line for line in ["### BEGIN SOLUTION", *lines.splitlines(), "### END SOLUTION"])


def small_lesson(body=RIGHT):
    """A notebook with every kind of cell that a lesson has."""
    result = nbformat.v4.new_output("execute_result", {"text/plain": "4"}, execution_count=3)
    pair = ["class Pair:", "    def first(self):", region("secret = 'the first'\nreturn secret", 8), "", "    def second(self):",
            region("secret = 'the second'\n\nreturn secret", 8), "        # what comes after a region stays"]
    return notebook_of(
        text("# A lesson\n\nMeasured: not yet"),
        code("import torch\nfrom labkit import check", {"tags": ["setup"]}, execution_count=1),
        code(f'def masked_loss(logits, labels):\n    """One number."""\n{region(body)}', graded("sft-masked-loss", solution=True), execution_count=2),
        code("check(masked_loss)", graded("sft-masked-loss-check", grade=True, locked=True, points=4), outputs=[result], execution_count=3),
        code("\n".join(pair), graded("pair", solution=True)),
        code(f"x = 1\n{region('secret_value = x + 1', 0)}\n\nx = 3", graded("flat", solution=True)),
        text("What is asked, in a locked cell.", graded("asked", locked=True)),
        text(f"Before.\n\n{region('The secret answer, in words.', 0)}\nAfter.", graded("question", grade=True, solution=True, points=4)),
        code("y = 2", {"tags": ["play"], "collapsed": False}, outputs=[nbformat.v4.new_output("stream", text="two\n")], execution_count=9),
    )


def written(folder, name, notebook):
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


def copy_of(folder, notebook):
    """The student's copy, from file to file as the course makes it."""
    student_copy(written(folder / "source", "lesson", notebook), folder / "work" / "lesson.ipynb")
    return nbformat.read(folder / "work" / "lesson.ipynb", as_version=4)


def assignment(folder, notebooks):
    """The folder of what `nbgrader generate_assignment` releases of these notebooks (name -> notebook)."""
    for name, notebook in notebooks.items():
        written(folder / "source" / "ps1", name, notebook)
    nbgrader(folder, "generate_assignment", "ps1", "--create", "--force")
    return folder / "release" / "ps1"


def nbgrader(folder, *arguments):
    environment = course_environment()
    # nbgrader starts `alembic` by its name, and .venv need not be on the path.
    environment["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), environment["PATH"]])
    finished = subprocess.run([sys.executable, "-m", "nbgrader", *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def assert_released_alike(ours, theirs):
    """Cell by cell: kind, text, outputs, and metadata but for the checksum, which nbgrader computes from the rest."""
    assert len(ours.cells) == len(theirs.cells)
    for mine, other in zip(ours.cells, theirs.cells):
        assert (mine.cell_type, mine.source) == (other.cell_type, other.source)
        assert (mine.get("outputs"), mine.get("execution_count")) == (other.get("outputs"), other.get("execution_count"))
        for name in ("deletable", "editable", "tags"):
            assert mine.metadata.get(name) == other.metadata.get(name), (name, mine.source)
        assert compared(mine) == compared(other), mine.source


def compared(cell):
    """nbgrader's metadata without the checksum, and without `points` of cells that have none."""
    return {name: value for name, value in cell.metadata.get("nbgrader", {}).items() if name not in ("checksum", "cell_type")}


def solution_lines(notebook):
    """What stands in solution regions and nowhere else, hints included: found with a pattern, not line by line as the copy is made."""
    parts = [re.split(r"^.*(?:BEGIN|END) SOLUTION.*$", cell.source, flags=re.MULTILINE) for cell in notebook.cells]
    outside = "\n".join("\n".join(part[::2]) for part in parts)
    inside = [line.strip() for part in parts for text in part[1::2] for line in text.splitlines()]
    return {line for line in inside if len(line) >= 8 and line not in outside}


def leaked(notebook, copy):
    """The lines of solutions that a student finds in the copy."""
    return sorted(line for line in solution_lines(notebook) if any(line in cell.source for cell in copy.cells))


@pytest.fixture(scope="module")
def course():
    """Name -> notebook with solutions."""
    return {"small": small_lesson(), **{name: nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4) for name in LESSONS}}


@pytest.fixture(scope="module")
def released(course, tmp_path_factory):
    """Name -> what nbgrader releases."""
    folder = assignment(tmp_path_factory.mktemp("course"), course)
    return {name: nbformat.read(folder / f"{name}.ipynb", as_version=4) for name in course}


@pytest.mark.parametrize("name", COURSE)
def test_our_copy_is_what_nbgrader_releases(name, course, released, tmp_path):
    assert_released_alike(copy_of(tmp_path, course[name]), released[name])


@pytest.mark.parametrize("name", COURSE)
def test_no_line_of_a_solution_is_left_in_the_student_s_copy(name, course, tmp_path):
    assert leaked(course[name], copy_of(tmp_path, course[name])) == []


def test_a_solution_that_is_left_would_be_found(course):
    for name, notebook in course.items():
        regions = sum(cell.source.count("### BEGIN SOLUTION") for cell in notebook.cells)
        assert len(leaked(notebook, notebook)) >= regions, name
    assert {"secret = 'the second'", "return secret", "The secret answer, in words."} < solution_lines(course["small"])


@pytest.mark.parametrize("name", COURSE)
def test_every_solution_cell_of_the_copy_compiles_and_its_stub_raises(name, course, tmp_path):
    cells = [cell for cell in copy_of(tmp_path, course[name]).cells if cell.cell_type == "code" and cell.metadata.get("nbgrader", {}).get("solution")]
    for cell in cells:
        compile(cell.source, name, "exec")
        assert "raise NotImplementedError()" in cell.source


def test_a_stub_stands_at_its_region_s_indentation_and_raises(course, tmp_path):
    copy = copy_of(tmp_path, course["small"])
    (pair,) = [cell for cell in copy.cells if cell.source.startswith("class Pair")]
    stub = "        # YOUR CODE HERE\n        raise NotImplementedError()"
    assert pair.source == f"class Pair:\n    def first(self):\n{stub}\n\n    def second(self):\n{stub}\n        # what comes after a region stays"
    namespace = {}
    exec(pair.source, namespace)
    with pytest.raises(NotImplementedError):
        namespace["Pair"]().second()


@pytest.mark.parametrize("name", COURSE)
def test_a_copy_holds_no_output_and_no_count_and_its_cells_in_order(name, course, tmp_path):
    copy = copy_of(tmp_path, course[name])
    assert [cell.cell_type for cell in copy.cells] == [cell.cell_type for cell in course[name].cells]
    for cell in copy.cells:
        assert cell.cell_type != "code" or (cell.outputs, cell.execution_count) == ([], None)


def test_making_a_copy_leaves_the_source_as_it_was(tmp_path):
    path = written(tmp_path, "lesson", small_lesson())
    before = path.read_bytes()
    student_copy(path, tmp_path / "work" / "lesson.ipynb")
    assert path.read_bytes() == before and [p.name for p in (tmp_path / "work").iterdir()] == ["lesson.ipynb"]


@pytest.mark.parametrize("lines", [
    ["### BEGIN SOLUTION", "x = 1"], ["x = 1", "### END SOLUTION"], ["### BEGIN SOLUTION", "### BEGIN SOLUTION", "### END SOLUTION"],
    ["### END SOLUTION", "### BEGIN SOLUTION"], ["### BEGIN SOLUTION", "### END SOLUTION", "### END SOLUTION"],
], ids=["no end", "no beginning", "nested", "turned round", "two ends"])
@pytest.mark.parametrize("make", [code, text], ids=["code", "text"])
def test_a_region_without_its_other_end_is_named_with_file_and_cell_and_nothing_is_written(make, lines, tmp_path):
    path = written(tmp_path / "source", "lesson", notebook_of(text("# Title"), code("x = 1"), make("\n".join(lines), graded("a", solution=True))))
    with pytest.raises(UserError) as raised:
        student_copy(path, tmp_path / "work" / "lesson.ipynb")
    assert str(path) in str(raised.value) and "cell 3" in str(raised.value) and "SOLUTION" in str(raised.value)
    assert not list((tmp_path / "work").iterdir())


WAYS_TO_WRITE_IT = {
    "with a remark": code("def f(x):\n    ### BEGIN SOLUTION: the shift\n    secret = x + 1\n    ### END SOLUTION", graded("a", solution=True)),
    "with one number sign": code("def f(x):\n    # BEGIN SOLUTION\n    secret = x + 1\n    # END SOLUTION", graded("a", solution=True)),
    "without a region": code("def f(x):\n    secret = x + 1\n    return secret", graded("a", solution=True)),
    "without a region, in words": text("The secret answer.", graded("a", solution=True, grade=True, points=2)),
    "hidden tests": code("check(f)\n### BEGIN HIDDEN TESTS\nf('secret')\n### END HIDDEN TESTS", graded("a", grade=True, locked=True, points=2)),
    "mark scheme": text("The question.\n### BEGIN MARK SCHEME\nThe secret answer.\n### END MARK SCHEME", graded("a", task=True, points=2)),
    "a check that is not locked": code("check(f)", graded("a", grade=True, points=2)),
    "a locked solution": code("x = 1\n### BEGIN SOLUTION\nsecret = 2\n### END SOLUTION", graded("a", solution=True, locked=True)),
}


@pytest.fixture(scope="module")
def released_ways(tmp_path_factory):
    ways = {f"way{number}": notebook_of(cell) for number, cell in enumerate(WAYS_TO_WRITE_IT.values())}
    folder = assignment(tmp_path_factory.mktemp("ways"), ways)
    return {way: nbformat.read(folder / f"way{number}.ipynb", as_version=4) for number, way in enumerate(WAYS_TO_WRITE_IT)}


@pytest.mark.parametrize("way", WAYS_TO_WRITE_IT)
def test_whatever_nbgrader_takes_out_our_copy_does_not_hold_either(way, released_ways, tmp_path):
    ours = copy_of(tmp_path, notebook_of(WAYS_TO_WRITE_IT[way]))
    assert "secret" not in ours.cells[0].source and "secret" not in released_ways[way].cells[0].source
    assert_released_alike(ours, released_ways[way])


def test_a_fresh_copy_that_cannot_be_made_leaves_the_student_s_in_place(tmp_path):
    source = written(tmp_path / "notebooks", "00_first", notebook_of(code("### BEGIN SOLUTION")))
    mine = written(tmp_path / "work", "00_first", notebook_of(code("my = 'own work'")))
    before = mine.read_bytes()
    with pytest.raises(UserError):
        reset_student_copy(source, tmp_path / "work")
    assert mine.exists() and mine.read_bytes() == before


def test_a_copy_that_is_interrupted_is_no_copy(tmp_path, monkeypatch):
    written(tmp_path / "notebooks", "00_first", small_lesson())

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(student_copies.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_student_copies(tmp_path / "notebooks", tmp_path / "work")
    monkeypatch.undo()
    assert not list((tmp_path / "work").glob("*.ipynb"))
    assert make_student_copies(tmp_path / "notebooks", tmp_path / "work") == [tmp_path / "work" / "00_first.ipynb"]


@pytest.mark.parametrize("body, passes", [
    (RIGHT, True), (f"import warnings\nwarnings.warn('careful')\n{RIGHT}", True), (WRONG, False), (None, False),
], ids=["right", "right with a warning", "wrong", "stub"])
def test_nbgrader_s_validate_reads_the_points_of_a_check_cell(body, passes, tmp_path):
    """check() returns the points, the value of its cell, which nbgrader takes as partial credit; a line on standard error it takes as a failure."""
    notebook = notebook_of(*small_lesson(body or RIGHT).cells[:4])
    written(tmp_path, "lesson", notebook if body else copy_of(tmp_path, notebook))
    said = nbgrader(tmp_path, "validate", "lesson.ipynb")
    assert ("Success! Your notebook passes all the tests." in said) == passes
    assert ("VALIDATION FAILED ON 1 CELL(S)" in said and "check(masked_loss)" in said) != passes
