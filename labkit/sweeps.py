"""Stored experiments: run every point of one over several processes, keep it with its provenance, read it back.

What an experiment measures is in labkit/experiments/, one file each, with `ABOUT`, `points()`, `run(point)` and, where the points share
something that is made first, `prepare()`.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import date
from importlib import import_module
from importlib.metadata import version
from multiprocessing import get_context, parent_process
from pathlib import Path
from pkgutil import iter_modules

import numpy as np

from labkit.errors import UserError
from labkit.paths import DATA
from labkit.rollouts import wilson

STORED = DATA / "sweeps"
UNFINISHED = DATA / ".cache" / "sweeps"
# Modules among the experiments that several of them share.
_NOT_EXPERIMENTS = {"measuring"}
_VERSIONS = ("torch", "transformers", "peft", "mujoco", "numpy")


@dataclass(frozen=True)
class AcrossSeeds:
    """A success rate over seeds.   rate: the mean.   interval: 95 %, see `Sweep.success`.   seeds: how many."""

    rate: float
    interval: tuple[float, float]
    seeds: int

    def __str__(self):
        low, high = self.interval
        return f"{100 * self.rate:.0f} % ({100 * low:.0f} to {100 * high:.0f} %, {self.seeds} seed{'s' * (self.seeds > 1)})"


@dataclass(frozen=True)
class Sweep:
    """A stored experiment.   about: its provenance, see `provenance`.   points: one dict each, settings and results together."""

    name: str
    about: dict
    points: list[dict]

    def where(self, **settings) -> list[dict]:
        """The points with these settings.   Raises KeyError where there are none."""
        found = [point for point in self.points if all(point.get(name) == value for name, value in settings.items())]
        if not found:
            raise KeyError(f"sweep {self.name} has no point with {settings}")
        return found

    def values(self, result: str, **settings) -> np.ndarray:
        """(number of seeds,) one result of all points with these settings; `a.b` reads b inside a."""
        return np.array([_inside(point, result) for point in self.where(**settings)])

    def success(self, count: str, of: str = "episodes", **settings) -> AcrossSeeds:
        """Mean success over the seeds with these settings.   count, of: results that hold the number of successes and of episodes.

        The interval is the t-interval over seeds, widened to Wilson's over all episodes where that is wider: seeds that happen to agree
        (five times 0 of 100) do not make a rate certain. What no seed decides was measured once: it has Wilson's.
        """
        successes, episodes = self.values(count, **settings), self.values(of, **settings)
        lowest, highest = wilson(int(successes.sum()), int(episodes.sum()))
        if len(successes) == 1:
            return AcrossSeeds(float(successes[0] / episodes[0]), (lowest, highest), 1)
        mean, low, high = mean_interval(successes / episodes)
        return AcrossSeeds(mean, (min(low, lowest), max(high, highest)), len(successes))


def mean_interval(values) -> tuple[float, float, float]:
    """Mean over seeds with its 95 % t-interval, for a share: cut off at 0 and 1.   Raises ValueError for fewer than two values."""
    from scipy.stats import t

    values = np.asarray(values, float)
    if len(values) < 2:
        raise ValueError("an interval over seeds needs at least two of them")
    half = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    mean = values.mean()
    return float(mean), float(max(0.0, mean - half)), float(min(1.0, mean + half))


def _inside(point, path):
    for name in path.split("."):
        point = point[name]
    return point


def names() -> list[str]:
    """The experiments there are."""
    import labkit.experiments as experiments

    return sorted({module.name for module in iter_modules(experiments.__path__)} - _NOT_EXPERIMENTS)


def experiment(name: str):
    """The module of an experiment.   Raises UserError for an unknown name."""
    if name not in names():
        raise UserError(f"there is no sweep {name!r}; there are {', '.join(names())}")
    return import_module(f"labkit.experiments.{name}")


def load_sweep(name: str, folder: Path = STORED) -> Sweep:
    """Read a stored experiment.   Raises UserError if it was never run here."""
    path = Path(folder) / f"{name}.json"
    if not path.exists():
        raise UserError(f"{path} does not exist: `python3 -m labkit sweep {name}` makes it.")
    stored = json.loads(path.read_text(encoding="utf-8"))
    return Sweep(name, stored["about"], stored["points"])


def run_sweep(name: str, processes: int = 2, folder: Path = STORED, progress: bool = True) -> Path:
    """Run what is missing of an experiment and store it; killed at any moment, the next call goes on with the points that are left.

    processes: how many points at a time, each on one thread.   Returns the file.   Raises UserError if a process dies.
    """
    from tqdm.auto import tqdm

    module = experiment(name)
    points = module.points()
    log = UNFINISHED / f"{name}-{_identity(module, points)}.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    done = _finished(log)
    missing = [point for point in points if _key(point) not in done]
    if missing:
        getattr(module, "prepare", lambda: None)()
    with tqdm(total=len(points), initial=len(points) - len(missing), desc=name, unit="point", disable=not progress) as bar:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_prepare) as pool:
            waiting = {pool.submit(module.run, point): point for point in missing}
            try:
                for future in as_completed(waiting):
                    point = waiting[future]
                    done[_key(point)] = future.result()
                    _append(log, point, done[_key(point)])
                    bar.update()
            except BrokenProcessPool:
                raise UserError(f"a process of the sweep died (out of memory?); {len(done)} of {len(points)} points are kept: "
                                "run the same command again, with fewer --processes.") from None
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    path = _store(name, [{**point, **done[_key(point)]} for point in points], Path(folder))
    log.unlink(missing_ok=True)
    return path


def provenance(name: str) -> dict:
    """Where a result comes from: what it measures, the command, the date, versions, machine and the freeze hash."""
    from labkit.freeze import freeze_hash

    return {
        "measures": experiment(name).ABOUT,
        "command": f"python3 -m labkit sweep {name}",
        "date": date.today().isoformat(),
        "freeze": freeze_hash(),
        "versions": _versions(),
        "machine": f"{platform.system()} {platform.machine()}, one thread a point",
    }


def _versions():
    return {"python": platform.python_version(), **{package: version(package) for package in _VERSIONS}}


def _prepare():
    """In a new process: one thread, and no life beyond the sweep's, however that ends."""
    import torch

    from labkit.quiet import quiet_libraries

    torch.set_num_threads(1)
    quiet_libraries()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    parent_process().join()
    os._exit(1)


def _key(point):
    return json.dumps(point, sort_keys=True)


def _identity(module, points):
    """Changes with the grid, the experiment's code, the versions and what the freeze covers: only results of the same kind share a log."""
    from labkit.freeze import freeze_hash

    parts = [freeze_hash(), json.dumps(_versions()), Path(module.__file__).read_text(encoding="utf-8"), *map(_key, points)]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:8]


def _finished(log):
    """Settings -> settings and results of the points in the log; a last line that was cut off is left out."""
    done = {}
    if log.exists():
        for line in log.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            done[_key(entry["point"])] = entry["result"]
    return done


def _append(log, point, result):
    with open(log, "a", encoding="utf-8") as file:
        # Starts with a line end: whatever a killed run left half-written stays a line of its own.
        file.write("\n" + json.dumps({"point": point, "result": result}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _store(name, points, folder):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    unfinished = path.with_suffix(".unfinished")
    lines = ",\n".join("  " + json.dumps(point) for point in points)
    unfinished.write_text(f'{{"about": {json.dumps(provenance(name), indent=1)},\n "points": [\n{lines}\n]}}\n', encoding="utf-8")
    os.replace(unfinished, path)
    return path
