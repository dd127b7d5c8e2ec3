"""A real-time monitor: how long each decision took and what it said, deadlines missed, percentiles, and an alarm when something drifts.

It knows no server and no robot: whoever decides feeds it (core.py, a ROS node, or `Monitored` around any policy).
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

import numpy as np

AXES = ("x", "y", "z", "roll", "pitch", "yaw", "grip")
_MOST_DEVIATIONS = 3.0
# Of log(seconds) and of metres or radians: a stream that never moved has no deviation of its own to be measured by.
_LEAST_DEVIATION = 1e-3
_LEAST_PROBABILITY = 1e-9


def sliding(seconds, window: int, deadline: float) -> dict:
    """{"p95": (N,) 95th percentile of the last `window` of N numbers, after each of them, "missed": (N,) the share of those beyond the deadline}."""
    seconds = np.asarray(seconds, np.float64)
    latest = [seconds[max(0, n - window) : n] for n in range(1, len(seconds) + 1)]
    return {"p95": np.array([np.percentile(part, 95) for part in latest]), "missed": np.array([(part > deadline).mean() for part in latest])}


def page_hinkley(values, delta: float, threshold: float) -> dict:
    """The test for one stream whose mean may rise, as Page wrote it, in the values' own unit and without the additions of `PageHinkley`.

    values: (N,).   Returns {"evidence": (N,) how far the sum of value - mean so far - delta is above the least it has been, "alarm": the first
    place, from 0, where that is above the threshold, or -1}.
    """
    values = np.asarray(values, np.float64)
    evidence = []
    for excess in values - np.cumsum(values) / np.arange(1, len(values) + 1) - delta:
        evidence.append(max(0.0, evidence[-1] + excess) if evidence else 0.0)
    above = np.flatnonzero(np.array(evidence) > threshold)
    return {"evidence": np.array(evidence), "alarm": int(above[0]) if len(above) else -1}


class PageHinkley:
    """The Page-Hinkley test for a change of the mean, up or down, of several streams side by side.

    With z_t = (x_t - mean_t) / deviation_t, it keeps m_t = sum of (z - delta) and raises an alarm where m_t - min(m) > threshold; the same
    for -z. Page, Biometrika 41 (1954), 100-115; Hinkley, Biometrika 58 (1971), 509-523; the running mean as in Gama et al., ACM Computing
    Surveys 46 (2014), article 44, section 3.2. Two additions make one setting fit every stream: numbers are divided by the stream's own
    running deviation, and no single one counts as more than 3 of it, so that an outlier alone is no drift.
    After an alarm a stream is learnt afresh.
    """

    def __init__(self, streams: int, warm_up: int = 30, delta: float = 0.5, threshold: float = 15.0):
        """streams: how many.   warm_up: numbers a stream learns its mean and deviation from before it is tested.

        delta, threshold: in deviations; half the smallest shift that matters, and how much of it must have added up.
        Raises ValueError for a warm-up below 2, or a delta or threshold that is not positive.
        """
        if warm_up < 2 or delta <= 0 or threshold <= 0:
            raise ValueError(f"warm_up is at least 2, delta and threshold are positive; got {warm_up}, {delta}, {threshold}")
        self.warm_up, self.delta, self.threshold = warm_up, delta, threshold
        self.count, self.mean, self._squares = np.zeros(streams, int), np.zeros(streams), np.zeros(streams)
        # How far each sum is above its own minimum, row 0 for a mean that rises, row 1 for one that falls.
        self.evidence = np.zeros((2, streams))

    @property
    def deviation(self) -> np.ndarray:
        """(S,) running standard deviation of each stream, never below 0.001."""
        return np.maximum(np.sqrt(self._squares / np.maximum(self.count - 1, 1)), _LEAST_DEVIATION)

    def update(self, values) -> np.ndarray:
        """(S,) the next number of each stream  ->  (S,) bool, where the mean has changed."""
        values = np.asarray(values, np.float64)
        self.count += 1
        before = values - self.mean
        self.mean += before / self.count
        self._squares += before * (values - self.mean)
        z = np.clip((values - self.mean) / self.deviation, -_MOST_DEVIATIONS, _MOST_DEVIATIONS)
        ready = self.count > self.warm_up
        self.evidence = np.where(ready, np.maximum(self.evidence + np.stack([z, -z]) - self.delta, 0.0), 0.0)
        alarms = (self.evidence > self.threshold).any(axis=0)
        for state in (self.count, self.mean, self._squares):
            state[alarms] = 0
        return alarms


@dataclass(frozen=True)
class Alarm:
    """A stream's mean has changed.   decision: how many there had been.   stream: "response time", "confidence" or an axis of the action."""

    decision: int
    stream: str

    def __str__(self):
        return f"{self.stream} drifted at decision {self.decision}"


