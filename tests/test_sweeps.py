"""Properties of stored experiments: no point is run twice or taken for another, and each file says where its numbers come from.

The judges are processes that really die, scipy, transformers' own loss, and one stored point that is computed again.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from importlib.metadata import version

import numpy as np
import psutil
import pytest
import torch
from scipy import stats

from labkit import freeze, rollouts, sweeps
from labkit.__main__ import main
from labkit.batches import IGNORED
from labkit.demonstrations import read
from labkit.demonstrations import samples as samples_of
from labkit.errors import UserError
from labkit.experiments import measuring, sft_loss_masking
from labkit.instructions import vocabulary, words
from labkit.paths import DATA
from labkit.processes import course_environment
from labkit.sft import batch_loss, tokenize
from labkit.sweeps import AcrossSeeds, Sweep, load_sweep, mean_interval, run_sweep

STORED = sorted(path.stem for path in sweeps.STORED.glob("*.json"))

# In the folder of the file: `runs` has a line for every point that was run, `deadly` one for what is to die at which point, once.
SQUARES = '''
import json
import os
import signal
import time
from pathlib import Path

ABOUT = "the square of a number"
HERE = Path(__file__).parent


def points():
    return [{"number": number, "seed": seed} for number in (3, 5) for seed in (0, 1, 2)]


def run(point):
    with open(HERE / "runs", "a") as file:
        file.write(json.dumps(point) + "\\n")
    if (HERE / "deadly").exists() and point == points()[3]:
        wait_until_logged(3)
        deadly = (HERE / "deadly").read_text()
        (HERE / "deadly").unlink()
        if deadly == "the sweep":
            (HERE / "pid").write_text(str(os.getpid()))
            os.kill(os.getppid(), getattr(signal, "SIGKILL", signal.SIGTERM))
            time.sleep(600)
        os._exit(1)
    return {"square": point["number"] ** 2, "curve": [0.1 * point["seed"], 1e-17], "by_step": {"10": point["number"]}}


def wait_until_logged(count):
    while sum(path.read_text().count('"result"') for path in (HERE / "unfinished").glob("*")) < count:
        time.sleep(0.01)


def run_point(name, point):
    return run(point)
'''
DRIVER = """
from pathlib import Path

import squares_of_numbers
from labkit import sweeps

if __name__ == "__main__":
    here = Path(__file__).parent
    sweeps.experiment, sweeps._run_point, sweeps.UNFINISHED = lambda name: squares_of_numbers, squares_of_numbers.run_point, here / "unfinished"
    print(sweeps.run_sweep("squares", processes=1, folder=here / "stored", progress=False))
