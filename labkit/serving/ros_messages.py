"""ROS 2 messages to what a policy is asked, and its answer to ROS 2 messages: pure functions, which need no ROS. The node is in ros_node.py.

A function that makes messages takes `types`: `types("std_msgs/msg/Header")` is that message's class, and `types.floats(values)` is what its
arrays of floating-point numbers are made of, since every ROS library for Python has its own idea of both.
"""

from __future__ import annotations

import io

import numpy as np

from labkit.errors import UserError
from labkit.tabletop.arm import CONTROL_SECONDS, DWELL, HIGH, LOW, PRESS, path_length, risen, tool_axis
from labkit.tabletop.scene import HOME

JOINTS = ("x", "y", "z", "roll", "pitch", "yaw")
VACUUM = "vacuum"
# Bytes a pixel, and where red, green and blue lie in it (sensor_msgs/image_encodings.hpp).
ENCODINGS = {"rgb8": (3, [0, 1, 2]), "bgr8": (3, [2, 1, 0]), "rgba8": (4, [0, 1, 2]), "bgra8": (4, [2, 1, 0])}
# ISO 10218-1 calls 250 mm/s the reduced speed of a robot that somebody stands beside.
SPEED = 0.25
_MOST_PIXELS = 50_000_000


def picture_of(message) -> np.ndarray:
    """sensor_msgs/Image  ->  (H, W, 3) uint8, red first; padding at the ends of rows (`step`) is left out.

    Raises UserError for an encoding that is not read, and for sizes that contradict each other.
    """
    if message.encoding not in ENCODINGS:
        raise UserError(f"the camera sends pictures as {message.encoding!r}; set its driver to one of {', '.join(ENCODINGS)}")
    channels, order = ENCODINGS[message.encoding]
    height, width, step = message.height, message.width, message.step
    data = np.frombuffer(message.data, np.uint8)
    if height < 1 or width < 1 or step < channels * width or len(data) < step * height:
        raise UserError(f"the camera's message says {width} x {height} pixels of {channels} bytes in rows of {step} bytes, and holds {len(data)} "
                        f"bytes: its driver contradicts itself")
    rows = data[: step * height].reshape(height, step)[:, : channels * width]
    return np.ascontiguousarray(rows.reshape(height, width, channels)[..., order])


