"""The class report: its numbers, the lists an instructor acts on, and pages and pictures that are the same for the same records."""

import json
from types import SimpleNamespace

import pytest
from grading_records import assert_harmless, graded, hostile_records

from labkit.exercises.judging import CORRECT, NOT_ATTEMPTED, WRONG
from labkit.grading.class_report import hardest, misconceptions, write_report
from labkit.grading.results import Late, Override, write_record


def classroom():
    """Eight submissions: lora-count solved by 2, wrong in 5 (the same mistake), left out by 1."""
    statuses = [CORRECT] * 2 + [WRONG] * 5 + [NOT_ATTEMPTED]
    return [graded(f"s{i}", status, late=Late(61, 0.1) if i == 3 else Late(), earned=None if i < 3 else 2.0) for i, status in enumerate(statuses)]


def test_exercises_are_counted_and_the_hardest_comes_first():
    rows = hardest(classroom())
    assert [(name, share) for name, _, share in rows] == [("qlora-bits", 0), ("lora-count", 0.25), ("lora-merge", 1)]
    assert dict(rows[1][1]) == {CORRECT: 2, WRONG: 5, NOT_ATTEMPTED: 1}


def test_a_misconception_is_counted_once_however_its_numbers_differ():
    records = classroom()
    other = records[3].verdicts[0]
    changed = [type(other)(**{**other.__dict__, "sentence": "You multiplied with 16."}), *records[3].verdicts[1:]]
    records[3] = graded("s3", verdicts=tuple(changed))
    found = misconceptions(records)
    assert [(exercise, n) for exercise, _, n in found] == [("lora-count", 5)]
    assert found[0][1] == other.sentence and "{" not in found[0][1]


def test_the_page_has_the_numbers_in_words(tmp_path):
    roster = [SimpleNamespace(id=f"s{i}", name=f"Student {i}") for i in range(1, 10)]
    records = classroom()
    records[5] = graded("s5", problems=("05.ipynb is missing.",), overrides=(Override("qlora-bits", 2, "appeal", "Kim"),), isolation="none")
    page = assert_harmless(write_report(tmp_path, records, "LoRA", roster).read_text(encoding="utf-8"))
    assert "Class report: LoRA" in page.text and "Submissions: 8. Isolation: full (7), none (1)." in page.text
    assert "Not isolated: 1 of them" in page.text
    assert "lora-question: 4 answers" in page.text  # three of the class, and the one with an appeal
    assert "s3: 1 hour 1 minute, 10 % taken off" in page.text
    assert "s5: qlora-bits, 2 points by Kim: appeal" in page.text and "s5: 05.ipynb is missing." in page.text
    assert "s8: Student 8 s9: Student 9" in page.text and "not in the roster s0" in page.text
    assert "4 lora-count You multiplied outputs by inputs" in page.text
    assert len(page.named("img")) == 3


def test_without_a_roster_nobody_is_missing(tmp_path):
    assert "roster" not in write_report(tmp_path, classroom()).read_text(encoding="utf-8")


def test_times_are_on_a_page_of_their_own_and_change_nothing_else(tmp_path):
    from PIL import Image

    records = classroom()
    index = write_report(tmp_path, records)
    before = {path.name: path.read_bytes() for path in index.parent.iterdir()}
    assert "No time was written down." in before["time.html"].decode() and "time.png" not in before
    for i, record in enumerate(records):
        write_record(tmp_path, record, seconds=0.5 + i)
    write_report(tmp_path, records)
    after = {path.name: path.read_bytes() for path in index.parent.iterdir()}
    assert {name for name in after if after[name] != before.get(name)} == {"time.html", "time.png"}
    assert "median 4.000, longest 7.500, 32.0 together" in assert_harmless(after["time.html"].decode()).text
    for name in ("scores.png", "exercises.png", "misconceptions.png", "time.png"):
        with Image.open(tmp_path / "report" / name) as picture:
            assert min(picture.size) > 150 and len(picture.convert("L").getcolors(256)) > 10


def test_hostile_records_make_a_harmless_report(tmp_path):
    records = hostile_records()
    for record in records:
        write_record(tmp_path, record, seconds=1.0)
    assert_harmless(write_report(tmp_path, records, "<b>", [SimpleNamespace(id="\x1b[2J", name="<i>")]).read_text(encoding="utf-8"))
    assert_harmless((tmp_path / "report" / "time.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize("records", [[], [graded(verdicts=(), questions=(), performance=None)]])
def test_nothing_to_report_is_a_report(tmp_path, records):
    page = assert_harmless(write_report(tmp_path, records).read_text(encoding="utf-8"))
    assert "No known mistake was recognised." in page.text and not page.named("img")


def test_the_look_of_other_figures_is_left_alone(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    write_report(tmp_path, classroom())
    assert dict(matplotlib.rcParams) == before


def test_broken_times_are_left_out(tmp_path):
    records = classroom()[:2]
    write_record(tmp_path, records[0], seconds=2.0)
    (tmp_path / "times" / "s1.json").write_text(json.dumps({"seconds": "soon"}))
    write_report(tmp_path, records)
    assert "Seconds for 1 of 2 submissions" in (tmp_path / "report" / "time.html").read_text(encoding="utf-8")
