"""How a class did: one page with plots for the instructor, and a second one for times, which differ from run to run. Grades nothing."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from textwrap import fill

from markupsafe import Markup

from labkit.exercises.judging import CORRECT, NOT_ATTEMPTED, WRONG, printable
from labkit.grading.feedback import duration, exercise_titles
from labkit.grading.pages import names_of, percent, points, template
from labkit.grading.results import Graded, file_name, read_seconds, write_whole

REPORT = "report"
_STATUSES = (CORRECT, WRONG, NOT_ATTEMPTED)
_IN_PLOT = 8  # misconceptions
_PAGE = """
{% macro picture(name, alt) %}
{% if name in pictures %}
<figure><img src="data:image/png;base64,{{ pictures[name] }}" alt="{{ alt }}"><figcaption>{{ alt }}</figcaption></figure>
{% endif %}
{% endmacro %}
<h1>{{ heading }}</h1>
<p>Submissions: {{ submissions }}. Isolation: {{ tiers }}.
How long grading took is on <a href="time.html">a page of its own</a>, because it is never the same.</p>
{% if not_isolated %}
<p class="note"><strong>Not isolated: {{ not_isolated }} of them ran without a sandbox. Do not use this on code that you do not trust.</strong></p>
{% endif %}

<h2>Scores</h2>
{{ picture("scores.png", scores) }}

<h2>Hardest exercises</h2>
{{ picture("exercises.png", "Each exercise, the hardest first: the share of the submissions that solved it, got it wrong, and left it out.") }}
<table>
<thead><tr><th scope="col">Exercise</th>{% for status in statuses %}<th scope="col" class="number">{{ status }}</th>{% endfor %}
<th scope="col" class="number">solved by</th></tr></thead>
<tbody>
{% for exercise, counts, solved in exercises %}
<tr><th scope="row">{{ exercise }} <span class="quiet">{{ titles.get(exercise, "") }}</span></th>
{% for status in statuses %}<td class="number">{{ counts[status] }}</td>{% endfor %}<td class="number">{{ solved | percent }}</td></tr>
{% endfor %}
</tbody>
</table>

<h2>Commonest misconceptions</h2>
{% if misconceptions %}
{{ picture("misconceptions.png", "How many submissions made each recognised mistake; the table has all of them.") }}
<table>
<thead><tr><th scope="col" class="number">Submissions</th><th scope="col">Exercise</th><th scope="col">What the students read</th></tr></thead>
<tbody>
{% for exercise, sentence, n in misconceptions %}
<tr><td class="number">{{ n }}</td><th scope="row" class="name">{{ exercise }}</th><td>{{ sentence }}</td></tr>
{% endfor %}
</tbody>
</table>
{% else %}
<p>No known mistake was recognised.</p>
{% endif %}

