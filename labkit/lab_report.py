"""The lab sheet's report, made from a student's own runs: what is recorded, how it becomes a page and a notebook, and what is checked.

The numbers come from the record, the words from the student. How things are measured is elsewhere; how a report is marked is for a person.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import fill

import numpy as np

from labkit.errors import UserError
from labkit.rollouts import Rollouts, compare

RECORD, NOTEBOOK, PAGE = "report.json", "report.ipynb", "report.html"
FORMAT = "labkit lab report 1"
GAP = "YOUR WORDS HERE"
GENERIC, FINE_TUNED = "generic", "fine-tuned"
FEWEST_EPISODES = 20
_MOST_KINDS, _MOST_PROBLEMS = 12, 10
_OURS = "labkit"  # the metadata of a cell that we made


@dataclass(frozen=True)
class Part:
    """A piece of the report.   prompt: what the student writes about, in at least so many `words`.   call: what records its numbers, or "".

    rubric: (points, criterion), for the person who marks it.
    """

    title: str
    prompt: str
    words: int
    rubric: tuple[tuple[int, str], ...]
    call: str = ""

    @property
    def points(self) -> int:
        """What the part's words can earn."""
        return sum(points for points, _ in self.rubric)


PARTS = {
    "dataset": Part(
        "1. Dataset description",
        "Which task is this, who or what demonstrated it, and how? What does the split keep apart? What is not in the data?", 40,
        ((1, "says who or what demonstrated the task, under which instructions, and what one decision holds, with units"),
         (1, "says what training, validation and test do not share, and why that matters for this task"),
         (1, "names something that the data do not show and that the robot will meet")),
        "dataset(folder)"),
    "training": Part(
        "2. Fine-tuning process",
        "Why these settings: what trains and what is frozen, at which rates, and how was the epoch chosen whose weights you keep?", 40,
        ((1, "says what trains and what is frozen, and why, with the number of parameters"),
         (1, "reads the curves: where training and validation part, and which epoch is kept"),
         (1, "says which settings were tried and left, or why none was")),
        "training(curves, settings)"),
    "challenges": Part(
        "2a. Challenges",
        "What went wrong, or nearly? For each: what you saw, what you suspected, which measurement decided it, and what you changed.", 60,
        ((2, "two challenges, each with what was seen and the measurement that found its cause"),
         (1, "what was changed, and the number that shows whether it helped"),
         (1, "one that was not solved, or a cure that did not help, said openly"))),
    "comparison": Part(
        "3. Performance comparison",
        "What did fine-tuning gain and what did it cost? Use the intervals. Where do action error and success disagree, and why?", 60,
        ((1, "reads the paired differences with their intervals, and claims no difference where the interval holds zero"),
         (1, "relates the error by axis to success, in units, and says which axis or which decision matters"),
         (1, "says under which condition the policy is worst, and a reason that the data support"),
         (1, "says what the comparison cannot show: tasks, seeds, and conditions that were not run")),
        "comparison(generic, fine_tuned)"),
    "integration": Part(
        "4. Integration results",
        "How does the robot do with the fine-tuned policy behind the server? Does it meet its deadline, and what happens when it does not?", 40,
        ((1, "compares success and response time through the server with the policy asked directly"),
         (1, "judges p95 and missed deadlines against what the robot's motion allows, not against a round number"),
         (1, "says what the robot does when an answer is late, refused or wrong")),
        "integration(server, served, alone)"),
    "improvements": Part(
        "5. Future improvements",
        "Propose two improvements, for data, training or deployment. For each: which number above it should change, by how much, and how you "
        "would measure it.", 60,
        ((2, "two proposals, each tied to a number of this report"),
         (1, "an experiment for each that could fail: what is measured, on how many episodes"))),
}
RECORDED = tuple(name for name, part in PARTS.items() if part.call)


@dataclass(frozen=True)
class Table:
    """Facts in rows; all cells are text.   head: one name a column; the first column names the row."""

    caption: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]


@dataclass(frozen=True)
class Picture:
    """A figure.   data: a PNG file's bytes.   alt: what it shows, in words and numbers."""

    name: str
    data: bytes
    alt: str


