"""What not to do: a grader that runs a student's notebook and its own checks in one process, and believes the file that this leaves behind.

It is not made of straw: this is how notebook graders work that start one kernel a notebook, run all its cells, give the points of every
check that raises nothing, and collect what the kernel says. The attacks show, one by one, what comes of it.

`python -m tests.attacks.naive` waits for lines of JSON. For each it grades notebooks, one after the other, as a batch does: an attack's and,
where the line says so, an honest one. What keeps the tests' machine from harm (limits, a session and a folder of their own) is marked; a grader
of this kind has none.
"""

from __future__ import annotations

import atexit
import csv
import gc
import json
import os
import pickle
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

from tests.attacks.attack import LESSON, SECRET, is_setup, solved

MIB = 2**20
_SAID = {}  # entry -> what it raised when it was asked


def hidden_check(entry) -> int:
    """labkit's own check, with the hidden cases of the secret; returns the points, and keeps what the student's code raises for the feedback."""
    from labkit.exercises import judging
    from labkit.exercises.asking import answer
    from labkit.exercises.exercise import Raised, exercises_of

    def ask(case):
        given = answer(entry, case)
        if isinstance(given, Raised):
            _SAID[asked.entry] = given.message
        return given

    asked = next(exercise for exercise in exercises_of(LESSON) if exercise.entry == entry.__name__)
    verdict = judging.judge(asked, ask, SECRET, hidden=True)
    print(verdict)
    return verdict.earned


def run_notebook(notebook: dict, prepared: str) -> None:
    """The kernel: run all cells, and leave `result.pickle` with points, feedback and answers."""
    from IPython.core.interactiveshell import InteractiveShell

    shell, points, feedback = InteractiveShell.instance(), {}, {}
    for cell in notebook["cells"]:
        source, about = "".join(cell["source"]), cell["metadata"].get("nbgrader", {})
        done = shell.run_cell(source.removeprefix(prepared) if is_setup(cell) else source)
        error = done.error_before_exec or done.error_in_exec
        if error is not None:
            feedback[str(about.get("grade_id"))] = f"{error}" + next((words for entry, words in _SAID.items() if f"({entry})" in source), "")
        elif about.get("grade_id", "").endswith("-check"):
            points[about["grade_id"].removesuffix("-check")] = about["points"]
    import tomllib  # imported where it is needed, as everywhere

    name = tomllib.loads('name = "lora"')["name"]
    answers = {entry: value for entry, value in shell.user_ns.items() if entry == "ANSWER"}
    with open("result.pickle", "wb") as file:
        pickle.dump({"assignment": name, "points": points, "feedback": feedback, "answers": answers}, file)


def grade(path: Path, folder: Path, out: Path, prepared: str) -> None:
    """One submission: a kernel in the submission's folder, then the record, the page and the row of the table."""
    folder.mkdir()
    kernel = os.fork()
    if kernel == 0:
        _for_safety()
        os.chdir(folder)
        sys.path.insert(0, "")  # a notebook imports what lies beside it
        _print_to("output.txt")
        try:
            run_notebook(json.loads(path.read_text()), prepared)
            atexit._run_exitfuncs()
        finally:
            sys.stdout.flush()
            os._exit(0)
    os.waitpid(kernel, 0)
    with open(folder / "result.pickle", "rb") as file:
        result = pickle.load(file)
    words = " ".join(result["feedback"].values())
    (out / f"{path.stem}.json").write_text(json.dumps({name: result[name] for name in ("points", "feedback")}))
    (out / f"{path.stem}.html").write_text(f"<p>{words}</p>")
    with open(out / "grades.csv", "a", newline="") as file:
        csv.writer(file).writerow([path.stem, sum(result["points"].values()), words])
    (out / f"{path.stem}.size").write_text(str((folder / "output.txt").stat().st_size))
    shutil.rmtree(folder)


def _for_safety():
    """The tests' own limits."""
    for kind, most in ((resource.RLIMIT_AS, 6144 * MIB), (resource.RLIMIT_FSIZE, 300 * MIB), (resource.RLIMIT_CPU, 20)):
        resource.setrlimit(kind, (most, most))


def _print_to(name):
    file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, place in ((nothing, 0), (file, 1), (file, 2)):
        os.dup2(descriptor, place)
    os.close(file)
    os.close(nothing)


def _ended_in_time(pid, seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return True
        time.sleep(0.005)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def main():
    """Import once, run the released set-up cell once, and grade whatever comes, each time in a session of its own."""
    import peft  # noqa: F401  a kernel of the course has it
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    from labkit.exercises import judging
    from labkit.exercises.exercise import all_exercises

    all_exercises()
    judging.check = hidden_check
    setup = next("".join(cell["source"]) for cell in solved()["cells"] if is_setup(cell))
    shell = InteractiveShell.instance(config=Config({"HistoryManager": {"enabled": False}}))
    shell.run_cell(setup).raise_error()
    assert "tomllib" not in sys.modules
    gc.collect()
    gc.freeze()  # so that forking it stays cheap
    sys.__stdout__.write("ready\n")
    sys.__stdout__.flush()
    for line in sys.stdin:
        asked = json.loads(line)
        folder, out = Path(asked["folder"]), Path(asked["out"])
        batch = os.fork()
        if batch == 0:
            os.setsid()
            _print_to(out / "batch.txt")
            try:
                for name in asked["students"]:
                    grade(out / f"{name}.ipynb", folder / name, out, setup)
            finally:
                os._exit(0)
        print(json.dumps({"ended": _ended_in_time(batch, asked["seconds"])}), file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    main()
