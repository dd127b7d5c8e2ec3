"""`record`: demonstrations by scripted operators, into a dataset folder. How is in labkit/recording.py and labkit/demonstrations.py."""

from pathlib import Path

HELP = "record demonstrations into a dataset folder; the same command again goes on where it stopped"
VARIATIONS = (
    ("--camera-shift", dict(type=float, nargs=3, metavar=("X", "Y", "Z"), help="move the camera by so many metres")),
    ("--light", dict(type=float, metavar="L", help="brightness: 1 is normal, 0.2 a dim room")),
    ("--light-direction", dict(type=float, metavar="RAD", help="turn the lamp around the table, radians")),
    ("--objects", dict(type=int, metavar="N", help="objects on the table, 1 to 5 (3)")),
    ("--novel", dict(action="store_true", default=None, help="the first object is one that pretraining never showed")),
    ("--place-shift", dict(type=float, metavar="M", help="random shift of every object, metres")),
    ("--bin-yaw", dict(type=float, metavar="RAD", help="turn the bins by up to so many radians")),
    ("--belt-speed", dict(type=float, metavar="V", help="the belt moves, metres a second")),
)


def add_arguments(parser):
    parser.add_argument("--task", required=True, nargs="+", metavar="TASK", help="pick, put, stack ...; several are recorded in turn")
    parser.add_argument("--operator", default=["expert"], nargs="+", metavar="NAME", help="expert, ana, ben, chi; several in turn (expert)")
    parser.add_argument("--episodes", type=int, default=50, metavar="N", help="successful episodes wanted, in all splits together (50)")
    parser.add_argument("--seed", type=int, required=True, metavar="S", help="seed of the first attempt; each further one takes the next")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the dataset: made, or continued if this command made it")
    parser.add_argument("--split", type=int, nargs=3, default=[80, 10, 10], metavar=("TRAIN", "VALIDATION", "TEST"),
                        help="shares of the three splits (80 10 10)")
    parser.add_argument("--drop-failures", action="store_true", help="do not keep the episodes that fail")
    group = parser.add_argument_group("conditions of the robot's world")
    for flag, options in VARIATIONS:
        group.add_argument(flag, **options)


def main(args):
    from tqdm.auto import tqdm

    from labkit.dataset_check import summary
    from labkit.demonstrations import progress, write
    from labkit.freeze import freeze_hash
    from labkit.recording import record
    from labkit.tabletop import Variation

    if args.episodes < 1:
        raise ValueError(f"--episodes is {args.episodes}; at least one is needed")
    conditions, keep = given_variation(args), not args.drop_failures
    recipe = {
        "tasks": args.task, "operators": args.operator, "episodes": args.episodes, "seed": args.seed, "split": args.split,
        "keep_failures": keep, "variation": conditions,
    }  # fmt: skip
    done = progress(args.out)
    demonstrations = record(
        args.task, args.operator, episodes=args.episodes, seed=args.seed, shares=args.split, done=done, keep_failures=keep,
        variation=Variation(**{name: tuple(value) if isinstance(value, list) else value for name, value in conditions.items()}),
    )
    try:
        with tqdm(total=args.episodes, initial=min(done[0], args.episodes), desc=args.out.name, unit="episode", leave=False) as bar:
            write(args.out, counted(demonstrations, bar), recipe=recipe, command=command_line(args), provenance={"freeze": freeze_hash()})
    except KeyboardInterrupt:
        print(f"interrupted: {progress(args.out)[0]} of {args.episodes} episodes are in {args.out}; the same command goes on from there")
        return 130
    print(HEADER, row(args.out, summary(args.out)), sep="\n")
    return 0


def given_variation(args):
    """The conditions that the command line names, by the names `Variation` has for them."""
    names = [flag[2:].replace("-", "_") for flag, _ in VARIATIONS]
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def command_line(args):
    """The command that makes this dataset, whatever the order or the abbreviations it was typed in."""
    words = ["python3 -m labkit record --task", *args.task]
    if args.operator != ["expert"]:
        words += ["--operator", *args.operator]
    words += ["--episodes", args.episodes, "--split", *args.split, "--seed", args.seed]
    for name, value in given_variation(args).items():
        words += ["--" + name.replace("_", "-"), *(value if isinstance(value, list) else [] if value is True else [value])]
    words += ["--drop-failures"] if args.drop_failures else []
    return " ".join(map(str, [*words, "--out", args.out.as_posix()]))


def counted(demonstrations, bar):
    for demonstration in demonstrations:
        yield demonstration
        bar.update(demonstration.success)


HEADER = (
    "| dataset | train | validation | test | failed | decisions | kB | words outside the vocabulary |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |"
)


def row(folder, held):
    """One line of the table for what `summary` says: successful episodes a split, failed ones, decisions, size."""
    splits = held["counts"].values()
    cells = [folder.name, *(split["successes"] for split in splits), sum(split["episodes"] - split["successes"] for split in splits),
             sum(split["decisions"] for split in splits), f"{held['kilobytes']:.0f}", ", ".join(held["unknown_words"]) or "none"]
    return "| " + " | ".join(map(str, cells)) + " |"
