"""The policy core: checks a request, asks any policy of the course, several waiting requests in one forward, and counts. No server is in it.

HTTP is in http.py, ROS in ros_node.py; both bring their requests here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from labkit.serving.monitor import Monitor

GENERIC = "generic"
FIELDS = ("image", "instruction", "unnorm_key", "holding", "previous_image")
# What OpenVLA calls the statistics that turn its numbers into metres; here there is one robot, and policies say metres.
UNNORM_KEYS = (None, "tabletop")
MOST_PICTURES, LARGEST_SIDE, LONGEST_INSTRUCTION = 256, 1024, 300
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# How many forwards back the core looks when it guesses how many clients there are.
_MEMORY = 8

_log = logging.getLogger(__name__)


class RequestError(ValueError):
    """What is wrong with a request, in one sentence; only who sent it can put it right."""


class Busy(Exception):
    """As many requests wait as may: whoever asks shall try again."""


class PolicyFailed(Exception):
    """The policy raised, or said numbers that no robot can follow."""


def policy_named(name: str, adapter: str | Path | None = None):
    """The one place where a name becomes a policy to serve, so that going from the generic to a task-specific one is one parameter.

    name: "generic" (the lab's, CLIP towers and a head), a folder written by `WaypointPolicy.save`, or whatever `load_policy` knows: "tiny",
    another folder, a hub id.   adapter: as in `load_policy`, and only there.   Raises UserError, in one sentence.
    """
    from labkit.errors import UserError
    from labkit.policy import load_policy
    from labkit.task_specific_vla import GENERIC as FOLDER
    from labkit.task_specific_vla import load_waypoint_policy

    folder = FOLDER if name == GENERIC else Path(name)
    if name != GENERIC and not (folder / "task_specific_vla.json").is_file():
        return load_policy(name, adapter=adapter)
    if adapter is not None:
        raise UserError(f"{name} takes no adapter: its LoRA is merged when it is saved; give the folder of the fine-tuned policy instead")
    return load_waypoint_policy(folder)


def read_request(fields: dict) -> list[dict]:
    """The fields of a request  ->  observations for `decide`, one a picture.

    image: (H, W, 3) uint8, or (N, H, W, 3) for N robots at once.   instruction: a sentence, or N.   unnorm_key: None or "tabletop".
    holding: the vacuum sensor, 0 or 1, or N of them (default 0).   previous_image: like image, for a policy that reads two frames.
    Raises RequestError, in one sentence that names the field.
    """
    unknown = sorted(set(fields) - set(FIELDS))
    if unknown:
        raise RequestError(f"{_short(unknown[0])} is no field of a request; there are {', '.join(FIELDS)}")
    for name in ("image", "instruction"):
        if name not in fields:
            raise RequestError(f"the field {name!r} is missing")
    key = fields.get("unnorm_key")
    if not isinstance(key, str | None) or key not in UNNORM_KEYS:
        raise RequestError(f"unnorm_key is {_short(key)}; it must be None or 'tabletop'")
    images = _pictures(fields["image"], "image")
    count = len(images)
    previous = fields.get("previous_image")
    if previous is not None:
        previous = _pictures(previous, "previous_image")
        if previous.shape != images.shape:
            raise RequestError(f"previous_image has the shape {previous.shape[1:]} and image {images.shape[1:]}: they must be alike")
    said = fields["instruction"]
    said = list(said) if isinstance(said, list | tuple) else [said] * count
    held = fields.get("holding")
    held = list(held) if isinstance(held, list | tuple) or getattr(held, "ndim", 0) == 1 else [0 if held is None else held] * count
    for name, values in (("instruction", said), ("holding", held)):
        if len(values) != count:
            raise RequestError(f"{name} has {len(values)} values for {count} picture{'s' * (count != 1)}")
    observations = [{"rgb": image, "instruction": _sentence(text), "holding": _sensor(value)} for image, text, value in zip(images, said, held)]
    return observations if previous is None else [{**o, "previous_rgb": image} for o, image in zip(observations, previous)]


def _pictures(value, name):
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8:
        raise RequestError(f"{name} is {_kind(value)}; it must be an array of uint8")
    if value.ndim not in (3, 4) or value.shape[-1] != 3:
        raise RequestError(f"{name} has the shape {value.shape}; it must be (height, width, 3), or (N, height, width, 3)")
    value = value[None] if value.ndim == 3 else value
    if not 1 <= len(value) <= MOST_PICTURES or not all(1 <= side <= LARGEST_SIDE for side in value.shape[1:3]):
        raise RequestError(f"{name} has the shape {value.shape}; 1 to {MOST_PICTURES} pictures of 1 to {LARGEST_SIDE} pixels a side are answered")
    return value


def _sentence(value):
    if not isinstance(value, str) or not value.strip():
        raise RequestError(f"instruction is {_short(value)}; it must be a sentence")
    if len(value) > LONGEST_INSTRUCTION:
        raise RequestError(f"instruction has {len(value)} characters; {LONGEST_INSTRUCTION} are the most")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"instruction holds half a character ({_short(value[error.start])}); it must be text that UTF-8 can write") from None
    return value


def _sensor(value):
    if not isinstance(value, bool | int | np.bool_ | np.integer) or value not in (0, 1):
        raise RequestError(f"holding is {_short(value)}; it must be 0 or 1, what the vacuum sensor says")
    return int(value)


def _kind(value):
    return f"an array of {value.dtype}" if isinstance(value, np.ndarray) else f"of the type {type(value).__name__}"


def _short(value):
    said = " ".join(repr(value).split())
    return said if len(said) <= 40 else said[:40] + "..."


@dataclass(eq=False)
class _Request:
    observations: list[dict]
    shape: tuple[int, ...]
    since: float = field(default_factory=time.perf_counter)
    future: Future = field(default_factory=Future)


class Metrics:
    """What is counted, in Prometheus' terms, in a registry of its own: two cores in one process do not mix."""

    def __init__(self, core: PolicyCore):
        self.registry = registry = CollectorRegistry()
        self.decisions = Counter("labkit_decisions", "Waypoints that the policy has said.", registry=registry)
        self.failures = Counter("labkit_policy_failures", "Requests that the policy could not answer.", registry=registry)
        self.response = Histogram("labkit_response_seconds", "From a request's arrival here to its answer.", buckets=_SECONDS, registry=registry)
        self.forward = Histogram("labkit_forward_seconds", "The policy's own time for a batch.", buckets=_SECONDS, registry=registry)
        self.batch = Histogram("labkit_batch_size", "Observations in one forward.", buckets=_SIZES, registry=registry)
        Gauge("labkit_waiting_requests", "Requests that wait for the policy.", registry=registry).set_function(lambda: core.waiting)
        Gauge("labkit_deadline_misses", "Decisions that took longer than the deadline.", registry=registry).set_function(
            lambda: core.monitor.look().misses)
        Gauge("labkit_drift_alarms", "Drift alarms that the monitor keeps.", registry=registry).set_function(lambda: len(core.monitor.look().alarms))


class PolicyCore:
    """Asks one policy, from one thread of its own, whatever the number of threads that ask; itself a policy with `decide`.

    Requests that wait while the policy is busy share its next forward. When recent forwards served several clients, it also waits a few
    milliseconds for as many to come back; a client that is alone never waits. A forward of several requests may differ from one of each in the
    last bits (other matrix shapes, other order of sums); with `max_batch` 1 none is ever shared, and every answer is to the bit the policy's own.
    Close it, or use it in a `with` statement.
    """

    def __init__(self, policy, max_batch: int = 8, wait: float = 0.003, most_waiting: int = 64, monitor: Monitor | None = None):
        """policy: anything with `decide(observations) -> Decision`.   max_batch: observations that several requests may share a forward with; a
        request of more is answered alone.   wait: seconds.   most_waiting: requests; one more raises Busy.
        Raises ValueError where a number makes no sense.
        """
        if max_batch < 1 or not 0 <= wait <= threading.TIMEOUT_MAX or most_waiting < 1:
            raise ValueError(f"max_batch and most_waiting are at least 1, wait is seconds, from 0; got {max_batch}, {most_waiting}, {wait}")
        self.policy, self.name = policy, str(getattr(policy, "name", "policy"))
        self.max_batch, self.wait, self.most_waiting = max_batch, wait, most_waiting
        self.monitor = Monitor() if monitor is None else monitor
        self.metrics = Metrics(self)
        self._waiting: deque[_Request] = deque()
        self._recent = deque([1], maxlen=_MEMORY)
        self._arrived, self._closing = threading.Condition(), False
        self._thread = threading.Thread(target=self._work, name="policy", daemon=True)
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    @property
    def waiting(self) -> int:
        """Requests that nobody has begun to answer."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive() and not self._closing

    def close(self, patience: float = 10.0) -> None:
        """Answer what waits, then stop; a second call does nothing.

        patience: seconds, after which a policy that hangs is left behind; what waits for it then raises Busy.
        """
        with self._arrived:
            self._closing = True
            self._arrived.notify_all()
        self._thread.join(patience)
        with self._arrived:
            left, self._waiting = self._waiting, deque()
        for request in left:
            if request.future.set_running_or_notify_cancel():
                request.future.set_exception(Busy("the server is stopping"))

    def submit(self, observations) -> Future:
        """One request of B observations  ->  a future of its Decision, whose `seconds` are the policy's own for the batch it was in.

        The future raises RequestError where the policy refuses these observations with a ValueError, PolicyFailed where it fails otherwise.
        Raises Busy where too many wait, or the core is closed, and ValueError for no observation, or one without a picture.
        """
        if not observations or any("rgb" not in o for o in observations):
            raise ValueError("a request holds at least one observation, each with its picture `rgb`")
        request = _Request(list(observations), np.shape(observations[0]["rgb"]))
        with self._arrived:
            if self._closing:
                raise Busy("the server is stopping")
            if len(self._waiting) >= self.most_waiting:
                raise Busy(f"{self.most_waiting} requests wait already: try again in a moment")
            self._waiting.append(request)
            self._arrived.notify()
        return request.future

    def decide(self, observations, instructions=None):
        """B observations (and B instructions, default the observations' own)  ->  Decision, like any policy of the course."""
        if instructions is not None:
            observations = [{**o, "instruction": text} for o, text in zip(observations, instructions, strict=True)]
        return self.submit(observations).result()

    def _work(self):
        while batch := self._next_batch():
            # Who has hung up needs no answer.
            batch = [request for request in batch if request.future.set_running_or_notify_cancel()]
            if batch:
                self._answer(batch)

    def _next_batch(self):
        """The oldest request and what may go with it; None when the core is closed and nothing waits."""
        with self._arrived:
            while not self._waiting and not self._closing:
                self._arrived.wait()
            if not self._waiting:
                return None
            batch = [self._waiting.popleft()]
            self._collect(batch)
            until = time.perf_counter() + self.wait
            while len(batch) < max(self._recent) and _rows(batch) < self.max_batch and not self._closing:
                left = until - time.perf_counter()
                if left <= 0:
                    break
                self._arrived.wait(left)
                self._collect(batch)
            self._recent.append(len(batch))
        return batch

    def _collect(self, batch):
        """Move into `batch` what waits, has pictures of the same size and still fits."""
        for request in list(self._waiting):
            if request.shape == batch[0].shape and _rows(batch) + len(request.observations) <= self.max_batch:
                self._waiting.remove(request)
                batch.append(request)

    def _answer(self, batch):
        try:
            decision = self._ask([o for request in batch for o in request.observations])
            parts = _shared_out(decision, batch)
            self._count(decision, parts, batch)
        except BaseException as error:  # a panic in Rust, as in a tokenizer, is no Exception; whoever asks next is answered all the same
            self._give_up(batch, error)
            return
        for request, part in zip(batch, parts):
            request.future.set_result(part)

    def _count(self, decision, parts, batch):
        for request, part in zip(batch, parts):
            seconds = time.perf_counter() - request.since
            for waypoint, probabilities in zip(part.waypoints, part.probabilities):
                self.monitor.record(seconds, waypoint, probabilities)
            self.metrics.response.observe(seconds)
        self.metrics.forward.observe(decision.seconds)
        self.metrics.batch.observe(len(decision.waypoints))
        self.metrics.decisions.inc(len(decision.waypoints))

    def _ask(self, observations):
        try:
            decision = self.policy.decide(observations)
        except ValueError as error:
            raise RequestError(f"the policy refuses this request: {_in_one_line(error)}") from error
        shape = np.shape(decision.waypoints)
        if shape != (len(observations), 7):
            raise PolicyFailed(f"the policy said waypoints of the shape {shape} for {len(observations)} observation(s), not 7 numbers each")
        if not np.isfinite(decision.waypoints).all():
            raise PolicyFailed("the policy said numbers that are not finite")
        return decision

    def _give_up(self, batch, error):
        if len(batch) > 1:
            # What the policy cannot answer must not spoil its neighbours'.
            for request in batch:
                self._answer([request])
            return
        self.metrics.failures.inc()
        if not isinstance(error, PolicyFailed | RequestError):
            _log.error("the policy failed", exc_info=error)
            error = PolicyFailed(f"the policy failed: {type(error).__name__}: {_in_one_line(error)}")
        batch[0].future.set_exception(error)


def _in_one_line(error):
    return " ".join(str(error).split())[:200]


def _rows(batch):
    return sum(len(request.observations) for request in batch)


def _shared_out(decision, batch):
    """Each request's rows of a decision, as a decision of its own."""
    parts, end = [], 0
    for request in batch:
        begin, end = end, end + len(request.observations)
        rows = {name: getattr(decision, name)[begin:end] for name in ("bins", "actions", "waypoints", "probabilities")}
        parts.append(replace(decision, **rows))
    return parts
