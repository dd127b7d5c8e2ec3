"""Properties of the policy server: the same answers as without it, nobody disturbs anybody else, and it ends as it should."""

import ast
import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import fields

import json_numpy
import numpy as np
import pytest
import urllib3
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from labkit.errors import UserError
from labkit.paths import ROOT
from labkit.policy import Decision
from labkit.rollouts import rollout
from labkit.serving.client import PolicyClient, ServedDecision
from labkit.serving.core import GENERIC, LARGEST_SIDE, Busy, PolicyCore, PolicyFailed, RequestError, policy_named
from labkit.serving.http import Limits, PolicyServer
from labkit.serving.monitor import Monitor
from labkit.task_specific_vla import load_waypoint_policy, policy_from_clip

JSON = {"Content-Type": "application/json"}
PATIENCE = 20  # seconds that a test waits for what must come; none of them measures a time


class Stub:
    """Says numbers that tell which picture and which sentence they answer; remembers the size of every forward, and can be held up."""

    name = "stub"

    def __init__(self):
        self.sizes, self.gate, self.asked = [], threading.Event(), threading.Semaphore(0)
        self.gate.set()

    def decide(self, observations, instructions=None):
        self.asked.release()
        assert self.gate.wait(PATIENCE)
        self.sizes.append(len(observations))
        said = [o["instruction"] for o in observations]
        if "raise" in said:
            raise RuntimeError("a defect\nof the policy")
        if "refuse" in said:
            raise ValueError("this picture does not fit")
        waypoints = np.array([expected(o["rgb"], o["instruction"], o["holding"]) for o in observations])
        if "nan" in said:
            waypoints[:] = np.nan
        actions = waypoints[:, [0, 1, 2, 6]]
        return Decision(np.zeros((len(said), 4), int), actions, waypoints, np.full((len(said), 4), np.nan), 1e-6)


@contextmanager
def held_up(stub, ask_first):
    """The policy is busy with one request, the one that `ask_first()` sends, for as long as the `with` block lasts."""
    stub.gate.clear()
    try:
        sent = ask_first()
        assert stub.asked.acquire(timeout=PATIENCE)
        yield sent
    finally:
        stub.gate.set()


def expected(image, text, holding=0):
    """What `Stub` says of one observation."""
    return [image.mean() / 3, len(text) / 7, text.encode()[0] / 11, *image[0, 0] / 13, float(holding)]


def picture(seed=0, size=8):
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


def observation(seed=0, text="pick up the red block", size=8):
    return {"rgb": picture(seed, size), "instruction": text, "holding": seed % 2}


def body(**changes):
    """A good request, changed: a value replaces a field, ... takes it out."""
    whole = {"image": picture(), "instruction": "pick up the red block", **changes}
    return json_numpy.dumps({name: value for name, value in whole.items() if value is not ...}).encode()


def ask(server, data, path="/act", method="POST", headers=JSON):
    """(status, what came back): one request on a connection of its own."""
    response = urllib3.request(method, server.url + path, body=data, headers=headers, retries=False, timeout=PATIENCE)
    return response.status, json_numpy.loads(response.data)


def works(server):
    status, action = ask(server, body())
    return status == 200 and np.array_equal(action, expected(picture(), "pick up the red block"))


def wait_until(condition):
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.005)


@pytest.fixture
def stub():
    return Stub()


@pytest.fixture
def core(stub):
    with PolicyCore(stub) as core:
        yield core


@pytest.fixture
def server(core):
    with PolicyServer(core, port=0).in_background() as server:
        yield server


@pytest.fixture
def hasty(core):
    """A server that waits a second for a request to arrive."""
    with PolicyServer(core, port=0, limits=Limits(body=100_000, seconds=1)).in_background() as server:
        yield server


@pytest.fixture(scope="module")
def waypoint_folder(tmp_path_factory):
    """A task-specific policy with random weights that reads two frames, saved."""
    from labkit.clip_pretraining import Recipe, build_model, build_processor

    folder = tmp_path_factory.mktemp("served")
    build_model(Recipe(width=32, vision_layers=2, seed=3)).save_pretrained(folder / "clip")
    build_processor().save_pretrained(folder / "clip")
    policy_from_clip(folder / "clip", readout="spatial", frames=2).save(folder / "task-specific")
    return folder / "task-specific"


