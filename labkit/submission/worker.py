"""The process that runs a student's cells and answers cases, one at a time. It knows cases as they are asked, and no right answer.

Started by `labkit.submission.apart`; speaks the wire on what were its standard input and output. Messages it understands, and its replies:

    {"do": "run", "name", "source", "withheld"}    {"raised": None} or {"raised": {kind, message, line}}
    {"do": "ask", "entry", "case", "withheld"}     {"answer": value}, {"raised": {...}} or {"missing": entry}
"""

from __future__ import annotations

import builtins
import importlib.abc
import linecache
import os
import re
import sys
import types
from contextlib import contextmanager
from dataclasses import asdict

from labkit.exercises.asking import answer, message_of, student_line
from labkit.exercises.exercise import Case, Raised
from labkit.submission import wire

# %time and !ls, and a name with question marks before or after it.
_ONLY_IN_NOTEBOOKS = re.compile(r"\s*([%!].*|\?{1,2}[\w.*]+|[\w.*]+\?{1,2})\s*")


class Withheld(importlib.abc.MetaPathFinder):
    """Refuses to import modules that are the answer to an exercise."""

    def __init__(self, names):
        self.names = tuple(names)

    def find_spec(self, name, path=None, target=None):
        """Raises ImportError for the withheld modules; None, so that the next finder is asked, for all others."""
        if _is_among(name, self.names):
            raise ImportError(f"{name} is not offered in this exercise: it holds the answer", name=name)


def without_magics(source: str) -> str:
    """Python's part of a cell: lines that only a notebook understands (%time, !ls, name?) become `pass`, so that line numbers stay."""
    try:
        compile(source, "cell", "exec", dont_inherit=True)
        return source
    except SyntaxError:
        lines = source.split("\n")
        return "\n".join(line[: len(line) - len(line.lstrip())] + "pass" if _ONLY_IN_NOTEBOOKS.fullmatch(line) else line for line in lines)


def run_cell(name: str, source: str, namespace: dict) -> Raised | None:
    """Run one cell as a notebook would; what it raised, or None. A cell may use display() and notebook magics; neither does anything."""
    filename = f"<{name}>"
    try:
        source = without_magics(source)
        linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)  # for inspect.getsource
        # dont_inherit: the cell has no `from __future__ import annotations` because this file has one.
        exec(compile(source, filename, "exec", dont_inherit=True), namespace)
    except SyntaxError as error:
        return Raised("SyntaxError", error.msg or "", error.lineno or 0)
    except (Exception, SystemExit) as error:
        return Raised(type(error).__name__, message_of(error), student_line(error))
    return None


@contextmanager
def withholding(modules, namespace):
    """Make `modules`, and what other cells imported from them, unavailable inside: while a cell runs, and while its function is asked."""
    finder, hidden = Withheld(modules), []
    places = [sys.modules, namespace, *(vars(sys.modules[name.rpartition(".")[0]]) for name in modules if name.rpartition(".")[0] in sys.modules)]
    for place in places:
        found = {name: value for name, value in place.items() if _comes_from(value, modules)}
        for name in found:
            del place[name]
        hidden.append((place, found))
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path[:] = [other for other in sys.meta_path if other is not finder]
        for place, found in hidden:
            for name, value in found.items():
                place.setdefault(name, value)


def _comes_from(value, modules):
    name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
    return isinstance(name, str) and _is_among(name, modules)


def _is_among(name, modules):
    return any(name == module or name.startswith(module + ".") for module in modules)


def reply(message: dict, namespace: dict) -> dict:
    """The answer to one message."""
    with withholding(message["withheld"], namespace):
        if message["do"] == "run":
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
