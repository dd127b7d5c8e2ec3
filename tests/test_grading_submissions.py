"""Properties of finding and reading what students handed in: every form of an export, and every kind of file that is not what it says.

The judges are files and zips made here, nbformat, nbgrader's own times, and zip headers written by hand.
"""

import io
import json
import os
import pickle
import stat
import struct
import tracemalloc
import unicodedata
import zipfile
import zlib
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import nbformat
import pytest
import yaml

from labkit.errors import UserError
from labkit.grading import archives, submissions
from labkit.grading.archives import MIB, list_files
from labkit.grading.assignment import Assignment, PerformanceTask, Student
from labkit.grading.lms import Roster, claim_of
from labkit.grading.results import file_name
from labkit.grading.submissions import LONGEST_ANSWER, find_submissions, read_answer, read_notebook
from labkit.paths import NOTEBOOKS
from labkit.student_copies import without_solutions
from labkit.submission.cells import MAX_NOTEBOOK, cells_of

LORA, QLORA = "04_lora_parameter_counting", "05_qlora"
CET = timezone(timedelta(hours=1))
ASSIGNMENT = Assignment("week-11", "Week 11", (LORA, QLORA), deadline=datetime(2026, 3, 27, 23, 59, tzinfo=CET))
CLASS = replace(ASSIGNMENT, roster=(
    Student("s1", "Jane Doe", "jane.doe@uni.example"), Student("s2", "Zoë Ångström", "zoe@uni.example"),
    Student("12345", "Bob Lee", "bob@uni.example"),
))  # fmt: skip


def notebook(*ids, says="", **metadata):
    """A small notebook with a cell for each exercise, as bytes.   says: in every cell, to tell one notebook from another."""
    metadata = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}} | metadata
    cells = [
        {"cell_type": "code", "id": id, "execution_count": None, "outputs": [], "source": f"# {says}\n",
         "metadata": {"nbgrader": {"grade_id": id, "schema_version": 3, "solution": True, "grade": False, "locked": False, "task": False}}}
        for id in ids
    ]  # fmt: skip
    return json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": metadata, "cells": cells}).encode()


def lora(says="", **metadata):
    return notebook("lora-layer", "lora-count", says=says, **metadata)


def qlora(says="", **metadata):
    return notebook("qlora-levels", says=says, **metadata)


