"""The ROS 2 node: pictures, an instruction and joint states in, joint trajectories and diagnostics out. `python -m labkit.serving.ros_node`.

rclpy is imported where it is used; what messages mean is in ros_messages.py, what a policy is asked in core.py.
Which policy drives is one parameter: `--ros-args -p policy:=generic`, or the folder of a fine-tuned one.
"""

from __future__ import annotations

import importlib
import sys

from labkit.errors import UserError
from labkit.serving.ros_messages import (
    diagnostics_of,
    fitted,
    joints_of,
    path_of,
    picture_of,
    picture_of_compressed,
    request_of,
    sentence_of,
    trajectory_of,
)

DECISIONS = 6
# Seconds that a picture may be on its way: one that comes sooner after a motion could show the arm.
_CAMERA_LATENCY = 0.2


class RosTypes:
    """The message classes of the ROS that is installed."""

    def __call__(self, name: str) -> type:
        """Such as "std_msgs/msg/String"."""
        package, _, kind = name.split("/")
        return getattr(importlib.import_module(f"{package}.msg"), kind)

    @staticmethod
    def floats(values) -> list[float]:
        """What rclpy makes an array of."""
        return [float(value) for value in values]


class PolicyNode:
    """What the node does: it decides at the first picture after the arm is back, until the instruction has had its decisions.

    It is built around an rclpy node and imports nothing of ROS, so that whatever has the same four methods can stand for one.
    """

    def __init__(self, node, core, types, decisions: int = DECISIONS, sensor_qos=1):
        """node: with `create_subscription`, `create_publisher`, `create_timer`, `get_clock` and `get_logger`.   core: a `PolicyCore`.

        decisions: waypoints for one instruction.   sensor_qos: quality of service for pictures and joint states.
        Topics, to be remapped: image, image/compressed, joint_states, instruction; joint_trajectory, /diagnostics.
        """
        from labkit.tabletop.camera import OBSERVATION_SIZE

        self.node, self.core, self.types, self.decisions = node, core, types, decisions
        self.size = getattr(getattr(core.policy, "model", None), "image_size", OBSERVATION_SIZE)
        self.instruction, self.decided, self.previous = "", 0, None
        self.joints, self.holding, self.pictures, self.ready, self.troubles = None, 0, 0, 0.0, {}
        self.trajectories = node.create_publisher(types("trajectory_msgs/msg/JointTrajectory"), "joint_trajectory", 1)
        self.diagnostics = node.create_publisher(types("diagnostic_msgs/msg/DiagnosticArray"), "/diagnostics", 10)
        for kind, topic, callback, qos in (
            ("sensor_msgs/msg/Image", "image", self.on_picture, sensor_qos),
            ("sensor_msgs/msg/CompressedImage", "image/compressed", self.on_compressed, sensor_qos),
            ("sensor_msgs/msg/JointState", "joint_states", self.on_joints, sensor_qos),
            ("std_msgs/msg/String", "instruction", self.on_instruction, 1),
        ):
            node.create_subscription(types(kind), topic, self._reporting(topic, callback), qos)
        node.create_timer(1.0, self.report)

    def on_instruction(self, message) -> None:
        """A new task begins; an empty sentence ends the old one. A motion that has begun is carried out."""
        self.instruction, self.decided, self.previous = sentence_of(message), 0, None

    def on_joints(self, message) -> None:
        """Where the arm is and whether something hangs on it."""
        self.joints, self.holding = joints_of(message)

    def on_picture(self, message) -> None:
        """Decide, if it is time to."""
        self._decide(picture_of, message)

    def on_compressed(self, message) -> None:
        """Decide, if it is time to."""
        self._decide(picture_of_compressed, message)

    def report(self) -> None:
        """Publish the diagnostics."""
        level, sentence = self.condition()
        self.diagnostics.publish(diagnostics_of(self.core.monitor.look(), level, sentence, self.core.name, self._now(), self.types))

    def condition(self) -> tuple[str, str]:
        """How the node is: "OK", "WARN" or "ERROR", and a sentence."""
        if self.troubles:
            return "ERROR", "; ".join(self.troubles.values())
        missing = [name for name, absent in (("picture", not self.pictures), ("joint state", self.joints is None)) if absent]
        if missing:
            return "WARN", f"no {' and no '.join(missing)} has come yet"
        if not self.instruction:
            return "OK", "waiting for an instruction"
        if self.decided >= self.decisions:
            return "OK", f"{self.decided} decisions for '{self.instruction}' are made: waiting for another instruction"
        return "OK", f"{self.decided} decisions for '{self.instruction}' so far"

    def _decide(self, read, message):
        from labkit.serving.core import read_request

        self.pictures += 1
        now = self._now()
        if not self.instruction or self.joints is None or self.decided >= self.decisions or now < self.ready:
            return
        picture = fitted(read(message), self.size)
        request = read_request(request_of(picture, self.instruction, self.holding, self.previous))
        waypoint = self.core.decide(request).waypoints[0]
        path = path_of(waypoint, self.joints, self.holding)
        self.trajectories.publish(trajectory_of(path, self.types))
        # The policy was trained on pictures from which the arm is away: those on the way do not count.
        self.ready = self._now() + path[-1][1] + _CAMERA_LATENCY
        self.decided, self.previous = self.decided + 1, picture

    def _reporting(self, topic, callback):
        """A callback that goes on after a message it could make nothing of, and has the diagnostics say so until a better one comes."""
        from labkit.serving.core import Busy, PolicyFailed, RequestError

        def called(message):
            before = self.troubles.pop(topic, "")
            try:
                callback(message)
            except (UserError, RequestError, PolicyFailed, Busy) as error:
                self.troubles[topic] = str(error)
                if str(error) != before:
                    self.node.get_logger().error(str(error))

        return called

    def _now(self):
        return self.node.get_clock().now().nanoseconds / 1e9