"""


@pytest.fixture
def squares(tmp_path, monkeypatch):
    """An experiment of six points, one process's work in no time, in the place of labkit's own."""
    (tmp_path / "squares_of_numbers.py").write_text(SQUARES)
    (tmp_path / "driver.py").write_text(DRIVER)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("squares_of_numbers")
    monkeypatch.setattr(sweeps, "experiment", lambda name: module)
    monkeypatch.setattr(sweeps, "_run_point", module.run_point, raising=False)
    monkeypatch.setattr(sweeps, "UNFINISHED", tmp_path / "unfinished")
    yield module
    del sys.modules["squares_of_numbers"]


@pytest.fixture
def in_this_process(monkeypatch):
    """Threads in the place of processes, so that many sweeps can be run."""
    monkeypatch.setattr(sweeps, "ProcessPoolExecutor", lambda processes, **options: ThreadPoolExecutor(processes))


def runs(module):
    """The points that were run, in their order."""
    return [json.loads(line) for line in (module.HERE / "runs").read_text().splitlines()] if (module.HERE / "runs").exists() else []


def sweep_squares(module, processes=1, out="stored"):
    return run_sweep("squares", processes, module.HERE / out, progress=False)


def by_a_command(module):
    """The same sweep by a Python of its own."""
    return subprocess.run([sys.executable, module.HERE / "driver.py"], env=course_environment(), capture_output=True, text=True)


def ends_within_a_minute(pid):
    """A process that has ended and that nobody waits for counts as ended."""
    for _ in range(600):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    psutil.Process(pid).kill()
    return False


def log_of(module):
    (log,) = (module.HERE / "unfinished").glob("*")
    return log


def without_date(path):
    stored = json.loads(path.read_text(encoding="utf-8"))
    return {**stored, "about": {name: value for name, value in stored["about"].items() if name != "date"}}


def test_a_sweep_that_is_killed_goes_on_with_the_points_that_are_left_and_stores_the_same(squares):
    (squares.HERE / "deadly").write_text("the sweep")
    killed = by_a_command(squares)
    assert killed.returncode not in (0, 1), killed.stderr
    assert runs(squares) == squares.points()[:4] and not (squares.HERE / "stored").exists()
    assert ends_within_a_minute(int((squares.HERE / "pid").read_text())), "a process of the sweep outlives it"

    resumed = by_a_command(squares)
    assert resumed.returncode == 0, resumed.stderr
    assert runs(squares) == squares.points()[:4] + squares.points()[3:], "only the point that was cut short is run again"

    whole = without_date(squares.HERE / "stored" / "squares.json")
    assert whole["points"] == [{**point, **squares.run(point)} for point in squares.points()]
    for log in (squares.HERE / "unfinished").glob("*"):
        log.unlink()
    assert without_date(sweep_squares(squares, processes=2, out="uninterrupted")) == whole


def test_a_process_that_dies_is_one_sentence_and_its_sweep_goes_on(squares):
    (squares.HERE / "deadly").write_text("the process")
    with pytest.raises(UserError, match="3 of 6 points are kept") as raised:
        sweep_squares(squares)
    assert "--processes" in str(raised.value) and str(raised.value).endswith(".")
    path = sweep_squares(squares)
    assert runs(squares) == squares.points()[:4] + squares.points()[3:]
    assert load_sweep("squares", path.parent).values("square").tolist() == [9, 9, 9, 25, 25, 25]


def stopped_after(module, count):
    """Leave a log with the first `count` points, as a sweep that was interrupted does, and no trace of their runs."""
    original = module.run

    def interrupted(point):
        if len(runs(module)) == count:
            module.wait_until_logged(count)
            raise KeyboardInterrupt
        return original(point)

    module.run = interrupted
    with pytest.raises(KeyboardInterrupt):
        sweep_squares(module)
    module.run = original
    (module.HERE / "runs").unlink()
    assert log_of(module).read_text().count('"result"') == count and not (module.HERE / "stored").exists()


def test_a_log_whose_last_line_was_cut_off_anywhere_loses_that_point_alone(squares, in_this_process):
    stopped_after(squares, 4)
    log, whole = log_of(squares), log_of(squares).read_bytes()
    for cut in range(len(whole.split(b"\n")[-2]) + 2):
        log.write_bytes(whole[: len(whole) - cut])
        path = sweep_squares(squares)
        assert runs(squares) == squares.points()[4 if cut <= 1 else 3 :], cut
        assert load_sweep("squares", path.parent).values("square").tolist() == [9, 9, 9, 25, 25, 25]
        (squares.HERE / "runs").unlink()


def test_other_settings_another_freeze_and_a_changed_experiment_are_run_anew(squares, in_this_process, monkeypatch):
    original = squares.points
    stopped_after(squares, 4)
    for change in ("settings", "one point more", "freeze", "the experiment's file"):
        (squares.HERE / "runs").unlink(missing_ok=True)
        with monkeypatch.context() as changed:
            if change == "settings":
                changed.setattr(squares, "points", lambda: [{**point, "episodes": 100} for point in original()])
            elif change == "one point more":
                changed.setattr(squares, "points", lambda: [*original(), {"number": 7, "seed": 0}])
            elif change == "freeze":
                changed.setattr(freeze, "freeze_hash", lambda: "another")
            else:
                (squares.HERE / "squares_of_numbers.py").write_text(SQUARES.replace("** 2", "** 3"))
            stored = load_sweep("squares", sweep_squares(squares).parent)
            assert runs(squares) == squares.points(), change
            assert [{name: point[name] for name in squares.points()[0]} for point in stored.points] == squares.points()


def test_the_file_never_carries_versions_or_a_day_with_which_its_points_were_not_run(squares, in_this_process, monkeypatch):
    """What is left of a sweep is gone on with under the same versions only, and a finished one is not dated anew."""
    stopped_after(squares, 4)
    with monkeypatch.context() as later:
        later.setattr(sweeps, "version", lambda package: "99.0")
        path = sweep_squares(squares)
        assert load_sweep("squares", path.parent).about["versions"]["torch"] == "99.0" and runs(squares) == squares.points()

    class Tomorrow(date):
        @classmethod
        def today(cls):
            return cls(2100, 1, 1)

    path = sweep_squares(squares)
    (squares.HERE / "runs").unlink(missing_ok=True)
    monkeypatch.setattr(sweeps, "date", Tomorrow)
    about = load_sweep("squares", sweep_squares(squares).parent).about
    assert (about["date"] == "2100-01-01") == (runs(squares) == squares.points())


def test_an_experiment_that_raises_keeps_what_was_finished(squares, in_this_process):
    original = squares.run
    squares.run = lambda point: original(point) if point != squares.points()[-1] else squares.wait_until_logged(5) or 1 / 0
    with pytest.raises(ZeroDivisionError):
        sweep_squares(squares)
    squares.run = original
    sweep_squares(squares)
    assert runs(squares) == squares.points(), "each was run once"


def test_a_stored_file_says_where_its_numbers_come_from(squares, in_this_process):
    about = load_sweep("squares", sweep_squares(squares).parent).about
    assert about["measures"] == squares.ABOUT and about["command"] == "python3 -m labkit sweep squares"
    assert about["freeze"] == freeze.freeze_hash() == freeze.stored_freeze()["freeze"]
    assert abs((date.fromisoformat(about["date"]) - date.today()).days) <= 1
    assert about["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {name: version(name) for name in about["versions"] if name != "python"} == {n: v for n, v in about["versions"].items() if n != "python"}
    assert {"torch", "transformers", "numpy", "mujoco"} <= set(about["versions"])


def test_points_are_stored_in_the_order_of_the_grid_however_they_finish(squares, in_this_process):
    path = sweep_squares(squares, processes=6)
    assert [(p["number"], p["seed"]) for p in json.loads(path.read_text())["points"]] == [(n, s) for n in (3, 5) for s in (0, 1, 2)]
    assert [p.name for p in path.parent.iterdir()] == ["squares.json"]



@pytest.mark.parametrize("values", [[0.5, 0.7, 0.9], [0.4, 0.41], np.linspace(0.3, 0.6, 20), [0.5] * 4])
def test_the_interval_over_seeds_is_scipy_s_t_interval(values):
    mean, low, high = mean_interval(values)
    expected = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values)) if np.ptp(values) else (0.5, 0.5)
    assert np.isclose(mean, np.mean(values)) and np.allclose([low, high], np.clip(expected, 0, 1))


def test_the_interval_over_three_seeds_by_hand():
    """0.50, 0.52, 0.54: deviation 0.02, divided by the root of 3, times 4.3027 (two degrees of freedom)."""
    assert np.allclose(mean_interval([0.50, 0.52, 0.54]), (0.52, 0.52 - 0.049683, 0.52 + 0.049683), atol=1e-6)


def test_the_interval_of_a_share_stays_between_0_and_1_and_one_seed_has_none():
    assert mean_interval([0.0, 0.1])[1:] == (0.0, pytest.approx(0.6853, abs=1e-4)) and mean_interval([0.9, 1.0])[2] == 1.0
    for values in ([], [0.5]):
        with pytest.raises(ValueError, match="at least two"):
            mean_interval(values)


SWEEP = Sweep("example", {}, [
    {"task": task, "seed": seed, "success": {"25": 10 * seed + offset}, "episodes": 50}
    for task, offset in (("stack", 1), ("put", 2)) for seed in (1, 2, 3)
])


def test_points_are_found_by_their_settings_and_an_unknown_setting_is_named():
    assert [p["seed"] for p in SWEEP.where(task="put")] == [1, 2, 3] and len(SWEEP.where()) == 6
    assert SWEEP.values("success.25", task="stack").tolist() == [11, 21, 31] and SWEEP.values("episodes", seed=2).tolist() == [50, 50]
    for settings in ({"task": "pick"}, {"task": "put", "seed": 9}, {"colour": "red"}):
        with pytest.raises(KeyError, match="example"):
            SWEEP.where(**settings)


def test_success_over_seeds_is_the_mean_of_their_rates_with_its_t_interval():
    found = SWEEP.success("success.25", task="stack")
    rates = np.array([11, 21, 31]) / 50
    assert isinstance(found, AcrossSeeds) and found.seeds == 3 and np.isclose(found.rate, rates.mean())
    assert np.allclose(found.interval, np.clip(stats.t.interval(0.95, 2, loc=rates.mean(), scale=stats.sem(rates)), 0, 1))
    for part in ("42 %", "0 to 92 %", "3 seeds"):
        assert part in str(found)


@pytest.mark.parametrize("successes", [0, 7, 10])
def test_seeds_that_agree_are_no_more_certain_than_their_episodes(successes):
    sweep = Sweep("agreeing", {}, [{"seed": seed, "success": successes, "episodes": 10} for seed in range(5)])
    expected = stats.binomtest(5 * successes, 50).proportion_ci(method="wilson")
    assert np.allclose(sweep.success("success").interval, [expected.low, expected.high], atol=1e-6)


def test_what_was_measured_once_has_the_interval_of_its_episodes():
    found = Sweep("once", {}, [{"seed": 0, "success": 7, "episodes": 50}]).success("success")
    assert (found.rate, found.seeds) == (0.14, 1) and found.interval == rollouts.wilson(7, 50) and str(found).endswith("1 seed)")


def test_a_sweep_that_was_never_run_is_one_sentence_that_names_the_command(tmp_path):
    for folder in (tmp_path, str(tmp_path)):
        with pytest.raises(UserError, match="python3 -m labkit sweep nonsense") as raised:
            load_sweep("nonsense", folder)
        assert str(raised.value).endswith(".") and "\n" not in str(raised.value)
    with pytest.raises(UserError, match="there are .*sft_loss_masking"):
        run_sweep("nonsense")



@pytest.fixture
def in_this_environment(monkeypatch):
    monkeypatch.setenv("LABKIT_NO_INSTALL", "1")


def test_the_command_lists_every_experiment_with_its_number_of_points(capsys, in_this_environment):
    assert main(["sweep"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == sweeps.names() and set(STORED) <= set(sweeps.names())
    for line in lines:
        module = sweeps.experiment(line.split(":")[0])
        assert module.ABOUT in line and f"({len(module.points())} points)" in line


def test_the_command_hands_its_arguments_on(monkeypatch, capsys, tmp_path, in_this_environment):
    called = []
    monkeypatch.setattr(sweeps, "run_sweep", lambda *arguments: called.append(arguments) or tmp_path / "x.json")
    assert main(["sweep", "sft_loss_masking", "--processes", "3", "--out", str(tmp_path)]) == 0
    assert main(["sweep", "sft_loss_masking"]) == 0
    assert called == [("sft_loss_masking", 3, str(tmp_path)), ("sft_loss_masking", max(1, os.cpu_count() or 2), sweeps.STORED)]
    assert str(tmp_path / "x.json") in capsys.readouterr().out


@pytest.mark.parametrize("arguments, said", [("nonsense", "there is no sweep 'nonsense'"), ("sft_loss_masking --processes 0", "--processes is 0")])
def test_the_command_says_what_is_wrong_in_one_line(arguments, said, capsys, in_this_environment):
    assert main(["sweep", *arguments.split()]) == 2
    assert re.fullmatch(rf"labkit: .*{said}.*\n", capsys.readouterr().err)



def test_every_experiment_is_stored():
    assert sweeps.names() == STORED


@pytest.mark.parametrize("name", STORED)
def test_a_stored_sweep_has_the_freeze_of_this_checkpoint_and_exactly_the_points_of_its_experiment(name):
    sweep, experiment = load_sweep(name), sweeps.experiment(name)
    assert sweep.about["freeze"] == freeze.freeze_hash(), f"stored for another checkpoint: run {sweep.about['command']} again"
    assert sweep.about["command"] == f"python3 -m labkit sweep {name}" and sweep.about["measures"] == experiment.ABOUT
    declared = experiment.points()
    assert [{setting: point.get(setting) for setting in settings} for point, settings in zip(sweep.points, declared)] == declared
    assert len(sweep.points) == len(declared) == len({json.dumps(point, sort_keys=True) for point in declared})
    assert all(set(point) > set(settings) for point, settings in zip(sweep.points, declared))


@pytest.mark.parametrize("name", STORED)
def test_a_stored_sweep_is_plain_json_and_small(name):
    path = sweeps.STORED / f"{name}.json"
    json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert path.stat().st_size < 500_000



def test_a_module_that_experiments_share_is_no_experiment():
    with pytest.raises(UserError, match="there is no sweep 'measuring'"):
        sweeps.experiment("measuring")


def test_a_thinned_curve_holds_the_mean_of_every_ten_losses_and_of_the_rest():
    assert measuring.thinned([1.0] * 10 + [2.0, 4.0] * 5 + [0.12344]) == [1.0, 3.0, 0.1234] and measuring.thinned([]) == []


def test_successes_are_those_of_the_rollouts(shipped_policy):
    found = rollouts.rollout(shipped_policy, "put", 4, seed=7, progress=False).success
    assert measuring.counted(shipped_policy, "put", 4, seed=7) == found.sum()
    replayed = [d for d in measuring.shipped("replay") if d.task == "put"][:2]
    each = [rollouts.rollout(shipped_policy, "put", 1, seed=d.seed, progress=False).success[0] for d in replayed]
    assert measuring.counted_on_layouts_of(shipped_policy, replayed) == sum(each)



def test_the_stored_counts_of_lesson_1_are_counts():
    for point in load_sweep("sft_loss_masking").points:
        assert list(point["success"]) == [str(step) for step in sft_loss_masking.STEPS]
        assert all(type(n) is int and 0 <= n <= point["episodes"] for n in point["success"].values())
        assert all(type(n) is int and 0 <= n <= point["old_episodes"] for n in point["old"].values())
        assert len(point["loss_curve"]) == max(sft_loss_masking.STEPS) // 10 and point["loss_curve"][-1] < point["loss_curve"][0]


@pytest.fixture
def batch(tiny_policy, samples):
    """Six samples of different lengths, with padding on the left."""
    found = tokenize(tiny_policy, samples)
    assert (found["attention_mask"] == 0).any()
    return found


def test_the_loss_over_every_token_is_transformers_own(tiny_policy, batch):
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    expected = tiny_policy.model(**inputs, labels=labels).loss
    assert torch.isclose(sft_loss_masking.every_token_loss(tiny_policy.model, batch), expected, atol=1e-5)


def test_the_three_losses_count_what_they_are_called_after(tiny_policy, batch):
    """Position after position in double precision."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        scores = tiny_policy.model(**inputs).logits.double().log_softmax(-1)
    image, counted = tiny_policy.model.config.image_token_id, {"action tokens": [], "text and action tokens": [], "every token": []}
    for row, (ids, mask, labels) in enumerate(zip(batch["input_ids"], batch["attention_mask"], batch["labels"])):
        for t in range(1, len(ids)):
            kinds = ["action tokens"] * bool(labels[t] != IGNORED) + ["text and action tokens"] * bool(mask[t] and ids[t] != image)
            for kind in kinds + ["every token"] * bool(mask[t]):
                counted[kind].append(-scores[row, t - 1, ids[t]])
    assert 0 < len(counted["action tokens"]) < len(counted["text and action tokens"]) < len(counted["every token"])
    assert set(sft_loss_masking.LOSSES) == set(counted) and sft_loss_masking.LOSSES["action tokens"] is batch_loss
    for name, loss in sft_loss_masking.LOSSES.items():
        assert torch.isclose(loss(tiny_policy.model, batch).double(), torch.stack(counted[name]).mean(), atol=1e-5), name


