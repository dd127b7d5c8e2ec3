"""Every lesson as a student meets it: unsolved, it runs to its last figure; solved, its receipt is what a fresh process says."""

import re

import nbformat
import pytest

from labkit.notebooks import execute
from labkit.paths import NOTEBOOKS
from labkit.student_copies import student_copy
from labkit.submission.receipt import make_receipt

LESSONS = sorted(NOTEBOOKS.glob("*.ipynb"))
WITH_RECEIPT = [path for path in LESSONS if "receipt(" in nbformat.read(path, as_version=4).cells[-1].source]

pytestmark = pytest.mark.slow


def pictures(notebook):
    """Cell id -> how many pictures its outputs hold."""
    shown = {}
    for cell in notebook.cells:
        html = [output.get("data", {}).get("text/html", "") for output in cell.get("outputs", [])]
        if any("<img" in text for text in html):
            shown[cell.id] = sum(text.count("<img") for text in html)
    return shown


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_an_unsolved_copy_runs_to_its_end_and_shows_every_figure(path, tmp_path):
    copy, out = tmp_path / path.name, tmp_path / "executed"
    student_copy(path, copy)
    out.mkdir()
    execution = execute(copy, out, timeout=600)
    assert execution.status == "ok", execution.error
    assert pictures(nbformat.read(out / path.name, as_version=4)) == pictures(nbformat.read(path, as_version=4))


@pytest.mark.parametrize("path", WITH_RECEIPT, ids=lambda path: path.stem)
def test_the_receipt_in_the_notebook_agrees_with_a_fresh_process(path):
    stored = "".join(output.get("text", "") for output in nbformat.read(path, as_version=4).cells[-1].outputs if output.get("name") == "stdout")
    fresh = make_receipt(path, progress=False)
    assert all(verdict.earned == verdict.points for verdict in fresh.verdicts)
    assert re.findall(r"Digest (\w+)", stored) == [fresh.digest]
    assert all(str(verdict) in stored for verdict in fresh.verdicts)
