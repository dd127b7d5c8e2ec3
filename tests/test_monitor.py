"""Properties of the monitor: what it counts is what happened, and its alarm sounds for a drift and for little else."""

import threading

import numpy as np
import pytest

from labkit.policy import Decision
from labkit.serving.monitor import AXES, Alarm, Monitor, Monitored, PageHinkley


def by_definition(values, warm_up, delta, threshold):
    """The first alarm of the Page-Hinkley test, computed from its definition over the whole history at every step; None without one."""
    up, down = [0.0], [0.0]
    for t in range(1, len(values) + 1):
        past = np.asarray(values[:t])
        if t <= warm_up:
            continue
        z = np.clip((past[-1] - past.mean()) / max(past.std(ddof=1), 1e-3), -3, 3)
        up.append(up[-1] + z - delta)
        down.append(down[-1] - z - delta)
        if up[-1] - min(up) > threshold or down[-1] - min(down) > threshold:
            return t
    return None


def first_alarm(values, **settings):
    test = PageHinkley(1, **settings)
    return next((t for t, value in enumerate(values, 1) if test.update([value])[0]), None)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shift", [0.0, 1.5, -3.0])
def test_page_hinkley_sounds_where_its_definition_says(seed, shift):
    rng = np.random.default_rng(seed)
    values = rng.normal(5, 2, 120) + 2 * shift * (np.arange(120) >= 60)
    settings = dict(warm_up=20, delta=0.4, threshold=6.0)
    assert first_alarm(values, **settings) == by_definition(values, **settings)


def test_a_hand_calculation_of_the_alarm():
    """1, -1, 1, -1 and then threes: each counts little less than its deviations from a mean that follows it."""
    values = [1.0, -1.0, 1.0, -1.0, 3.0, 3.0]
    test = PageHinkley(1, warm_up=4, delta=0.5, threshold=1.5)
    assert not any(test.update([value])[0] for value in values[:5])
    # Mean 0.6, deviation sqrt(((0.4)^2 * 2 + (1.6)^2 * 2 + (2.4)^2) / 4) = 1.6733: z = 2.4 / 1.6733, less delta.
    assert test.evidence[0, 0] == pytest.approx(2.4 / np.sqrt(2.8) - 0.5)
    # Mean 1, deviation sqrt((0 + 4 + 0 + 4 + 4 + 4) / 5): z = 2 / 1.7889.
    assert 2.4 / np.sqrt(2.8) + 2 / np.sqrt(3.2) - 1.0 > 1.5
    assert test.update([values[5]])[0]


def test_streams_do_not_mix():
    rng = np.random.default_rng(3)
    values = rng.normal(size=(200, 4))
    values[100:, 2] += 3
    test = PageHinkley(4)
    sounded = np.array([test.update(row) for row in values])
    assert sounded.any(axis=0).tolist() == [False, False, True, False]
    alone = [first_alarm(values[:, i]) for i in range(4)]
    assert alone[2] == np.flatnonzero(sounded[:, 2])[0] + 1 and alone[:2] + alone[3:] == [None] * 3


def test_false_alarms_are_rare_and_shifts_are_found():
    """1,000 independent normal streams of 1,000: fewer than one false alarm in 100,000; a shift of two deviations is never missed."""
    rng = np.random.default_rng(0)
    quiet, moved = PageHinkley(1000), PageHinkley(1000)
    assert sum(quiet.update(rng.normal(size=1000)).sum() for _ in range(1000)) < 10
    found = np.zeros(1000, bool)
    for t in range(160):
        found |= moved.update(rng.normal(size=1000) + 2 * (t >= 100)) & (t >= 100)
    assert found.all()


def test_one_outlier_is_no_drift_however_large():
    rng = np.random.default_rng(1)
    values = rng.normal(size=500)
    values[400] = 1e9
    assert first_alarm(values) is None


def test_a_stream_that_never_moved_sounds_when_it_does_and_not_before():
    assert first_alarm([0.0] * 500) is None
    assert 100 < first_alarm([0.0] * 100 + [0.5] * 50) <= 120


def test_after_an_alarm_the_other_level_is_the_usual_one():
    test = PageHinkley(1)
    rng = np.random.default_rng(2)
    values = np.concatenate([rng.normal(0, 1, 100), rng.normal(8, 1, 400)])
    assert sum(test.update([value])[0] for value in values) == 1
    assert test.mean[0] == pytest.approx(8, abs=0.3)


@pytest.mark.parametrize("settings", [{"warm_up": 1}, {"delta": 0}, {"threshold": -1}])
def test_settings_that_make_no_test_are_refused(settings):
    with pytest.raises(ValueError, match="positive"):
        PageHinkley(1, **settings)


def test_misses_and_percentiles_are_those_of_numpy_over_the_window():
    seconds = np.random.default_rng(4).exponential(0.05, 500)
    monitor = Monitor(deadline=0.1, window=80)
    for value in seconds:
        monitor.record(value)
    seen = monitor.look()
    assert (seen.decisions, seen.misses) == (500, int((seconds > 0.1).sum()))
    assert (seen.p50, seen.p95) == tuple(np.percentile(seconds[-80:], [50, 95]))


