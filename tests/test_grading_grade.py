"""Properties of grading: what becomes of a submission, what is graded again, and that no fault loses, doubles or changes a record.

The judges are arithmetic, the source notebooks' solutions, a run that nothing disturbed, and the list of processes.
"""

import copy
import errno
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import types
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import psutil
import pytest
import torch
from filelock import FileLock

from labkit.__main__ import main
from labkit.errors import UserError
from labkit.exercises.exercise import all_exercises
from labkit.exercises.judging import CORRECT, NOT_ATTEMPTED, WRONG, AnswerKey
from labkit.grading import grade, isolation, sandbox, secret
from labkit.grading.grade import Grader, clear_unfinished, course_of, grade_all, job_of, ungraded
from labkit.grading.results import Override, read_record, read_records, record_path, write_record
from labkit.grading.sandbox import IsolatedWorker, Isolation, ZygoteLost, chosen_isolation
from labkit.grading.submissions import find_submissions
from labkit.paths import ROOT
from labkit.processes import course_environment
from labkit.student_copies import without_solutions
from labkit.submission.apart import Worker
from tests.grading_runs import (
    ASSIGNMENT,
    LORA,
    MATRICES,
    SECRET,
    SOLUTIONS,
    SOURCE,
    as_written,
    assert_nothing_left,
    cell,
    class_of,
    course,
    hand_in,
    jobs_of,
    needs_zygote,
    notebook,
    processes_of,
    quick_imports,
    records,
    run_first,
    wait_for,
)  # fmt: skip

CET = timezone(timedelta(hours=1))
TOML = 'name = "lora"\ntitle = "LoRA"\nnotebooks = ["04"]\n'


class Lent:
    """A zygote that many graders use, one after the other, and that none of them ends."""

    def __init__(self, zygote):
        self.start, self.stop = zygote.start, zygote.stop
        self.is_watching, self.taken_too_much = zygote.is_watching, zygote.taken_too_much

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass


@pytest.fixture(scope="module")
def released():
    """The LoRA lesson as a course of its own, with its released set-up cell."""
    needs_zygote()
    return course_of(ASSIGNMENT, SECRET, chosen_isolation())


@pytest.fixture(scope="module")
def zygote(released):
    with sandbox.Zygote(released.isolation, released.setups) as zygote:
        yield zygote


@pytest.fixture
def lent(zygote, monkeypatch):
    """Graders made in this test use the one zygote of this file."""
    monkeypatch.setattr(grade, "Zygote", lambda how, setups: Lent(zygote))


@pytest.fixture
def graded(released, lent, tmp_path):
    """notebook -> its record.   Further arguments: fields of the job, or `by`, another course."""

    def of(content, by=released, **changes):
        (submission,) = find_submissions(hand_in(tmp_path / "handed in", "ann", content), by.assignment)
        with Grader(by) as grader:
            return grader.grade(replace(job_of(submission, by), **changes))

    return of


def earned(record):
    return {verdict.exercise: verdict.earned for verdict in record.verdicts}


ALL = {"lora-layer": 5, "lora-count": 3, "lora-merge": 3, "lora-rank-needed": 4}


def test_the_lesson_with_its_solutions_gets_all_points(graded, released):
    record = graded(SOURCE)
    assert earned(record) == ALL == {exercise.id: exercise.points for _, exercise in ASSIGNMENT.exercises}
    assert record.total == 15 and record.out_of == 19 and record.unmarked == ["lora-question"] and record.problems == ()
    assert record.isolation == released.isolation.tier and record.release == ASSIGNMENT.release


def test_the_copy_that_students_get_is_not_attempted_and_gets_nothing(graded):
    record = graded(without_solutions(copy.deepcopy(SOURCE)))
    assert {verdict.status for verdict in record.verdicts} == {NOT_ATTEMPTED} and record.total == 0 and record.unmarked == []


@pytest.mark.parametrize("changed, said", [
    ({"lora-count": MATRICES}, "outputs by inputs"),
    ({"lora-merge": "def merged(weight, A, B, alpha):\n    return weight + alpha * (B @ A)"}, "the scaling is alpha / r"),
    ({"lora-count": "def count_lora(shapes, rank):\n    return 1 / 0"}, "ZeroDivisionError in line 2 of your cell"),
    ({"lora-count": "def count_lora(shapes, rank):\n    rank * 2"}, "is `return` missing"),
    ({"lora-count": "def count_lora(:\n"}, "SyntaxError in line 1"),
    ({"lora-merge": "merged = undefined"}, "NameError"),
    ({"lora-merge": "class Other: pass"}, "defines no function or class called merged"),
    ({"lora-count": None}, "its cell is missing"),
    ({"lora-count": "import os\nos._exit(0)"}, "stopped: the process ended"),
    ({"lora-count": "def count_lora(shapes, rank):\n    import os\n    os._exit(1)"}, "stopped: the process ended"),
])  # fmt: skip
def test_a_mistake_costs_its_exercise_and_no_other(graded, changed, said):
    (wrong,) = changed
    record = graded(notebook(changed))
    assert earned(record) == ALL | {wrong: 0}
    (verdict,) = [verdict for verdict in record.verdicts if verdict.exercise == wrong]
    assert verdict.status == WRONG and said in verdict.sentence


