"""Teleoperation by clicks: a person says on a map of the table where the tip should go next. Where nobody clicks, a scripted operator records."""

from __future__ import annotations

import io
from html import escape

import numpy as np

from labkit.demonstrations import Demonstration
from labkit.instructions import COLOURS
from labkit.plots import AltImage
from labkit.recording import record_episode
from labkit.tabletop import Tabletop, Variation
from labkit.tabletop.experts import RELEASE_CLEARANCE
from labkit.tabletop.scene import HALF_HEIGHT
from labkit.tabletop.tasks import FLOOR

COLUMNS, ROWS = np.linspace(-0.21, 0.21, 13), np.linspace(0.205, -0.145, 11)
_HALF_CELL = 0.0175
# A click means the thing whose centre is this near, as a person means a thing and not a point of the table.
SNAP = 0.035
_EMPTY = "#eeeeee"


class Teleoperator:
    """Collects the waypoints that a person clicks in one episode, and makes a demonstration of them.

    Use `widget()` to show it, or `click(x, y)` from code; then `demonstration()`.
    """

    def __init__(self, task: str = "stack", seed: int = 0, variation: Variation = Variation()):
        self.seed, self.clicks, self.over = seed, [], False
        self._env, self._again = Tabletop(task, variation), Tabletop(task, variation)
        self._env.reset(seed=seed)

    @property
    def instruction(self) -> str:
        """What the person should make the robot do."""
        return self._env.episode.instruction

    def click(self, x: float, y: float) -> np.ndarray:
        """Send the tip to the thing at (x, y), in metres, or to the table there; the vacuum goes on over an object, off with one in hand.

        Returns the (7,) waypoint.   Raises RuntimeError when the episode is over.
        """
        if self.over:
            raise RuntimeError("this episode is over: make another Teleoperator with another seed")
        waypoint = self._waypoint(x, y)
        self.clicks.append(waypoint)
        _, _, terminated, truncated, info = self._env.step(waypoint)
        self.over, self.success = terminated or truncated, info["success"]
        return waypoint

    def demonstration(self, otherwise="expert") -> Demonstration:
        """The person's episode as a demonstration, with its `success`; recorded by `otherwise`, an operator, where the person did not finish."""
        if not self.over:
            return record_episode(self._again, otherwise, self.seed)
        left = iter(self.clicks)

        def person(env, observation):
            return next(left)

        return record_episode(self._again, person, self.seed)

    def _waypoint(self, x, y):
        scene, state = self._env.episode.scene, self._env.state
        others = [i for i in range(len(scene.things)) if i != state.held]
        places = [state.positions[i][:2] for i in others] + [np.array([tray.x, tray.y]) for tray in scene.bins]
        distances = [np.hypot(*(place - (x, y))) for place in places]
        meant = int(np.argmin(distances)) if min(distances) <= SNAP else None
        x, y = (x, y) if meant is None else places[meant]
        top = 0.0 if meant is None else FLOOR
        if meant is not None and meant < len(others):
            thing = others[meant]
            top = state.positions[thing][2] + HALF_HEIGHT[scene.things[thing].shape]
        if state.held is None:
            return np.array([x, y, top, 0, 0, 0, 1.0])
        return np.array([x, y, top + 2 * HALF_HEIGHT[scene.things[state.held].shape] + RELEASE_CLEARANCE, 0, 0, 0, 0.0])

    def widget(self):
        """A map of the table, seen from above, to click on, and a photograph. Returns the ipywidgets box."""
        import ipywidgets as widgets

        told, screen = widgets.HTML(), widgets.HTML()
        cell = widgets.Layout(width="30px", height="28px", margin="0", padding="0")
        # One style a colour, not one a button: a saved notebook holds them all.
        styles = {colour: widgets.ButtonStyle(button_color=colour) for colour in (*COLOURS, _EMPTY)}
        buttons = [widgets.Button(layout=cell, style=styles[_EMPTY], tooltip=f"x {x:+.2f} m, y {y:+.2f} m") for y in ROWS for x in COLUMNS]

        def look(_=None):
            for button, (y, x) in zip(buttons, ((y, x) for y in ROWS for x in COLUMNS), strict=True):
                button.description, colour = self._sign(x, y)
                button.style = styles[colour]
                button.disabled = self.over
            told.value = escape(self._said())
            screen.value = _photograph(self._env, f"The table, told '{self.instruction}'.")._repr_html_()

        def pressed(x, y):
            return lambda _: (self.click(x, y), look())

        for button, (y, x) in zip(buttons, ((y, x) for y in ROWS for x in COLUMNS), strict=True):
            button.on_click(pressed(x, y))
        look()
        grid = widgets.GridBox(buttons, layout=widgets.Layout(grid_template_columns=f"repeat({len(COLUMNS)}, 31px)"))
        return widgets.VBox([told, widgets.HBox([grid, screen])])

    def _said(self):
        if self.over:
            return f"“{self.instruction}”: {'done' if self.success else 'not done'}, in {len(self.clicks)} clicks."
        return f"“{self.instruction}” Click {len(self.clicks) + 1}: where to {'put it down' if self._env.state.held is not None else 'grasp'}?"

    def _sign(self, x, y):
        """Letter and colour of a cell: of the thing that stands there (B block, O ball, U cup), or of the bin (#)."""
        scene, state = self._env.episode.scene, self._env.state
        for thing, place in zip(scene.things, state.positions, strict=True):
            if np.abs(place[:2] - (x, y)).max() <= _HALF_CELL:
                return {"block": "B", "ball": "O", "cup": "U"}[thing.shape], thing.colour
        for tray in scene.bins:
            if max(abs(tray.x - x), abs(tray.y - y)) < 0.05:
                return "#", tray.colour
        return "", _EMPTY


def _photograph(env, alt):
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(env.render()).save(data, format="PNG")
    return AltImage(data.getvalue(), "png", alt, 320)