def folder_of(root, files):
    """name -> content (None: a folder), written under root."""
    for name, content in files.items():
        path = root / name
        if content is None:
            path.mkdir(parents=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return root


def zip_of(files, compression=zipfile.ZIP_DEFLATED):
    """The bytes of a zip.   files: name or ZipInfo -> content, or pairs of them; None: a folder."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in files.items() if isinstance(files, dict) else files:
            archive.writestr(f"{name}/" if content is None else name, content or b"")
    return stream.getvalue()


def says(submission, lesson=LORA):
    """What stands in the notebook that counts."""
    return read_notebook(submission.notebooks[lesson])["cells"][0]["source"].strip("# \n")


def found(path, assignment=ASSIGNMENT):
    """student -> submission."""
    submissions = find_submissions(path, assignment)
    assert len({submission.student for submission in submissions}) == len(submissions)
    return {submission.student: submission for submission in submissions}


@pytest.fixture(params=["folder", "zip", "zip with a folder around it"])
def given(request, tmp_path):
    """files -> the path of an export that holds them: a folder, a zip, or a zip that has everything in one more folder."""

    def write(files, name="export"):
        if request.param == "folder":
            return folder_of(tmp_path / name, files)
        around = f"{name}/" if "around" in request.param else ""
        path = tmp_path / f"{name}.zip"
        path.write_bytes(zip_of({around + inside: content for inside, content in files.items()}))
        return path

    return write



def test_a_folder_for_each_student(given):
    students = found(given({"ann/a.ipynb": lora("ann"), "ben/deep/er/b.ipynb": qlora("ben"), "cleo": None, "notes.txt": b"mine"}))
    assert set(students) == {"ann", "ben", "cleo"}
    assert says(students["ann"]) == "ann" and says(students["ben"], QLORA) == "ben" and students["cleo"].notebooks == {}
    assert students["cleo"].problems == ("No notebook of this assignment was found.",)
    assert all(submission.submitted is None for submission in students.values())


def test_canvas(given):
    export = given({
        f"doejane_12_501_{LORA}.ipynb": lora("first"), f"doejane_LATE_12_502_{LORA}-1.ipynb": lora("second"),
        "leebob_12345_600_qlora.ipynb": qlora(), "leebob_12345_601_lora.ipynb": lora(), "anon_x1Y2z_800_a.ipynb": lora("nobody"),
        "ångströmzoë_LATE_77_700_hw.zip": zip_of({"x/y.ipynb": lora()}),
    })  # fmt: skip
    plain, known = found(export), found(export, CLASS)
    assert set(plain) == {"doejane_12", "leebob_12345", "ångströmzoë_77", "anon_x1Y2z"}
    assert set(known) == {"s1", "12345", "s2", "anon_x1Y2z"}
    (older,) = known["s1"].set_aside
    assert says(known["s1"]) == "second" and older.endswith(f"doejane_12_501_{LORA}.ipynb")
    assert any("marked as late" in problem for problem in known["s1"].problems) and known["s1"].submitted is None
    assert set(known["12345"].notebooks) == {LORA, QLORA} and known["12345"].problems == ()


def test_canvas_resubmissions_with_one_upload_number_are_told_apart_by_the_copy(given):
    files = {f"doejane_12_500_lora{copy}.ipynb": lora(copy) for copy in ("-2", "", "-10", "-1")}
    assert says(found(given(files))["doejane_12"]) == "-10"


@pytest.mark.parametrize("between", ["/", ""], ids=["folders", "files"])
def test_moodle(given, between):
    export = given({
        f"Jane Doe_12345_assignsubmission_file_{between}a.ipynb": lora("jane"),
        f"Zoë  Ångström_9_assignsubmission_file_{between}a.ipynb": lora("zoë"),
        f"Bob Lee_10_assignsubmission_file_{between}work.zip": zip_of({"a.ipynb": lora("bob")}),
    })  # fmt: skip
    assert set(found(export)) == {"Jane Doe_12345", "Zoë  Ångström_9", "Bob Lee_10"}
    # Moodle's number is its own: 12345 is not Bob.
    assert {student: says(submission) for student, submission in found(export, CLASS).items()} == {"s1": "jane", "s2": "zoë", "12345": "bob"}


@pytest.mark.parametrize("between", ["/", " - "], ids=["folders", "files"])
def test_brightspace(given, between):
    export = given({
        f"27-44 - Jane Doe - Dec 5, 2024 1149 PM{between}a.ipynb": lora("later"),
        f"27-44 - Jane Doe - Dec 5, 2024 1206 PM{between}a.ipynb": lora("earlier"),
        f"28-44 - Anne-Marie Roux - Mar 27, 2026 12:30 AM{between}hw - 1.ipynb": lora(), "index.html": b"<html>",
        f"29-44 - Bob Lee - 5 décembre 2024 1149{between}b.ipynb": lora(),
    })  # fmt: skip
    students = found(export)
    assert set(students) == {"Jane Doe_27", "Anne-Marie Roux_28", "Bob Lee_29"}
    assert says(students["Jane Doe_27"]) == "later" and students["Jane Doe_27"].submitted == datetime(2024, 12, 5, 23, 49, tzinfo=CET)
    assert students["Anne-Marie Roux_28"].submitted == datetime(2026, 3, 27, 0, 30, tzinfo=CET)
    assert students["Bob Lee_29"].submitted is None


def test_blackboard(given):
    students = found(given({
        "Lab 11_jane_attempt_2026-03-27-20-00-05_a.ipynb": lora("old"), "Lab 11_jane_attempt_2026-03-28-20-00-05_a.ipynb": lora("new"),
        "Lab 11_jane_attempt_2026-03-28-20-00-05.txt": b"comments",
    }))  # fmt: skip
    assert says(students["jane"]) == "new" and students["jane"].submitted == datetime(2026, 3, 28, 20, 0, 5, tzinfo=CET)


def metadata_of(submissions):
    """Gradescope's list, as Ruby writes it: keys with a colon, tags of its own."""
    return "---\n" + "".join(
        f"{folder}:\n  :submitters:\n" + "".join(f"  - :name: {name}\n    :sid: {sid}\n    :email: {email}\n" for name, sid, email in who)
        + f"  :created_at: {created}\n  :score: 0.0\n  :results: !ruby/hash:ActiveSupport::HashWithIndifferentAccess\n    tests: []\n"
        for folder, (who, created) in submissions.items()
    )  # fmt: skip


def test_gradescope_with_a_group(given):
    export = given({
        "assignment_7_export/submission_metadata.yml": metadata_of({
            "submission_1": ([("Jane Doe", "'s1'", "j@x.org"), ("Bob Lee", 12345, "''")], "2026-03-28 04:15:06.519018000 Z"),
            "submission_2": ([("Zoë Ångström", "", "zoe@uni.example")], "2026-03-27 10:00:00.000000000 -07:00"),
            "submission_3": ([("'Doe/Jane'", "", "")], "2026-03-27 10:00:00"),
        }).encode(),
        "assignment_7_export/submission_1/a.ipynb": lora("group"), "assignment_7_export/submission_2/a.ipynb": lora("zoë"),
        "assignment_7_export/submission_3": None,
    })  # fmt: skip
    for students, zoë in ((found(export), "zoe@uni.example"), (found(export, CLASS), "s2")):
        # Somebody else of Jane's name has no number: not the same student.
        assert {"s1", "12345", zoë, "Doe/Jane"} == set(students)
        assert says(students["12345"]) == says(students["s1"]) == "group" and says(students[zoë]) == "zoë"
        assert students["12345"].submitted == datetime(2026, 3, 28, 4, 15, 6, 519018, tzinfo=timezone.utc)
        assert students[zoë].submitted == datetime(2026, 3, 27, 17, tzinfo=timezone.utc)


@pytest.mark.parametrize("text", [b"\xff\xfe\x00", b"a: [", b"- 1\n- 2", b"[" * 5000, b"submission_1:\n  :submitters: 5", b"? [a]\n: b"])
def test_a_list_that_cannot_be_read_leaves_the_folders_names(given, text):
    assert says(found(given({"submission_metadata.yml": text, "submission_1/a.ipynb": lora("x")}))["submission_1"]) == "x"


def test_yaml_that_grows_when_it_is_merged_stays_small(tmp_path):
    levels = "\n".join(f"{name}: &{name}\n  <<: [{', '.join([f'*{below}'] * 9)}]\n  {name}: 1" for below, name in zip("abcdefghi", "bcdefghij"))
    folder_of(tmp_path, {"submission_metadata.yml": f"a: &a {{x: 1}}\n{levels}".encode(), "ann/a.ipynb": lora()})
    tracemalloc.start()
    assert set(found(tmp_path)) == {"ann"}
    assert tracemalloc.get_traced_memory()[1] < 100 * MIB
    tracemalloc.stop()


def test_nbgrader(given):
    from nbgrader.utils import parse_utc

    stamp = "2026-03-28 10:00:00.250000 UTC"
    export = given({
        "submitted/ann/week-11/a.ipynb": lora("ann"), "submitted/ann/week-11/timestamp.txt": stamp.encode(),
        "submitted/ann/week-10/a.ipynb": lora("last week"), "submitted/ben/week-11/a.ipynb": lora("ben"),
        "submitted/ben/week-11/timestamp.txt": b"yesterday", "submitted/cleo/week-10/a.ipynb": lora("cleo"),
    })  # fmt: skip
    students = found(export)
    assert {student: says(submission) for student, submission in students.items()} == {"ann": "ann", "ben": "ben"}
    assert students["ann"].submitted == parse_utc(stamp).replace(tzinfo=timezone.utc) and students["ben"].submitted is None
    assert students["ann"].set_aside == ()


def test_nobody_sets_the_clock_with_a_file_of_their_own(given):
    stamp = b"2020-01-01 00:00:00.0 UTC"
    mine = {"timestamp.txt": stamp, "submitted.csv": b"student,submitted\nann,2020-01-01T00:00:00Z\n", "a.ipynb": lora(),
            "submission_metadata.yml": metadata_of({"ann": ([("ben", "ben", "")], "2020-01-01 00:00:00 Z")}).encode()}
    files = {f"ann/{name}": content for name, content in mine.items()} | {"ben/hw.zip": zip_of(mine), "ben/sub/timestamp.txt": stamp}
    students = found(given(files))
    assert set(students) == {"ann", "ben"} and all(submission.submitted is None and submission.notebooks for submission in students.values())


def test_an_instructors_list_of_times_counts_before_everything_else(tmp_path):
    folder_of(tmp_path, {
        "ann/a.ipynb": lora(), "Bob Lee/b.ipynb": lora(), "27-44 - Cleo Roux - Dec 5, 2024 1149 PM/a.ipynb": lora(),
        "submitted.csv": b"\xef\xbb\xbfstudent;submitted\nann;2026-03-28T08:00:00+09:00\nBOB LEE;2026-03-28 08:00\n\nCleo Roux_27;2026-03-28T09:00\n",
    })  # fmt: skip
    students = found(tmp_path, CLASS)
    assert students["ann"].submitted == datetime(2026, 3, 27, 23, tzinfo=timezone.utc)
    assert students["12345"].submitted == datetime(2026, 3, 28, 8, tzinfo=CET)
    assert students["Cleo Roux_27"].submitted == datetime(2026, 3, 28, 9, tzinfo=CET)


@pytest.mark.parametrize("text, fix", [
    ("student\nann", "line 1"), ("student,submitted\nann,Friday", "line 2"), ("student,submitted\nann", "line 2"), ("", "line 1"),
])  # fmt: skip
def test_a_list_of_times_that_cannot_be_meant_stops_with_its_line(tmp_path, text, fix):
    with pytest.raises(UserError, match=f"submitted.csv, {fix}"):
        find_submissions(folder_of(tmp_path, {"submitted.csv": text.encode(), "ann/a.ipynb": lora()}), ASSIGNMENT)


def test_flat_files_go_by_what_their_names_say_besides_the_lesson(given):
    files = {"ann_04_lora_parameter_counting (2).ipynb": lora(), "Lora-Parameter-Counting ben.ipynb": lora(), "cleo.ipynb": lora(),
             "dora.zip": zip_of({"a.ipynb": lora()})}  # fmt: skip
    assert set(found(given(files))) == {"ann", "ben", "cleo", "dora"}


def test_a_single_notebook_and_one_students_zip_or_folder(tmp_path):
    folder_of(tmp_path, {"cleo.ipynb": lora("one"), f"{LORA}.ipynb": lora("two")})
    assert says(found(tmp_path / "cleo.ipynb")["cleo"]) == "one" and says(found(tmp_path / f"{LORA}.ipynb")[LORA]) == "two"
    bundle = {f"course/notebooks/{LORA}.ipynb": lora(), f"course/work/{LORA}.ipynb": lora(), "course/labkit/a.py": b"", "course/data/x": b""}
    for name, files in {"ann": {f"{LORA}.ipynb": lora()}, "ben": {f"work/{LORA}.ipynb": lora(), "work/other.ipynb": qlora()}, "dora": bundle,
                        "s1": {"Bob Lee/a.ipynb": lora(), "s2.ipynb": qlora()}}.items():  # fmt: skip
        folder_of(tmp_path / "folders" / name, files)
        (tmp_path / f"{name}.zip").write_bytes(zip_of(files))
        assert set(found(tmp_path / "folders" / name, CLASS)) == set(found(tmp_path / f"{name}.zip", CLASS)) == {name}


def test_a_lone_student_in_a_folder_is_no_wrapper_and_a_course_around_many_is(given):
    assert set(found(given({"ann/a.ipynb": lora()}, "one"))) == {"ann"}
    assert set(found(given({"My course/ann/a.ipynb": lora(), "My course/ben/a.ipynb": lora()}, "many"))) == {"ann", "ben"}


def test_several_paths_are_one_class_and_nothing_is_lost(tmp_path):
    folder_of(tmp_path / "week 10", {"s1/a.ipynb": lora("jane"), "s2/a.ipynb": lora("zoë")})
    (tmp_path / "late.zip").write_bytes(zip_of({"doejane_LATE_1_2_b.ipynb": qlora("jane"), "leebob_12345_3_a.ipynb": lora("bob")}))
    students = found([tmp_path / "week 10", str(tmp_path / "late.zip")], CLASS)
    assert set(students) == {"s1", "s2", "12345"} and set(students["s1"].notebooks) == {LORA, QLORA}
    assert students["s1"].files == ("week 10/s1/a.ipynb", "late.zip/doejane_LATE_1_2_b.ipynb")


@pytest.mark.parametrize("name", ["s1", "S1", "jane.doe", "Jane.Doe@uni.example", "Jane Doe", "jane  doe", "Doe, Jane", "doejane", "Doe_Jane"])
def test_the_roster_knows_a_student_by_id_mail_and_name(tmp_path, name):
    assert set(found(folder_of(tmp_path, {f"{name}/a.ipynb": lora()}), CLASS)) == {"s1"}


def test_an_accent_may_be_written_in_either_form(tmp_path):
    for form in ("NFC", "NFD"):
        folder_of(tmp_path / form, {f"{unicodedata.normalize(form, 'ZOË ångström')}/a.ipynb": lora()})
        assert set(found(tmp_path / form, CLASS)) == {"s2"}


def test_names_that_look_alike_stay_as_many_students(tmp_path):
    names = ["Zoë", unicodedata.normalize("NFD", "Zoë"), "zoë", "Zoë ", "Zo ë", "Zo\\ë"]
    folder_of(tmp_path, {f"{name}/a.ipynb": lora(name) for name in names})
    students = found(tmp_path)
    assert {student: says(submission) for student, submission in students.items()} == {name: name.strip() for name in names}
    assert len({file_name(name).casefold() for name in students}) == len(names)
    # Where the roster knows all of them, each is found; where it knows one, the others keep their names and are told.
    assert set(found(tmp_path, replace(ASSIGNMENT, roster=tuple(map(Student, names))))) == set(names)
    known = found(tmp_path, replace(ASSIGNMENT, roster=(Student("zoë"),)))
    assert set(known) == set(names) and known["zoë"].problems == students["zoë"].problems
    assert any("More than one name" in problem for problem in known["Zoë"].problems)


def test_two_of_the_same_name_are_not_one_student(given):
    export = given({f"Jane Doe_{number}_assignsubmission_file_/a.ipynb": lora(str(number)) for number in (7, 8)})
    assert {student: says(submission) for student, submission in found(export, CLASS).items()} == {"Jane Doe_7": "7", "Jane Doe_8": "8"}
    twins = replace(ASSIGNMENT, roster=(Student("s1", "Jane Doe"), Student("s2", "Jane Doe")))
    assert set(found(export, twins)) == {"Jane Doe_7", "Jane Doe_8"}


def test_a_name_chosen_on_a_platform_is_not_somebody_elses_id():
    roster, zone = Roster(CLASS.roster), timezone.utc
    for first in ("s1_7_assignsubmission_file_", "jane.doe@uni.example_7_assignsubmission_file_", "doejane_12345_6_a.ipynb"):
        assert roster.find(claim_of(first, zone)) == (None, False)
    assert roster.find(claim_of("leebob_12345_6_a.ipynb", zone)) == ("12345", True)


def test_nothing_handed_in_and_nothing_there_are_errors(tmp_path):
    with pytest.raises(UserError, match="holds no submission"):
        find_submissions(folder_of(tmp_path, {"grades.csv": b"", ".hidden/a.ipynb": lora()}), ASSIGNMENT)
    with pytest.raises(UserError, match="does not exist"):
        find_submissions(tmp_path / "nobody", ASSIGNMENT)



@pytest.mark.parametrize("name", ["04_lora (1).ipynb", "LoRA final.ipynb", "05_qlora.ipynb", "x.IPYNB", "a.ipynb.txt", "ø\u200b.ipynb", "-.ipynb"])
@pytest.mark.parametrize("change", [
    lambda data: data, lambda data: b"\xef\xbb\xbf" + data, lambda data: json.dumps(json.loads(data), indent=1).replace("\n", "\r\n").encode(),
    lambda data: json.loads(data) and data.decode().encode("utf-16"),
], ids=["plain", "BOM", "Windows line ends", "UTF-16"])  # fmt: skip
def test_a_lesson_is_known_by_its_cells_whatever_the_file_is_called(tmp_path, name, change):
    submission = found(folder_of(tmp_path, {f"ann/{name}": change(lora("ann"))}))["ann"]
    assert set(submission.notebooks) == {LORA} and says(submission) == "ann"
    assert submission.problems == (f"No notebook was found for {QLORA}.",)


def test_the_released_notebooks_are_known_as_themselves(tmp_path):
    for path in NOTEBOOKS.glob("*.ipynb"):
        copy = without_solutions(json.loads(path.read_text()))
        folder_of(tmp_path, {f"ann/{path.stem[::-1]}.ipynb": json.dumps(copy).encode()})
    everything = replace(ASSIGNMENT, notebooks=tuple(sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))))
    submission = found(tmp_path, everything)["ann"]
    graded = {stem for stem, _ in everything.exercises} | {question.notebook for question in everything.questions}
    assert {stem: file.name for stem, file in submission.notebooks.items()} == {stem: f"ann/{stem[::-1]}.ipynb" for stem in graded}
    for stem, file in submission.notebooks.items():
        read = read_notebook(file)
        nbformat.validate(nbformat.from_dict(read))
        assert cells_of(read, [exercise.id for lesson, exercise in everything.exercises if lesson == stem]).problems == {}
        assert {read_answer(read, question.id) for question in everything.questions if question.notebook == stem} <= {""}


