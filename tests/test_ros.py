"""Properties of the ROS 2 node and its messages: real CDR messages and bags by rosbags, the simulated arm, and ROS itself where there is one."""

import array
import io
import os
import signal
import subprocess
import sys
import time
import types as python_types

import numpy as np
import pytest
from PIL import Image

from labkit.actions import action_to_bins, small_action
from labkit.errors import UserError
from labkit.policy import Decision
from labkit.serving import ros_node
from labkit.serving.core import PolicyCore
from labkit.serving.monitor import Monitor
from labkit.serving.ros_messages import (
    ENCODINGS,
    JOINTS,
    diagnostics_of,
    fitted,
    header_of,
    joints_of,
    path_of,
    picture_of,
    picture_of_compressed,
    request_of,
    sentence_of,
    trajectory_of,
)
from labkit.serving.ros_node import PolicyNode, RosTypes, require_rclpy
from labkit.tabletop import Tabletop
from labkit.tabletop.arm import CONTROL_SECONDS, STEPS_PER_CONTROL
from labkit.tabletop.experts import next_waypoint
from labkit.tabletop.scene import HOME
from labkit.tabletop.tasks import is_done
from labkit.task_specific_vla import policy_from_clip

rosbag2 = pytest.importorskip("rosbags.rosbag2", reason="rosbags, a dependency of the tests, is not installed")
typesys = pytest.importorskip("rosbags.typesys")

IMAGE, COMPRESSED, STATES, STRING = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage", "sensor_msgs/msg/JointState", "std_msgs/msg/String")
TRAJECTORY, DIAGNOSTICS = "trajectory_msgs/msg/JointTrajectory", "diagnostic_msgs/msg/DiagnosticArray"
AT_HOME = np.array([*HOME, 0.0, 0.0, 0.0])


class BagTypes:
    """rosbags' message classes for one distribution of ROS 2, and its CDR."""

    def __init__(self, store):
        self.store = store

    def __call__(self, name):
        return self.store.types[name]

    @staticmethod
    def floats(values):
        return np.array(values, np.float64)

    def over_the_wire(self, message):
        """What arrives of a message."""
        name = message.__msgtype__
        return self.store.deserialize_cdr(self.store.serialize_cdr(message, name), name)


@pytest.fixture(scope="module", params=["ROS2_HUMBLE", "ROS2_JAZZY"])
def types(request):
    return BagTypes(typesys.get_typestore(typesys.Stores[request.param]))


def image_message(types, picture, encoding="rgb8", padding=0):
    channels, order = ENCODINGS[encoding]
    height, width = picture.shape[:2]
    rows = np.random.default_rng(1).integers(0, 256, (height, channels * width + padding), np.uint8)
    pixels = rows[:, : channels * width].reshape(height, width, channels)
    for colour, place in enumerate(order):
        pixels[..., place] = picture[..., colour]
    return types(IMAGE)(header=header_of(3.5, types, "camera"), height=height, width=width, encoding=encoding, is_bigendian=0,
                        step=rows.shape[1], data=rows.ravel())


def compressed_message(types, picture, kind):
    data = io.BytesIO()
    Image.fromarray(picture).save(data, kind)
    return types(COMPRESSED)(header=header_of(0.0, types), format=kind.lower(), data=np.frombuffer(data.getvalue(), np.uint8))


def states_message(types, values, names=(*JOINTS, "vacuum")):
    empty = types.floats([])
    return types(STATES)(header=header_of(0.0, types), name=list(names), position=types.floats(values), velocity=empty, effort=empty)


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)


@pytest.mark.parametrize("padding", [0, 1, 13])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_picture_arrives_in_every_encoding_and_without_its_padding(types, picture, encoding, padding):
    found = picture_of(types.over_the_wire(image_message(types, picture, encoding, padding)))
    assert found.dtype == np.uint8 and np.array_equal(found, picture)


