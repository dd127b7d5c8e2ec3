"""What keeps a student's process from doing harm on Linux: namespaces, Landlock, seccomp, resource limits, and a probe that tries each of them.

Each layer is a function that a process applies to itself and cannot take back. Who applies which, and when, is in zygote.py. Sources: the man
pages of unshare, setns, mount, capset, prctl and landlock; linux/landlock.h.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

NAMESPACES, CALLS_AND_FILES, CONTAINER, NONE = "full", "no-namespaces", "container", "none"
TIERS = (NAMESPACES, CALLS_AND_FILES, CONTAINER, NONE)
SAID = {
    NAMESPACES: "namespaces (user, pid, net, ipc, uts, mount), Landlock, seccomp and resource limits",
    CALLS_AND_FILES: "Landlock, seccomp and resource limits; no namespaces",
    CONTAINER: "whatever the container around the grader gives; a plain process with limits inside it",
    NONE: "not isolated: do not use on untrusted code",
}

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
_CLONE_THREAD = 0x10000
_MS_NOSUID, _MS_NODEV, _MS_REC, _MS_PRIVATE = 0x2, 0x4, 0x4000, 0x40000
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NAME, _PR_GET_NAME, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 4, 15, 16, 24, 38
_PR_SET_SECCOMP, _SECCOMP_FILTER, _INSTRUCTION = 22, 2, 8
_CAPABILITY_VERSION_3 = 0x20080522
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_LANDLOCK_VERSION, _LANDLOCK_PATH_BENEATH = 1, 1
_READ_FILE, _READ_DIR, _EXECUTE = 1 << 2, 1 << 3, 1 << 0
# Rights over files by version of Landlock's interface: 13 in the first, then refer, truncate, and ioctl on devices.
_FILE_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
_OF_FILES = _EXECUTE | _READ_FILE | 1 << 1 | 1 << 14 | 1 << 15  # the rights that a file, and not only a folder, can have
NOBODY = 65534
MOST_THREADS = 64

# What Python, numpy and torch ask of Linux to compute, and to read and write files in a folder of their own. Modes and times of files are not
# among it: Landlock does not watch over them, and the worker may have the same user as the files outside.
_ALLOWED_CALLS = """
    read write readv writev pread64 pwrite64 preadv pwritev lseek close close_range creat dup dup2 dup3
    stat fstat lstat newfstatat statx statfs fstatfs access faccessat faccessat2 readlink readlinkat getcwd chdir fchdir getdents getdents64
    mkdir mkdirat rmdir unlink unlinkat rename renameat renameat2 ftruncate fsync fdatasync sync_file_range umask
    copy_file_range sendfile fadvise64 readahead pipe pipe2 poll ppoll select pselect6 eventfd2 socketpair shutdown
    epoll_create1 epoll_create epoll_ctl epoll_wait epoll_pwait mmap mprotect munmap mremap madvise mincore msync brk membarrier mlock munlock
    futex futex_waitv set_robust_list get_robust_list set_tid_address rseq gettid getpid getppid getuid geteuid getgid getegid getresuid getresgid
    getgroups getpgrp getpgid getsid sched_yield sched_getaffinity sched_getparam sched_getscheduler sched_get_priority_max
    sched_get_priority_min getpriority get_mempolicy getcpu nanosleep clock_nanosleep clock_gettime clock_getres gettimeofday time times getrusage
    getrlimit getrandom uname sysinfo sigaltstack rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait
    restart_syscall setitimer getitimer alarm timer_create timer_settime timer_delete exit exit_group
""".split()
# Descriptors, their flags, record locks, sizes of pipes. No leases, which hold up whoever opens the file, and no signals to others.
_ALLOWED_FCNTL = (*range(8), 36, 37, 38, 1030, 1031, 1032)
# The bits of open's flags that say whether a file is opened for reading (none of them), writing or both.
_ACCESS = os.O_WRONLY | os.O_RDWR


class IsolationError(OSError):
    """A layer that this machine does not offer."""


def _libc():
    return ctypes.CDLL(None, use_errno=True)


def _call(name, *arguments):
    result = getattr(_libc(), name)(*arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise IsolationError(number, f"{name}: {os.strerror(number)}")
    return result


def _system_call(name, number, *arguments):
    libc = _libc()
    libc.syscall.restype = ctypes.c_long
    result = libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise IsolationError(code, f"{name}: {os.strerror(code)}")
    return result


def unshare(flags: int) -> None:
    """Leave the namespaces named by `flags` for new ones; a new pid namespace begins with the next child.   Raises IsolationError."""
    _call("unshare", flags)


def return_to_own_pid_namespace() -> None:
    """Make the next child one of this process's own pid namespace again, so that `unshare` can make another new one."""
    descriptor = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _call("setns", descriptor, CLONE_NEWPID)
    finally:
        os.close(descriptor)


def own_namespaces() -> None:
    """New user, net, ipc, uts, mount and pid namespaces for the children of this process, in which it keeps its user's number.

    There is no network in them, not even a loopback that is up. Needs a process with one thread.   Raises IsolationError.
    """
    user, group = os.geteuid(), os.getegid()
    unshare(CLONE_NEWUSER)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    unshare(CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWNS | CLONE_NEWPID)
    _call("mount", b"none", b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None)


