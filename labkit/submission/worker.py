"""The process that runs a student's cells and answers cases, one at a time. It knows cases as they are asked, and no right answer.

Started by `labkit.submission.apart`; speaks the wire on what were its standard input and output. Messages it understands, and its replies:

    {"do": "run", "name", "source", "withheld"}    {"raised": None} or {"raised": {kind, message, line}}
    {"do": "ask", "entry", "case"}                 {"answer": value}, {"raised": {...}} or {"missing": entry}
"""

from __future__ import annotations

import builtins
import importlib.abc
import linecache
import os
import sys
import types
from dataclasses import asdict

import labkit
from labkit.exercises.asking import answer, student_line
from labkit.exercises.exercise import Case, Raised
from labkit.submission import wire

_ONLY_IN_NOTEBOOKS = ("%", "!", "?")


class Withheld(importlib.abc.MetaPathFinder):
    """Refuses to import modules that are the answer to an exercise."""

    def __init__(self, names):
        self.names = tuple(names)

    def find_spec(self, name, path=None, target=None):
        """Raises ImportError for the withheld modules; None, so that the next finder is asked, for all others."""
        if _is_among(name, self.names):
            raise ImportError(f"{name} is not offered in this exercise: it holds the answer", name=name)


def without_magics(source: str) -> str:
    """Python's part of a cell: lines that only a notebook understands (%time, !ls, name?) become empty, so that line numbers stay."""
    try:
        compile(source, "cell", "exec")
        return source
    except SyntaxError:
        lines = source.split("\n")
        kept = ["" if line.lstrip().startswith(_ONLY_IN_NOTEBOOKS) or line.rstrip().endswith("?") else line for line in lines]
        return "\n".join(kept)


def run_cell(name: str, source: str, namespace: dict) -> Raised | None:
    """Run one cell as a notebook would; what it raised, or None. A cell may use display() and notebook magics; neither does anything."""
    source = without_magics(source)
    filename = f"<{name}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)  # for inspect.getsource
    try:
        exec(compile(source, filename, "exec"), namespace)
    except SyntaxError as error:
        return Raised("SyntaxError", error.msg or "", error.lineno or 0)
    except (Exception, SystemExit) as error:
        return Raised(type(error).__name__, str(error)[:300], student_line(error))
    return None


def hide(modules, namespace):
    """Make `modules` unavailable to the cells that follow."""
    sys.meta_path[:] = [Withheld(modules), *(finder for finder in sys.meta_path if not isinstance(finder, Withheld))]
    for name in [name for name in sys.modules if _is_among(name, modules)]:
        sys.modules.pop(name)
        parent, _, child = name.rpartition(".")
        vars(sys.modules.get(parent, types.SimpleNamespace())).pop(child, None)
    for name in [name for name, value in vars(labkit).items() if _is_among(getattr(value, "__module__", None) or "", modules)]:
        delattr(labkit, name)  # the package's face keeps what it has looked up


def _is_among(name, modules):
    return any(name == module or name.startswith(module + ".") for module in modules)


def reply(message: dict, namespace: dict) -> dict:
    """The answer to one message."""
    if message["do"] == "run":
        hide(message["withheld"], namespace)
        raised = run_cell(message["name"], message["source"], namespace)
        return {"raised": asdict(raised) if raised else None}
    entry = namespace.get(message["entry"])
    if not callable(entry):
        return {"missing": message["entry"]}
    given = answer(entry, Case(**message["case"]))
    return {"raised": asdict(given)} if isinstance(given, Raised) else {"answer": given}


def serve(requests, replies):
    """Answer messages until the other side closes."""
    student = types.ModuleType("__main__")
    sys.modules["__main__"] = student  # dataclasses and the like look their module up
    builtins.display = lambda *objects, **options: None
    builtins.get_ipython = lambda: None
    while True:
        try:
            message = wire.receive(requests)
        except EOFError:
            return
        try:
            wire.send(replies, reply(message, student.__dict__))
        except wire.WireError as error:
            wire.send(replies, {"raised": asdict(Raised("Unusable", f"the answer cannot be read: {error}"))})


def main():
    """Keep the wire to ourselves, and give the cells an empty input and an output that nobody reads as an answer."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    serve(requests, replies)


if __name__ == "__main__":
    main()
