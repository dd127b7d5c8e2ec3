"""Written questions out to the people who mark them, marks and points set by hand back into the records. Writes no record itself."""

from __future__ import annotations

import csv
import hashlib
import io
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from labkit.errors import UserError
from labkit.exercises.judging import printable
from labkit.grading.pages import csv_text, names_of, points, template, text_of
from labkit.grading.results import Graded, Override, file_name, write_whole
from labkit.paths import NOTEBOOKS
from labkit.submission.cells import grade_id, read_notebook, source_of

QUESTIONS_CSV, QUESTIONS_HTML = "questions.csv", "questions.html"
MARKS, OVERRIDES = ("student", "question", "points", "comment", "marker"), ("student", "item", "points", "reason", "by")
_RUBRIC = re.compile(r"(.*?)<details>\s*<summary>\s*How the answer is marked[^<]*</summary>(.*?)</details>", re.DOTALL)
_PAGE = """
<h1>{{ heading }}</h1>
<p>Marks go into questions.csv, in the columns points, comment and marker; then `python3 -m labkit grade` merges them.
{{ "Names are hidden: a code stands for a student, the same in all questions." if hidden }}
The order of the answers is another one in every question: by SHA-256 of assignment/question/student.</p>
{% for question, asked, most, answers in questions %}
<h2>{{ question }} ({{ most | points }} points)</h2>
<div class="words">{{ asked.text or "The source notebooks have no such question." }}</div>
{% if asked.rubric %}
<h3>How the answer is marked</h3>
<ul>
{% for line in asked.rubric %}
<li>{{ line }}</li>
{% endfor %}
</ul>
{% endif %}
{% for who, answer, earned, comment in answers %}
<article>
<h3><bdi>{{ who }}</bdi>: {% if earned is none %}____{% else %}{{ earned | points }}{% endif %} of {{ most | points }} points</h3>
<div class="words" dir="auto">{{ answer }}</div>
{% if comment %}<p class="note">Comment: {{ comment }}</p>{% endif %}
</article>
{% endfor %}
{% else %}
<p>No written question was answered.</p>
{% endfor %}
"""


@dataclass(frozen=True)
class Asked:
    """What a question asks, and how its answer is marked, one line a criterion; empty where the source notebooks do not say."""

    text: str = ""
    rubric: tuple[str, ...] = ()


def read_asked(folder: Path, notebook: str) -> dict[str, Asked]:
    """Question id -> what the text cell before its answer cell says, of one source notebook.   Empty where there is no such notebook."""
    path = Path(folder) / f"{notebook}.ipynb"
    if not path.is_file():
        return {}
    cells, found = read_notebook(path)["cells"], {}
    for before, answer in zip(cells, cells[1:]):
        if "question" in answer["metadata"].get("tags", ()) and grade_id(answer):
            split = _RUBRIC.match(source_of(before))
            lines = split[2].strip().splitlines() if split else ()
            text = split[1] if split else source_of(before)
            found[grade_id(answer)] = Asked(text.strip().lstrip("# "), tuple(line.strip().removeprefix("- ") for line in lines if line.strip()))
    return found


def code_of(graded: Graded) -> str:
    """What stands for the student where names are hidden: against a marker's bias, not against one who hashes the roster."""
    return "s-" + _hashed(graded.assignment, graded.release, graded.student)[:10]