def picture_of_compressed(message) -> np.ndarray:
    """sensor_msgs/CompressedImage, JPEG or PNG  ->  (H, W, 3) uint8, red first.   Raises UserError for anything else."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(bytes(message.data)), formats=("JPEG", "PNG")) as picture:
            if picture.width * picture.height > _MOST_PIXELS:
                raise UserError(f"the camera's compressed picture has {picture.width} x {picture.height} pixels: set its driver to a smaller one")
            return np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"the camera's compressed picture ({message.format!r}) is no whole JPEG or PNG: {reason}") from error


def fitted(picture, size: int) -> np.ndarray:
    """(H, W, 3) uint8  ->  (size, size, 3) uint8. A picture that is not square is squeezed, not cropped, as `WaypointPolicy.pixels` does."""
    from PIL import Image

    if picture.shape[:2] == (size, size):
        return picture
    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC))


def sentence_of(message) -> str:
    """std_msgs/String  ->  the instruction, without spaces at its ends; an empty one means: stop."""
    return message.data.strip()


def joints_of(message) -> tuple[np.ndarray, int]:
    """sensor_msgs/JointState, its joints in any order  ->  (6,) x, y, z in metres, roll, pitch, yaw in radians; and the vacuum sensor, 0 or 1.

    The sensor is a joint called `vacuum`, above one half when something hangs on the pad; a robot without one always says 0.
    Raises UserError for a joint that is missing or says no finite number.
    """
    if len(message.name) != len(message.position):
        raise UserError(f"the joint states name {len(message.name)} joints and give {len(message.position)} positions: one a joint is needed")
    found = dict(zip(message.name, map(float, message.position)))
    bad = [name for name in JOINTS if not np.isfinite(found.get(name, np.nan))]
    if bad:
        raise UserError(f"the joint states give no finite position for {', '.join(bad)}; the joints are {', '.join(JOINTS)} and {VACUUM}")
    return np.array([found[name] for name in JOINTS]), int(found.get(VACUUM, 0.0) > 0.5)


def request_of(picture, instruction: str, holding: int, previous=None) -> dict:
    """What `core.read_request` reads.   previous: the picture before the last decision for this instruction, or None."""
    fields = {"image": picture, "instruction": instruction, "holding": holding}
    return fields if previous is None else {**fields, "previous_image": previous}


def path_of(waypoint, joints, holding: int, speed: float = SPEED) -> list[tuple[np.ndarray, float]]:
    """The motion that a waypoint asks for, as `Arm.execute` moves: above it, down along the tool, vacuum, up, home.

    waypoint: (7,).   joints: (6,) where the arm is.   holding: whether the vacuum is on.   speed: m/s.
    Returns (position (7,), the six joints and the vacuum; seconds since the start, which grow from point to point).
    Raises ValueError for a waypoint that is not 7 finite numbers.
    """
    waypoint = np.asarray(waypoint, np.float64)
    if waypoint.shape != (7,) or not np.isfinite(waypoint).all():
        raise ValueError(f"a waypoint is 7 finite numbers (x y z roll pitch yaw grip), got {waypoint!r}")
    target = np.clip(waypoint, LOW, HIGH)
    pose, grip, before = target[:6], float(target[6] > 0.5), float(holding)
    above, switched = risen(pose), pose.copy()
    # A suction cup seals only when it is pushed on.
    switched[:3] -= tool_axis(pose) * PRESS * grip
    stops = [(above, before), (pose, before), (switched, grip), (above, grip), (np.array([*HOME, 0.0, 0.0, 0.0]), grip)]
    path, now, seconds = [], np.asarray(joints, np.float64), 0.0
    for stop, vacuum in stops:
        seconds += max(path_length(now, stop) / speed, CONTROL_SECONDS) + DWELL * CONTROL_SECONDS
        path.append((np.append(stop, vacuum), seconds))
        now = stop
    return path


def trajectory_of(path, types, frame: str = "base"):
    """`path_of`'s points  ->  trajectory_msgs/JointTrajectory with seven joints, `vacuum` the last.

    The velocity is zero at each point, so that a joint_trajectory_controller moves along a cubic between two of them, slow at both ends. The
    stamp is zero: start at once.
    """
    point, duration = types("trajectory_msgs/msg/JointTrajectoryPoint"), types("builtin_interfaces/msg/Duration")
    empty, still = types.floats([]), np.zeros(len(JOINTS) + 1)
    points = []
    for position, seconds in path:
        sec, nanosec = _seconds(seconds)
        points.append(point(positions=types.floats(position), velocities=types.floats(still), accelerations=empty, effort=empty,
                            time_from_start=duration(sec=sec, nanosec=nanosec)))
    return types("trajectory_msgs/msg/JointTrajectory")(header=header_of(0.0, types, frame), joint_names=[*JOINTS, VACUUM], points=points)


def diagnostics_of(snapshot, level: str, sentence: str, name: str, stamp: float, types):
    """What the monitor sees and how the node is  ->  diagnostic_msgs/DiagnosticArray with one status.

    snapshot: `monitor.Snapshot`.   level: "OK", "WARN" or "ERROR".   sentence: for people.   name: of the policy.   stamp: seconds.
    """
    kind, pair = types("diagnostic_msgs/msg/DiagnosticStatus"), types("diagnostic_msgs/msg/KeyValue")
    values = {"policy": name, "decisions": snapshot.decisions, "deadline misses": snapshot.misses, "deadline (s)": f"{snapshot.deadline:g}",
              "median (s)": f"{snapshot.p50:.4f}", "95th percentile (s)": f"{snapshot.p95:.4f}", "drift alarms": len(snapshot.alarms)}
    status = kind(level=getattr(kind, level), name="labkit: policy", message=sentence, hardware_id="labkit",
                  values=[pair(key=key, value=str(value)) for key, value in values.items()])
    return types("diagnostic_msgs/msg/DiagnosticArray")(header=header_of(stamp, types), status=[status])


def header_of(stamp: float, types, frame: str = ""):
    """std_msgs/Header.   stamp: seconds since the clock's beginning."""
    sec, nanosec = _seconds(stamp)
    return types("std_msgs/msg/Header")(stamp=types("builtin_interfaces/msg/Time")(sec=sec, nanosec=nanosec), frame_id=frame)


def _seconds(value):
    """Seconds  ->  whole seconds and nanoseconds."""
    return divmod(round(value * 1e9), 1_000_000_000)
