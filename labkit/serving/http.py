"""The policy server: OpenVLA's `/act` protocol over HTTP, `/health` and `/metrics`. What is asked and answered is in core.py.

The protocol is that of vla-scripts/deploy.py in github.com/openvla/openvla: POST {"image", "instruction", "unnorm_key"}, arrays written by
json_numpy (or the whole payload once more as a string, under "encoded"), and the answer is the action in the same form. Here a picture may also
be nested lists or a base64 PNG, and then the action is a list. Nothing that is received is ever executed.

Tornado serves, because it is there already (Jupyter runs on it), and because it ends connections that never finish their headers, for which
uvicorn has no setting.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import io
import json
import math
import signal
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import json_numpy
import numpy as np
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, generate_latest
from tornado.httpserver import HTTPServer
from tornado.ioloop import IOLoop
from tornado.netutil import bind_sockets
from tornado.web import Application, RequestHandler, stream_request_body

from labkit.errors import UserError
from labkit.serving.core import LARGEST_SIDE, Busy, PolicyCore, PolicyFailed, RequestError, read_request

JSON_NUMPY, ENCODED, PLAIN = "json_numpy", "encoded", "plain"
# A client reads the refusal only when it has sent its body; more than this many times the limit is not waited for.
_DRAINED = 16
_FULL = (b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: 61\r\n\r\n"
         b'{"error": "too many connections are open: try again shortly"}')


@dataclass(frozen=True)
class Limits:
    """What one client may take from the others.

    body: bytes of a request.   seconds: for its headers to arrive, again for its body, and again for the answer to be read.
    answer: seconds that the policy may take.
    connections: open at a time.   farewell: seconds that requests have to end when the server stops.
    """

    body: int = 4 * 2**20
    seconds: float = 10.0
    answer: float = 60.0
    connections: int = 256
    farewell: float = 5.0

    def __post_init__(self):
        if not all(0 < value < math.inf for value in vars(self).values()):
            raise ValueError(f"every limit is a positive number, not {self}")


class Malformed(RequestError):
    """A body that is no request at all."""


_STATUS = {Malformed: 400, RequestError: 422, Busy: 429, PolicyFailed: 500}


@dataclass(frozen=True)
class Asked:
    """A request, read.   observations: for `decide`.   form: it came in, and so the answer goes out: "json_numpy", "encoded" or "plain".

    single: one picture without a batch's dimension, so the action is (7,), not (N, 7).   detail: more than the action is wanted.
    """

    observations: list[dict]
    form: str
    single: bool
    detail: bool


def read_body(body: bytes) -> Asked:
    """The body of a POST to /act, checked.

    Raises Malformed for what is not JSON or not an object, RequestError for wrong values, both in one sentence.
    """
    fields, form = _object(body, "the body"), None
    if "encoded" in fields:
        if len(fields) != 1 or not isinstance(fields["encoded"], str):
            raise Malformed("a payload with the field 'encoded' holds only that, and it is a string")
        fields, form = _object(fields["encoded"], "the field 'encoded'"), ENCODED
    detail = fields.pop("detail", False)
    if not isinstance(detail, bool):
        raise RequestError("detail must be true or false")
    form = form or (JSON_NUMPY if isinstance(fields.get("image"), np.ndarray) else PLAIN)
    for name in ("image", "previous_image"):
        if isinstance(fields.get(name), str):
            fields[name] = _png(fields[name], name)
        elif isinstance(fields.get(name), list):
            fields[name] = _nested(fields[name], name)
    return Asked(read_request(fields), form, np.ndim(fields["image"]) == 3, detail)


def _object(text, what):
    if not text:
        raise Malformed(f"{what} is empty; send a JSON object with image and instruction")
    try:
        found = json_numpy.loads(text)
    except RecursionError:
        raise Malformed(f"{what} is nested too deeply") from None
    except Exception as error:
        # json_numpy decodes while it reads: a bad array shows as almost any error.
        raise Malformed(f"{what} cannot be read as JSON with json_numpy's arrays: {' '.join(str(error).split())[:150]}") from None
    if not isinstance(found, dict):
        raise Malformed(f"{what} must be a JSON object with image and instruction, not {type(found).__name__}")
    return found


def _nested(rows, name):
    try:
        # As objects: among texts of different length numpy would give each the room of the longest, gigabytes for a small body.
        numbers = np.array(rows, dtype=object)
    except ValueError:
        raise RequestError(f"the lists of {name} are not all of one length") from None
    if set(map(type, numbers.ravel())) != {int} or numbers.min() < 0 or numbers.max() > 255:
        raise RequestError(f"{name} must hold whole numbers from 0 to 255, in lists of one length")
    return numbers.astype(np.uint8)


def _png(text, name):
    from PIL import Image

    try:
        picture = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"])
        # Its size is known before a pixel of it is unpacked.
        if max(picture.size) > LARGEST_SIDE or picture.mode != "RGB":
            raise RequestError(f"{name} is a PNG of {picture.width} x {picture.height} pixels in mode {picture.mode}; it must be RGB with 8 bits, "
                               f"and at most {LARGEST_SIDE} a side")
        return np.asarray(picture)
    except RequestError:
        raise
    except (binascii.Error, ValueError, OSError, SyntaxError, Image.DecompressionBombError):
        raise RequestError(f"{name} is a string, but not the base64 of a PNG picture") from None


def write_body(decision, asked: Asked) -> str:
    """A Decision  ->  the answer's body: the action alone, or with `detail` an object of action, bins, probabilities and the policy's own seconds."""
    answer = _row(decision.waypoints, asked.single)
    if asked.detail:
        answer = {"action": answer, "bins": _row(decision.bins, asked.single), "probabilities": _row(decision.probabilities, asked.single),
                  "seconds": decision.seconds}
    if asked.form == ENCODED:
        return json.dumps(json_numpy.dumps(answer))
    return json.dumps(answer, default=_lists) if asked.form == PLAIN else json_numpy.dumps(answer)


def _row(values, single):
    return np.ascontiguousarray(values[0] if single else values)


def _lists(value):
    # JSON has no NaN, which a policy that regresses says instead of a probability.
    return np.where(np.isfinite(value), value, None).tolist()


@stream_request_body
class _Handler(RequestHandler):
    """Whatever goes wrong is answered with {"error": one sentence}. Only `/act` keeps a body; elsewhere it goes by, so that the answer is read."""

    def initialize(self, server):
        self.server = server

    def prepare(self):
        self.request.connection.set_max_body_size(_DRAINED * self.server.limits.body)

    def data_received(self, chunk):
        pass

    def set_default_headers(self):
        self.set_header("Content-Type", "application/json")
        self.clear_header("Server")

    def finish(self, chunk=None):
        sent = super().finish(chunk)
        if not sent.done():
            # Who does not read would keep a connection for ever.
            patience = IOLoop.current().call_later(self.server.limits.seconds, self.request.connection.stream.close)
            sent.add_done_callback(lambda _: IOLoop.current().remove_timeout(patience))
        return sent

    def refuse(self, status, why):
        self.set_status(status)
        self.finish(json.dumps({"error": why}))

    def write_error(self, status_code, **_):
        why = {404: f"there is nothing at {self.request.path[:100]}; ask /act, /health or /metrics",
               405: f"{self.request.path} does not answer {self.request.method}: POST to /act, GET /health and /metrics"}
        self.finish(json.dumps({"error": why.get(status_code, "the server failed")}))

    def authorised(self):
        """Whether the request brings the token, where one is asked for; compared in a time that does not tell how much of it was right."""
        if self.server.token is None:
            return True
        return hmac.compare_digest(self.request.headers.get("Authorization", "").encode(), f"Bearer {self.server.token}".encode())


class _Nothing(_Handler):
    def get(self):
        self.send_error(404)

    delete = head = options = patch = post = put = get


class _Health(_Handler):
    def get(self):
        core = self.server.core
        self.set_status(200 if core.alive else 503)
        self.finish(json.dumps({"status": "ok" if core.alive else "stopping", "policy": core.name}))


class _Metrics(_Handler):
    def get(self):
        if not self.authorised():
            self.refuse(401, "a token is needed: send the header Authorization: Bearer TOKEN")
            return
        self.set_header("Content-Type", CONTENT_TYPE_LATEST)
        self.finish(generate_latest(self.server.core.metrics.registry) + generate_latest(self.server.registry))


class _Act(_Handler):
    """Takes the body piece by piece, so that one that is too large or too slow is refused before it is there."""

    def initialize(self, server):
        super().initialize(server)
        self._body, self._refusal, self._answer, self._patience = bytearray(), None, None, None

    def prepare(self):
        super().prepare()
        self._patience = IOLoop.current().call_later(self.server.limits.seconds, self._too_slow)
        self.server.active.add(self)
        announced = self.request.headers.get("Content-Length", "")
        # Python refuses to read numbers of thousands of digits; the first twenty are too many bytes already.
        announced = int(announced[:20]) if announced.isascii() and announced.isdigit() else 0
        kind = self.request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if not self.authorised():
            self._refusal = 401, "a token is needed: send the header Authorization: Bearer TOKEN"
        elif self.server.stopping:
            self._refusal = 503, "the server is stopping"
        elif self.request.method == "POST" and kind != "application/json":
            # A page in somebody's browser can send other types to this machine without asking.
            self._refusal = 415, f"the body must have the Content-Type application/json, not {kind[:50] or 'none'}"
        self._weigh(announced)
        if announced > _DRAINED * self.server.limits.body:
            self.refuse(*self._refusal)

    def _weigh(self, size):
        if size > self.server.limits.body and self._refusal is None:
            self._refusal = 413, f"the body is larger than {self.server.limits.body} bytes"

    def data_received(self, chunk):
        self._weigh(len(self._body) + len(chunk))
        if self._refusal is None:
            self._body += chunk

    def _too_slow(self):
        self._patience = None
        if not self._finished:
            self.refuse(*self._refusal or (408, f"the body did not arrive within {self.server.limits.seconds:g} s"))

    async def post(self):
        self._be_patient()
        if self._finished:
            return
        if self._refusal:
            self.refuse(*self._refusal)
            return
        try:
            asked = read_body(bytes(self._body))
            self._answer = self.server.core.submit(asked.observations)
            decision = await asyncio.wait_for(asyncio.wrap_future(self._answer), self.server.limits.answer)
        except TimeoutError:
            self.refuse(503, f"the policy did not answer within {self.server.limits.answer:g} s")
        except tuple(_STATUS) as error:
            self.refuse(_STATUS[type(error)], str(error))
        except asyncio.CancelledError:
            if not self._answer.cancelled():
                raise
            self.set_status(499, "the client has hung up")
        else:
            self.finish(write_body(decision, asked))

    def _be_patient(self):
        if self._patience is not None:
            IOLoop.current().remove_timeout(self._patience)
            self._patience = None

    def on_connection_close(self):
        super().on_connection_close()
        self._be_patient()
        self.server.active.discard(self)
        if self._answer is not None:
            self._answer.cancel()

    def on_finish(self):
        self._be_patient()
        self.server.active.discard(self)


class _Listener(HTTPServer):
    """Tornado's server, with a limit to the connections that are open at a time."""

    open, most = 0, 0

    def handle_stream(self, stream, address):
        if self.open >= self.most:
            stream.write(_FULL).add_done_callback(lambda _: stream.close())
            return
        self.open += 1
        super().handle_stream(stream, address)

    def on_close(self, server_conn):
        super().on_close(server_conn)
        self.open -= 1