def test_a_recognised_mistake_is_named_in_the_record(graded):
    (verdict,) = [v for v in graded(notebook({"lora-count": MATRICES})).verdicts if v.exercise == "lora-count"]
    assert verdict.misconception in all_exercises()["lora-count"].misconceptions


def test_a_cell_that_runs_for_ever_costs_its_exercise_and_no_other(graded, monkeypatch):
    monkeypatch.setattr(grade, "LIMITS", replace(sandbox.LIMITS, cell_seconds=0.5))
    record = graded(notebook({"lora-count": "while True: pass"}))
    assert earned(record) == ALL | {"lora-count": 0} and "longer than" in next(v.sentence for v in record.verdicts if v.exercise == "lora-count")


def test_without_a_notebook_everything_is_there_and_counts_nothing(graded, tmp_path, released, lent):
    (tmp_path / "class" / "bob").mkdir(parents=True)
    (job,) = jobs_of(tmp_path / "class", released)
    with Grader(released) as grader:
        record = grader.grade(job)
    assert record.total == 0 and record.out_of == 19 and len(record.verdicts) == 4
    assert {v.status for v in record.verdicts} == {NOT_ATTEMPTED} and {v.sentence for v in record.verdicts} == {grade._NOTHING_THERE}
    full = {v.exercise: v.total for v in graded(SOURCE).verdicts}
    assert {v.exercise: v.total for v in record.verdicts} == full


@pytest.mark.parametrize("content", [b"", b"no notebook", b"\xff\xfe\x00", b'{"cells": 3}', b"[" * 100_000])
def test_what_is_no_notebook_is_said_and_graded_as_none(graded, content):
    record = graded(content)
    assert LORA in record.problems[0] and record.total == 0 and len(record.verdicts) == 4


def test_a_cell_that_is_there_twice_costs_its_exercise_and_no_other(graded):
    record = graded(notebook(after=[cell(MATRICES, "lora-count")]))
    assert earned(record) == ALL | {"lora-count": 0}
    assert "two cells" in next(v.sentence for v in record.verdicts if v.exercise == "lora-count")


def test_the_late_penalty_is_taken_off_the_points(released, lent, tmp_path):
    deadline = datetime(2026, 3, 27, 23, 59, tzinfo=CET)
    by = replace(released, assignment=replace(ASSIGNMENT, deadline=deadline, grace_minutes=30, penalty_per_day=0.1, most_penalty=0.25))
    (submission,) = find_submissions(hand_in(tmp_path, "ann", SOURCE), by.assignment)
    totals = {}
    with Grader(by) as grader:
        for late in (-1, 0, 30, 31, 24 * 60 + 1, 9 * 24 * 60):
            record = grader.grade(job_of(replace(submission, submitted=deadline + timedelta(minutes=late)), by))
            totals[late] = record.total
            assert record.late.minutes == max(0, late) and earned(record) == ALL
    assert totals == {-1: 15, 0: 15, 30: 15, 31: 13.5, 24 * 60 + 1: 12, 9 * 24 * 60: 11.25}


def test_the_written_answer_waits_for_a_mark(graded):
    (question,) = graded(notebook(answer="  Rank is *small*.\r\n<b>Yes</b>  ")).questions
    assert (question.question, question.points, question.earned) == ("lora-question", 4, None)
    assert question.answer == "Rank is *small*.\n<b>Yes</b>"


def test_the_assignment_says_what_counts_and_how_much(graded, released):
    points, left_out = {"lora-count": 7, "lora-question": 1}, ("lora-merge", "lora-layer")
    by = replace(released, assignment=replace(ASSIGNMENT, points=points, leave_out=left_out))
    record = graded(notebook({"lora-rank-needed": None}), by)
    assert earned(record) == {"lora-count": 7, "lora-rank-needed": 0} and record.out_of == 7 + 4 + 1 and record.total == 7


def numbers_in(text):
    return set(re.findall(r"\d+\.?\d*(?:e[+-]?\d+)?", text))


def hidden_numbers(value):
    """The numbers in an expected answer as `shown` would print them, without those that stand in every sentence anyway."""
    if isinstance(value, dict):
        return set().union(*map(hidden_numbers, value.values()))
    if isinstance(value, torch.Tensor):
        return {f"{abs(x):.{digits}f}" for x in value.double().flatten().tolist() for digits in (3, 4, 5)} | {
            repr(abs(x)) for x in value.flatten().tolist()}
    return {str(value)} if isinstance(value, (int, float)) and value > 60 else set()


WRONG_IN_A_NEW_WAY = {
    "lora-layer": "class LoRALinear(torch.nn.Module):\n    def __init__(self, weight, rank, alpha):\n        super().__init__()\n"
                  "        self.weight = torch.nn.Parameter(weight, requires_grad=False)\n"
                  "        self.A = torch.nn.Parameter(torch.ones(rank, weight.shape[1]))\n"
                  "        self.B = torch.nn.Parameter(torch.zeros(weight.shape[0], rank))\n"
                  "    def forward(self, x):\n        return 1.5 * x @ self.weight.T + x @ self.A.T @ self.B.T",
    "lora-count": "def count_lora(shapes, rank):\n    return sum(rank * (o + i) for o, i in shapes) + 7",
    "lora-merge": "def merged(weight, A, B, alpha):\n    return weight + 1.25 * alpha / len(A) * (B @ A)",
    "lora-rank-needed": "def rank_needed(update, share):\n    return 2",
}  # fmt: skip


