"""Properties of the monitor that is drawn: it counts as any monitor does, and what it shows is what it has seen."""

import pytest

from labkit.serving import live
from labkit.serving.live import LiveMonitor
from labkit.serving.monitor import Monitor

SECONDS = [0.01, 0.2, 0.03, 0.4]


class Shown:
    """In place of a notebook's output: what was displayed, and what replaced it."""

    def __init__(self):
        self.pictures = []

    def display(self, picture, display_id):
        self.pictures.append(picture)
        return self

    def update(self, picture):
        self.pictures.append(picture)


@pytest.fixture
def shown(monkeypatch):
    screen = Shown()
    monkeypatch.setattr("IPython.display.display", screen.display)
    return screen


def fed(monitor):
    return [monitor.record(seconds, [0.1, 0.2, 0.3]) for seconds in SECONDS]


def test_it_counts_what_a_monitor_counts_and_keeps_every_time(shown):
    drawn, plain = LiveMonitor(0.1, window=3), Monitor(0.1, window=3)
    assert fed(drawn) == fed(plain)
    assert drawn.look() == plain.look() and drawn.times == SECONDS


def test_the_picture_is_there_before_the_first_decision_and_says_what_was_seen(shown):
    monitor = LiveMonitor(0.1, every=1e9)
    assert "no decision yet" in shown.pictures[0].alt
    fed(monitor)
    assert len(shown.pictures) == 1
    monitor.draw()
    assert str(monitor.look()) in shown.pictures[1].alt and shown.pictures[1].data != shown.pictures[0].data


def test_it_is_drawn_again_when_the_last_picture_is_old_enough(shown, monkeypatch):
    now = iter([0.0, 0.4, 0.6, 0.6, 1.0, 1.2, 1.2])
    monkeypatch.setattr(live.time, "perf_counter", lambda: next(now))
    fed(LiveMonitor(0.1, every=0.5))
    assert [picture.alt.split(":")[0] for picture in shown.pictures[1:]] == [
        "Response times by decision. 2 decisions", "Response times by decision. 4 decisions"]


def test_without_a_notebook_it_is_said_once_and_goes_on(capsys):
    monitor = LiveMonitor(0.1, every=0)
    fed(monitor)
    assert capsys.readouterr().out.count("Response times by decision") == 1 and monitor.look().decisions == 4
