"""The process that every student's worker is forked from: it has imported the libraries and run the released set-up cells, and nothing else.

Importing them takes seconds, forking milliseconds. It is started by sandbox.py, holds no secret and no answer, and has left the world it
could do harm in before it forks for the first time. It serves one worker at a time. Over its control socket come JSON messages:

    {"do": "start", "memory_mib", "cpu_seconds", "file_mib"} with three descriptors (requests, answers, words)    {"pid": number}
    {"do": "stop"}                                                                                                {"stopped": true}
"""

from __future__ import annotations

import gc
import json
import os
import random
import secrets
import signal
import socket
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import count

from labkit.grading import isolation
from labkit.submission.absent import LIBRARIES, make_absent

FOLDER_MIB, FOLDER_FILES, _DEEPEST = 64, 10_000, 32
_LONGEST_MESSAGE = 1 << 16
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")


def readable_paths() -> list[str]:
    """What a worker may read: the interpreter with its packages, the system's libraries, the course's data, and labkit without what judges."""
    from labkit.exercises.exercise import NOT_LESSONS
    from labkit.paths import DATA, ROOT

    package = ROOT / "labkit"
    parts = [path for path in sorted(package.iterdir()) if path.name not in ("grading", "exercises", "__pycache__")]
    parts += [package / "exercises" / f"{name}.py" for name in ("__init__", *NOT_LESSONS)]
    system = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime", "/etc/fonts", "/sys/devices/system/cpu", *_DEVICES)
    data = (str(DATA / name) for name in ("tiny_vla", "tiny_clip", "tiny_clip_policy", "demonstrations", "sweeps"))
    return [sys.prefix, sys.base_prefix, *system, *map(str, parts), *data]


def hidden_paths() -> list[str]:
    """What no worker may read wherever it lies: the libraries that are an answer, what judges, and the notebooks with their solutions."""
    from labkit.exercises.exercise import NOT_LESSONS
    from labkit.paths import NOTEBOOKS, ROOT

    lessons = [path for path in (ROOT / "labkit" / "exercises").glob("*.py") if path.stem not in ("__init__", *NOT_LESSONS)]
    found = [NOTEBOOKS, ROOT / "tests", ROOT / "labkit" / "grading", *lessons]
    for name in LIBRARIES:
        spec = find_spec(name)
        found += (spec.submodule_search_locations or [spec.origin]) if spec else []
    return [str(path) for path in found if path]


def generators() -> Callable[[], None]:
    """A function that sets the random generators back to what they are.

    Python's own forgets its seed in whatever is forked, and a set-up cell's seed is part of what it makes.
    """
    import numpy as np
    import torch

    mine, numpys, torchs = random.getstate(), np.random.get_state(), torch.get_rng_state()

    def restore():
        random.setstate(mine)
        np.random.set_state(numpys)
        torch.set_rng_state(torchs)

    return restore


def prepared_setups(setups: list[str], begin: Callable[[], None]) -> dict:
    """Source of a set-up cell -> a function that returns the module that it has filled, with the random generators as it left them.

    begin: sets the generators to where every worker starts.   One that raises is left out, and so will be run again in each worker.
    """
    from labkit.submission.worker import new_main_module, run_cell

    def taken_over(module, restore):
        restore()
        return module

    found = {}
    for source in setups:
        begin()
        module = new_main_module()
        if run_cell("set-up cell", source, vars(module)) is None:
            found[source] = partial(taken_over, module, generators())
    return found


@dataclass(frozen=True)
class Walls:
    """What every worker is put behind, made once.   files, calls: rules of isolation.file_rules and isolation.call_rules."""

    tier: str
    folder: str
    files: int
    calls: bytes

    def confine(self, message: dict) -> None:
        """Take everything from this process that a student's cell does not need; the last thing before one runs.   Raises OSError."""
        os.setsid()
        isolation.end_with_parent()
        isolation.drop_capabilities()
        isolation.limit_resources(message["memory_mib"], message["cpu_seconds"], message["file_mib"])
        isolation.restrict_files(self.files)
        os.close(self.files)
        isolation.restrict_calls(self.calls)


def work(descriptors, prepared, begin, confined) -> None:
    """Be the worker: what is left of this process once it has been forked. Does not return."""
    from labkit.submission.worker import new_main_module, serve

    try:
        for descriptor, place in zip((os.open(os.devnull, os.O_RDONLY), descriptors[2], descriptors[2]), (0, 1, 2)):
            os.dup2(descriptor, place)
        confined()
        begin()
        with open(descriptors[0], "rb") as requests, open(descriptors[1], "wb") as answers:
            serve(requests, answers, new_main_module(), prepared)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode(errors="replace")[:300])
    finally:
        os._exit(0)


def try_walls(walls: Walls) -> None:
    """Put a child behind the walls: what does not work must not look like every student's fault.   Raises RuntimeError."""
    reason = isolation.tried_in_a_child(partial(walls.confine, {"memory_mib": 1024, "cpu_seconds": 60, "file_mib": FOLDER_MIB}))
    if reason:
        raise RuntimeError(f"a worker cannot be confined: {reason}")


