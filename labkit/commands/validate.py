"""`validate`: what is wrong with a dataset of demonstrations, or of LeRobot. The checks are in dataset_check.py and lerobot_files.py."""

import json
from pathlib import Path

HELP = "check datasets of demonstrations: every problem with its file, entry and fix; exit code 1 where there is one"


def add_arguments(parser):
    parser.add_argument("folder", type=Path, nargs="+", metavar="FOLDER", help="a folder with train, validation and test in it, or a LeRobot dataset")
    parser.add_argument("--json", action="store_true", help="one line of JSON a folder")


def main(args):
    from labkit import dataset_check, lerobot
    from labkit.commands.record import HEADER, row

    found = {folder: (lerobot if lerobot.is_lerobot(folder) else dataset_check).validate(folder) for folder in args.folder}
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
    ours = [folder for folder in sound if not lerobot.is_lerobot(folder)]
    if ours:
        print(HEADER, *(row(folder, dataset_check.summary(folder)) for folder in ours), sep="\n")
    for folder in sound:
        if folder not in ours:
            print(lerobot.describe(folder))
    for folder in broken:
        errors = sum(not problem.warning for problem in found[folder])
        print(f"{folder}: {errors} problem{'s' * (errors != 1)}, {len(found[folder]) - errors} warnings")
    return 1 if broken else 0