@pytest.mark.parametrize("kind", [bytes, lambda data: array.array("B", bytes(data))], ids=["bytes", "array, as in rclpy"])
def test_the_library_that_holds_the_bytes_makes_no_difference(types, picture, kind):
    message = image_message(types, picture, "bgr8", 3)
    message.data = kind(message.data)
    assert np.array_equal(picture_of(message), picture)


@pytest.mark.parametrize("change, words", [
    ({"encoding": "mono16"}, "'mono16'.*rgb8"), ({"step": 20}, "rows of 20 bytes"), ({"height": 6}, "contradicts"), ({"width": 0}, "0 x 5"),
    ({"data": np.zeros(0, np.uint8)}, "holds 0 bytes"),
])
def test_a_picture_that_contradicts_itself_is_refused_in_one_sentence(types, picture, change, words):
    message = image_message(types, picture)
    for name, value in change.items():
        setattr(message, name, value)
    with pytest.raises(UserError, match=words):
        picture_of(types.over_the_wire(message))


def test_compressed_pictures_arrive(types):
    smooth = np.stack(np.broadcast_arrays(np.arange(64)[:, None], np.arange(48)[None], 90), -1).astype(np.uint8)
    assert np.array_equal(picture_of_compressed(types.over_the_wire(compressed_message(types, smooth, "PNG"))), smooth)
    lossy = picture_of_compressed(types.over_the_wire(compressed_message(types, smooth, "JPEG"))).astype(int)
    assert lossy.shape == smooth.shape and np.abs(lossy - smooth).mean() < 3


