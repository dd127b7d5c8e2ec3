"""Grading: from submissions to records. What runs a student's cells is in sandbox.py, what judges answers in labkit.exercises.judging.

A submission becomes a `Job`, plain data that may travel to another machine; a `Grader` makes a record of it. The same job and the same secret
give the same record, byte by byte. Several machines are in cluster.py.
"""

from __future__ import annotations

import hashlib
import hmac
import inspect
import json
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from queue import SimpleQueue
from time import perf_counter

from labkit.errors import UserError
from labkit.exercises import judging
from labkit.exercises.exercise import Exercise
from labkit.exercises.judging import AnswerKey, Verdict
from labkit.freeze import CHECKPOINT
from labkit.grading.assignment import Assignment, late
from labkit.grading.questions import carried_over
from labkit.grading.results import Graded, Late, Performance, Question, read_record, record_path, write_record
from labkit.grading.sandbox import LIMITS, IsolatedWorker, Isolation, Zygote, ZygoteLost
from labkit.grading.submissions import Submission, read_answer, read_notebook
from labkit.submission import apart
from labkit.submission.cells import Cells, cells_of
from labkit.submission.cells import read_notebook as read_source

_TRIES = 2
_NOTHING_THERE = "No notebook was handed in for it."


@dataclass(frozen=True)
class Job:
    """One submission as it is graded.   cells, answers: by notebook, by question.   adapter: the file's bytes.   digest: over all of it."""

    student: str
    submitted: str
    files: tuple[str, ...]
    set_aside: tuple[str, ...]
    problems: tuple[str, ...]
    cells: dict[str, Cells]
    answers: dict[str, str]
    adapter: bytes | None
    late: Late
    digest: str = ""


@dataclass(frozen=True)
class Course:
    """What all jobs of a run share.   setups: the released set-up cells, of which workers inherit what they have made."""

    assignment: Assignment
    secret: str
    isolation: Isolation
    setups: tuple[str, ...]

    @cached_property
    def digest(self) -> bytes:
        """Over everything, besides the submission, that a record depends on: what is asked, how it is judged, and the secret."""
        exercises = self.assignment.exercises
        sources = {inspect.getsource(sys.modules[type(exercise).__module__]) for _, exercise in exercises}
        parts = [self.assignment.name, self.assignment.release, self.isolation.tier, [(e.id, e.points) for _, e in exercises], sorted(sources),
                 inspect.getsource(judging), [asdict(q) for q in self.assignment.questions],
                 self._performance()]
        return hmac.new(self.secret.encode(), json.dumps(parts).encode(), hashlib.sha256).digest()

    def _performance(self):
        if self.assignment.performance is None:
            return None
        from labkit.grading import performance

        checkpoint = hashlib.sha256((CHECKPOINT / "model.safetensors").read_bytes()).hexdigest()
        return [asdict(self.assignment.performance), inspect.getsource(performance), checkpoint]


def course_of(assignment: Assignment, secret: str, isolation: Isolation) -> Course:
    """The course of one run, with the set-up cells of the assignment's source notebooks."""
    setups = tuple(cells_of(read_source(assignment.source / f"{stem}.ipynb"), []).setup for stem in assignment.notebooks)
    return Course(assignment, secret, isolation, setups)


def job_of(submission: Submission, course: Course) -> Job:
    """Read everything of a submission that counts.   What cannot be read is among the problems."""
    assignment, problems, cells, answers = course.assignment, list(submission.problems), {}, {}
    wanted = {stem: [exercise.id for notebook, exercise in assignment.exercises if notebook == stem] for stem in assignment.notebooks}
    for stem, file in submission.notebooks.items():
        try:
            notebook = read_notebook(file)
        except UserError as error:
            problems.append(str(error))
            continue
        cells[stem] = cells_of(notebook, wanted[stem])
        answers |= {q.id: read_answer(notebook, q.id) for q in assignment.questions if q.notebook == stem}
    adapter = None
    if assignment.performance and submission.adapters:
        try:
            adapter = submission.adapters[0].read(int(assignment.performance.size_mib * 2**20) + 2**20)
        except UserError as error:
            problems.append(str(error))
    moment = submission.submitted.isoformat() if submission.submitted else ""
    job = Job(submission.student, moment, submission.files, submission.set_aside, tuple(problems), cells, answers, adapter,
              late(assignment, submission.submitted))
    return replace(job, digest=_digest(job, course))


