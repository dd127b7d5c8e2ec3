"""The robot and its table: scene, camera, arm, tasks, scripted operators and the gymnasium environment. Knows no model."""

import gymnasium

from labkit.tabletop.env import ENV_ID, Episode, Tabletop
from labkit.tabletop.scene import Variation

if ENV_ID not in gymnasium.registry:
    gymnasium.register(ENV_ID, entry_point="labkit.tabletop.env:Tabletop")

__all__ = ["ENV_ID", "Episode", "Tabletop", "Variation"]
