"""The performance exercise: a submitted LoRA adapter is checked byte by byte, merged into a fresh base policy and rolled out on hidden episodes.

Nothing of the student's is executed, unpickled or configured: of everything handed in, only the numbers of one safetensors file count.
The page that compares adapters is in leaderboard.py.
"""

from __future__ import annotations

import ctypes
import hashlib
import hmac
import json
import math
import stat
import sys
from collections.abc import Callable
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn

from labkit.errors import UserError
from labkit.exercises.judging import printable
from labkit.grading.assignment import PerformanceTask
from labkit.grading.results import Performance
from labkit.policy import Policy, load_policy
from labkit.rollouts import lock_step, wilson
from labkit.tabletop import Tabletop

Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]
# alpha / r of `labkit.sft.lora`, whose alpha is 2 * rank unless another is asked for.
SCALING = 2.0
HIGHEST_RANK = 64
# The share of what could be gained, and of what could be kept, that is enough for all points.
ENOUGH = 0.85
# How much of the scale the untouched policy must leave free, so that learning can be told from luck.
LEAST_ROOM = 0.25
BATCH = 50
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
_FLOATS = ("F64", "F32", "F16", "BF16")
_LONGEST_HEADER = 1_000_000
_SEEDS_FROM, _SEEDS = 10**12, 2**48
_PICKLES = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_SAVE = "save it with `policy.save(folder)` and hand in adapter_model.safetensors"


class Refused(Exception):
    """Why an adapter gets no points, in one sentence for the student."""


def hidden_episode_seed(secret: str, assignment: str, task: str) -> int:
    """The seed of the first hidden episode of a task; the others follow it.

    The same for every student of an assignment, unknown without the course's secret, and from 10**12 on: pretraining, the recorded
    demonstrations, validation and evaluation all use seeds below 10**9.
    """
    digest = hmac.new(secret.encode(), json.dumps(["episodes", assignment, task]).encode(), hashlib.sha256).digest()
    return _SEEDS_FROM + int.from_bytes(digest[:8], "big") % _SEEDS


def share_of_points(success: float, retention: float, untouched_success: float, untouched_retention: float, perfect: float) -> float:
    """The share of the points, 0 to 1, that an adapter earns: what it learned, halved where everything else was forgotten.

    success, retention: lower ends of the adapter's rates (95 % Wilson).   untouched_success: the base's rate on the same episodes.
    untouched_retention: the lower end of the base's; 0 where there is nothing to keep.   perfect: the lower end of a run without a failure.

        learned = (success - untouched_success) / (ENOUGH * (perfect - untouched_success))     held to 0 .. 1
        kept = retention / (ENOUGH * untouched_retention)                                      held to 0 .. 1
        share = learned * (1 + kept) / 2

    Continuous, and never less for one success more. The lower ends, so that points stand for what the episodes show and not for luck: the
    lower end of a rate is never above that rate, hence the untouched policy and one that does nothing earn exactly 0. Retention multiplies:
    alone it is worth nothing, since who hands in no change at all keeps everything. With 100 episodes each, 90 successes on either side are
    enough for all points where the untouched policy has none on the new task and all on the old ones.
    """
    learned = (success - untouched_success) / (ENOUGH * (perfect - untouched_success))
    kept = retention / (ENOUGH * untouched_retention) if untouched_retention else 1.0
    return min(max(learned, 0.0), 1.0) * (1 + min(max(kept, 0.0), 1.0)) / 2


def in_quarters(share: float, points: float) -> float:
    """Share times points, rounded down to quarter points; the whole share is all points, whatever they are."""
    return float(points) if share >= 1 else math.floor(4 * share * points + 1e-9) / 4


