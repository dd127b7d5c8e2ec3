"""Properties of runs with a policy that takes its time: the plain rollout, the belt's own speed and the physics' step are the judges."""

import numpy as np
import pytest

from labkit.actions import action_to_bins, small_action
from labkit.policy import Decision
from labkit.rollouts import compare, rollout
from labkit.serving import delay as delays
from labkit.serving.delay import DelayedTabletop, let_pass, rollout_with_delay, success_against_delay
from labkit.tabletop import Tabletop, Variation
from labkit.tabletop.experts import next_waypoint
from labkit.watch import film

BELT = Variation(belt_speed=0.06)


class Stub:
    """A policy whose waypoint for each observation is what a function says."""

    def __init__(self, waypoint_for):
        self.waypoint_for = waypoint_for

    def decide(self, observations):
        waypoints = np.array([self.waypoint_for(o) for o in observations])
        return Decision(action_to_bins(small_action(waypoints)), small_action(waypoints), waypoints, np.ones((len(waypoints), 4)), 0.001)


def to_the_middle(observation):
    """Somewhere that depends on the picture, as a policy's waypoint does."""
    return np.array([float(observation["rgb"][..., 0].mean()) / 1000 - 0.1, 0.0, 0.04, 0, 0, 0, 1.0])


@pytest.fixture
def oracle(monkeypatch):
    """The expert, who sees where things are in the moment of the picture, and nothing of what comes later."""

    class Seen(DelayedTabletop):
        def _observe(self):
            command = self.episode.command
            return {**super()._observe(), "expert": lambda: next_waypoint(command, self.episode.scene, self.start, self.state)}

    monkeypatch.setattr(delays, "DelayedTabletop", Seen)
    return Stub(lambda o: o["expert"]())


def belt_place(env):
    return float(env.data.qpos[env.model.joint("belt").qposadr[0]])


@pytest.mark.parametrize("seconds", [0.0, 0.005, 0.05, 0.125, 0.5])
def test_the_belt_moves_by_its_speed_times_the_delay(seconds):
    env = Tabletop("pick", Variation(belt_speed=0.06, shapes=("block", "cup")))  # a ball would roll
    env.reset(seed=2)
    let_pass(env, 0.2)  # what lies on the belt comes up to its speed
    before, things, arm = belt_place(env), env.state.positions, env.arm.joints
    let_pass(env, seconds)
    moved = env.state.positions - things
    assert belt_place(env) - before == pytest.approx(0.06 * seconds, abs=1e-4)
    assert np.allclose(moved[:, 0], 0.06 * seconds, atol=1e-3) and np.allclose(moved[:, 1:], 0, atol=1e-3)
    assert np.allclose(env.arm.joints, arm, atol=1e-3)


@pytest.mark.parametrize("seconds, physics", [(0.0, 0), (0.002, 0), (0.004, 1), (0.049, 10), (0.137, 27), (0.5, 100)])
def test_time_goes_by_to_the_nearest_step_of_the_physics(seconds, physics):
    env = Tabletop("pick")
    env.reset(seed=1)
    begun = env.data.time
    let_pass(env, seconds)
    assert env.data.time - begun == pytest.approx(physics * env.model.opt.timestep)


def test_whole_control_steps_are_what_the_tables_own_wait_does():
    a, b = Tabletop("pick", BELT), Tabletop("pick", BELT)
    a.reset(seed=3)
    b.reset(seed=3)
    a.wait(0.25)
    let_pass(b, 0.25)
    assert np.array_equal(a.data.qpos, b.data.qpos) and np.array_equal(a.data.qvel, b.data.qvel)


def test_each_decision_comes_late_and_the_last_ones_delay_counts_too():
    plain, late = Tabletop("put"), DelayedTabletop("put", delay=0.1)
    for env in (plain, late):
        env.reset(seed=1)
        for _ in range(2):
            env.step(np.array([0.1, 0.0, 0.2, 0, 0, 0, 0]))
    assert late.data.time - plain.data.time == pytest.approx(0.2, abs=0.051)  # settling may end a control step sooner


@pytest.mark.parametrize("seconds", [-0.1, np.nan, np.inf])
def test_impossible_delays_are_refused(seconds):
    with pytest.raises(ValueError, match="0 or more"):
        DelayedTabletop("pick", delay=seconds)


def test_a_step_before_the_first_reset_is_refused_as_without_a_delay():
    with pytest.raises(RuntimeError, match="reset"):
        DelayedTabletop("pick", delay=0.1).step(np.zeros(7))


@pytest.mark.parametrize("variation", [Variation(), BELT], ids=["still", "belt"])
def test_without_delay_it_is_the_plain_rollout(variation):
    policy = Stub(to_the_middle)
    options = dict(episodes=5, seed=77, variation=variation, batch=3, progress=False)
    a, b = rollout(policy, "put", **options), rollout_with_delay(policy, "put", 0.0, **options)
    for name in ("success", "seeds", "decisions", "position_error"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name
    assert len(b.milliseconds) == 5


def test_a_world_that_stands_still_does_not_mind_a_delay(oracle):
    prompt, late = (rollout_with_delay(oracle, "pick", d, episodes=6, seed=5, progress=False) for d in (0.0, 0.5))
    assert prompt.rate == late.rate == 1.0


def test_on_a_belt_a_late_expert_misses_by_as_much_as_things_have_moved(oracle):
    """With the arm's own way at 0 delay things may be missed already; the longer the delay, the fewer are met."""
    slow = Variation(belt_speed=0.03)
    runs = success_against_delay(oracle, "pick", (0.0, 0.5, 1.5), episodes=10, seed=21, variation=slow, progress=False)
    assert list(runs) == [0.0, 0.5, 1.5]
    assert runs[0.0].rate >= runs[0.5].rate >= runs[1.5].rate and runs[0.0].rate - runs[1.5].rate >= 0.5
    assert compare(runs[0.0], runs[1.5]).only_b == 0


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="unknown task"):
        rollout_with_delay(Stub(to_the_middle), "juggle", 0.1, episodes=1, progress=False)


def test_a_film_shows_the_wait_and_ends_as_the_run_does():
    known = Stub(lambda o: np.array([0.0, 0.05, 0.06, 0, 0, 0, 1.0]))
    on_time, late = (film(known, "pick", seed=3, variation=BELT, delay=delay) for delay in (0.0, 0.5))
    assert len(late.frames) - len(on_time.frames) == 5 * len(late.said)  # ten pictures a second
    alone = rollout_with_delay(known, "pick", 0.5, episodes=1, seed=3, variation=BELT, progress=False)
    assert late.success == alone.success[0] and len(late.said) == alone.decisions[0]
