"""A monitor that is drawn while the robot works: response times, deadline, percentile and alarms in one picture, again and again.

What is watched and when it alarms is in monitor.py.
"""

from __future__ import annotations

import time
from textwrap import fill

import numpy as np

from labkit.plots import COLOURS, as_image
from labkit.serving.monitor import Monitor


class LiveMonitor(Monitor):
    """A `Monitor` with a picture in the notebook, under the cell that made it; elsewhere its words, once.

    Drawing takes tens of milliseconds, which no decision is charged with: times are those of the policy.
    """

    def __init__(self, deadline: float = 0.1, every: float = 0.5, **options):
        """deadline: seconds.   every: seconds between two pictures.   options: of `Monitor`."""
        from IPython.display import display

        super().__init__(deadline, **options)
        self.every, self._drawn = every, time.perf_counter()
        self._history = []  # of each decision: its seconds, and the percentile after it
        self._display = display(self._picture(), display_id=True)

    @property
    def times(self) -> list[float]:
        """Seconds of every decision so far."""
        return [seconds for seconds, _ in self._history]

    def record(self, seconds: float, action=(), probabilities=()):
        """As `Monitor.record`; draws, where the last picture is old enough."""
        raised = super().record(seconds, action, probabilities)
        self._history.append((seconds, self.look().p95))
        if time.perf_counter() - self._drawn > self.every:
            self.draw()
        return raised

    def draw(self) -> None:
        """Show what there is to see at this moment."""
        if self._display is not None:
            self._display.update(self._picture())
        self._drawn = time.perf_counter()

    def _picture(self):
        import matplotlib.pyplot as plt

        seen, history = self.look(), 1000 * np.reshape(self._history, (-1, 2))
        numbers = range(1, 1 + len(history))
        figure, axes = plt.subplots(figsize=(9, 2.8), layout="constrained")
        axes.plot(numbers, history[:, 0], color=COLOURS[5], linestyle="none", marker=".", label="response time")
        axes.plot(numbers, history[:, 1], color=COLOURS[0], marker="", label="95th percentile")
        axes.axhline(1000 * seen.deadline, color=COLOURS[1], linestyle="--", label="deadline")
        for alarm in seen.alarms:
            axes.axvline(alarm.decision, color="black", linewidth=1)
            axes.text(alarm.decision, 0.02, f" {alarm.stream}", transform=axes.get_xaxis_transform(), fontsize=10)
        axes.set(xlabel="decision", ylabel="ms", ylim=(0, None), xlim=(0, max(10, len(history) + 1)))
        axes.set_title(fill(str(seen), 100), fontsize=10, loc="left")
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), fontsize=10)
        return as_image(figure, f"Response times by decision. {seen}.")
