"""The command, `python3 -m labkit VERB`: parses, makes sure of the environment, hands over. What a verb does is in commands/.

Runs on the standard library alone, and down to Python 3.6 far enough to say which Python the course needs.
"""

import argparse
import os
import sys
from importlib import import_module
from importlib.util import find_spec

from labkit import __version__
from labkit.errors import UserError
from labkit.install import ensure_environment, existing_environment, interpreter_for_unsupported_python
from labkit.processes import hand_over

VERBS = (
    "lab", "test", "run", "doctor", "evaluate", "serve", "finetune", "record", "validate", "convert", "report", "pretrain", "sweep", "benchmark",
    "release", "grade",
)


def read_commands():
    """The modules behind the verbs. Each has HELP, add_arguments(parser) and main(args) -> exit code, and may have

    NEEDS_PACKAGES = False   it also works in an environment that is not complete, so none is made for it
    TAKES_EXTRA = True       arguments it does not know are for the program it starts, and come as the list args.extra

    A verb whose module is not there is not offered: students' bundles leave out those that only instructors need.
    """
    return {verb: import_module("labkit.commands." + verb) for verb in VERBS if find_spec("labkit.commands." + verb)}


def parse(argv, commands):
    parser = argparse.ArgumentParser(
        prog="python3 -m labkit",
        description="Fine-tuning vision-language-action policies: a course that runs.",
        epilog="`python3 -m labkit VERB --help` tells more about a verb. The first use installs the course in .venv.",
    )
    parser.add_argument("--version", action="version", version="labkit " + __version__)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    verbs.required = True
    for verb, command in commands.items():
        summary = command.HELP.replace("%", "%%")  # argparse formats what it is given
        command.add_arguments(verbs.add_parser(verb, help=summary, description=command.HELP, allow_abbrev=False))
    args, extra = parser.parse_known_args(argv)
    if extra and not getattr(commands[args.verb], "TAKES_EXTRA", False):
        parser.error(f"{args.verb} does not know {' '.join(extra)}")
    args.extra = extra
    return args


def dispatch(argv):
    python = interpreter_for_unsupported_python()
    if python is None:
        commands = read_commands()
        args = parse(argv, commands)
        command = commands[args.verb]
        python = ensure_environment() if getattr(command, "NEEDS_PACKAGES", True) else existing_environment()
        if python == sys.executable:
            return command.main(args)
    return hand_over([python, "-m", "labkit"] + argv)


def sentence(error):
    """What the user reads of `error`, in one line."""
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"{error.filename} does not exist"
    return " ".join(str(error).split())


def main(argv=None):
    try:
        return dispatch(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        return 130
    except (UserError, ValueError, FileNotFoundError) as error:
        if os.environ.get("LABKIT_TRACEBACK") == "1":
            raise
        print("labkit: " + sentence(error), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
