"""`labkit/Tabletop-v0`: the robot, its table and its tasks as a gymnasium environment. One step is one waypoint."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass

import gymnasium
import numpy as np
from gymnasium import spaces

from labkit.instructions import Command, say
from labkit.tabletop import arm as arms
from labkit.tabletop import camera as cameras
from labkit.tabletop.scene import BELT_CENTRE_Y, BELT_HALF_Y, BELT_TOP, HALF_HEIGHT, HOME, Scene, Variation, compiled, paint, sample_scene
from labkit.tabletop.tasks import State, commands, has_failed, is_done, task_named

ENV_ID = "labkit/Tabletop-v0"
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 '.,;:!?-"


@dataclass(frozen=True)
class Episode:
    """What an episode is about: drawn from the seed at reset, readable as `env.unwrapped.episode`."""

    task: str
    scene: Scene
    command: Command
    instruction: str
    variation: Variation


class Tabletop(gymnasium.Env):
    """A Cartesian gripper with a vacuum pad over a table with three objects and three bins.

    Observation: rgb (48, 48, 3) uint8; depth (48, 48) float32 in metres; joints (6,) and end_effector (6,) in metres and
    radians; holding 0 or 1 (the vacuum sensor); instruction, a sentence.
    Action: (7,) waypoint x, y, z in metres, roll, pitch, yaw in radians, grip (above 0.5: vacuum on).
    Reward: 1 in the step that completes the task. Terminated: done, or failed for good. Truncated: out of decisions.

    `reset(options=...)` takes `task`, `variation`, `scene`, `command`, `instruction` and `held_out_phrasing`, each of which
    replaces what the constructor or the seed would give.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(self, task: str = "pick", variation: Variation = Variation(), held_out_phrasing: bool = False,
                 camera: cameras.Camera = cameras.Camera(), render_mode: str | None = None):
        self.task = task_named(task).name
        self.variation = variation
        self.held_out_phrasing = held_out_phrasing
        self.camera = camera
        self.render_mode = render_mode
        self.episode: Episode | None = None
        size = camera.size
        low, high = np.array([*arms.LOW[:6]]), np.array([*arms.HIGH[:6]])
        pose = spaces.Box(low - 0.2, high + 0.2, dtype=np.float64)
        self.observation_space = spaces.Dict(
            rgb=spaces.Box(0, 255, (size, size, 3), np.uint8),
            depth=spaces.Box(0.0, 10.0, (size, size), np.float32),
            joints=pose,
            end_effector=pose,
            holding=spaces.Discrete(2),
            instruction=spaces.Text(max_length=300, min_length=0, charset=_LETTERS),
        )
        self.action_space = spaces.Box(arms.LOW.astype(np.float32), arms.HIGH.astype(np.float32), dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        options = dict(options or {})
        unknown = set(options) - {"task", "variation", "scene", "command", "instruction", "held_out_phrasing"}
        if unknown:
            raise ValueError(f"reset does not know the option {sorted(unknown)[0]!r}")
        self.episode = self._draw_episode(**options)
        self._build(self.episode)
        return self._observe(), self._info(False)

    def step(self, action):
        if self.episode is None:
            raise RuntimeError("call reset() before step()")
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (7,) or not np.isfinite(action).all():
            raise ValueError(f"an action is 7 finite numbers (x y z roll pitch yaw grip), got {action!r}")
        reached = self.arm.execute(action)
        self._reached = np.vstack([self._reached, reached[:3]])
        command, scene, state = self.episode.command, self.episode.scene, self.state
        success = is_done(command, scene, self.start, state)
        terminated = success or has_failed(command, scene, state)
        truncated = not terminated and len(self._reached) >= task_named(self.episode.task).decisions
        return self._observe(), float(success), terminated, truncated, self._info(success)

    def wait(self, seconds: float):
        """Let the world go on while the arm keeps still, as it does while a slow policy thinks. Returns the new observation."""
        self.arm.wait(seconds)
        return self._observe()

    def render(self):
        """(256, 256, 3) uint8 picture from the studio camera beside the table."""
        return self.photograph(cameras.STUDIO)[0]

    def photograph(self, camera: cameras.Camera):
        """(size, size, 3) uint8 and (size, size) float32 metres, from any camera, in this episode's light."""
        v = self.episode.variation
        return cameras.photograph(self.model, self.data, self._paint, camera, v.light, v.light_direction)

    @property
    def state(self) -> State:
        """What is true on the table, for experts and success; the policy never sees it."""
        n = len(self.episode.scene.things)
        poses = self.data.qpos[self._objects].reshape(n, 7)
        w, x, y, z = poses[:, 3:].T
        yaws = np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))
        return State(poses[:, :3].copy(), yaws, self.arm.held, self._reached.copy())

    @contextmanager
    def held_up(self, index: int):
        """While it lasts, an object is where it hangs when the arm holds it at home, put there without a grasp: for pictures and labels."""
        import mujoco

        pose = self.data.qpos[self._objects].reshape(-1, 7)[index]
        before = pose.copy()
        pose[:3] = (HOME[0], HOME[1], HOME[2] - HALF_HEIGHT[self.episode.scene.things[index].shape])
        mujoco.mj_kinematics(self.model, self.data)
        try:
            yield
        finally:
            pose[:] = before

    def _draw_episode(self, task=None, variation=None, scene=None, command=None, instruction=None, held_out_phrasing=None):
        """The same seed draws the same scene, command and sentence, whatever happened in earlier episodes."""
        rng = self.np_random
        task = task_named(task or self.task).name
        variation = variation or self.variation
        if scene is None or command is None:
            scene, command = _draw_command(rng, task, variation, scene, command)
        if instruction is None:
            held_out = self.held_out_phrasing if held_out_phrasing is None else held_out_phrasing
            instruction = say(command, rng, held_out, scene.unique_colours)
        return Episode(task, scene, command, instruction, variation)

    def _build(self, episode):
        import mujoco

        scene = episode.scene
        self.model = compiled(tuple(thing.shape for thing in scene.things))
        self.data = mujoco.MjData(self.model)
        self._objects = slice(self.model.nq - 7 * len(scene.things), self.model.nq)
        for i, tray in enumerate(scene.bins):
            self.data.mocap_pos[i] = (tray.x, tray.y, 0.0)
            self.data.mocap_quat[i] = (np.cos(tray.yaw / 2), 0, 0, np.sin(tray.yaw / 2))
        poses = self.data.qpos[self._objects].reshape(-1, 7)
        for row, thing in zip(poses, scene.things):
            on_belt = abs(thing.y - BELT_CENTRE_Y) < BELT_HALF_Y
            row[:] = (thing.x, thing.y, HALF_HEIGHT[thing.shape] + BELT_TOP * on_belt, np.cos(thing.yaw / 2), 0, 0, np.sin(thing.yaw / 2))
        belt = self.model.joint("belt")
        self.data.qvel[belt.dofadr[0]] = self.data.ctrl[7] = episode.variation.belt_speed
        self.arm = arms.Arm(self.model, self.data)
        self._paint = paint(self.model, scene)
        self._reached = np.zeros((0, 3))
        mujoco.mj_forward(self.model, self.data)
        self.start = self.state

    def _observe(self):
        rgb, depth = self.photograph(self.camera.shifted(self.episode.variation.camera_shift))
        return {
            "rgb": rgb,
            "depth": depth,
            "joints": self.arm.joints,
            "end_effector": self.arm.end_effector,
            "holding": int(self.arm.held is not None),
            "instruction": self.episode.instruction,
        }

    def _info(self, success):
        return {"success": bool(success), "task": self.episode.task, "decisions": len(self._reached), "blocked": self.arm.blocked}


def _draw_command(rng, task, variation, scene, command):
    """A scene and a command of the task about its first object where the task allows it; scenes that allow none are drawn again."""
    for _ in range(1000):
        drawn = scene or sample_scene(rng, variation)
        options = [command] if command else [c for c in commands(task, drawn) if not _is_done_already(c, drawn)]
        about_first = [c for c in options if c.object == drawn.things[0].name]
        pool = about_first or (options if task in ("spatial", "navigate", "assemble") or scene else [])
        if pool:
            return drawn, pool[rng.integers(len(pool))]
        if scene is not None:
            break
    raise ValueError(f"no scene of this variation allows the task {task!r}: it needs other objects or more of them")


def _is_done_already(command, scene):
    """Two objects can stand side by side from the start: such a command would reward a robot that does nothing."""
    positions = np.array([(thing.x, thing.y, HALF_HEIGHT[thing.shape]) for thing in scene.things])
    start = State(positions, np.array([thing.yaw for thing in scene.things]))
    return is_done(command, scene, start, start)
