"""The last cell of a lesson: what a grader's fresh process makes of the saved notebook, told to the student beforehand."""

from __future__ import annotations

import inspect
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from labkit.exercises.exercise import all_exercises, exercises_of
from labkit.exercises.judging import CORRECT, NOT_ATTEMPTED, Verdict
from labkit.submission.apart import examine
from labkit.submission.cells import cells_of, exercise_ids_of, read_notebook


@dataclass(frozen=True)
class Receipt:
    """What became of one saved notebook.   digest: over the sources that were run.   stale: exercises that were changed after saving."""

    notebook: str
    saved: datetime
    verdicts: list[Verdict]
    digest: str
    seconds: float
    stale: tuple[str, ...] = ()

    def __str__(self):
        attempted = [v for v in self.verdicts if v.status != NOT_ATTEMPTED]
        correct = [v for v in self.verdicts if v.status == CORRECT]
        lines = [f"{self.notebook}, saved {self.saved:%Y-%m-%d %H:%M:%S}; its set-up cell and exercise cells, "
                 f"run in a fresh process ({self.seconds:.0f} s):"]
        lines += [f"  {verdict}" for verdict in self.verdicts]
        lines.append(f"{len(attempted)} of {len(self.verdicts)} exercises attempted, {len(correct)} pass the public checks, "
                     f"{sum(v.earned for v in self.verdicts)} of {sum(v.points for v in self.verdicts)} points. Digest {self.digest}.")
        if self.stale:
            lines.append(f"What you ran here is not what is saved ({', '.join(self.stale)}): save the notebook (Ctrl+S) and run this cell again.")
        return "\n".join(lines)


def receipt(notebook: str) -> None:
    """Run the saved notebook's set-up cell and exercise cells in a fresh process, exactly as the grader does, and print what it found.

    notebook: the file's name, in the folder of the kernel.   Raises UserError, one sentence, for a file that is no notebook.
    """
    print(make_receipt(Path(notebook), running=_namespace_of_the_kernel()))


def make_receipt(path: Path, running: dict | None = None, progress: bool = True) -> Receipt:
    """The receipt of one saved notebook.   running: the kernel's names, to find cells that were changed after saving."""
    from tqdm.auto import tqdm

    begun, saved = time.perf_counter(), read_notebook(path)
    exercises = exercises_of(path.stem) or [all_exercises()[id] for id in exercise_ids_of(saved)]
    cells = cells_of(saved, [exercise.id for exercise in exercises])
    with tqdm(total=len(exercises), desc="a fresh process", unit="exercise", disable=not progress, leave=False) as bar:
        verdicts = examine(cells, exercises, on_exercise=bar.update)
    stale = tuple(e.id for e in exercises if _was_changed((running or {}).get(e.entry), cells.exercises.get(e.id, "")))
    moment = datetime.fromtimestamp(path.stat().st_mtime)
    return Receipt(path.name, moment, verdicts, cells.digest, time.perf_counter() - begun, stale)


def _namespace_of_the_kernel():
    try:
        from IPython import get_ipython
    except ImportError:
        return None
    shell = get_ipython()
    return shell.user_ns if shell else None


def _was_changed(entry, source):
    """Whether the function or class that the kernel holds has another text than the saved cell."""
    parts = [part for part in vars(entry).values() if inspect.isfunction(part)] if inspect.isclass(entry) else [entry]
    return any(_text_of(part) not in source for part in parts)


def _text_of(function):
    try:
        return inspect.getsource(function).strip()
    except (TypeError, OSError):
        return ""