class PolicyServer:
    """A policy core behind an address: `run` in the main thread until a signal, or `in_background` beside other work."""

    def __init__(self, core: PolicyCore, host: str = "127.0.0.1", port: int = 8000, token: str | None = None, limits: Limits = Limits()):
        """host: who can reach it; the default is this machine alone.   port: 0 takes any that is free.   token: what clients send as
        `Authorization: Bearer TOKEN` for all but /health.

        Raises UserError where the address cannot be taken, ValueError for a token that no header can carry.
        """
        if token is not None and not (token.isascii() and token.isprintable() and token and " " not in token):
            raise ValueError("a token is at least one ASCII character, without spaces")
        if not host:
            raise UserError("the host is empty, which would be everybody: say 127.0.0.1 for this machine alone, or 0.0.0.0")
        try:
            self._sockets = bind_sockets(port, host)
        except (OSError, OverflowError) as error:
            raise UserError(f"{host}, port {port}, cannot be served at ({error}): choose another port or host") from error
        self.core, self.host, self.token, self.limits = core, host, token, limits
        self.port = self._sockets[0].getsockname()[1]
        self.active, self.stopping = set(), False
        self.registry = CollectorRegistry()
        self._answers = Counter("labkit_http_answers", "Answers by path and status.", ["path", "status"], registry=self.registry)
        self._started, self._loop, self._stop = threading.Event(), None, None

    @property
    def url(self) -> str:
        """Where clients reach it, without a path."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    def run(self, on_start=lambda: None) -> None:
        """Serve until SIGTERM or SIGINT (Ctrl-C), then end what is being answered and free the port. Only in the main thread.

        on_start: called once, when requests are answered and a signal ends it as it should.
        """
        asyncio.run(self._serve((signal.SIGTERM, signal.SIGINT), on_start))

    @contextmanager
    def in_background(self):
        """Serve from a thread for as long as the `with` block lasts."""
        thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="policy server", daemon=True)
        thread.start()
        self._started.wait()
        try:
            yield self
        finally:
            self.stop()
            thread.join()

    def stop(self) -> None:
        """Ask it to end; from any thread, or from a signal's handler. A second call does nothing."""
        with suppress(RuntimeError):  # its loop is closed: it has ended
            self._loop.call_soon_threadsafe(self._stop.set)

    async def _serve(self, signals=(), on_start=lambda: None):
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        handlers = [(path, handler, {"server": self}) for path, handler in _PATHS.items()]
        application = Application(handlers, default_handler_class=_Nothing, default_handler_args={"server": self}, log_function=self._count)
        # Tornado ends connections whose headers do not come; a body for /act that does not come is refused by its handler, with a sentence.
        listener = _Listener(application, idle_connection_timeout=self.limits.seconds, body_timeout=2 * self.limits.seconds,
                             max_body_size=self.limits.body)
        listener.most = self.limits.connections
        before = {number: signal.signal(number, lambda *_: self.stop()) for number in signals}
        try:
            listener.add_sockets(self._sockets)
            self._started.set()
            on_start()
            await self._stop.wait()
            self.stopping = True
            listener.stop()
            await self._say_farewell()
            await listener.close_all_connections()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def _say_farewell(self):
        until = self._loop.time() + self.limits.farewell
        while self.active and self._loop.time() < until:
            await asyncio.sleep(0.01)

    def _count(self, handler):
        path = handler.request.path if type(handler) in _PATHS.values() else "other"
        self._answers.labels(path, handler.get_status()).inc()


_PATHS = {"/act": _Act, "/health": _Health, "/metrics": _Metrics}