def test_no_sentence_gives_a_hidden_expected_value_away(graded):
    record = graded(notebook(WRONG_IN_A_NEW_WAY))
    assert {v.status for v in record.verdicts} == {WRONG} and {v.misconception for v in record.verdicts} == {None}
    for verdict in record.verdicts:
        key = AnswerKey(all_exercises()[verdict.exercise], SECRET, hidden=True)
        hidden = set().union(*map(hidden_numbers, key.expected))
        assert len(hidden) > 10 or verdict.exercise in ("lora-count", "lora-rank-needed")
        said = numbers_in(verdict.sentence)
        assert len(said) >= 2 and not said & hidden, verdict.sentence
    count = AnswerKey(all_exercises()["lora-count"], SECRET, hidden=True).expected
    assert str(count[0] + 7) in numbers_in(record.verdicts[1].sentence)  # the student's own value is shown


def test_an_inherited_set_up_gives_the_same_verdicts_as_one_that_is_run(graded, released):
    (setup,) = released.setups
    changed = {"lora-count": MATRICES, "lora-rank-needed": "drawn = torch.rand(())\ndef rank_needed(update, share):\n    return drawn",
               "lora-merge": "def merged(weight, A, B, alpha):\n    return weight + len(stack) + torch.rand(())"}
    inherited, run = (graded(notebook(changed, setup=text)) for text in (setup, setup + "\n# as it was"))
    assert inherited.verdicts == run.verdicts and inherited.digest != run.digest
    assert [v.earned for v in run.verdicts] == [5, 0, 0, 0]
    assert "is 0." in run.verdicts[3].sentence  # its own value, drawn at random, is part of what is compared


def test_the_same_submission_gives_the_same_bytes(released, lent, tmp_path):
    class_of(tmp_path / "class", 8)
    jobs = jobs_of(tmp_path / "class", released)
    for name, jobs_in_some_order, lanes in (("one", jobs, 1), ("two", jobs[::-1], 1)):
        assert grade_all(jobs_in_some_order, released, tmp_path / name, lanes) == []
    assert records(tmp_path / "one") == records(tmp_path / "two") and len(records(tmp_path / "one")) == 8
    assert len({read_record(path).total for path in (tmp_path / "one" / "submissions").iterdir()}) > 1


def test_what_a_record_depends_on_is_graded_again_when_it_changes_and_nothing_else(released, lent, tmp_path):
    folder = hand_in(tmp_path / "class", "ann", notebook())
    (job,) = jobs_of(folder, released)
    assert ungraded([job], tmp_path) == [job]
    grade_all([job], released, tmp_path, 1)
    assert ungraded([job], tmp_path) == []

    def again(**changes):
        by = replace(released, assignment=replace(ASSIGNMENT, **changes))
        return ungraded(jobs_of(folder, by), tmp_path)

    assert not again(title="Another title") and not again(roster=())
    assert again(name="another") and again(points={"lora-count": 4}) and again(leave_out=("lora-count",)) and again(points={"lora-question": 3})
    assert ungraded(jobs_of(folder, replace(released, secret=SECRET + "!")), tmp_path)
    assert ungraded(jobs_of(folder, replace(released, isolation=Isolation(isolation.NONE))), tmp_path)
    hand_in(folder, "ann", notebook(after=[cell("print('a demo cell')")]))
    assert not ungraded(jobs_of(folder, released), tmp_path)
    hand_in(folder, "ann", notebook(answer="Another answer."))
    assert ungraded(jobs_of(folder, released), tmp_path)
    hand_in(folder, "ann", notebook({"lora-count": SOLUTIONS["lora-count"] + "\n# more"}))
    assert ungraded(jobs_of(folder, released), tmp_path)


def test_marks_and_overrides_survive_a_regrade(released, lent, tmp_path):
    folder = hand_in(tmp_path / "class", "ann", notebook({"lora-count": MATRICES}))
    grade_all(jobs_of(folder, released), released, tmp_path, 1)
    (record,) = read_records(tmp_path)
    (question,) = record.questions
    by_hand = (Override("lora-count", 2.5, "right in spirit", "me"),)
    write_record(tmp_path, replace(record, questions=(replace(question, earned=3, comment="good"),), overrides=by_hand))
    before = records(tmp_path)
    grade_all(jobs_of(folder, released), released, tmp_path, 1)
    assert records(tmp_path) == before
    hand_in(folder, "ann", notebook({"lora-merge": None}))
    grade_all(jobs_of(folder, released), released, tmp_path, 1)
    (record,) = read_records(tmp_path)
    assert record.overrides == by_hand and record.questions[0].earned == 3 and record.total == 5 + 2.5 + 0 + 4 + 3
    hand_in(folder, "ann", notebook(answer="Something else."))
    grade_all(jobs_of(folder, released), released, tmp_path, 1)
    (record,) = read_records(tmp_path)
    assert record.questions[0].earned is None and "3 of 4" in record.questions[0].comment and record.overrides == by_hand


