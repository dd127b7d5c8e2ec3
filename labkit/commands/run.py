"""`run`: every lesson without a browser, and what it took. The executing and the table are in labkit/notebooks.py."""

from datetime import datetime
from pathlib import Path

from labkit.paths import NOTEBOOKS, ROOT, RUNS

HELP = "execute the notebooks without a browser, and report minutes, memory and errors"


def add_arguments(parser):
    parser.add_argument("--only", action="append", metavar="NOTEBOOK", help="only this one (03, for example); may be given again")
    parser.add_argument("--folder", type=Path, default=NOTEBOOKS, help="where the notebooks lie (notebooks/; yours are in work/)")
    parser.add_argument("--out", type=Path, help="the folder for the results (runs/notebooks-DATE)")
    parser.add_argument("--timeout", type=int, default=1800, metavar="SECONDS", help="for one cell (1800)")
    parser.add_argument("--inplace", action="store_true", help="write what succeeds back to where it lies, and what it took into the README's table")


def main(args):
    import os
    import shutil

    from labkit.lesson_table import write_table
    from labkit.notebooks import execute_all, find_notebook, list_notebooks, markdown_table
    from labkit.processes import course_environment

    folder = args.folder.resolve()
    paths = [find_notebook(name, folder) for name in args.only] if args.only else list_notebooks(folder)
    out = (args.out or RUNS / f"notebooks-{datetime.now():%Y-%m-%d_%H%M}").resolve()
    os.environ.update(course_environment())  # kernels inherit it
    executions = execute_all(paths, out, args.timeout)
    if args.inplace:
        for path, execution in zip(paths, executions, strict=True):
            if execution.status == "ok":
                shutil.copyfile(out / path.name, path)
    print(markdown_table(executions), f"results.csv, results.md and the executed notebooks are in {out}", sep="\n")
    succeeded = all(execution.status == "ok" for execution in executions)
    if args.inplace and succeeded and folder == NOTEBOOKS:
        write_table(ROOT / "README.md", NOTEBOOKS)
    return 0 if succeeded else 1