{% for title, rows in lists.items() %}
<h2>{{ title }}</h2>
<ul>
{% for who, what in rows %}
<li><bdi>{{ who }}</bdi>{% if what %}: {{ what }}{% endif %}</li>
{% else %}
<li>none</li>
{% endfor %}
</ul>
{% endfor %}
"""
_TIME = """
<h1>{{ heading }}</h1>
<p>{{ says }}</p>
{% if picture %}
<figure><img src="data:image/png;base64,{{ picture }}" alt="{{ says }}"></figure>
<p>The slowest:</p>
<ol>
{% for name, seconds in slowest %}
<li><bdi>{{ name }}</bdi>: {{ "%.3f" | format(seconds) }} s</li>
{% endfor %}
</ol>
{% endif %}
"""


def write_report(folder: Path, records: Iterable[Graded], title: str = "", roster: Iterable = ()) -> Path:
    """Write FOLDER/report: index.html and its pictures, the same bytes for the same records, and time.html from FOLDER/times.

    roster: objects with `id` and `name`; without one nobody can be missing.   Returns the path of index.html.
    """
    import matplotlib

    from labkit.plots import style

    records, out = list(records), Path(folder) / REPORT
    title = title or (records[0].assignment if records else "")
    with matplotlib.rc_context():
        style()
        _write_index(out, records, title, list(roster))
        _write_times(out, records, read_seconds(Path(folder)), title)
    return out / "index.html"


def _write_index(out, records, title, roster):
    exercises, mistakes, tiers = hardest(records), misconceptions(records), Counter(graded.isolation for graded in records)
    shares = [graded.total / graded.out_of for graded in records if graded.out_of]
    figures, scores = {}, "There is nothing to reach."
    if shares:
        scores = (f"Half of the submissions reached at least {percent(median(shares))} of {points(max(graded.out_of for graded in records))} "
                  f"points; the lowest {percent(min(shares))}, the highest {percent(max(shares))}.")
        figures["scores.png"] = _histogram([100 * share for share in shares], "points reached (% of all)", range(0, 101, 10))
    if exercises:
        figures["exercises.png"] = _exercise_bars(exercises)
    if mistakes:
        figures["misconceptions.png"] = _mistake_bars(mistakes[:_IN_PLOT])
    write_whole(out / "index.html", template(_PAGE).render(
        heading=f"Class report: {title}", submissions=len(records), not_isolated=tiers["none"], scores=scores, statuses=_STATUSES,
        tiers=", ".join(f"{tier} ({n})" for tier, n in sorted(tiers.items())), exercises=exercises, titles=exercise_titles(),
        misconceptions=mistakes, pictures={name: _write_picture(out / name, figure) for name, figure in figures.items()},
        lists=_lists(records, roster),
    ))  # fmt: skip


def _lists(records, roster):
    """Title -> (who or what, what about it), for what an instructor has to look at."""
    names, unmarked = names_of(records), Counter(question for graded in records for question in graded.unmarked)
    found = {
        "Written questions without a mark": [(question, f"{n} answers") for question, n in sorted(unmarked.items())],
        "Late submissions": [(names[g.student], f"{duration(g.late.minutes)}, {percent(g.late.penalty)} taken off")
                             for g in records if g.late.minutes],
        "Points set by hand": [(names[g.student], f"{o.item}, {points(o.earned)} points{f' by {o.by}' if o.by else ''}: {o.reason}")
                               for g in records for o in g.overrides],
        "Submissions with problems": [(names[g.student], " ".join(g.problems)) for g in records if g.problems],
    }  # fmt: skip
    if roster:
        handed_in, enrolled = {graded.student for graded in records}, {student.id for student in roster}
        found["In the roster, nothing handed in"] = [(student.id, student.name) for student in roster if student.id not in handed_in]
        found["Handed in, not in the roster"] = [(names[graded.student], "") for graded in records if graded.student not in enrolled]
    return found


def _write_times(out, records, seconds, title):
    taken = {name: seconds[key] for student, name in names_of(records).items() if (key := file_name(student)) in seconds}
    slowest, picture, says = sorted(taken.items(), key=lambda item: (-item[1], item[0]))[:5], "", "No time was written down."
    if taken:
        says = (f"Seconds for {len(taken)} of {len(records)} submissions: median {median(taken.values()):.3f}, longest {slowest[0][1]:.3f}, "
                f"{sum(taken.values()):.1f} together.")
        picture = _write_picture(out / "time.png", _histogram(list(taken.values()), "seconds a submission", 20))
    write_whole(out / "time.html", template(_TIME).render(heading=f"Time: {title}", says=says, picture=picture, slowest=slowest))


def hardest(records: Iterable[Graded]) -> list[tuple[str, Counter, float]]:
    """(exercise, status -> submissions, share that solved it), the smallest share first."""
    counts: dict[str, Counter] = {}
    for graded in records:
        for verdict in graded.verdicts:
            counts.setdefault(verdict.exercise, Counter())[verdict.status] += 1
    found = [(exercise, statuses, statuses[CORRECT] / statuses.total()) for exercise, statuses in counts.items()]
    return sorted(found, key=lambda row: (row[2], row[0]))


def misconceptions(records: Iterable[Graded]) -> list[tuple[str, str, int]]:
    """(exercise, sentence as most students read it, submissions), the commonest first."""
    said: dict[tuple[str, str], Counter] = {}
    for graded in records:
        for verdict in graded.verdicts:
            if verdict.misconception:
                said.setdefault((verdict.exercise, verdict.misconception), Counter())[verdict.sentence] += 1
    # The same mistake is said with other numbers where other cases were asked.
    found = [(exercise, min(sentences, key=lambda s: (-sentences[s], s)), sentences.total()) for (exercise, _), sentences in said.items()]
    return sorted(found, key=lambda row: (-row[2], row[0], row[1]))


def _figure(width, height):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _histogram(values, xlabel, bins):
    """Submissions by value, their number above each bar, and the median as a dashed line."""
    figure, axes = _figure(8.5, 4.2)
    counts, _, bars = axes.hist(values, bins=bins, edgecolor="white")
    axes.bar_label(bars, [f"{n:.0f}" if n else "" for n in counts], padding=2, fontsize=11, zorder=5,
                   bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})
    axes.axvline(median(values), color="black", linestyle="--", marker="", label="median")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    axes.set(xlabel=xlabel, ylabel="submissions")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.margins(y=0.12)
    return figure


def _exercise_bars(exercises):
    from labkit.plots import COLOURS

    figure, axes = _figure(9, 1.6 + 0.34 * len(exercises))
    names, left = [exercise for exercise, _, _ in exercises], [0.0] * len(exercises)
    for status, colour, hatch in zip(_STATUSES, (COLOURS[0], COLOURS[4], "0.85"), ("", "//", "..")):
        shares = [100 * counts[status] / counts.total() for _, counts, _ in exercises]
        axes.barh(names, shares, left=left, color=colour, edgecolor="white", hatch=hatch, label=status)
        left = [before + share for before, share in zip(left, shares)]
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.set(xlabel="share of the submissions (%)", xlim=(0, 100))
    axes.tick_params(axis="y", labelsize=11)
    axes.margins(y=0.01)
    axes.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def _mistake_bars(mistakes):
    figure, axes = _figure(11, 1.2 + 0.85 * len(mistakes))
    labels = [fill(printable(f"{exercise}: {sentence}"), 62, max_lines=3, placeholder=" ...") for exercise, sentence, _ in mistakes]
    axes.bar_label(axes.barh(range(len(mistakes)), [n for _, _, n in mistakes], height=0.6), padding=3)
    axes.set_yticks(range(len(mistakes)), labels, fontsize=10, parse_math=False)  # a sentence is no formula, whatever dollar signs are in it
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="submissions")
    return figure


def _write_picture(path, figure):
    """Write the picture, without the name of the program in it.   Returns it as base64."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture.getvalue())
    return Markup(base64.b64encode(picture.getvalue()).decode())