@pytest.mark.parametrize("spoil", [lambda data: data[: len(data) // 2], lambda data: data[:0], lambda data: data[::-1]])
def test_a_compressed_picture_that_is_none_is_refused(types, spoil):
    message = compressed_message(types, np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8), "PNG")
    message.data = spoil(message.data)
    with pytest.raises(UserError, match="no whole JPEG or PNG"):
        picture_of_compressed(types.over_the_wire(message))


def test_only_the_two_formats_of_cameras_are_opened(types):
    with pytest.raises(UserError, match="JPEG or PNG"):
        picture_of_compressed(compressed_message(types, np.zeros((4, 4, 3), np.uint8), "GIF"))


def test_a_picture_is_squeezed_to_the_policys_size_and_one_that_fits_is_left_alone():
    fits = np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8)
    assert fitted(fits, 48) is fits
    halves = np.zeros((60, 80, 3), np.uint8)
    halves[:, 40:] = 200
    small = fitted(halves, 48)
    assert small.shape == (48, 48, 3) and (small[:, :22] == 0).all() and (small[:, 26:] == 200).all()


def test_joints_are_found_by_name_in_any_order(types):
    values, names = np.linspace(-0.2, 0.3, 6), list(JOINTS)
    order = np.random.default_rng(2).permutation(6)
    message = states_message(types, [*values[order], 1.0, 9.0], [*(names[i] for i in order), "vacuum", "camera_tilt"])
    joints, holding = joints_of(types.over_the_wire(message))
    assert np.array_equal(joints, values) and holding == 1
    assert joints_of(states_message(types, values, JOINTS))[1] == 0


@pytest.mark.parametrize("values, names, words", [
    ([0.0] * 5, JOINTS[:5], "yaw"), ([0.0] * 5 + [np.nan], JOINTS, "yaw"), ([0.0] * 5, JOINTS, "6 joints and give 5"), ([], (), "x, y, z"),
])
def test_joints_that_are_missing_are_named(types, values, names, words):
    with pytest.raises(UserError, match=words):
        joints_of(types.over_the_wire(states_message(types, values, names)))


def test_an_instruction_loses_its_outer_spaces_only(types):
    assert sentence_of(types.over_the_wire(types(STRING)(data="  Pick up the red block.\n"))) == "Pick up the red block."


def test_a_request_is_what_the_core_reads(picture):
    from labkit.serving.core import read_request

    (first,) = read_request(request_of(picture, "pick up the red block", 1))
    assert np.array_equal(first["rgb"], picture) and first["holding"] == 1 and "previous_rgb" not in first
    (later,) = read_request(request_of(picture, "pick up the red block", 0, picture[::-1].copy()))
    assert np.array_equal(later["previous_rgb"], picture[::-1])


def test_a_trajectory_arrives_as_the_path_it_was_made_of(types):
    path = path_of([0.1, -0.05, 0.03, 0, 0, 0.4, 1], AT_HOME, 0)
    message = types.over_the_wire(trajectory_of(path, types))
    assert message.joint_names == [*JOINTS, "vacuum"] and (message.header.stamp.sec, message.header.stamp.nanosec) == (0, 0)
    for point, (position, seconds) in zip(message.points, path, strict=True):
        assert np.array_equal(point.positions, position) and not point.velocities.any()
        assert point.time_from_start.sec + point.time_from_start.nanosec / 1e9 == pytest.approx(seconds, abs=1e-9)
    assert np.array_equal(message.points[-1].positions, [*AT_HOME, 1])


def test_no_leg_is_faster_than_asked_and_time_never_stands_still():
    rng = np.random.default_rng(4)
    for _ in range(20):
        waypoint = rng.uniform([-0.25, -0.25, 0, -0.5, -0.5, -3, 0], [0.25, 0.35, 0.3, 0.5, 0.5, 3, 1])
        start = rng.uniform(-0.2, 0.3, 6)
        positions, times = map(np.array, zip(*path_of(waypoint, start, 0, speed=0.2)))
        legs = np.diff(np.vstack([[*start, 0], positions]), axis=0)
        gone = np.diff(times, prepend=0.0)
        assert (gone > 0).all() and (np.linalg.norm(legs[:, :3], axis=1) <= 0.2 * gone).all()


@pytest.mark.parametrize("waypoint", [[0.0] * 6, [0.0] * 6 + [np.nan], np.zeros((1, 7))])
def test_no_path_leads_to_what_is_no_waypoint(waypoint):
    with pytest.raises(ValueError, match="7 finite numbers"):
        path_of(waypoint, AT_HOME, 0)


def follow(env, message):
    """Moves the simulated arm as a joint_trajectory_controller does: along cubics that stand still at every point. Returns the tip at each."""
    import mujoco

    position, then, tips = np.append(env.arm.joints, float(env.data.ctrl[6])), 0.0, []
    for point in message.points:
        at = point.time_from_start.sec + point.time_from_start.nanosec / 1e9
        steps = max(1, round((at - then) / CONTROL_SECONDS))
        for step in range(1, steps + 1):
            share = step / steps
            wanted = position + (point.positions - position) * share * share * (3 - 2 * share)
            env.data.ctrl[:6], env.data.ctrl[6] = wanted[:6], wanted[6] > 0.5
            mujoco.mj_step(env.model, env.data, STEPS_PER_CONTROL)
        position, then = point.positions, at
        tips.append(env.arm.end_effector)
    return tips


@pytest.mark.parametrize("task", ["pick", "put"])
def test_the_trajectory_does_what_the_waypoint_does(task, types):
    """The same experts' waypoints, once by the environment's own controller, once as trajectories that came over the wire."""
    for seed in range(4):
        env, ros = Tabletop(task), Tabletop(task)
        env.reset(seed=seed)
        ros.reset(seed=seed)
        command, scene, over = env.episode.command, env.episode.scene, False
        while not over:
            waypoint = next_waypoint(command, scene, env.start, env.state)
            _, _, terminated, truncated, info = env.step(waypoint)
            follow(ros, types.over_the_wire(trajectory_of(path_of(waypoint, ros.arm.joints, ros.arm.held is not None), types)))
            over = terminated or truncated
        assert info["success"] and is_done(command, scene, ros.start, ros.state)


def test_a_tilted_tool_comes_down_where_the_arms_controller_comes_down(types):
    waypoint = np.array([0.08, 0.02, 0.10, 0.3, -0.2, 0.5, 0.0])
    env, ros = Tabletop("pick"), Tabletop("pick")
    env.reset(seed=0)
    ros.reset(seed=0)
    reached = env.arm.execute(waypoint)
    message = trajectory_of(path_of(waypoint, ros.arm.joints, 0), types)
    message.points = message.points[:2]
    above, at = follow(ros, message)
    assert np.allclose(at, reached, atol=0.006)
    # Down along the tool: by the frame in which the physics has the wrist.
    along = ros.data.body("wrist").xmat.reshape(3, 3)[:, 2]
    assert (above - at)[:3] / np.linalg.norm((above - at)[:3]) @ along > np.cos(np.radians(2)) and above[2] == pytest.approx(0.22, abs=0.006)


@pytest.mark.parametrize("level, number", [("OK", 0), ("WARN", 1), ("ERROR", 2)])
def test_diagnostics_arrive(types, level, number):
    monitor = Monitor(deadline=0.05)
    for seconds in (0.01, 0.02, 0.09):
        monitor.record(seconds, np.zeros(7))
    message = types.over_the_wire(diagnostics_of(monitor.look(), level, "all is well", "generic", 12.25, types))
    (status,) = message.status
    values = {pair.key: pair.value for pair in status.values}
    assert (status.level, status.message, message.header.stamp.sec, message.header.stamp.nanosec) == (number, "all is well", 12, 250_000_000)
    assert (values["policy"], values["decisions"], values["deadline misses"], values["median (s)"]) == ("generic", "3", "1", "0.0200")


def test_seconds_that_round_up_carry_into_the_next_second(types):
    stamp = header_of(1.9999999999, types).stamp
    assert (stamp.sec, stamp.nanosec) == (2, 0)


class Clock:
    """A clock that a test sets; it is also the node whose clock it is."""

    def __init__(self):
        self.seconds, self.callbacks, self.published, self.timers, self.errors = 100.0, {}, {}, [], []

    def get_clock(self):
        return self

    def get_logger(self):
        return self

    def now(self):
        return python_types.SimpleNamespace(nanoseconds=int(self.seconds * 1e9))

    def error(self, text):
        self.errors.append(text)

    def create_subscription(self, kind, topic, callback, qos):
        self.callbacks[topic] = callback

    def create_publisher(self, kind, topic, depth):
        self.published[topic] = []
        return python_types.SimpleNamespace(publish=self.published[topic].append)

    def create_timer(self, period, callback):
        self.timers.append(callback)


class Stub:
    """A policy that says a waypoint and remembers what it was asked."""

    name = "stub"

    def __init__(self, waypoint_for):
        self.waypoint_for, self.asked = waypoint_for, []

    def decide(self, observations, instructions=None):
        self.asked += observations
        waypoints = np.array([self.waypoint_for(o) for o in observations])
        return Decision(action_to_bins(small_action(waypoints)), small_action(waypoints), waypoints, np.ones((len(waypoints), 4)), 0.001)


@pytest.fixture
def started(types):
    """Starts nodes around policies; gives the rclpy node's stand-in, and the policy node."""
    cores = []

    def start(policy, **options):
        core = PolicyCore(policy, max_batch=1, wait=0.0)
        cores.append(core)
        stand_in = Clock()
        return stand_in, PolicyNode(stand_in, core, types, **options)

    yield start
    for core in cores:
        core.close()


def still(observation):
    return np.array([0.0, 0.1, 0.2, 0, 0, 0, 0])


def say(types, node, topic, message):
    node.callbacks[topic](types.over_the_wire(message))


def ready_to_decide(types, node, instruction="pick up the red block"):
    say(types, node, "joint_states", states_message(types, [*AT_HOME, 0.0]))
    say(types, node, "instruction", types(STRING)(data=instruction))


def last_status(types, node):
    node.timers[0]()
    return types.over_the_wire(node.published["/diagnostics"][-1]).status[0]


def test_nothing_moves_before_all_three_have_come(types, started, picture):
    node, _ = started(Stub(still))
    assert "no picture and no joint state has come yet" in last_status(types, node).message
    steps = [("image", image_message(types, picture)), ("joint_states", states_message(types, [*AT_HOME, 0.0])),
             ("image", image_message(types, picture)), ("instruction", types(STRING)(data="pick up the red block"))]
    for topic, message in steps:
        say(types, node, topic, message)
        assert not node.published["joint_trajectory"]
    say(types, node, "image", image_message(types, picture))
    assert len(node.published["joint_trajectory"]) == 1 and last_status(types, node).level == 0


def test_pictures_on_the_way_do_not_count(types, started, picture):
    node, _ = started(Stub(still))
    ready_to_decide(types, node)
    say(types, node, "image", image_message(types, picture))
    (trajectory,) = node.published["joint_trajectory"]
    end = trajectory.points[-1].time_from_start
    node.seconds += end.sec + end.nanosec / 1e9 - 0.01
    say(types, node, "image", image_message(types, picture))
    assert len(node.published["joint_trajectory"]) == 1
    node.seconds += 1.0
    say(types, node, "image", image_message(types, picture))
    assert len(node.published["joint_trajectory"]) == 2


def test_an_instruction_has_its_decisions_and_the_next_begins_without_a_past(types, started):
    policy = Stub(still)
    node, _ = started(policy, decisions=2)
    ready_to_decide(types, node)
    pictures = [np.full((48, 48, 3), 10 * i, np.uint8) for i in range(5)]
    for shown in pictures[:4]:
        say(types, node, "image", image_message(types, shown))
        node.seconds += 60
    assert len(policy.asked) == 2 and "waiting for another" in last_status(types, node).message
    assert "previous_rgb" not in policy.asked[0] and np.array_equal(policy.asked[1]["previous_rgb"], pictures[0])
    say(types, node, "instruction", types(STRING)(data="pick up the blue cup"))
    say(types, node, "image/compressed", compressed_message(types, pictures[4], "PNG"))
    assert len(policy.asked) == 3 and "previous_rgb" not in policy.asked[2]
    assert policy.asked[2]["instruction"] == "pick up the blue cup" and np.array_equal(policy.asked[2]["rgb"], pictures[4])


def test_an_empty_instruction_stops(types, started, picture):
    node, _ = started(Stub(still))
    ready_to_decide(types, node)
    say(types, node, "instruction", types(STRING)(data=" "))
    say(types, node, "image", image_message(types, picture))
    assert not node.published["joint_trajectory"] and "waiting for an instruction" in last_status(types, node).message


def test_a_bad_message_is_an_error_in_the_diagnostics_until_a_better_one_comes(types, started, picture):
    node, _ = started(Stub(still))
    ready_to_decide(types, node)
    bad = image_message(types, picture)
    bad.encoding = "bayer_rggb8"
    for _ in range(3):
        say(types, node, "image", bad)
    status = last_status(types, node)
    assert status.level == 2 and "bayer_rggb8" in status.message and len(node.errors) == 1
    say(types, node, "image", image_message(types, picture))
    assert last_status(types, node).level == 0 and len(node.published["joint_trajectory"]) == 1


def test_a_policy_that_fails_moves_nothing_and_says_so(types, started, picture):
    node, _ = started(Stub(lambda o: np.full(7, np.nan) if o["holding"] else still(o)))
    ready_to_decide(types, node)
    say(types, node, "joint_states", states_message(types, [*AT_HOME, 1.0]))
    say(types, node, "image", image_message(types, picture))
    assert not node.published["joint_trajectory"] and last_status(types, node).level == 2


def test_the_node_drives_the_simulated_robot_to_success(types, started):
    env = Tabletop("put")
    observation, _ = env.reset(seed=3)
    node, _ = started(Stub(lambda o: next_waypoint(env.episode.command, env.episode.scene, env.start, env.state)), decisions=2)
    say(types, node, "instruction", types(STRING)(data=env.episode.instruction))
    for _ in range(2):
        say(types, node, "joint_states", states_message(types, [*env.arm.joints, float(env.arm.held is not None)]))
        say(types, node, "image", image_message(types, env.photograph(env.camera)[0], "bgr8", 16))
        follow(env, types.over_the_wire(node.published["joint_trajectory"][-1]))
        node.seconds += 60
    assert is_done(env.episode.command, env.episode.scene, env.start, env.state)


@pytest.mark.parametrize("plugin", ["SQLITE3", "MCAP"])
def test_a_bag_of_a_robots_day_can_be_played_to_the_node_and_its_answers_recorded(types, started, tmp_path, plugin):
    shown = np.random.default_rng(3).integers(0, 256, (48, 48, 3), np.uint8)
    day = [("joint_states", states_message(types, [*AT_HOME, 0.0])), ("instruction", types(STRING)(data="pick up the red block")),
           ("image", image_message(types, shown, "rgba8", 8))]
    write_bag(types, tmp_path / "day", day, plugin)
    policy = Stub(still)
    node, _ = started(policy)
    for topic, message in read_bag(types, tmp_path / "day"):
        node.callbacks[topic](message)
    assert np.array_equal(policy.asked[0]["rgb"], shown)
    node.timers[0]()
    answers = [(topic, message) for topic, messages in node.published.items() for message in messages]
    write_bag(types, tmp_path / "answers", answers, plugin)
    found = dict(read_bag(types, tmp_path / "answers"))
    assert np.allclose(found["joint_trajectory"].points[1].positions, [*still(None)[:6], 0]) and found["/diagnostics"].status[0].level == 0


def write_bag(types, folder, messages, plugin):
    with rosbag2.Writer(folder, version=9, storage_plugin=rosbag2.StoragePlugin[plugin]) as writer:
        connections = {}
        for moment, (topic, message) in enumerate(messages):
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, message.__msgtype__, typestore=types.store)
            writer.write(connections[topic], moment, types.store.serialize_cdr(message, message.__msgtype__))


