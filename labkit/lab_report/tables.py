"""What a lab report shows: tables and pictures, made from the record. How they are written down is in page.py and notebook.py."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

import numpy as np

from labkit.html_page import clean
from labkit.lab_report.parts import PARTS
from labkit.lab_report.record import FINE_TUNED, GENERIC, rollouts_of
from labkit.rollouts import compare

_MOST = 10  # a dataset of other people's may have thousands of instructions


@dataclass(frozen=True)
class Table:
    """Facts in rows; all cells are text, the first of a row is its name.   head: a name for each column of numbers; () for a table of words."""

    caption: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]


@dataclass(frozen=True)
class Picture:
    """A figure.   data: a PNG file's bytes.   alt: what it shows, in words and numbers."""

    name: str
    data: bytes
    alt: str


def show_dataset(stored: dict) -> list[Table | Picture]:
    """Counts by split, and what the dataset is."""
    keys = ("episodes", "successes", "decisions")
    counts = {**stored["splits"], "all": {key: sum(split[key] for split in stored["splits"].values()) for key in keys}}
    facts = [("name", Path(stored["folder"]).name), *_most_common("task", stored["tasks"]),
             *_most_common("demonstrated by", {who or "not said": count for who, count in stored["operators"].items()}),
             ("validation", f"{stored['errors']:,} errors, {stored['warnings']:,} warnings"),
             *(("error", problem) for problem in stored["problems"])]
    return [Table("The dataset", (), facts),
            Table("Recorded, by split", ("Split", "Episodes", "Successful", "Decisions"),
                  [(split, *(f"{count[key]:,}" for key in keys)) for split, count in counts.items()])]


def _most_common(label, counts):
    ordered = Counter(counts).most_common()
    rows = [(label, f"{name}: {count:,} episodes") for name, count in ordered[:_MOST]]
    rest = ordered[_MOST:]
    return [*rows, (label, f"{len(rest):,} others: {sum(count for _, count in rest):,} episodes")] if rest else rows


def show_training(stored: dict) -> list[Table | Picture]:
    """Settings, how the run went, and its curves."""
    from labkit.waypoint_regression import Curves

    curves = Curves(**stored["curves"])
    best = curves.best_epoch
    run = [
        ("epochs", f"{len(curves.train):,}"), ("time", f"{curves.seconds:,.1f} s"),
        ("parameters trained", f"{curves.trainable:,} of {curves.total:,}"),
        ("learning rates, first epoch", ", ".join(f"{name} {rate:g}" for name, rate in curves.rates[0].items())),
        ("learning rates, last epoch", ", ".join(f"{name} {rate:g}" for name, rate in curves.rates[-1].items())),
        ("training loss, first and last epoch", f"{curves.train[0]:.4f} and {curves.train[-1]:.4f}"),
        ("lowest validation loss", f"{curves.validation[best]:.4f} in epoch {best}, whose weights are kept"),
        ("validation loss, last epoch", f"{curves.validation[-1]:.4f}"),
    ]
    alt = (f"Training and validation loss over {len(curves.train)} epochs: training from {curves.train[0]:.4f} to {curves.train[-1]:.4f}, "
           f"validation from {curves.validation[0]:.4f} to {curves.validation[-1]:.4f}, lowest {curves.validation[best]:.4f} in epoch {best}.")
    return [Table("Hyperparameters", (), [(name, str(value)) for name, value in stored["settings"].items()]),
            Table("The run, epochs counted from 0", (), run), Picture("curves", _drawn(lambda: _draw_curves(curves)), alt)]


def show_comparison(stored: dict) -> list[Table | Picture]:
    """Success where both policies ran, the error of each axis, and response times."""
    runs = {where: (rollouts_of(row[GENERIC]), rollouts_of(row[FINE_TUNED])) for where, row in stored["rows"].items()}
    rows = []
    for where, (a, b) in runs.items():
        c = compare(a, b)
        rows.append((where, f"{c.episodes:,}", _rate(a), _rate(b), f"{100 * c.difference:+.1f} ({100 * c.low:+.1f} to {100 * c.high:+.1f})",
                     f"{c.p:.3f}" if c.p >= 0.001 else "below 0.001"))
    alt = "Success with 95 % intervals. " + " ".join(
        f"{where}: {GENERIC} {_percent(a.rate)}, {FINE_TUNED} {_percent(b.rate)} of {len(a.success)} episodes." for where, (a, b) in runs.items())
    a, b = (stored["accuracy"][who] for who in (GENERIC, FINE_TUNED))
    times = [(who, *_times(np.concatenate([pair[n].milliseconds for pair in runs.values()]))) for n, who in enumerate((GENERIC, FINE_TUNED))]
    tasks = ", ".join(dict.fromkeys(run.task for run, _ in runs.values()))
    return [
        Table(f"Success in closed loop, task {tasks}: both policies on the same episodes, with 95 % intervals; the difference in percentage "
              f"points; p by McNemar's exact test", ("Where", "Episodes", "Generic", "Fine-tuned", "Difference", "p"), rows),
        Picture("success", _drawn(lambda: _draw_success(runs)), alt),
        Table(f"Mean absolute error of each axis of the action, on {stored['accuracy']['decisions']:,} decisions",
              ("Axis", "Generic", "Fine-tuned"), [(axis, _measure(axis, **a[axis]), _measure(axis, **b[axis])) for axis in a]),
        Table("Response time of one decision alone", ("Policy", "Measured", "Median", "95th percentile"), times),
    ]