@dataclass(frozen=True)
class Snapshot:
    """What a monitor has seen.   decisions, misses: since it was made.   p50, p95: seconds, over the window; nan before the first decision."""

    decisions: int
    misses: int
    deadline: float
    p50: float
    p95: float
    alarms: tuple[Alarm, ...]

    def __str__(self):
        if not self.decisions:
            return "no decision yet"
        drift = f"{len(self.alarms)} drift alarm{'s' * (len(self.alarms) != 1)}, the last: {self.alarms[-1]}" if self.alarms else "no drift"
        return (f"{self.decisions} decision{'s' * (self.decisions != 1)}: median {1000 * self.p50:.1f} ms, 95th percentile {1000 * self.p95:.1f} ms; "
                f"{self.misses} missed the deadline of {round(1000 * self.deadline, 1):g} ms; {drift}")


class Monitor:
    """Watches decisions as they are made; any thread may feed it and any may look.

    Drift is looked for in the logarithm of the response time (so that "twice as slow" is the same step at 5 ms and at 500), in the mean
    log-probability of the action tokens, where the policy has some, and in each axis of the action. It sees only what moves the mean of one of
    these: wrong answers that are as sure and as scattered as right ones pass it, so it does not replace counting successes.
    """

    def __init__(self, deadline: float = 0.1, window: int = 200, warm_up: int = 30, most_alarms: int = 100):
        """deadline: seconds a decision may take.   window: how many decisions the percentiles are of.   warm_up: as in `PageHinkley`.

        most_alarms: how many are kept, the last ones.   Raises ValueError where the deadline or the window is not positive.
        """
        if not deadline > 0 or window < 1:
            raise ValueError(f"the deadline and the window are positive, not {deadline} s and {window} decisions")
        self.deadline = deadline
        self._warm_up, self._lock = warm_up, threading.Lock()
        self._seconds, self._alarms = deque(maxlen=window), deque(maxlen=most_alarms)
        self._decisions = self._misses = 0
        self._names = self._test = None

    def record(self, seconds: float, action=(), probabilities=()) -> tuple[Alarm, ...]:
        """One decision: how long the robot waited for it, in seconds, and what it was, (A,) numbers.   Returns the alarms it raises.

        probabilities: of its tokens, as in `Decision`; none, or NaN, where the policy has none (and where it had some, that is no confidence).
        Raises ValueError for an action that is not finite, a time that is not positive, or another number of axes than before.
        """
        action, probabilities = np.asarray(action, np.float64), np.asarray(probabilities, np.float64)
        if not np.isfinite(action).all() or not 0 < seconds < np.inf:
            raise ValueError(f"a decision takes a positive number of seconds and says finite numbers, not {seconds} s and {action.tolist()}")
        confident = len(probabilities) > 0 and not np.isnan(probabilities).any()
        with self._lock:
            if self._test is None:
                axes = AXES if len(action) == len(AXES) else (f"axis {i}" for i in range(len(action)))
                self._names = ("response time", *(["confidence"] if confident else []), *axes)
                self._test = PageHinkley(len(self._names), self._warm_up)
            values = [np.log(seconds)]
            if "confidence" in self._names:
                values.append(np.log(np.maximum(probabilities if confident else 0, _LEAST_PROBABILITY)).mean())
            values.extend(action)
            if len(values) != len(self._names):
                raise ValueError(f"decisions had {', '.join(self._names)} so far, this one's action has {len(action)} numbers")
            self._decisions += 1
            self._misses += seconds > self.deadline
            self._seconds.append(seconds)
            changed = self._test.update(values)
            alarms = tuple(Alarm(self._decisions, self._names[i]) for i in np.flatnonzero(changed))
            self._alarms.extend(alarms)
        return alarms

    def look(self) -> Snapshot:
        """What there is to see at this moment."""
        with self._lock:
            p50, p95 = np.percentile(self._seconds, [50, 95]) if self._seconds else (np.nan, np.nan)
            return Snapshot(self._decisions, int(self._misses), self.deadline, float(p50), float(p95), tuple(self._alarms))


class Monitored:
    """A policy around a policy: says the same, and tells a monitor of each decision."""

    def __init__(self, policy, monitor: Monitor):
        self.policy, self.monitor, self.name = policy, monitor, getattr(policy, "name", "policy")

    def decide(self, observations, instructions=None):
        """As the policy's own `decide`; each of the B observations counts as a decision that took as long as the batch."""
        decision = self.policy.decide(observations) if instructions is None else self.policy.decide(observations, instructions)
        for waypoint, probabilities in zip(decision.waypoints, decision.probabilities):
            self.monitor.record(decision.seconds, waypoint, probabilities)
        return decision

    def act(self, observation: dict, instruction: str | None = None) -> np.ndarray:
        """One observation  ->  (7,) waypoint for `env.step`.   instruction: default, the observation's own."""
        return self.decide([observation], None if instruction is None else [instruction]).waypoints[0]