@pytest.fixture(params=["tiny", "task-specific"])
def policy(request, waypoint_folder):
    return request.getfixturevalue("tiny_policy") if request.param == "tiny" else load_waypoint_policy(waypoint_folder)


# --- the same answers ---------------------------------------------------------------------------------------------------------

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
    ran = subprocess.run([sys.executable, "-c", OPENVLA_CLIENT, server.url], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == expected(np.arange(192, dtype=np.uint8).reshape(8, 8, 3), "do something")


def png(array, **options):
    data = io.BytesIO()
    Image.fromarray(array).save(data, format="PNG", **options)
    return base64.b64encode(data.getvalue()).decode()


def test_every_form_of_a_picture_gives_the_same_numbers_and_the_answer_in_that_form(server):
    image, said = picture(4), expected(picture(4), "stack", 1)
    rest = {"instruction": "stack", "holding": 1}
    for plain in (image.tolist(), png(image)):
        status, answer = ask(server, json.dumps({"image": plain, **rest}).encode())
        assert status == 200 and answer == said
    status, answer = ask(server, json_numpy.dumps({"image": image, **rest}).encode())
    assert isinstance(answer, np.ndarray) and answer.dtype == np.float64 and answer.tolist() == said
    status, answer = ask(server, json.dumps({"encoded": json_numpy.dumps({"image": image, **rest})}).encode())
    assert isinstance(answer, str) and json_numpy.loads(answer).tolist() == said


def test_details_are_there_where_they_are_asked_for_and_json_has_no_nan(server):
    response = urllib3.request("POST", server.url + "/act", headers=JSON, body=json.dumps(
        {"image": picture().tolist(), "instruction": "stack", "detail": True}).encode())
    answer = json.loads(response.data, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert answer == {"action": expected(picture(), "stack"), "bins": [0] * 4, "probabilities": [None] * 4, "seconds": 1e-6}


# --- many at a time -----------------------------------------------------------------------------------------------------------

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


def test_more_than_may_wait_are_told_to_come_again_and_the_others_are_answered(stub):
    with PolicyCore(stub, most_waiting=2) as core, PolicyServer(core, port=0).in_background() as server, ThreadPoolExecutor(3) as pool:
        with held_up(stub, lambda: pool.submit(works, server)) as first:
            rest = [pool.submit(works, server) for _ in range(2)]
            wait_until(lambda: core.waiting == 2)
            status, answer = ask(server, body())
            assert status == 429 and "try again" in answer["error"]
        assert first.result() and all(future.result() for future in rest)


def test_who_hangs_up_before_the_policy_begins_costs_no_forward(stub, server, caplog):
    with ThreadPoolExecutor(1) as pool:
        with held_up(stub, lambda: pool.submit(works, server)) as first:
            with connected(server) as gone:
                gone.sendall(head(len(body())) + body())
                wait_until(lambda: server.core.waiting == 1)
                waiting = server.core._waiting[0].future
            wait_until(waiting.cancelled)
        assert first.result() and works(server)
    assert stub.sizes == [1, 1] and not caplog.records


# --- a policy that fails ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, status, words", [
    ("raise", 500, "RuntimeError: a defect of the policy"), ("nan", 500, "not finite"), ("refuse", 422, "this picture does not fit"),
])  # fmt: skip
def test_a_policy_that_fails_is_an_answer_in_one_sentence_and_the_next_request_is_answered(server, text, status, words):
    found, answer = ask(server, body(instruction=text))
    assert found == status and words in answer["error"] and "\n" not in answer["error"]
    assert works(server)
    assert server.core.metrics.failures._value.get() == 1


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


def test_a_policy_that_takes_too_long_is_not_waited_for(core, stub):
    with PolicyServer(core, port=0, limits=Limits(answer=0.2)).in_background() as server, ThreadPoolExecutor(1) as pool:
        with held_up(stub, lambda: pool.submit(ask, server, body())) as first:
            status, answer = first.result()
            assert status == 503 and "within 0.2 s" in answer["error"]
        assert works(server)


def test_a_policy_that_hangs_does_not_keep_the_server_from_ending(stub):
    core = PolicyCore(stub)
    with PolicyServer(core, port=0, limits=Limits(farewell=0.2)).in_background() as server:
        with held_up(stub, lambda: core.submit([observation()])), connected(server) as cut_off:
            cut_off.sendall(head(len(body())) + body())
            wait_until(lambda: core.waiting == 1)
            server.stop()
            assert everything(cut_off) == b""
            core.close(patience=0.01)
    core.close()