def _digest(job, course):
    content = asdict(replace(job, adapter=None)) | {"adapter": hashlib.sha256(job.adapter or b"").hexdigest()}
    return hmac.new(course.digest, json.dumps(content, sort_keys=True).encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:32]


class Grader:
    """Grades jobs, several at a time where several threads call it; a context manager, because its zygotes and processes have to end.

    lanes: how many jobs at a time. Each has a zygote, and a process for adapters where the assignment asks for them.
    """

    def __init__(self, course: Course, lanes: int = 1):
        self.course, self.lanes = course, lanes
        self._keys: dict[str, AnswerKey] = {}
        self._lock = threading.Lock()
        self._free: SimpleQueue[_Lane] = SimpleQueue()

    def __enter__(self):
        with ExitStack() as stack:
            if self.course.assignment.performance:
                self._adapters = stack.enter_context(ProcessPoolExecutor(
                    self.lanes, get_context("spawn"), _prepare_adapters, (self.course.assignment, self.course.secret)))
            lanes = [_Lane(self.course) for _ in range(self.lanes)]
            for lane in lanes:
                stack.push(lane)
            try:
                with ThreadPoolExecutor(self.lanes) as threads:  # each waits seconds for its zygote's imports
                    for lane in threads.map(_Lane.__enter__, lanes):
                        self._free.put(lane)
            except ZygoteLost as lost:
                reason = ["", *str(lost).splitlines()][-1]
                raise UserError(f"no student's code can be run here ({judging.printable(reason)[:300]}): see what `python3 -m labkit doctor` says, "
                                "or choose another --isolation.") from None
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception):
        self._stack.close()

    def grade(self, job: Job) -> Graded:
        """The record of one submission.   Raises ZygoteLost where no zygote stays alive, which says nothing about the submission."""
        lane = self._free.get()
        try:
            verdicts = self._verdicts(job, lane)
        finally:
            self._free.put(lane)
        assignment = self.course.assignment
        questions = [Question(q.id, q.notebook, q.points, job.answers.get(q.id, "")) for q in assignment.questions]
        performance = self._adapters.submit(_grade_adapter, job.adapter).result() if assignment.performance else None
        return Graded(
            job.student, assignment.name, assignment.release, self.course.isolation.tier, job.submitted, job.files, job.set_aside, job.digest,
            job.problems, tuple(verdicts), {exercise.id: notebook for notebook, exercise in assignment.exercises}, tuple(questions), performance,
            job.late,
        )  # fmt: skip

    def _verdicts(self, job, lane):
        found = []
        for stem in self.course.assignment.notebooks:
            exercises = [exercise for notebook, exercise in self.course.assignment.exercises if notebook == stem]
            if stem in job.cells:
                found += lane.examine(job.cells[stem], exercises, self._key)
            else:
                found += [Verdict(e.id, judging.NOT_ATTEMPTED, _NOTHING_THERE, 0, len(self._key(e).cases), e.points) for e in exercises]
        return found

    def _key(self, exercise: Exercise) -> AnswerKey:
        with self._lock:
            if exercise.id not in self._keys:
                self._keys[exercise.id] = AnswerKey(exercise, self.course.secret, hidden=True)
            return self._keys[exercise.id]


