"""Properties of a lab report's record: it holds what was measured, and says in one sentence what it cannot hold or can no longer read."""

import json
import shutil

import pytest

from labkit.clip_pretraining import Recipe, build_model, build_processor
from labkit.demonstrations import read
from labkit.errors import UserError
from labkit.lab_report import LabReport
from labkit.lab_report.record import RECORD
from labkit.paths import DATA, ROOT
from labkit.serving.core import PolicyCore
from labkit.serving.http import PolicyServer
from labkit.task_specific_vla import policy_from_towers, set_trainable
from labkit.waypoint_regression import STATE, fit, waypoint_samples
from tests.lab_report_runs import SETTINGS, Still, accuracy, compared, page_of, run_folder, runs, used_server

pytest_plugins = ["tests.lab_report_fixtures"]

LEROBOT = ROOT / "tests" / "lerobot_fixture"


def test_a_record_is_read_again_as_it_was_written_and_keeps_its_author(whole, tmp_path):
    again = LabReport(whole.folder)
    assert again.stored == whole.stored and again.stored["author"] == "Ada"
    assert LabReport(whole.folder, author="Grace").stored["author"] == "Grace"
    assert LabReport(tmp_path).stored["author"] == "" and not (tmp_path / RECORD).exists()


def test_a_lerobot_dataset_is_described_too(tmp_path):
    about, report = json.loads((LEROBOT / "meta" / "info.json").read_text()), LabReport(tmp_path)
    report.dataset(LEROBOT)
    splits = report.stored["dataset"]["splits"].values()
    assert sum(split["episodes"] for split in splits) == about["total_episodes"]
    assert sum(split["decisions"] for split in splits) == about["total_frames"]
    report.build()
    assert f"not said: {about['total_episodes']} episodes" in page_of(report).cells


def test_a_dataset_counts_its_failures_but_not_as_successes(tmp_path):
    report = LabReport(tmp_path)
    report.dataset(DATA / "demonstrations" / "align")
    for split, counts in report.stored["dataset"]["splits"].items():
        entries = json.loads((DATA / "demonstrations" / "align" / split / "language_commands.json").read_text())
        assert counts["episodes"] == len(entries) and counts["successes"] == sum(entry["success"] for entry in entries)


def test_a_dataset_with_errors_is_recorded_with_them(report, tmp_path):
    shutil.copytree(DATA / "demonstrations" / "align", tmp_path / "align")
    next((tmp_path / "align" / "train" / "images").iterdir()).unlink()
    report.dataset(tmp_path / "align")
    report.build()
    assert any("is missing" in cell for cell in page_of(report).cells)
    assert any(text.startswith("1. Dataset") and "1 errors" in text for text in report.check())


def test_the_folder_of_a_real_run_is_read_and_agrees_with_its_curves(report, tmp_path):
    clip = build_model(Recipe(width=32, vision_layers=1, text_layers=1, seed=4))
    policy = policy_from_towers(clip.vision_model, clip.text_model, build_processor())
    set_trainable(policy.model, "frozen")
    samples = waypoint_samples(read(DATA / "demonstrations" / "align", "train", limit=4))
    made = fit(policy, samples, samples, folder=tmp_path / "run", epochs=2, batch_size=8, progress=False)
    report.training(tmp_path / "run", epochs=2, batch_size=8)
    stored = report.stored["training"]
    assert stored["curves"] == vars(made) and stored["settings"]["batch_size"] == 8 and stored["settings"]["epochs"] == 2
    report.build()
    assert not any(text.startswith("2. Fine-tuning") for text in report.check())


def refused(report, *arguments, call, **named):
    with pytest.raises(UserError) as error:
        getattr(report, call)(*arguments, **named)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("changes, said", [
    ({"generic": {"a": runs("align", 0.5)}, "fine_tuned": {"a": runs("align", 0.5, first=5)}}, "a: only the same episodes can be paired"),
    ({"generic": {"a": runs("align", 0.5)}, "fine_tuned": {"a": runs("stack", 0.5)}}, "a: only the same episodes can be paired"),
    ({"generic": {"a": runs("align", 0.5)}, "fine_tuned": {"b": runs("align", 0.5)}}, "the generic policy ran a, the fine-tuned one b"),
    ({"generic": {}, "fine_tuned": {}}, "ran nothing"),
    ({"decisions": 0}, "on at least one decision"),
    ({"accuracy": (accuracy(1), {"x": {"error": 1.0, "unit": "m"}})}, "the same axes"),
    ({"accuracy": ({"x": {"error": float("nan"), "unit": "m"}},) * 2}, "not finite"),
])
def test_runs_that_cannot_be_compared_are_refused_and_change_nothing(report, changes, said):
    before = (report.folder / RECORD).read_bytes()
    with pytest.raises(UserError) as error:
        compared(report, **changes)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert (report.folder / RECORD).read_bytes() == before and LabReport(report.folder).stored == report.stored


