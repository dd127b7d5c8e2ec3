"""The side that judges: starts a worker process, holds the limits, runs a notebook's cells in it and asks it cases.

Nothing that comes back from a worker is more than data (labkit/submission/wire.py). This version limits time, memory and size and does not
isolate: it is for one's own notebook. Whatever isolates has to fit behind `Worker`.
"""

from __future__ import annotations

import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields

import psutil

from labkit.exercises.exercise import Case, Exercise, Raised
from labkit.exercises.judging import WRONG, AnswerKey, Verdict, judge_by, printable
from labkit.processes import course_environment
from labkit.submission import wire
from labkit.submission.cells import Cells

_POLL_SECONDS = 0.05
_LAST_WORDS = 20  # lines of the worker's output that are kept
ENDED = "the process ended"  # why a worker is lost that nobody stopped
QUIET = {"MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1"}
_ONLY_THESE = ("Only the set-up cell and the exercises' cells are run, in the order of the page: what this one needs from elsewhere "
               "must be in it.")
# What a case says in words is for the student's eyes after the answer, not for the student's code before it.
_ASKED = ("arguments", "asks", "gradients", "cotangent", "build", "state")


@dataclass(frozen=True)
class Limits:
    """What a worker may use: seconds of wall clock for the set-up cell with its imports, another cell, one case, and a whole notebook; resident
    memory with children."""

    setup_seconds: float = 120.0
    cell_seconds: float = 30.0
    case_seconds: float = 10.0
    memory_mib: int = 4096
    notebook_seconds: float = math.inf


class WorkerLost(Exception):
    """The worker was stopped at a limit, or ended by itself; the message says why."""


class Worker:
    """One worker process, as a context manager. Raises WorkerLost, and stays lost, when a limit is passed or the process ends."""

    def __init__(self, limits: Limits = Limits()):
        self.limits, self.lost, self.closed, self.until = limits, "", threading.Event(), math.inf

    def __enter__(self):
        self.last_words: deque[bytes] = deque(maxlen=_LAST_WORDS)
        self.start()
        self.listen()
        return self

    def __exit__(self, *exception):
        self.closed.set()
        self.stop()
        self.clean_up()

    def start(self):
        """Start the process; sets `requests` (to write), `answers` and `words` (to read), binary files."""
        self.folder = tempfile.TemporaryDirectory(prefix="labkit-worker-", ignore_cleanup_errors=True)
        # -P: a file called numpy.py in the working folder must not be what `import numpy` finds.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "labkit.submission.worker"], cwd=self.folder.name, start_new_session=True,
            env={**course_environment(), **QUIET}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.requests, self.answers, self.words = self.process.stdin, self.process.stdout, self.process.stderr

    def stop(self):
        """Kill the process with everything it started."""
        for process in _tree(self.process.pid):
            try:
                process.kill()
            except psutil.Error:
                pass
        if hasattr(os, "killpg"):
            try:
                os.killpg(self.process.pid, signal.SIGKILL)  # also what has left the tree, but not the session
            except (ProcessLookupError, PermissionError):
                pass
        self.process.wait()

    def clean_up(self):
        """After `stop`: remove what the process left behind."""
        self.folder.cleanup()

    def listen(self):
        """Begin to read what the process answers and prints."""
        # One place: a process that answers without being asked waits until somebody asks.
        self.replies: queue.Queue = queue.Queue(maxsize=1)
        threading.Thread(target=self._listen, daemon=True).start()
        threading.Thread(target=self._drain, daemon=True).start()

    def run(self, name: str, source: str, withheld=(), seconds: float = Limits.cell_seconds) -> Raised | None:
        """Run one cell.   withheld: modules it may not import.   Returns what it raised, or None."""
        try:
            reply = self.exchange({"do": "run", "name": name, "source": source, "withheld": list(withheld)}, seconds)
        except wire.WireError as error:  # a cell of letters that take several bytes each
            return Raised("Unusable", f"the cell cannot be sent: {error}")
        return _raised(reply)

    def ask(self, entry: str, case: Case, withheld=()):
        """The answer of the function or class called `entry` to one case; a `Raised` where it raised or is not there."""
        asked = {name: getattr(case, name) for name in _ASKED} | {"says": "", "must": ""}
        reply = self.exchange({"do": "ask", "entry": entry, "case": asked, "withheld": list(withheld)}, self.limits.case_seconds)
        if "missing" in reply:
            return Raised("NameError", f"the cell defines no function or class called {entry}")
        return _raised(reply) or reply.get("answer")

    def exchange(self, message, seconds):
        """Send a message, and return the reply, a dict.   Raises WorkerLost when there is none within so many seconds."""
        if self.lost:
            raise WorkerLost(self.lost)
        # In a thread of its own: a worker that reads nothing must not hold up the limits.
        threading.Thread(target=self._write, args=(wire.encode(message),), daemon=True).start()
        until, reply = time.monotonic() + seconds, None
        while reply is None:
            try:
                reply = self.replies.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                pass
            if reply is None and time.monotonic() > min(until, self.until):
                self.give_up_late(seconds)
            if reply is None and resident_mib(self.process.pid) > self.limits.memory_mib:
                self.give_up(f"it used more than {self.limits.memory_mib:,} MiB of memory")
        if isinstance(reply, Exception):
            self.give_up(ENDED if isinstance(reply, EOFError) else str(reply))
        if not isinstance(reply, dict):
            self.give_up("the process sent no answer")
        return reply

    def give_up_late(self, seconds):
        """Give up a message that was allowed so many seconds, or the whole notebook where that one's time is over."""
        if time.monotonic() > self.until:
            self.give_up(f"the whole notebook took longer than {self.limits.notebook_seconds:.0f} s")
        self.give_up(f"it took longer than {seconds:.0f} s")

    def give_up(self, reason):
        """Stop the process, and be lost for this reason.   Raises WorkerLost."""
        self.lost = reason
        self.stop()
        raise WorkerLost(reason)

    def _write(self, message):
        try:
            self.requests.write(message)
            self.requests.flush()
        except (OSError, ValueError):
            pass  # the process has ended, as `_listen` says

    def _listen(self):
        reply = None
        while not isinstance(reply, Exception):
            try:
                reply = wire.receive(self.answers)
            except Exception as error:  # whatever it is: a thread that ends without a word leaves the other side waiting
                reply = error
            while not self.closed.is_set():
                try:
                    self.replies.put(reply, timeout=_POLL_SECONDS)
                    break
                except queue.Full:
                    pass

    def _drain(self):
        """Keep the output pipe empty, whatever a cell prints."""
        try:
            while block := self.words.read1(4096):
                self.last_words.append(block[-200:])
        except (OSError, ValueError):
            pass  # closed under our hands


