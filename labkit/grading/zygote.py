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
import secrets
import signal
import socket
import stat
import sys
from dataclasses import dataclass
from functools import partial
from itertools import count

from labkit.grading import isolation

FOLDER_MIB = 64
_LONGEST_MESSAGE = 1 << 16
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")


def readable_paths() -> list[str]:
    """What a worker may read: the interpreter with its packages, the system's libraries, the course's data, and labkit without what judges."""
    from labkit.paths import DATA, ROOT

    package = ROOT / "labkit"
    parts = [path for path in sorted(package.iterdir()) if path.name not in ("grading", "exercises", "__pycache__")]
    parts += [package / "exercises" / name for name in ("__init__.py", "exercise.py", "asking.py", "judging.py")]
    system = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime", "/etc/fonts", "/sys/devices/system/cpu", *_DEVICES)
    return [sys.prefix, sys.base_prefix, *system, *map(str, parts), *(str(DATA / name) for name in ("tiny_vla", "demonstrations", "sweeps"))]


def prepared_modules(setups: list[str]) -> dict:
    """Source of a set-up cell -> the module that it has filled. One that raises is left out, and so will be run again in each worker."""
    from labkit.submission.worker import new_main_module, run_cell

    found = {}
    for source in setups:
        module = new_main_module()
        if run_cell("set-up cell", source, vars(module)) is None:
            found[source] = module
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


def work(descriptors, prepared, confined) -> None:
    """Be the worker: what is left of this process once it has been forked. Does not return."""
    from labkit.submission.worker import new_main_module, serve

    try:
        for descriptor, place in zip((os.open(os.devnull, os.O_RDONLY), descriptors[2], descriptors[2]), (0, 1, 2)):
            os.dup2(descriptor, place)
        confined()
        with open(descriptors[0], "rb") as requests, open(descriptors[1], "wb") as answers:
            serve(requests, answers, new_main_module(), prepared)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode(errors="replace")[:300])
    finally:
        os._exit(0)


def serve_forever(control: socket.socket, walls: Walls, prepared: dict) -> None:
    """Fork workers as they are asked for, until the other end of the control socket is closed."""
    child = 0
    while True:
        text, descriptors, _, _ = socket.recv_fds(control, _LONGEST_MESSAGE, 3)
        if not text:
            return
        message = json.loads(text)
        if message["do"] == "start":
            if walls.tier == isolation.NAMESPACES:
                isolation.unshare(isolation.CLONE_NEWPID)  # so that the child sees no process but itself
            child = os.fork()
            if child == 0:
                control.close()
                work(descriptors, prepared, partial(walls.confine, message))
            if walls.tier == isolation.NAMESPACES:
                isolation.return_to_own_pid_namespace()
            control.sendall(json.dumps({"pid": child}).encode())
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


def _opened(name, parent):
    os.chmod(name, 0o700, dir_fd=parent)
    return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)


def main() -> None:
    """`python -m labkit.grading.zygote DESCRIPTOR TIER USER FOLDER`; the set-up cells come first over the socket, as JSON lines end in a newline."""
    descriptor, tier, user, folder = sys.argv[1:]
    control = socket.socket(fileno=int(descriptor))
    if user == "nobody":
        isolation.become_nobody()
    if tier == isolation.NAMESPACES:
        isolation.own_namespaces()
        child = os.fork()
        if child:  # stays outside, so that whoever started it has something to wait for
            control.close()
            os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)
        isolation.end_with_parent()
        isolation.private_folder(folder, FOLDER_MIB)
    os.chdir(folder)
    isolation.no_new_privileges()
    with control.makefile("r", encoding="utf-8") as lines:
        setups = json.loads(lines.readline())
    import bitsandbytes  # noqa: F401  everything that a cell may import and that takes long
    import matplotlib.pyplot  # noqa: F401
    import peft  # noqa: F401
    import scipy.stats  # noqa: F401
    import torch
    import transformers  # noqa: F401

    from labkit.submission.worker import act_as_notebook

    torch.set_num_threads(1)
    act_as_notebook()
    walls = Walls(tier, folder, isolation.file_rules(readable_paths(), [folder, "/dev/null"]), isolation.call_rules())
    prepared = prepared_modules(setups)
    if len(os.listdir("/proc/self/task")) != 1:
        raise RuntimeError("the zygote has more than one thread: what is forked from it could hang")
    gc.collect()
    gc.freeze()  # what is never looked at again stays shared between all workers
    control.sendall(b'{"ready": true}')
    empty_folder(folder)
    serve_forever(control, walls, prepared)


if __name__ == "__main__":
    main()