# --- bad requests -------------------------------------------------------------------------------------------------------------

def array(data=b"", dtype="|u1", shape=(0,)):
    return {"__numpy__": base64.b64encode(data).decode(), "dtype": dtype, "shape": list(shape)}


BAD = {
    "nothing": (b"", 400, "empty"),
    "no JSON": (b"{image", 400, "JSON"),
    "no text": (b"\xff\xfe{}\xff", 400, "JSON"),
    "a list": (b"[1, 2]", 400, "not list"),
    "a pickle": (b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07", 400, "JSON"),
    "deep": (b"[" * 20_000, 400, "deep"),
    "a number of many digits": (b'{"image": ' + b"9" * 5000 + b"}", 400, "JSON"),
    "encoded and more": (json.dumps({"encoded": "{}", "image": 1}).encode(), 400, "only that"),
    "encoded, no string": (b'{"encoded": 3}', 400, "string"),
    "encoded, no JSON": (b'{"encoded": "{"}', 400, "encoded"),
    "array without shape": (b'{"image": {"__numpy__": "", "dtype": "|u1"}}', 400, "shape"),
    "array that is too short": (body(image=array(b"123", shape=(8, 8, 3))), 400, "reshape"),
    "array of objects": (body(image=array(b"12345678", "|O", (1,))), 400, "json_numpy"),
    "array of a strange type": (body(image=array(b"1234", [["a", "|O"]], (1,))), 400, "json_numpy"),
    "array of no base64": (body(image={**array(), "__numpy__": "abc"}), 400, "json_numpy"),
    "no image": (body(image=...), 422, "'image' is missing"),
    "no instruction": (body(instruction=...), 422, "'instruction' is missing"),
    "an unknown field": (body(holdin=1), 422, "'holdin'"),
    "image is null": (body(image=None), 422, "NoneType"),
    "image of floats": (body(image=picture().astype(np.float32)), 422, "float32"),
    "image without colours": (body(image=picture()[..., 0]), 422, "(8, 8)"),
    "image with alpha": (body(image=np.zeros((8, 8, 4), np.uint8)), 422, "(8, 8, 4)"),
    "no pictures": (body(image=np.zeros((0, 8, 8, 3), np.uint8)), 422, "1 to 256"),
    "too many pictures": (body(image=np.zeros((257, 2, 2, 3), np.uint8)), 422, "1 to 256"),
    "too large a picture": (body(image=np.zeros((1, LARGEST_SIDE + 1, 3), np.uint8)), 422, "pixels a side"),
    "ragged lists": (body(image=[[[1, 2, 3]], [[1, 2]]]), 422, "one length"),
    "lists of floats": (body(image=[[[1.5, 2, 3]]]), 422, "whole numbers"),
    "lists of booleans": (body(image=[[[True, True, False]]]), 422, "whole numbers"),
    "numbers that are no byte": (body(image=[[[0, 0, 256]]]), 422, "0 to 255"),
    "negative numbers": (body(image=[[[0, 0, -1]]]), 422, "0 to 255"),
    "empty lists": (body(image=[]), 422, "0 to 255"),
    "no PNG": (body(image=base64.b64encode(b"GIF89a").decode()), 422, "PNG"),
    "no base64": (body(image="a picture"), 422, "PNG"),
    "half a PNG": (body(image=png(picture(size=64))[:400]), 422, "PNG"),
    "a PNG with alpha": (body(image=png(np.zeros((8, 8, 4), np.uint8))), 422, "RGBA"),
    "a PNG that unpacks to much": (body(image=png(np.zeros((4000, 4000, 3), np.uint8))), 422, "4000 x 4000"),
    "instruction is a number": (body(instruction=7), 422, "instruction is 7"),
    "instruction is blank": (body(instruction="  "), 422, "sentence"),
    "instruction is long": (body(instruction="a" * 301), 422, "301 characters"),
    "two instructions": (body(instruction=["stack", "pick"]), 422, "2 values for 1 picture"),
    "holding is 2": (body(holding=2), 422, "holding is 2"),
    "holding is a word": (body(holding="yes"), 422, "holding is 'yes'"),
    "an unknown unnorm_key": (body(unnorm_key="bridge_orig"), 422, "bridge_orig"),
    "unnorm_key is an array": (body(unnorm_key=picture()), 422, "unnorm_key"),
    "another previous picture": (body(previous_image=picture(size=9)), 422, "alike"),
    "detail is a number": (body(detail=1), 422, "detail"),
    "too large": (b" " * (100_001) + body(), 413, "100000 bytes"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_told_what_is_wrong_in_one_sentence_and_the_server_goes_on(name, small_server):
    data, status, words = BAD[name]
    before = list(small_server.core.policy.sizes)
    found, answer = ask(small_server, data)
    assert (found, list(answer)) == (status, ["error"]), answer
    assert small_server.core.policy.sizes == before
    assert words in answer["error"] and "\n" not in answer["error"] and len(answer["error"]) < 400
    assert works(small_server)


@pytest.fixture(scope="module")
def small_server():
    """One server for all bad requests: whatever one of them breaks, the next will show."""
    with PolicyCore(Stub()) as core, PolicyServer(core, port=0, limits=Limits(body=100_000)).in_background() as server:
        yield server


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/octet-stream", None])
def test_only_json_is_read_so_that_no_page_in_a_browser_can_ask(server, kind):
    status, answer = ask(server, body(), headers={"Content-Type": kind} if kind else {})
    assert status == 415 and "application/json" in answer["error"]
    assert ask(server, body(), headers={"Content-Type": "application/json; charset=utf-8"})[0] == 200


@pytest.mark.parametrize("method, path, status", [("GET", "/act", 405), ("PUT", "/act", 405), ("POST", "/health", 405), ("POST", "/", 404),
                                                  ("GET", "/act/../../etc/passwd", 404)])
def test_another_path_or_method_is_told_what_there_is(server, method, path, status):
    found, answer = ask(server, b"" if method != "GET" else None, path, method)
    assert found == status and "/act" in answer["error"]


def test_a_body_in_chunks_is_read_and_one_that_grows_too_large_is_refused(hasty):
    chunks = [body()[i : i + 100] for i in range(0, len(body()), 100)]
    assert ask(hasty, iter(chunks))[0] == 200
    status, answer = ask(hasty, iter([b" " * 50_000] * 4))
    assert status == 413 and "100000 bytes" in answer["error"] and works(hasty)


def head(length, path="/act"):
    return f"POST {path} HTTP/1.1\r\nHost: robot\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n".encode()


def connected(server):
    return socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE)


def everything(connection):
    """All that comes until the other side ends the connection, in whatever way."""
    received = b""
    with suppress(ConnectionError):
        while piece := connection.recv(65536):
            received += piece
    return received


def test_a_body_that_would_be_enormous_is_refused_before_it_is_sent(hasty):
    with connected(hasty) as connection:
        connection.sendall(head(10**15))
        answer = everything(connection)
    assert answer.startswith(b"HTTP/1.1 413 ") and b"100000 bytes" in answer and works(hasty)


@pytest.mark.parametrize("noise", [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20 + b"\r\n\r\n", b"GET\r\n\r\n",
                                   b"POST /act HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b"POST /act HTTP/1.1\r\nContent-Length: 5, 6\r\n\r\n",
                                   b"POST /act HTTP/1.1\r\nHost: a\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
                                   b"POST /act HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"])
def test_what_is_no_http_ends_its_connection_and_no_other(hasty, noise):
    with connected(hasty) as connection:
        connection.sendall(noise)
        answer = everything(connection)
    assert answer == b"" or b"HTTP/1.1 4" in answer
    assert works(hasty)


# --- slow and many ------------------------------------------------------------------------------------------------------------

def test_a_body_that_does_not_arrive_is_refused_with_a_sentence(hasty):
    with connected(hasty) as connection:
        connection.sendall(head(1000) + b'{"image": ')
        answer = everything(connection)
    assert answer.startswith(b"HTTP/1.1 408 ") and b"within 1 s" in answer and works(hasty)


def test_slow_clients_stop_nobody_and_are_sent_away(hasty):
    """Slowloris: connections that stay open by saying almost nothing, in their headers or in their body."""
    slow = [connected(hasty) for _ in range(40)]
    for i, connection in enumerate(slow):
        connection.sendall(head(1000)[:40] if i % 2 else head(1000) + b"{")
    assert all(works(hasty) for _ in range(5))
    for connection in slow:
        with connection:
            assert everything(connection)[:13] in (b"", b"HTTP/1.1 408 ")
    wait_until(lambda: not hasty.active)
    assert works(hasty)


def test_a_slow_trickle_is_no_way_round_the_time_limit(hasty):
    stop = threading.Event()

    def trickle(connection):
        while not stop.wait(0.02):
            try:
                connection.sendall(b" ")
            except OSError:
                return

    with connected(hasty) as connection:
        connection.sendall(head(90_000))
        thread = threading.Thread(target=trickle, args=(connection,))
        thread.start()
        try:
            answer = connection.recv(65536)
        finally:
            stop.set()
            thread.join()
    assert answer.startswith(b"HTTP/1.1 408 ") and works(hasty)


def test_more_connections_than_may_be_open_are_told_so_and_it_ends_with_them(core):
    with PolicyServer(core, port=0, limits=Limits(connections=3)).in_background() as server:
        held = [connected(server) for _ in range(3)]
        for connection in held:
            connection.sendall(head(5))  # when this is read, the connection counts
        wait_until(lambda: len(server.active) == 3)
        with connected(server) as one_more:
            answer = everything(one_more)
        status, _, said = answer.partition(b"\r\n\r\n")
        assert status.startswith(b"HTTP/1.1 503 ") and "too many connections" in json.loads(said)["error"]
        assert f"Content-Length: {len(said)}".encode() in status
        for connection in held:
            connection.close()
        wait_until(lambda: not server.active)
        assert works(server)


# --- who may ask --------------------------------------------------------------------------------------------------------------

def test_with_a_token_only_those_who_have_it_are_answered(core, stub):
    with PolicyServer(core, port=0, token="open-sesame").in_background() as server:
        for given in ({}, {"Authorization": "Bearer open-sesam"}, {"Authorization": "open-sesame"}, {"Authorization": "Bearer \xfcber"}):
            status, answer = ask(server, body(), headers={**JSON, **given})
            assert status == 401 and "token" in answer["error"]
            assert urllib3.request("GET", server.url + "/metrics", headers=given).status == 401
        assert ask(server, None, "/health", "GET", {})[0] == 200 and not stub.sizes
        assert ask(server, body(), headers={**JSON, "Authorization": "Bearer open-sesame"})[0] == 200
        assert len(PolicyClient(server.url, "open-sesame").decide([observation()]).waypoints) == 1
        with pytest.raises(UserError, match="401.*token is needed"):
            PolicyClient(server.url, "guess").decide([observation()])


@pytest.mark.parametrize("token", ["", "two words", "\u00fcber", "line\nbreak"])
def test_a_token_that_no_header_can_carry_is_refused_at_the_start(core, token):
    with pytest.raises(ValueError, match="token"):
        PolicyServer(core, port=0, token=token)


def test_unless_told_only_this_machine_is_listened_to(core):
    with PolicyServer(core, port=0).in_background() as server:
        assert {s.getsockname()[0] for s in server._sockets} == {"127.0.0.1"}


def test_no_module_of_the_server_can_unpickle():
    modules = list((ROOT / "labkit" / "serving").glob("*.py"))
    assert {"core.py", "http.py", "client.py", "monitor.py"} <= {path.name for path in modules}
    for path in [*modules, ROOT / "labkit" / "commands" / "serve.py"]:
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        imported = {alias.name.split(".")[0] for n in nodes if isinstance(n, ast.Import) for alias in n.names}
        imported |= {(n.module or "").split(".")[0] for n in nodes if isinstance(n, ast.ImportFrom)}
        assert not imported & {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}, path.name
        assert not {n.arg for n in nodes if isinstance(n, ast.keyword)} & {"allow_pickle", "weights_only"}, path.name
        assert "torch.load" not in path.read_text(encoding="utf-8"), path.name


def test_a_robots_computer_needs_no_torch_to_ask():
    code = "import sys, labkit.serving.client, labkit.serving.http; print(sorted({'torch', 'transformers', 'mujoco'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (ran.returncode, ran.stdout.strip()) == (0, "[]"), ran.stderr


# --- what is counted ----------------------------------------------------------------------------------------------------------

def test_metrics_count_what_happened_in_prometheus_format(stub):
    with PolicyCore(stub, monitor=Monitor(deadline=1e-9)) as core, PolicyServer(core, port=0).in_background() as server:
        ask(server, body(image=np.stack([picture(i) for i in range(5)])))
        ask(server, body())
        ask(server, body(instruction="raise"))
        ask(server, b"")
        ask(server, None, "/health", "GET")
        ask(server, None, "/secret-" + "x" * 50, "GET")
        response = urllib3.request("GET", server.url + "/metrics")
    samples = {(s.name, *s.labels.values()): s.value for family in text_string_to_metric_families(response.data.decode()) for s in family.samples}
    assert response.headers["Content-Type"].startswith("text/plain")
    assert samples["labkit_decisions_total",] == 6 and samples["labkit_policy_failures_total",] == 1
    assert samples["labkit_batch_size_count",] == 2 and samples["labkit_batch_size_sum",] == 6
    assert samples["labkit_response_seconds_count",] == 2 and samples["labkit_waiting_requests",] == 0
    assert samples["labkit_deadline_misses",] == 6 and samples["labkit_drift_alarms",] == 0
    answers = {key[1:]: value for key, value in samples.items() if key[0] == "labkit_http_answers_total"}
    assert answers == {("/act", "200"): 2, ("/act", "500"): 1, ("/act", "400"): 1, ("/health", "200"): 1, ("other", "404"): 1}


# --- the client ---------------------------------------------------------------------------------------------------------------

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


# --- starting and ending ------------------------------------------------------------------------------------------------------

def test_a_server_that_ends_answers_what_it_has_begun_and_frees_its_port(stub, core):
    threads = threading.active_count()
    with ThreadPoolExecutor(1) as pool:
        with PolicyServer(core, port=0).in_background() as server, connected(server) as idle:
            with held_up(stub, lambda: pool.submit(works, server)) as last:
                server.stop()
                wait_until(lambda: server.stopping)
            assert last.result()
            assert everything(idle) == b""
    with socket.create_server(("127.0.0.1", server.port)):
        pass
    wait_until(lambda: threading.active_count() == threads)


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


def test_an_address_that_is_taken_is_one_sentence(core, server):
    with pytest.raises(UserError, match=f"port {server.port}, cannot be served at .*another port"):
        PolicyServer(core, port=server.port)


@pytest.mark.parametrize("name, number", [(GENERIC, signal.SIGTERM), ("folder", signal.SIGINT)])
def test_the_command_serves_the_policy_that_one_parameter_names_until_a_signal(name, number, waypoint_folder, observations):
    name = str(waypoint_folder) if name == "folder" else name
    environment = {**os.environ, "LABKIT_NO_INSTALL": "1", "LABKIT_TOKEN": "from-the-environment"}
    command = [sys.executable, "-m", "labkit", "serve", "--port", "0", "--policy", name]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    try:
        line = process.stdout.readline()
        assert line.startswith(f"{name} answers at http://127.0.0.1:"), line + process.stderr.read()
        url = line.split()[3].removesuffix("/act;")
        served = PolicyClient(url, "from-the-environment").decide(observations)
        assert served.waypoints.tobytes() == policy_named(name).decide(observations).waypoints.tobytes()
        process.send_signal(number)
        said, complaints = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0 and "Traceback" not in complaints
    assert said.startswith("6 decisions: median ")
    with socket.create_server(("127.0.0.1", int(url.rpartition(":")[2]))):
        pass


def test_the_generic_policy_and_a_task_specific_one_are_one_name_apart(waypoint_folder, observations):
    generic, specific = policy_named(GENERIC), policy_named(str(waypoint_folder))
    assert generic.name == "tiny_clip_policy" and specific.name == "task-specific"
    assert not np.allclose(generic.decide(observations).waypoints, specific.decide(observations).waypoints)
    with pytest.raises(UserError, match="takes no adapter"):
        policy_named(GENERIC, "an adapter")
    with pytest.raises(UserError, match="no policy"):
        policy_named("./nowhere")


@pytest.mark.parametrize("numbers", [{"max_batch": 0}, {"wait": -1}, {"most_waiting": 0}])
def test_numbers_that_make_no_sense_are_refused(stub, numbers):
    with pytest.raises(ValueError, match="at least 1"):
        PolicyCore(stub, **numbers)
    with pytest.raises(ValueError, match="positive"):
        Limits(body=0)
    assert issubclass(RequestError, ValueError)
