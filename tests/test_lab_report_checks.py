"""Properties of a lab report's checks: what is missing, too little, changed or unwritten is named with what mends it, and nothing else is."""

import json
import re
import shutil

import pytest

from labkit.__main__ import parse, read_commands
from labkit.errors import UserError
from labkit.lab_report import LabReport
from labkit.lab_report.checks import FEWEST_EPISODES
from labkit.lab_report.notebook import GAP
from labkit.lab_report.parts import PARTS, POINTS, RECORDED
from labkit.paths import DATA
from labkit.waypoint_regression import STATE
from tests.lab_report_runs import Page, compared, fill_gaps, gap, notebook_of, page_of, run_folder, runs, save, used_server

pytest_plugins = ["tests.lab_report_fixtures"]


def of_part(report, name):
    return [text for text in report.check() if text.startswith(PARTS[name].title)]


def test_a_finished_report_has_nothing_left_to_check_but_for_a_person(report):
    fill_gaps(report)
    assert report.check() == ["report.html does not say what report.json and report.ipynb say: report.build() makes it again"]
    report.build()
    assert report.check() == []


@pytest.mark.parametrize("name", RECORDED)
def test_a_missing_part_is_named_with_the_call_that_records_it(report, name):
    fill_gaps(report)
    del report.stored[name]
    report.build()
    (found,) = report.check()
    assert found == f"{PARTS[name].title}: nothing is recorded, report.{PARTS[name].call} does it"
    assert f"Not recorded: report.{PARTS[name].call} does it." in (report.folder / "report.html").read_text()


def test_every_call_that_a_part_names_is_one_of_the_report_s(report):
    for name in RECORDED:
        method, arguments = re.fullmatch(r"(\w+)\((.*)\)", PARTS[name].call).groups()
        assert method == name and set(arguments.split(", ")) <= set(getattr(LabReport, name).__annotations__) | {"folder", "server"}


def test_an_empty_report_names_all_parts_and_builds(tmp_path):
    report = LabReport(tmp_path)
    assert len(report.check()) == len(RECORDED) + 1 and "report.ipynb and report.html are not there yet" in report.check()[-1]
    report.build()
    assert page_of(report).sections[:-1] == list(PARTS) and page_of(report).words == []
    assert len(report.check()) == len(RECORDED) + len(PARTS)


def test_words_are_counted_and_the_mark_counts_for_none(report):
    fill_gaps(report)
    notebook = notebook_of(report)
    gap(notebook, "dataset").source = GAP + " " + "word " * (PARTS["dataset"].words - 1)
    save(report, notebook)
    report.build()
    assert report.check() == [f"report.ipynb, {PARTS['dataset'].title}: {PARTS['dataset'].words - 1} of at least {PARTS['dataset'].words} words "
                              f"are written"]


def test_a_number_that_was_changed_in_the_notebook_or_on_the_page_is_noticed(report):
    fill_gaps(report)
    report.build()
    page = report.folder / "report.html"
    page.write_text(page.read_text().replace("36.90 mm", "6.90 mm"))
    assert report.check() == ["report.html does not say what report.json and report.ipynb say: report.build() makes it again"]
    page.write_bytes(b"\xff")
    assert len(report.check()) == 1
    report.build()
    notebook = notebook_of(report)
    for cell in notebook.cells:
        cell.source = cell.source.replace("36.90 mm", "6.90 mm")
    save(report, notebook)
    assert f"report.ipynb, {PARTS['comparison'].title}: its facts are not those of report.json: report.build() puts them back" in report.check()


def test_a_dataset_that_is_another_one_by_now_is_noticed(report, tmp_path):
    shutil.copytree(DATA / "demonstrations" / "align", tmp_path / "align")
    report.dataset(tmp_path / "align")
    (tmp_path / "align" / ".DS_Store").write_text("not part of the data")
    assert of_part(report, "dataset") == []
    path = next((tmp_path / "align" / "train" / "images").iterdir())
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert "is not what was recorded" in of_part(report, "dataset")[0]
    shutil.rmtree(tmp_path / "align")  # at the marker's desk there is no dataset
    assert of_part(report, "dataset") == []


def test_curves_or_settings_that_are_not_those_of_the_run_are_noticed(report, tmp_path):
    report.training(run_folder(tmp_path / "run"))
    assert of_part(report, "training") == []
    for change in ({"epochs": ((0.4, 0.5), (0.1, 0.1))}, {"settings": {"batch_size": 16, "head_rate": 0.5, "loss": "l1"}}):
        run_folder(tmp_path / "run", **change)
        assert "curves and settings are not those in" in of_part(report, "training")[0]
    (tmp_path / "run" / STATE).write_bytes(b"broken")
    assert "cannot be read" in of_part(report, "training")[0]


def test_a_record_that_was_improved_by_hand_is_noticed(report):
    path = report.folder / "report.json"
    stored = json.loads(path.read_text())
    stored["training"]["curves"]["validation"][-1] /= 2
    path.write_text(json.dumps(stored))
    assert "curves and settings are not those in" in of_part(LabReport(report.folder), "training")[0]


def test_a_comparison_that_proves_little_is_named(report):
    few = runs("align", 0.5, FEWEST_EPISODES - 1)
    compared(report, generic={"as trained": few}, fine_tuned={"as trained": few})
    with used_server() as server:
        report.integration(server, served=few, alone=few)
    said = "\n".join(report.check())
    for words in (f"fewer than {FEWEST_EPISODES} episodes in as trained ({FEWEST_EPISODES - 1})", "one condition only",
                  f"episodes ({FEWEST_EPISODES - 1}) ran through"):
        assert words in said, words


def run(*arguments):
    """The command's exit code, in this process, whatever environment that is."""
    commands = read_commands()
    return commands["report"].main(parse(["report", *map(str, arguments)], commands))


def test_the_command_builds_and_checks(report, capsys):
    page = report.folder / "report.html"
    page.unlink()
    assert run(report.folder) == 1
    said = capsys.readouterr().out
    assert f"{len(PARTS)} to do" in said and f"{POINTS} points" in said and Page(page.read_text()).sections[:-1] == list(PARTS)
    fill_gaps(report)
    assert run(report.folder) == 0
    assert "everything that can be checked automatically is there" in capsys.readouterr().out
    page.write_text("changed")
    assert run(report.folder, "--check") == 1
    assert page.read_text() == "changed"


def test_the_command_says_in_one_sentence_where_there_is_no_record(tmp_path):
    with pytest.raises(UserError, match=r"holds no report\.json: record your runs in the lab's notebook, LabReport\("):
        run(tmp_path)
