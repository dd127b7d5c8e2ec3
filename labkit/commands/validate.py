"""`validate`: what is wrong with a dataset of demonstrations. The checks are in labkit/dataset_check.py."""

import json
from pathlib import Path

HELP = "check datasets of demonstrations: every problem with its file, entry and fix; exit code 1 where there is one"


def add_arguments(parser):
    parser.add_argument("folder", type=Path, nargs="+", metavar="FOLDER", help="a folder with train, validation and test in it")
    parser.add_argument("--json", action="store_true", help="one line of JSON a folder")


def main(args):
    from labkit.commands.record import HEADER, row
    from labkit.dataset_check import summary, validate

    found = {folder: validate(folder) for folder in args.folder}
    broken = [folder for folder, problems in found.items() if not all(problem.warning for problem in problems)]
    if args.json:
        for folder, problems in found.items():
            facts = [{"file": p.file, "place": p.place, "message": p.message, "warning": p.warning} for p in problems]
            print(json.dumps({"folder": folder.as_posix(), "valid": folder not in broken, "problems": facts}))
        return 1 if broken else 0
    for folder, problems in found.items():
        for problem in problems:
            print(problem.in_folder(folder))
    sound = [folder for folder in found if folder not in broken]
    if sound:
        print(HEADER, *(row(folder, summary(folder)) for folder in sound), sep="\n")
    for folder in broken:
        errors = sum(not problem.warning for problem in found[folder])
        print(f"{folder}: {errors} problem{'s' * (errors != 1)}, {len(found[folder]) - errors} warnings")
    return 1 if broken else 0
