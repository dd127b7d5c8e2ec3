"""Properties of the policy server as clients see it: ours, OpenVLA's, and the simulator behind ours."""

import json
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields

import numpy as np
import pytest

from labkit.errors import UserError
from labkit.paths import ROOT
from labkit.policy import Decision
from labkit.rollouts import rollout
from labkit.serving.client import PolicyClient, ServedDecision
from labkit.serving.core import PolicyCore
from labkit.serving.http import PolicyServer
from labkit.task_specific_vla import load_waypoint_policy
from tests.serving_stand_ins import PATIENCE, expected, held_up, observation, wait_until

pytest_plugins = ["tests.serving_fixtures"]


@pytest.fixture(params=["tiny", "task-specific"])
def policy(request, waypoint_folder):
    return request.getfixturevalue("tiny_policy") if request.param == "tiny" else load_waypoint_policy(waypoint_folder)


@pytest.mark.parametrize("count", [1, 2, 6])
def test_what_comes_by_http_is_what_the_policy_says_to_the_last_bit(policy, count, observations):
    seen = [{**o, "previous_rgb": observations[i - 1]["rgb"]} if i % 2 else o for i, o in enumerate(observations[:count])]
    with PolicyCore(policy) as core, PolicyServer(core, port=0).in_background() as server:
        served, direct = PolicyClient(server.url).decide(seen), policy.decide(seen)
        for name in ("bins", "actions", "waypoints", "probabilities"):
            ours, theirs = getattr(served, name), getattr(direct, name)
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.tobytes() == theirs.tobytes(), name
        assert 0 < served.policy_seconds < served.seconds
        other = [o["instruction"] for o in reversed(seen)]
        assert np.array_equal(PolicyClient(server.url).decide(seen, other).waypoints, policy.decide(seen, other).waypoints)
        assert np.array_equal(PolicyClient(server.url).act(seen[0]), policy.act(seen[0]))


def test_the_simulator_driven_through_the_server_ends_as_without_it(policy):
    with PolicyCore(policy) as core, PolicyServer(core, port=0).in_background() as server:
        served, direct = (rollout(p, "put", 4, progress=False) for p in (PolicyClient(server.url), policy))
    for name in ("success", "seeds", "decisions", "position_error"):
        assert np.array_equal(getattr(served, name), getattr(direct, name)), name
    assert served.decisions.max() > 1  # a second decision has a previous picture, which has to come along


def test_a_served_decision_has_all_that_a_decision_has():
    assert {f.name for f in fields(Decision)} | {"policy_seconds"} == {f.name for f in fields(ServedDecision)}


def test_200_requests_of_8_threads_are_each_answered_with_their_own_and_share_forwards(stub, server):
    client = PolicyClient(server.url)

    def one(i):
        seen = observation(i, f"{'abcdefgh'[i % 8]} says {i}")
        return np.array_equal(client.decide([seen]).waypoints[0], expected(seen["rgb"], seen["instruction"], seen["holding"]))

    with ThreadPoolExecutor(8) as pool:
        with held_up(stub, lambda: pool.submit(one, 0)) as first:
            answers = pool.map(one, range(1, 200))
            wait_until(lambda: server.core.waiting == 7)
        assert first.result() and all(answers)
    assert sum(stub.sizes) == 200 and stub.sizes[:2] == [1, 7] and max(stub.sizes) <= 8


OPENVLA_CLIENT = """
import sys
import requests
import json_numpy
json_numpy.patch()
import json
import numpy as np
payload = {"image": np.arange(192, dtype=np.uint8).reshape(8, 8, 3), "instruction": "do something", "unnorm_key": None}
action = requests.post(sys.argv[1] + "/act", json=payload).json()
assert isinstance(action, np.ndarray), action
again = json.loads(requests.post(sys.argv[1] + "/act", json={"encoded": json.dumps(payload)}).json())
assert isinstance(again, np.ndarray) and again.tobytes() == action.tobytes()
print(json.dumps(action.tolist()))
"""


def test_openvlas_client_as_its_docstring_shows_it_is_answered(server):
    ran = subprocess.run([sys.executable, "-c", OPENVLA_CLIENT, server.url], capture_output=True, text=True, timeout=PATIENCE)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == expected(np.arange(192, dtype=np.uint8).reshape(8, 8, 3), "do something")


@contextmanager
def somebody_else(*answers):
    """A server that takes one connection for each of these bodies, and ends it; where it is None, without a word."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        def answer():
            for said in answers:
                connection, _ = listening.accept()
                with connection:
                    connection.recv(65536)
                    if said is not None:
                        connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(said), said))

        thread = threading.Thread(target=answer)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_a_client_says_in_one_sentence_that_nobody_answers_or_somebody_else_does():
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        with pytest.raises(UserError, match="no policy server answers at http.*python -m labkit serve"):
            PolicyClient(f"http://127.0.0.1:{nobody.getsockname()[1]}", timeout=2).health()
    with somebody_else(b"<html>") as url, pytest.raises(UserError, match="no policy server"):
        PolicyClient(url).health()
    with pytest.raises(UserError, match="no address"):
        PolicyClient("http://[")


def test_a_client_waits_for_an_answer_once_not_twice():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(UserError, match="ReadTimeoutError"):
            PolicyClient(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.1).health()
        silent.setblocking(False)
        silent.accept()[0].close()
        with pytest.raises(BlockingIOError):
            silent.accept()


@pytest.mark.parametrize("said", [b"[0.1, 0.2]", b'{"status": "ok"}'])
def test_a_client_that_reaches_another_service_says_so(said):
    with somebody_else(said) as url, pytest.raises(UserError, match="no action"):
        PolicyClient(url).decide([observation()])


def test_a_client_asks_once_more_where_its_connection_ends_before_the_answer():
    with somebody_else(None, b'{"status": "ok"}') as url:
        assert PolicyClient(url).health() == {"status": "ok"}
    with somebody_else(None, None) as url, pytest.raises(UserError, match="no policy server answers"):
        PolicyClient(url).health()


def test_a_client_goes_on_where_a_server_was_started_again(core):
    with PolicyServer(core, port=0).in_background() as server:
        client = PolicyClient(server.url)
        assert client.health() == {"status": "ok", "policy": "stub"}
        before = client.decide([observation()]).waypoints
    with PolicyServer(core, port=server.port).in_background():
        assert np.array_equal(client.decide([observation()]).waypoints, before)


def test_a_client_tells_what_the_server_refuses(server):
    with pytest.raises(UserError, match="422: instruction is ' '"):
        PolicyClient(server.url).decide([observation(text="   ")])


def test_a_robots_computer_needs_no_torch_to_ask():
    code = "import sys, labkit.serving.client, labkit.serving.http; print(sorted({'torch', 'transformers', 'mujoco'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE)
    assert (ran.returncode, ran.stdout.strip()) == (0, "[]"), ran.stderr