def test_a_robot_that_becomes_slow_reaches_elsewhere_or_grows_unsure_is_told_so_by_name():
    rng = np.random.default_rng(5)
    slow, elsewhere, unsure = Monitor(), Monitor(), Monitor()
    for t in range(200):
        action = rng.normal(0, 0.05, 7)
        took = 0.02 * np.exp(rng.normal(0, 0.2))
        slow.record(took * (3 if t >= 120 else 1), action)
        elsewhere.record(took, action + np.array([0, 0.2, 0, 0, 0, 0, 0]) * (t >= 120))
        unsure.record(took, action, np.full(4, np.exp(rng.normal(-1.5, 0.05))) * (0.8 if t >= 120 else 1))
    for monitor, name in ((slow, "response time"), (elsewhere, "y"), (unsure, "confidence")):
        alarm, = monitor.look().alarms
        assert alarm.stream == name and 120 < alarm.decision < 150
    assert "y drifted at decision" in str(elsewhere.look()) and "1 drift alarm, the last" in str(elsewhere.look())


def test_record_returns_the_alarms_it_raises_and_keeps_the_last_ones():
    monitor = Monitor(warm_up=5, most_alarms=2)
    returned = [monitor.record(0.01, [float(1000 * (t // 50) ** 2)]) for t in range(500)]
    raised = [alarm for alarms in returned for alarm in alarms]
    assert len(raised) > 2 and monitor.look().alarms == tuple(raised[-2:])
    assert all(isinstance(alarm, Alarm) and alarm.stream == "axis 0" for alarm in raised)


def test_before_the_first_decision_there_is_nothing_to_say():
    seen = Monitor().look()
    assert np.isnan(seen.p95) and str(seen) == "no decision yet"
    monitor = Monitor()
    monitor.record(0.0123, np.zeros(7))
    assert str(monitor.look()) == "1 decision: median 12.3 ms, 95th percentile 12.3 ms; 0 missed the deadline of 100 ms; no drift"


@pytest.mark.parametrize("seconds, action", [(0, [1.0]), (-1, [1.0]), (np.nan, [1.0]), (np.inf, [1.0]), (0.1, [np.nan]), (0.1, [1.0, 2.0])])
def test_what_is_no_decision_is_refused_and_changes_nothing(seconds, action):
    monitor = Monitor()
    monitor.record(0.1, [1.0])
    before = monitor.look()
    with pytest.raises(ValueError):
        monitor.record(seconds, action)
    assert monitor.look() == before


def test_a_policy_without_probabilities_is_watched_without_them_and_one_of_zero_is_no_error():
    without, certain = Monitor(warm_up=2), Monitor(warm_up=2)
    for _ in range(100):
        without.record(0.1, np.zeros(7), np.full(4, np.nan))
        certain.record(0.1, np.zeros(7), np.ones(4))
    assert not without.look().alarms and without.record(0.1, np.zeros(7)) == ()
    raised = [certain.record(0.1, np.zeros(7), np.zeros(4)) for _ in range(20)]
    assert {alarm.stream for alarms in raised for alarm in alarms} == {"confidence"}
    # A model whose numbers have broken says NaN: that is no reason to stop watching it.
    broken = Monitor(warm_up=2)
    raised = [broken.record(0.1, np.zeros(7), np.ones(4) if t < 100 else np.full(4, np.nan)) for t in range(120)]
    assert {alarm.stream for alarms in raised for alarm in alarms} == {"confidence"}


@pytest.mark.parametrize("numbers", [{"deadline": 0}, {"deadline": np.nan}, {"window": 0}])
def test_a_deadline_or_window_of_nothing_is_refused(numbers):
    with pytest.raises(ValueError, match="positive"):
        Monitor(**numbers)


def test_threads_that_feed_it_together_are_all_counted():
    monitor = Monitor(deadline=0.5, window=10_000)
    threads = [threading.Thread(target=lambda i=i: [monitor.record(0.1 + 0.1 * i, np.zeros(7)) for _ in range(500)]) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen = monitor.look()
    assert (seen.decisions, seen.misses) == (4000, 3 * 500)  # 0.6, 0.7 and 0.8 s; 0.5 s is in time


def test_a_monitored_policy_says_the_same_and_each_robot_of_a_batch_counts(tiny_policy, observations):
    monitor = Monitor(deadline=1e-9)
    watched = Monitored(tiny_policy, monitor)
    said = watched.decide(observations)
    assert isinstance(said, Decision) and np.array_equal(said.waypoints, tiny_policy.decide(observations).waypoints)
    other = ["stack"] * len(observations)
    assert np.array_equal(watched.decide(observations, other).waypoints, tiny_policy.decide(observations, other).waypoints)
    assert np.array_equal(watched.act(observations[0]), tiny_policy.act(observations[0]))
    assert monitor.look().decisions == monitor.look().misses == 2 * len(observations) + 1
    assert len(AXES) == said.waypoints.shape[1]