@pytest.mark.parametrize("damaged", [b"", b"{", b"\x00\xff", b"[]", b"null", b'{"student": "ann"}', None], ids=repr)
def test_a_damaged_record_is_made_again(released, lent, tmp_path, damaged):
    jobs = jobs_of(class_of(tmp_path / "class", 2), released)
    grade_all(jobs, released, tmp_path, 1)
    whole = records(tmp_path)
    path = record_path(tmp_path, jobs[1].student)
    path.write_bytes(whole[path.name][:-300] if damaged is None else damaged)
    assert ungraded(jobs, tmp_path) == jobs[1:]
    grade_all(ungraded(jobs, tmp_path), released, tmp_path, 1)
    assert records(tmp_path) == whole


COUNT = SOLUTIONS["lora-count"]
WORKING = COUNT.replace("    return", "    {}\n    return")
HARMLESS = {
    "a check at the end": COUNT + "\nfrom labkit import check\nassert check(count_lora)",
    "a receipt at the end": COUNT + f"\nfrom labkit import receipt, trusted\nreceipt('{LORA}.ipynb')\ntrusted(count_lora, otherwise=print)",
    "prints": "print('hello\\n' * 20_000)\n" + WORKING.format("print(shapes, rank)"),
    "words on standard error": "import sys\nsys.stderr.write('x' * 300_000)\nprint('\\x1b[2J', flush=True)\n" + COUNT,
    "warnings": "import warnings\nwarnings.warn('careful')\n" + WORKING.format("import warnings; warnings.warn('old', DeprecationWarning)"),
    "plots": "import matplotlib.pyplot as plt\nplt.plot([1, 2]); plt.savefig('x.png'); plt.show(); display(plt.gcf())\n" + COUNT,
    "magics": "%matplotlib inline\n!pip list\n%time\n?print\ncount_lora?\n" + COUNT,
    "the log and a file": "import logging\nlogging.warning('x')\nopen('notes.txt', 'w').write('x')\n" + COUNT,
    "a thread": "import threading, time\nthread = threading.Thread(target=time.sleep, args=(0.05,))\nthread.start()\n" + COUNT + "\nthread.join()",
    "slow imports": "import scipy.optimize, PIL.Image, transformers, peft\n" + COUNT,
    "a progress bar": "from tqdm.auto import tqdm\n" + COUNT.replace("in shapes", "in tqdm(shapes)"),
    "other names": "Größe = sum\ncount_lora = lambda shapes, rank: Größe(rank * (o + i) for o, i in shapes)",
    "a tensor instead of a number": "def count_lora(shapes, rank):\n    return torch.tensor(shapes).sum() * rank",
    "a dataclass and annotations": "from __future__ import annotations\nfrom dataclasses import dataclass\n\n@dataclass\nclass Shape:\n"
                                   "    outputs: int\n    inputs: int\n\n" + COUNT,
    "random numbers of its own": "import random, numpy\nrandom.seed(1); numpy.random.seed(2); torch.manual_seed(3)\n" + COUNT,
}  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
def test_no_correct_submission_loses_a_point_for(graded, name):
    record = graded(notebook({"lora-count": HARMLESS[name]}))
    assert earned(record) == ALL, [v for v in record.verdicts if v.status != CORRECT]


@pytest.mark.parametrize("setup", ["%matplotlib inline\nimport torch\n!ls", "import torch\nfrom labkit import *", "import torch\nprint('x')\n1 / 0"])
def test_no_correct_submission_loses_a_point_for_another_set_up(graded, setup):
    assert earned(graded(notebook(setup=setup))) == ALL


def test_exercises_that_were_moved_can_use_what_stands_above_them(graded):
    moved = notebook({"lora-count": COUNT + "\nclass Base(torch.nn.Module): pass",
                      "lora-layer": SOLUTIONS["lora-layer"].replace("torch.nn.Module", "Base")})  # fmt: skip
    moved["cells"].insert(1, moved["cells"].pop(2))
    assert earned(graded(moved)) == ALL


def test_further_cells_are_not_run_and_cost_nothing(graded):
    further = [cell("count_lora = None\n1 / 0"), cell("# text", kind="markdown"), cell("raise SystemExit"), cell("def f(:")]
    assert earned(graded(notebook(before=further, after=further))) == ALL


def test_the_order_of_the_cells_costs_nothing(graded):
    mixed = notebook(before=[cell("x = 1")])
    for seed in range(3):
        random.Random(seed).shuffle(mixed["cells"])
        assert earned(graded(mixed)) == ALL
    windows = notebook()
    for one in windows["cells"]:
        one["source"] = one["source"].replace("\n", "\r\n").splitlines(True)
    assert earned(graded(windows)) == ALL


