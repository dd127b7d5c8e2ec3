"""Grading on several machines through Dask distributed (the extra `cluster`). What one of them does is in grade.py.

Dask's own messages are pickled: its scheduler and workers are the instructor's machines, on a network that students cannot reach. What came
from students travels as plain data, and is judged on each machine behind the same isolation as here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Lock
from time import perf_counter

from labkit.errors import UserError
from labkit.grading.grade import Course, Grader, Job, keep
from labkit.grading.results import Graded
from labkit.grading.sandbox import chosen_isolation

_SECONDS_TO_CONNECT = 30
_graders: dict[bytes, Grader] = {}
_making = Lock()  # a worker process may have several threads


def grade_remote(course: Course, job: Job) -> tuple[Graded, float]:
    """Grade one job in a worker process of the cluster; returns the record and its seconds.

    A process keeps one grader, for the course that it was asked for last.   Raises UserError where the isolation asked for does not work there.
    """
    with _making:
        if course.digest not in _graders:
            chosen_isolation(course.isolation.tier)
            while _graders:
                _graders.popitem()[1].__exit__()
            _graders[course.digest] = Grader(course).__enter__()
        grader = _graders[course.digest]
    begun = perf_counter()
    return grader.grade(job), perf_counter() - begun


def grade_on_cluster(jobs: list[Job], course: Course, out: Path, address: str,
                     on_graded: Callable[[Graded], None] = lambda graded: None) -> list[str]:
    """`grade_all` on the workers of the scheduler at `address` (tcp://host:port). What a lost worker had is graded again by another, once.

    Raises UserError where there is no such scheduler, it has no worker, or records cannot be written here.
    """
    try:
        from distributed import Client, as_completed
    except ImportError:
        raise UserError("--scheduler needs Dask: `pip install distributed`, or leave it out to grade on this machine.") from None
    try:
        client = Client(address, timeout=_SECONDS_TO_CONNECT)
    except (OSError, TimeoutError, ValueError) as error:
        raise UserError(f"{address} is no scheduler that answers ({type(error).__name__}): start `dask scheduler`, and name its address.") from None
    failed = []
    with client:
        if not client.scheduler_info()["workers"]:
            raise UserError(f"{address} has no worker: start some with `dask worker {address} --nthreads 1`.")
        # Several submissions in one process at a time would share its one zygote.
        futures = {client.submit(grade_remote, course, job, pure=False, retries=1): job for job in jobs}
        for future in as_completed(futures):
            job = futures[future]
            try:
                graded, seconds = future.result()
            except Exception as error:  # its own, or the cluster's, whose scheduler may be gone
                failed.append(f"{job.student} could not be graded ({type(error).__name__}: {error}); run the command again.")
                continue
            on_graded(keep(out, job, graded, seconds))
    return failed
