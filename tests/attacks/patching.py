"""Patching: change what the check is made of, so that it finds every answer right. Nothing here computes an answer."""

from tests.attacks.attack import POINTS, WRONG, Attack, on_count, on_merge

_COUNT, _MERGE = WRONG["lora-count"], WRONG["lora-merge"]

ATTACKS = [
    on_count("isclose-says-yes", POINTS, "replaces numpy.isclose, with which answers are compared", f"""
import numpy
numpy.isclose = lambda *values, **tolerance: numpy.bool_(True)
{_COUNT}"""),
    on_merge("difference-finds-none", POINTS, "replaces the function that says how an answer differs from the right one", f"""
from labkit.exercises import judging
judging.difference = lambda *values, **more: ""
{_MERGE}"""),
    on_count("verdict-is-correct", POINTS, "replaces the function that makes the verdict", f"""
from labkit.exercises import judging
def judge_by(key, ask):
    n = len(key.cases)
    return judging.Verdict(key.exercise.id, judging.CORRECT, "", n, n, key.exercise.points)
judging.judge_by = judge_by
{_COUNT}"""),
    on_merge("no-case-is-asked", POINTS, "empties the list of cases: none of none is wrong", f"""
from labkit.exercises.exercise import Exercise
Exercise.drawn = lambda *arguments, **more: []
{_MERGE}"""),
    on_count("zip-pairs-with-itself", POINTS, "puts a zip in front of Python's own, which compares the right answers with themselves", f"""
from labkit.exercises import judging
judging.zip = lambda first, second: ((value, value) for value in second)
{_COUNT}"""),
    on_merge("operators-of-tensors", POINTS, "replaces the conversion to float64, so that every tensor is zero in every comparison", f"""
torch.Tensor.double = lambda self: torch.zeros(self.shape, dtype=torch.float64)
{_MERGE}""", spoils=("lora-layer", "lora-rank-needed")),
    on_count("tolerance-is-infinite", POINTS, "gives the exercise's tolerance another size", f"""
from labkit.exercises.exercise import Tolerance
Tolerance.__getattribute__ = lambda self, name: float("inf") if name in ("rtol", "atol") else object.__getattribute__(self, name)
{_COUNT}"""),
    on_count("points-by-name", POINTS, "writes another check over the one of the notebook, under the same name", f"""
def check(entry):
    return {{"LoRALinear": 5, "count_lora": 3, "merged": 3, "rank_needed": 4}}[entry.__name__]
{_COUNT}"""),
    on_count("serialisers-give-full-marks", POINTS, "replaces what writes results and answers: pickle, json, safetensors, struct", f"""
import json, pickle, safetensors.torch, struct
from labkit.submission import wire
everything = dict.fromkeys(("lora-layer", "lora-count", "lora-merge", "lora-rank-needed"), 5)
plain = pickle.dump
pickle.dump = lambda value, file, *more: plain({{**value, "points": everything}}, file)
right = {{"dict": {{"status": "correct", "passed": 6, "total": 6, "points": 3, "earned": 3, "answer": True, "raised": None}}}}
text = json.dumps(right)
json.dumps = wire.json.dumps = lambda *values, **more: text
{_COUNT}""", spoils=("lora-layer", "lora-merge", "lora-rank-needed")),
    on_count("builtins-agree", POINTS, "replaces AssertionError's cause: the check's own comparison, by a number that equals all", f"""
import builtins
from labkit.exercises import judging
class Any(int):
    __eq__ = lambda self, other: True
    __hash__ = int.__hash__
judging.Verdict.earned = property(lambda self: Any(self.points))
{_COUNT}"""),
    Attack("thread-that-keeps-patching", POINTS, "patches again and again from a thread, whatever is put right in between", {
        "lora-count": """
import threading, time
def keep():
    import numpy
    while True:
        numpy.isclose = lambda *values, **tolerance: numpy.bool_(True)
        time.sleep(0.0005)
threading.Thread(target=keep, daemon=True).start()
time.sleep(0.02)
""" + _COUNT, "lora-merge": _MERGE}, spoils=("lora-rank-needed",)),
    on_count("signal-that-patches", POINTS, "has the operating system interrupt the check, and patches in the handler", f"""
import signal
def patch(*about):
    import numpy
    numpy.isclose = lambda *values, **tolerance: numpy.bool_(True)
signal.signal(signal.SIGALRM, patch)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
import time
time.sleep(0.02)
{_COUNT}"""),
]