class AdapterGrader:
    """Grades adapters for one assignment's performance task; made once, it keeps the base policy and nothing of any submission.

    task: the new task gets its `episodes`, and the old ones share as many, in equal parts.   secret: the course's.   assignment: its name.
    policy: the base, default the shipped one, on the CPU.
    The rank is read from the shapes; alpha is always 2 * rank, whatever a configuration says. Whoever trained with another alpha multiplies
    every B by alpha / (2 * rank) before handing in.
    """

    def __init__(self, task: PerformanceTask, secret: str, assignment: str, policy: Policy | None = None):
        self.task, self.base = task, policy or load_policy("tiny", device="cpu")
        old = task.retention_tasks
        counts = {task.task: task.episodes} | {name: math.ceil(task.episodes / len(old)) for name in old}
        self.episodes = [(name, hidden_episode_seed(secret, assignment, name) + i) for name, count in counts.items() for i in range(count)]
        output = self.base.model.get_output_embeddings()
        self.layers = {name: tuple(module.weight.shape) for name, module in self.base.model.named_modules()
                       if isinstance(module, nn.Linear) and module is not output}

    @cached_property
    def untouched(self) -> tuple[int, int]:
        """Successes of the base on the new task and on the old ones, on the hidden episodes.

        Raises UserError where it leaves too little to learn.
        """
        new, old = self.roll_out(self.base)
        if self._perfect - new / self.task.episodes < LEAST_ROOM:
            raise UserError(f"the untouched policy finishes {new} of {self.task.episodes} hidden episodes of {self.task.task}, which leaves too "
                            "little to learn: give the assignment's performance another task or more episodes")
        return new, old

    @property
    def _perfect(self):
        return _low(self.task.episodes, self.task.episodes)

    def grade(self, adapter: Path | bytes | None, on_episode: Callable[[], object] = lambda: None) -> Performance:
        """What this adapter is worth; the same bytes give the same record.

        adapter: a safetensors file as `policy.save` writes it, or its bytes; None or a missing file means that none was handed in. Whatever
        else is wrong is said in the record's message, with 0 points.   on_episode: called at the end of each of `len(self.episodes)` episodes.
        Raises UserError where the task itself cannot be graded.
        """
        try:
            pairs = read_adapter(adapter, self.layers, self.task.size_mib)
            new, old = self.roll_out(merged(self.base, pairs), on_episode)
        except Refused as refused:
            return Performance(self.task.task, self.task.points, 0.0, printable(str(refused)))
        ranks = sorted({len(a) for a, _ in pairs.values()})
        kind = f"LoRA of rank {' and '.join(map(str, ranks))} on {len(pairs)} layer{'s' * (len(pairs) > 1)}, its update scaled by {SCALING:g}"
        return self._judged(kind, new, old)

    def _judged(self, kind, new, old):
        task, most_new, most_old = self.task, self.task.episodes, len(self.episodes) - self.task.episodes
        new_before, old_before = self.untouched
        share = share_of_points(_low(new, most_new), _low(old, most_old), new_before / most_new, _low(old_before, most_old), self._perfect)
        message = f"{kind}: it finishes {new} of {most_new} hidden episodes of {task.task} (the untouched policy {new_before})"
        if most_old:
            message += f" and {old} of {most_old} of {', '.join(task.retention_tasks)} (the untouched policy {old_before})"
        message += f"; with the lower ends of the 95 % intervals that is {math.floor(100 * share)} % of the points."
        success, retention = _span(new, most_new), _span(old, most_old) if most_old else None
        return Performance(task.task, task.points, in_quarters(share, task.points), message, success, retention, len(self.episodes))

    def roll_out(self, policy, on_episode: Callable[[], object] = lambda: None) -> tuple[int, int]:
        """Successes of a policy on the hidden episodes of the new task and on those of the old ones."""
        successes, careful = [], _Careful(policy)
        for first in range(0, len(self.episodes), BATCH):
            some = self.episodes[first : first + BATCH]
            environments = [Tabletop(task) for task, _ in some]
            observations = [env.reset(seed=seed)[0] for env, (_, seed) in zip(environments, some)]
            successes.append(lock_step(careful, environments, observations, on_episode)[0])
            del environments, observations
            _give_memory_back()
        found = np.concatenate(successes)
        return int(found[: self.task.episodes].sum()), int(found[self.task.episodes :].sum())


def _span(successes, episodes):
    return (successes / episodes, *wilson(successes, episodes))


def _low(successes, episodes):
    return wilson(successes, episodes)[0] if episodes else 0.0


class _Careful:
    """A policy whose numbers are a stranger's: refused when they are not finite, and computed the same way whoever calls."""

    def __init__(self, policy):
        self.policy = policy

    def decide(self, observations):
        with _same_arithmetic():
            decision = self.policy.decide(observations)
        if not np.isfinite(decision.probabilities).all():
            raise Refused("With this adapter the policy computes numbers that are not finite: train with a smaller learning rate.")
        return decision


@contextmanager
def _same_arithmetic():
    """One thread, since the number of threads changes the last digits; no subnormal numbers, which some processors multiply 100 times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)


def _give_memory_back():
    """Return freed memory to the system. glibc keeps what many simulations have left in pieces, otherwise: over 10 MB more for each adapter."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)


def merged(base: Policy, pairs: Pairs) -> Policy:
    """A copy of the base whose weights (out, in) are W + SCALING * B A.   pairs: layer -> A (r, in), B (out, r)."""
    policy = base.copy()
    with torch.no_grad():
        for name, (a, b) in pairs.items():
            weight = policy.model.get_submodule(name).weight
            weight += SCALING * (b @ a)
            if not weight.isfinite().all():
                raise Refused(f"The adapter's numbers for {name} are so large that the merged weight is not finite: train with a smaller "
                              "learning rate.")
    return policy


