"""Properties of the assignment and the file that describes it. The judges are nbgrader's own metadata, arithmetic on dates, and files gone wrong."""

import json
from dataclasses import replace
from datetime import datetime, timedelta, timezone

import nbformat
import pytest

from labkit.errors import UserError
from labkit.exercises.exercise import all_exercises
from labkit.grading.assignment import Assignment, Student, default_assignment, late, read_assignment, read_roster
from labkit.grading.results import Late
from labkit.paths import DATA, NOTEBOOKS, ROOT

LORA, QLORA = "04_lora_parameter_counting", "05_qlora"
CET = timezone(timedelta(hours=1))
DEADLINE = datetime(2026, 3, 27, 23, 59, tzinfo=CET)
EXAMPLE = DATA / "assignments" / "weeks-10-to-12.toml"
MINIMAL = f'notebooks = ["{LORA}"]\n'


@pytest.fixture
def written(tmp_path):
    """text -> the path of an assignment's file that holds it."""

    def write(text, name="week-11.toml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def graded_cells(path):
    """The cells that nbgrader grades, by its own schema: (grade_id, points, whether a person does)."""
    cells = nbformat.read(path, as_version=4).cells
    marks = [(cell, cell.metadata.nbgrader) for cell in cells if "nbgrader" in cell.metadata]
    return [(mark.grade_id, mark.points, cell.cell_type == "markdown") for cell, mark in marks if mark.grade]



def test_the_default_is_every_lesson_with_exercises_and_never_late():
    assignment = default_assignment()
    assert {exercise.id for _, exercise in assignment.exercises} == set(all_exercises())
    assert [notebook for notebook in assignment.notebooks] == sorted({notebook for notebook, _ in assignment.exercises})
    assert assignment.deadline is None and assignment.performance is None and assignment.roster == ()


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_exercises_and_questions_give_what_nbgrader_reads_from_the_notebook(path):
    assignment = Assignment("one", "", (path.stem,))
    by_machine = [(f"{exercise.id}-check", exercise.points, False) for _, exercise in assignment.exercises]
    by_hand = [(question.id, question.points, True) for question in assignment.questions]
    assert sorted(by_machine + by_hand) == sorted(graded_cells(path))
    assert assignment.out_of == sum(points for _, points, _ in graded_cells(path))
    assert {question.notebook for question in assignment.questions} <= {path.stem}


def test_points_of_the_assignment_stand_in_for_those_of_the_notebook_and_of_no_other_assignment(written):
    plain = read_assignment(written(MINIMAL))
    other = read_assignment(written(MINIMAL + 'leave_out = ["lora-merge"]\n[points]\nlora-count = 7\nlora-question = 1.5\n'))
    before = {exercise.id: exercise.points for _, exercise in plain.exercises}
    expected = {id: points for id, points in before.items() if id != "lora-merge"} | {"lora-count": 7}
    assert {exercise.id: exercise.points for _, exercise in other.exercises} == expected
    assert [(question.id, question.points) for question in other.questions] == [("lora-question", 1.5)]
    assert {exercise.id: exercise.points for _, exercise in Assignment("again", "", (LORA,)).exercises} == before


def test_the_release_changes_with_the_stubs_and_with_nothing_else(tmp_path, written):
    assignment = read_assignment(written(MINIMAL))
    later = replace(assignment, name="other", deadline=DEADLINE, points={"lora-count": 9}, roster=(Student("s1"),))
    assert later.release == assignment.release and len(assignment.release) == 12
    notebook = json.loads((NOTEBOOKS / f"{LORA}.ipynb").read_text())

    def released(change):
        changed = json.loads(json.dumps(notebook))
        change(next(cell for cell in changed["cells"] if cell["metadata"].get("nbgrader", {}).get("grade_id") == "lora-count"), changed)
        (tmp_path / f"{LORA}.ipynb").write_text(json.dumps(changed))
        return replace(assignment, source=tmp_path).release

    def other_prose(cell, changed):
        changed["cells"][0]["source"] = "Another title"

    def other_solution(cell, changed):
        cell["source"] = "".join(cell["source"]).replace("### END SOLUTION", "    pass\n    ### END SOLUTION")

    def other_signature(cell, changed):
        cell["source"] = "".join(cell["source"]).replace("def ", "def another_", 1)

    assert released(other_prose) == released(other_solution) == assignment.release
    assert released(other_signature) != assignment.release


def test_a_release_of_other_notebooks_is_another_one():
    assert len({Assignment("a", "", notebooks).release for notebooks in ((LORA,), (QLORA,), (LORA, QLORA))}) == 3



@pytest.mark.parametrize(
    "after, minutes, penalty",
    [
        (timedelta(days=-3), 0, 0.0),
        (timedelta(0), 0, 0.0),
        (timedelta(microseconds=1), 1, 0.0),
        (timedelta(minutes=15), 15, 0.0),
        (timedelta(minutes=15, microseconds=1), 16, 0.1),
        (timedelta(days=1), 1440, 0.1),
        (timedelta(days=1, seconds=1), 1441, 0.2),
        (timedelta(days=3), 3 * 1440, 0.3),
        (timedelta(days=4, hours=23), 4 * 1440 + 23 * 60, 0.45),
        (timedelta(days=400), 400 * 1440, 0.45),
    ],
)
def test_a_day_begun_costs_a_day_and_the_cap_holds(after, minutes, penalty):
    assignment = Assignment("a", "", (), DEADLINE, grace_minutes=15, penalty_per_day=0.1, most_penalty=0.45)
    assert late(assignment, DEADLINE + after) == Late(minutes, penalty)
    # The same moment, told from elsewhere.
    assert late(assignment, (DEADLINE + after).astimezone(timezone(timedelta(hours=-8)))) == Late(minutes, penalty)


def test_the_penalty_never_falls_with_time_and_stays_a_share():
    assignment = Assignment("a", "", (), DEADLINE, grace_minutes=60, penalty_per_day=0.3, most_penalty=1.0)
    penalties = [late(assignment, DEADLINE + timedelta(hours=hours)).penalty for hours in range(0, 24 * 6, 5)]
    assert penalties == sorted(penalties) and penalties[0] == 0 and penalties[-1] == 1.0


def test_without_a_deadline_or_a_time_nothing_is_late():
    assignment = Assignment("a", "", (), DEADLINE, penalty_per_day=1.0)
    assert late(assignment, None) == late(replace(assignment, deadline=None), DEADLINE + timedelta(days=9)) == Late()
    with pytest.raises(ValueError, match="no offset"):
        late(assignment, datetime(2026, 3, 28))



def test_the_example_has_every_key_and_holds():
    example = read_assignment(EXAMPLE)
    assert example.name == EXAMPLE.stem and example.deadline.utcoffset() is not None and example.performance.retention_tasks
    described = set(Assignment.__dataclass_fields__) - {"source"}
    text = EXAMPLE.read_text()
    assert [key for key in described if f"\n{key} = " not in text and f"\n[{key}]" not in text and f"\n# {key} = " not in text] == []


@pytest.mark.parametrize("path", sorted(EXAMPLE.parent.glob("*.toml")), ids=lambda path: path.stem)
def test_the_assignments_we_ship_can_be_graded_and_no_lesson_is_in_two(path):
    ours, others = read_assignment(path), [read_assignment(other) for other in EXAMPLE.parent.glob("*.toml") if other != path]
    assert ours.notebooks and ours.deadline
    assert [name for other in others for name in ours.notebooks if name in other.notebooks] == []


def test_a_line_is_enough_and_a_prefix_names_a_lesson(written):
    assignment = read_assignment(written('notebooks = ["05", "04"]'))
    assert assignment.notebooks == (QLORA, LORA) and (assignment.name, assignment.title) == ("week-11", "week-11")
    assert read_assignment(written(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode())).notebooks == (LORA,)


PERFORMANCE = MINIMAL + '[performance]\ntask = "stack"\n'
EVERYTHING = '"lora-layer", "lora-count", "lora-merge", "lora-rank-needed", "lora-question"'
WRONG = {
    "unknown key": (MINIMAL + "dedline = 3", "dedline", "deadline"),
    "unknown key in a table": (PERFORMANCE + "points = 3\nseed = 1", "performance.seed", "size_mib"),
    "no notebooks": ('name = "x"', "notebooks", "name at least one lesson"),
    "notebooks no list": (f'notebooks = "{LORA}"', "notebooks", "a list in square brackets"),
    "notebook no text": ("notebooks = [4]", "notebooks", "in quotes"),
    "unknown notebook": ('notebooks = ["09_diffusion"]', "notebooks", "name one of"),
    "ambiguous notebook": ('notebooks = ["0"]', "notebooks", "more than one notebook"),
    "notebook twice": (f'notebooks = ["{LORA}", "04"]', "notebooks", "leave it in once"),
    "naive deadline": (MINIMAL + "deadline = 2026-03-27T23:59:00", "deadline", "offset from UTC"),
    "deadline without a time": (MINIMAL + "deadline = 2026-03-27", "deadline", "date with a time"),
    "deadline in quotes": (MINIMAL + 'deadline = "2026-03-27T23:59:00+01:00"', "deadline", "without quotes"),
    "grace no number": (MINIMAL + 'grace_minutes = "15"', "grace_minutes", "a number"),
    "grace a boolean": (MINIMAL + "grace_minutes = true", "grace_minutes", "a number"),
    "grace negative": (MINIMAL + "grace_minutes = -1", "grace_minutes", "0 or more"),
    "grace without end": (MINIMAL + "grace_minutes = inf", "grace_minutes", "0 or more"),
    "penalty in percent": (MINIMAL + "penalty_per_day = 10", "penalty_per_day", "from 0 to 1"),
    "penalty nan": (MINIMAL + "most_penalty = nan", "most_penalty", "from 0 to 1"),
    "name no name": (MINIMAL + 'name = "week 11/12"', "name", "letters, digits"),
    "points of nothing": (MINIMAL + "[points]\nlora-cuont = 2", "points.lora-cuont", "lora-count"),
    "points zero": (MINIMAL + "[points]\nlora-count = 0", "points.lora-count", "leave_out"),
    "points negative": (MINIMAL + "[points]\nlora-count = -2", "points.lora-count", "0 or more"),
    "points no table": (MINIMAL + "points = 3", "points", "a table"),
    "left out nothing": (MINIMAL + 'leave_out = ["qlora-bits"]', "leave_out", "lora-merge"),
    "all left out": (MINIMAL + f"leave_out = [{EVERYTHING}]", "leave_out", "nothing is left"),
    "no such task": (MINIMAL + '[performance]\ntask = "juggle"\npoints = 3', "performance.task", "stack"),
    "no such old task": (PERFORMANCE + 'points = 3\nretention_tasks = ["juggle"]', "performance.retention_tasks", "pick"),
    "the new task is old": (PERFORMANCE + 'points = 3\nretention_tasks = ["stack"]', "performance.retention_tasks", "take it out"),
    "no points": (PERFORMANCE, "performance.points", "missing"),
    "half an episode": (PERFORMANCE + "points = 3\nepisodes = 1.5", "performance.episodes", "a whole number"),
    "no roster there": (MINIMAL + 'roster = "nobody.csv"', "roster", "relative to the assignment"),
    "no TOML": ("notebooks = [", "no TOML", "weeks-10-to-12.toml"),
    "twice the same key": (MINIMAL + MINIMAL, "no TOML", "weeks-10-to-12.toml"),
    "nested without end": ("a = " + "[" * 5000, "no TOML", "weeks-10-to-12.toml"),
    "no UTF-8": (MINIMAL.encode() + b'title = "\xe9"', "UTF-8", "save it"),
}


@pytest.mark.parametrize("text, place, fix", WRONG.values(), ids=WRONG)
def test_whatever_is_wrong_gets_one_sentence_with_the_file_the_key_and_the_fix(written, text, place, fix):
    path = written(text)
    with pytest.raises(UserError) as caught:
        read_assignment(path)
    sentence = str(caught.value)
    assert str(path) in sentence and place in sentence and fix in sentence and "\n" not in sentence


def test_a_file_that_is_not_there_and_a_folder_are_said(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_assignment(tmp_path / "week-12.toml")
    with pytest.raises(UserError, match="cannot be read"):
        read_assignment(tmp_path)


CLASS = (Student("s1", "Doe, Jane", "jane@uni.example"), Student("s2", "Łukasz Ó Briain", ""))


@pytest.mark.parametrize(
    "text",
    [
        'id,name,email\ns1,"Doe, Jane",jane@uni.example\ns2,Łukasz Ó Briain,\n',
        '\ufeffid;name;email\r\ns1;Doe, Jane;jane@uni.example\r\n\r\ns2;Łukasz Ó Briain;\r\n',
        'Section\tEMAIL\tName\tID\tID 2\nA\tjane@uni.example\tDoe, Jane\t s1 \t9\nB\t\tŁukasz Ó Briain\ts2\t9\n',
        '"id","name","email","note"\n"s1","Doe, Jane","jane@uni.example","a\nnote"\n"s2","Łukasz Ó Briain"',
    ],
    ids=["plain", "BOM and semicolons", "tabs, other columns, another order", "quotes and missing cells"],
)
def test_the_same_roster_is_read_from_every_spreadsheet(written, text):
    written(text, "roster.csv")
    assert read_assignment(written(MINIMAL + 'roster = "roster.csv"')).roster == CLASS


@pytest.mark.parametrize(
    "text, fix",
    [
        ("", "line 1"),
        ("name,email\nJane,j@x\n", "line 1: no column is called id"),
        ("id,name,id\n1,J,2\n", "line 1: 2 columns"),
        ("id,name\n", "names no student"),
        ("id,name\ns1,J\n\n,K\n", "line 4: no id"),
        ("id,name\ns1,J\ns2,K\ns1,L\n", "line 4: the id s1 is in line 2"),
        ("id,name\ns\x001,J\n", "control characters"),
        ('id,name\n"s1,J\n', "no CSV"),
        ("id,name\ns1,Zoë\n".encode("latin-1"), "UTF-8"),
    ],
)
def test_a_bad_roster_gets_one_sentence_with_the_line(written, text, fix):
    path = written(text, "roster.csv")
    with pytest.raises(UserError) as caught:
        read_roster(path)
    assert str(path) in str(caught.value) and fix in str(caught.value)


def test_ids_that_differ_in_case_only_are_two_students(written):
    assert [student.id for student in read_roster(written("id\nann\nAnn\n", "roster.csv"))] == ["ann", "Ann"]


def test_the_command_in_the_example_names_the_example():
    assert str(EXAMPLE.relative_to(ROOT)).replace("\\", "/") in EXAMPLE.read_text()
