"""Properties of grading on a Dask cluster: the same records as on one machine, each once, whatever becomes of the cluster's processes.

The cluster is a real scheduler with two worker processes on this machine; the judge is a local run.
"""

import os
import signal
from collections import Counter
from dataclasses import replace

import psutil
import pytest

from labkit.__main__ import main
from labkit.errors import UserError
from labkit.grading.cluster import grade_on_cluster
from labkit.grading.grade import grade_all, ungraded
from labkit.grading.results import read_records
from labkit.grading.sandbox import Isolation
from tests.grading_runs import (
    SECRET,
    assert_nothing_left,
    class_of,
    course,
    jobs_of,
    needs_zygote,
    processes_of,
    quick_imports,
    records,
    wait_for,
)  # fmt: skip

distributed = pytest.importorskip("distributed", reason="Dask is not installed: pip install distributed")
COUNT = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the submissions of a class; zygotes start quickly, and none may be left when all tests of this file are done."""
    needs_zygote()
    folder = tmp_path_factory.mktemp("cluster")
    with pytest.MonkeyPatch.context() as patch:
        place = quick_imports(patch, folder)
        class_of(folder / "class", COUNT)
        yield folder
        assert_nothing_left(place, folders=False)


@pytest.fixture(scope="module")
def cluster(folder):
    with distributed.LocalCluster(2, threads_per_worker=1, dashboard_address=":0", silence_logs="CRITICAL", local_directory=folder) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def by(folder):
    return course()


@pytest.fixture(scope="module")
def whole(folder, by):
    """The records of a local run."""
    assert grade_all(jobs_of(folder / "class", by), by, folder / "whole", 1) == []
    return records(folder / "whole")


def test_a_worker_process_that_is_killed_in_the_middle_loses_and_doubles_nothing(folder, by, whole, cluster, tmp_path):
    with distributed.Client(cluster.scheduler_address) as client:
        numbers = client.run(os.getpid)
    assert len(set(numbers.values())) == 2
    seen, zygotes = Counter(), []

    def kill_one(graded):
        seen[graded.student] += 1
        if sum(seen.values()) == 3:
            # One that is grading: it has a zygote by then.
            victim = next(process for process in map(psutil.Process, numbers.values()) if zygotes_of(process))
            zygotes.extend(zygotes_of(victim))
            victim.send_signal(signal.SIGKILL)

    assert grade_on_cluster(jobs_of(folder / "class", by), by, tmp_path, cluster.scheduler_address, kill_one) == []
    assert seen == Counter({f"student{number:02}": 1 for number in range(COUNT)})
    assert records(tmp_path) == whole
    assert zygotes and ungraded(jobs_of(folder / "class", by), tmp_path) == []
    wait_for(lambda: not any(zygote in processes_of(folder) for zygote in zygotes))


def zygotes_of(process):
    """The zygote processes that a worker process of the cluster has started."""
    return [child for child in process.children(recursive=True) if "labkit.grading.zygote" in child.cmdline()]


def test_the_command_takes_a_scheduler_and_goes_on_where_it_was(folder, whole, cluster, tmp_path, monkeypatch, capsys):
    (tmp_path / "lora.toml").write_text('name = "lora"\ntitle = "LoRA"\nnotebooks = ["04"]\n')
    (tmp_path / "secret").write_text(SECRET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LABKIT_NO_INSTALL", "1")
    arguments = ["grade", str(folder / "class"), "--out", "out", "--assignment", "lora.toml", "--secret", "secret", "--no-feedback",
                 "--scheduler", cluster.scheduler_address]  # fmt: skip
    assert main([*arguments, "--student", "student02"]) == 0
    assert [record.student for record in read_records(tmp_path / "out")] == ["student02"]
    assert main(arguments) == 0 and f"{COUNT} submissions, 1 graded already" in capsys.readouterr().out
    assert [(record.student, record.verdicts) for record in read_records(tmp_path / "out")] == [
        (record.student, record.verdicts) for record in read_records(folder / "whole")]


def test_what_fails_there_is_said_for_its_student_alone(folder, by, whole, cluster, tmp_path):
    first, second, *_ = jobs_of(folder / "class", by)
    broken = replace(first, cells=None)
    (sentence,) = grade_on_cluster([broken, second], by, tmp_path, cluster.scheduler_address)
    assert sentence.startswith("student00 could not be graded (TypeError") and sentence.endswith("run the command again.")
    assert records(tmp_path) == {"student01.json": whole["student01.json"]}


def test_an_isolation_that_a_machine_of_the_cluster_does_not_offer_is_refused_there(folder, by, cluster, tmp_path):
    job = jobs_of(folder / "class", by)[0]
    (sentence,) = grade_on_cluster([job], replace(by, isolation=Isolation("stronger")), tmp_path, cluster.scheduler_address)
    assert "'stronger' is no tier of isolation" in sentence and not (tmp_path / "submissions").exists()


def test_a_scheduler_without_workers_is_refused(folder, by, tmp_path):
    with distributed.LocalCluster(n_workers=0, dashboard_address=":0", silence_logs="CRITICAL") as empty:
        with pytest.raises(UserError, match=f"{empty.scheduler_address} has no worker: start some with `dask worker"):
            grade_on_cluster(jobs_of(folder / "class", by), by, tmp_path, empty.scheduler_address)
