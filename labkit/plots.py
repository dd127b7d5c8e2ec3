"""Figures: one look for all lessons. Functions take numbers and return a matplotlib figure; they run nothing."""

from __future__ import annotations

import base64
import io
from textwrap import fill

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


def show(figure, alt: str, says: str = ""):
    """Display a figure with its alternative text, and close it.

    alt: what kind of picture it is, for a student who cannot see it.   says: what it shows, in words and numbers; printed under the figure
    and added to the alternative text.
    """
    from IPython.display import display

    display(as_image(figure, " ".join(filter(None, [alt, says])), bbox_inches="tight"))
    if says:
        print(says)


def as_image(figure, alt: str, **options) -> AltImage:
    """A figure as a PNG with alternative text; the figure is closed.   options: of matplotlib's `savefig`."""
    import matplotlib.pyplot as plt

    picture = io.BytesIO()
    figure.savefig(picture, format="png", **options)
    plt.close(figure)
    return AltImage(picture.getvalue(), "png", alt)


def in_words(results: dict) -> str:
    """label -> anything that can be printed, as one sentence."""
    return "; ".join(f"{label}: {result}" for label, result in results.items()) + "."


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

    figure, axes = plt.subplots(figsize=(max(7.5, 2.1 * len(rollouts)), 4.2))
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
    axes.set_xticks(places, [fill(str(label), 15) for label in rollouts])
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


def token_strip(tokens, weights, title: str = ""):
    """A token sequence as boxes, those that the loss counts filled, each with its weight.

    tokens: strings.   weights: one number a token, share of the loss; 0 where it does not count.
    """
    import matplotlib.pyplot as plt

    columns = 12
    rows = -(-len(tokens) // columns)
    figure, axes = plt.subplots(figsize=(11, 0.62 * rows + 0.5), layout="constrained")
    for i, (token, weight) in enumerate(zip(tokens, weights)):
        x, y = i % columns, -(i // columns)
        counts = weight > 0
        axes.add_patch(plt.Rectangle((x, y), 0.94, 0.86, facecolor=COLOURS[0] if counts else "white", edgecolor="black" if counts else "0.6"))
        said = f"{token}\n{100 * weight:.1f} %" if counts else token
        axes.text(x + 0.47, y + 0.43, said, ha="center", va="center", fontsize=10, color="white" if counts else "0.25")
    axes.set(xlim=(0, columns), ylim=(1 - rows, 1), title=title)
    axes.axis("off")
    return figure


def success_lines(series: dict, xlabel: str, title: str = "", live: dict | None = None):
    """Success against a number, one line a label, with 95 % intervals.

    series: label -> {x: object with `rate` and `interval`}.   live: label -> (x, rate), drawn as a star: what this notebook measured.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots()
    for colour, marker, (label, points) in zip(COLOURS, MARKERS, series.items()):
        x = list(points)
        bounds = 100 * np.array([p.interval for p in points.values()])
        axes.plot(x, [100 * p.rate for p in points.values()], color=colour, marker=marker, label=label)
        axes.fill_between(x, bounds[:, 0], bounds[:, 1], color=colour, alpha=0.18, linewidth=0)
        if live and label in live:
            axes.plot(live[label][0], 100 * live[label][1], color=colour, marker="*", markersize=17, markeredgecolor="black", linestyle="none")
    axes.set(xlabel=xlabel, ylabel="success (% of episodes)", ylim=(-4, 104), title=title, xticks=x)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def success_points(series: dict, title: str = "", live: dict | None = None):
    """Success by category, one row each and one point a label, with 95 % intervals.

    series: label -> {category: object with `rate` and `interval`}, every label with the same categories.
    live: label -> (category, rate), drawn as a star: what this notebook measured.
    """
    import matplotlib.pyplot as plt

    categories = list(next(iter(series.values())))
    figure, axes = plt.subplots(figsize=(8, 1.4 + 0.5 * len(categories)), layout="constrained")
    for n, (colour, marker, (label, points)) in enumerate(zip(COLOURS, MARKERS, series.items())):
        rows = np.arange(len(categories)) + 0.3 * (n - (len(series) - 1) / 2)
        rates = 100 * np.array([points[category].rate for category in categories])
        ends = 100 * np.array([points[category].interval for category in categories])
        errors = np.abs(ends - rates[:, None]).T
        axes.errorbar(rates, rows, xerr=errors, color=colour, marker=marker, linestyle="none", capsize=3, label=label)
        if live and label in live:
            category, rate = live[label]
            axes.plot(100 * rate, rows[categories.index(category)], color=colour, marker="*", markersize=15, markeredgecolor="black")
    axes.set(xlabel="success (% of episodes)", xlim=(-4, 104), title=title)
    axes.set_yticks(range(len(categories)), categories)
    axes.invert_yaxis()
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def position_bars(rows: dict, tokens, marked, title: str = ""):
    """One value for each position of a sequence, one panel a row.

    rows: label -> (T,) values.   tokens: (T,) strings.   marked: (T,) bool, drawn darker and hatched.
    """
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(len(rows), 1, figsize=(11, 1.9 * len(rows) + 0.8), sharex=True, layout="constrained")
    for panel, (label, values) in zip(np.atleast_1d(panels), rows.items()):
        bars = panel.bar(np.arange(len(tokens)), values, color=[COLOURS[0] if m else COLOURS[4] for m in marked])
        for bar, m in zip(bars, marked):
            bar.set_hatch("//" if m else "")
        panel.set_title(label, fontsize=12, loc="left")
    panel.set_xticks(np.arange(len(tokens)), tokens, rotation=90, fontsize=8)
    panel.set_xlabel("position, with the token that stands there")
    if title:
        figure.suptitle(title, fontsize=13)
    return figure


def heatmaps(matrices: dict, rows, columns, row_label: str, column_label: str):
    """Success rates as grids side by side, each cell with its number.

    matrices: title -> (R, C) rates between 0 and 1, nan where nothing was tried.   rows, columns: names.
    """
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(matrices), figsize=(5.2 * len(matrices), 4.6), layout="constrained", squeeze=False)
    for panel, (title, matrix) in zip(panels[0], matrices.items()):
        matrix = np.asarray(matrix, float)
        panel.imshow(matrix, vmin=0, vmax=1, cmap="cividis")
        for (i, j), rate in np.ndenumerate(matrix):
            text = "-" if np.isnan(rate) else f"{100 * rate:.0f}"
            panel.text(j, i, text, ha="center", va="center", color="black" if rate > 0.6 else "white", fontsize=12)
        panel.set_xticks(range(len(columns)), columns, rotation=30)
        panel.set_yticks(range(len(rows)), rows)
        panel.set(title=title, xlabel=column_label)
        panel.grid(False)
    panels[0][0].set_ylabel(row_label)
    return figure


def over_picture(picture, weights, title: str = ""):
    """What a policy sees, and beside it the same with a weight for each patch laid over it.

    picture: (S, S, 3) uint8.   weights: (P, P), patches row by row from the upper left.
    """
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(8, 4), layout="constrained")
    size = picture.shape[0]
    for panel in panels:
        panel.imshow(picture)
        panel.axis("off")
    grid = panels[1].imshow(weights, extent=(-0.5, size - 0.5, size - 0.5, -0.5), cmap="cividis", alpha=0.65, vmin=0)
    figure.colorbar(grid, ax=panels[1], label="share of the attention", shrink=0.8)
    figure.suptitle(title, fontsize=13)
    return figure
