"""Exports: what other programs read in them gives our totals, whatever students are called."""

import csv
import io
import json
from datetime import datetime
from types import SimpleNamespace

import pytest
from grading_records import HOSTILE, graded, hostile_records

from labkit.errors import UserError
from labkit.exercises.judging import WRONG
from labkit.grading import exports
from labkit.grading.pages import names_of
from labkit.grading.results import Late, Override

ROSTER = [SimpleNamespace(id="ann", name="Ann Marie Lee", email="ann@x.org"), SimpleNamespace(id="none", name="Nobody", email="")]


def rows_of(path, encoding="utf-8-sig"):
    return list(csv.DictReader(io.StringIO(path.read_text(encoding=encoding), newline="")))


def some_records():
    return [
        graded("ann", earned=2.5), graded("bob", WRONG, late=Late(90, 1 / 3)), graded("cy", answer="", performance=None),
        graded("dee", earned=4.0, late=Late(3000, 0.125), overrides=(Override("qlora-bits", 1.5, "appeal"), Override("lora-question", 3, "x"))),
        graded("eve", WRONG, answer="", performance=None, verdicts=(), questions=()), graded("fay", late=Late(99999, 1.0)),
    ]  # fmt: skip


def test_grades_have_a_row_a_student_and_a_column_an_item(tmp_path):
    rows = {row["student"]: row for row in rows_of(exports.write_grades(tmp_path, some_records()))}
    assert list(rows) == ["ann", "bob", "cy", "dee", "eve", "fay"]
    assert list(rows["ann"])[1:6] == ["lora-count", "lora-merge", "qlora-bits", "lora-question", "performance"]
    assert rows["ann"]["total"] == "11.75" and rows["ann"]["out_of"] == "17" and rows["ann"]["lora-question"] == "2.5"
    assert rows["bob"]["lora-question"] == "" and rows["bob"]["unmarked"] == "1" and rows["cy"]["unmarked"] == "0"
    assert rows["dee"]["qlora-bits"] == "1.5" and rows["dee"]["late_minutes"] == "3000" and rows["dee"]["penalty"] == "0.125"
    # bob: (0 + 3 + 0 + 0 + 3.25) * 2/3; dee: (3 + 3 + 1.5 + 3 + 3.25) * 7/8
    assert float(rows["bob"]["total"]) == round(6.25 * 2 / 3, 2) and float(rows["dee"]["total"]) == round(13.75 * 7 / 8, 2)
    assert rows["eve"]["lora-count"] == "" and rows["eve"]["total"] == rows["fay"]["total"] == "0"


def test_no_cell_of_a_hostile_table_is_a_formula(tmp_path):
    records = hostile_records()
    for path, encoding in ((exports.write_grades(tmp_path, records), "utf-8-sig"), (exports.write_canvas(tmp_path, records), "utf-8")):
        text = path.read_text(encoding=encoding)
        rows = list(csv.reader(io.StringIO(text, newline="")))
        assert len({len(row) for row in rows}) == 1
        assert not [cell for row in rows for cell in row if cell.startswith(("=", "+", "-", "@", "\t", "\r", "＝"))]
        assert all(c.isprintable() or c == "\n" for c in text)
        assert len({row[0] for row in rows}) == len(rows)
    assert len(rows_of(tmp_path / exports.GRADES)) == len(HOSTILE)


def test_canvas_reads_one_row_of_maxima_and_finds_the_students(tmp_path):
    rows = rows_of(exports.write_canvas(tmp_path, [*some_records(), graded("Points Possible")], "LoRA (4711)", ROSTER), "utf-8")
    assert list(rows[0]) == ["Student", "ID", "SIS User ID", "SIS Login ID", "Section", "LoRA (4711)"]
    assert [i for i, row in enumerate(rows) if "Points Possible" in row["Student"]] == [0] and rows[0]["LoRA (4711)"] == "17"
    assert rows[1] == {"Student": "Ann Marie Lee", "ID": "", "SIS User ID": "ann", "SIS Login ID": "ann", "Section": "", "LoRA (4711)": "11.75"}
    assert "none" not in {row["SIS User ID"] for row in rows}  # an empty grade is no zero


def test_gradescope_gets_what_its_specification_names(tmp_path):
    for path, record in zip(exports.write_gradescope(tmp_path, some_records()), some_records()):
        found = json.loads(path.read_text(encoding="utf-8"))
        assert found["score"] == record.total and found["output_format"] == "text" and found["visibility"] == "visible"
        assert set(found) <= {"score", "output", "output_format", "test_output_format", "test_name_format", "visibility", "stdout_visibility",
                              "tests", "leaderboard", "extra_data"}
        assert [test["name"] for test in found["tests"]] == list(record.items)
        for test in found["tests"]:
            assert set(test) <= {"name", "score", "max_score", "status", "output", "output_format", "visibility"}
            assert test.get("status") in (None, "passed", "failed") and test["output_format"] == "text"
            assert test.get("score", 0) == (record.earned(test["name"]) or 0) and test.get("score", 0) <= record.items[test["name"]]
        if not record.late.penalty:
            assert sum(test.get("score", 0) for test in found["tests"]) == pytest.approx(found["score"])


