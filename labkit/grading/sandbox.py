"""Workers that are isolated, and the zygote they come from, as the grader sees them. What the zygote does is in zygote.py, how in isolation.py."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from labkit.errors import UserError
from labkit.grading import isolation
from labkit.grading.zygote import FOLDER_FILES, FOLDER_MIB, is_small, remove_folder
from labkit.paths import ROOT
from labkit.processes import THREADS, course_environment
from labkit.submission import wire
from labkit.submission.apart import ENDED, QUIET, Limits, Worker, WorkerLost

LIMITS = Limits(setup_seconds=60, cell_seconds=5, case_seconds=3, memory_mib=2048, notebook_seconds=60)
# Sets of strings in the same order in every worker of every run, so that a regrade gives the same bytes; no threads before the fork; memory in
# large pages, where the kernel has them: a fork copies one entry a page, and takes half as long (glibc 2.35 and later).
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "TOKENIZERS_PARALLELISM": "false", "PYTHONMALLOC": "malloc", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
# All that is kept of the instructor's own environment, where tokens and passwords lie.
_KEPT = ("PATH", "PYTHONPATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH")
_READY_SECONDS, _REPLY_SECONDS = 180.0, 30.0
_LOOK_SECONDS = 0.02  # between two looks at what a worker has taken


class ZygoteLost(Exception):
    """The zygote ended or does not answer: nothing that a student's code is to blame for can be concluded."""


@dataclass(frozen=True)
class Isolation:
    """How workers are held.   tier: one of isolation.TIERS.   user: "nobody" where root's workers can be another user's, else "own"."""

    tier: str
    user: str = "own"

    @property
    def has_zygote(self) -> bool:
        """Whether workers are forked from a zygote; otherwise each is a plain process of its own."""
        return self.tier in (isolation.NAMESPACES, isolation.CALLS_AND_FILES)

    def __str__(self):
        return f"{self.tier}: {isolation.SAID[self.tier]}"


def chosen_isolation(wanted: str | None = None) -> Isolation:
    """The strongest tier that works here, or the wanted one.   Raises UserError, with the reason, where that one does not work."""
    if wanted in (isolation.NONE, isolation.CONTAINER):
        return Isolation(wanted)
    found = isolation.probe()
    if wanted not in (None, *isolation.TIERS):
        raise UserError(f"{wanted!r} is no tier of isolation: name one of {', '.join(isolation.TIERS)}.")
    if wanted and isolation.TIERS.index(found.tier) > isolation.TIERS.index(wanted):
        reasons = "; ".join(f"{layer}: {reason}" for layer, reason in found.layers.items() if reason)
        raise UserError(f"the tier {wanted!r} does not work here ({reasons}): leave --isolation out to get {found.tier!r}, or use another machine.")
    tier = wanted or found.tier
    return Isolation(tier, "nobody" if tier != isolation.NONE and os.geteuid() == 0 and _is_readable_by_all() else "own")


def _is_readable_by_all():
    """Whether another user could read the interpreter and the course."""
    ends = {Path(sys.prefix), Path(sys.base_prefix), ROOT}
    return all(folder.stat().st_mode & 0o005 == 0o005 for end in ends for folder in (end, *end.parents))


class Zygote:
    """A running zygote, as a context manager; one worker at a time.   setups: sources of the set-up cells that are prepared in it."""

    def __init__(self, how: Isolation, setups=()):
        self.how, self.setups = how, list(setups)

    def __enter__(self):
        self.folder = tempfile.mkdtemp(prefix="labkit-zygote-")
        if self.how.user == "nobody":
            os.chown(self.folder, isolation.NOBODY, isolation.NOBODY)
        self.control, theirs = socket.socketpair()
        own = dict.fromkeys(("TMPDIR", "HOME", "MPLCONFIGDIR"), self.folder)
        environment = {name: value for name, value in course_environment().items() if name in _KEPT or name in THREADS} | QUIET | _ENVIRONMENT | own
        self.words = tempfile.TemporaryFile()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "labkit.grading.zygote", str(theirs.fileno()), self.how.tier, self.how.user, self.folder],
                pass_fds=[theirs.fileno()], env=environment, cwd="/", start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=self.words, stderr=self.words,
            )  # fmt: skip
        try:
            self.control.settimeout(_READY_SECONDS)
            self._send(json.dumps(self.setups).encode() + b"\n")
            self._receive()
        except BaseException:
            self.__exit__()
            raise
        self.control.settimeout(_REPLY_SECONDS)
        return self

    def __exit__(self, *exception):
        self.control.close()
        self.process.kill()
        self.process.wait()
        self.words.close()
        remove_folder(self.folder)

    def start(self, limits: Limits, descriptors) -> int:
        """Fork a worker that reads requests from, answers into and prints to the three descriptors.   Returns its process id.

        Raises ZygoteLost.
        """
        seconds = int(min(limits.notebook_seconds, 3600)) + 1
        message = {"do": "start", "memory_mib": limits.memory_mib, "cpu_seconds": seconds, "file_mib": FOLDER_MIB}
        try:
            socket.send_fds(self.control, [json.dumps(message).encode()], descriptors)
        except OSError as error:
            raise ZygoteLost(str(error)) from None
        return self._receive()["pid"]

    @property
    def is_watching(self) -> bool:
        """Whether the kernel leaves something of a worker's limits to us."""
        return self.how.tier != isolation.NAMESPACES or self._is_roots

    @property
    def _is_roots(self):
        return self.how.user == "own" and os.geteuid() == 0

    def taken_too_much(self, pid: int) -> str:
        """What a worker has more of than it may, where the kernel does not hold it to its limits; empty where nothing."""
        # Without a file system of its own there is no limit to all its files together; one alone is held to FOLDER_MIB.
        if self.how.tier != isolation.NAMESPACES and not is_small(self.folder, (FOLDER_MIB + 1) * 2**20, FOLDER_FILES):
            return f"it wrote more than {FOLDER_MIB} MiB or {FOLDER_FILES:,} files, or nested folders"
        # RLIMIT_NPROC binds nobody who is root.
        if self._is_roots and isolation.threads_of(pid) > isolation.MOST_THREADS:
            return f"it started more than {isolation.MOST_THREADS} threads"
        return ""

    def stop(self) -> None:
        """Kill the worker. The next one starts when it is gone, and the folder empty.   Raises ZygoteLost."""
        self._send(b'{"do": "stop"}')
        self._receive()

    def _send(self, data):
        try:
            self.control.sendall(data)
        except OSError as error:
            raise ZygoteLost(str(error)) from None

    def _receive(self):
        try:
            data = self.control.recv(1 << 16)
        except OSError as error:
            raise ZygoteLost(str(error)) from None
        if not data:
            self.words.seek(0)
            raise ZygoteLost(f"the zygote ended: {self.words.read()[-500:].decode(errors='replace').strip()}")
        return json.loads(data)


