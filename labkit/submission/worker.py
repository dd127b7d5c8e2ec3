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
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from types import MappingProxyType

from labkit.exercises.asking import answer, message_of, student_line
from labkit.exercises.exercise import Case, Raised
from labkit.submission import wire
from labkit.submission.absent import make_absent

# %time and !ls, and a name with question marks before or after it.
_ONLY_IN_NOTEBOOKS = re.compile(r"\s*([%!].*|\?{1,2}[\w.*]+|[\w.*]+\?{1,2})\s*")


_EMPTY = set(vars(types.ModuleType("__main__")))


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
    finder, hidden, modules = Withheld(modules), [], tuple(modules)
    places = [(sys.modules, _loaded(modules, len(sys.modules))),
              (namespace, [name for name, value in namespace.items() if _comes_from(value, modules)])]
    parents = {name.rpartition(".")[0] for name in modules} & set(sys.modules)
    places += [(vars(sys.modules[parent]), _offered_by(parent, modules)) for parent in parents]
    for place, names in places:
        hidden.append((place, {name: place.pop(name) for name in names if name in place}))
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path[:] = [other for other in sys.meta_path if other is not finder]
        for place, found in hidden:
            for name, value in found.items():
                place.setdefault(name, value)


@lru_cache(maxsize=None)
def _loaded(modules, count):
    """The names in sys.modules that `modules` are or hold.   count: how many there are, so that an import is noticed."""
    return [name for name in sys.modules if name.startswith(modules) and _is_among(name, modules)]


@lru_cache(maxsize=None)
def _offered_by(parent, modules):
    """The names of the module `parent` that come from `modules`. A library's do not change, and there are thousands of them."""
    return [name for name, value in vars(sys.modules[parent]).items() if _comes_from(value, modules)]


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


def act_as_notebook():
    """Give cells what a notebook would: display() and get_ipython(), and a main module of its own, which is returned.

    What a student adds to an exercise's cell to see whether it is right (check, receipt) must not fail it: here it does nothing.
    """
    from labkit.exercises import judging
    from labkit.submission import receipt

    judging.check = judging.trusted = lambda entry, *more, **options: entry
    receipt.receipt = lambda *arguments, **options: None
    builtins.display = lambda *objects, **options: None
    builtins.get_ipython = lambda: None
    return new_main_module()


def new_main_module():
    """A fresh `__main__`, where dataclasses and the like look their module up."""
    sys.modules["__main__"] = types.ModuleType("__main__")
    return sys.modules["__main__"]


def serve(requests, replies, student: types.ModuleType, prepared: Mapping[str, Callable[[], types.ModuleType]] = MappingProxyType({})):
    """Answer messages until the other side closes.   student: the module that the cells fill.

    prepared: source of a set-up cell -> what gives a module that it has filled already; taken over where exactly this cell is to be run first.
    """
    while True:
        try:
            message = wire.receive(requests)
        except EOFError:
            return
        try:
            if message.get("source") in prepared and set(vars(student)) == _EMPTY:
                student = sys.modules["__main__"] = prepared[message["source"]]()
                wire.send(replies, {"raised": None})
            else:
                wire.send(replies, reply(message, vars(student)))
        except wire.WireError as error:
            wire.send(replies, {"raised": asdict(Raised("Unusable", f"the answer cannot be read: {error}"))})


def main():
    """Keep the wire to ourselves, and give the cells an empty input and an output that nobody reads as an answer."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    make_absent()
    serve(requests, replies, act_as_notebook())


if __name__ == "__main__":
    main()