class LabReport:
    """One student's report in a folder: report.json (the record), report.ipynb (where the student writes) and report.html (to hand in).

    Each section is recorded by one call, and recorded anew by another one; what the student has written is never touched.
    """

    def __init__(self, folder, title: str = "Lab report: fine-tuning a VLA for a task", author: str = ""):
        """folder: made where there is none; one with a record is gone on with, and keeps its author where none is given.

        Raises UserError where the record there cannot be read.
        """
        self.folder = Path(folder)
        self.stored = _read_record(self.folder / RECORD) if (self.folder / RECORD).is_file() else {"format": FORMAT, "title": title, "author": author}
        self.stored["author"] = author or self.stored["author"]

    def dataset(self, folder) -> None:
        """Record what a dataset holds, ours or LeRobot's, and what its validation finds.   Raises UserError where there is none."""
        problems = _validated(folder)
        errors = [p.in_folder("") for p in problems if not p.warning]
        facts = {"splits": {}, "kinds": {}, "operators": {}, "kilobytes": _kilobytes(folder)} if errors else dataset_facts(folder)
        self._record("dataset", {"folder": str(Path(folder).resolve()), "name": Path(folder).resolve().name, **facts, "errors": len(errors),
                                 "warnings": len(problems) - len(errors), "problems": errors[:_MOST_PROBLEMS]})

    def training(self, curves, settings: Mapping, folder=None) -> None:
        """Record a run.   curves: as `waypoint_regression.fit` gives them.   settings: name -> number, text or None, all that the run needs.

        folder: the one that `fit` kept its state in; `check` compares the curves with it.   Raises UserError for other settings or no epoch.
        """
        odd = [name for name, value in settings.items() if not isinstance(value, (str, int, float, bool, type(None)))]
        if odd or not settings:
            raise UserError(f"settings are names with numbers or texts; {', '.join(map(str, odd)) or 'nothing'} is none: give plain values")
        if not curves.train:
            raise UserError("these curves have no epoch: record them after the run, training(curves, settings)")
        self._record("training", {"settings": {str(name): value for name, value in settings.items()}, "curves": asdict(curves),
                                  "folder": None if folder is None else str(Path(folder).resolve())})

    def comparison(self, generic: Rollouts | Mapping[str, Rollouts], fine_tuned: Rollouts | Mapping[str, Rollouts],
                   accuracy: tuple[Mapping, Mapping] | None = None, decisions: int = 0) -> None:
        """Record two policies on the same episodes.

        generic, fine_tuned: where -> Rollouts, with the same keys; a task or a condition each. One alone goes by the name of its task.
        accuracy: what `action_accuracy` gives for the two.   decisions: how many it was measured on.
        Raises UserError where the two have other keys, tasks or episodes, or accuracy comes without its number of decisions.
        """
        pair = [{runs.task: runs} if isinstance(runs, Rollouts) else {str(where): run for where, run in runs.items()}
                for runs in (generic, fine_tuned)]
        if list(pair[0]) != list(pair[1]) or not pair[0]:
            raise UserError(f"the generic policy ran {', '.join(pair[0]) or 'nothing'}, the fine-tuned one {', '.join(pair[1]) or 'nothing'}: "
                            f"run both everywhere")
        if accuracy is not None and (decisions < 1 or list(accuracy[0]) != list(accuracy[1])):
            raise UserError("accuracy is of the same axes for both policies, and comes with the number of decisions it was measured on: "
                            "comparison(generic, fine_tuned, accuracy, decisions=len(samples))")
        rows = {}
        for where in pair[0]:
            _paired(where, pair[0][where], pair[1][where])
            rows[where] = {GENERIC: _run_facts(pair[0][where]), FINE_TUNED: _run_facts(pair[1][where])}
        kept = None if accuracy is None else {"decisions": decisions, GENERIC: dict(accuracy[0]), FINE_TUNED: dict(accuracy[1])}
        self._record("comparison", {"rows": rows, "accuracy": kept})

    def integration(self, server, served: Rollouts, alone: Rollouts) -> None:
        """Record a policy server's work.   server: `serving.http.PolicyServer`, after the robot has used it.

        served: closed loop through it, `rollout(PolicyClient(server.url), ...)`.   alone: the same policy on the same episodes, asked directly.
        Raises UserError where the episodes differ or the server has decided nothing.
        """
        seen = server.core.monitor.look()
        if not seen.decisions:
            raise UserError("the server has decided nothing yet: let the robot use it first, rollout(PolicyClient(server.url), task)")
        _paired("integration", alone, served)
        answers = {s.labels["status"]: int(s.value) for metric in server.registry.collect() for s in metric.samples
                   if s.name == "labkit_http_answers_total" and s.labels["path"] == "/act"}
        self._record("integration", {
            "policy": server.core.name, "answers": answers, "decisions": seen.decisions, "misses": seen.misses, "deadline": seen.deadline,
            "p50": seen.p50, "p95": seen.p95, "alarms": [str(alarm) for alarm in seen.alarms], "served": _run_facts(served),
            "alone": _run_facts(alone)})

    def missing(self) -> str:
        """Which sections have not been recorded and what records them, in one sentence; empty where all have."""
        calls = [f"{name} (report.{PARTS[name].call})" for name in RECORDED if name not in self.stored]
        if not calls:
            return ""
        return f"{len(calls)} section{'s are' if len(calls) > 1 else ' is'} missing: {', '.join(calls)}."

    def build(self, out=None) -> tuple[Path, Path]:
        """Write the page and the notebook from the record and from what the student has written; returns their paths.

        out: the page's file; default, report.html in the folder. Cells that the student wrote, split, moved or changed stay in the notebook.
        Raises UserError where the notebook there cannot be read: nothing is written then.
        """
        notebook, facts = self._notebook(), self._facts()
        page = Path(out) if out else self.folder / PAGE
        made = _with_cells(notebook, self.stored, facts)
        import nbformat

        self.folder.mkdir(parents=True, exist_ok=True)
        page.parent.mkdir(parents=True, exist_ok=True)
        _write(self.folder / NOTEBOOK, nbformat.writes(made) + "\n")
        _write(page, _page(self.stored, facts, _written(made)))
        return page, self.folder / NOTEBOOK

    def check(self, page=None) -> list[str]:
        """What is not as it should be, a sentence each; an empty list where only a person's judgement is left (see `rubric`).

        Looked at: every section there; episodes, intervals, accuracy, conditions and response times given; dataset and run as they still are;
        the notebook's numbers and the page those of the record; every gap filled.   page: its file, where `build` was given one.
        """
        page, path = Path(page) if page else self.folder / PAGE, self.folder / NOTEBOOK
        notebook, facts, found = self._notebook(), self._facts(), []
        for name in RECORDED:
            with self._reading(name):
                found += _lacking(name, self.stored.get(name))
        if not path.is_file() or not page.is_file():
            return [*found, f"{(path if not path.is_file() else page).name} is not there yet: report.build() makes it"]
        wanted, cells = dict(_blocks(self.stored, facts)), _sorted(notebook)
        for name in wanted:
            if not any(_is_ours(cell, name) and cell["source"] == wanted[name][0] for cell in notebook["cells"]):
                found.append(f"{NOTEBOOK}, {_titled(name)}: its facts are not those of {RECORD}: report.build() puts them back")
        words = {name: _words(cells.get(("gap", name), [])) for name in PARTS}
        found += [f"{NOTEBOOK}, {part.title}: {words[name]} of at least {part.words} words are written" for name, part in PARTS.items()
                  if words[name] < part.words]
        if _without_pictures(page.read_text(encoding="utf-8")) != _without_pictures(_page(self.stored, facts, _written(notebook))):
            found.append(f"{page.name} does not say what {RECORD} and {NOTEBOOK} say: report.build() makes it again")
        return found

    def _record(self, name, facts):
        try:
            json.dumps(facts, allow_nan=False)
        except ValueError as error:
            raise UserError(f"{name} holds a number that is not finite, which no report can show: look for NaN in what was given") from error
        self.stored[name] = facts
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(self.folder / RECORD, json.dumps(self.stored, indent=1, allow_nan=False) + "\n")

    def _notebook(self):
        """The student's notebook, or an empty one."""
        import nbformat

        path = self.folder / NOTEBOOK
        if not path.is_file():
            return nbformat.v4.new_notebook(metadata={
                "kernelspec": {"name": "python3", "display_name": "Python 3 (ipykernel)"}, "language_info": {"name": "python"}})
        try:
            notebook = nbformat.read(path, as_version=4)
            nbformat.validate(notebook)
        except Exception as error:  # nbformat has its own kinds, and jsonschema's, beside JSON's
            raise UserError(f"{path} is no readable notebook ({' '.join(str(error).split())[:120]}): mend it, or move it away to begin with an empty "
                            f"one; nothing was written over it") from error
        return notebook

    def _facts(self):
        """Section -> what is shown of it; for one that is missing, nothing."""
        shown = {}
        for name in RECORDED:
            with self._reading(name):
                shown[name] = _SHOWN[name](self.stored[name]) if name in self.stored else []
        return shown

    @contextmanager
    def _reading(self, name):
        """Raises UserError where the record has a section that cannot be read."""
        try:
            yield
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise UserError(f"{self.folder / RECORD}, section {name!r} is not as LabReport writes it ({error!r}): record it again, "
                            f"report.{PARTS[name].call}") from error