def serve_forever(control: socket.socket, walls: Walls, prepared: dict, begin: Callable[[], None]) -> None:
    """Fork workers as they are asked for, until the other end of the control socket is closed."""
    child = 0
    while True:
        text, descriptors, _, _ = socket.recv_fds(control, _LONGEST_MESSAGE, 3)
        if not text:
            if child:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            return
        message = json.loads(text)
        if message["do"] == "start":
            if walls.tier == isolation.NAMESPACES:
                isolation.unshare(isolation.CLONE_NEWPID)  # so that the child sees no process but itself
            child = os.fork()
            if child == 0:
                control.close()
                work(descriptors, prepared, begin, partial(walls.confine, message))
            if walls.tier == isolation.NAMESPACES:
                isolation.return_to_own_pid_namespace()
            control.sendall(json.dumps({"pid": isolation.newest_child()}).encode())
        elif child:
            os.kill(child, signal.SIGKILL)  # with it goes everything in its pid namespace
            control.sendall(b'{"stopped": true}')
            # Taking a large process down takes milliseconds, in which the grader goes on.
            os.waitpid(child, 0)
            empty_folder(walls.folder)
            child = 0
        for descriptor in descriptors:
            os.close(descriptor)


def empty_folder(folder: str) -> None:
    """Delete everything in a folder, however deep it is nested and whatever its names and permissions are.   Raises OSError."""
    top, unused = os.open(folder, os.O_RDONLY | os.O_DIRECTORY), (f"{secrets.token_hex(8)}-{number}" for number in count())
    try:
        while names := os.listdir(top):
            for name in names:
                if not stat.S_ISDIR(os.stat(name, dir_fd=top, follow_symlinks=False).st_mode):
                    os.unlink(name, dir_fd=top)
                    continue
                # What is inside comes up to here: neither a path nor a recursion grows with the depth.
                inside = _opened(name, top)
                try:
                    for inner in os.listdir(inside):
                        if stat.S_ISDIR(os.stat(inner, dir_fd=inside, follow_symlinks=False).st_mode):
                            os.chmod(inner, 0o700, dir_fd=inside)
                        os.rename(inner, next(unused), src_dir_fd=inside, dst_dir_fd=top)
                finally:
                    os.close(inside)
                os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)


def is_small(folder: str, size: int, files: int) -> bool:
    """Whether a folder holds at most so many bytes and files, in folders that are not nested deeply; looks at no more than that many."""
    folders = [(folder, 0)]
    while folders:
        path, depth = folders.pop()
        try:
            for entry in os.scandir(path):
                about = entry.stat(follow_symlinks=False)
                size, files = size - about.st_blocks * 512, files - 1
                if size < 0 or files < 0 or depth > _DEEPEST:
                    return False
                if stat.S_ISDIR(about.st_mode):
                    folders.append((entry.path, depth + 1))
        except FileNotFoundError:
            continue
        except OSError:  # closed to others, and so a place to hide in
            return False
    return True


def _opened(name, parent):
    os.chmod(name, 0o700, dir_fd=parent)
    return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)


def remove_folder(folder: str) -> None:
    """Delete a folder with everything in it, if that can be done."""
    try:
        empty_folder(folder)
        os.rmdir(folder)
    except OSError:
        pass  # what is left is in the temporary folder, where the system deletes it


def main() -> None:
    """`python -m labkit.grading.zygote DESCRIPTOR TIER USER FOLDER`; the set-up cells come first over the socket, as JSON lines end in a newline."""
    descriptor, tier, user, folder = sys.argv[1:]
    control = socket.socket(fileno=int(descriptor))
    if user == "nobody":
        isolation.become_nobody()
    if tier == isolation.NAMESPACES:
        isolation.own_namespaces()
    child = os.fork()
    if child:  # stays outside, so that whoever started it has something to wait for, and somebody clears up where that one was killed
        control.close()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        remove_folder(folder)
        os._exit(status & 0xFF)
    isolation.end_with_parent()
    if tier == isolation.NAMESPACES:
        isolation.unshare(isolation.CLONE_NEWNS)  # so that the process outside still sees what lies below
        isolation.private_folder(folder, FOLDER_MIB)
    os.chdir(folder)
    isolation.no_new_privileges()
    with control.makefile("r", encoding="utf-8") as lines:
        setups = json.loads(lines.readline())
    hidden = hidden_paths()
    make_absent()
    import matplotlib.pyplot  # noqa: F401  everything that a cell may import and that takes long
    import numpy
    import scipy.stats  # noqa: F401
    import torch
    import transformers  # noqa: F401

    from labkit.submission.worker import act_as_notebook

    torch.set_num_threads(1)
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    begin = generators()
    act_as_notebook()
    readable, listable = isolation.without(readable_paths(), hidden)
    walls = Walls(tier, folder, isolation.file_rules(readable, [folder, "/dev/null"], listable), isolation.call_rules())
    try_walls(walls)
    prepared = prepared_setups(setups, begin)
    if len(os.listdir("/proc/self/task")) != 1:
        raise RuntimeError("the zygote has more than one thread: what is forked from it could hang")
    gc.collect()
    gc.freeze()  # what is never looked at again stays shared between all workers
    control.sendall(b'{"ready": true}')
    empty_folder(folder)
    serve_forever(control, walls, prepared, begin)


if __name__ == "__main__":
    main()
