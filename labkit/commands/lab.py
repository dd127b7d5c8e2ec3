"""`lab`: the student's copies of the lessons in JupyterLab. How a copy is made is in labkit/notebooks.py."""

import os
import sys

from labkit.errors import UserError
from labkit.paths import NOTEBOOKS, ROOT, WORK
from labkit.processes import course_environment, hand_over

HELP = "open the lessons in JupyterLab; what it does not know goes on to JupyterLab"
TAKES_EXTRA = True
FIRST = "00_start_here.ipynb"


def add_arguments(parser):
    parser.add_argument("--no-browser", action="store_true", help="start the server and print its address")
    parser.add_argument("--port", type=int, metavar="N", help="the server's port (8888, or the next one that is free)")
    parser.add_argument("--solutions", action="store_true", help="open notebooks/, with the solutions, instead of your copies in work/")
    parser.add_argument("--reset", metavar="NOTEBOOK", help="make your copy of one lesson (03, say) afresh, keep the old one, and stop")


def main(args):
    from labkit.notebooks import find_notebook
    from labkit.student_copies import make_student_copies, reset_student_copy

    if args.reset:
        fresh, kept = reset_student_copy(find_notebook(args.reset, NOTEBOOKS), WORK)
        print(f"{fresh.relative_to(ROOT)} is fresh" + (f"; yours is kept as {kept.name}" if kept else ""))
        return 0
    if not (NOTEBOOKS / FIRST).is_file():
        raise UserError(f"{NOTEBOOKS / FIRST} is missing: run the command from a complete copy of the repository.")
    if not args.solutions:
        for copy in make_student_copies(NOTEBOOKS, WORK):
            print(f"made {copy.relative_to(ROOT)}")
    folder = NOTEBOOKS if args.solutions else WORK
    command = [
        sys.executable, "-m", "jupyterlab",
        f"--ServerApp.root_dir={ROOT}",
        f"--LabApp.default_url=/lab/tree/{folder.name}/{FIRST}",
    ]  # fmt: skip
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")  # in a container everybody is root
    if args.no_browser:
        command.append("--no-browser")
    if args.port:
        command.append(f"--port={args.port}")
    environment = course_environment()
    # labkit/jupyter turns announcements off (no dialogue over the first lesson, no call to a server), and nbgrader's panels, which only the
    # tests need.
    folders = [str(ROOT / "labkit" / "jupyter"), environment.get("JUPYTER_CONFIG_PATH")]
    environment["JUPYTER_CONFIG_PATH"] = os.pathsep.join(filter(None, folders))
    return hand_over(command + args.extra, environment)
