"""One page a student: what was found, what it gives, and why. Grades nothing; what a record does not say is not on the page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import cache
from pathlib import Path
from types import MappingProxyType

from labkit.exercises.judging import CORRECT, NOT_ATTEMPTED, WRONG
from labkit.grading.pages import names_of, points, template
from labkit.grading.results import Graded, file_name, write_whole

FEEDBACK = "feedback"
SIGNS = {CORRECT: "✓", WRONG: "✗", NOT_ATTEMPTED: "○"}
_TIERS = {
    "full": "Your code ran in a sandbox of its own: namespaces, Landlock, seccomp, and limits on time, memory and output.",
    "no-namespaces": "Your code ran in a sandbox (Landlock, seccomp, and limits on time, memory and output), without namespaces of its own.",
    "container": "Your code ran in a container made by the platform, with limits on time, memory and output.",
    "none": "Your code ran without isolation, with limits on time, memory and output.",
}
_PAGE = """
<h1>{{ heading }}</h1>
<p>Student: <bdi>{{ name }}</bdi></p>
<p><strong>Total: {{ graded.total | points }} of {{ graded.out_of | points }} points.</strong>
{% if graded.unmarked %}
{{ graded.unmarked | length }} of your written answers {{ "is" if graded.unmarked | length == 1 else "are" }} not marked yet and count 0 until then.
{% endif %}</p>

{% if graded.problems %}
<h2>Problems with what you handed in</h2>
<ul>
{% for problem in graded.problems %}
<li>{{ problem }}</li>
{% endfor %}
</ul>
{% endif %}

<h2>How the total is made</h2>
<table class="narrow">
<thead><tr><th scope="col">Part</th><th scope="col" class="number">Points</th><th scope="col" class="number">Of</th></tr></thead>
<tbody>
{% for part, earned, most in parts %}
<tr><th scope="row">{{ part }}</th><td class="number">{{ earned | points }}</td><td class="number">{{ most | points }}</td></tr>
{% endfor %}
{% if graded.late.penalty %}
<tr><th scope="row">Late: {{ graded.late.penalty | percent }} of {{ before | points }}</th>
<td class="number">&minus;{{ (before - graded.total) | points }}</td><td></td></tr>
{% endif %}
<tr class="sum"><th scope="row">Total</th><td class="number">{{ graded.total | points }}</td><td class="number">{{ graded.out_of | points }}</td></tr>
</tbody>
</table>
<p>{{ lateness }}</p>

<h2>Exercises</h2>
{% for notebook, verdicts in notebooks.items() %}
{% if notebook %}
<h3>{{ notebook }}</h3>
{% endif %}
<table class="fixed">
<thead><tr><th scope="col" class="what">Exercise</th><th scope="col" class="status">Status</th><th scope="col" class="points">Points</th>
<th scope="col">What the grader says</th></tr></thead>
<tbody>
{% for v in verdicts %}
<tr><th scope="row">{{ v.exercise }}<br><span class="quiet">{{ titles.get(v.exercise, "") }}</span></th>
<td>{{ signs.get(v.status, "") }} {{ v.status }}</td>
<td>{{ graded.earned(v.exercise) | points }} of {{ v.points | points }}</td>
<td>{{ v.sentence }}{% if v.passed and v.passed < v.total %} {{ v.passed }} of {{ v.total }} cases agree.{% endif %}
{% if v.exercise in by_hand %} <em>Set by hand, see below; the grader gave {{ v.earned | points }}.</em>{% endif %}</td></tr>
{% endfor %}
</tbody>
</table>
{% else %}
<p>The assignment has no exercise.</p>
{% endfor %}

{% if graded.questions %}
<h2>Written questions</h2>
{% for q in graded.questions %}
<article>
{% set earned = graded.earned(q.question) %}
<h3>{{ q.question }}:
{% if earned is not none %}{{ earned | points }} of {{ q.points | points }} points
{% elif q.answer %}not marked yet ({{ q.points | points }} points)
{% else %}not answered (0 of {{ q.points | points }} points){% endif %}</h3>
{% if q.question in by_hand %}
<p><em>Set by hand, see below{% if q.earned is not none %}; the mark was {{ q.earned | points }}{% endif %}.</em></p>
{% endif %}
{% if q.comment %}<p class="note">Comment: <bdi>{{ q.comment }}</bdi></p>{% endif %}
{% if q.answer %}
<p class="quiet">Your answer{% if q.notebook %} in {{ q.notebook }}{% endif %}:</p>
<div class="words" dir="auto">{{ q.answer }}</div>
{% endif %}
</article>
{% endfor %}
{% endif %}

{% if graded.performance %}
{% set p = graded.performance %}
<h2>Performance of your adapter</h2>
<p>Task: {{ p.task }}. <strong>{{ graded.earned("performance") | points }} of {{ p.points | points }} points.</strong> {{ p.message }}
{% if "performance" in by_hand %}<em>Set by hand, see below; the grader gave {{ p.earned | points }}.</em>{% endif %}</p>
{% if p.success or p.retention %}
<table class="narrow">
<thead><tr><th scope="col">Measured</th><th scope="col" class="number">Rate</th><th scope="col" class="number">95 % interval</th></tr></thead>
<tbody>
{% for what, rate in (("Success on the new task", p.success), ("Retention of the old tasks", p.retention)) %}
{% if rate %}
<tr><th scope="row">{{ what }}</th><td class="number">{{ rate[0] | percent }}</td>
<td class="number">{{ rate[1] | percent }} to {{ rate[2] | percent }}</td></tr>
{% endif %}
{% endfor %}
</tbody>
</table>
<p class="quiet">Episodes: {{ p.episodes }}.{% if board %} On the leaderboard you are <bdi>{{ board }}</bdi>.{% endif %}</p>
{% endif %}
{% endif %}