def test_the_newest_counts_and_the_others_are_kept(tmp_path):
    files = {"ann/b.ipynb": lora("oldest"), "ann/a.ipynb": lora("newest"), "ann/z/c.ipynb": lora("between"), "ann/q.ipynb": qlora()}
    folder_of(tmp_path, files)
    for name, minutes in {"b": 0, "a": 60, "z/c": 30}.items():
        os.utime(tmp_path / "ann" / f"{name}.ipynb", (1_700_000_000 + 60 * minutes,) * 2)
    submission = found(tmp_path)["ann"]
    assert says(submission) == "newest" and submission.set_aside == ("ann/z/c.ipynb", "ann/b.ipynb")
    assert len(submission.problems) == 2 and all("ann/a.ipynb" in problem and "set aside" in problem for problem in submission.problems)


def test_in_the_same_minute_the_number_of_the_copy_decides(tmp_path):
    for number, copy in enumerate(["", " (2)", " (10)", "-Copy1"]):
        path = folder_of(tmp_path, {f"ann/lora{copy}.ipynb": lora(copy)}) / f"ann/lora{copy}.ipynb"
        os.utime(path, (1_700_000_070 - number,) * 2)
    assert says(found(tmp_path)["ann"]) == "(10)"


def test_a_later_notebook_that_cannot_be_read_does_not_replace_an_earlier_one(given):
    first, second = (f"27-44 - Ann - Dec {day}, 2024 1149 AM/a.ipynb" for day in (5, 6))
    students = found(given({first: lora("good"), second: b"%PDF-1.5"}))
    assert says(students["Ann_27"]) == "good" and students["Ann_27"].submitted == datetime(2024, 12, 5, 11, 49, tzinfo=CET)
    assert any("no notebook" in problem for problem in students["Ann_27"].problems)