@pytest.mark.parametrize("count", [0, 1, 12, 32])
def test_small_talk_is_as_long_as_asked_for_in_words_the_robot_knows_before_the_instruction(count):
    instruction, known = "place the red block on the green cup", set(vocabulary())
    for salt in ("", "train0", "train1"):
        said = sft_loss_masking.with_small_talk(instruction, count, salt)
        talk = said.removesuffix(instruction)
        assert said.endswith(instruction) and said == sft_loss_masking.with_small_talk(instruction, count, salt)
        longest = max(len(sentence.split()) for sentence in sft_loss_masking.SMALL_TALK)
        assert count <= len(talk.split()) < count + longest and set(words(talk)) <= known
    if count:
        assert sft_loss_masking.with_small_talk(instruction, count, "a") != sft_loss_masking.with_small_talk(instruction, count, "b")


def test_training_samples_are_the_shipped_demonstrations_behind_small_talk():
    shipped = samples_of(read(DATA / "demonstrations" / "stack", "train"))
    for count in (0, 32):
        found = sft_loss_masking.training_samples("stack", count)
        assert np.array_equal(found.images, shipped.images) and np.array_equal(found.actions, shipped.actions)
        assert np.array_equal(found.holding, shipped.holding)
        assert all(said.endswith(text) for said, text in zip(found.instructions, shipped.instructions))
        assert (list(found.instructions) == list(shipped.instructions)) == (count == 0)


