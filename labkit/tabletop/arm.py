"""The arm: a Cartesian gripper with a wrist and a vacuum pad, and the controller that carries out one waypoint.

A waypoint is (x, y, z, roll, pitch, yaw, grip): the pad's tip in metres, the wrist in radians, grip > 0.5 for vacuum on.
"""

from __future__ import annotations

import numpy as np

from labkit.tabletop.scene import HOME, SAFE_HEIGHT

STEPS_PER_CONTROL = 10
CONTROL_SECONDS = 0.05
SPEED = 1.0
LOW = np.array([-0.25, -0.25, 0.0, -0.6, -0.6, -np.pi, 0.0])
HIGH = np.array([0.25, 0.35, 0.30, 0.6, 0.6, np.pi, 1.0])
BLOCKED = 0.025
PRESS = 0.010
DWELL = 3  # control steps
_SETTLED = 0.002
_SETTLE_STEPS = 12


class Arm:
    """Drives one MuJoCo simulation. `on_control_step`, where set, is called 20 times a simulated second."""

    def __init__(self, model, data):
        self.model, self.data = model, data
        self.speed = SPEED
        self.on_control_step = None
        self.blocked = False
        self._pad = model.geom("pad").id
        self._objects = {model.geom(i).id: int(model.geom(i).name[6:]) for i in range(model.ngeom) if model.geom(i).name.startswith("object")}
        self._joints = [int(model.joint(n).qposadr[0]) for n in ("x", "y", "z", "roll", "pitch", "yaw")]
        self._tip = model.body("wrist").id
        self.go_home_at_once()

    def go_home_at_once(self):
        """Put the arm at its home pose without moving through the scene; for the start of an episode."""
        home = np.array([*HOME, 0.0, 0.0, 0.0])
        self.data.qpos[self._joints] = home
        self.data.ctrl[:6] = home

    @property
    def joints(self) -> np.ndarray:
        """(6,) x, y, z in metres, roll, pitch, yaw in radians."""
        return self.data.qpos[self._joints].copy()

    @property
    def end_effector(self) -> np.ndarray:
        """(6,) pose of the pad's tip: x, y, z in metres, roll, pitch, yaw in radians, read from the body's frame, not the joints."""
        frame = self.data.xmat[self._tip].reshape(3, 3)
        roll, yaw = np.arctan2(frame[2, 1], frame[2, 2]), np.arctan2(frame[1, 0], frame[0, 0])
        return np.array([*self.data.xpos[self._tip], roll, -np.arcsin(np.clip(frame[2, 0], -1, 1)), yaw])

    @property
    def held(self) -> int | None:
        """Index of the object that hangs on the pad, or None."""
        if self.data.ctrl[6] < 0.5:
            return None
        for contact in range(self.data.ncon):
            pair = self.data.contact.geom[contact]
            if self._pad in pair:
                other = int(pair[0] if pair[1] == self._pad else pair[1])
                if other in self._objects:
                    return self._objects[other]
        return None

    def wait(self, seconds: float):
        """Let the world go on for this long while the arm keeps still."""
        self._control_steps(round(seconds / CONTROL_SECONDS))

    def execute(self, waypoint) -> np.ndarray:
        """Travel above the waypoint, come down along the tool's axis, switch the vacuum, rise, and return home.

        An arm that is held up more than 2.5 cm before its goal makes a protective stop: it leaves the vacuum as it is and returns.
        Returns (6,) the pose the tip reached at the bottom; `blocked` says whether it was stopped.
        """
        target = np.clip(np.asarray(waypoint, dtype=np.float64), LOW, HIGH)
        pose, grip = target[:6], float(target[6] > 0.5)
        above = risen(pose)
        self._move(above)
        self._move(pose)
        reached = self.end_effector
        self.blocked = bool(np.linalg.norm(reached[:3] - pose[:3]) > BLOCKED)
        if not self.blocked:
            self._switch(grip, pose)
        self._move(above)
        self._move(np.array([*HOME, 0.0, 0.0, 0.0]))
        return reached

    def _switch(self, grip, pose):
        self.data.ctrl[6] = grip
        if grip:
            # A suction cup seals only when it is pushed on: one centimetre further along the tool.
            self.data.ctrl[:3] -= tool_axis(pose) * PRESS
        self._control_steps(DWELL)

    def _move(self, pose):
        start = self.data.ctrl[:6].copy()
        count = max(1, int(np.ceil(path_length(start, pose) / (self.speed * CONTROL_SECONDS))))
        for step in range(1, count + 1):
            self.data.ctrl[:6] = start + (pose - start) * _ease(step / count)
            self._control_steps(1)
        for _ in range(_SETTLE_STEPS):
            if np.abs(self.data.qpos[self._joints][:3] - pose[:3]).max() < _SETTLED:
                return
            self._control_steps(1)

    def _control_steps(self, count):
        import mujoco

        for _ in range(count):
            mujoco.mj_step(self.model, self.data, STEPS_PER_CONTROL)
            if self.on_control_step is not None:
                self.on_control_step()


def _ease(share):
    """Smooth start and stop of a straight motion, so that the load is not shaken off the pad."""
    return share * share * (3 - 2 * share)


def risen(pose) -> np.ndarray:
    """(6,) pose  ->  the pose at the safe height from which the tool comes down on it, along its own axis."""
    above = pose.copy()
    above[:3] += tool_axis(pose) * max(SAFE_HEIGHT - pose[2], 0.0) / tool_axis(pose)[2]
    return above


def path_length(start, pose) -> float:
    """Metres between two (6,) poses, by the tip or, where that is longer, by an angle, as the way of what is 15 cm from the wrist."""
    return max(np.linalg.norm(pose[:3] - start[:3]), 0.15 * np.abs(pose[3:] - start[3:]).max())


def tool_axis(pose) -> np.ndarray:
    """Unit vector from the pad up along the tool, for roll, pitch, yaw in radians (z-y-x convention)."""
    roll, pitch, yaw = pose[3:6]
    cr, sr, cp, sp, cy, sy = np.cos(roll), np.sin(roll), np.cos(pitch), np.sin(pitch), np.cos(yaw), np.sin(yaw)
    return np.array([cy * sp * cr + sy * sr, sy * sp * cr - cy * sr, cp * cr])