def read_adapter(adapter: Path | bytes | None, layers: dict[str, tuple[int, int]], size_mib: float) -> Pairs:
    """The LoRA matrices of a file that nobody vouches for, as float32: layer -> A (r, in), B (out, r).

    layers: the linear layers that may have an update, with (out, in).   size_mib: the largest file.
    Raises Refused, with a sentence for the student.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = _bytes_of(adapter, size_mib)
    ranks = _ranks(_entries(data, 2 * len(layers)), layers)
    try:
        # Offsets that overlap, leave gaps, run over the end or do not fit the shape are the library's to find.
        tensors = load(data)
    except SafetensorError as error:
        raise Refused(f"The adapter is damaged ({str(error)[:100]}): {_SAVE}.") from None
    pairs = {}
    for name in ranks:
        pairs[name] = tuple(tensors[f"{_PREFIX}{name}{half}"].to(torch.float32) for half in (_A, _B))
        if not all(half.isfinite().all() for half in pairs[name]):
            raise Refused(f"The adapter's matrices for {name} hold NaN or infinity: train with a smaller learning rate.")
    return pairs


def _bytes_of(adapter, size_mib):
    limit = int(size_mib * 2**20)
    data = adapter if isinstance(adapter, bytes) else _read(adapter, limit + 1)
    if len(data) > limit:
        raise Refused(f"The adapter is larger than {size_mib:g} MiB: hand in the LoRA matrices only, not the model.")
    return data


def _read(path, most):
    missing = Refused(f"No adapter was handed in: {_SAVE}.")
    if path is None:
        raise missing
    try:
        # A pipe or a device would be waited for, or never end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise Refused(f"The adapter is not a file: {_SAVE}.")
        with open(path, "rb") as file:
            return file.read(most)
    except (FileNotFoundError, ValueError):  # the latter: a name that no file can have
        raise missing from None
    except OSError as error:
        raise Refused(f"The adapter cannot be read ({type(error).__name__}): {_SAVE}.") from None


def _entries(data, most):
    """The header's entries, name -> (dtype, shape), of the right types and not too many; what the file says beside them is not looked at."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, _LONGEST_HEADER):
        kind = "a pickle or a zip, which could run code and is not opened" if data[:2] in _PICKLES else "not a safetensors file"
        raise Refused(f"The adapter is {kind}: {_SAVE}.")
    try:
        header = json.loads(data[8 : 8 + length].decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError):
        raise Refused(f"The adapter's header is damaged: {_SAVE}.") from None
    if not isinstance(header, dict):
        raise Refused(f"The adapter's header is damaged: {_SAVE}.")
    header.pop("__metadata__", None)
    if not header:
        raise Refused("The adapter holds no tensor: fine-tune with `peft_config=lora(rank)` before you save it.")
    if len(header) > most:
        raise Refused(f"The adapter holds {len(header):,} tensors; a LoRA of this model has {most} at most.")
    found = {}
    for name, entry in header.items():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise Refused(f"The adapter's header gives {_quoted(name)} no shape: {_SAVE}.")
        found[name] = entry.get("dtype"), tuple(shape)
    return found


def _without_duplicates(pairs):
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError("a name comes twice")
    return dict(pairs)


def _ranks(entries, layers):
    """Layer -> rank, for entries that are complete pairs of LoRA matrices and nothing else."""
    halves = {}
    for name, (dtype, shape) in entries.items():
        layer, half = name.removeprefix(_PREFIX)[: -len(_A)], name[-len(_A) :]
        if not name.startswith(_PREFIX) or half not in (_A, _B) or layer not in layers:
            raise Refused(f"The adapter holds {_quoted(name)}, which is no LoRA matrix of a linear layer of the course's model: whole weights, "
                          "biases, embeddings, the output layer, DoRA and other methods are not accepted.")
        if dtype not in _FLOATS:
            raise Refused(f"The adapter's {_quoted(name)} has the dtype {_quoted(dtype)}; floats are accepted: {', '.join(_FLOATS)}.")
        halves.setdefault(layer, {})[half] = shape
    return {layer: _rank(layer, halves[layer], *layers[layer]) for layer in sorted(halves)}


def _rank(layer, shapes, outputs, inputs):
    if len(shapes) < 2:
        missing = (_B if _A in shapes else _A).removeprefix(".").removesuffix(".weight")
        raise Refused(f"The adapter has no {missing} for {layer}: {_SAVE}.")
    a, b = shapes[_A], shapes[_B]
    rank = a[0] if a else 0
    if a != (rank, inputs) or b != (outputs, rank):
        raise Refused(f"The adapter's matrices for {layer} have the shapes {_quoted(a)} and {_quoted(b)}; A is (r, {inputs}) and B is "
                      f"({outputs}, r) there: was it trained on another model?")
    if not 1 <= rank <= HIGHEST_RANK:
        raise Refused(f"The adapter's rank for {layer} is {rank}; accepted are 1 to {HIGHEST_RANK}.")
    return rank


def _quoted(text):
    """A student's own words, at most 100 characters of them, on one line."""
    text = printable(str(text)[:200])
    return f"`{text if len(text) <= 100 else text[:100] + '...'}`"
