"""Starting other programs: what every process of the course finds in its environment, and handing the terminal over to one."""

import os
import subprocess
import sys

from labkit.paths import ROOT

# A model this small is fastest on one thread, and results are bit-identical only between runs with the same number of threads.
# Threads that wait must sleep: spinning ones slow a busy two-core machine down more than tenfold.
THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}


def course_environment():
    """Environment variables, as a dict, for Jupyter servers, kernels and tests: labkit importable, threads as the course sets them."""
    environment = dict(THREADS, **os.environ)
    folders = [str(ROOT)] + [folder for folder in environment.get("PYTHONPATH", "").split(os.pathsep) if folder]
    environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(folders))
    # Without this, a kernel called python3 in the user's home directory hides the one of this environment.
    environment["JUPYTER_PREFER_ENV_PATH"] = "1"
    return environment


def hand_over(command, environment=None):
    """Let `command` (a list of strings) take this process's place; where there is no exec, wait for it and return its exit code."""
    environment = dict(os.environ if environment is None else environment)
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "posix":
        os.execve(command[0], command, environment)
    process = subprocess.Popen(command, env=environment)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue  # Ctrl-C reached the program, too; how it ends is for it to say