def test_checkpoints_and_what_systems_put_beside_do_not_count(given):
    files = {".ipynb_checkpoints/a-checkpoint.ipynb": lora("old"), "__MACOSX/._a.ipynb": b"\0\5\x16\7", "._a.ipynb": b"\0", ".DS_Store": b"\0"}
    files |= {"a.ipynb": lora("ann"), "q.ipynb": qlora()}
    submission = found(given({f"ann/{name}": content for name, content in files.items()}))["ann"]
    assert says(submission) == "ann" and submission.problems == () and submission.set_aside == ()


def test_a_lesson_of_another_assignment_is_said_and_costs_no_time(given):
    first, second = (f"27-44 - Ann - Dec {day}, 2024 1149 AM/a.ipynb" for day in (5, 6))
    students = found(given({first: lora(), second: notebook("sft-labels")}))
    assert students["Ann_27"].submitted.day == 5 and any("Not part of this assignment" in problem for problem in students["Ann_27"].problems)


@pytest.mark.parametrize("release, told", [
    ({"release": ASSIGNMENT.release}, False), ({}, False), ({"release": "0123456789ab"}, True), ({"release": ["\x1b[2J"]}, False),
])  # fmt: skip
def test_another_release_is_said_and_graded_all_the_same(tmp_path, release, told):
    submission = found(folder_of(tmp_path, {"ann/a.ipynb": lora("ann", labkit=release | {"minutes": 1})}))["ann"]
    assert says(submission) == "ann" and any("comes from release" in problem for problem in submission.problems) is told


