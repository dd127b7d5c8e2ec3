"""Properties of the policy core: who shares a forward, and that nothing a policy does leaves anybody without an answer."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from labkit.errors import UserError
from labkit.policy import Decision
from labkit.serving.core import GENERIC, Busy, PolicyCore, PolicyFailed, RequestError, policy_named
from labkit.serving.http import Limits
from labkit.serving.monitor import Monitor
from labkit.task_specific_vla import load_waypoint_policy
from tests.serving_stand_ins import PATIENCE, expected, held_up, observation, picture, wait_until

pytest_plugins = ["tests.serving_fixtures"]


def test_what_waits_shares_one_forward_up_to_the_limit_and_only_with_pictures_of_its_size(stub):
    with PolicyCore(stub, max_batch=4) as core:
        with held_up(stub, lambda: core.submit([observation()])) as first:
            small = [core.submit([observation(i)]) for i in range(5)]
            large = [core.submit([observation(i, size=16)]) for i in range(2)]
            many = core.submit([observation(i) for i in range(6)])
        answers = [f.result(PATIENCE).waypoints for f in (first, *small, *large, many)]
    assert stub.sizes == [1, 4, 1, 2, 6]
    assert [len(a) for a in answers] == [1] * 8 + [6]


def test_a_client_that_is_alone_waits_for_nobody(stub):
    with PolicyCore(stub, wait=1000 * PATIENCE) as core:
        for i in range(5):
            assert len(core.submit([observation(i), observation(i)]).result(PATIENCE).waypoints) == 2


def test_a_forward_waits_for_as_many_as_lately_came_together(stub):
    with PolicyCore(stub, wait=1000 * PATIENCE) as core:
        with held_up(stub, lambda: core.submit([observation()])) as first:
            together = [core.submit([observation(i)]) for i in range(3)]
        [future.result(PATIENCE) for future in (first, *together)]
        early = [core.submit([observation(i)]) for i in range(2)]
        assert not any(future.done() for future in early) and len(stub.sizes) == 2
        [future.result(PATIENCE) for future in (*early, core.submit([observation(2)]))]
        assert stub.sizes == [1, 3, 3]


def test_answers_of_a_shared_forward_are_close_and_without_sharing_they_are_exact(waypoint_folder, observations):
    policy = load_waypoint_policy(waypoint_folder)
    alone = [policy.decide([o]).waypoints[0] for o in observations]
    for most in (8, 1):
        with PolicyCore(policy, max_batch=most) as core, ThreadPoolExecutor(6) as pool:
            served = list(pool.map(lambda o: core.decide([o]).waypoints[0], observations * 4))
        assert np.allclose(served, alone * 4, rtol=0, atol=1e-5)
        assert most > 1 or np.array_equal(served, alone * 4)


def test_a_request_that_the_policy_cannot_answer_does_not_spoil_those_beside_it(stub, core):
    with held_up(stub, lambda: core.submit([observation()])) as first:
        beside = [core.submit([observation(i, text)]) for i, text in enumerate(("stack", "raise", "pick"))]
    assert len(first.result(PATIENCE).waypoints) == 1
    assert beside[0].result(PATIENCE).waypoints[0].tolist() == expected(picture(0), "stack", 0)
    with pytest.raises(PolicyFailed, match="a defect"):
        beside[1].result(PATIENCE)
    assert beside[2].result(PATIENCE).waypoints[0].tolist() == expected(picture(2), "pick", 0)


def test_a_policy_that_says_anything_but_seven_numbers_is_found_out(core, monkeypatch):
    for said in (None, Decision(None, None, np.zeros((1, 6)), None, 0.1), Decision(None, None, np.zeros((2, 7)), None, 0.1)):
        monkeypatch.setattr(core.policy, "decide", lambda observations, said=said: said)
        with pytest.raises(PolicyFailed):
            core.submit([observation()]).result(PATIENCE)
    assert core.alive


class Panic(BaseException):
    """What a library in Rust raises where it gives up: no Exception."""


def panicking(observations):
    raise Panic("in another language")


@pytest.mark.parametrize("decide, words", [
    (lambda observations: Decision(*[np.zeros((1, 7))] * 4, None), "TypeError"),
    (panicking, "Panic: in another language"), (lambda observations: sys.exit(3), "SystemExit: 3"),
])  # fmt: skip
def test_whatever_a_policy_does_somebody_is_told_and_the_next_is_answered(core, stub, monkeypatch, decide, words):
    with monkeypatch.context() as patched:
        patched.setattr(stub, "decide", decide)
        with pytest.raises(PolicyFailed, match=words):
            core.submit([observation()]).result(PATIENCE)
    assert len(core.submit([observation()]).result(PATIENCE).waypoints) == 1


def test_a_monitor_that_refuses_a_decision_stops_nobody_else(stub):
    monitor = Monitor()
    monitor.record(0.1, np.zeros(4))  # it watches a policy that says four numbers already
    with PolicyCore(stub, monitor=monitor) as core:
        for _ in range(2):
            with pytest.raises(PolicyFailed, match="decisions had"):
                core.submit([observation()]).result(PATIENCE)


def test_an_observation_without_a_picture_is_refused_where_it_is_asked(core, stub):
    with held_up(stub, lambda: core.submit([observation()])) as first:
        good = core.submit([observation()])
        with pytest.raises(ValueError, match="rgb"):
            core.submit([{"instruction": "stack"}])
    assert all(len(future.result(PATIENCE).waypoints) == 1 for future in (first, good))


def test_what_waits_behind_a_policy_that_hangs_is_told_so_when_the_core_is_closed(stub):
    core = PolicyCore(stub)
    with held_up(stub, lambda: core.submit([observation()])) as first:
        behind, gone = core.submit([observation()]), core.submit([observation()])
        gone.cancel()
        core.close(patience=0.01)
        with pytest.raises(Busy, match="stopping"):
            behind.result(PATIENCE)
    assert len(first.result(PATIENCE).waypoints) == 1


def test_a_core_that_is_closed_has_answered_what_waited_and_takes_no_more(stub):
    core = PolicyCore(stub)
    with held_up(stub, lambda: core.submit([observation()])) as first:
        rest = [core.submit([observation(i)]) for i in range(3)]
        closing = threading.Thread(target=core.close)
        closing.start()
        wait_until(lambda: not core.alive)
    closing.join()
    assert all(future.done() and len(future.result().waypoints) == 1 for future in (first, *rest))
    with pytest.raises(Busy, match="stopping"):
        core.submit([observation()])
    core.close()


def test_the_generic_policy_and_a_task_specific_one_are_one_name_apart(waypoint_folder, observations):
    generic, specific = policy_named(GENERIC), policy_named(str(waypoint_folder))
    assert generic.name == "tiny_clip_policy" and specific.name == "task-specific"
    assert not np.allclose(generic.decide(observations).waypoints, specific.decide(observations).waypoints)
    with pytest.raises(UserError, match="takes no adapter"):
        policy_named(GENERIC, "an adapter")
    with pytest.raises(UserError, match="no policy"):
        policy_named("./nowhere")


@pytest.mark.parametrize("numbers", [{"max_batch": 0}, {"wait": -1}, {"wait": np.nan}, {"wait": np.inf}, {"most_waiting": 0}])
def test_numbers_that_make_no_sense_are_refused(stub, numbers):
    with pytest.raises(ValueError, match="at least 1"):
        PolicyCore(stub, **numbers)
    for limits in ({"body": 0}, {"seconds": np.nan}, {"seconds": np.inf}):
        with pytest.raises(ValueError, match="positive"):
            Limits(**limits)
    assert issubclass(RequestError, ValueError)