class _Lane:
    """What runs one notebook after the other: a zygote, started anew where it was lost, or plain processes where there is none."""

    def __init__(self, course):
        self.course, self.zygote, self.closed = course, None, False

    def __enter__(self):
        self._start()
        return self

    def __exit__(self, *exception):
        self.closed = True  # another thread may be in the middle of a notebook
        self._end()

    def examine(self, cells, exercises, key_of):
        for attempt in range(1, _TRIES + 1):
            workers = []
            try:
                self._start()
                verdicts = apart.examine(cells, exercises, LIMITS, key_of=key_of, new_worker=self._workers(workers))
            except ZygoteLost:
                self._end()
                if attempt == _TRIES or self.closed:
                    raise
            else:
                # It may have been killed for what others did: a machine that runs out of memory picks any process.
                if attempt == _TRIES or not any(worker.lost == apart.ENDED for worker in workers):
                    return verdicts

    def _workers(self, made):
        """What makes a worker and notes it in the list `made`."""
        zygote = self.zygote

        def make(limits):
            made.append(IsolatedWorker(limits, zygote) if self.course.isolation.has_zygote else apart.Worker(limits))
            return made[-1]

        return make

    def _start(self):
        if self.closed:
            raise ZygoteLost("the grader has ended")
        if self.course.isolation.has_zygote and self.zygote is None:
            self.zygote = Zygote(self.course.isolation, self.course.setups).__enter__()

    def _end(self):
        zygote, self.zygote = self.zygote, None
        if zygote is not None:
            zygote.__exit__()


_adapter_grader = None


def _prepare_adapters(assignment, secret):
    global _adapter_grader
    from labkit.grading import isolation
    from labkit.grading.performance import AdapterGrader
    from labkit.quiet import quiet_libraries

    if sys.platform.startswith("linux"):
        isolation.end_with_parent()  # one of several that wait for work does not notice that nobody is left to give it any
    quiet_libraries()
    _adapter_grader = AdapterGrader(assignment.performance, secret, assignment.name)


def _grade_adapter(adapter: bytes | None) -> Performance:
    return _adapter_grader.grade(adapter)


def ungraded(jobs: Iterable[Job], out: Path) -> list[Job]:
    """The jobs that have no record yet, or one of something else: another version of the submission, of the assignment, or of the secret."""
    return [job for job in jobs if (earlier := _earlier(out, job)) is None or earlier.digest != job.digest]


def _earlier(out, job):
    path = record_path(out, job.student)
    try:
        return read_record(path) if path.exists() else None
    except UserError:
        return None  # damaged, so it is made again


def clear_unfinished(out: Path) -> None:
    """Remove what a run that was killed had begun to write.   Only where no other run is writing."""
    for path in out.rglob(".*.unfinished"):
        path.unlink(missing_ok=True)


def keep(out: Path, job: Job, graded: Graded, seconds: float) -> Graded:
    """Write a record, with what people have given to an earlier one: marks and overrides.   Raises UserError where it cannot be written."""
    earlier = _earlier(out, job)
    if earlier is not None:
        graded = carried_over(earlier, graded)
    try:
        write_record(out, graded, seconds)
    except OSError as error:
        raise UserError(f"{record_path(out, job.student)} cannot be written ({error.strerror}): make room or change who may write there, and run "
                        "the same command again; what is graded already is kept.") from None
    return graded


def grade_all(jobs: list[Job], course: Course, out: Path, lanes: int, on_graded: Callable[[Graded], None] = lambda graded: None,
              on_ready: Callable[[], None] = lambda: None) -> list[str]:
    """Grade jobs on this machine and write their records as they are finished.

    Whatever stops it, the next run goes on where it was: a record is there as a whole, or not at all.
    on_ready: called when the zygotes stand, before the first job.   on_graded: called after each record.
    Returns one sentence for each student who could not be graded.   Raises UserError where records cannot be written.
    """
    failed = []
    # The grader ends before its threads do: where a run is broken off, no notebook keeps it waiting.
    with ThreadPoolExecutor(lanes) as threads, Grader(course, lanes) as grader:
        on_ready()

        def timed(job):
            begun = perf_counter()
            return grader.grade(job), perf_counter() - begun

        waiting, running = iter(jobs), {}
        try:
            while True:
                # No more at a time than can run: what is not begun costs nothing when the run is stopped.
                running |= {threads.submit(timed, job): job for _, job in zip(range(2 * lanes - len(running)), waiting)}
                if not running:
                    return failed
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    job = running.pop(future)
                    try:
                        graded, seconds = future.result()
                    except Exception as error:
                        failed.append(f"{job.student} could not be graded ({type(error).__name__}: {error}); run the command again.")
                        continue
                    on_graded(keep(out, job, graded, seconds))
        finally:
            for future in running:
                future.cancel()
