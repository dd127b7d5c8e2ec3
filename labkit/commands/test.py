"""`test`: the package's tests and every lesson, as CI runs them. The tests themselves are in tests/."""

import os
import sys

from labkit.paths import NOTEBOOKS, ROOT
from labkit.processes import course_environment, hand_over

HELP = "run tests/ and every notebook with pytest; what it does not know (-k, -x, a file) goes on to pytest"
TAKES_EXTRA = True


def add_arguments(parser):
    parser.add_argument("--fast", action="store_true", help="leave the notebooks out")


def main(args):
    targets = [] if any(names_a_test(argument) for argument in args.extra) else [str(ROOT / "tests")]
    if targets and not args.fast and NOTEBOOKS.is_dir():
        targets.append(str(NOTEBOOKS))
    command = [
        sys.executable, "-m", "pytest",
        f"--rootdir={ROOT}", "-c", str(ROOT / "pyproject.toml"),
        "-n", "2", "--dist", "loadfile",  # two processes of one thread; a file, and so a notebook, stays in one of them
        "--nbval-lax",
    ]  # fmt: skip
    return hand_over(command + args.extra + targets, course_environment())


def names_a_test(argument):
    """True for `tests/test_camera.py::test_depth` and `tests/grading/`, not for the `data` of `-k data`."""
    path = argument.split("::")[0]
    return ("/" in path or path.endswith((".py", ".ipynb"))) and os.path.exists(path)
