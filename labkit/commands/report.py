"""`report`: the lab report as a page, from what the lab's notebook recorded and the student wrote. What is in it is said in labkit/lab_report/."""

from pathlib import Path

HELP = "make the lab report of your own runs as a page and check it; exit code 1 while something is missing"


def add_arguments(parser):
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the one that LabReport(FOLDER) in the lab's notebook was given")
    parser.add_argument("--check", action="store_true", help="check only, write nothing")


def main(args):
    from labkit.errors import UserError
    from labkit.lab_report import LabReport
    from labkit.lab_report.parts import POINTS
    from labkit.lab_report.record import RECORD

    if not (args.folder / RECORD).is_file():
        raise UserError(f"{args.folder} holds no {RECORD}: record your runs in the lab's notebook, LabReport({str(args.folder)!r}).dataset(...)")
    report = LabReport(args.folder)
    if not args.check:
        page, notebook = report.build()
        print(f"{page} is made; your words go into {notebook}")
    problems = report.check()
    print(*problems, f"{len(problems)} to do" if problems else "everything that can be checked automatically is there",
          f"a person judges your words: {POINTS} points, by the rubric at the end of the page", sep="\n")
    return 1 if problems else 0
