"""What every page and table made from records shares: clean text, CSV cells, the HTML frame. What is said on them is in the modules beside."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable

from labkit import html_page
from labkit.exercises.judging import printable
from labkit.grading.results import Graded, file_name

LONGEST_NAME, LONGEST_TEXT = 60, 30_000  # a spreadsheet's cell holds 32,767 characters
_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")

STYLE = """
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; border-bottom: 1px solid #767676; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
table { width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #bbb; }
caption { text-align: left; }
.narrow { width: auto; min-width: 24rem; }
.name { white-space: nowrap; overflow-wrap: normal; }
.fixed { table-layout: fixed; }
.what { overflow-wrap: normal; width: 34%; }
.status { width: 8.5em; }
.points { width: 4.5em; }
.sum th, .sum td { border-top: 2px solid #111; font-weight: bold; }
.quiet { color: #555; font-weight: normal; }
.note { border-left: 4px solid #111; padding: .2rem 0 .2rem .8rem; }
.words { white-space: pre-wrap; border: 1px solid #bbb; padding: .5rem .8rem; margin: .3rem 0; }
article { margin: 0 0 1.5rem; }
img { max-width: 100%; height: auto; }
@media screen and (max-width: 40rem) {
.fixed thead { display: none; }
.fixed, .fixed tbody, .fixed tr, .fixed th, .fixed td { display: block; width: auto; border: 0; padding: .1rem 0; }
.fixed tr { border-bottom: 1px solid #bbb; }
.narrow { min-width: 0; width: 100%; }
}
@media print { main { max-width: none; padding: 0; } tr, article, figure { break-inside: avoid; } h2, h3 { break-after: avoid; } }
"""


def clean(text: str, longest: int = LONGEST_TEXT) -> str:
    """A text that may have come from a student, without control characters and marks that turn the direction of writing; lines stay lines."""
    kept = html_page.clean(text[:longest])
    return kept if len(text) <= longest else f"{kept} ... (and {len(text) - longest:,} characters more)"


def names_of(records: Iterable[Graded]) -> dict[str, str]:
    """Student -> the name in pages and tables: on one line, not endless, and never the same for two students."""
    students = [graded.student for graded in records]
    shown = {student: _short(printable(student[: 2 * LONGEST_NAME])) for student in students}
    often = Counter(shown.values())
    return {student: name if name and often[name] == 1 else file_name(student) or "(no name)" for student, name in shown.items()}


def _short(name):
    return name if len(name) <= LONGEST_NAME else name[:LONGEST_NAME] + "..."


def points(number: float) -> str:
    """A number of points, to hundredths at most."""
    return f"{round(number, 2) + 0.0:.2f}".rstrip("0").rstrip(".")


def percent(share: float) -> str:
    """A share as a percentage, to tenths at most."""
    return f"{points(round(100 * share, 1))} %"


def cell(value) -> str:
    """One cell of a table; a text that a spreadsheet would take for a formula gets an apostrophe before it."""
    if value is None or isinstance(value, (int, float)):
        return "" if value is None else points(value)
    text = clean(value).strip()
    return "'" + text if text.startswith(_FORMULA) else text


def text_of(cell: str) -> str:
    """What a cell says, without the apostrophe that `cell` may have put before it."""
    text = clean(cell, len(cell)).strip()
    return text[1:] if text.startswith("'") and text[1:].startswith(_FORMULA) else text


def csv_text(rows: Iterable[Iterable]) -> str:
    """Rows as CSV: commas, one line end everywhere, every cell through `cell`."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([cell(value) for value in row] for row in rows)
    return text.getvalue()


def template(source: str):
    """A page's template, compiled once; whatever is put in is cleaned and escaped."""
    return html_page.template(source, STYLE, clean, (points, percent))