def read_bag(types, folder):
    with rosbag2.Reader(folder) as reader:
        return [(connection.topic, types.store.deserialize_cdr(raw, connection.msgtype)) for connection, _, raw in reader.messages()]


def test_without_ros_the_node_says_what_is_missing_in_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "rclpy", None)
    with pytest.raises(UserError, match="no rclpy.*install ROS 2"):
        require_rclpy()
    finished = subprocess.run([sys.executable, "-c", "import sys; sys.modules['rclpy'] = None; from labkit.serving import ros_node; ros_node.run()"],
                              capture_output=True, text=True, cwd=os.getcwd())
    assert finished.returncode != 0 and "UserError: this Python has no rclpy" in finished.stderr


@pytest.fixture(scope="module")
def two_policies(clip_folder, tmp_path_factory):
    """A generic policy and one that was made for a task, in folders: random weights."""
    folder = tmp_path_factory.mktemp("ros")
    for seed, name in enumerate(("generic", "mine")):
        policy_from_clip(clip_folder, seed=seed).save(folder / name)
    return folder


class WrongType(Exception):
    """rclpy's ParameterException."""


def test_from_the_generic_to_the_task_specific_policy_is_one_parameter(types, two_policies, monkeypatch, observations):
    """`run` against a stand-in for rclpy: everything but the middleware itself."""
    from labkit import task_specific_vla

    monkeypatch.setattr(task_specific_vla, "GENERIC", two_policies / "generic")
    for package in ("std_msgs", "sensor_msgs", "trajectory_msgs", "diagnostic_msgs", "builtin_interfaces"):
        kinds = {name.split("/")[2]: kind for name, kind in types.store.types.items() if name.startswith(f"{package}/")}
        monkeypatch.setitem(sys.modules, f"{package}.msg", python_types.SimpleNamespace(**kinds))
    shown, said, nodes, parameters = observations[0]["rgb"], observations[0]["instruction"], [], {}

    class Node(Clock):
        def declare_parameter(self, name, default):
            # As rclpy does: what is given must have the default's type.
            if type(parameters.get(name, default)) is not type(default):
                raise WrongType(f"Trying to set parameter '{name}'")
            return python_types.SimpleNamespace(value=parameters.get(name, default))

        def destroy_node(self):
            self.destroyed = True

    def spin(node):
        ready_to_decide(types, node, said)
        say(types, node, "image", image_message(types, shown))
        raise KeyboardInterrupt

    def create_node(name):
        nodes.append(Node())
        return nodes[-1]

    closed = []
    rclpy = python_types.SimpleNamespace(init=lambda args: None, create_node=create_node, spin=spin, try_shutdown=lambda: closed.append(True))
    monkeypatch.setitem(sys.modules, "rclpy", rclpy)
    monkeypatch.setitem(sys.modules, "rclpy.exceptions", python_types.SimpleNamespace(ParameterException=WrongType))
    monkeypatch.setitem(sys.modules, "rclpy.executors", python_types.SimpleNamespace(ExternalShutdownException=RuntimeError))
    monkeypatch.setitem(sys.modules, "rclpy.qos", python_types.SimpleNamespace(qos_profile_sensor_data=5))
    places = []
    for chosen in ({}, {"policy": str(two_policies / "mine")}):
        parameters.update(chosen)
        ros_node.run([])
        (trajectory,) = nodes[-1].published["joint_trajectory"]
        places.append(np.array(trajectory.points[1].positions))
        assert nodes[-1].destroyed and closed
    for name, place in zip(("generic", "mine"), places):
        waypoint = task_specific_vla.load_waypoint_policy(two_policies / name).act({"rgb": shown, "instruction": said, "holding": 0})
        assert np.allclose(place[:6], path_of(waypoint, AT_HOME, 0)[1][0][:6], atol=1e-6)
    assert not np.allclose(places[0][:3], places[1][:3], atol=1e-3)
    parameters["deadline"] = 1
    with pytest.raises(UserError, match="'deadline'.*1.0, not 1"):
        ros_node.run([])
    assert nodes[-1].destroyed


