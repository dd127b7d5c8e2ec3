"""Judging answers: compare them with the expected ones, recognise the mistake, and say it in a sentence. Never shows an expected value."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass

import numpy as np
import torch

from labkit.exercises.asking import answer
from labkit.exercises.exercise import PUBLIC, Case, Exercise, Raised, Tolerance, all_exercises

CORRECT, WRONG, NOT_ATTEMPTED = "correct", "not yet", "not attempted"
_LONGEST_VALUE, _LONGEST_SENTENCE = 160, 1000
_MOST_SHOWN = 100_000  # values of a tensor: of a larger one only the shape is shown
# Answering sets torch's one generator, which threads share: one answer at a time, or they differ from run to run.
_ANSWERING = threading.RLock()


@dataclass(frozen=True)
class Verdict:
    """What became of one exercise.

    status: "correct", "not yet" or "not attempted".   sentence: what the student reads.   passed, total: cases.
    misconception: the known mistake that explains every answer, if one does.
    """

    exercise: str
    status: str
    sentence: str
    passed: int
    total: int
    points: int
    misconception: str | None = None

    @property
    def earned(self) -> int:
        """Points: all or none, because a function that is right now and then is wrong."""
        return self.points if self.status == CORRECT else 0

    def __str__(self):
        share = f", {self.passed} of {self.total} cases" if self.status == WRONG else ""
        return f"{self.exercise}: {self.status} ({self.earned} of {self.points} points{share}). {self.sentence}"


def check(entry, exercise: str | None = None) -> int:
    """Check a student's function or class on the public cases, print what was found, and return the points.

    exercise: its id; by default the one whose `entry` has the name of this function.   The number is what nbgrader reads.
    Raises ValueError if no exercise asks for it.
    """
    # nbgrader takes whatever a check cell writes to standard error, a warning of torch's included, as a failure.
    with redirect_stderr(sys.stdout):
        verdict = judge(_named(entry, exercise), lambda case: answer(entry, case))
    print(verdict)
    return verdict.earned


def trusted(entry, otherwise):
    """The student's `entry` if it passes its check, else `otherwise`, the library's; prints which: an unsolved exercise blocks nothing."""
    verdict = judge(_named(entry, None), lambda case: answer(entry, case))
    mine = verdict.status == CORRECT
    print(f"From here on: {'your own' if mine else 'the library version of'} {entry.__name__}{'' if mine else f' ({verdict.status})'}.")
    return entry if mine else otherwise


def _named(entry, exercise):
    known = all_exercises()
    if exercise in known:
        return known[exercise]
    name = getattr(entry, "__name__", None)
    matches = [e for e in known.values() if e.entry == name] if exercise is None else []
    if not matches:
        entries = ", ".join(f"{e.entry} ({e.id})" for e in known.values())
        raise ValueError(f"no exercise is called {exercise or name!r}; there are {entries}")
    return matches[0]


class AnswerKey:
    """An exercise's cases for one secret, with the right answers and the wrong ones that it knows: the same for every student."""

    def __init__(self, exercise: Exercise, secret: str = PUBLIC, hidden: bool = False):
        with _ANSWERING:
            self.exercise, self.cases = exercise, exercise.drawn(secret, hidden)
            self.expected = [exercise.expected(case) for case in self.cases]
        self._mistaken: dict[str, list] = {}

    def mistaken(self, sentence: str) -> list:
        """What the misconception answers to every case."""
        with _ANSWERING:
            if sentence not in self._mistaken:
                mistake = self.exercise.misconceptions[sentence]
                self._mistaken[sentence] = [_relevant(self.exercise, answer(mistake, case), case) for case in self.cases]
            return self._mistaken[sentence]

    def recognise(self, answers: list) -> str | None:
        """The misconception that gives all these answers, or None."""
        for sentence in self.exercise.misconceptions:
            if all(not difference(given, wrong, self.exercise.close) for given, wrong in zip(answers, self.mistaken(sentence))):
                return sentence
        return None


