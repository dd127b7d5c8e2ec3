"""Figures: one look for all lessons. Functions take numbers and return a matplotlib figure; they run nothing."""

from __future__ import annotations

import base64
import io

import numpy as np

# Okabe and Ito's colours, told apart by people with any colour vision, in the order we use them.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def style():
    """Set the course's look for matplotlib: legible from the back row."""
    import matplotlib.pyplot as plt
    from cycler import cycler

    plt.rcParams.update({
        "figure.figsize": (7.5, 4.2), "figure.dpi": 90, "font.size": 13, "axes.spines.top": False, "axes.spines.right": False,
        "axes.prop_cycle": cycler(color=COLOURS) + cycler(marker=MARKERS), "axes.grid": True, "grid.alpha": 0.25,
    })


def show(figure, alt: str):
    """Display a figure with its alternative text, and close it.   alt: what a student who cannot see it should know."""
    import matplotlib.pyplot as plt
    from IPython.display import display

    picture = io.BytesIO()
    figure.savefig(picture, format="png", bbox_inches="tight")
    plt.close(figure)
    display(AltImage(picture.getvalue(), "png", alt))


class AltImage:
    """A picture for the notebook with alternative text, in every front end that shows HTML, and its text where none does.

    data: the file's bytes.   kind: "png" or "gif".   width: pixels on the page, or None for the picture's own.
    """

    def __init__(self, data: bytes, kind: str, alt: str, width: int | None = None):
        self.data, self.kind, self.alt, self.width = data, kind, alt, width

    def _repr_html_(self):
        from html import escape

        size = f' width="{self.width}"' if self.width else ""
        coded = base64.b64encode(self.data).decode()
        return f'<img src="data:image/{self.kind};base64,{coded}" alt="{escape(self.alt)}"{size}>'

    def __repr__(self):
        return f"[picture: {self.alt}]"


def success_bars(rollouts: dict, title: str = "", chance: dict | None = None):
    """Success with 95 % Wilson intervals, one bar a row.

    rollouts: label -> object with `rate` and `interval`.   chance: label -> rate, drawn as a short line.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots()
    places = np.arange(len(rollouts))
    rates = np.array([100 * r.rate for r in rollouts.values()])
    bounds = 100 * np.array([r.interval for r in rollouts.values()])
    axes.bar(places, rates, color=[COLOURS[i % len(COLOURS)] for i in places], width=0.6)
    axes.errorbar(places, rates, yerr=[rates - bounds[:, 0], bounds[:, 1] - rates], fmt="none", ecolor="black", capsize=5)
    for place, label in zip(places, rollouts):
        if chance and label in chance:
            axes.plot([place - 0.35, place + 0.35], [100 * chance[label]] * 2, color="black", linestyle="--", marker="")
    for place, rate, high in zip(places, rates, bounds[:, 1]):
        axes.annotate(f"{rate:.0f} %", (place, high), ha="center", va="bottom", xytext=(0, 3), textcoords="offset points")
    axes.set_xticks(places, list(rollouts))
    axes.set(ylabel="success (% of episodes)", ylim=(0, 112), title=title)
    axes.set_yticks(range(0, 101, 20))
    return figure


def token_bars(probabilities, names, values, title: str = ""):
    """What the policy thinks of each action token: one small panel a number of the action.

    probabilities: (4, 256), each row sums to one.   names: the four names with units.   values: (4, 256) what each bin means.
    """
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(names), figsize=(11, 2.6), layout="constrained")
    for panel, row, name, value, colour in zip(panels, probabilities, names, values, COLOURS):
        panel.bar(value, row, width=value[1] - value[0], color=colour)
        panel.set(xlabel=name, ylim=(0, max(row.max() * 1.15, 0.05)))
    panels[0].set_ylabel("probability")
    if title:
        figure.suptitle(title, fontsize=13)
    return figure