def private_folder(folder: str, mib: int) -> None:
    """Put an empty folder in memory over `folder`, of at most `mib` MiB and 10,000 files, seen in this mount namespace alone.

    Raises IsolationError.
    """
    options = f"size={mib}m,nr_inodes=10000,mode=0700".encode()
    _call("mount", b"tmpfs", folder.encode(), b"tmpfs", ctypes.c_ulong(_MS_NOSUID | _MS_NODEV), options)


def no_new_privileges() -> None:
    """From here on no program that this process or its children start gives them more than they have."""
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    for capability in range(last + 1):
        try:
            _call("prctl", _PR_CAPBSET_DROP, capability, 0, 0, 0)
        except IsolationError as error:
            if error.errno != errno.EPERM:  # it was never ours to drop
                raise
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def drop_capabilities() -> None:
    """Give up every capability, for good."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    _call("capset", header, (ctypes.c_uint32 * 6)())


def become_nobody() -> None:
    """Take an unprivileged user's number where this process is root's; nothing otherwise."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def end_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends."""
    _call("prctl", _PR_SET_PDEATHSIG, 9, 0, 0, 0)


def landlock_version() -> int:
    """The version of Landlock's interface; 0 where there is none."""
    try:
        return _system_call("landlock", _LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(_LANDLOCK_VERSION))
    except IsolationError:
        return 0


class _Ruleset(ctypes.Structure):
    _fields_ = [("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scoped", ctypes.c_uint64)]


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32)]


def without(paths: Iterable[str], hidden: Iterable[str]) -> tuple[list[str], list[str]]:
    """`paths` without `hidden`, in two lists: what can be read as a whole, and the folders on the way, of which only the names can."""
    hidden, whole, names = [Path(path).resolve() for path in hidden], [], []
    waiting = [Path(path) for path in paths]
    while waiting:
        path = waiting.pop()
        real = path.resolve()
        if any(real == other or other in real.parents for other in hidden):
            continue
        if any(real in other.parents for other in hidden) and real.is_dir():
            names.append(str(path))
            waiting += path.iterdir()
        else:
            whole.append(str(path))
    return whole, names


