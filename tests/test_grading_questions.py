"""Written questions go out with their rubric and without names, marks and points set by hand come back, and a bad table changes nothing."""

import csv
import io
import json
from dataclasses import replace

import pytest
from grading_records import HOSTILE, assert_harmless, graded, hostile_records

from labkit.errors import UserError
from labkit.grading.pages import csv_text
from labkit.grading.questions import (
    MARKS,
    OVERRIDES,
    carried_over,
    code_of,
    merge_marks,
    merge_overrides,
    read_asked,
    write_questions,
)  # fmt: skip
from labkit.grading.results import Override, read_record, write_record
from labkit.notebooks import list_notebooks
from labkit.paths import NOTEBOOKS

NAMES = ["ann", "bob", "cy", "dee", "eve", "fay"]


def rows_of(path):
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline="")))


def table(path, columns, *rows):
    path.write_text(csv_text([columns, *rows]), encoding="utf-8")
    return path


def marks(tmp_path, *rows):
    return table(tmp_path / "marks.csv", MARKS, *rows)


def complaints(merge, records, path):
    """The sentences, one a bad row; the first line says that nothing was merged."""
    with pytest.raises(UserError) as error:
        merge(records, path)
    first, *rest = str(error.value).split("\n")
    assert "nothing was merged" in first and path.name in first
    return rest


def test_every_question_of_the_course_has_a_rubric_that_adds_up_to_its_points():
    for path in list_notebooks(NOTEBOOKS):
        points = {
            cell["metadata"]["nbgrader"]["grade_id"]: cell["metadata"]["nbgrader"]["points"]
            for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
            if cell["cell_type"] == "markdown" and cell["metadata"].get("nbgrader", {}).get("grade")
        }
        asked = read_asked(NOTEBOOKS, path.stem)
        assert set(asked) == set(points)
        for question, found in asked.items():
            assert found.text.startswith("Question") and "<" not in found.text
            assert sum(int(line.split(":")[0]) for line in found.rubric) == points[question]


def test_questions_go_out_without_names_and_in_another_order_for_each(tmp_path):
    records = [graded(name, answer=f"Answer {i}") for i, name in enumerate(NAMES)]
    records = [replace(r, questions=(*r.questions, replace(r.questions[0], question="lora-second"))) for r in records]
    written, page = write_questions(tmp_path, records)
    text = page.read_text(encoding="utf-8")
    assert not [name for name in NAMES if name in written.read_text(encoding="utf-8")] and not [name for name in NAMES if f">{name}<" in text]
    rows = rows_of(written)
    orders = [[row["student"] for row in rows if row["question"] == question] for question in ("lora-question", "lora-second")]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(code_of(record) for record in records) and orders[0] != orders[1]
    assert orders[0] != [code_of(record) for record in records]
    seen = assert_harmless(text).text
    assert "for and against the assumption" in seen and seen.index("How the answer is marked") < seen.index("Answer 1")
    assert [seen.index(code) for code in orders[0]] == sorted(seen.index(code) for code in orders[0])
    again = [path.read_bytes() for path in write_questions(tmp_path, list(reversed(records)))]
    assert again == [written.read_bytes(), page.read_bytes()]


def test_names_are_shown_on_request_and_unanswered_questions_are_left_out(tmp_path):
    records = [graded("ann"), graded("bob", answer="")]
    assert [row["student"] for row in rows_of(write_questions(tmp_path, records, names=True)[0])] == ["ann"]
    assert "No written question was answered." in write_questions(tmp_path, records[1:])[1].read_text(encoding="utf-8")
    strange = [graded("ann", questions=(replace(records[0].questions[0], notebook="99_nothing"),))]
    assert "no such question" in write_questions(tmp_path, strange)[1].read_text(encoding="utf-8")


