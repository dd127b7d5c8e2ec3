"""Processes: more of them, others' of them, and such as outlive the grading. Every bomb here counts its sparks and every sleep ends."""

from tests.attacks.attack import ENDLESS, LEFT, LOST, OPEN, POINTS, REACHED, STOPPED, WRONG, on_count

_CALL = """
import ctypes, os
def call(number, *arguments):
    library = ctypes.CDLL(None, use_errno=True)
    library.syscall.restype = ctypes.c_long
    if library.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments)) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
"""

ATTACKS = [
    on_count("fork-bomb", LEFT, "starts processes that start processes (thirty here)", f"""
import os, time
for _ in range(30):
    if os.fork() == 0:
        time.sleep(20)
        os._exit(0)
{WRONG["lora-count"]}"""),
    on_count("daemon", LEFT, "starts a process in a session of its own, by way of one that ends at once", f"""
import os, time
child = os.fork()
if child == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(20)
    os._exit(0)
os.waitpid(child, 0)
{WRONG["lora-count"]}"""),
    on_count("other-programs", LEFT, "starts a program of the system", f"""
import subprocess
subprocess.Popen(["sleep", "20"], start_new_session=True)
{WRONG["lora-count"]}"""),
    on_count("posix-spawn", LEFT, "starts a program without fork", f"""
import os
os.posix_spawn("/bin/sleep", ["sleep", "20"], os.environ)
{WRONG["lora-count"]}"""),
    on_count("become-another-program", POINTS, "becomes a program that writes the result", """
import os, sys
code = '''
import pickle
points = {"lora-layer": 5, "lora-count": 3, "lora-merge": 3, "lora-rank-needed": 4}
with open("result.pickle", "wb") as file:
    pickle.dump({"assignment": "lora", "points": points, "feedback": {}, "answers": {}}, file)
'''
os.execv(sys.executable, [sys.executable, "-S", "-c", code])
"""),
    on_count("kill-the-parent", STOPPED, "kills the process that started it", f"""
import os, signal
os.kill(os.getppid(), signal.SIGKILL)
{WRONG["lora-count"]}"""),
    on_count("kill-the-group", STOPPED, "kills its process group, and whoever is in it", f"""
import os, signal
os.killpg(0, signal.SIGKILL)
{WRONG["lora-count"]}"""),
    on_count("kill-by-thread", STOPPED, "sends the signal to the parent's first thread, by another call of the system", _CALL + f"""
import os, platform, signal
call({{"x86_64": 234, "aarch64": 131}}[platform.machine()], os.getppid(), os.getppid(), signal.SIGKILL)
{WRONG["lora-count"]}"""),
    on_count("signal-the-first-process", REACHED, "asks whether it may send signals to process 1 (and sends none)", f"""
import os
os.kill(1, 0)
raise RuntimeError("{OPEN}")
"""),
    on_count("limits-for-the-parent", STOPPED, "gives the process that started it one second of processor time, which is over", f"""
import os, resource
resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))
{WRONG["lora-count"]}"""),
    on_count("signals-by-way-of-a-pipe", STOPPED, "makes the parent the owner of a pipe that sends it SIGKILL when it is written to", f"""
import fcntl, os, signal
reading, writing = os.pipe()
fcntl.fcntl(reading, 10, signal.SIGKILL)  # F_SETSIG
fcntl.fcntl(reading, fcntl.F_SETOWN, os.getppid())
fcntl.fcntl(reading, fcntl.F_SETFL, os.O_ASYNC)
os.write(writing, b"x")
{WRONG["lora-count"]}"""),
    on_count("trace-the-parent", REACHED, "attaches to the parent as a debugger does", _CALL + f"""
import os, platform
call({{"x86_64": 101, "aarch64": 117}}[platform.machine()], 0x4206, os.getppid(), 0, 0)  # PTRACE_SEIZE
raise RuntimeError("{OPEN}")
"""),
    on_count("descriptor-of-the-parent", REACHED, "opens a descriptor of the parent, with which its files can be taken over", _CALL + f"""
import os
call(434, os.getppid(), 0)  # pidfd_open
raise RuntimeError("{OPEN}")
"""),
    on_count("deaf-to-signals", ENDLESS, "ignores every signal that can be ignored, and sleeps", """
import signal, time
for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
    try:
        signal.signal(number, signal.SIG_IGN)
    except OSError:
        pass
time.sleep(60)
"""),
    on_count("stops-itself", ENDLESS, "stops itself, as Ctrl-Z would, and waits for someone to wake it", """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGSTOP)
finally:
    time.sleep(60)
"""),
    on_count("ends-the-process", LOST, "ends the process without a word, and with it the rest of the notebook", """
import os
os._exit(0)
"""),
    on_count("ends-when-asked", LOST, "raises what `except Exception` does not catch", """
def count_lora(shapes, rank):
    import os
    os._exit(3)
"""),
    on_count("many-threads", REACHED, "starts hundreds of threads with small stacks", f"""
import _thread, threading, time
threading.stack_size(65536)
for _ in range(500):
    _thread.start_new_thread(time.sleep, (5,))
raise RuntimeError("{OPEN}: 500 threads")
"""),
]