def file_rules(readable: Iterable[str], writable: Iterable[str], listable: Iterable[str] = ()) -> int:
    """Landlock's rules for `restrict_files`, as a descriptor that children inherit: only these files and folders can be read, and only those
    others be written; no TCP, and where the kernel has it no signal and no abstract socket to anybody outside.

    listable: folders of which, with all below, only the names can be read.   Paths that do not exist are left out.   Raises IsolationError.
    """
    version = landlock_version()
    if not version:
        raise IsolationError(errno.ENOSYS, "Landlock: the kernel has none")
    rights = _FILE_RIGHTS[min(version, 5)]
    rules = _Ruleset(rights, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = _system_call("landlock_create_ruleset", _LANDLOCK_CREATE, ctypes.byref(rules), ctypes.c_size_t(size), ctypes.c_uint32(0))
    for paths, allowed in ((readable, _READ_FILE | _READ_DIR | _EXECUTE), (listable, _READ_DIR), (writable, rights)):
        for path in paths:
            try:
                descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except OSError:
                continue
            rule = _PathBeneath(allowed if os.path.isdir(path) else allowed & rights & _OF_FILES, descriptor)
            _system_call("landlock_add_rule", _LANDLOCK_ADD, ruleset, ctypes.c_int(_LANDLOCK_PATH_BENEATH), ctypes.byref(rule), ctypes.c_uint32(0))
            os.close(descriptor)
    return ruleset


def restrict_files(rules: int) -> None:
    """Landlock: from here on only what `file_rules` allows. Needs `no_new_privileges`.   Raises IsolationError."""
    _system_call("landlock_restrict_self", _LANDLOCK_RESTRICT, rules, ctypes.c_uint32(0))


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def call_rules() -> bytes:
    """seccomp's program for `restrict_calls`: the system calls of a computation in one process. No other process, program, user, mount,
    socket or trace of another process; threads are allowed. Refused calls fail with EPERM.   Raises IsolationError."""
    try:
        import pyseccomp as seccomp

        refused = seccomp.SyscallFilter(seccomp.ERRNO(errno.EPERM))
        for name in _ALLOWED_CALLS:
            if seccomp.resolve_syscall(seccomp.system_arch(), name) >= 0:  # some are of one processor only
                refused.add_rule(seccomp.ALLOW, name)
        # A process's own limits only: those of another one of the same user can be its end.
        refused.add_rule(seccomp.ALLOW, "prlimit64", seccomp.Arg(0, seccomp.EQ, 0))
        # What is opened for reading must not be cut: before its version 3 Landlock does not look.
        for name, flags in (("open", 1), ("openat", 2)):
            if seccomp.resolve_syscall(seccomp.system_arch(), name) >= 0:
                for mask, value in ((_ACCESS, os.O_WRONLY), (_ACCESS, os.O_RDWR), (_ACCESS | os.O_TRUNC, 0)):
                    refused.add_rule(seccomp.ALLOW, name, seccomp.Arg(flags, seccomp.MASKED_EQ, mask, value))
        for command in _ALLOWED_FCNTL:
            refused.add_rule(seccomp.ALLOW, "fcntl", seccomp.Arg(1, seccomp.EQ, command))
        refused.add_rule(seccomp.ALLOW, "clone", seccomp.Arg(0, seccomp.MASKED_EQ, _CLONE_THREAD, _CLONE_THREAD))
        # Its flags lie in memory, where no filter can look: the C library falls back on clone when it is told that there is none.
        refused.add_rule(seccomp.ERRNO(errno.ENOSYS), "clone3")
        for option in (_PR_SET_NAME, _PR_GET_NAME):
            refused.add_rule(seccomp.ALLOW, "prctl", seccomp.Arg(0, seccomp.EQ, option))
        with tempfile.TemporaryFile() as program:
            refused.export_bpf(program)
            program.seek(0)
            return program.read()
    except (ImportError, RuntimeError, OSError) as error:  # pyseccomp raises RuntimeError at import where libseccomp is missing
        raise IsolationError(errno.ENOSYS, f"seccomp: {error}") from None


def restrict_calls(rules: bytes) -> None:
    """seccomp: from here on only what `call_rules` allows. Needs `no_new_privileges`.   Raises IsolationError."""
    program = _Program(len(rules) // _INSTRUCTION, rules)
    _call("prctl", _PR_SET_SECCOMP, _SECCOMP_FILTER, ctypes.byref(program), 0, 0)


def limit_resources(memory_mib: int, cpu_seconds: int, file_mib: int, threads: int = MOST_THREADS, open_files: int = 256) -> None:
    """Hard limits: `memory_mib` more address space than this process has now, processor seconds, the size of a file, threads, open files."""
    import resource  # not on Windows, where this module has to import, too

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = {
        resource.RLIMIT_AS: pages * resource.getpagesize() + memory_mib * 2**20,
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_FSIZE: file_mib * 2**20,
        resource.RLIMIT_NPROC: threads,
        resource.RLIMIT_NOFILE: open_files,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]  # may be lower already, and then cannot be raised
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def newest_child() -> int:
    """The number of the child that this thread forked last, as it is known where /proc comes from: outside of a new pid namespace.

    0 where the kernel does not list children.
    """
    try:
        return int(Path("/proc/thread-self/children").read_text().split()[-1])
    except OSError:
        return 0


def threads_of(pid: int) -> int:
    """How many threads a process has; 0 when it has ended."""
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return 0


def tried_in_a_child(trial: Callable[[], None]) -> str:
    """Why `trial` does not work, in a few words; empty where it does. This process stays as it is: a layer cannot be taken back."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            trial()
            os.write(writing, b"works")
        except BaseException as error:
            # An IsolationError names its layer itself.
            words = str(error) if isinstance(error, IsolationError) else f"{type(error).__name__}: {error}"
            os.write(writing, words.encode(errors="replace")[:300])
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as said:
        words = said.read().decode(errors="replace")
    os.waitpid(child, 0)
    return "" if words == "works" else words or "it was killed"


@dataclass(frozen=True)
class Probe:
    """What this machine offers.   layers: name -> "" where it works, else why not."""

    layers: dict[str, str]

    @property
    def tier(self) -> str:
        """The strongest tier whose layers all work."""
        if any(self.layers[name] for name in ("Landlock", "seccomp")):
            return NONE
        return CALLS_AND_FILES if self.layers["namespaces"] else NAMESPACES


def probe() -> Probe:
    """Try every layer in a process of its own."""
    if not sys.platform.startswith("linux"):
        reason = f"{sys.platform} has none of Linux's"
        return Probe({name: reason for name in _TRIALS})
    command = [sys.executable, "-P", "-m", "labkit.grading.isolation"]
    from labkit.processes import course_environment

    done = subprocess.run(command, env=course_environment(), capture_output=True, text=True, timeout=60)
    try:
        return Probe(json.loads(done.stdout))
    except ValueError:
        return Probe({name: f"the probe failed: {done.stderr.strip()[-200:]}" for name in _TRIALS})


def _try_namespaces():
    own_namespaces()
    private_folder("/tmp", 1)


def _try_landlock():
    no_new_privileges()
    restrict_files(file_rules(["/usr"], []))
    try:
        os.listdir("/")
    except PermissionError:
        return
    raise IsolationError(errno.EPERM, "Landlock: it restricts nothing")


def _try_seccomp():
    no_new_privileges()
    restrict_calls(call_rules())
    try:
        os.kill(os.getpid(), 0)
    except PermissionError:
        return
    raise IsolationError(errno.EPERM, "seccomp: it restricts nothing")


_TRIALS = {"namespaces": _try_namespaces, "Landlock": _try_landlock, "seccomp": _try_seccomp}


def main():
    """Try the layers, each in a child, and print the result as JSON."""
    print(json.dumps({name: tried_in_a_child(trial) for name, trial in _TRIALS.items()}))


if __name__ == "__main__":
    main()