def judge(exercise: Exercise, ask: Callable[[Case], object], secret: str = PUBLIC, hidden: bool = False) -> Verdict:
    """Ask every case, one at a time, and judge the answers.   ask: case -> answer, in this process or in another one."""
    return judge_by(AnswerKey(exercise, secret, hidden), ask)


def judge_by(key: AnswerKey, ask: Callable[[Case], object]) -> Verdict:
    """`judge`, with a key that may serve many students."""
    exercise, cases = key.exercise, key.cases
    answers = [_relevant(exercise, ask(case), case) for case in cases]
    faults = [difference(given, right, exercise.close) for given, right in zip(answers, key.expected)]
    passed = faults.count("")

    def verdict(status, sentence, misconception=None):
        return Verdict(exercise.id, status, shortened(sentence, _LONGEST_SENTENCE), passed, len(cases), exercise.points, misconception)

    if passed == len(cases):
        return verdict(CORRECT, f"All {len(cases)} cases agree with an independent calculation.")
    # The stub says nothing; torch says what it has not implemented, and a module that its forward is missing.
    if any(isinstance(given, Raised) and given.kind == "NotImplementedError" and not given.message for given in answers):
        return verdict(NOT_ATTEMPTED, f"`{exercise.entry}` still raises NotImplementedError: put your own lines in its place.")
    first = next(i for i, fault in enumerate(faults) if fault)
    if answers[first] is None:
        return verdict(WRONG, f"`{exercise.entry}` returns None: is `return` missing?")
    known = key.recognise(answers)
    if known is not None:
        return verdict(WRONG, _said(known, cases[first]), known)
    case = cases[first]
    must = "" if isinstance(answers[first], Raised) else " " + _said(case.must, case)
    return verdict(WRONG, f"With {_said(case.says, case)}: {faults[first]}{must}")


def _relevant(exercise, given, case):
    try:
        return given if isinstance(given, Raised) else exercise.relevant(given, case)
    except Exception:  # not even of the form that is asked for, as the comparison will say
        return given


def _said(sentence, case):
    return sentence.format(**case.facts)


def difference(given, expected, close: Tolerance, where: str = "your answer") -> str:
    """Why `given` is not `expected`, in one sentence that does not give the expected value away; empty where it is.

    A number and a tensor with one value and no dimension are the same; integers, booleans and floats are compared as numbers.
    """
    if isinstance(expected, Raised) or isinstance(given, Raised):
        return _difference_raised(given, expected)
    if isinstance(expected, dict):
        return _difference_dicts(given, expected, close, where)
    if isinstance(expected, (list, tuple)) and not _is_numbers(expected):
        return _difference_lists(given, expected, close, where)
    if expected is None or isinstance(expected, str):
        return "" if type(given) is type(expected) and given == expected else f"{where} is {shown(given)}."
    return _difference_numbers(given, expected, close, where)


def _difference_raised(given, expected):
    if isinstance(given, Raised) and isinstance(expected, Raised):
        return "" if given.kind == expected.kind else f"it raises {given.kind} where another error is due."
    if isinstance(expected, Raised):
        return f"it returns {shown(given)} where an error is due."
    at = f" in line {given.line} of your cell" if given.line else ""
    words = given.message.strip().rstrip(".")
    return f"{words}." if given.kind == "Unusable" else f"it raises {given.kind}{at}{': ' if words else ''}{words}."


def _difference_dicts(given, expected, close, where):
    if not isinstance(given, dict):
        return f"{where} is {shown(given)}, not a dict."
    if set(given) != set(expected):
        return f"{where} has {', '.join(map(str, given)) or 'nothing'}; {', '.join(map(str, expected))} is wanted."
    for name, value in expected.items():
        fault = difference(given[name], value, close, f"{where}, {name}")
        if fault:
            return fault
    return ""


