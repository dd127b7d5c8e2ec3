"""Properties of a lab report's notebook: it shows what the page shows, runs from its first cell to its last, and loses no word of the student's."""

import os
import warnings

import nbformat
import pytest
from nbclient import NotebookClient

from labkit.errors import UserError
from labkit.lab_report import LabReport
from labkit.lab_report.notebook import GAP
from labkit.lab_report.parts import PARTS
from labkit.lab_report.record import RECORD
from labkit.paths import ROOT
from tests.lab_report_runs import fill_gaps, gap, notebook_of, page_of, run_folder, save

pytest_plugins = ["tests.lab_report_fixtures"]

FILES = ("report.html", "report.ipynb", RECORD)


def facts(notebook, name):
    return next(cell for cell in notebook.cells if cell.metadata.get("labkit", {}).get("facts") == name)


def test_the_notebook_is_valid_shows_the_same_tables_and_has_one_gap_a_part(whole):
    notebook = notebook_of(whole)
    nbformat.validate(notebook)
    assert [cell.metadata.labkit.gap for cell in notebook.cells if "gap" in cell.metadata.get("labkit", {})] == list(PARTS)
    text = "\n".join(cell.source for cell in notebook.cells)
    cells = [cell.strip() for line in text.splitlines() if line.startswith("| ") for cell in line.strip("|").split("|")]
    on_page = [cell.strip() for cell in page_of(whole).cells if cell.strip()]
    assert [cell for cell in on_page if cell not in cells and f"**{cell}**" not in text] == []
    assert [name for cell in notebook.cells for name in cell.get("attachments", {})] == ["curves.png", "success.png"]


def test_the_notebook_runs_from_start_to_end_and_says_what_is_missing(report, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    fill_gaps(report)
    notebook = notebook_of(report)
    gap(notebook, "improvements").source = GAP
    save(report, notebook)
    (report.folder / "report.html").unlink()
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(report.folder)}}).execute()
    assert [cell.cell_type for cell in notebook.cells].count("code") == 1
    page, *problems = notebook.cells[-1].outputs[0].text.splitlines()
    assert page == str((report.folder / "report.html").resolve()) and page_of(report).sections[0] == "dataset"
    assert problems == [f"report.ipynb, 5. Future improvements: 0 of at least {PARTS['improvements'].words} words are written"]


def test_a_notebook_that_says_the_same_already_is_not_touched(report):
    path = report.folder / "report.ipynb"
    fill_gaps(report)
    before = path.stat().st_mtime_ns
    report.build()
    assert path.stat().st_mtime_ns == before
    report.training(run_folder(report.folder / "run"), seed=7)
    report.build()
    assert path.stat().st_mtime_ns > before


def test_words_survive_every_way_of_recording_and_building_anew(report):
    fill_gaps(report)
    before = {name: gap(notebook_of(report), name).source for name in PARTS}
    report.build()
    report.training(run_folder(report.folder / "run"), epochs=99)
    LabReport(report.folder).build()
    assert {name: gap(notebook_of(report), name).source for name in PARTS} == before
    assert page_of(report).words == [text.strip() for text in before.values()]
    assert "| epochs | 99 |" in facts(notebook_of(report), "training").source