def rubric() -> str:
    """What goes to a person, with the points: the words themselves."""
    lines = [f"For a person to judge, {sum(part.points for part in PARTS.values())} points:"]
    for part in PARTS.values():
        lines += [f"{part.title} ({part.points} points)", *(f"  {points}: {criterion}" for points, criterion in part.rubric)]
    return "\n".join(lines)


# What is recorded


def dataset_facts(folder) -> dict:
    """What a dataset without errors holds.

    splits: name -> episodes, successes, decisions.   kinds: task (LeRobot: instruction) -> episodes.   operators: who demonstrated -> episodes;
    empty where the dataset does not say.   kilobytes: of content.
    """
    from labkit import demonstrations, lerobot

    if not lerobot.is_lerobot(folder):
        entries = [entry for split in demonstrations.SPLITS
                   for entry in demonstrations.read_json(Path(folder) / split / demonstrations.LANGUAGE, missing=[])]
        kinds, operators = (Counter(str(entry[key]) for entry in entries) for key in ("task", "operator"))
        return {"splits": demonstrations.counts(folder), "kinds": dict(kinds), "operators": dict(operators), "kilobytes": _kilobytes(folder)}
    splits, kinds = {}, Counter()
    for episode in lerobot.read(folder, failures=True).episodes:
        counts = splits.setdefault(episode.split, {"episodes": 0, "successes": 0, "decisions": 0})
        counts["episodes"] += 1
        counts["successes"] += int(episode.success)
        counts["decisions"] += len(episode)
        kinds[episode.instruction] += 1
    return {"splits": splits, "kinds": dict(kinds), "operators": {}, "kilobytes": _kilobytes(folder)}


