"""Feedback pages: everything that a record says is on them, nothing that it does not say, and nothing that acts."""

import base64
import hashlib
import re

import pytest
from grading_records import HOSTILE, assert_harmless, graded, hostile_records

from labkit.exercises.judging import CORRECT, NOT_ATTEMPTED, WRONG
from labkit.grading.feedback import duration, feedback_page, write_feedback
from labkit.grading.pages import LONGEST_NAME, LONGEST_TEXT, cell, clean, names_of, percent, points, text_of
from labkit.grading.results import Late, Override


def test_a_page_says_what_the_record_says():
    record = graded(lora=WRONG, earned=2.5, late=Late(1500, 0.25), problems=("04.ipynb has two cells called x.",),
                    overrides=(Override("lora-merge", 1, "too early", "Kim"), Override("lora-merge", 2, "appeal of 3 May", "Lee")))
    text = assert_harmless(feedback_page(record, "LoRA")).text
    # 0 + 2 (by hand) + 0 + 2.5 + 3.25 = 7.75, a quarter less: 5.8125
    assert "Total: 5.81 of 17 points" in text and "7.75 points become 5.81" in text and "Late: 25 % of 7.75" in text
    assert "1 day 1 hour after the deadline" in text
    assert "✗ not yet 0 of 3 You multiplied outputs by inputs" in text and "2 of 5 cases agree" in text
    assert "✓ correct 2 of 3" in text and "Set by hand, see below; the grader gave 3" in text
    assert "○ not attempted 0 of 2" in text
    assert "2 of 3 points, by Lee. Reason: appeal of 3 May" in text and "too early" in text
    assert "lora-question: 2.5 of 4 points" in text and "Because of the rank." in text
    assert "62 % 52 % to 71 %" in text and "80 % 73 % to 87 %" in text and "Episodes: 100" in text
    assert "04.ipynb has two cells called x." in text and "isolation: full" in text
    assert "Handed in 2026-05-01 17:00:00+02:00" in text


@pytest.mark.parametrize("status, sign", [(CORRECT, "✓"), (WRONG, "✗"), (NOT_ATTEMPTED, "○")])
def test_a_status_is_read_without_colour(status, sign):
    page = assert_harmless(feedback_page(graded(lora=status)))
    assert f"{sign} {status}" in page.text
    colours = re.findall(r"(?<![-\w])(?:color|background): ([^;]+);", feedback_page(graded()))
    assert set(colours) <= {"#111", "#fff", "#555"}


def test_a_question_is_marked_or_waiting_or_unanswered():
    assert "lora-question: not marked yet (4 points)" in assert_harmless(feedback_page(graded())).text
    assert "1 of your written answers is not marked yet" in assert_harmless(feedback_page(graded())).text
    assert "lora-question: not answered (0 of 4 points)" in assert_harmless(feedback_page(graded(answer=""))).text
    assert "lora-question: 0 of 4 points" in assert_harmless(feedback_page(graded(earned=0.0))).text


def test_a_refused_adapter_and_a_missing_one():
    refused = next(record for record in hostile_records() if record.student == "李小龙")
    page = assert_harmless(feedback_page(refused))
    assert "0 of 5 points. 李小龙" in page.text and "95 % interval" not in page.text
    assert "Performance" not in assert_harmless(feedback_page(graded(performance=None))).text


def test_hostile_text_is_shown_and_does_nothing():
    for record in hostile_records():
        page = assert_harmless(feedback_page(record))
        words = " ".join(clean(record.student).split())
        assert len(record.student) > LONGEST_NAME or words in page.text


def test_no_misconception_template_and_no_other_student_is_on_a_page(tmp_path):
    pages = write_feedback(tmp_path, [graded("ann", WRONG), graded("bob", answer="Bob's own words")])
    ann, bob = (path.read_text(encoding="utf-8") for path in pages)
    assert "{rank}" not in ann and "own words" not in ann and "own words" in bob and "ann" not in bob


def test_the_policy_allows_the_style_that_is_there_and_no_other():
    html = feedback_page(graded())
    digest = base64.b64encode(hashlib.sha256(re.search("<style>(.*?)</style>", html, re.DOTALL)[1].encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}';" in html


def test_every_record_gets_its_file_and_the_same_bytes_again(tmp_path):
    records = hostile_records()
    first = {path: path.read_bytes() for path in write_feedback(tmp_path, records)}
    again = {path: path.read_bytes() for path in write_feedback(tmp_path, records)}
    assert len(first) == len(records) and first == again
    assert all(path.parent == tmp_path / "feedback" for path in first)


def test_no_two_students_have_one_name():
    names = names_of(hostile_records())
    assert len(set(names.values())) == len(HOSTILE)
    assert all(name.isprintable() and 0 < len(name) <= 100 for name in names.values())
    assert names["a\u202etxt.exe"] != "a txt.exe"


@pytest.mark.parametrize("text", HOSTILE)
def test_a_cell_is_no_formula_and_reads_back(text):
    made = cell(text)
    assert not made.startswith(("=", "+", "-", "@", "\t", "\r", "＝"))
    assert text_of(made) == text_of(text) or len(text) > LONGEST_TEXT


def test_long_texts_say_that_they_were_cut():
    assert clean("x" * (LONGEST_TEXT + 1500)).endswith("x ... (and 1,500 characters more)")


def test_numbers_are_written_as_a_person_would():
    assert [points(x) for x in (3, 2.50, 0.125, -0.0, 1234567.0, 10)] == ["3", "2.5", "0.12", "0", "1234567", "10"]
    assert [percent(x) for x in (0.1, 0.125, 1, 1 / 3)] == ["10 %", "12.5 %", "100 %", "33.3 %"]
    assert [duration(x) for x in (0, 1, 60, 1441, 4325)] == ["0 minutes", "1 minute", "1 hour", "1 day 1 minute", "3 days 5 minutes"]
