"""`report`: the lab report as a page, from what the lab's notebook recorded and the student wrote. What is in it is said in lab_report.py."""

from pathlib import Path

HELP = "make the lab report of your own runs as a page and check it; exit code 1 while something is missing"


def add_arguments(parser):
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the one that LabReport(FOLDER) in the lab's notebook was given")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (FOLDER/report.html)")
    parser.add_argument("--check", action="store_true", help="check only, write nothing")


def main(args):
    from labkit.errors import UserError
    from labkit.lab_report import RECORD, LabReport, rubric

    if not (args.folder / RECORD).is_file():
        raise UserError(f"{args.folder} holds no {RECORD}: record your runs in the lab's notebook, LabReport({str(args.folder)!r}).dataset(...)")
    report = LabReport(args.folder)
    if not args.check:
        page, notebook = report.build(args.out)
        print(f"{page} is made; your words go into {notebook}")
    problems = report.check(args.out)
    print(*problems, "everything that can be checked automatically is there" if not problems else f"{len(problems)} to do", "", rubric(), sep="\n")
    return 1 if problems else 0