def _validated(folder):
    from labkit import dataset_check, lerobot

    return (lerobot if lerobot.is_lerobot(folder) else dataset_check).validate(folder)


def _kilobytes(folder):
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()) / 1000


def _paired(where, a, b):
    try:
        return compare(a, b)
    except ValueError as error:
        raise UserError(f"{where}: {error}; give both policies the same seeds") from error


def _run_facts(run):
    """Rollouts as JSON has them, every episode of them; NaN is null."""
    columns = {"success": run.success.astype(int), "seeds": run.seeds, "decisions": run.decisions, "position_error": run.position_error,
               "milliseconds": run.milliseconds}
    return {"task": run.task, "seconds": float(run.seconds),
            **{name: [None if value != value else value for value in np.asarray(column).tolist()] for name, column in columns.items()}}


def _run(facts):
    columns = {name: np.array([np.nan if value is None else value for value in facts[name]], kind)
               for name, kind in (("success", bool), ("seeds", int), ("decisions", int), ("position_error", float), ("milliseconds", float))}
    episodes = len(columns["success"])
    if not set(facts["success"]) <= {0, 1} or any(len(columns[name]) != episodes for name in ("seeds", "decisions", "position_error")):
        raise ValueError(f"{episodes} episodes, not all of them told whole")
    return Rollouts(facts["task"], seconds=facts["seconds"], **columns)


def _read_record(path):
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["format"] != FORMAT or not isinstance(stored["title"], str) or not isinstance(stored["author"], str):
            raise ValueError(f"its format is {stored['format']!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no record of a lab report ({error}): put a good copy back, or remove it and record the sections again") from error
    return stored


# What is shown


def _show_dataset(stored):
    counts = stored["splits"]
    rows = [(split, *(f"{c[key]:,}" for key in ("episodes", "successes", "decisions"))) for split, c in counts.items()]
    total = [sum(c[key] for c in counts.values()) for key in ("episodes", "successes", "decisions")]
    kinds = Counter(stored["kinds"]).most_common()
    others = kinds[_MOST_KINDS:]
    kinds = kinds[:_MOST_KINDS] + ([(f"{len(others)} others", sum(n for _, n in others))] if others else [])
    state = f"{stored['errors']:,} errors, {stored['warnings']:,} warnings"
    return [
        Table("Recorded, by split", ("Split", "Episodes", "Successful", "Decisions"), [*rows, ("all", *(f"{n:,}" for n in total))]),
        Table("Kinds of task", ("Kind", "Episodes"), [(kind, f"{count:,}") for kind, count in kinds]),
        Table("The dataset itself", ("", ""), [("name", stored["name"]), ("size", f"{stored['kilobytes']:,.1f} kB"), ("validation", state),
                                               *(("demonstrated by", f"{who}: {count:,} episodes") for who, count in stored["operators"].items()),
                                               *(("error", problem) for problem in stored["problems"])]),
    ]