@pytest.mark.parametrize("metadata, told", [
    ({"kernelspec": {"name": "ir", "language": "R", "display_name": "R"}}, True), ({"kernelspec": {"name": "vla", "display_name": "my own"}}, False),
    ({"kernelspec": None, "language_info": {"name": "julia"}}, True), ({"kernelspec": 5}, False), ({"kernelspec": {"language": [1]}}, True),
])  # fmt: skip
def test_a_kernel_of_another_language_is_said_and_one_of_another_name_is_not(tmp_path, metadata, told):
    submission = found(folder_of(tmp_path, {"ann/a.ipynb": lora("ann", **metadata)}))["ann"]
    assert says(submission) == "ann" and any("run with Python" in problem for problem in submission.problems) is told


def test_the_model_that_the_bundle_ships_is_no_adapter(given):
    graded = replace(ASSIGNMENT, performance=PerformanceTask("stack", 5))
    files = {"ann/data/tiny_vla/model.safetensors": b"base", "ann/runs/stack/adapter_model.safetensors": b"mine", "ann/a.ipynb": lora(), "ben/b": b""}
    submission = found(given(files), graded)["ann"]
    assert [file.read() for file in submission.adapters] == [b"mine"] and submission.set_aside == ()


def test_adapters_come_newest_first_and_pickles_are_refused_in_words(given):
    graded = replace(ASSIGNMENT, performance=PerformanceTask("stack", 5))
    files = {"27-44 - Ann - Dec 5, 2024 1149 AM/old.safetensors": b"o", "27-44 - Ann - Dec 6, 2024 1149 AM/adapter/adapter_model.safetensors": b"n",
             "27-44 - Ann - Dec 6, 2024 1149 AM/adapter/adapter_config.json": b"{}", "27-44 - Ann - Dec 6, 2024 1149 AM/x.bin": b"\x80"}  # fmt: skip
    submission = found(given(files), graded)["Ann_27"]
    assert [file.read() for file in submission.adapters] == [b"n", b"o"] and submission.submitted.day == 6
    assert any("safetensors" in problem for problem in submission.problems) and len(submission.set_aside) == 1
    with pytest.raises(UserError, match="at most 0 MiB"):
        submission.adapters[0].read(limit=0)
    assert set(found(given({"adapter_model.safetensors": b"n"}, "dora"))) == {"dora"}


