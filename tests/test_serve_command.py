"""Properties of `python -m labkit serve`: one parameter names the policy, and a signal ends it."""

import argparse
import os
import signal
import socket
import subprocess
import sys

import pytest

from labkit.commands import serve
from labkit.paths import ROOT
from labkit.serving.client import PolicyClient
from labkit.serving.core import GENERIC, policy_named
from labkit.serving.http import PolicyServer
from tests.serving_stand_ins import PATIENCE

pytest_plugins = ["tests.serving_fixtures"]


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_server_well_from_the_moment_it_says_that_it_serves(core, number):
    server, before = PolicyServer(core, port=0), signal.getsignal(number)
    server.run(on_start=lambda: os.kill(os.getpid(), number))
    assert server.stopping and signal.getsignal(number) is before
    with socket.create_server(("127.0.0.1", server.port)):
        pass


@pytest.mark.parametrize("option", ["--max-body", "--patience", "--deadline-ms"])
@pytest.mark.parametrize("said", ["0", "-1", "nan", "inf", "much"])
def test_an_option_that_is_no_positive_number_is_refused_before_anything_is_loaded(option, said, capsys):
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args([f"{option}={said}"])
    assert option in capsys.readouterr().err
