"""The record of a lab report, report.json: what is kept of a dataset, a run, two policies and a server. How it is shown is in tables.py."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from labkit.errors import UserError
from labkit.rollouts import Rollouts, compare

RECORD, FORMAT = "report.json", "labkit lab report 1"
GENERIC, FINE_TUNED = "generic", "fine-tuned"
_MOST_PROBLEMS = 10


def read_record(path: Path) -> dict:
    """What was recorded, or an empty record where there is no file.   Raises UserError where it cannot be read."""
    if not path.exists():
        return {"format": FORMAT, "author": ""}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        _as_json(stored)
        if stored["format"] != FORMAT or not isinstance(stored["author"], str):
            raise ValueError(f"its format is {stored['format']!r}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is no record of a lab report ({error}): put a good copy back, or remove it and record the sections again") from error
    return stored


def write_record(path: Path, stored: dict) -> None:
    """Keep the record.   Raises UserError for a number that is not finite; what was there stays."""
    try:
        text = _as_json(stored)
    except ValueError as error:
        raise UserError("there is a number that is not finite, which no report can show: look for NaN in what was given") from error
    replace_text(path, text + "\n")


def _as_json(stored):
    return json.dumps(stored, indent=1, allow_nan=False)


def replace_text(path: Path, text: str) -> None:
    """Put the whole file in place at once: a killed write leaves the one that was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def of_dataset(folder) -> dict:
    """splits: name -> episodes, successes, decisions.   tasks (LeRobot: instructions), operators: name -> episodes.   errors, warnings: how many.

    A dataset with errors is not counted.   Raises UserError where there is none.
    """
    from labkit import dataset_check, demonstrations, lerobot

    foreign = lerobot.is_lerobot(folder)
    problems = (lerobot if foreign else dataset_check).validate(folder)
    errors = [str(problem) for problem in problems if not problem.warning]
    episodes = []
    if not errors:
        episodes = lerobot.read(folder, failures=True).episodes if foreign else demonstrations.read(folder, failures=True)
    splits = {}
    for split in dict.fromkeys(episode.split for episode in episodes):
        own = [episode for episode in episodes if episode.split == split]
        splits[split] = {"episodes": len(own), "successes": sum(bool(e.success) for e in own), "decisions": sum(map(len, own))}
    return {"folder": str(Path(folder).resolve()), "digest": digest_of_folder(folder), "splits": splits,
            "tasks": Counter(e.instruction if foreign else e.task for e in episodes),
            "operators": Counter("" if foreign else e.operator for e in episodes),
            "errors": len(errors), "warnings": len(problems) - len(errors), "problems": errors[:_MOST_PROBLEMS]}


def digest_of_folder(folder) -> str:
    """One hash over the names and the content of all files, but for hidden ones."""
    found, folder = hashlib.sha256(), Path(folder)
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            with path.open("rb") as file:
                found.update(f"{path.relative_to(folder).as_posix()} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return found.hexdigest()


def of_run(folder) -> dict:
    """The curves and the settings that `waypoint_regression.fit` keeps in a folder.   Raises UserError where it has kept none."""
    import torch

    from labkit.waypoint_regression import STATE

    path = Path(folder) / STATE
    try:
        state = torch.load(path, weights_only=True)
        run = {"curves": json.loads(state["curves"]), "settings": dict(state["settings"])}
    except FileNotFoundError:
        raise UserError(f"{path} is missing: train with fit(..., folder={str(folder)!r}), which keeps the run there") from None
    except Exception as error:  # torch, pickle and zip have a dozen kinds for a broken file
        raise UserError(f"{path} cannot be read ({type(error).__name__}): run the training again") from error
    return run


def of_training(folder, others: Mapping) -> dict:
    """folder, curves and settings of a run, `others` among them.   Raises UserError for one that is not plain or not what the run had."""
    run = of_run(folder)
    for name, value in others.items():
        if not isinstance(value, (str, int, float, bool, type(None))):
            raise UserError(f"{name} is {type(value).__name__}: a setting is a number, a text or None")
        if run["settings"].get(name, value) != value:
            raise UserError(f"{folder} was trained with {name} {run['settings'][name]}, not {value}: leave it out, or name the other run's folder")
    return {**run, "settings": {**run["settings"], **others}, "folder": str(Path(folder).resolve())}


def of_comparison(generic: Mapping, fine_tuned: Mapping, accuracy, decisions: int) -> dict:
    """rows: where -> both policies' rollouts.   accuracy: both policies' errors and the number of decisions they are of.   See `LabReport`."""
    if list(generic) != list(fine_tuned) or not generic:
        raise UserError(f"the generic policy ran {', '.join(generic) or 'nothing'}, the fine-tuned one {', '.join(fine_tuned) or 'nothing'}: "
                        f"run both everywhere")
    if list(accuracy[0]) != list(accuracy[1]) or decisions < 1:
        raise UserError("accuracy is of the same axes for both policies, on at least one decision: "
                        "comparison(..., accuracy=(action_accuracy(generic, samples), action_accuracy(fine_tuned, samples)), decisions=len(samples))")
    rows = {str(where): dict(zip((GENERIC, FINE_TUNED), _of_pair(where, generic[where], fine_tuned[where]))) for where in generic}
    return {"rows": rows, "accuracy": {GENERIC: accuracy[0], FINE_TUNED: accuracy[1], "decisions": decisions}}


def of_integration(server, served: Rollouts, alone: Rollouts) -> dict:
    """What the server's monitor and counters say, and the same episodes through it and without it.   See `LabReport`."""
    seen = server.core.monitor.look()
    if not seen.decisions:
        raise UserError("the server has decided nothing yet: let the robot use it first, rollout(PolicyClient(server.url), task)")
    answers = {sample.labels["status"]: int(sample.value) for metric in server.registry.collect() for sample in metric.samples
               if sample.name == "labkit_http_answers_total" and sample.labels["path"] == "/act"}
    alone, served = _of_pair("integration", alone, served)
    return {"policy": server.core.name, "answers": answers, "decisions": seen.decisions, "misses": seen.misses, "deadline": seen.deadline,
            "p50": seen.p50, "p95": seen.p95, "alarms": [str(alarm) for alarm in seen.alarms], "served": served, "alone": alone}


def _of_pair(where, *runs):
    """Two policies on the same episodes, as JSON has them."""
    try:
        compare(*runs)
    except ValueError as error:
        raise UserError(f"{where}: {error}; give both policies the same seeds") from error
    if not all(len(run.milliseconds) for run in runs):
        raise UserError(f"{where}: response times are missing: take runs of `rollout`, which measures them")
    return [{name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(run).items()} for run in runs]


def rollouts_of(facts: dict) -> Rollouts:
    """The rollouts that were recorded.   Raises KeyError, TypeError or ValueError where they are not whole."""
    columns = {name: np.array(facts[name]) for name in ("success", "seeds", "decisions", "position_error")}
    if columns["success"].dtype != bool or len({column.shape for column in columns.values()}) > 1:
        raise ValueError(f"{len(facts['success'])} episodes, not all of them told whole")
    return Rollouts(facts["task"], seconds=facts["seconds"], milliseconds=np.array(facts["milliseconds"], float), **columns)
