"""Properties of what holds a student's process: every layer by itself, the tiers made of them, and the workers that a zygote forks.

The judges are the operating system's own answers: error numbers, /proc, a server that really listens, processes that really die.
"""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace

import psutil
import pytest

from labkit.errors import UserError
from labkit.exercises.exercise import Case, Raised
from labkit.grading import isolation, sandbox
from labkit.grading.grade import Grader
from labkit.grading.isolation import CALLS_AND_FILES, CONTAINER, NAMESPACES, NONE, TIERS, Probe
from labkit.grading.sandbox import LIMITS, IsolatedWorker, Isolation, Zygote, ZygoteLost, chosen_isolation
from labkit.paths import ROOT
from labkit.processes import course_environment
from labkit.submission.apart import WorkerLost
from tests.grading_runs import (
    QUICK_ZYGOTE,
    SECRET,
    assert_nothing_left,
    course,
    hand_in,
    jobs_of,
    notebook,
    processes_of,
    quick_imports,
    wait_for,
)  # fmt: skip

FOUND = isolation.probe()
EVERYWHERE = dict.fromkeys(("namespaces", "Landlock", "seccomp"), "")
TRIED = """
def tried(do, *arguments):
    try:
        do(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno]
    return "done"
"""
_PRELUDE = """
import errno, json, os, resource, signal, socket, subprocess, sys, threading, time
from pathlib import Path
from labkit.grading import isolation
""" + TRIED + """
def in_a_child(do):
    pid = os.fork()
    if pid == 0:
        do()
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(pid, 0)

def say(**found):
    print(json.dumps(found))

def behind(readable, writable):
    isolation.no_new_privileges()
    isolation.restrict_files(isolation.file_rules(map(str, readable), map(str, writable)))

def connected():
    socket.create_connection(("127.0.0.1", int(sys.argv[1])))
"""


def needs(*layers):
    """Mark tests that cannot be run where this machine does not offer these layers."""
    reasons = [f"{layer}: {FOUND.layers[layer]}" for layer in layers if FOUND.layers[layer]]
    return pytest.mark.skipif(bool(reasons), reason="; ".join(reasons) or "all there")