def require_rclpy():
    """The module rclpy.   Raises UserError where this Python has none."""
    try:
        return importlib.import_module("rclpy")
    except ImportError as error:
        raise UserError("this Python has no rclpy, the library of ROS 2: install ROS 2 (docs.ros.org), run its setup.bash in this shell, and start "
                        "the node with the Python it was made for; `python -m labkit serve` needs no ROS") from error


def run(arguments=None) -> None:
    """Run the node until it is stopped.   arguments: as on the command line; default, those of this process.

    Parameters: policy ("generic", "tiny" or a folder), deadline (seconds a decision may take), decisions (for one instruction).
    Raises UserError, in one sentence, where there is no ROS, no such policy, or a parameter has another type; ValueError for a deadline that is
    not positive.
    """
    rclpy = require_rclpy()
    from rclpy.exceptions import ParameterException
    from rclpy.executors import ExternalShutdownException
    from rclpy.qos import qos_profile_sensor_data

    from labkit.serving.core import PolicyCore, policy_named
    from labkit.serving.monitor import Monitor

    rclpy.init(args=arguments)
    node = rclpy.create_node("labkit_policy")
    try:
        policy, deadline, decisions = (node.declare_parameter(name, default).value for name, default in (
            ("policy", "generic"), ("deadline", 0.1), ("decisions", DECISIONS)))
        with PolicyCore(policy_named(policy), max_batch=1, monitor=Monitor(deadline)) as core:
            PolicyNode(node, core, RosTypes(), decisions, qos_profile_sensor_data)
            rclpy.spin(node)
    except ParameterException as error:
        raise UserError(f"{error}: policy is text, deadline a number with its point (1.0, not 1), decisions a whole number") from error
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    finally:
        node.destroy_node()
        rclpy.try_shutdown()


if __name__ == "__main__":
    try:
        run()
    except (UserError, ValueError) as stopped:
        sys.exit(str(stopped))
