"""Properties of the policy server: nobody disturbs anybody else, not by sending nothing or too much, and it ends as it should."""

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import urllib3
from prometheus_client.parser import text_string_to_metric_families

from labkit.errors import UserError
from labkit.serving.client import PolicyClient
from labkit.serving.core import PolicyCore
from labkit.serving.http import Limits, PolicyServer
from labkit.serving.monitor import Monitor
from tests.serving_stand_ins import JSON, ask, body, connected, everything, head, held_up, observation, picture, wait_until, works

pytest_plugins = ["tests.serving_fixtures"]


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


@pytest.mark.parametrize("text, status, words", [
    ("raise", 500, "RuntimeError: a defect of the policy"), ("nan", 500, "not finite"), ("refuse", 422, "this picture does not fit"),
])  # fmt: skip
def test_a_policy_that_fails_is_an_answer_in_one_sentence_and_the_next_request_is_answered(server, text, status, words):
    found, answer = ask(server, body(instruction=text))
    assert found == status and words in answer["error"] and "\n" not in answer["error"]
    assert works(server)
    assert server.core.metrics.failures._value.get() == 1


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


@pytest.mark.parametrize("method, path, status", [("GET", "/act", 405), ("PUT", "/act", 405), ("POST", "/health", 405), ("POST", "/", 404),
                                                  ("GET", "/act/../../etc/passwd", 404), ("INVENTED", "/act", 405), ("INVENTED", "/", 405)])
def test_another_path_or_method_is_told_what_there_is(server, method, path, status, caplog):
    found, answer = ask(server, b"" if method != "GET" else None, path, method)
    assert found == status and "/act" in answer["error"] and works(server)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("path, status", [("/acts", 404), ("/health", 405), ("/metrics", 405)])
def test_who_sends_a_large_body_to_a_wrong_path_reads_the_answer(hasty, path, status):
    found, answer = ask(hasty, b" " * 1_000_000, path)
    assert found == status and "/act" in answer["error"] and works(hasty)


def test_a_body_in_chunks_is_read_and_one_that_grows_too_large_is_refused(hasty):
    chunks = [body()[i : i + 100] for i in range(0, len(body()), 100)]
    assert ask(hasty, iter(chunks))[0] == 200
    status, answer = ask(hasty, iter([b" " * 50_000] * 4))
    assert status == 413 and "100000 bytes" in answer["error"] and works(hasty)


def test_a_body_that_would_be_enormous_is_refused_before_it_is_sent(hasty):
    with connected(hasty) as connection:
        connection.sendall(head(10**15))
        answer = everything(connection)
    assert answer.startswith(b"HTTP/1.1 413 ") and b"100000 bytes" in answer and works(hasty)


def test_a_body_that_is_announced_as_too_large_and_never_sent_is_called_too_large(hasty):
    with connected(hasty) as connection:
        connection.sendall(head(1_000_000))
        answer = everything(connection)
    assert answer.startswith(b"HTTP/1.1 413 ") and b"100000 bytes" in answer


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


def test_who_does_not_read_the_answers_keeps_no_place(core):
    with PolicyServer(core, port=0, limits=Limits(connections=1, seconds=1)).in_background() as server, socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", server.port))
        deaf.settimeout(0.3)
        with pytest.raises(TimeoutError):  # the server has stopped reading, since its answers are not taken
            while True:
                deaf.sendall(b"GET /metrics HTTP/1.1\r\nHost: robot\r\n\r\n" * 1000)
        wait_until(lambda: works(server))


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


def test_an_address_that_is_taken_is_one_sentence(core, server):
    with pytest.raises(UserError, match=f"port {server.port}, cannot be served at .*another port"):
        PolicyServer(core, port=server.port)


def test_no_host_at_all_is_not_taken_for_everybody(core):
    with pytest.raises(UserError, match="127.0.0.1 for this machine alone"):
        PolicyServer(core, host="", port=0)
