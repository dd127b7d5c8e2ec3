"""One exercise as one object: its cases, its independent source of truth, its tolerance and its known mistakes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import import_module
from pkgutil import iter_modules

import numpy as np

# What the public cases are drawn from; a grader draws from a secret instead.
PUBLIC = "public"
ASKS = ("output", "gradients", "state", "trainable")
# The modules beside the lessons: what an exercise is, how it is asked and judged.
NOT_LESSONS = ("exercise", "asking", "judging")
_EXERCISES: dict[str, Exercise] = {}


@dataclass(frozen=True)
class Tolerance:
    """Largest difference that still counts as equal: atol + rtol * |expected|, as in `numpy.isclose`."""

    rtol: float = 1e-4
    atol: float = 1e-6


@dataclass(frozen=True)
class Raised:
    """The answer of code that raised.   kind: the exception's name.   line: of the student's cell, 0 where unknown."""

    kind: str
    message: str = ""
    line: int = 0


@dataclass(frozen=True)
class Case:
    """One question to a student's function or class.

    arguments: name -> value, handed over by position; tensors, numbers, strings, and lists and dicts of them.
    says: the case in words, and `must`: what has to hold in it; both are read by a student whose answer no misconception explains.
    facts: numbers that the sentences of misconceptions may name, as in "all {positions} positions".
    asks: which of "output", "gradients", "state" (the module's tensors after the call) and "trainable" (name -> number of values of
    every parameter that requires a gradient) make the answer; the output alone is the answer itself, otherwise it is a dict of them.
    gradients: arguments and parameters by name; of the sum of output * cotangent, or of the output where it is a scalar.
    build, state: a class is built with these keyword arguments and loads these tensors before it is called.
    """

    arguments: dict
    says: str
    must: str
    facts: dict = field(default_factory=dict)
    asks: tuple[str, ...] = ("output",)
    gradients: tuple[str, ...] = ()
    cotangent: object = None
    build: dict | None = None
    state: dict | None = None


class Exercise:
    """Base of all exercises; a lesson's file holds subclasses marked with `@exercise(...)`, which makes the one instance of each.

    entry: name of the function or class that the student defines.   withheld: modules that a worker does not offer to the exercise's
    cell, because they are the answer.   misconceptions: sentence -> wrong answer of the same signature as the entry.
    The docstring's first line says what is asked for.
    """

    id: str
    points: int
    minutes: int
    entry: str
    close = Tolerance()
    withheld: tuple[str, ...] = ()
    misconceptions: dict[str, Callable] = {}

    def cases(self, rng: np.random.Generator, hidden: bool) -> Iterable[Case]:
        """Fresh cases, the smallest first.   hidden: with those that only a grader asks."""
        raise NotImplementedError

    def expected(self, case: Case):
        """The right answer from another source than the solution: torch, autograd, peft, bitsandbytes, arithmetic. May be a `Raised`."""
        raise NotImplementedError

    def relevant(self, given, case: Case):
        """What of an answer is compared, where several answers are right (a random start, say); `expected` gives the same. Default: all."""
        return given

    def drawn(self, secret: str = PUBLIC, hidden: bool = False) -> list[Case]:
        """The cases that belong to a secret: always the same for the same one."""
        digest = hashlib.sha256(f"{secret}/{self.id}".encode()).digest()
        return list(self.cases(np.random.default_rng(np.frombuffer(digest, np.uint32)), hidden))

    @property
    def title(self) -> str:
        """What is asked for, in one line."""
        return self.__doc__.strip().splitlines()[0]


def exercise(id: str, points: int, minutes: int):
    """Class decorator: register the one instance of an `Exercise` under `id` (letters, digits, hyphens, as nbgrader wants them).

    Raises ValueError if the id, or the name that the student defines, is taken.
    """

    def register(cls):
        cls.id, cls.points, cls.minutes = id, points, minutes
        for known in _EXERCISES.values():
            if known.id == id or known.entry == cls.entry:
                raise ValueError(f"exercise {id} with entry {cls.entry}: {known.id} with entry {known.entry} is there already")
        _EXERCISES[id] = cls()
        return cls

    return register


def all_exercises() -> dict[str, Exercise]:
    """id -> exercise, of every lesson."""
    import labkit.exercises as lessons

    for module in iter_modules(lessons.__path__):
        if module.name not in NOT_LESSONS:
            import_module(f"{lessons.__name__}.{module.name}")
    return dict(_EXERCISES)


def exercises_of(notebook: str) -> list[Exercise]:
    """The exercises of a lesson, in their order: those of the module that is called like the notebook without its number.

    notebook: `01_sft_loss_masking`, say. Empty where there is no such module.
    """
    lesson = f"labkit.exercises.{notebook.lstrip('0123456789_')}"
    return [found for found in all_exercises().values() if type(found).__module__ == lesson]