def test_cells_that_were_added_split_moved_or_changed_are_kept(report):
    notebook = notebook_of(report)
    first, last, training = gap(notebook, "dataset"), gap(notebook, "improvements"), facts(notebook, "training")
    first.source = "the first half"
    half = nbformat.v4.new_markdown_cell("the second half", metadata=dict(first.metadata))
    notebook.cells.insert(notebook.cells.index(first) + 1, half)
    notebook.cells.insert(0, nbformat.v4.new_markdown_cell("a motto"))
    notebook.cells.append(nbformat.v4.new_code_cell("1 + 1", outputs=[nbformat.v4.new_output("stream", text="2")]))
    training.source += "\n\na remark between the tables"
    notebook.cells.remove(last)
    last.source = "moved to the top"
    notebook.cells.insert(1, last)
    notebook.cells.append(nbformat.v4.new_markdown_cell("an afterthought"))
    save(report, notebook)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nbformat mends ids that two cells share, at random, and says so
        for _ in range(3):
            report.build()
    rebuilt = notebook_of(report)
    nbformat.validate(rebuilt)
    texts = [cell.source for cell in rebuilt.cells]
    for text in ("the first half", "the second half", "a motto", "1 + 1", "moved to the top", "an afterthought"):
        assert texts.count(text) == 1, text
    assert sum("a remark between" in text for text in texts) == 1 and texts[:2] == ["a motto", "moved to the top"]
    (changed,) = (cell for cell in rebuilt.cells if "a remark between" in cell.source)
    assert "labkit" not in changed.metadata and changed.metadata.get("editable", True)
    assert facts(rebuilt, "training").source + "\n\na remark between the tables" == changed.source
    assert next(cell for cell in rebuilt.cells if cell.source == "1 + 1").outputs[0].text == "2"
    assert texts.index("the second half") == texts.index("the first half") + 1
    said = page_of(report).words
    assert said[:3] == ["a motto", "the first half", "the second half"] and said[-2:] == ["moved to the top", "an afterthought"]
    assert len(said) == 6 and "a remark between" in said[3]


def test_what_was_deleted_comes_back_in_its_place(report):
    before = [cell.metadata.get("labkit") for cell in notebook_of(report).cells]
    for name in ("challenges", "improvements"):
        notebook = notebook_of(report)
        notebook.cells.remove(gap(notebook, name))
        notebook.cells.remove(facts(notebook, name))
        save(report, notebook)
        report.build()
        assert gap(notebook_of(report), name).source == GAP
        assert [cell.metadata.get("labkit") for cell in notebook_of(report).cells] == before


def test_a_copy_of_our_cell_shows_the_same_as_the_first(report):
    notebook = notebook_of(report)
    copy = nbformat.v4.new_markdown_cell(facts(notebook, "training").source, metadata=facts(notebook, "training").metadata)
    notebook.cells.append(copy)
    save(report, notebook)
    report.training(run_folder(report.folder / "run"), epochs=99)
    report.build()
    shown = [cell.source for cell in notebook_of(report).cells if cell.metadata.get("labkit", {}).get("facts") == "training"]
    assert len(shown) == 2 and all("| epochs | 99 |" in text for text in shown)


@pytest.mark.parametrize("mark", [3, [], {"facts": 3}, {"gap": ["dataset"]}, {"facts": "dataset"}, {"gap": "elsewhere"}])
def test_a_cell_with_a_mark_that_is_none_of_ours_is_the_student_s(report, mark):
    notebook = notebook_of(report)
    notebook.cells.append(nbformat.v4.new_markdown_cell("what I wrote", metadata={"labkit": mark}))
    save(report, notebook)
    report.build()
    assert [cell.source for cell in notebook_of(report).cells].count("what I wrote") == 1 and page_of(report).words == ["what I wrote"]


def test_a_notebook_of_an_older_format_is_read_too(report):
    notebook = notebook_of(report)
    notebook.nbformat_minor = 4
    for cell in notebook.cells:
        del cell["id"]
    gap(notebook, "dataset").source = "written elsewhere"
    save(report, notebook)
    report.build()
    nbformat.validate(notebook_of(report))
    assert page_of(report).words == ["written elsewhere"]


@pytest.mark.parametrize("content", [
    b"", b"{", b"\xff", b'{"cells": 3}', b'{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [{"cell_type": "x"}]}'])
def test_a_notebook_that_cannot_be_read_is_not_written_over(report, content):
    path, page = report.folder / "report.ipynb", (report.folder / "report.html").read_bytes()
    path.write_bytes(content)
    for act in (report.build, report.check):
        with pytest.raises(UserError, match="report.ipynb is no readable notebook .*move it away") as error:
            act()
        assert "\n" not in str(error.value)
    assert path.read_bytes() == content and (report.folder / "report.html").read_bytes() == page


def test_building_twice_changes_nothing(report):
    fill_gaps(report)
    report.build()
    before = [(report.folder / name).read_bytes() for name in FILES]
    report.build()
    assert [(report.folder / name).read_bytes() for name in FILES] == before