def test_rollouts_without_response_times_are_refused(report):
    silent = runs("align", 0.5)
    silent = type(silent)(**{**vars(silent), "milliseconds": silent.milliseconds[:0]})
    with pytest.raises(UserError, match="here: response times are missing"):
        compared(report, generic={"here": silent}, fine_tuned={"here": silent})


def test_a_run_or_a_dataset_that_is_not_there_is_refused(report, tmp_path):
    assert f"{tmp_path / STATE} is missing: train with fit(..., folder=" in refused(report, tmp_path, call="training")
    (tmp_path / STATE).write_bytes(b"broken")
    assert "cannot be read" in refused(report, tmp_path, call="training")
    assert "there is no dataset in no/such/folder" in refused(report, "no/such/folder", call="dataset")


def test_settings_that_contradict_the_run_or_are_not_plain_are_refused(report, tmp_path):
    folder = run_folder(tmp_path / "other")
    assert "was trained with loss l1, not mse" in refused(report, folder, call="training", loss="mse")
    assert "towers is list" in refused(report, folder, call="training", towers=[1, 2])
    report.training(folder, **SETTINGS)
    assert report.stored["training"]["settings"] == SETTINGS


def test_a_server_is_recorded_with_what_it_answered_and_refused(tmp_path):
    report = LabReport(tmp_path)
    with used_server() as server:
        report.integration(server, runs("align", 0.8), runs("align", 0.8))
    assert report.stored["integration"]["answers"] == {"200": 22, "422": 3} and report.stored["integration"]["decisions"] == 22


def test_a_server_that_nobody_has_asked_is_refused(report):
    with PolicyCore(Still()) as core, PolicyServer(core, port=0).in_background() as idle:
        with pytest.raises(UserError, match="decided nothing yet"):
            report.integration(idle, runs("align", 0.5), runs("align", 0.5))


@pytest.mark.parametrize("change, said", [
    (lambda stored: stored["training"]["curves"].pop("train"), "part 'training'"),
    (lambda stored: stored["training"]["curves"].update(best_epoch=99), "part 'training'"),
    (lambda stored: stored["training"]["curves"].update(rates=[]), "part 'training'"),
    (lambda stored: stored["training"].update(folder=7), "part 'training'"),
    (lambda stored: stored["comparison"]["rows"]["camera"]["generic"].update(success=["x"] * 40), "part 'comparison'"),
    (lambda stored: stored["comparison"]["rows"]["camera"]["generic"].update(success=[0.5] * 40), "part 'comparison'"),
    (lambda stored: stored["comparison"]["rows"]["camera"]["generic"].update(success=[1] * 40), "part 'comparison'"),
    (lambda stored: stored["comparison"]["rows"]["camera"]["generic"].update(success=[True]), "part 'comparison'"),
    (lambda stored: stored["comparison"]["rows"]["camera"]["generic"].update(task="stack"), "part 'comparison'"),
    (lambda stored: stored["comparison"].update(rows={}), "part 'comparison'"),
    (lambda stored: stored.update(dataset=[]), "part 'dataset'"),
    (lambda stored: stored["dataset"].pop("digest"), "part 'dataset'"),
    (lambda stored: stored["integration"].update(decisions="<b>"), "part 'integration'"),
    (lambda stored: stored["integration"].update(decisions=0), "part 'integration'"),
    (lambda stored: stored["integration"].update(p95=float("nan")), "no record of a lab report"),
    (lambda stored: stored.update(format="another"), "no record of a lab report"),
    (lambda stored: stored.pop("author"), "no record of a lab report"),
])
def test_a_record_that_was_spoilt_is_named_with_its_part(report, change, said):
    path = report.folder / RECORD
    stored = json.loads(path.read_text())
    change(stored)
    path.write_text(json.dumps(stored))
    with pytest.raises(UserError) as error:
        LabReport(report.folder).check()
    assert said in str(error.value) and str(path) in str(error.value) and "record" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 100_000, '{"format": 1e999}', "\x00", "ÿ".encode("latin-1")])
def test_a_file_that_is_no_record_is_named_in_one_sentence_and_not_written_over(tmp_path, content):
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / RECORD).write_bytes(content)
    with pytest.raises(UserError, match=r"report\.json is no record of a lab report .*put a good copy back") as error:
        LabReport(tmp_path)
    assert "\n" not in str(error.value) and (tmp_path / RECORD).read_bytes() == content


def test_a_write_that_fails_leaves_the_record_that_was_there(report, monkeypatch):
    before = (report.folder / RECORD).read_bytes()

    def fails(*_):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", fails)
    with pytest.raises(OSError):
        compared(report, decisions=45)
    assert (report.folder / RECORD).read_bytes() == before and report.stored["comparison"]["accuracy"]["decisions"] == 44
