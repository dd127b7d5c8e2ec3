"""A policy that is somewhere else: `decide` asks a policy server. The server is in http.py; nothing here loads torch or knows the model."""

from __future__ import annotations

import time
from dataclasses import dataclass

import json_numpy
import numpy as np
import urllib3

from labkit.actions import small_action
from labkit.errors import UserError


@dataclass(frozen=True)
class ServedDecision:
    """A `Decision` that came by wire; bins, actions, waypoints and probabilities as there.

    seconds: from asking to having the answer, what the robot waits.   policy_seconds: of these, the policy's own for its batch.
    """

    bins: np.ndarray
    actions: np.ndarray
    waypoints: np.ndarray
    probabilities: np.ndarray
    seconds: float
    policy_seconds: float


class PolicyClient:
    """Drives a robot, or the simulator (`rollout(PolicyClient(), "pick")`), by asking a server; any number of threads may share one."""

    def __init__(self, url: str = "http://127.0.0.1:8000", token: str | None = None, timeout: float = 30.0):
        """url: of the server, without a path.   token: what it was started with.   timeout: seconds to wait for an answer.

        Raises UserError where the url is none.
        """
        self.url, self.name = url.rstrip("/"), f"policy at {url}"
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        try:
            self._pool = urllib3.connection_from_url(self.url, maxsize=32, headers=headers, timeout=timeout, retries=False)
        except urllib3.exceptions.HTTPError as error:
            raise UserError(f"{url!r} is no address of a policy server; it looks like http://127.0.0.1:8000") from error

    def decide(self, observations, instructions=None) -> ServedDecision:
        """B observations (and B instructions, default the observations' own)  ->  what the server's policy says, in one request.

        Sent are `rgb`, `holding`, the instruction, and where an observation has one `previous_rgb` (black where only others have one, which is
        what no previous picture is to a policy that reads two).   Raises UserError where nobody answers, or the server refuses.
        """
        begun = time.perf_counter()
        said = [o["instruction"] for o in observations] if instructions is None else list(instructions)
        fields = {"image": np.stack([o["rgb"] for o in observations]), "instruction": said, "holding": [int(o["holding"]) for o in observations]}
        previous = [o.get("previous_rgb") for o in observations]
        if any(image is not None for image in previous):
            fields["previous_image"] = np.stack([np.zeros_like(o["rgb"]) if image is None else image for o, image in zip(observations, previous)])
        answer = self._post("/act", json_numpy.dumps({**fields, "detail": True}))
        if not isinstance(answer, dict) or not {"action", "bins", "probabilities", "seconds"} <= set(answer):
            raise UserError(f"{self.url} answers, but says no action with its bins and probabilities: is it `python -m labkit serve`?")
        waypoints = answer["action"]
        return ServedDecision(answer["bins"], small_action(waypoints), waypoints, answer["probabilities"], time.perf_counter() - begun,
                              answer["seconds"])

    def act(self, observation: dict, instruction: str | None = None) -> np.ndarray:
        """One observation of the tabletop  ->  (7,) waypoint for `env.step`.   instruction: default, the observation's own."""
        return self.decide([observation], None if instruction is None else [instruction]).waypoints[0]

    def health(self) -> dict:
        """{"status", "policy"} of the server.   Raises UserError where nobody answers."""
        return self._read(self._ask("GET", "/health", None))

    def close(self) -> None:
        """Give its connections back."""
        self._pool.close()

    def _post(self, path, body):
        return self._read(self._ask("POST", path, body.encode()))

    def _ask(self, method, path, body):
        try:
            try:
                return self._pool.request(method, path, body=body)
            except urllib3.exceptions.ProtocolError:
                # The server has closed a connection that stood idle. An answer depends on its request alone, so asking once more is safe.
                return self._pool.request(method, path, body=body)
        except urllib3.exceptions.HTTPError as error:
            raise UserError(f"no policy server answers at {self.url} ({type(error).__name__}): start one with `python -m labkit serve`") from error

    def _read(self, response):
        try:
            answer = json_numpy.loads(response.data)
        except ValueError as error:
            raise UserError(f"{self.url} answers, but it is no policy server (status {response.status}, not JSON)") from error
        if response.status != 200:
            why = answer.get("error") if isinstance(answer, dict) else answer
            raise UserError(f"{self.url} refuses the request with status {response.status}: {why}")
        return answer
