"""`convert`: demonstrations into a LeRobot dataset and back. The two formats are in labkit/demonstrations.py and labkit/lerobot.py."""

from pathlib import Path

HELP = "convert demonstrations to LeRobot v3.0 or back; without OUT, say what a LeRobot dataset holds and everything that is wrong with it"


def add_arguments(parser):
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="demonstrations in the lab sheet's layout, or a LeRobot dataset")
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT", help="the same in the other format: a folder that is empty or absent")
    parser.add_argument("--drop-failures", action="store_true", help="leave out the episodes that failed")
    parser.add_argument("--no-depth", action="store_true", help="to LeRobot: leave out the depth, which releases before 0.6 do not know")


def main(args):
    from labkit.lerobot import is_lerobot

    return _from_lerobot(args) if is_lerobot(args.folder) else _to_lerobot(args)


def _from_lerobot(args):
    from labkit.commands.record import HEADER, row
    from labkit.dataset_check import summary
    from labkit.demonstrations import write
    from labkit.errors import UserError
    from labkit.lerobot import INFO, demonstrations, describe, is_ours, validate

    if _are_broken(args.folder, validate(args.folder)):
        return 1
    if args.out is None:
        print(describe(args.folder))
        return 0
    if not is_ours(args.folder):
        raise UserError(f"{args.folder / INFO} is of another robot, and the lab sheet's layout holds the tabletop's episodes only: "
                        f"train on it offline, with labkit.lerobot.read")
    if args.out.is_dir() and any(args.out.iterdir()):
        raise UserError(f"{args.out} is not empty: choose another folder, or remove it")
    kept = [d for d in demonstrations(args.folder) if d.success or not args.drop_failures]
    command = f"python3 -m labkit convert {args.folder.as_posix()} {args.out.as_posix()}{' --drop-failures' * args.drop_failures}"
    write(args.out, kept, command=command)
    print(HEADER, row(args.out, summary(args.out)), sep="\n")
    return 0


def _to_lerobot(args):
    from labkit.dataset_check import validate
    from labkit.demonstrations import read
    from labkit.errors import UserError
    from labkit.lerobot import describe, export

    if _are_broken(args.folder, validate(args.folder)):
        return 1
    if args.out is None:
        raise UserError(f"where to? `python3 -m labkit convert {args.folder} OUT` writes it as a LeRobot dataset")
    export(args.out, read(args.folder, failures=not args.drop_failures), depth=not args.no_depth)
    print(describe(args.out))
    return 0


def _are_broken(folder, problems):
    """Print the problems; is one of them more than a warning?"""
    for problem in problems:
        print(problem.in_folder(folder))
    errors = sum(not problem.warning for problem in problems)
    if errors:
        print(f"{folder}: {errors} problem{'s' * (errors != 1)}, {len(problems) - errors} warnings")
    return bool(errors)