@pytest.mark.parametrize("names", [False, True])
def test_a_table_of_hostile_answers_comes_back_as_it_went_out(tmp_path, names):
    records = [graded(record.student, answer=text or "x") for record, text in zip(hostile_records(), HOSTILE)]
    written, page = write_questions(tmp_path, records, names=names)
    assert_harmless(page.read_text(encoding="utf-8"))
    rows = rows_of(written)
    assert len(rows) == len(HOSTILE) and not [cell for row in rows for cell in row.values() if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
    for i, row in enumerate(rows):
        row |= {"points": str(i % 4), "comment": "'-1: no reason" if i % 2 else "", "marker": "=Kim"}
    changed = merge_marks(records, table(tmp_path / "back.csv", rows[0], *(row.values() for row in rows)))
    assert len(changed) == len(records) and all(record.earned("lora-question") is not None for record in changed)
    assert {q.comment for record in changed for q in record.questions} == {"(marked by =Kim)", "-1: no reason (marked by =Kim)"}


def test_marks_are_merged_written_and_merged_again_to_the_same(tmp_path):
    records = [graded(name) for name in NAMES[:3]]
    path = marks(tmp_path, (code_of(records[0]), "lora-question", 2.5, "Two of four.", "Kim"), ("bob", "lora-question", "0", "", ""),
                 ("cy", "lora-question", "", "", "Kim"))
    changed = merge_marks(records, path)
    assert [(r.student, r.earned("lora-question"), r.questions[0].comment) for r in changed] == [
        ("ann", 2.5, "Two of four. (marked by Kim)"), ("bob", 0.0, "")]
    assert changed[0].total == records[0].total + 2.5
    read = read_record(write_record(tmp_path, changed[0]))
    assert read == changed[0]
    assert merge_marks([read, changed[1], records[2]], path) == []
    # What goes out again has the marks in it, and says the same when it comes back.
    assert merge_marks([read, *records[1:]], write_questions(tmp_path, [read, *records[1:]])[0]) == []


def test_a_mark_replaces_an_earlier_one(tmp_path):
    (changed,) = merge_marks([graded(earned=1.0)], marks(tmp_path, ("ann", "lora-question", 4, "Better.", "")))
    assert changed.earned("lora-question") == 4


def test_every_bad_row_of_marks_gets_a_sentence_with_its_line(tmp_path):
    records = [graded("ann"), graded("bob")]
    path = marks(
        tmp_path,
        ("ann", "lora-question", 3, "Good.\nReally.", ""), ("zoe\x1b[31m", "lora-question", 1, "", ""), ("ann", "qlora-question", 1, "", ""),
        ("bob", "lora-question", "4.5", "", ""), ("bob", "lora-question", "nan", "", ""), ("bob", "lora-question", "'-1", "", ""),
        ("bob", "lora-question", "2,5", "", ""), ("bob", "lora-question", "", "well", ""), ("ann", "lora-question", "3.0", "Good.\nReally.", ""),
        ("ann", "lora-question", 2, "Good.\nReally.", ""), ("ann", "lora-question", 3, "Bad.", ""),
    )  # fmt: skip
    found = complaints(merge_marks, records, path)
    assert found == [
        'line 4 (row 3 of the spreadsheet): "zoe [31m" is no student of these results.',
        'line 5 (row 4 of the spreadsheet): "ann" has no question "qlora-question"; there are lora-question.',
        'line 6 (row 5 of the spreadsheet): "4.5" is not between 0 and 4 points.',
        'line 7 (row 6 of the spreadsheet): "nan" is not between 0 and 4 points.',
        'line 8 (row 7 of the spreadsheet): "-1" is not between 0 and 4 points.',
        'line 9 (row 8 of the spreadsheet): "2,5" is no number of points, write 2.5 with a point.',
        'line 10 (row 9 of the spreadsheet): "" is no number of points.',
        'line 13 (row 11 of the spreadsheet): it disagrees with line 2 about "ann" and "lora-question".',
        'line 15 (row 12 of the spreadsheet): it disagrees with line 2 about "ann" and "lora-question".',
    ]


def test_who_takes_another_students_code_gets_none_of_the_marks(tmp_path):
    ann = graded("ann")
    thief = graded(code_of(ann))
    found = complaints(merge_marks, [ann, thief], marks(tmp_path, (code_of(ann), "lora-question", 4, "", "")))
    assert len(found) == 1 and "more than one student" in found[0]


@pytest.mark.parametrize("content, words", [
    (b"student;question;points;comment;marker\nann;lora-question;3;Good, really;Kim\n", None),
    (b"\xef\xbb\xbfStudent\tQuestion\tPoints\tComment\tMarker\r\nann\tlora-question\t3\tGood, really\tKim\r\n\r\n", None),
    (b'marker,comment,points,question,student,more\nKim,"Good, really",3,lora-question,ann\n', None),
    (b"student,question,points,comment,marker\nann,lora-question,3,\xe4,Kim\n", "CSV UTF-8"),
    (b"student,question,points\nann,lora-question,3\n", "the column comment, marker is missing"),
    (b"student,question,points,comment,marker\nann,lora-question,3,Good, really,Kim\n", "line 2: it has more cells than the heading"),
    (b"", "is missing"),
    (b'student,question,points,comment,marker\nann,lora-question,3,"Good\n', "line 2: it is no CSV"),
    (None, "cannot be read"),
])
def test_tables_of_other_spreadsheets_are_read_and_what_is_none_is_said(tmp_path, content, words):
    path = tmp_path / "marks.csv"
    if content is not None:
        path.write_bytes(content)
    if words:
        with pytest.raises(UserError, match=words):
            merge_marks([graded()], path)
    else:
        (changed,) = merge_marks([graded()], path)
        assert changed.questions[0].earned == 3 and changed.questions[0].comment == "Good, really (marked by Kim)"


def test_long_answers_in_the_table_are_no_hindrance(tmp_path):
    path = tmp_path / "marks.csv"
    path.write_text("student,question,points,comment,marker,answer\nann,lora-question,3,,," + "x" * 200_000 + "\n", encoding="utf-8")
    limit = csv.field_size_limit()
    assert merge_marks([graded()], path)[0].earned("lora-question") == 3 and csv.field_size_limit() == limit


def test_overrides_are_added_once_and_the_last_one_counts(tmp_path):
    records = [graded("ann"), graded("bob")]
    path = table(tmp_path / "overrides.csv", OVERRIDES, ("ann", "qlora-bits", 2, "appeal of 3 May", "Kim"), ("ann", "performance", 5, "disk", ""),
                 ("bob", "lora-question", 1, "oral", "Lee"))
    ann, bob = merge_overrides(records, path)
    assert ann.overrides == (Override("qlora-bits", 2, "appeal of 3 May", "Kim"), Override("performance", 5, "disk"))
    assert ann.earned("qlora-bits") == 2 and ann.earned("performance") == 5 and bob.earned("lora-question") == 1
    assert merge_overrides([ann, bob], path) == []
    later = table(tmp_path / "later.csv", OVERRIDES, ("ann", "qlora-bits", 1, "second appeal", "Kim"))
    (again,) = merge_overrides([ann, bob], later)
    assert again.earned("qlora-bits") == 1 and again.overrides[:2] == ann.overrides
    assert read_record(write_record(tmp_path, again)) == again


def test_every_bad_override_gets_a_sentence(tmp_path):
    path = table(tmp_path / "overrides.csv", OVERRIDES, ("ann", "qlora-bits", 2, "", "Kim"), ("ann", "qlora-bits", 3, "x", ""),
                 ("ann", "lora", 1, "x", ""), ("ann", "lora-merge", 1, "x", ""), ("ann", "lora-merge", 1, "y", ""),
                 ("ann", "lora-count", "", "", ""))
    assert [line.partition(": ")[2] for line in complaints(merge_overrides, [graded()], path)] == [
        "the reason is missing.", '"3" is not between 0 and 2 points.',
        '"ann" has no item "lora"; there are lora-count, lora-merge, qlora-bits, lora-question, performance.',
        'it disagrees with line 5 about "ann" and "lora-merge".', '"" is no number of points.']


def test_grading_again_keeps_marks_of_the_same_answer_and_says_those_of_another():
    old = graded(earned=2.5, overrides=(Override("qlora-bits", 1, "appeal"),))
    old = replace(old, questions=(replace(old.questions[0], comment="Nice."),))
    same, other = carried_over(old, graded()), carried_over(old, graded(answer="Something else."))
    assert same == old
    assert other.overrides == old.overrides and other.earned("lora-question") is None
    assert other.questions[0].comment == "Nice. [2.5 of 4 points, for an earlier answer]"
    assert carried_over(graded(questions=()), graded()) == graded()