def _show_training(stored):
    from labkit.waypoint_regression import Curves

    curves = Curves(**stored["curves"])
    best = curves.best_epoch
    rates = ", ".join(f"{name} {rate:g}" for name, rate in curves.rates[0].items()) if curves.rates else "not known"
    rows = [
        ("epochs", f"{len(curves.train):,}{' (stopped early)' if curves.stopped_early else ''}"), ("time", f"{curves.seconds:,.1f} s"),
        ("parameters trained", f"{curves.trainable:,} of {curves.total:,}"), ("learning rates at first", rates),
        ("training loss, first and last epoch", f"{curves.train[0]:.4f} and {curves.train[-1]:.4f}"),
        ("lowest validation loss", f"{curves.validation[best]:.4f} in epoch {best}"), ("validation loss, last epoch", f"{curves.validation[-1]:.4f}"),
    ]
    settings = [(name, "none" if value is None else str(value)) for name, value in stored["settings"].items()]
    alt = (f"Training and validation loss over {len(curves.train)} epochs: training from {curves.train[0]:.4f} to {curves.train[-1]:.4f}, "
           f"validation from {curves.validation[0]:.4f} to {curves.validation[-1]:.4f}, lowest {curves.validation[best]:.4f} in epoch {best}.")
    return [Table("Hyperparameters", ("Setting", "Value"), settings), Table("The run", ("", ""), rows),
            Picture("curves", _drawn(lambda: _draw_curves(curves)), alt)]


def _show_comparison(stored):
    runs = {where: (_run(row[GENERIC]), _run(row[FINE_TUNED])) for where, row in stored["rows"].items()}
    rows = []
    for where, (a, b) in runs.items():
        c = compare(a, b)
        rows.append((where, f"{c.episodes:,}", _rate(a), _rate(b), f"{100 * c.difference:+.1f} ({100 * c.low:+.1f} to {100 * c.high:+.1f})",
                     f"{c.p:.3g}"))
    alt = "Success with 95 % intervals. " + " ".join(
        f"{where}: {GENERIC} {_percent(a.rate)}, {FINE_TUNED} {_percent(b.rate)} of {len(a.success)} episodes." for where, (a, b) in runs.items())
    shown = [
        Table("Success in closed loop on the same episodes, with 95 % intervals; the difference in percentage points, p by McNemar's exact test",
              ("Where", "Episodes", "Generic", "Fine-tuned", "Difference", "p"), rows),
        Picture("success", _drawn(lambda: _draw_success(runs)), alt),
    ]
    if stored["accuracy"] is not None:
        a, b = (stored["accuracy"][who] for who in (GENERIC, FINE_TUNED))
        shown.append(Table(f"Mean absolute error of each axis of the action, on {stored['accuracy']['decisions']:,} decisions",
                           ("Axis", "Generic", "Fine-tuned"), [(axis, _measure(axis, **a[axis]), _measure(axis, **b[axis])) for axis in a]))
    times = [(who, *_times(np.concatenate([pair[n].milliseconds for pair in runs.values()]))) for n, who in enumerate((GENERIC, FINE_TUNED))]
    return [*shown, Table("Response time of one decision alone", ("Policy", "Measurements", "Median", "95th percentile"), times)]


def _show_integration(stored):
    answers = {"answered": 0, "refused (4xx)": 0, "failed (5xx)": 0}
    for status, count in stored["answers"].items():
        answers[next((name for name, digit in (("refused (4xx)", "4"), ("failed (5xx)", "5")) if status.startswith(digit)), "answered")] += count
    rows = [
        ("policy", stored["policy"]), *((f"requests {name}", f"{count:,}") for name, count in answers.items()),
        ("decisions", f"{stored['decisions']:,}"),
        ("response time in the server, median", f"{1000 * stored['p50']:.1f} ms"),
        ("response time in the server, 95th percentile", f"{1000 * stored['p95']:.1f} ms"), ("deadline", f"{1000 * stored['deadline']:g} ms"),
        ("deadlines missed", f"{stored['misses']:,} ({_percent(stored['misses'] / stored['decisions'])})"),
        ("drift alarms", f"{len(stored['alarms']):,}"), *(("alarm", text) for text in stored["alarms"][-_MOST_PROBLEMS:]),
    ]
    alone, served = _run(stored["alone"]), _run(stored["served"])
    both = [(who, f"{len(run.success):,}", _rate(run), *_times(run.milliseconds))
            for who, run in (("asked directly", alone), ("through the server", served))]
    return [Table("The server", ("", ""), rows),
            Table(f"The same policy on the same episodes of {served.task}",
                  ("How", "Episodes", "Success (95 % interval)", "Times measured", "Median", "95th percentile"), both)]