@pytest.mark.slow
def test_end_to_end_in_ros(two_policies):
    """The node in a process of its own, with the real middleware between it and this test."""
    rclpy = pytest.importorskip("rclpy", reason="ROS 2 is not installed: this Python has no rclpy")
    env = {**os.environ, "ROS_DOMAIN_ID": "77", "ROS_LOCALHOST_ONLY": "1"}
    os.environ.update(ROS_DOMAIN_ID="77", ROS_LOCALHOST_ONLY="1")
    child = subprocess.Popen([sys.executable, "-m", "labkit.serving.ros_node", "--ros-args", "-p", f"policy:={two_policies / 'mine'}"], env=env)
    types, heard = RosTypes(), {"joint_trajectory": [], "/diagnostics": []}
    rclpy.init()
    node = rclpy.create_node("labkit_test")
    try:
        for kind, topic in ((TRAJECTORY, "joint_trajectory"), (DIAGNOSTICS, "/diagnostics")):
            node.create_subscription(types(kind), topic, heard[topic].append, 10)
        senders = {topic: node.create_publisher(types(kind), topic, 1) for kind, topic in (
            (IMAGE, "image"), (STATES, "joint_states"), (STRING, "instruction"))}
        image = types(IMAGE)(header=header_of(0.0, types), height=48, width=48, encoding="rgb8", is_bigendian=0, step=144, data=bytes(48 * 144))
        until = time.monotonic() + 120
        while not all(heard.values()) and time.monotonic() < until and child.poll() is None:
            if senders["instruction"].get_subscription_count() and not heard["joint_trajectory"]:
                senders["joint_states"].publish(states_message(types, [*AT_HOME, 0.0]))
                senders["instruction"].publish(types(STRING)(data="pick up the red block"))
                senders["image"].publish(image)
            rclpy.spin_once(node, timeout_sec=0.2)
        assert heard["joint_trajectory"] and list(heard["joint_trajectory"][0].joint_names) == [*JOINTS, "vacuum"]
        assert heard["/diagnostics"]
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=30) == 0
    finally:
        child.kill()
        node.destroy_node()
        rclpy.try_shutdown()
