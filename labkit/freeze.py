"""The freeze: one hash over the environment, the vocabulary and the checkpoint. Every stored result carries it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from labkit.paths import DATA

CHECKPOINT = DATA / "tiny_vla"
_SHOWN = 12


def frozen_parts() -> dict[str, str]:
    """Hexadecimal SHA-256 of each of the three parts: `environment`, `vocabulary`, `checkpoint`.

    environment: the id, the MuJoCo model, the places, the camera and the action range, that is all a number of a rollout depends on.
    Raises FileNotFoundError where the checkpoint is not there.
    """
    from labkit import actions, instructions
    from labkit.tabletop import ENV_ID, arm, camera, scene, tasks

    environment = [
        ENV_ID, scene.mjcf(("ball", "block", "cup")), scene.BIN_PLACES, scene.OBJECT_AREA, scene.ZONE_PLACES, scene.FORWARD_PLACE,
        scene.OBJECT_SPACING, scene.HOME, scene.SAFE_HEIGHT, scene.RGBA,
        arm.LOW.tolist(), arm.HIGH.tolist(), arm.SPEED, arm.BLOCKED,
        {name: task.decisions for name, task in tasks.TASKS.items()}, tasks.BESIDE_GAP, tasks.FLOOR, tasks.HOVER,
        repr(camera.Camera()), actions.BINS, actions.LOW.tolist(), actions.HIGH.tolist(),
    ]  # fmt: skip
    return {
        "environment": _hash(json.dumps(environment).encode()),
        "vocabulary": _hash("\n".join(instructions.vocabulary()).encode()),
        "checkpoint": _hash((CHECKPOINT / "model.safetensors").read_bytes()),
    }


def freeze_hash() -> str:
    """The first 12 hexadecimal digits of the hash of all three parts: what stands in the model card and in every stored result."""
    return _hash(json.dumps(frozen_parts(), sort_keys=True).encode())[:_SHOWN]


def stored_freeze(folder: Path = CHECKPOINT) -> dict:
    """What was written when the checkpoint was made: the three parts, `freeze` and `golden_episode`."""
    return json.loads((folder / "freeze.json").read_text(encoding="utf-8"))


def golden_episode() -> dict:
    """What one scripted episode comes to: catches a change of physics or drawing that no constant of `frozen_parts` shows.

    instruction; positions: three centres in metres at the end, rounded to the millimetre; brightness: mean of the last picture.
    """
    from labkit.tabletop import Tabletop
    from labkit.tabletop.experts import next_waypoint

    env = Tabletop("stack")
    observation, _ = env.reset(seed=2024)
    for _ in range(2):
        observation, *_ = env.step(next_waypoint(env.episode.command, env.episode.scene, env.start, env.state))
    return {"instruction": env.episode.instruction, "positions": env.state.positions.round(3).tolist(),
            "brightness": round(float(observation["rgb"].mean()), 1)}


def write_freeze(folder: Path = CHECKPOINT) -> str:
    """Write `freeze.json` beside the checkpoint; returns the hash."""
    parts = {**frozen_parts(), "freeze": freeze_hash(), "golden_episode": golden_episode()}
    (folder / "freeze.json").write_text(json.dumps(parts, indent=1) + "\n", encoding="utf-8")
    return parts["freeze"]


def _hash(data):
    return hashlib.sha256(data).hexdigest()