class IsolatedWorker(Worker):
    """A `Worker` forked from a zygote."""

    def __init__(self, limits: Limits, zygote: Zygote):
        super().__init__(limits)
        self.zygote, self.running = zygote, False

    def start(self):
        """As in `Worker`.   Raises ZygoteLost."""
        pipes = [os.pipe() for _ in range(3)]
        (theirs_in, ours_out), *outputs = pipes
        theirs = [theirs_in, *(writing for _, writing in outputs)]
        try:
            self.pid = self.zygote.start(self.limits, theirs)
        except BaseException:
            for descriptor in (ours_out, *(reading for reading, _ in outputs)):
                os.close(descriptor)
            raise
        finally:
            for descriptor in theirs:
                os.close(descriptor)
        self.running = True
        self.requests, self.answers, self.words = ours_out, *(reading for reading, _ in outputs)
        for descriptor in (self.requests, self.answers, self.words):
            os.set_blocking(descriptor, False)
        self.poll = select.poll()
        self.poll.register(self.answers, select.POLLIN)
        self.poll.register(self.words, select.POLLIN)

    def stop(self):
        """Kill the worker with everything in it."""
        if self.running:
            self.running = False
            self.zygote.stop()

    def clean_up(self):
        """Close our ends; the zygote empties the folder."""
        for descriptor in (self.requests, self.answers, self.words):
            os.close(descriptor)

    def listen(self):
        """Nothing: one thread does it all, since Linux can wait for several pipes at a time."""

    def exchange(self, message, seconds):
        """As in `Worker`."""
        if self.lost:
            raise WorkerLost(self.lost)
        left, received, length = memoryview(wire.encode(message)), bytearray(), None
        longest = _LOOK_SECONDS if self.zygote.is_watching else float("inf")
        until = time.monotonic() + seconds
        self.poll.register(self.requests, select.POLLOUT)
        while length is None or len(received) < length:
            left_over = min(until, self.until) - time.monotonic()
            ready = self.poll.poll(max(0, 1000 * min(left_over, longest) + 1))
            if left_over < 0 and self.answers not in dict(ready):  # an answer that is there has only waited for this thread
                self.give_up_late(seconds)
            if too_much := self.zygote.taken_too_much(self.pid):
                self.give_up(too_much)
            for descriptor, _ in ready:
                if descriptor == self.requests:
                    left = self._sent(left)
                elif descriptor == self.words:
                    self._heard()
                else:
                    block = self._read(descriptor)
                    if not block:
                        self.give_up(ENDED)
                    received += block
            if length is None and len(received) >= wire.HEADER_BYTES:
                length = self._length(received)
        if len(received) > length:
            self.give_up("the process answered what it was not asked")
        return self._decoded(bytes(received))

    def _sent(self, left):
        """Write what fits; what remains. A worker that is gone is noticed by its silence."""
        try:
            left = left[os.write(self.requests, left) :]
        except BlockingIOError:
            return left
        except OSError:
            left = left[len(left) :]
        if not left:
            self.poll.unregister(self.requests)
        return left

    def _heard(self):
        block = self._read(self.words)
        if block:
            self.last_words.append(block[-200:])
        else:
            self.poll.unregister(self.words)

    @staticmethod
    def _read(descriptor):
        try:
            return os.read(descriptor, 1 << 16)
        except OSError:
            return b""

    def _length(self, received):
        try:
            return wire.length_of(bytes(received[: wire.HEADER_BYTES]))
        except wire.WireError as error:
            self.give_up(str(error))

    def _decoded(self, data):
        try:
            reply = wire.decode(data)
        except wire.WireError as error:
            self.give_up(str(error))
        if not isinstance(reply, dict):
            self.give_up("the process sent no answer")
        return reply