def _difference_lists(given, expected, close, where):
    if isinstance(given, (torch.Tensor, np.ndarray)) and given.ndim and _as_numbers(given) is not None:
        given = list(given)
    if not isinstance(given, (list, tuple)) or len(given) != len(expected):
        return f"{where} is {shown(given)}, not {len(expected)} values."
    return next(filter(None, (difference(g, e, close, f"{where}, number {i}") for i, (g, e) in enumerate(zip(given, expected)))), "")


def _difference_numbers(given, expected, close, where):
    if given is None:
        return f"{where} is missing (None)."
    expected_array = _as_numbers(expected)
    if isinstance(given, (torch.Tensor, np.ndarray)) and tuple(given.shape) != expected_array.shape:
        return f"{where} has shape {tuple(given.shape)}, not {expected_array.shape}."  # before anything of its size is made
    given_array = _as_numbers(given)
    if given_array is None:
        return f"{where} is {shown(given)}, not numbers."
    if given_array.shape != expected_array.shape:
        return f"{where} has shape {given_array.shape}, not {expected_array.shape}."
    if np.isclose(given_array, expected_array, rtol=close.rtol, atol=close.atol, equal_nan=True).all():
        return ""
    if not np.isfinite(given_array).all() and np.isfinite(expected_array).all():
        return f"{where} holds {'nan' if np.isnan(given_array).any() else 'inf'}."
    return f"{where} is {shown(given)}, which is not right."


def _is_numbers(values):
    """Several tensors are several answers, even where they could be stacked."""
    return not any(isinstance(value, torch.Tensor) for value in values) and _as_numbers(values) is not None


def _fits(number):
    """Whether a float64 holds the number; an int of Python has no largest."""
    return abs(number) < 2**1000 or number != number or abs(number) == float("inf")


def _as_numbers(value):
    """float64 array of a tensor, a number, or nested lists of numbers; None for anything else."""
    if isinstance(value, torch.Tensor):
        try:
            return None if value.is_complex() else value.detach().double().cpu().numpy()
        except (RuntimeError, TypeError, ValueError):
            return None  # sparse, nested, quantized, without values, or of a shape that no array can have
    if isinstance(value, (np.ndarray, np.generic)):
        return np.float64(value) if value.dtype.kind in "biuf" else None
    if isinstance(value, (bool, int, float)):
        return np.array(value, np.float64) if _fits(value) else None
    if isinstance(value, (list, tuple)) and value and all(type(item) in (bool, int, float) for item in value):
        return np.array(value, np.float64) if all(map(_fits, value)) else None
    if isinstance(value, (list, tuple)) and value and not any(isinstance(item, (str, dict, type(None))) for item in value):
        try:
            parts = [_as_numbers(item) for item in value]
            return None if any(part is None for part in parts) else np.array(parts, np.float64)
        except ValueError:
            return None  # rows of different lengths
    return None


def printable(text: str) -> str:
    """The text on one line, without control characters; it may have come from a student."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def shown(value) -> str:
    """A student's own value, short enough for a sentence."""
    large = isinstance(value, torch.Tensor) and value.numel() > _MOST_SHOWN
    numbers = _as_numbers(value) if isinstance(value, torch.Tensor) and not large else None
    try:
        if large:
            text = f"a tensor {tuple(value.shape)}"
        elif numbers is None:
            text = repr(value)
        elif value.ndim == 0:
            text = str(value.item())
        else:
            text = f"a tensor {tuple(value.shape)} " + np.array2string(numbers, precision=4, threshold=12, separator=", ")
    except Exception:  # a student's __repr__ may do anything; and an int may have too many digits for Python
        text = f"something of type {type(value).__name__}"
    return shortened(text, _LONGEST_VALUE)


def shortened(text: str, most: int) -> str:
    """The text as `printable` has it, or the first `most` characters of that and an ellipsis."""
    text = printable(text[: 4 * most])  # cut before it is looked at letter by letter: an answer may have megabytes of names
    return text if len(text) <= most else text[:most] + " ..."