def _tree(pid):
    try:
        process = psutil.Process(pid)
        return [*process.children(recursive=True), process]
    except psutil.Error:
        return []


def resident_mib(pid: int) -> float:
    """Resident memory of the process and all below it, in MiB; 0 when it has ended."""
    total = 0
    for process in _tree(pid):
        try:
            total += process.memory_info().rss
        except psutil.Error:
            pass
    return total / 2**20


def _raised(reply):
    """What the reply says was raised, or None."""
    found = reply.get("raised")
    if found is None:
        return None
    whole = isinstance(found, dict) and set(found) == {field.name for field in fields(Raised)}
    if not whole or not isinstance(found["line"], int) or not 0 <= found["line"] < 10**6:
        return Raised("Unusable", "the worker's answer is none")
    return Raised(str(found["kind"])[:100], str(found["message"])[:300], found["line"])


def examine(cells: Cells, exercises: list[Exercise], limits: Limits = Limits(), on_exercise: Callable[[], None] = lambda: None,
            key_of: Callable[[Exercise], AnswerKey] = AnswerKey, new_worker: Callable[[Limits], Worker] | None = None) -> list[Verdict]:
    """Run the cells in a fresh process and judge the exercises, one verdict each, in their order.

    A cell or an answer that passes a limit costs its exercise and no other: the rest goes on in another fresh process.
    on_exercise: called after each.   key_of: what to judge by, the public cases by default.   new_worker: in what to run, a `Worker` by default.
    """
    verdicts: dict[str, Verdict] = {}
    until = time.monotonic() + limits.notebook_seconds
    problems = {exercise.id: cells.problems[exercise.id] for exercise in exercises if exercise.id in cells.problems}
    while missing := [exercise for exercise in exercises if exercise.id not in verdicts]:
        if all(exercise.id in problems for exercise in missing):  # nothing is left to run
            for exercise in missing:
                verdicts[exercise.id] = _unanswered(key_of(exercise), problems[exercise.id])
                on_exercise()
            break
        with (new_worker or Worker)(limits) as worker:
            worker.until = until
            raised = _run_cells(worker, cells, exercises, problems)
            if raised is None:
                continue  # a cell was stopped, which is among the problems from here on
            for exercise in missing:
                problem = problems.get(exercise.id) or raised.get(exercise.id)
                key = key_of(exercise)
                verdicts[exercise.id] = _unanswered(key, problem) if problem else judge_by(key, _asker(worker, exercise))
                on_exercise()
                if worker.lost:
                    break
    return [verdicts[exercise.id] for exercise in exercises]


def _run_cells(worker, cells, exercises, problems):
    """Run the set-up cell and every exercise's cell that has no problem yet: exercise id -> sentence about what its cell raised.

    Returns None when a cell was stopped; its exercise is a problem then.
    """
    raised, asked = {}, {exercise.id: exercise for exercise in exercises}
    in_setup = _run(worker, "set-up cell", cells.setup, (), worker.limits.setup_seconds)
    if worker.lost:
        problems.update({exercise.id: f"The set-up cell was stopped: {worker.lost}." for exercise in exercises})
        return None
    for exercise in [asked[id] for id in cells.exercises if id in asked]:  # in the order of the page
        if exercise.id in problems:
            continue
        found = _run(worker, exercise.id, cells.exercises[exercise.id], _withheld(exercise), worker.limits.cell_seconds)
        if worker.lost:
            problems[exercise.id] = f"Its cell was stopped: {worker.lost}."
            return None
        if found:
            raised[exercise.id] = f"Its cell raises {_described(found)} {_ONLY_THESE}" + (
                f" Before that, the set-up cell raised {_described(in_setup)}" if in_setup else "")
    return raised


def _run(worker, name, source, withheld, seconds):
    try:
        return worker.run(name, source, withheld, seconds)
    except WorkerLost:
        return None


def _withheld(exercise):
    return (*exercise.withheld, type(exercise).__module__)  # the lesson's own module holds the right answers


def _asker(worker, exercise):
    """case -> answer; once the worker is lost, every further case is answered by the reason."""

    def ask(case):
        try:
            return worker.ask(exercise.entry, case, _withheld(exercise))
        except WorkerLost as lost:
            return Raised("Unusable", f"`{exercise.entry}` was stopped: {lost}")

    return ask


def _unanswered(key, problem):
    return Verdict(key.exercise.id, WRONG, problem, 0, len(key.cases), key.exercise.points)


def _described(raised):
    return printable(f"{raised.kind}{f' in line {raised.line}' if raised.line else ''}: {raised.message}.")