_SHOWN = {"dataset": _show_dataset, "training": _show_training, "comparison": _show_comparison, "integration": _show_integration}


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
    if not len(milliseconds):
        return "0", "not measured", "not measured"
    return f"{len(milliseconds):,}", *(f"{value:.1f} ms" for value in np.percentile(milliseconds, [50, 95]))


def _drawn(draw):
    """The figure that draw() makes, as a PNG file; nothing of the look stays behind."""
    import matplotlib.pyplot as plt

    from labkit.plots import style

    with plt.rc_context():
        style()
        figure = draw()
        file = io.BytesIO()
        figure.savefig(file, format="png", bbox_inches="tight", metadata={"Software": None})
        plt.close(figure)
    return file.getvalue()


def _draw_curves(curves):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots()
    axes.plot(curves.train, label="training")
    axes.plot(curves.validation, label="validation")
    axes.axvline(curves.best_epoch, color="black", linestyle="--", linewidth=1, marker="", label="weights that are kept")
    axes.set(xlabel="epoch", ylabel="mean loss, normalised actions", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)
    return figure


def _draw_success(runs):
    from labkit.plots import success_points

    # A dollar sign would begin a formula.
    names = {where: fill(_clean(where), 30).replace("$", r"\$") for where in runs}
    return success_points({who: {names[where]: pair[n] for where, pair in runs.items()} for n, who in enumerate((GENERIC, FINE_TUNED))})


# What is checked in a section


def _lacking(name, stored):
    """What a recorded section does not say, or no longer truly says, a sentence each."""
    if stored is None:
        yield f"{_titled(name)}: nothing is recorded, report.{PARTS[name].call} does it"
        return
    yield from (f"{_titled(name)}: {text}" for text in _LACKING[name](stored))


def _lacking_dataset(stored):
    if stored["errors"]:
        yield f"validation finds {stored['errors']} errors; `python -m labkit validate {stored['folder']}` says what mends them"
    elif Path(stored["folder"]).is_dir():
        try:
            there = dataset_facts(stored["folder"])
        except (UserError, KeyError, TypeError, ValueError) as error:
            there = {"splits": f"unreadable: {error}"}
        if any(there.get(key) != stored[key] for key in ("splits", "kinds", "kilobytes")):
            yield f"{stored['folder']} is not what was recorded: record it again"


def _lacking_training(stored):
    from labkit.waypoint_regression import STATE

    path = Path(stored["folder"] or "") / STATE
    if stored["folder"] is None or not path.is_file():
        return
    import torch

    try:
        state = torch.load(path, weights_only=True)
        curves = json.loads(state["curves"])
    except Exception as error:  # torch, pickle and zip have a dozen kinds for a broken file
        yield f"{path} cannot be read ({type(error).__name__}): run the training again, or record without the folder"
        return
    same = all(curves[key] == stored["curves"][key] for key in ("train", "validation", "best_epoch", "trainable", "total"))
    other = [key for key, value in state.get("settings", {}).items() if stored["settings"].get(key, value) != value]
    if not same:
        yield f"the curves are not those in {path}: record them again"
    if other:
        yield f"{', '.join(other)} is not what {path} was made with: record the run again"


def _lacking_comparison(stored):
    few = [f"{where} ({len(row[GENERIC]['success'])})" for where, row in stored["rows"].items() if len(row[GENERIC]["success"]) < FEWEST_EPISODES]
    if few:
        yield f"fewer than {FEWEST_EPISODES} episodes in {', '.join(few)}: an interval of so few says nothing"
    if len(stored["rows"]) < 2:
        yield "one condition only: robustness needs a second, robustness.under(policy, task, condition)"
    if stored["accuracy"] is None:
        yield "action accuracy is missing: comparison(generic, fine_tuned, accuracy, decisions)"
    if not all(len(run["milliseconds"]) for row in stored["rows"].values() for run in row.values()):
        yield "response times are missing: rollout measures them"


