"""Action <-> tokens: each number of a waypoint becomes one of 256 bins, as in RT-2 (arXiv 2307.15818) and OpenVLA (arXiv 2406.09246)."""

from __future__ import annotations

import numpy as np

BINS = 256
NAMES = ("x", "y", "z", "grip")
LOW = np.array([-0.25, -0.25, 0.0, 0.0])
HIGH = np.array([0.25, 0.35, 0.25, 1.0])
WIDTH = (HIGH - LOW) / BINS


def action_to_bins(action) -> np.ndarray:
    """(..., 4) waypoint x, y, z in metres and grip in [0, 1]  ->  (..., 4) int64 bins in [0, 255].

    Numbers outside the range go to the nearest end bin.   Raises ValueError for NaN or another width.
    """
    action = np.asarray(action, dtype=np.float64)
    if action.shape[-1:] != (len(NAMES),):
        raise ValueError(f"an action has {len(NAMES)} numbers ({', '.join(NAMES)}), got the shape {action.shape}")
    if not np.isfinite(action).all():
        raise ValueError("an action must be finite, got NaN or infinity")
    return np.clip(np.floor((action - LOW) / WIDTH), 0, BINS - 1).astype(np.int64)


def bins_to_action(bins) -> np.ndarray:
    """(..., 4) bins  ->  (..., 4) waypoint at the bins' centres, so the worst error is half a bin (1 mm in x)."""
    return LOW + (np.asarray(bins, dtype=np.float64) + 0.5) * WIDTH


def full_waypoint(action) -> np.ndarray:
    """(..., 4) x, y, z, grip  ->  (..., 7) x, y, z in metres, roll, pitch, yaw in radians (0: the gripper hangs vertical), grip."""
    action = np.asarray(action, dtype=np.float64)
    upright = np.zeros((*action.shape[:-1], 3))
    return np.concatenate([action[..., :3], upright, action[..., 3:]], axis=-1)


def small_action(waypoint) -> np.ndarray:
    """(..., 7) full waypoint  ->  (..., 4) the x, y, z, grip that the small VLA predicts."""
    waypoint = np.asarray(waypoint, dtype=np.float64)
    return waypoint[..., [0, 1, 2, 6]]