def test_gradescope_says_late_unmarked_and_set_by_hand():
    bob, dee = exports.gradescope(some_records()[1]), exports.gradescope(some_records()[3])
    assert "Late by 1 hour 30 minutes: 33.3 %" in bob["output"] and "without a mark: 1" in bob["output"]
    unmarked = next(test for test in bob["tests"] if test["name"] == "lora-question")
    assert "score" not in unmarked and "status" not in unmarked
    assert next(test for test in dee["tests"] if test["name"] == "qlora-bits") | {"score": 1.5, "status": "failed"} == next(
        test for test in dee["tests"] if test["name"] == "qlora-bits")
    assert any("Set by hand: appeal" in test["output"] for test in dee["tests"])
    assert bob["leaderboard"] == [{"name": "success (%)", "value": 62.0}, {"name": "retention (%)", "value": 80.0}]
    assert "leaderboard" not in exports.gradescope(some_records()[2])


def test_exports_are_the_same_bytes_again(tmp_path):
    made = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        exports.write_grades(folder, hostile_records())
        exports.write_canvas(folder, hostile_records())
        exports.write_gradescope(folder, hostile_records())
        made.append({path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()})
    assert made[0] == made[1] and len(made[0]) == 2 + len(HOSTILE)


def test_nbgrader_itself_adds_up_our_totals(tmp_path):
    api = pytest.importorskip("nbgrader.api")
    records = [*some_records(), *hostile_records()]
    deadline = datetime.fromisoformat("2026-05-01T18:00:00+02:00")
    for _ in range(2):  # made anew, not added to
        path = exports.write_gradebook(tmp_path, records, deadline, ROSTER)
    totals = {names_of(records)[record.student]: record for record in records}
    with api.Gradebook(f"sqlite:///{path}") as gradebook:
        students = {found["id"]: found for found in gradebook.student_dicts()}
        submissions = {found["student"]: found for found in gradebook.submission_dicts("lora")}
        assert {name: found["score"] for name, found in students.items()} == pytest.approx({name: r.total for name, r in totals.items()})
        assert all(found["max_score"] == 17 for found in students.values())
        with_items = {name: record for name, record in totals.items() if record.items}
        assert {name: found["score"] for name, found in submissions.items()} == pytest.approx({name: r.total for name, r in with_items.items()})
        assert submissions["ann"]["max_score"] == 17 and submissions["ann"]["written_score"] == 2.5 and submissions["ann"]["code_score"] == 9.25
        assert students["ann"] | {"first_name": "Ann Marie", "last_name": "Lee", "email": "ann@x.org"} == students["ann"]
        assignment = gradebook.find_assignment("lora")
        assert assignment.duedate == datetime(2026, 5, 1, 16) and gradebook.find_submission("lora", "ann").timestamp == datetime(2026, 5, 1, 15)
        assert [notebook.name for notebook in assignment.notebooks] == ["04_lora_parameter_counting", "05_qlora", "performance"]
        assert gradebook.find_grade("lora-count-check", "04_lora_parameter_counting", "lora", "ann").auto_score == 3
        waiting = gradebook.find_grade("lora-question", "04_lora_parameter_counting", "lora", "bob")
        by_hand = gradebook.find_grade("qlora-bits-check", "05_qlora", "lora", "dee")
        assert waiting.needs_manual_grade and waiting.manual_score is None and by_hand.manual_score == 1.5
        assert submissions["bob"]["needs_manual_grade"] and not submissions["ann"]["needs_manual_grade"]
    assert not list(tmp_path.glob(".*"))


def test_without_nbgrader_the_gradebook_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "nbgrader.api", None)
    with pytest.raises(UserError, match="pip install nbgrader"):
        exports.write_gradebook(tmp_path, some_records())
    assert not list(tmp_path.iterdir())


def test_a_gradebook_that_fails_leaves_the_last_one_there(tmp_path):
    pytest.importorskip("nbgrader.api")
    before = exports.write_gradebook(tmp_path, some_records()).read_bytes()
    with pytest.raises(Exception, match="UNIQUE"):
        exports.write_gradebook(tmp_path, [graded("ann"), graded("ann")])
    assert [path.name for path in tmp_path.iterdir()] == ["gradebook.db"] and (tmp_path / "gradebook.db").read_bytes() == before
