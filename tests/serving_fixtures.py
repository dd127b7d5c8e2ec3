"""The stand-ins of serving_stand_ins.py as fixtures; a test file has them with `pytest_plugins = ["tests.serving_fixtures"]`."""

import pytest

from labkit.serving.core import PolicyCore
from labkit.serving.http import Limits, PolicyServer
from labkit.task_specific_vla import policy_from_clip
from tests.serving_stand_ins import Stub


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
def waypoint_folder(clip_folder, tmp_path_factory):
    """A task-specific policy with random weights that reads two frames, saved."""
    folder = tmp_path_factory.mktemp("served") / "task-specific"
    policy_from_clip(clip_folder, readout="spatial", frames=2).save(folder)
    return folder
