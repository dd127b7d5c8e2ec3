"""Synthetic data for `navigate`: one picture of the table, labelled for many paths that nobody drove.

Nothing on the table moves while the robot visits landmarks, so the simulator knows every leg's waypoint without driving it; a robot would
spend six seconds on each.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from labkit.instructions import say
from labkit.tabletop import Tabletop, Variation
from labkit.tabletop.experts import next_waypoint
from labkit.tabletop.tasks import commands
from labkit.task_specific_vla import frames_of
from labkit.waypoint_regression import WaypointSamples


def synthetic_paths(scenes: int, seed: int, paths: int = 8, frames: int = 1, legs: int | None = None,
                    variation: Variation = Variation()) -> WaypointSamples:
    """Every leg of `paths` paths drawn for each of `scenes` scenes, from the simulator's seeds `seed`, `seed` + 1, ...

    frames: pictures a decision, as the model reads them.   legs: only paths of so many; default, two or three as `navigate` draws them.
    """
    env, rows = Tabletop("navigate", variation), []
    for one in range(seed, seed + scenes):
        observation, _ = env.reset(seed=one)
        rng, scene = np.random.default_rng([one, 19]), env.episode.scene
        options = [c for c in commands("navigate", scene) if legs in (None, len(c.steps))]
        for number, chosen in enumerate(rng.choice(len(options), min(paths, len(options)), replace=False)):
            command, state = options[chosen], env.start
            said = say(command, rng, unique_colours=scene.unique_colours)
            for leg in range(len(command.steps)):
                waypoint = next_waypoint(command, scene, env.start, state)
                picture = frames_of(observation["rgb"], observation["rgb"] if leg else None, frames)
                rows.append((f"synthetic-{one}-{number}/{leg}", said, picture, waypoint))
                state = replace(state, reached=np.vstack([state.reached, waypoint[:3]]))
    ids, said, images, waypoints = zip(*rows, strict=True)
    return WaypointSamples(list(ids), list(said), np.stack(images), np.zeros(len(ids), bool), np.stack(waypoints))