MALFORMED = {
    "empty": (b"", "empty"),
    "zeros": (b"\x00" * 4096, "empty"),
    "no JSON": (b"print('hello')", "no notebook"),
    "HTML": (b"<!DOCTYPE html><html>", "no notebook"),
    "half a file": (lora()[:-20], "no notebook"),
    "binary junk": (bytes(range(256)) * 9, "no notebook"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(99), "no notebook"),
    "a zip": (zip_of({"a.ipynb": lora()}), "no notebook"),
    "no UTF-8": (lora().replace(b"python3", b"\xe9\xe9"), "no notebook"),
    "deep nesting": (b"[" * 200_000, "no notebook"),
    "deep nesting, closed": (b'{"cells": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "no notebook"),
    "a digit after another": (b'{"cells": ' + b"9" * 100_000 + b"}", "no notebook"),
    "a list": (b"[1, 2]", "no notebook"),
    "a number": (b"5", "no notebook"),
    "null": (b"null", "no notebook"),
    "no cells": (b'{"nbformat": 4, "metadata": {}}', "no cells"),
    "no cell": (b'{"nbformat": 4, "metadata": {}, "cells": []}', "no cells"),
    "cells no list": (b'{"cells": {"a": 1}}', "no cells"),
    "cells no cells": (b'{"cells": [1]}', "cell 1"),
    "source no text": (b'{"cells": [{}, {"source": [["a"]]}]}', "cell 2"),
    "format 3": (b'{"nbformat": 3, "worksheets": [{"cells": []}]}', "format 3"),
    "nobody's cells": (notebook("homework-1"), "no cell of a lesson"),
    "metadata of every kind": (
        b'{"cells": [{"metadata": {"nbgrader": [1]}}, {"metadata": 3}, {"metadata": {"nbgrader": {"grade_id": {}}}}]}', "no cell of a lesson",
    ),
}


@pytest.mark.parametrize("content, word", MALFORMED.values(), ids=MALFORMED)
def test_what_is_no_notebook_gets_one_sentence_and_the_rest_goes_on(given, content, word):
    students = found(given({"ann/a.ipynb": content, "ben/a.ipynb": lora("ben")}))
    first, second = students["ann"].problems
    assert "a.ipynb" in first and word in first and first.isprintable() and len(first) < 400 and second.startswith("No notebook of this assignment")
    assert says(students["ben"]) == "ben"


@pytest.mark.parametrize("nbformat_", [3, 5, "4", None, [4]])
def test_another_format_with_cells_is_said_and_graded(tmp_path, nbformat_):
    changed = json.dumps(json.loads(lora("ann")) | {"nbformat": nbformat_}).encode()
    submission = found(folder_of(tmp_path, {"ann/a.ipynb": changed}))["ann"]
    assert says(submission) == "ann" and any("it has format" in problem for problem in submission.problems)


def test_200_mib_are_not_read(tmp_path):
    path = folder_of(tmp_path, {"ann/a.ipynb": lora(), "ben/a.ipynb": lora()}) / "ann/a.ipynb"
    os.truncate(path, 200 * MIB)
    tracemalloc.start()
    students = found(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 100 * MIB
    tracemalloc.stop()
    assert students["ann"].problems[0].startswith("ann/a.ipynb has 200 MiB, at most 20 MiB are read") and students["ben"].notebooks


def test_a_file_that_grows_after_it_was_found_is_not_read_beyond_the_limit(tmp_path):
    submission = found(folder_of(tmp_path, {"ann/a.ipynb": lora()}))["ann"]
    os.truncate(tmp_path / "ann/a.ipynb", MAX_NOTEBOOK + 1)
    with pytest.raises(UserError, match="at most 20 MiB"):
        read_notebook(submission.notebooks[LORA])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_links_and_pipes_are_not_followed(tmp_path):
    secret = folder_of(tmp_path / "elsewhere", {"solution.ipynb": lora("stolen")})
    ann = folder_of(tmp_path / "in", {"ann/q.ipynb": qlora()}) / "ann"
    (ann / "a.ipynb").symlink_to(secret / "solution.ipynb")
    (ann / "folder").symlink_to(secret)
    os.mkfifo(ann / "pipe.ipynb")
    (tmp_path / "in" / "ben").symlink_to(secret)
    students = found(tmp_path / "in")
    assert set(students["ann"].notebooks) == {QLORA} and students["ben"].notebooks == {}
    assert [sum("is a link" in problem for problem in students[name].problems) for name in ("ann", "ben")] == [2, 1]
    assert any("ordinary" in problem for problem in students["ann"].problems)
    # A link that takes a file's place after it was found.
    submission = found(folder_of(tmp_path / "later", {"ann/a.ipynb": lora()}))["ann"]
    (tmp_path / "later/ann/a.ipynb").unlink()
    (tmp_path / "later/ann/a.ipynb").symlink_to(secret / "solution.ipynb")
    with pytest.raises(UserError, match="ordinary"):
        read_notebook(submission.notebooks[LORA])


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_said(tmp_path):
    folder_of(tmp_path, {"ann/a.ipynb": lora(), "ben/a.ipynb": lora()})
    (tmp_path / "ann/a.ipynb").chmod(0)
    students = found(tmp_path)
    assert "cannot be read" in students["ann"].problems[0] and students["ben"].notebooks


def test_a_thousand_notebooks_are_not_all_looked_into(tmp_path, monkeypatch):
    monkeypatch.setattr(submissions, "MAX_NOTEBOOKS", 5)
    folder_of(tmp_path, {f"ann/{i}.ipynb": b"junk" for i in range(40)})
    submission = found(tmp_path)["ann"]
    assert sum("no notebook (" in problem for problem in submission.problems) == 5
    assert any("Only the 5 newest" in problem for problem in submission.problems)


def test_sentences_do_not_flood(tmp_path):
    folder_of(tmp_path, {f"ann/{i}.ipynb": b"junk" for i in range(40)})
    problems = found(tmp_path)["ann"].problems
    assert len(problems) == submissions.MAX_PROBLEMS + 1 and "more of this kind" in problems[-1]


def test_names_made_of_control_characters_do_not_reach_a_sentence(tmp_path):
    name = "\x1b[31mred\r\n<script>\u202e" + "x" * 180
    submission = found(folder_of(tmp_path, {f"ann/{name}.ipynb": b"junk"}))["ann"]
    assert all(problem.isprintable() and len(problem) < 400 for problem in submission.problems)



def entry(name, kind=stat.S_IFREG | 0o644, **fields):
    """A ZipInfo with a name that writestr would mend."""
    info = zipfile.ZipInfo("x", (2026, 3, 1, 12, 0, 0))
    info.filename, info.external_attr, info.compress_type, info.create_system = name, kind << 16, zipfile.ZIP_DEFLATED, 3
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def patched(data, offsets, old, new):
    """A zip with two bytes changed in all local (offset 0 of `offsets`) and directory headers (offset 1)."""
    data = bytearray(data)
    for signature, offset in zip((b"PK\x03\x04", b"PK\x01\x02"), offsets):
        start = -1
        while (start := data.find(signature, start + 1)) >= 0:
            if data[start + offset : start + offset + 2] == struct.pack("<H", old):
                data[start + offset : start + offset + 2] = struct.pack("<H", new)
    return bytes(data)


def overlapping(entries=50):
    """Many entries of one and the same compressed content: after D. Fifield, A better zip bomb (WOOT 2019)."""
    packed = zlib.compressobj(9, zlib.DEFLATED, -15)
    content = packed.compress(b" " * 10_000) + packed.flush()
    common = struct.pack("<HHHHHIII", 20, 0, 8, 0, 0x5C61, zlib.crc32(b" " * 10_000), len(content), 10_000)
    local = b"PK\x03\x04" + common + struct.pack("<HH", 7, 0) + b"a.ipynb" + content
    directory = b"".join(
        b"PK\x01\x02" + struct.pack("<H", 20) + common + struct.pack("<HHHHHII", 7, 0, 0, 0, 0, 0, 0) + b"a.ipynb" for _ in range(entries)
    )
    return local + directory + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, entries, entries, len(directory), len(local), 0)


GOOD = {"q.ipynb": qlora("good")}
# name -> (zip, a word of the sentence, whether the rest of the zip is read)
HOSTILE = {
    "path traversal": (lambda: zip_of([(entry("../../ben/a.ipynb"), lora()), *GOOD.items()]), "leads out", True),
    "traversal with backslashes": (lambda: zip_of([(entry("..\\..\\ben\\a.ipynb"), lora()), *GOOD.items()]), "leads out", True),
    "absolute name": (lambda: zip_of([(entry("/ben/a.ipynb"), lora()), *GOOD.items()]), "leads out", True),
    "drive letter": (lambda: zip_of([(entry("C:\\ben\\a.ipynb"), lora()), *GOOD.items()]), "leads out", True),
    "drive letter without a slash": (lambda: zip_of([(entry("C:a.ipynb"), lora()), *GOOD.items()]), "leads out", True),
    "a name without end": (lambda: zip_of({f"a{' ' * 60_000}(": lora(), **GOOD}), "no system allows", True),
    "symlink": (lambda: zip_of([(entry("a.ipynb", stat.S_IFLNK | 0o777), b"/etc/passwd"), *GOOD.items()]), "is a link", True),
    "encrypted": (lambda: patched(zip_of({"a.ipynb": lora()}), (6, 8), 0, 1), "encrypted", False),
    "bzip2": (lambda: zip_of({"a.ipynb": lora()}, zipfile.ZIP_BZIP2), "method", False),
    "LZMA": (lambda: zip_of({"a.ipynb": lora()}, zipfile.ZIP_LZMA), "method", False),
    "a method nobody knows": (lambda: patched(zip_of({"a.ipynb": lora()}), (8, 10), 8, 99), "method", False),
    "zip in a zip": (lambda: zip_of({"b.zip": zip_of({"a.ipynb": lora()}), **GOOD}), "zip inside a zip", True),
    "the same name twice": (lambda: zip_of([("a.ipynb", b"first"), (entry("a.ipynb"), notebook("homework-1")), *GOOD.items()]), "twice", True),
    "bomb by ratio": (lambda: zip_of({"a.ipynb": b" " * 3 * MIB, **GOOD}), "zip bomb", True),
    "bomb by size": (lambda: zip_of({"a.ipynb": os.urandom(9000) * (MAX_NOTEBOOK // 9000 + 1), **GOOD}, zipfile.ZIP_STORED), "at most 20 MiB", True),
    "overlapping entries": (overlapping, "overlap", False),
    "a wrong checksum": (lambda: zip_of({"a.ipynb": lora("before")}, zipfile.ZIP_STORED).replace(b"before", b"behind"), "damaged", False),
    "empty": (lambda: zip_of({}), "empty zip", False),
    "no zip": (lambda: b"Rar!\x1a\x07\x01\x00" + bytes(99), "no readable zip", False),
    "nothing": (lambda: b"", "no readable zip", False),
    "half a zip": (lambda: zip_of(GOOD)[:-30], "no readable zip", False),
    "a directory beyond the end": (lambda: zip_of(GOOD)[200:], "damaged", False),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("make, word, rest", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("where", ["a file", "in a folder", "in a zip"])
def test_a_hostile_zip_gets_a_sentence_and_the_rest_is_graded(tmp_path, monkeypatch, where, make, word, rest):
    content, before = make(), set(Path.cwd().iterdir())
    monkeypatch.setattr(zipfile.ZipFile, "extract", None)
    monkeypatch.setattr(zipfile.ZipFile, "extractall", None)
    if where == "in a zip":
        path = tmp_path / "export.zip"
        path.write_bytes(zip_of({"ann/hw.zip": content, "ben/a.ipynb": lora("ben")}, zipfile.ZIP_STORED))
    else:
        path = folder_of(tmp_path / "in", {"ann.zip" if where == "a file" else "ann/hw.zip": content, "ben/a.ipynb": lora("ben")})
    students = found(path)
    assert set(students) == {"ann", "ben"} and says(students["ben"]) == "ben"
    assert any(word in problem and problem.isprintable() for problem in students["ann"].problems)
    assert students["ann"].notebooks.keys() == ({QLORA} if rest else set())
    assert set(Path.cwd().iterdir()) == before and len(list(tmp_path.rglob("*.ipynb"))) == (where != "in a zip")


@pytest.mark.parametrize("name", [name for name, (_, _, rest) in HOSTILE.items() if not rest])
def test_a_broken_zip_beside_others_on_the_command_line_is_its_owners(tmp_path, name):
    (tmp_path / "ann.zip").write_bytes(HOSTILE[name][0]())
    (tmp_path / "ben.ipynb").write_bytes(lora("ben"))
    students = found([tmp_path / "ann.zip", tmp_path / "ben.ipynb"])
    assert says(students.pop("ben")) == "ben"
    assert any(HOSTILE[name][1] in problem for submission in students.values() for problem in submission.problems)


def test_a_directory_with_too_many_entries_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_ENTRIES", 30)
    data = zip_of({f"{i}.txt": b"" for i in range(31)})
    folder_of(tmp_path, {"ann.zip": data, "ben/a.ipynb": lora()})

    def opened(source, *rest, **options):
        raise AssertionError("the directory was read")

    monkeypatch.setattr(zipfile, "ZipFile", opened)
    students = found(tmp_path)
    assert "more than 30 files" in students["ann"].problems[0] and students["ben"].notebooks


def test_a_size_that_a_header_invents_changes_nothing(tmp_path):
    """The header says 10 bytes, the content has 30 MiB: what comes out is counted, or the zip is found damaged."""
    data = bytearray(zip_of({"a.ipynb": os.urandom(MIB) * 30}))
    for signature, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        start = data.find(signature) + offset
        data[start : start + 4] = struct.pack("<I", 10)
    students = found(folder_of(tmp_path, {"ann.zip": bytes(data), "ben/a.ipynb": lora()}))
    assert students["ann"].notebooks == {} and any("a.ipynb" in problem for problem in students["ann"].problems) and students["ben"].notebooks


def test_memory_stays_small_whatever_a_zip_unpacks_to(tmp_path):
    folder_of(tmp_path, {"ann.zip": zip_of({f"{i}.ipynb": b" " * 40 * MIB for i in range(4)}), "ben/b.zip": zip_of({"c.ipynb": b" " * 90 * MIB})})
    tracemalloc.start()
    found(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 60 * MIB
    tracemalloc.stop()


@pytest.mark.parametrize("name, codec", [
    ("Zoë/Übung.ipynb", "utf-8"), ("Зоя/а.ipynb", "utf-8"), ("ann/\x81\x8d.ipynb", "latin-1"), ("张三/作业.ipynb", "gbk"),
])  # fmt: skip
def test_names_in_any_encoding_are_read(tmp_path, name, codec):
    """As macOS and Windows write them: bytes of some encoding, and no word about which."""
    raw = name.encode(codec)
    data = zip_of({"x" * len(raw): lora("found")}).replace(b"x" * len(raw), raw)
    (tmp_path / "export.zip").write_bytes(data)
    (submission,) = find_submissions(tmp_path / "export.zip", ASSIGNMENT)
    assert says(submission) == "found" and (codec != "utf-8" or submission.student == name.partition("/")[0])


def test_a_name_that_claims_utf8_and_is_none_is_said(tmp_path):
    data = patched(zip_of({"xx.ipynb": lora()}), (6, 8), 0, 0x800).replace(b"xx.ipynb", b"\xff\xfe.ipynb")
    assert "no readable zip" in found(folder_of(tmp_path, {"ann.zip": data}))["ann"].problems[0]


def test_backslashes_of_old_windows_programs_are_folders(tmp_path):
    (tmp_path / "export.zip").write_bytes(zip_of([(entry("ann\\work\\a.ipynb"), lora("ann")), (entry("ben\\a.ipynb"), lora("ben"))]))
    assert {student: says(submission) for student, submission in found(tmp_path / "export.zip").items()} == {"ann": "ann", "ben": "ben"}


def test_the_last_of_two_entries_of_one_name_counts(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        data = zip_of([("a.ipynb", lora("first")), ("a.ipynb", lora("last"))])
    assert says(found(folder_of(tmp_path, {"ann.zip": data}))["ann"]) == "last"


def test_a_submission_travels_to_another_process(tmp_path):
    (tmp_path / "export.zip").write_bytes(zip_of({"ann/hw.zip": zip_of({"a.ipynb": lora("ann")}), "ben/a.ipynb": lora("ben")}))
    for submission in find_submissions(tmp_path / "export.zip", ASSIGNMENT):
        copy = pickle.loads(pickle.dumps(submission))
        assert says(copy) == submission.student
        assert (copy.student, copy.files, copy.problems) == (submission.student, submission.files, submission.problems)


def test_an_export_on_the_disk_is_opened_once(tmp_path, monkeypatch):
    (tmp_path / "export.zip").write_bytes(zip_of({f"s{i}/a.ipynb": lora() for i in range(20)}))
    opened, original = [], zipfile.ZipFile.__init__
    monkeypatch.setattr(zipfile.ZipFile, "__init__", lambda self, *args, **options: opened.append(1) or original(self, *args, **options))
    for submission in find_submissions(tmp_path / "export.zip", ASSIGNMENT):
        says(submission)
    assert len(opened) == 1


def test_the_order_is_the_same_every_time(tmp_path):
    folder_of(tmp_path, {f"{student}/{i}.ipynb": lora(str(i)) for student in ("ben", "ann", "Éva") for i in (2, 1, 10)})
    for path in tmp_path.rglob("*.ipynb"):
        os.utime(path, (1_700_000_000,) * 2)
    first = find_submissions(tmp_path, ASSIGNMENT)
    assert first == find_submissions(tmp_path, ASSIGNMENT) and [submission.student for submission in first] == ["ann", "ben", "Éva"]
    assert [file.name for file in list_files(tmp_path).files] == sorted(file.name for file in list_files(tmp_path).files)


def test_random_bytes_in_a_zip_never_stop_the_others(tmp_path):
    """Every byte of the headers changed in turn: each variant is read or said, none raises."""
    import random

    rng, data = random.Random(0), zip_of({"work/a.ipynb": lora("ann"), "work/q.ipynb": qlora()})
    headers = [i for i in range(len(data)) if i < 60 or i > len(data) - 200]
    variants = {}
    for number in range(150):
        changed = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            changed[rng.choice(headers)] = rng.randrange(256)
        variants[f"s{number:03}.zip"] = bytes(changed)
    students = found(folder_of(tmp_path, variants))
    assert len(students) == len(variants)
    assert all(submission.notebooks.keys() == {LORA, QLORA} or submission.problems for submission in students.values())



def answered(*sources, id="lora-question", kind="markdown"):
    cells = [{"cell_type": kind, "metadata": {"nbgrader": {"grade_id": id}}, "source": source} for source in sources]
    return {"cells": [{"cell_type": "markdown", "metadata": {}, "source": "Another cell"}, *cells]}


@pytest.mark.parametrize("sources, expected", [
    (["YOUR ANSWER HERE"], ""), (["\r\n YOUR ANSWER HERE \n"], ""), ([""], ""), ([], ""), (["It depends."], "It depends."),
    ([["It ", "depends.\r\n", "Often."]], "It depends.\nOften."), (["YOUR ANSWER HERE\n\nIt depends."], "It depends."),
    (["It depends.", "Often."], "It depends.\n\nOften."), (["  <b>1</b>\n"], "<b>1</b>"),
])  # fmt: skip
def test_an_answer_is_what_was_written_and_a_stub_is_none(sources, expected):
    for kind in ("markdown", "raw", "code"):
        assert read_answer(answered(*sources, kind=kind), "lora-question") == expected
    assert read_answer(answered(*sources, id="other"), "lora-question") == ""


def test_an_answer_without_end_is_cut():
    assert read_answer(answered("é" * 50_000), "lora-question") == "é" * LONGEST_ANSWER == "é" * 20_000


def test_the_gradescope_list_made_here_is_yaml_with_rubys_tags():
    with pytest.raises(yaml.constructor.ConstructorError, match="ruby"):
        yaml.safe_load(metadata_of({"submission_1": ([("a", "b", "c")], "2026-03-27 10:00:00")}))
