"""The page on which a class compares its adapters: places, points, intervals. Rolling them out is in performance.py; it grades nothing."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from labkit.grading.pages import names_of, template
from labkit.grading.results import Graded, write_whole

LEADERBOARD = "leaderboard.html"
NAMES = ("hidden", "shown")
_LEFT, _WIDE = 12, 200
_PAGE = """
{% macro x(share) %}{{ "%.1f" | format(left + wide * share) }}{% endmacro %}
{% macro said(span) %}{{ span[0] | percent }} ({{ span[1] | percent }} to {{ span[2] | percent }}){% endmacro %}
{% macro drawn(span, y, colour, square) %}
<line x1="{{ x(span[1]) }}" y1="{{ y }}" x2="{{ x(span[2]) }}" y2="{{ y }}" stroke="{{ colour }}" stroke-width="2"/>
{% for end in span[1:] %}
<line x1="{{ x(end) }}" y1="{{ y - 4 }}" x2="{{ x(end) }}" y2="{{ y + 4 }}" stroke="{{ colour }}" stroke-width="2"/>
{% endfor %}
{% if square %}
<rect x="{{ "%.1f" | format(left + wide * span[0] - 4) }}" y="{{ y - 4 }}" width="8" height="8" fill="{{ colour }}"/>
{% else %}
<circle cx="{{ x(span[0]) }}" cy="{{ y }}" r="4.5" fill="{{ colour }}"/>
{% endif %}
{% endmacro %}
<h1>{{ heading }}</h1>
{% if rows %}
<p>Each adapter was rolled out on the same hidden episodes. Success is on the new task, {{ task }}; retention is on the old ones.
Intervals are 95 % Wilson intervals.</p>
<table>
<thead>
<tr><th scope="col" class="number">Place</th><th scope="col">{{ who }}</th><th scope="col" class="number">Points</th>
<th scope="col" class="number">Success</th><th scope="col" class="number">Retention</th>
<th scope="col"><svg width="{{ wide + 2 * left }}" height="18" role="img" aria-label="scale from 0 to 100 %">
{% for share, anchor in ((0, "start"), (0.5, "middle"), (1, "end")) %}
<text x="{{ x(share) }}" y="14" text-anchor="{{ anchor }}" font-size="12" font-weight="normal" fill="#111">{{ share | percent }}</text>
{% endfor %}
</svg></th></tr>
</thead>
<tbody>
{% for row in rows %}
<tr><td class="number">{{ row.place }}</td><th scope="row"><bdi>{{ row.name }}</bdi></th><td class="number">{{ row.points | points }}</td>
<td class="number">{{ said(row.success) }}</td><td class="number">{{ said(row.retention) if row.retention else "" }}</td>
<td><svg width="{{ wide + 2 * left }}" height="36" role="img" aria-label="intervals of success and retention, as in the columns before">
{% for share in (0, 0.5, 1) %}
<line x1="{{ x(share) }}" y1="0" x2="{{ x(share) }}" y2="36" stroke="#bbb"/>
{% endfor %}
{{ drawn(row.success, 11, "#0072B2", false) }}
{% if row.retention %}
{{ drawn(row.retention, 26, "#A84300", true) }}
{% endif %}
</svg></td></tr>
{% endfor %}
</tbody>
</table>
<p>In the pictures, the upper interval with the disc is success{% if old %}, the lower one with the square is retention{% endif %}.</p>
<p><strong>Places.</strong> The order is by points, then by the lower end of success. Two adapters are told apart only where their intervals of
success{% if old %} or of retention{% endif %} do not overlap; all others are tied. "2 to 5" of 9 means: told apart
from one better adapter and from four worse ones, tied with the others. Another draw of episodes could have ordered those in another way.</p>
{% else %}
<p>No adapter was rolled out.</p>
{% endif %}
{% if refused %}
<p>Without a result, because none was handed in or what was handed in is no adapter: {{ refused }}.</p>
{% endif %}
"""


@cache
def _page():
    return template(_PAGE)


def pseudonym(secret: str, assignment: str, student: str) -> str:
    """The name by which a student appears: "Robot" and the first 8 hexadecimal digits of HMAC-SHA256, keyed with the course's secret.

    Always the same for a student of an assignment, another one in the next assignment, and not to be undone without the secret. What it is
    made of is the JSON of ["pseudonym", assignment, student].
    """
    text = json.dumps(["pseudonym", assignment, student]).encode()
    return f"Robot {hmac.new(secret.encode(), text, hashlib.sha256).hexdigest()[:8]}"


def write_leaderboard(folder: Path, records: Iterable[Graded], names: str = "hidden", secret: str = "") -> Path:
    """Write RESULTS/leaderboard.html, the same bytes for the same records.   Returns its path.

    names: "hidden", each student's `pseudonym` by the secret, or "shown".   Points are before a late penalty, with overrides.
    Raises ValueError for other names, and for hidden ones without a secret: anybody could undo them.
    """
    if names not in NAMES:
        raise ValueError(f"names is 'hidden' or 'shown', not {names!r}")
    if names == "hidden" and not secret:
        raise ValueError("hidden names need the course's secret")
    graded = [one for one in records if one.performance is not None]
    shown = names_of(graded) if names == "shown" else {one.student: pseudonym(secret, one.assignment, one.student) for one in graded}
    measured = [one for one in graded if one.performance.success]
    # The last key must tell nothing about hidden names.
    measured.sort(key=lambda one: (-one.earned("performance"), -one.performance.success[1], shown[one.student]))
    rows = [{"place": str(first) if first == last else f"{first} to {last}", "name": shown[one.student], "points": one.earned("performance"),
             "success": one.performance.success, "retention": one.performance.retention}
            for one, (first, last) in zip(measured, places(measured))]
    page = _page().render(
        heading="Leaderboard of the adapters", rows=rows, refused=len(graded) - len(measured), left=_LEFT, wide=_WIDE,
        who="Pseudonym" if names == "hidden" else "Student", old=any(one.performance.retention for one in measured),
        task=", ".join(sorted({one.performance.task for one in measured})),
    )  # fmt: skip
    path = Path(folder) / LEADERBOARD
    write_whole(path, page)
    return path


def places(records: list[Graded]) -> list[tuple[int, int]]:
    """First and last place that each rolled-out adapter may have, in the order given: all that it cannot be told apart from share places."""
    found = []
    for one in records:
        apart = [_order(other) for other in records if _told_apart(one.performance, other.performance)]
        better, worse = sum(order < _order(one) for order in apart), sum(order > _order(one) for order in apart)
        found.append((1 + better, len(records) - worse))
    return found


def _order(graded):
    return -graded.earned("performance"), -graded.performance.success[1]


def _told_apart(a, b):
    return any(x and y and (x[2] < y[1] or y[2] < x[1]) for x, y in ((a.success, b.success), (a.retention, b.retention)))