def alone(code, *arguments):
    """What `code` says, in a process of its own that can import `isolation`."""
    command = [sys.executable, "-P", "-c", _PRELUDE + code, *map(str, arguments)]
    done = subprocess.run(command, env=course_environment(), capture_output=True, text=True, timeout=120)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def places(tmp_path):
    """Three folders with a file each: to read, to write, and another one."""
    for name in ("read", "write", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    return tmp_path


@pytest.fixture
def server():
    """The port of a server on this machine that takes connections."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


@needs("Landlock")
def test_files_outside_the_lists_can_be_neither_read_nor_written(places):
    found = alone("""
root = Path(sys.argv[1])
behind(["/usr", root / "read", root / "nowhere"], [root / "write"])
say(read=tried((root / "read/file").read_text), listed=tried(os.listdir, root / "read"), changed=tried((root / "read/file").write_text, "y"),
    made=tried((root / "read/more").touch), removed=tried((root / "read/file").unlink), other=tried((root / "other/file").read_text),
    list_other=tried(os.listdir, root / "other"), write_other=tried((root / "other/more").touch), above=tried(os.listdir, root),
    own=[tried((root / "write/file").write_text, "y"), tried((root / "write/folder").mkdir), tried((root / "write/folder").rmdir),
         tried((root / "write/file").rename, root / "write/renamed"), tried((root / "write/renamed").unlink)],
    linked=[tried((root / "write/link").symlink_to, root / "other/file"), tried((root / "write/link").read_text)],
    hard=tried(os.link, root / "other/file", root / "write/hard"), passwd=tried(Path("/etc/passwd").read_text),
    processes=tried(os.listdir, "/proc/self"),
    again=tried(behind, ["/"], ["/"]) and tried((root / "other/file").read_text))
""", places)
    assert found.pop("own") == ["done"] * 5
    assert found.pop("linked") == ["done", "EACCES"]
    assert found.pop("hard") in ("EXDEV", "EACCES")
    assert {name for name, result in found.items() if result == "done"} == {"read", "listed"}
    assert set(found.values()) == {"done", "EACCES"}
    assert (places / "read" / "file").read_text() == (places / "other" / "file").read_text() == "x"


@needs("Landlock")
def test_a_single_file_can_be_on_the_lists(places):
    found = alone("""
root = Path(sys.argv[1])
behind([root / "read/file"], [root / "write/file", "/dev/null"])
say(read=tried((root / "read/file").read_text), write=tried((root / "write/file").write_text, "y"), null=tried(Path("/dev/null").write_text, "y"),
    beside=[tried((root / "read/more").touch), tried(os.listdir, root / "read"), tried((root / "write/file").unlink)])
""", places)
    assert found == {"read": "done", "write": "done", "null": "done", "beside": ["EACCES"] * 3}


@needs("Landlock")
@pytest.mark.skipif(not FOUND.layers["Landlock"] and isolation.landlock_version() < 4, reason="this kernel's Landlock knows no network")
def test_no_tcp_behind_landlock(server):
    assert alone("before = tried(connected)\nbehind(['/usr'], [])\n"
                 "say(before=before, connected=tried(connected), bound=tried(lambda: socket.create_server(('127.0.0.1', 0))))", server) == {
        "before": "done", "connected": "EACCES", "bound": "EACCES"}


@needs("namespaces")
def test_in_namespaces_there_is_no_network_and_no_other_process(server):
    found = alone("""
def spaces():
    return {name: os.readlink(f"/proc/self/ns/{name}") for name in ("user", "pid", "net", "ipc", "uts", "mnt")}
outside, parent, abstract = spaces(), os.getpid(), socket.socket(socket.AF_UNIX)
abstract.bind("\\0labkit-test-" + str(parent))
abstract.listen()
isolation.own_namespaces()
ours = {"user": os.geteuid(), "ours": sorted(name for name, link in spaces().items() if link != outside[name])}
def child():
    unix = socket.socket(socket.AF_UNIX)
    say(**ours, pid=os.getpid(), parent=os.getppid(), kill=tried(os.kill, parent, 0), connected=tried(connected),
        abstract=tried(unix.connect, "\\0labkit-test-" + str(parent)), interfaces=len(socket.if_nameindex()),
        root=tried(os.setuid, 0 if os.geteuid() else 1))
in_a_child(child)
""", server)
    assert found.pop("ours") == ["ipc", "mnt", "net", "user", "uts"]  # the pid namespace begins with the child, as its number says
    assert found == {"user": os.geteuid(), "pid": 1, "parent": 0, "kill": "ESRCH", "connected": "ENETUNREACH", "abstract": "ECONNREFUSED",
                     "interfaces": 1, "root": "EINVAL"}


@needs("namespaces")
def test_one_pid_namespace_after_the_other(server):
    found = alone("""
isolation.own_namespaces()
def zygote():
    numbers = []
    for _ in range(3):
        isolation.unshare(isolation.CLONE_NEWPID)
        pid = os.fork()
        if pid == 0:
            os._exit(10 + os.getpid())
        numbers.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        isolation.return_to_own_pid_namespace()
    pid = os.fork()
    if pid == 0:
        os._exit(10 + os.getpid())
    say(inside=numbers, back=os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
in_a_child(zygote)
""")
    assert found["inside"] == [11, 11, 11] and found["back"] > 11


@needs("namespaces")
def test_a_private_folder_is_empty_limited_and_seen_by_nobody_else(places):
    found = alone("""
folder = Path(sys.argv[1]) / "write"
isolation.own_namespaces()
def child():
    isolation.private_folder(str(folder), 1)
    before = os.listdir(folder)
    small, large = tried((folder / "small").write_bytes, b"x" * 2**19), tried((folder / "large").write_bytes, b"x" * 2**20)
    (folder / "small").unlink(), (folder / "large").unlink()
    def many():
        for number in range(10_001):
            (folder / str(number)).touch()
    say(before=before, small=small, large=large, many=tried(many), mode=folder.stat().st_mode & 0o777)
in_a_child(child)
""", places)
    assert found == {"before": [], "small": "done", "large": "ENOSPC", "many": "ENOSPC", "mode": 0o700}
    assert os.listdir(places / "write") == ["file"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="capabilities are Linux's")
def test_privileges_are_gone_for_good():
    found = alone("""
isolation.no_new_privileges()
isolation.drop_capabilities()
status = dict(line.split(":\\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
say(capabilities=[int(status[name], 16) for name in ("CapEff", "CapPrm", "CapInh", "CapAmb")], bounding=int(status["CapBnd"], 16),
    new=status["NoNewPrivs"], chroot=tried(os.chroot, "/"), owner=os.geteuid())
""")
    assert found["capabilities"] == [0] * 4 and found["new"] == "1" and found["chroot"] == "EPERM"
    assert found["bounding"] == 0 or os.geteuid() != 0


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become somebody else")
def test_root_becomes_nobody_and_cannot_go_back(tmp_path):
    found = alone("""
isolation.become_nobody()
say(ids=[*os.getresuid(), *os.getresgid(), *os.getgroups()], back=tried(os.setuid, 0), read=tried(Path("/etc/shadow").read_text))
""")
    assert found == {"ids": [65534] * 6, "back": "EPERM", "read": "EACCES"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's signal at a parent's end is Linux's")
def test_a_process_ends_with_the_one_that_started_it():
    code = "pid = os.fork()\nif pid == 0:\n    isolation.end_with_parent()\nelse:\n    say(child=pid)\n    sys.stdout.flush()\ntime.sleep(1000)\n"
    process = subprocess.Popen([sys.executable, "-P", "-c", _PRELUDE + code], env=course_environment(), stdout=subprocess.PIPE, text=True)
    child = psutil.Process(json.loads(process.stdout.readline())["child"])
    wait_for(lambda: child.status() == psutil.STATUS_SLEEPING)
    process.kill()
    process.communicate()
    wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


@needs("seccomp")
def test_only_the_calls_of_a_computation_are_left():
    found = alone("""
isolation.no_new_privileges()
isolation.drop_capabilities()
isolation.restrict_calls(isolation.call_rules())
import ctypes, mmap
libc = ctypes.CDLL(None, use_errno=True)
def raw(name, *arguments):
    ctypes.set_errno(0)
    return errno.errorcode[ctypes.get_errno()] if getattr(libc, name)(*arguments) < 0 else "done"
seen = []
thread = threading.Thread(target=seen.append, args=(1,))
thread.start()
thread.join()
mmap.mmap(-1, 4096).close()
reading, writing = os.pipe()
os.write(writing, b"x")
say(refused=[tried(os.fork), tried(os.posix_spawn, "/usr/bin/env", ["env"], {}), tried(os.execv, "/usr/bin/env", ["env"]),
             tried(os.kill, os.getppid(), 0), tried(os.kill, os.getpid(), 9), tried(socket.socket), tried(socket.socket, socket.AF_UNIX),
             tried(os.setsid), tried(os.symlink, "/", "x"), tried(os.chmod, "/", 0o777), tried(os.chroot, "/"),
             raw("ptrace", 0, 0, 0, 0), raw("mount", None, b"/", None, 0, None),
             raw("unshare", isolation.CLONE_NEWUSER), raw("personality", 0), raw("process_vm_readv", os.getppid(), None, 0, None, 0, 0),
             raw("prctl", 4, 1, 0, 0, 0)],
    allowed=[seen == [1], os.read(reading, 1) == b"x", sum(range(1000)) == 499500, time.time() > 0, len(os.urandom(8)) == 8])
""")
    assert set(found["refused"]) == {"EPERM"} and all(found["allowed"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limits are Linux's")
def test_resources_are_limited_and_a_limit_that_is_reached_is_an_error_in_python(tmp_path):
    found = alone("""
os.chdir(sys.argv[1])
isolation.limit_resources(64, 100, 1, open_files=20)
def large():
    try:
        bytearray(80 * 2**20)
    except MemoryError:
        raise OSError(errno.ENOMEM, "") from None
def many():
    kept = [open("/dev/null") for _ in range(30)]
say(large=tried(large), small=len(bytearray(20 * 2**20)), file=tried(Path("large").write_bytes, b"x" * (2**20 + 1)), many=tried(many),
    core=resource.getrlimit(resource.RLIMIT_CORE))
""", tmp_path)
    assert found == {"large": "ENOMEM", "small": 20 * 2**20, "file": "EFBIG", "many": "EMFILE", "core": [0, 0]}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limits are Linux's")
def test_limits_that_are_lower_already_stay():
    assert alone("""
resource.setrlimit(resource.RLIMIT_NOFILE, (30, 30))
isolation.drop_capabilities()
isolation.limit_resources(1024, 100, 1)
say(files=resource.getrlimit(resource.RLIMIT_NOFILE))
""") == {"files": [30, 30]}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limits are Linux's")
def test_a_process_that_computes_too_long_is_killed():
    code = _PRELUDE + "isolation.limit_resources(1024, 1, 1)\nwhile True: pass"
    done = subprocess.run([sys.executable, "-P", "-c", code], env=course_environment(), capture_output=True, timeout=300)
    assert done.returncode == -signal.SIGKILL


def test_the_probe_names_every_layer_and_says_why_one_does_not_work(monkeypatch):
    assert list(FOUND.layers) == ["namespaces", "Landlock", "seccomp"] and all(isinstance(reason, str) for reason in FOUND.layers.values())
    monkeypatch.setattr(sys, "platform", "darwin")
    elsewhere = isolation.probe()
    assert elsewhere.tier == NONE and set(elsewhere.layers.values()) == {"darwin has none of Linux's"}


def test_a_probe_that_breaks_is_taken_for_no_isolation(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    broken = isolation.probe()
    assert broken.tier == NONE and all("the probe failed" in reason for reason in broken.layers.values())


@pytest.mark.parametrize("missing, tier", [((), NAMESPACES), (("namespaces",), CALLS_AND_FILES), (("Landlock",), NONE), (("seccomp",), NONE),
                                           (("namespaces", "seccomp"), NONE)])  # fmt: skip
def test_a_tier_is_as_strong_as_its_weakest_layer(monkeypatch, missing, tier):
    probe = Probe(EVERYWHERE | dict.fromkeys(missing, "refused"))
    assert probe.tier == tier
    monkeypatch.setattr(isolation, "probe", lambda: probe)
    assert chosen_isolation().tier == tier
    for wanted in (NAMESPACES, CALLS_AND_FILES):
        if TIERS.index(wanted) >= TIERS.index(tier):
            assert chosen_isolation(wanted).tier == wanted
        else:
            with pytest.raises(UserError, match=f"{wanted}' does not work here .*{missing[0]}: refused.*'{tier}'"):
                chosen_isolation(wanted)
    for wanted in (CONTAINER, NONE):
        assert chosen_isolation(wanted) == Isolation(wanted, "own") and not chosen_isolation(wanted).has_zygote
    with pytest.raises(UserError, match="is no tier of isolation: name one of full, no-namespaces, container, none"):
        chosen_isolation("Full")


def test_without_isolation_every_line_about_it_warns():
    assert str(Isolation(NONE)) == "none: not isolated: do not use on untrusted code"
    assert set(isolation.SAID) == set(TIERS)


def test_another_user_takes_the_workers_only_where_root_grades_and_all_can_read(monkeypatch):
    monkeypatch.setattr(isolation, "probe", lambda: Probe(EVERYWHERE))
    for user in (0, 1000):
        for readable in (True, False):
            monkeypatch.setattr(os, "geteuid", lambda user=user: user)
            monkeypatch.setattr(sandbox, "_is_readable_by_all", lambda readable=readable: readable)
            assert chosen_isolation().user == ("nobody" if user == 0 and readable else "own")


SETUP = "import random, numpy, torch\nrandom.seed(1); numpy.random.seed(1); torch.manual_seed(1)\nshared, weights = [1], torch.zeros(3)"
OTHER_SETUP = "import random, numpy, torch\nrandom.seed(2); numpy.random.seed(2); torch.manual_seed(2)\nshared = [2]"
BROKEN_SETUP = "import torch\nraise RuntimeError('no data')"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder of temporary files; zygotes of this file start quickly, and none of them is left at the end."""
    with pytest.MonkeyPatch.context() as patch:
        place = quick_imports(patch, tmp_path_factory.mktemp("sandbox"))
        patch.setenv("COURSE_TOKEN", SECRET)
        yield place
        assert_nothing_left(place)


@pytest.fixture(scope="module", params=[pytest.param(NAMESPACES, marks=needs("namespaces", "Landlock", "seccomp")),
                                        pytest.param(CALLS_AND_FILES, marks=needs("Landlock", "seccomp"))])  # fmt: skip
def zygote(request, place):
    with Zygote(chosen_isolation(request.param), [SETUP, OTHER_SETUP, BROKEN_SETUP]) as zygote:
        yield zygote


def told(zygote, source, setup=None, limits=LIMITS):
    """What the function `answer` of a cell returns in a fresh worker; what the cell raises where it raises."""
    with IsolatedWorker(limits, zygote) as worker:
        for name, text in (("set-up cell", setup), ("cell", source)):
            raised = worker.run(name, text) if text else None
            if raised:
                return raised
        return worker.ask("answer", Case({}, "", ""))


STATE = """
import os, random, stat, sys
import numpy, torch
drawn = [random.random(), float(numpy.random.rand()), float(torch.rand(()))]
def opened():
    kinds = []
    for descriptor in range(256):
        try:
            mode = os.fstat(descriptor).st_mode
        except OSError:
            continue
        kinds.append("pipe" if stat.S_ISFIFO(mode) else "device" if stat.S_ISCHR(mode) else "other")
    return kinds
def answer():
    return {"drawn": drawn, "hash": hash("course"), "order": list({"a", "b", "c", "d"}), "cwd": os.getcwd(), "files": os.listdir("."),
            "environment": dict(os.environ), "path": sys.path, "threads": torch.get_num_threads(), "open": opened(), "names": sorted(globals()),
            "pid": os.getpid(), "umask": os.umask(0o22), "modules": len(sys.modules)}
"""


def test_every_worker_starts_from_the_same_state(zygote):
    first, second = told(zygote, STATE), told(zygote, STATE)
    if zygote.how.tier == NAMESPACES:
        assert first["pid"] == 1
    else:
        first.pop("pid"), second.pop("pid")
    assert first == second
    assert first["files"] == [] and first["cwd"] == zygote.folder and first["threads"] == 1 and "other" not in first["open"]
    assert {first["environment"][name] for name in ("HOME", "TMPDIR", "MPLCONFIGDIR")} == {zygote.folder}


def test_a_worker_has_a_folder_of_its_own_that_is_limited_and_gone_afterwards(zygote):
    filling = """
import os
def answer():
    os.mkdir("folder"); open("folder/file", "w").write("x"); os.mkdir("closed", 0)
    open(os.path.join(os.environ["TMPDIR"], "more"), "w").write("x")
    try:
        open("large", "wb").write(bytes(65 * 2**20))
    except OSError as error:
        said = error.strerror
    return sorted(os.listdir(".")), said
"""
    names, said = told(zygote, filling)
    assert names == ["closed", "folder", "large", "more"] and said in (os.strerror(errno.ENOSPC), os.strerror(errno.EFBIG))
    assert told(zygote, "import os\ndef answer():\n    open('file', 'w').write('x')\n    return os.listdir('.')") == ["file"]
    nesting = "import os\ndef answer():\n    for _ in range(1100):\n        os.mkdir('x' * 100); os.chdir('x' * 100)\n    return 1"
    if zygote.how.tier == NAMESPACES:
        assert told(zygote, nesting) == 1
    else:  # where the folder is one of the machine's, that is too much
        with pytest.raises(WorkerLost, match="nested"):
            told(zygote, nesting)
    told(zygote, "answer = lambda: 1")  # the folder is emptied before the next worker starts
    assert os.listdir(zygote.folder) == []


def test_the_graders_environment_is_not_the_workers(zygote):
    environment = told(zygote, "import os\nanswer = lambda: dict(os.environ)")
    assert SECRET not in str(environment) and "COURSE_TOKEN" not in environment and "PATH" in environment


def test_what_the_set_up_has_made_is_a_copy_for_each(zygote):
    spoiling = "shared.append(2); weights += 1; torch.nn.spoiled = True\ndef answer(): return shared, weights"
    for _ in range(2):
        shared, weights = told(zygote, spoiling, SETUP)
        assert shared == [1, 2] and weights.tolist() == [1, 1, 1]
    assert told(zygote, "def answer(): return shared, hasattr(torch.nn, 'spoiled')", OTHER_SETUP) == ([2], False)


def test_only_exactly_the_released_set_up_is_inherited(zygote):
    assert told(zygote, "answer = lambda: 1", BROKEN_SETUP) == Raised("RuntimeError", "no data", 2)
    assert isinstance(told(zygote, "answer = lambda: shared"), Raised)
    with IsolatedWorker(LIMITS, zygote) as worker:
        assert worker.run("cell", "mine = 1") is None and worker.run("set-up cell", SETUP) is None
        worker.run("cell", "def answer(): return mine, shared")
        assert worker.ask("answer", Case({}, "", "")) == (1, [1])


@pytest.mark.parametrize("setup", [SETUP, OTHER_SETUP], ids=["first", "last"])
def test_an_inherited_set_up_leaves_the_random_generators_as_a_run_one_does(zygote, setup):
    drawn = "drawn = [random.random(), float(numpy.random.rand()), float(torch.rand(()))]\ndef answer(): return drawn"
    assert told(zygote, drawn, setup) == told(zygote, drawn, setup + "\n")


def test_a_worker_can_neither_read_nor_reach_nor_start_anything_else(zygote, server):
    found = told(zygote, f"""
import errno, os, socket, subprocess, sys
from pathlib import Path
{TRIED}
def answer():
    return {{"read": [tried(Path(p).read_bytes) for p in ("/etc/passwd", "{ROOT}/labkit/grading/grade.py", "{ROOT}/notebooks/03_adapters.ipynb",
                      "{ROOT}/labkit/exercises/lora_parameter_counting.py", "/proc/self/environ", "/proc/1/environ")],
            "listed": [tried(os.listdir, p) for p in ("/", "/tmp", "/proc", "{ROOT}", "/etc", "/dev/shm")],
            "written": [tried(Path(p).write_text, "x") for p in ("/tmp/labkit-x", "/dev/shm/labkit-x", sys.prefix + "/labkit-x")],
            "connected": tried(socket.create_connection, ("127.0.0.1", {server})), "forked": tried(os.fork),
            "run": tried(subprocess.run, ["/bin/true"]), "killed": tried(os.kill, os.getppid(), 9),
            "library": len(Path(os.__file__).read_text()) > 0}}
""")
    assert found.pop("library") is True
    for name, results in found.items():
        assert set(results if isinstance(results, list) else [results]) <= {"EACCES", "EPERM", "ENOENT"}, (name, results)


def test_a_worker_computes_with_gradients_and_threads(zygote):
    assert told(zygote, """
import threading, torch
def answer():
    x = torch.arange(4.0, requires_grad=True)
    thread = threading.Thread(target=lambda: (x @ x).backward())
    thread.start()
    thread.join()
    return x.grad
""").tolist() == [0, 2, 4, 6]


def test_too_much_memory_is_an_error_that_the_worker_survives(zygote):
    limits = replace(LIMITS, memory_mib=256)
    for allocate in ("bytearray(2**29)", "torch.ones(2**27)", "numpy.ones(2**27)", "[bytes(2**20) for _ in range(1000)]"):
        found = told(zygote, f"""
import numpy, torch
def answer():
    try:
        {allocate}
    except (MemoryError, RuntimeError) as error:
        return type(error).__name__, sum(range(10))
""", limits=limits)
        assert found in (("MemoryError", 45), ("RuntimeError", 45)), (allocate, found)


def test_a_worker_that_goes_on_for_ever_is_stopped_with_all_its_threads(zygote):
    loop = "lambda: [0 for _ in iter(int, 1)]"
    with IsolatedWorker(LIMITS, zygote) as worker:
        with pytest.raises(WorkerLost, match="longer than 0 s"):
            worker.run("cell", f"import threading\nfor _ in range(4): threading.Thread(target={loop}).start()\n({loop})()", seconds=0.3)
        with pytest.raises(WorkerLost, match="longer than 0 s"):
            worker.run("cell", "1")
    wait_for(lambda: len(processes_of(zygote.folder)) == 2)
    assert told(zygote, "answer = lambda: 1") == 1


@pytest.mark.parametrize("source", ["import os\nos._exit(0)", "import ctypes\nctypes.string_at(0)", "import signal\nsignal.raise_signal(15)"])
def test_a_worker_that_ends_is_noticed_and_the_next_one_starts(zygote, source):
    with IsolatedWorker(LIMITS, zygote) as worker:
        try:
            assert worker.run("cell", source).kind == "PermissionError"  # no worker sends signals, not even to itself
        except WorkerLost as lost:
            assert str(lost) == "the process ended"
    assert told(zygote, "answer = lambda: 1") == 1


def test_many_workers_leave_no_descriptor_behind(zygote):
    ours = psutil.Process()
    told(zygote, "answer = lambda: 1")
    before = ours.num_fds()
    for _ in range(20):
        assert told(zygote, "answer = lambda: 1") == 1
    wait_for(lambda: ours.num_fds() < before + 20)  # other tests' threads may open some meanwhile


def test_walls_that_do_not_stand_are_not_put_down_to_students(place, tmp_path, monkeypatch):
    how = chosen_isolation()
    if not how.has_zygote:
        pytest.skip(f"no tier with a zygote works here: {FOUND.layers}")
    (tmp_path / "sitecustomize.py").write_text(QUICK_ZYGOTE + "import resource\nresource.setrlimit = lambda *a: 1 / 0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]]))
    with pytest.raises(ZygoteLost, match="cannot be confined: ZeroDivisionError"):
        Zygote(how).__enter__()


def test_a_zygote_that_has_ended_is_lost_and_leaves_nothing(place):
    how = chosen_isolation()
    if not how.has_zygote:
        pytest.skip(f"no tier with a zygote works here: {FOUND.layers}")
    with Zygote(how) as zygote:
        folder = zygote.folder
        (process, *_) = processes_of(folder)
        for process in processes_of(folder):
            process.kill()
        with pytest.raises(ZygoteLost):
            zygote.start(LIMITS, [0, 1, 2])
        with pytest.raises(ZygoteLost):
            zygote.stop()
        with pytest.raises(ZygoteLost):
            with IsolatedWorker(LIMITS, zygote):
                pass
    assert not os.path.exists(folder) and not processes_of(folder)


@pytest.mark.parametrize("tier", [NONE, CONTAINER])
def test_plain_processes_grade_where_there_is_no_zygote(place, tmp_path, tier):
    by = course(how=chosen_isolation(tier))
    (job,) = jobs_of(hand_in(tmp_path, "ann", notebook({"lora-count": "import os\nos._exit(1)"} if tier == NONE else {})), by)
    with Grader(by) as grader:
        record = grader.grade(job)
    assert record.isolation == tier and [v.earned for v in record.verdicts] == ([5, 0, 3, 4] if tier == NONE else [5, 3, 3, 4])
    assert not list(place.glob("labkit-worker-*"))
