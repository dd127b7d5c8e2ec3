"""A recorded report and a copy of it to change, as fixtures; a test file has them with `pytest_plugins = ["tests.lab_report_fixtures"]`."""

import pytest

from tests.lab_report_runs import copy_of, whole_report


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    return whole_report(tmp_path_factory.mktemp("recorded"))


@pytest.fixture
def report(whole, tmp_path):
    return copy_of(whole, tmp_path)