def _hashed(*parts):
    return hashlib.sha256("/".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def write_questions(folder: Path, records: Iterable[Graded], sources: Path = NOTEBOOKS, names: bool = False) -> tuple[Path, Path]:
    """Write FOLDER/questions.csv and questions.html: every answer, with the mark it may have.   Returns the two paths.

    sources: the notebooks with the rubrics.   names: show the students' names.
    """
    records = list(records)
    shown = names_of(records) if names else {graded.student: code_of(graded) for graded in records}
    answered: dict[str, list] = {q.question: [] for graded in records for q in graded.questions}
    for graded in records:
        for q in graded.questions:
            answered[q.question] += [(graded, q)] if q.answer else []
    answered = {question: found for question, found in answered.items() if found}
    asked = {notebook: read_asked(sources, notebook) for notebook in {q.notebook for found in answered.values() for _, q in found}}
    rows, pages = [["student", "question", "notebook", "answer", "out_of", "points", "comment", "marker"]], []
    for question, found in answered.items():
        found.sort(key=lambda pair: _hashed(pair[0].assignment, question, pair[0].student))
        rows += [[shown[g.student], question, q.notebook, q.answer, q.points, q.earned, q.comment, ""] for g, q in found]
        first = found[0][1]
        pages.append((question, asked[first.notebook].get(question, Asked()), first.points,
                      [(shown[g.student], q.answer, q.earned, q.comment) for g, q in found]))
    table, page = Path(folder) / QUESTIONS_CSV, Path(folder) / QUESTIONS_HTML
    write_whole(table, "\ufeff" + csv_text(rows))
    heading = f"Written answers: {records[0].assignment if records else ''}"
    write_whole(page, template(_PAGE).render(heading=heading, hidden=not names, questions=pages))
    return table, page


def merge_marks(records: Iterable[Graded], path: Path) -> list[Graded]:
    """The records that a table of marks (columns student, question, points, comment, marker) changes, with the marks; the others are left out.

    student: as in questions.csv, or as the record has it.   A row without points and comment says nothing; a mark replaces an earlier one, and
    the marker's name goes to the end of the comment.   Raises UserError with a sentence for every bad row; then nothing is merged.
    """

    def merged(graded, question, earned, row):
        comment, by = row["comment"], f"(marked by {row['marker']})" if row["marker"] else ""
        comment = comment if comment.endswith(by) else f"{comment} {by}".strip()
        return replace(graded, questions=tuple(
            replace(q, earned=earned, comment=comment) if q.question == question else q for q in graded.questions))

    def most(graded):
        return {q.question: q.points for q in graded.questions}

    return _merge(records, path, MARKS, most, merged, "comment")


def merge_overrides(records: Iterable[Graded], path: Path) -> list[Graded]:
    """The records that a table of points set by hand (columns student, item, points, reason, by) changes; the others are left out.

    What was set by hand before stays in the record; the last one counts, and one that is already the last is not added again.
    Raises UserError with a sentence for every bad row, one without a reason included; then nothing is merged.
    """

    def merged(graded, item, earned, row):
        override = Override(item, earned, row["reason"], row["by"])
        last = [earlier for earlier in graded.overrides if earlier.item == item][-1:]
        return graded if last == [override] else replace(graded, overrides=(*graded.overrides, override))

    return _merge(records, path, OVERRIDES, lambda graded: graded.items, merged, "reason")


def carried_over(old: Graded, new: Graded) -> Graded:
    """The record of a student who is graded again, with what people gave to the old one: overrides, and marks of answers that are still the same.

    The mark of an answer that has changed is kept as a comment, and the answer has to be marked again.
    """
    before = {q.question: q for q in old.questions}

    def carried(q):
        was = before.get(q.question)
        if was is None or was.answer == q.answer or was.earned is None:
            return q if was is None else replace(q, earned=was.earned, comment=was.comment)
        return replace(q, comment=f"{was.comment} [{points(was.earned)} of {points(was.points)} points, for an earlier answer]".strip())

    return replace(new, questions=tuple(map(carried, new.questions)), overrides=old.overrides)


def _merge(records, path, columns, most, merged, words):
    """`merged` for every row that says something.   most: record -> {item: points at most}.   words: the column whose text goes with the points."""
    records = {graded.student: graded for graded in records}
    students, complaints, given, changed = _students(records), [], {}, {}
    item_column = columns[1]
    for place, row in _rows(path, columns):
        if row is None:
            complaints.append(f"{place}: it has more cells than the heading; a text with a comma needs quotes around it.")
            continue
        who, item = row["student"], row[item_column]
        if words == "comment" and not row["points"] and not row["comment"]:
            continue  # not marked yet
        found = students.get(who, set())
        earned, problem = None, ""
        if len(found) != 1:
            problem = f"{_quoted(who)} is {'more than one student' if found else 'no student'} of these results"
        else:
            (student,) = found
            limits = most(records[student])
            if item not in limits:
                problem = f"{_quoted(who)} has no {item_column} {_quoted(item)}; there are {', '.join(limits) or 'none'}"
            else:
                earned, problem = _points(row["points"], limits[item])
            if not problem and words == "reason" and not row["reason"]:
                problem = "the reason is missing"
            if not problem:
                first, *said = given.setdefault((student, item), (place, earned, row[words]))
                problem = "" if said == [earned, row[words]] else f"it disagrees with {first} about {_quoted(who)} and {_quoted(item)}"
        if problem:
            complaints.append(f"{place}: {problem}.")
        elif first == place:
            changed[student] = merged(changed.get(student, records[student]), item, earned, row)
    if complaints:
        raise UserError("\n".join([f"{path}: nothing was merged; put these right and merge it again.", *complaints]))
    return [graded for student, graded in changed.items() if graded != records[student]]


def _students(records):
    """What a table may call a student -> the students it means: more than one where somebody has another's name."""
    found, shown = {}, names_of(records.values())
    for student, graded in records.items():
        for name in (code_of(graded), student, shown[student], file_name(student)):
            found.setdefault(text_of(name), set()).add(student)
    return found


def _points(text, most):
    """(points, "") or (None, what is wrong with them)."""
    try:
        earned = float(text)
    except ValueError:
        return None, f"{_quoted(text)} is no number of points" + (", write 2.5 with a point" if re.fullmatch(r"\d+,\d+", text) else "")
    if not math.isfinite(earned) or earned < 0 or earned > most:
        return None, f"{_quoted(text)} is not between 0 and {points(most)} points"
    return earned, ""


def _rows(path, columns):
    """(line in words, column -> text, or None where it has too many cells) of every row that is not empty.   Raises UserError for no table."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its name and who may read it.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8: save it from the spreadsheet as \"CSV UTF-8\".") from None
    # Spreadsheets write what is usual in their country.
    heading = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=heading.count), strict=True)
    before_limit = csv.field_size_limit(len(text) + 1)
    try:
        names = [name.strip().lower() for name in next(reader, [])]
        if missing := [name for name in columns if name not in names]:
            raise UserError(f"{path}, line 1: the column {', '.join(missing)} is missing; there have to be {', '.join(columns)}.")
        found, line = [], reader.line_num + 1
        for number, values in enumerate(reader, start=2):
            place = f"line {line}" + (f" (row {number} of the spreadsheet)" if line != number else "")
            line = reader.line_num + 1
            row = dict(zip(names, values))
            if any(value.strip() for value in values):
                too_long = any(values[len(names):])
                found.append((place, None if too_long else {name: text_of(row.get(name, "")) for name in columns}))
        return found
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: it is no CSV ({error}); save it from the spreadsheet again.") from None
    finally:
        csv.field_size_limit(before_limit)


def _quoted(text):
    return f'"{printable(text[:80])}"'