def test_names_that_are_hard_on_file_systems_are_kept_apart(released, lent, tmp_path):
    (job,) = jobs_of(hand_in(tmp_path / "class", "ann", notebook({"lora-count": None})), released)
    names = ["ann", "Ann", "e\u0301lise", "\u00e9lise", "a/b", "a\\b", "..", "con", "x" * 300, "x" * 299 + "y", " ann", "a:b", "\ud800"]
    jobs = [replace(job, student=name) for name in names]
    assert grade_all(jobs, released, tmp_path / "out", 1) == []
    assert sorted(record.student.encode("utf-8", "surrogatepass") for record in read_records(tmp_path / "out")) == sorted(
        name.encode("utf-8", "surrogatepass") for name in names)
    assert ungraded(jobs, tmp_path / "out") == [] and len({path.casefold() for path in records(tmp_path / "out")}) == len(names)
    assert {path.parent for path in tmp_path.rglob("*.json")} == {tmp_path / "out" / "submissions", tmp_path / "out" / "times"}


@pytest.fixture
def grades(tmp_path, monkeypatch, capsys):
    """Run the command in this process: arguments -> (exit code, what it printed).   The folder has an assignment and a secret."""
    (tmp_path / "lora.toml").write_text(TOML)
    (tmp_path / "secret").write_text(SECRET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LABKIT_NO_INSTALL", "1")

    def run(*arguments, assignment="lora.toml"):
        code = main(["grade", "--secret", "secret", "--assignment", assignment, "--lanes", "1", *arguments])
        printed = capsys.readouterr()
        return code, printed.out + (printed.err if code == 2 else "")

    return run


def test_the_command_grades_once_and_writes_everything(grades, lent, tmp_path):
    class_of(tmp_path / "class", 4)
    code, said = grades("class", "--out", "out")
    assert code == 0 and "4 submissions, 0 graded already" in said and "4 records in out" in said
    written = {str(path.relative_to("out")): path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    assert {"grades.csv", "questions.csv", "questions.html", "report/index.html", "feedback/student00.html"} <= set(written)
    assert SECRET not in "".join(content.decode(errors="replace") for content in written.values())
    code, said = grades("class", "--out", "out", "--no-feedback")
    assert code == 0 and "4 graded already" in said
    assert {name: Path("out", name).read_bytes() for name in written} == written


def test_one_student_is_graded_again_alone_and_fresh_grades_all(grades, lent, tmp_path):
    class_of(tmp_path / "class", 3)
    grades("class", "--out", "out", "--no-feedback")
    before = {name: (Path("out/submissions", name).stat().st_mtime_ns, content) for name, content in records(Path("out")).items()}

    def changed():
        after = {name: (Path("out/submissions", name).stat().st_mtime_ns, content) for name, content in records(Path("out")).items()}
        assert {name: content for name, (_, content) in after.items()} == {name: content for name, (_, content) in before.items()}
        return {name for name in before if after[name] != before[name]}

    assert grades("class", "--out", "out", "--no-feedback", "--student", "student01")[0] == 0
    assert changed() == {"student01.json"}
    assert grades("class", "--out", "out", "--no-feedback", "--fresh")[0] == 0
    assert changed() == set(before)


def test_a_dry_run_gives_the_solutions_of_all_notebooks_full_points_and_leaves_the_class_alone(grades, lent, tmp_path):
    class_of(tmp_path / "class", 2)
    grades("class", "--out", "out", "--no-feedback")
    before = records(Path("out"))
    for name, notebooks in (("lora.toml", 1), ("two.toml", 2)):
        if notebooks == 2:
            (tmp_path / "two.toml").write_text('name = "two"\nnotebooks = ["03", "04"]\nroster = "roster.csv"\n')
            (tmp_path / "roster.csv").write_text("id,name\ns1,Jane Doe\n")
        code, said = grades("--dry-run", "--out", "out", "--no-feedback", assignment=name)
        assert code == 0 and "every exercise got all its points" in said, said
        (record,) = read_records(Path("out/dry-run"))
        assert len(record.files) == notebooks
    assert records(Path("out")) == before


def test_a_dry_run_says_which_solution_is_short_of_points(grades, lent, tmp_path, monkeypatch):
    monkeypatch.setitem(type(all_exercises()["lora-count"]).__dict__["misconceptions"], "Never.", print)
    monkeypatch.setattr(type(all_exercises()["lora-count"]), "expected", lambda self, case: -1)
    code, said = grades("--dry-run", "--out", "out", "--no-feedback")
    assert code == 1 and "lora-count: " in said and "lora-merge: " not in said


def test_marks_that_lie_in_the_results_are_merged(grades, lent, tmp_path):
    class_of(tmp_path / "class", 2)
    grades("class", "--out", "out", "--no-feedback")
    Path("out/marks.csv").write_text("student,question,points,comment,marker\nstudent00,lora-question,3.5,good,\n")
    Path("out/overrides.csv").write_text("student,item,points,reason,by\nstudent01,lora-count,1,nearly,me\n")
    assert grades("class", "--out", "out", "--no-feedback")[0] == 0
    totals = {record.student: record.total for record in read_records(Path("out"))}
    assert totals == {"student00": 18.5, "student01": 13}
    before = records(Path("out"))
    assert grades("class", "--out", "out", "--no-feedback", "--fresh")[0] == 0
    assert records(Path("out")) == before


@pytest.mark.parametrize("arguments, said", [
    (["--out", "out"], "name the submissions"),
    (["class", "--dry-run", "--out", "out"], "name the submissions"),
    (["class"], "--out RESULTS"),
    (["class", "--out", "out", "--lanes", "0"], "at least 1"),
    (["nowhere", "--out", "out"], "nowhere does not exist"),
    (["empty", "--out", "out"], "holds no submission"),
    (["class", "--out", "lora.toml"], "lora.toml is a file"),
    (["class", "--out", "lora.toml/out"], "lora.toml/out cannot be written"),
    (["class", "--out", "/proc/nowhere"], "/proc/nowhere cannot be written"),
    (["class", "--out", "class/out"], "class/out lies in class"),
    (["class", "--out", "class"], "class lies in class"),
    (["class", "--out", "out", "--isolation", "strong"], "'strong' is no tier of isolation: name one of full, no-namespaces, container, none"),
    (["class", "--out", "out", "--student", "nobody"], "'nobody' handed in nothing here: the students are a [31mb, student00"),
    (["class", "--out", "out", "--secret", "nowhere"], "nowhere cannot be read"),
    (["class", "--out", "out", "--secret", "short"], "at least 16"),
    (["class", "--out", "out", "--secret", str(ROOT / "LICENSE")], "where students may get to see it"),
    (["class", "--out", "out", "--assignment", "nowhere.toml"], "nowhere.toml does not exist"),
    (["class", "--out", "out", "--scheduler", "tcp://127.0.0.1:1"], "tcp://127.0.0.1:1 is no scheduler that answers"),
])  # fmt: skip
def test_what_cannot_be_meant_is_said_in_one_sentence_and_makes_no_record(grades, tmp_path, monkeypatch, arguments, said):
    monkeypatch.setattr("labkit.grading.cluster._SECONDS_TO_CONNECT", 0.2)
    class_of(tmp_path / "class", 1)
    hand_in(tmp_path / "class", "a\x1b[31mb", notebook())
    (tmp_path / "empty").mkdir()
    (tmp_path / "short").write_text("too short")
    before = sorted(path for path in tmp_path.rglob("*"))
    code, printed = grades(*arguments)
    (sentence,) = [line for line in printed.splitlines() if line.startswith("labkit: ")]
    assert code == 2 and said in sentence and sentence.endswith(".") and "\x1b" not in printed and "Traceback" not in printed
    assert set(tmp_path.rglob("*")) - set(before) <= {tmp_path / "out", tmp_path / "out" / ".lock"}


def test_a_second_run_into_the_same_folder_is_refused_while_the_first_one_writes(grades, lent, tmp_path):
    class_of(tmp_path / "class", 1)
    Path("out").mkdir()
    with FileLock("out/.lock"):
        code, said = grades("class", "--out", "out")
    assert code == 2 and "out is being written by another `grade`" in said and os.listdir("out") == [".lock"]
    assert grades("class", "--out", "out", "--no-feedback")[0] == 0


def test_the_secret_is_made_once_and_kept_from_others(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    first, made = secret.read_secret()
    assert made and len(first) == 64 and secret.read_secret() == (first, False)
    assert secret.secret_path().stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "other"))
    assert secret.read_secret()[0] != first


def test_a_full_disk_leaves_no_half_of_a_secret(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(secret.secrets, "token_hex", full_disk)
        with pytest.raises(UserError, match="No space left"):
            secret.read_secret()
    assert secret.read_secret()[1] is True


def full_disk(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT], ids=["full", "read-only", "quota"])
def test_a_disk_that_takes_no_more_is_said_in_one_sentence_and_the_next_run_completes(grades, lent, tmp_path, monkeypatch, code):
    class_of(tmp_path / "class", 5)
    grades("class", "--out", "whole", "--no-feedback")
    written, sync = [], os.fsync

    def fsync(file):
        if len(written) >= 5:
            raise OSError(code, os.strerror(code))
        written.append(file)
        sync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        ended, said = grades("class", "--out", "out", "--no-feedback")
    (sentence,) = [line for line in said.splitlines() if line.startswith("labkit: ")]
    assert ended == 2 and f"cannot be written ({os.strerror(code)}): make room" in sentence and "Traceback" not in said
    kept = records(Path("out"))
    assert kept and kept.items() < records(Path("whole")).items()
    code, said = grades("class", "--out", "out", "--no-feedback")
    assert code == 0 and f"{len(kept)} graded already" in said and records(Path("out")) == records(Path("whole"))
    assert Path("out/grades.csv").read_bytes() == Path("whole/grades.csv").read_bytes()


def test_results_in_a_read_only_folder_stay_as_they_are(grades, lent, tmp_path):
    class_of(tmp_path / "class", 3)
    grades("class", "--out", "out", "--no-feedback")
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    script = (f"mount --bind out out && mount -o remount,ro,bind out && exec {sys.executable} -P -m labkit grade class --out out --no-feedback "
              "--fresh --assignment lora.toml --secret secret")
    tried = subprocess.run(["unshare", "--mount", "sh", "-c", "mount --bind out out"], capture_output=True)
    if tried.returncode:
        pytest.skip(f"nothing can be mounted here: {tried.stderr.decode().strip()}")
    done = subprocess.run(["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, env=course_environment())
    assert done.returncode == 2 and "Read-only file system" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()} == before


def test_a_clock_that_jumps_changes_nothing(grades, lent, tmp_path, monkeypatch):
    class_of(tmp_path / "class", 4)
    grades("class", "--out", "out", "--no-feedback")
    rng, now = random.Random(0), time.time

    class Jumping(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.fromtimestamp(rng.uniform(0, 4e9), tz)

    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: now() + rng.uniform(-3e8, 3e8))
        patch.setattr("datetime.datetime", Jumping)
        assert grades("class", "--out", "jumped", "--no-feedback")[0] == 0
    assert records(Path("jumped")) == records(Path("out"))
    assert Path("jumped/grades.csv").read_bytes() == Path("out/grades.csv").read_bytes()


def test_an_interrupt_stops_the_run_at_once_and_the_next_one_goes_on(released, lent, tmp_path):
    jobs = jobs_of(class_of(tmp_path / "class", 5), released)
    seen = []

    def interrupted(record):
        seen.append(record.student)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grade_all(jobs, released, tmp_path / "out", 1, interrupted)
    assert {path.stem for path in (tmp_path / "out" / "submissions").iterdir()} == set(seen)
    todo = ungraded(jobs, tmp_path / "out")
    assert len(todo) == 3 and not {job.student for job in todo} & set(seen)
    grade_all(todo, released, tmp_path / "out", 1)
    grade_all(jobs, released, tmp_path / "whole", 1)
    assert records(tmp_path / "out") == records(tmp_path / "whole")


def test_what_cannot_be_graded_is_said_for_its_student_alone(released, lent, tmp_path, monkeypatch):
    jobs = jobs_of(class_of(tmp_path / "class", 3), released)
    by_itself = Grader.grade
    monkeypatch.setattr(Grader, "grade", lambda self, job: 1 / 0 if job.student == "student01" else by_itself(self, job))
    (sentence,) = grade_all(jobs, released, tmp_path, 1)
    assert sentence.startswith("student01 could not be graded (ZeroDivisionError")
    assert [job.student for job in ungraded(jobs, tmp_path)] == ["student01"]


def test_only_unfinished_files_are_cleared(tmp_path):
    kept = ["submissions/ann.json", "submissions/.ann.json", "grades.csv", ".lock", "submissions/x.unfinished"]
    begun = ["submissions/.ann.json.123.unfinished", ".grades.csv.4.unfinished", "feedback/.a.html.5.unfinished"]
    for name in kept + begun:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    clear_unfinished(tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept)


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """Zygotes of this test start quickly; at its end none may be left, nor a file of theirs.   Returns the folder of temporary files."""
    needs_zygote()
    place = quick_imports(monkeypatch, tmp_path)
    yield place
    assert_nothing_left(place)


def at_cell(monkeypatch, name, do):
    """Call do(worker) whenever a worker is about to run the cell of this exercise."""
    run = IsolatedWorker.run

    def disturbed(self, cell, *arguments):
        if cell == name:
            do(self)
        return run(self, cell, *arguments)

    monkeypatch.setattr(IsolatedWorker, "run", disturbed)


def family(worker):
    """The processes of a worker's zygote, the oldest first: what started it, the zygote itself (in the strongest tier another), the worker."""
    oldest = psutil.Process(worker.zygote.process.pid)
    return sorted([oldest, *oldest.children(recursive=True)], key=lambda process: process.pid)


KILLED = {
    "what started the zygote": lambda worker: family(worker)[0].kill(),
    "the zygote": lambda worker: family(worker)[-2].kill(),
    "all of its processes": lambda worker: [process.kill() for process in family(worker)],
    "a zygote that is stopped and does not answer": lambda worker: family(worker)[-2].suspend(),
    "the worker": lambda worker: family(worker)[-1].kill(),
}  # fmt: skip


def test_a_process_that_is_lost_in_the_middle_costs_nobody_anything(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "_REPLY_SECONDS", 2.0)
    by, armed, started = course(), [], []
    jobs = jobs_of(class_of(tmp_path / "class", 2), by)
    start = grade.Zygote.__enter__
    monkeypatch.setattr(grade.Zygote, "__enter__", lambda self: (started.append(self), start(self))[1])
    at_cell(monkeypatch, "lora-merge", lambda worker: armed and armed.pop()(worker))
    with Grader(by) as grader:
        whole = [as_written(tmp_path, grader.grade(job)) for job in jobs]
        for what, kill in KILLED.items():
            before = len(started)
            armed.append(kill)
            assert [as_written(tmp_path, grader.grade(job)) for job in jobs] == whole, what
            assert not armed and len(started) == before + (what != "the worker"), what
            alive = family(IsolatedWorker(sandbox.LIMITS, started[-1]))
            wait_for(lambda alive=alive: set(processes_of(quick)) <= set(alive))


def test_a_zygote_that_one_submission_takes_along_every_time_keeps_it_from_nobody_else(quick, tmp_path, monkeypatch):
    by = course()
    jobs = jobs_of(class_of(tmp_path / "class", 3), by)
    grade_all(jobs, by, tmp_path / "whole", 1)
    evil = jobs[1].cells[LORA].exercises["lora-count"]
    run = IsolatedWorker.run
    monkeypatch.setattr(IsolatedWorker, "run", lambda self, name, source, *more: (
        [process.kill() for process in family(self) if source == evil], run(self, name, source, *more))[1])
    (sentence,) = grade_all(jobs, by, tmp_path / "out", 1)
    assert sentence.startswith("student01 could not be graded (ZygoteLost") and sentence.endswith("run the command again.")
    whole, out = records(tmp_path / "whole"), records(tmp_path / "out")
    assert whole.pop("student01.json") and out == whole


@pytest.mark.parametrize("written, said", [("sys.modules['scipy.stats'] = None", "scipy.stats"), ("import time; time.sleep(1000)", "timed out")])
def test_a_zygote_that_does_not_start_is_said_in_one_sentence(quick, grades, tmp_path, monkeypatch, written, said):
    monkeypatch.setattr(sandbox, "_READY_SECONDS", 4.0)
    run_first(tmp_path, f"    {written}\n")
    class_of(tmp_path / "class", 1)
    code, printed = grades("class", "--out", "out")
    (sentence,) = [line for line in printed.splitlines() if line.startswith("labkit: ")]
    assert code == 2 and "no student's code can be run here" in sentence and said in sentence and "labkit doctor" in sentence
    assert not records_or_none(Path("out"))


def records_or_none(out):
    return records(out) if (out / "submissions").is_dir() else {}


def test_a_notebook_that_hangs_does_not_hold_up_an_interrupt(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(grade, "LIMITS", replace(sandbox.LIMITS, cell_seconds=3600, notebook_seconds=3600))
    by, ended = course(), []
    hand_in(class_of(tmp_path / "class", 1), "a hanging one", notebook({"lora-layer": "while True: pass"}))

    def interrupt(record):
        raise KeyboardInterrupt

    def run():
        with pytest.raises(KeyboardInterrupt):
            grade_all(jobs_of(tmp_path / "class", by), by, tmp_path / "out", 2, interrupt)
        ended.append(True)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    wait_for(lambda: ended)
    assert list(records(tmp_path / "out")) == ["student00.json"]


def test_where_workers_must_be_isolated_none_is_ever_started_without(released, monkeypatch):
    nothing = types.SimpleNamespace(start=None, stop=None, is_watching=False, taken_too_much=None)
    monkeypatch.setattr(grade, "Zygote", lambda how, setups: Lent(nothing))
    monkeypatch.setattr(Worker, "start", lambda self: pytest.fail("a plain process was started"))
    with Grader(released) as grader:
        lane = grader._free.get()
        make = lane._workers([])
    assert isinstance(make(sandbox.LIMITS), IsolatedWorker)
    with pytest.raises(ZygoteLost):
        lane.examine(None, [], None)


# In the command's own process: the disk takes the n-th file, and then the process is killed before the file has its name.
_KILL_AT = """
import os, signal
left, sync = [int(os.environ.get("KILLED_AT", 0))], os.fsync
def fsync(file):
    sync(file)
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
os.fsync = fsync
"""


def test_a_command_that_is_killed_again_and_again_loses_and_doubles_nothing(quick, tmp_path, monkeypatch):
    count, rng = 8, random.Random(6)
    by = course_of(ASSIGNMENT, SECRET, chosen_isolation())
    class_of(tmp_path / "class", count)
    assert grade_all(jobs_of(tmp_path / "class", by), by, tmp_path / "whole", 2) == []
    (tmp_path / "lora.toml").write_text(TOML)
    (tmp_path / "secret").write_text(SECRET)
    run_first(tmp_path, _KILL_AT)
    out = tmp_path / "out"

    def started(killed_at=0):
        return subprocess.Popen(
            [sys.executable, "-m", "labkit", "grade", "class", "--out", "out", "--assignment", "lora.toml", "--secret", "secret", "--lanes", "1",
             "--no-feedback"], cwd=tmp_path, env=course_environment() | {"LABKIT_NO_INSTALL": "1", "KILLED_AT": str(killed_at)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def kept():
        return records_or_none(out).items() <= records(tmp_path / "whole").items()

    process = started()
    wait_for(lambda: processes_of(quick))
    time.sleep(rng.uniform(0, 1))
    process.kill()
    assert process.wait() == -signal.SIGKILL and kept()
    left = []
    for _ in range(2):
        process = started(killed_at=rng.randrange(2, 7))
        assert process.wait(300) == -signal.SIGKILL, process.stdout.read()
        assert_nothing_left(quick)
        left += out.rglob(".*.unfinished")
        assert records_or_none(out)
    assert left and {path.name for path in left} - set(records(out))
    process, before = started(), len(records(out))
    wait_for(lambda: len([path for path in (out / "submissions").glob("*.json")]) > before)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 130 and "Traceback" not in said
    assert_nothing_left(quick)
    assert before < len(records(out)) < count
    process = started()
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and f"{count} records" in said, said
    assert records(out) == records(tmp_path / "whole") and not list(out.rglob("*.unfinished"))
    rows = (out / "grades.csv").read_text(encoding="utf-8-sig").splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == [f"student{number:02}" for number in range(count)]
