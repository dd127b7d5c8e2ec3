"""`sweep`: run a stored experiment again, or go on with one that was stopped. What is stored, and how, is in labkit/sweeps.py."""

import os

HELP = "run a stored experiment over several processes; without a name, list them"


def add_arguments(parser):
    parser.add_argument("name", nargs="?", metavar="NAME", help="the experiment; without one, all are listed")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2)), metavar="N", help="points at a time (one a core)")
    parser.add_argument("--out", metavar="FOLDER", help="where NAME.json goes (data/sweeps)")


def main(args):
    from labkit.sweeps import STORED, experiment, names, run_sweep

    if args.name is None:
        for name in names():
            module = experiment(name)
            print(f"{name}: {module.ABOUT} ({len(module.points())} points)")
        return 0
    if args.processes < 1:
        raise ValueError(f"--processes is {args.processes}; at least 1 is needed")
    path = run_sweep(args.name, args.processes, args.out or STORED)
    print(f"stored in {path}")
    return 0