def _lacking_integration(stored):
    if len(stored["served"]["success"]) < FEWEST_EPISODES:
        yield f"fewer than {FEWEST_EPISODES} episodes ({len(stored['served']['success'])}) ran through the server"
    if not len(stored["served"]["milliseconds"]) or not len(stored["alone"]["milliseconds"]):
        yield "response times are missing: rollout measures them"


_LACKING = {"dataset": _lacking_dataset, "training": _lacking_training, "comparison": _lacking_comparison, "integration": _lacking_integration}


# The notebook: our cells, made anew each time, and the student's, which are kept


def _titled(name):
    return PARTS[name].title if name in PARTS else "the title"


def _blocks(stored, facts):
    """(name, (Markdown, pictures)) of the cells that we make, in their order; after each that has a gap comes the gap."""
    author = f"\n\n{_markdown(stored['author'])}" if stored["author"] else ""
    yield "title", (f"# {_markdown(stored['title'])}{author}\n\nNumbers come from `{RECORD}`; words are yours. Write where it says {GAP}, save, and "
                    f"run `python -m labkit report` on this folder.", [])
    for name, part in PARTS.items():
        shown = facts.get(name, [])
        lines = [f"## {part.title}"]
        if part.call and not shown:
            lines.append(f"**Not recorded yet:** `report.{part.call}` does it.")
        for piece in shown:
            lines.append(_markdown_table(piece) if isinstance(piece, Table) else f"![{_markdown(piece.alt)}](attachment:{piece.name}.png)")
        lines.append(f"*{part.prompt} At least {part.words} words.*")
        yield name, ("\n\n".join(lines), [piece for piece in shown if isinstance(piece, Picture)])


def _markdown(text):
    """A text as Markdown shows it: what could mean something to Markdown, HTML or MathJax becomes an entity."""
    return re.sub(r"[^\w\s.,:;%+\-=/()'°]", lambda mark: f"&#{ord(mark.group())};", _clean(str(text)).replace("\n", " "))


def _markdown_table(table):
    rows = [table.head, ["---"] + ["---:" if len(table.head) > 2 else "---"] * (len(table.head) - 1)]
    rows += [[_markdown(cell) for cell in row] for row in table.rows]
    return f"**{_markdown(table.caption)}**\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _about(cell):
    """("part" or "gap", name) of a cell that we made, or None."""
    ours = cell["metadata"].get(_OURS)
    for kind in ("part", "gap"):
        if isinstance(ours, Mapping) and isinstance(ours.get(kind), str) and ours[kind] in (*PARTS, "title"):
            return kind, ours[kind]
    return None


def _is_ours(cell, name=None):
    """Whether a cell shows facts and is as we made it."""
    about = _about(cell)
    return about is not None and about[0] == "part" and name in (None, about[1]) and cell["metadata"][_OURS].get("digest") == _digest(cell["source"])