def test_a_policy_that_hears_small_talk_decides_as_on_those_words(tiny_policy, observations):
    talkative = sft_loss_masking.Talkative(tiny_policy, 12).decide(observations)
    heard = [{**o, "instruction": sft_loss_masking.with_small_talk(o["instruction"], 12)} for o in observations]
    expected, without = tiny_policy.decide(heard), tiny_policy.decide(observations)
    assert np.allclose(talkative.probabilities, expected.probabilities) and np.array_equal(talkative.bins, expected.bins)
    assert not np.allclose(talkative.probabilities, without.probabilities)


# One point of every stored sweep, cheap enough to be computed again.
AGAIN = {
    "sft_loss_masking": {"task": "stack", "loss": "action tokens", "words": 0, "seed": 0},
    "instruction_tuning": {"part": "numbers", "said": "number", "seed": 0},
    "adapters": {"method": "adapter", "placement": "layer", "bottleneck": 16, "init_std": 0.0, "learning_rate": 0.01, "use": "test", "seed": 0},
    "lab_task_specific_vla": {"part": "variants", "task": "forward", "variant": "lora", "seed": 0},
    "lab_deployment": {"part": "caching", "of": "pictures", "scenes": "3 cm", "threshold": 40, "seed": 0},
    "lora": {"part": "rank", "rank": 16, "learning_rate": 1e-3, "task": "forward", "seed": 0},
    "qlora": {"part": "learning", "task": "forward", "targets": "attention", "base": "nf4", "seed": 0},
    "adapters_at_deployment": {"part": "validation", "suite": "ahead", "rank": 16, "targets": "attention", "steps": 50, "learning_rate": 5e-3,
                               "seed": 100},
    "ewc_versus_mixing": {"part": "frontier", "method": "share", "strength": 0.25, "seed": 0},
    "few_shot": {"part": "demonstrations", "method": "lora-16", "demonstrations": 20, "seed": 0},
    "few_shot_rates": {"checkpoint": "tiny", "method": "lora-16", "learning_rate": 3e-3, "seed": 100},
    "qlora_memory": {"model": "stories-15m", "method": "qlora"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STORED)
def test_a_stored_point_computed_again_lies_within_the_intervals_of_its_counts(name):
    """Tens of counts would miss a 95 % interval now and then if they were drawn anew; the same seeds give nearly the same episodes."""
    (stored,) = load_sweep(name).where(**AGAIN[name])
    found = sweeps.experiment(name).run(AGAIN[name])
    assert set(found) == set(stored) - set(AGAIN[name])
    for kind, counts in found.items():
        episodes = stored.get({"success": "episodes"}.get(kind, f"{kind}_episodes"))
        if isinstance(counts, (dict, int)) and episodes:
            again, first = (counts, stored[kind]) if isinstance(counts, dict) else ({"": counts}, {"": stored[kind]})
            for part, (count, before) in {part: (again[part], first[part]) for part in again}.items():
                low, high = rollouts.wilson(before, episodes)
                assert low <= count / episodes <= high, (kind, part, count, before)
    for kind in ("measured", "calculated", "trainable"):
        assert found.get(kind) == stored.get(kind)
    if "loss_curve" in stored:
        assert np.allclose(found["loss_curve"], stored["loss_curve"], rtol=0.1)