def show_integration(stored: dict) -> list[Table | Picture]:
    """What the server says of its work, and the same policy through it and without it."""
    answers = Counter()
    for status, count in stored["answers"].items():
        answers[status[:1]] += count
    alone, served = rollouts_of(stored["alone"]), rollouts_of(stored["served"])
    alarms = stored["alarms"]
    server = [
        ("policy", stored["policy"]), ("decisions", f"{stored['decisions']:,}"), ("requests answered", f"{answers['2']:,}"),
        ("requests refused (4xx)", f"{answers['4']:,}"), ("requests failed (5xx)", f"{answers['5']:,}"),
        ("response time, median", f"{1000 * stored['p50']:.1f} ms"), ("response time, 95th percentile", f"{1000 * stored['p95']:.1f} ms"),
        ("deadline", f"{1000 * stored['deadline']:g} ms"),
        ("deadlines missed", f"{stored['misses']:,} ({_percent(stored['misses'] / stored['decisions'])})"),
        ("drift alarms", "; ".join([f"{len(alarms):,}", *alarms[-_MOST:]])),
    ]
    both = [(how, f"{len(run.success):,}", _rate(run), *_times(run.milliseconds))
            for how, run in (("asked directly", alone), ("through the server", served))]
    return [Table("What the server saw; a decision takes as long as the request that it comes with", (), server),
            Table(f"The same policy on the same episodes, task {served.task}, with 95 % intervals; response time of one decision alone",
                  ("How", "Episodes", "Success", "Measured", "Median", "95th percentile"), both)]


SHOW = {"dataset": show_dataset, "training": show_training, "comparison": show_comparison, "integration": show_integration}


def rubric() -> list[Table]:
    """What goes to a person: the words of each part, with the points that they can earn."""
    return [Table(f"Judged by a person, {part.title}: {sum(points for points, _ in part.rubric)} points", (),
                  [("1 point" if points == 1 else f"{points} points", criterion) for points, criterion in part.rubric]) for part in PARTS.values()]


def _percent(share):
    return f"{100 * share:.1f} %"


def _rate(run):
    """Success with its interval."""
    low, high = run.interval
    return f"{_percent(run.rate)} ({100 * low:.1f} to {100 * high:.1f})"


def _measure(axis, error, unit):
    """An error in the unit that people read; the grip's is a share of decisions."""
    factor, name = {"m": (1000, "mm"), "rad": (180 / np.pi, "degrees")}.get(unit, (100, "%") if axis == "grip" else (1, unit))
    return f"{factor * error:.2f} {name}".strip()


def _times(milliseconds):
    return f"{len(milliseconds):,}", *(f"{value:.1f} ms" for value in np.percentile(milliseconds, [50, 95]))


def _drawn(draw):
    """The figure that draw() makes with its legend above, as a PNG file; nothing of the look stays behind."""
    import matplotlib.pyplot as plt

    from labkit.plots import as_image, style

    with plt.rc_context():
        style()
        figure = draw()
        figure.legend(frameon=False, loc="outside upper left", ncols=3)
        return as_image(figure, "", bbox_inches="tight", dpi=100).data


def _draw_curves(curves):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(layout="constrained")
    axes.plot(curves.train, label="training")
    axes.plot(curves.validation, label="validation")
    axes.axvline(curves.best_epoch, color="black", linestyle="--", linewidth=1, marker="", label="weights that are kept")
    axes.set(xlabel="epoch", ylabel="mean loss, normalised actions", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _draw_success(runs):
    from labkit.plots import success_points

    # A dollar sign would begin a formula.
    names = {where: fill(clean(where), 30).replace("$", r"\$") for where in runs}
    figure = success_points({who: {names[where]: pair[n] for where, pair in runs.items()} for n, who in enumerate((GENERIC, FINE_TUNED))})
    figure.axes[0].get_legend().remove()  # above the axes there is room on a phone, beside them there is not
    return figure