{% if by_hand %}
<h2>Points set by hand</h2>
{% if graded.overrides | length > by_hand | length %}
<p>Of several for the same item the last one counts.</p>
{% endif %}
<ul>
{% for o in graded.overrides if o.item in by_hand %}
<li>{{ o.item }}: {{ o.earned | points }} of {{ graded.items[o.item] | points }} points{% if o.by %}, by <bdi>{{ o.by }}</bdi>{% endif %}.
Reason: <bdi>{{ o.reason }}</bdi></li>
{% endfor %}
</ul>
{% endif %}

<h2>How this was graded</h2>
<p>{{ tier }} (isolation: {{ graded.isolation }})</p>
<dl>
{% for term, values in (("Graded", graded.files), ("Set aside, because something newer was there", graded.set_aside)) %}
{% if values %}<dt>{{ term }}</dt>{% endif %}
{% for value in values %}
<dd><bdi>{{ value }}</bdi></dd>
{% endfor %}
{% endfor %}
<dt>Submission</dt><dd>{{ graded.digest or "nothing that can be graded" }}</dd>
<dt>Release</dt><dd>{{ graded.release }}</dd>
</dl>
"""


def feedback_page(graded: Graded, title: str = "", deadline: datetime | None = None, name: str = "", board: str = "") -> str:
    """The page of one student, as HTML that needs nothing else.   title: the assignment's.   name: as `pages.names_of` has it.

    board: the student's name on the leaderboard.
    """
    by_hand = {override.item: override for override in graded.overrides if override.item in graded.items}
    notebooks: dict[str, list] = {}
    for verdict in graded.verdicts:
        notebooks.setdefault(graded.notebooks.get(verdict.exercise, ""), []).append(verdict)
    return template(_PAGE).render(
        graded=graded, heading=f"Feedback: {title or graded.assignment}", name=name or names_of([graded])[graded.student], parts=_parts(graded),
        before=sum(graded.earned(item) or 0 for item in graded.items), lateness=_lateness(graded, deadline), notebooks=notebooks,
        titles=exercise_titles(), signs=SIGNS, by_hand=by_hand, board=board,
        tier=_TIERS.get(graded.isolation, "How your code was isolated is not known."),
    )  # fmt: skip


def _parts(graded):
    """(what, points, most) of the kinds of items that the assignment has."""
    kinds = {
        "Exercises": [verdict.exercise for verdict in graded.verdicts], "Written questions": [q.question for q in graded.questions],
        "Performance": ["performance"] if graded.performance else [],
    }  # fmt: skip
    return [(kind, sum(graded.earned(item) or 0 for item in items), sum(graded.items[item] for item in items))
            for kind, items in kinds.items() if items]


def _lateness(graded, deadline):
    handed_in = f"Handed in {graded.submitted.replace('T', ' ') or 'at a time that is not known'}"
    if not graded.late.minutes:
        return f"{handed_in}; nothing is taken off for lateness."
    came = f"{handed_in}, {duration(graded.late.minutes)} after the deadline{f' ({deadline})' if deadline else ''}: "
    if not graded.late.penalty:
        return came + "nothing is taken off for that."
    before = sum(graded.earned(item) or 0 for item in graded.items)
    return came + (f"the assignment's rule takes {points(100 * graded.late.penalty)} % off what you reached, so that "
                   f"{points(before)} points become {points(graded.total)}.")


def duration(minutes: int) -> str:
    """Minutes in words: "1 day 3 hours 20 minutes"."""
    days, hours, minutes = minutes // 1440, minutes // 60 % 24, minutes % 60
    parts = [f"{n} {unit}{'' if n == 1 else 's'}" for n, unit in ((days, "day"), (hours, "hour"), (minutes, "minute")) if n]
    return " ".join(parts) or "0 minutes"


@cache
def exercise_titles() -> dict[str, str]:
    """Exercise id -> what is asked for, in one line."""
    from labkit.exercises.exercise import all_exercises

    return {exercise.id: exercise.title for exercise in all_exercises().values()}


def write_feedback(folder: Path, records: Iterable[Graded], title: str = "", deadline: datetime | None = None,
                   boards: Mapping[str, str] = MappingProxyType({})) -> list[Path]:
    """Write FOLDER/feedback/STUDENT.html for every record.   boards: student -> name on the leaderboard.   Returns the paths."""
    records = list(records)
    names = names_of(records)
    paths = [Path(folder) / FEEDBACK / f"{file_name(graded.student)}.html" for graded in records]
    for path, graded in zip(paths, records):
        write_whole(path, feedback_page(graded, title, deadline, names[graded.student], boards.get(graded.student, "")))
    return paths