def _digest(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _sorted(notebook):
    """What is kept of a notebook: ("gap", name) -> its cells, and ("after", what stands before) -> cells that the student added or changed."""
    found, before = {}, ("part", "title")
    for cell in notebook["cells"]:
        about = _about(cell)
        before = about or before
        if about and about[0] == "gap":
            found.setdefault(about, []).append(cell)
        elif not _is_ours(cell):
            found.setdefault(("after", before), []).append(cell)
    return found


def _with_cells(notebook, stored, facts):
    """A notebook with our cells made anew and all others kept, each after what it stood after."""
    import nbformat

    kept, cells = _sorted(notebook), []

    def keep(place):
        for cell in kept.get(("after", place), []):
            for name in (_OURS, "editable", "deletable"):  # a cell of ours that the student changed is the student's
                cell["metadata"].pop(name, None)
            cells.append(cell)

    for name, (source, pictures) in _blocks(stored, facts):
        about = {_OURS: {"part": name, "digest": _digest(source)}, "editable": False, "deletable": False}
        cell = nbformat.v4.new_markdown_cell(source, id=f"part-{name}", metadata=about)
        if pictures:
            cell["attachments"] = {f"{p.name}.png": {"image/png": base64.b64encode(p.data).decode()} for p in pictures}
        cells.append(cell)
        keep(("part", name))
        if name in PARTS:
            gap = nbformat.v4.new_markdown_cell(GAP, id=f"gap-{name}", metadata={_OURS: {"gap": name}, "deletable": False})
            cells += kept.get(("gap", name), [gap])
            keep(("gap", name))
    _name_apart(cells)
    made = nbformat.v4.new_notebook(cells=cells, metadata=notebook["metadata"])
    nbformat.validate(made)
    return made


def _name_apart(cells):
    """Give every cell an id of its own, ours first."""
    taken = {cell["id"] for cell in cells if _is_ours(cell)}
    for number, cell in enumerate(cells):
        if not _is_ours(cell):
            name = cell.get("id", "cell")
            while name in taken:
                name = f"{name[:50]}-{number}"
            cell["id"] = name
            taken.add(name)


def _written(notebook):
    """Section -> what the student has written there, in the order of the notebook; "title" for what stands before all."""
    found = {}
    for (kind, place), cells in _sorted(notebook).items():
        name = place if kind == "gap" else place[1]
        found.setdefault(name, []).extend(cell["source"].replace(GAP, "").strip() for cell in cells)
    return {name: [text for text in texts if text] for name, texts in found.items()}


def _words(cells: Iterable) -> int:
    return len(re.findall(r"\w+", " ".join(cell["source"] for cell in cells).replace(GAP, " ")))


# The page

_STYLE = """
:root { color-scheme: light; }
body { font: 1rem/1.5 system-ui, sans-serif; color: #111; background: #fff; margin: 0; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .5rem; border-bottom: 1px solid #767676; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; overflow-wrap: normal; }
caption { text-align: left; font-weight: bold; }
th, td { text-align: left; vertical-align: top; padding: .25rem 1.2rem .25rem 0; border-bottom: 1px solid #bbb; }
tbody th { font-weight: normal; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; }
.prompt { color: #444; font-style: italic; }
.words { white-space: pre-wrap; border-left: 4px solid #0072B2; padding: .1rem 0 .1rem .9rem; margin: .6rem 0; }
.gap { border: 2px dashed #A33; padding: .5rem .9rem; }
@media print { main { max-width: none; padding: 0; } tr, figure { break-inside: avoid; } h2 { break-after: avoid; } }
"""
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<meta name="referrer" content="no-referrer">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ stored.title }}</title>
<style>{{ style }}</style>
</head>
<body>
<main>
<h1>{{ stored.title }}</h1>
{% if stored.author %}<p><bdi>{{ stored.author }}</bdi></p>{% endif %}
{% for text in written.get("title", []) %}
<div class="words" dir="auto">{{ text }}</div>
{% endfor %}
{% for name, part in parts.items() %}
<section id="{{ name }}">
<h2>{{ part.title }}</h2>
{% if part.call and not facts[name] %}<p class="gap">Not recorded: report.{{ part.call }} does it.</p>{% endif %}
{% for piece in facts.get(name, []) %}
{% if piece.data is defined %}
<figure><img src="data:image/png;base64,{{ coded(piece.data) }}" alt="{{ piece.alt }}"></figure>
{% else %}
<div class="wide" tabindex="0" role="region" aria-label="{{ piece.caption }}"><table>
<caption>{{ piece.caption }}</caption>
{% if piece.head | join %}
<thead><tr>
{% for label in piece.head %}
<th scope="col"{% if not loop.first and piece.head | length > 2 %} class="number"{% endif %}>{{ label }}</th>
{% endfor %}
</tr></thead>
{% endif %}
<tbody>
{% for row in piece.rows %}
<tr><th scope="row"><bdi>{{ row[0] }}</bdi></th>
{% for cell in row[1:] %}
<td{% if piece.head | length > 2 %} class="number"{% endif %}><bdi>{{ cell }}</bdi></td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table></div>
{% endif %}
{% endfor %}
<p class="prompt">{{ part.prompt }}</p>
{% for text in written.get(name, []) %}
<div class="words" dir="auto">{{ text }}</div>
{% else %}
<p class="gap">Nothing is written here yet.</p>
{% endfor %}
</section>
{% endfor %}
</main>
</body>
</html>
"""


def _page(stored, facts, written):
    """The report as HTML that needs nothing else; whatever is put in is cleaned and escaped."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined,
                              finalize=lambda value: _clean(value) if type(value) is str else value)
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    return environment.from_string(_PAGE).render(
        stored=stored, facts=facts, written=written, parts=PARTS, style=Markup(_STYLE), policy=Markup(policy),
        coded=lambda data: Markup(base64.b64encode(data).decode()))


def _clean(text):
    """A text without control characters and marks that turn the direction of writing; lines stay lines."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text.replace("\r\n", "\n").replace("\t", "    "))


def _without_pictures(page):
    """Pictures have the same look, and not the same bytes, under every version of matplotlib."""
    return re.sub(r'src="data:[^"]*"', "", page)


def _write(path, text):
    """Put the whole file in place at once: a killed write leaves the one that was there."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
