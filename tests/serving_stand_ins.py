"""A policy that answers at once and can be held up, and what speaks to its server, for the tests of serving. As fixtures: serving_fixtures.py."""

import socket
import threading
import time
from contextlib import contextmanager, suppress

import json_numpy
import numpy as np
import urllib3

from labkit.policy import Decision

JSON = {"Content-Type": "application/json"}
# Seconds that a test waits for what must come; none measures a time, and a virtual machine may stand still for half a minute.
PATIENCE = 120


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
    alone = {**headers, "Connection": "close"}
    response = urllib3.request(method, server.url + path, body=data, headers=alone, retries=False, timeout=PATIENCE)
    return response.status, json_numpy.loads(response.data)


def works(server):
    status, action = ask(server, body())
    return status == 200 and np.array_equal(action, expected(picture(), "pick up the red block"))


def wait_until(condition):
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.005)


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
