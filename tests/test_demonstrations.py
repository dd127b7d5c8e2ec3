"""Demonstrations: what is recorded is what happened, what is written survives a kill, and the checker finds what we break."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from labkit import demonstrations
from labkit.dataset_check import summary, validate
from labkit.demonstrations import ACTIONS, LANGUAGE, SPLITS, read, samples, write
from labkit.errors import UserError
from labkit.instructions import words
from labkit.paths import DATA, ROOT
from labkit.recording import record, split_of
from labkit.tabletop import Tabletop, Variation
from labkit.tabletop.arm import HIGH, LOW
from labkit.tabletop.experts import EXPERT, next_waypoint

SHIPPED = sorted(path.parent for path in (DATA / "demonstrations").glob("*/dataset.json"))
VERB = """
import argparse, sys, importlib
verb = importlib.import_module("labkit.commands." + sys.argv[1])
parser = argparse.ArgumentParser()
verb.add_arguments(parser)
sys.exit(verb.main(parser.parse_args(sys.argv[2:])))
"""


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def save(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")


def labkit(*arguments, cwd=ROOT, **options):
    return subprocess.Popen([sys.executable, "-c", VERB, *map(str, arguments)], cwd=cwd, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}, **options)


def replay_start(d):
    """A fresh robot at the beginning of a demonstration's episode."""
    conditions = {name: tuple(value) if isinstance(value, list) else value for name, value in d.variation.items()}
    env = Tabletop(d.task, Variation(**conditions))
    observation, _ = env.reset(seed=d.seed)
    env.arm.speed = d.speed
    return env, observation


@pytest.fixture(scope="module")
def recorded():
    return list(record("put", ["expert", "ana"], episodes=42, seed=700_000, shares=(5, 1, 1)))


@pytest.fixture(scope="module")
def written(recorded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets") / "put"
    write(folder, recorded, recipe={"seed": 700_000}, command="a test")
    return folder


@pytest.fixture
def dataset(written, tmp_path):
    return Path(shutil.copytree(written, tmp_path / "put"))


# What is recorded


@pytest.mark.parametrize("task, operator, variation", [
    ("stack", "ben", Variation()),
    ("put", "chi", Variation(camera_shift=(0.16, 0.0, 0.0), light=0.35)),
    ("align", "expert", Variation(bin_yaw=0.5)),
    ("assemble", "expert", Variation()),
])  # fmt: skip
def test_replaying_the_stored_actions_from_the_seed_gives_the_same_pixels(task, operator, variation, tmp_path):
    write(tmp_path / "set", record(task, operator, episodes=2, seed=710_000, variation=variation))
    for d in read(tmp_path / "set", failures=True):
        env, observation = replay_start(d)
        for k in range(len(d)):
            assert observation["instruction"] == d.instruction
            assert np.array_equal(observation["rgb"], d.images[k])
            assert np.abs(observation["depth"] - d.depth[k]).max() <= 0.0005 + 1e-6
            assert bool(observation["holding"]) == d.holding[k]
            assert np.abs(observation["joints"] - d.joints[k]).max() < 1e-6
            observation, reward, terminated, truncated, info = env.step(d.actions[k])
            assert reward == d.rewards[k]
        assert info["success"] == d.success and (terminated or truncated)


def test_images_on_disk_are_the_images_of_the_robot(recorded, written):
    for d in recorded:
        for row in next(entry for entry in load(written / d.split / ACTIONS) if entry["id"] == d.id)["decisions"]:
            k = int(row["rgb"].split("-")[-2])
            with Image.open(written / d.split / row["rgb"]) as image:
                assert (image.format, image.mode, image.size) == ("PNG", "RGB", (48, 48))
                assert np.array_equal(np.array(image), d.images[k])
            with Image.open(written / d.split / row["depth"]) as image:
                assert (image.format, image.mode, image.size) == ("PNG", "I;16", (48, 48))
                assert np.abs(np.array(image) / 1000 - d.depth[k]).max() <= 0.0005 + 1e-6


def test_poses_follow_the_motion_down_to_the_waypoint_and_home(recorded):
    for d in recorded:
        for pose, action in zip(d.poses, d.actions, strict=True):
            assert 5 <= len(pose) <= 12 and pose.shape[1] == 6
            assert np.hypot(*(pose[:, :2] - action[:2]).T).min() < 0.01
            assert np.abs(pose[-1, :3] - (0.0, 0.3, 0.3)).max() < 0.01


def test_reading_gives_back_what_was_written(recorded, written):
    back = {d.id: d for d in read(written, failures=True)}
    assert set(back) == {d.id for d in recorded}
    for d in recorded:
        b = back[d.id]
        for name in ("split", "instruction", "task", "operator", "success", "seed", "speed", "variation", "command"):
            assert getattr(b, name) == getattr(d, name), name
        for name in ("images", "holding", "joints", "actions", "rewards", "seconds"):
            assert np.array_equal(getattr(b, name), getattr(d, name)), name
        assert all(np.array_equal(p, q) for p, q in zip(b.poses, d.poses, strict=True))


def test_every_task_comes_back_with_the_meaning_of_its_instruction(tmp_path):
    tasks = ["pick", "move", "beside", "forward", "spatial", "put_held_out", "navigate", "assemble"]
    made = list(record(tasks, episodes=len(tasks), seed=720_000))
    write(tmp_path / "set", made)
    assert {d.task for d in made} == set(tasks)
    assert {d.id: d.command for d in read(tmp_path / "set", failures=True)} == {d.id: d.command for d in made}
    assert validate(tmp_path / "set") == []


def test_reading_does_not_depend_on_the_structured_command(dataset):
    entries = load(dataset / "train" / LANGUAGE)
    for entry in entries:
        del entry["command"]
    save(dataset / "train" / LANGUAGE, entries)
    assert all(d.command is None for d in read(dataset, "train")) and validate(dataset) == []


def test_samples_are_the_decisions_of_successful_episodes(recorded):
    data = samples(recorded)
    good = [d for d in recorded if d.success]
    assert len(data) == sum(len(d) for d in good) == len(data.images) == len(data.holding) == len(data.actions)
    row = 0
    for d in good:
        for k in range(len(d)):
            x, y, z, roll, pitch, yaw, grip = d.actions[k]
            assert data.actions[row].tolist() == [x, y, z, grip] and data.instructions[row] == d.instruction
            row += 1


def clumsy(env, observation):
    """Presses on the empty corner of the table every other episode, and else does what the expert does."""
    if env.np_random.bit_generator.seed_seq.entropy % 2:
        return np.array([0.24, -0.24, 0.1, 0, 0, 0, 0])
    return next_waypoint(env.episode.command, env.episode.scene, env.start, env.state, EXPERT)


def test_failures_are_kept_marked_and_left_out_of_training(tmp_path):
    made = list(record("pick", clumsy, episodes=10, seed=730_000, shares=(3, 1, 1)))
    assert [d.success for d in made] == [d.seed % 2 == 0 for d in made] and {d.operator for d in made} == {"clumsy"}
    write(tmp_path / "set", made)
    assert validate(tmp_path / "set") == []
    assert len(read(tmp_path / "set")) == 10 and len(read(tmp_path / "set", failures=True)) == len(made)
    assert len(samples(made)) == len(samples(read(tmp_path / "set")))
    assert all(d.success for d in record("pick", clumsy, episodes=3, seed=730_000, keep_failures=False))
    assert len(read(tmp_path / "set", "train", limit=4)) == 4 and read(tmp_path / "set", limit=0) == []


def test_an_operator_who_never_succeeds_is_named():
    with pytest.raises(ValueError, match="'<lambda>' failed 'pick' 50 times"):
        list(record("pick", lambda env, observation: np.array([0.24, -0.24, 0.2, 0, 0, 0, 0]), episodes=1, seed=0))


@pytest.mark.parametrize("options, sentence", [
    (dict(task="fold"), "unknown task 'fold'"), (dict(task="pick", operator="zoe"), "unknown operator 'zoe'"),
    (dict(task="pick", shares=(0, 0, 0)), "three whole numbers"),
])  # fmt: skip
def test_an_impossible_recording_is_refused_in_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        record(episodes=1, seed=0, **options)


# Splits


@pytest.mark.parametrize("shares", [(80, 10, 10), (50, 10, 10), (15, 1, 1), (1, 0, 0), (3, 2, 7)])
def test_shares_are_exact_after_every_round_and_never_far_off(shares):
    total = sum(shares)
    drawn = [split_of(i, shares) for i in range(3 * total)]
    assert [drawn.count(name) for name in SPLITS] == [3 * share for share in shares]
    for n in range(1, 3 * total):
        assert all(abs(drawn[:n].count(name) - n * share / total) < 2 for name, share in zip(SPLITS, shares, strict=True))


def test_no_episode_and_no_scene_is_in_two_splits(recorded):
    homes = {}
    for d in recorded:
        assert homes.setdefault(d.seed, d.split) == d.split
    first = [d.images[0].tobytes() for d in recorded]
    assert len(set(first)) == len(first) and {d.split for d in recorded} == set(SPLITS)


def test_operators_take_turns(recorded):
    done = [d.operator for d in recorded if d.success]
    assert done == ["expert", "ana"] * 21


# Kills and resuming


def names_and_json(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() if path.suffix == ".json" else b"" for path in files}


def assert_sound_and_resumable(folder, whole, resume):
    """Nothing but warnings, every entry of the unfinished set is one of the whole set's, and going on completes it to the byte."""
    if (folder / "dataset.json").is_file():
        assert [str(p) for p in validate(folder) if not p.warning] == []
        for name in SPLITS:
            if (folder / name / LANGUAGE).is_file():
                entries = load(folder / name / LANGUAGE)
                assert entries == load(whole / name / LANGUAGE)[: len(entries)]
    resume()
    assert validate(folder) == []
    assert names_and_json(folder) == names_and_json(whole)


def test_an_interruption_at_every_single_file_operation_loses_at_most_one_episode(recorded, tmp_path, monkeypatch):
    three, recipe = recorded[:4], {"seed": 700_000, "episodes": 4}
    write(tmp_path / "whole", three, recipe=recipe)
    save_png, replace, left = demonstrations._save_png, demonstrations._replace, [10**9]

    def broken_png(path, array):
        left[0] -= 1
        save_png(path, array)
        if left[0] < 0:
            path.write_bytes(path.read_bytes()[:100])
            raise KeyboardInterrupt

    def broken_replace(path, text):
        left[0] -= 1
        if left[0] < 0:
            path.with_name(path.name + ".tmp").write_text(text[: len(text) // 2])
            raise KeyboardInterrupt
        replace(path, text)

    monkeypatch.setattr(demonstrations, "_save_png", broken_png)
    monkeypatch.setattr(demonstrations, "_replace", broken_replace)
    write(tmp_path / "counted", three, recipe=recipe)
    operations = 10**9 - left[0]
    assert operations > 4 * (2 * 2 + 2)
    for operation in range(operations):
        folder = tmp_path / f"cut-{operation}"
        left[0] = operation
        with pytest.raises(KeyboardInterrupt):
            write(folder, three, recipe=recipe)
        left[0] = 10**9

        def resume(folder=folder):
            successes, attempts = demonstrations.progress(folder)
            write(folder, [d for d in three if d.seed - 700_000 >= attempts], recipe=recipe)

        assert_sound_and_resumable(folder, tmp_path / "whole", resume)


def test_kill_9_at_random_moments_and_resuming_gives_the_uninterrupted_dataset(tmp_path):
    command = "record --task stack pick --operator ben --episodes 60 --seed 740000 --split 4 1 1 --out set".split()
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = labkit(*command, cwd=tmp_path / "a")
    _, error = whole.communicate()
    assert whole.returncode == 0, error
    draw, folder, kills = random.Random(20), tmp_path / "b" / "set", 0
    for _ in range(3):
        process = labkit(*command, cwd=tmp_path / "b")
        before = len(list(folder.rglob("*.png")))
        while process.poll() is None and len(list(folder.rglob("*.png"))) == before:
            time.sleep(0.002)
        time.sleep(draw.uniform(0.0, 0.5))
        process.kill()
        process.communicate()
        kills += process.returncode != 0
        assert [str(p) for p in validate(folder) if not p.warning] == []
    assert kills >= 2

    def resume():
        process = labkit(*command, cwd=tmp_path / "b")
        output, error = process.communicate()
        assert process.returncode == 0, error
        assert "| set | 40 | 10 | 10 |" in output

    assert_sound_and_resumable(folder, tmp_path / "a" / "set", resume)


def test_a_longer_recording_goes_on_and_another_recipe_is_refused(tmp_path):
    def make(episodes, seed, task="pick"):
        recipe = {"seed": seed, "episodes": episodes, "tasks": [task]}
        done = demonstrations.progress(tmp_path / "set")
        return write(tmp_path / "set", record(task, episodes=episodes, seed=seed, done=done), recipe=recipe)

    with pytest.raises(ValueError, match="no scene"):
        list(write(tmp_path / "set", record("stack", episodes=1, seed=1, variation=Variation(objects=1)), recipe={"tasks": ["stack"]}))
    make(3, 750_000)
    assert make(6, 750_000)["counts"]["train"]["episodes"] == 5
    write(tmp_path / "once", record("pick", episodes=6, seed=750_000), recipe={"seed": 750_000, "episodes": 6, "tasks": ["pick"]})
    assert names_and_json(tmp_path / "set") == names_and_json(tmp_path / "once")
    with pytest.raises(UserError, match="recorded with seed 750000, not 760000"):
        make(6, 760_000)
    with pytest.raises(UserError, match='tasks \\["pick"\\], not \\["put"\\]'):
        make(6, 750_000, "put")
    with pytest.raises(UserError, match="recording of 6 episodes, more than 3"):
        make(3, 750_000)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(UserError, match="not empty"):
        write(tmp_path / "other", [])
    assert names_and_json(tmp_path / "set") == names_and_json(tmp_path / "once")


# The checker. A fault breaks one episode of a dataset and says (file, place, message) of what must be found.


def edit(file, id, change):
    entries = load(file)
    found = [entry for entry in entries if entry["id"] == id]
    change(found[0])
    save(file, entries)


def decision(change):
    def fault(folder, id):
        edit(folder / "train" / ACTIONS, id, lambda entry: change(entry["decisions"][0]))
        return f"train/{ACTIONS}", f"({id}), decision 0"
    return fault


def spoken(**changes):
    def fault(folder, id):
        edit(folder / "train" / LANGUAGE, id, lambda entry: entry.update(changes))
        return f"train/{LANGUAGE}", f"({id})"
    return fault


def image(change, kind="rgb"):
    def fault(folder, id):
        change(folder / "train" / "images" / f"{id}-0-{kind}.png")
        return f"train/images/{id}-0-{kind}.png", f"({id}), decision 0"
    return fault


def move_to_validation(folder, id, new_id):
    for file in (LANGUAGE, ACTIONS):
        entry = next(entry for entry in load(folder / "train" / file) if entry["id"] == id)
        save(folder / "validation" / file, [*load(folder / "validation" / file), {**entry, "id": new_id}])
    for path in (folder / "train" / "images").glob(f"{id}-*"):
        shutil.copy(path, folder / "validation" / "images")
    return f"validation/{LANGUAGE}", f"({new_id})"


def duplicate(folder, id):
    for file in (LANGUAGE, ACTIONS):
        entries = load(folder / "train" / file)
        save(folder / "train" / file, [*entries, *(entry for entry in entries if entry["id"] == id)])
    return f"train/{LANGUAGE}", f"({id})"


def remove(file):
    def fault(folder, id):
        save(folder / "train" / file, [entry for entry in load(folder / "train" / file) if entry["id"] != id])
        return f"train/{LANGUAGE if file == ACTIONS else ACTIONS}", f"({id})"
    return fault


def unknown_split(folder, id):
    shutil.copytree(folder / "test", folder / "trian")
    return "trian", ""


def break_json(folder, id):
    path = folder / "test" / LANGUAGE
    path.write_text(path.read_text()[:-20])
    return f"test/{LANGUAGE}", ""


def delete_json(folder, id):
    (folder / "test" / ACTIONS).unlink()
    return f"test/{ACTIONS}", ""


FAULTS = {
    "missing image": (image(Path.unlink), "is missing"),
    "missing depth": (image(Path.unlink, "depth"), "is missing"),
    "unreadable PNG": (image(lambda path: path.write_bytes(path.read_bytes()[:200])), "cannot be read"),
    "text for a PNG": (image(lambda path: path.write_text("hello"), "depth"), "cannot be read"),
    "wrong size": (image(lambda path: Image.new("RGB", (64, 48)).save(path)), "64 x 48 pixels, expected 48 x 48"),
    "grey image": (image(lambda path: Image.new("L", (48, 48)).save(path)), "expected RGB"),
    "8-bit depth": (image(lambda path: Image.new("L", (48, 48)).save(path), "depth"), "16 bits"),
    "a JPEG": (image(lambda path: Image.new("RGB", (48, 48)).save(path, "JPEG")), "is a JPEG file"),
    "wrong number of joints": (decision(lambda row: row["joints"].pop()), "joints: 5 numbers, expected 6 (x y z roll pitch yaw)"),
    "NaN": (decision(lambda row: row["action"].__setitem__(1, float("nan"))), "action: y is nan"),
    "infinite joint": (decision(lambda row: row["joints"].__setitem__(2, float("inf"))), "joints: z is inf"),
    "a word for a number": (decision(lambda row: row["end_effector"][3].__setitem__(0, "left")), "end_effector 3: x is 'left'"),
    "outside the workspace": (decision(lambda row: row["action"].__setitem__(2, 0.9)), "z is 0.9 m, outside the workspace (0 to 0.3 m)"),
    "wrong action width": (decision(lambda row: row["action"].pop()), "action: 6 numbers, expected 7"),
    "file elsewhere": (decision(lambda row: row.update(rgb="../secret.png")), "expected a file in images/"),
    "no sensor": (decision(lambda row: row.pop("holding")), "holding is None"),
    "empty instruction": (spoken(instruction="  "), "empty instruction"),
    "no success flag": (spoken(success=None), "success is None"),
    "success that is none": (spoken(success=False), None),
    "duplicate id": (duplicate, "duplicate id"),
    "episode in two splits": (lambda folder, id: move_to_validation(folder, id, id), "in two splits"),
    "scene in two splits": (lambda folder, id: move_to_validation(folder, id, id + "-again"), "in two splits"),
    "no action entry": (remove(ACTIONS), f"no entry in {ACTIONS}"),
    "no language entry": (remove(LANGUAGE), f"no entry in {LANGUAGE}"),
    "unknown split": (unknown_split, "unknown split"),
    "broken JSON": (break_json, "is not JSON"),
    "missing JSON": (delete_json, "is missing"),
}


@pytest.fixture
def episodes(dataset):
    """Ids of training episodes that succeeded, one for each fault."""
    return [entry["id"] for entry in load(dataset / "train" / LANGUAGE) if entry["success"]]


def inject(name, folder, id):
    fault, message = FAULTS[name]
    file, place = fault(folder, id)
    if name == "success that is none":
        return f"train/{ACTIONS}", f"({id})", "the last reward is 1.0"
    return file, place, message


def is_found(expected, problems):
    file, place, message = expected
    return any(p.file == file and place in p.place and message in p.message and not p.warning for p in problems)


def assert_places_are_right(folder, problems):
    """The entry that a problem names is the entry that has the id it names."""
    for p in problems:
        found = re.search(r"entry (\d+) \(([^)]+)\)", p.place)
        if found:
            file = p.file if p.file.endswith(".json") else f"{p.file.split('/')[0]}/{ACTIONS}"
            assert load(folder / file)[int(found[1])]["id"] == found[2]
        assert len(p.message) > 10 and (p.place or p.file)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_alone_is_found_with_its_file_its_entry_and_a_fix(name, dataset, episodes):
    assert validate(dataset) == []
    expected = inject(name, dataset, episodes[3])
    problems = validate(dataset)
    errors = [p for p in problems if not p.warning]
    assert is_found(expected, problems), [str(p) for p in problems]
    assert all(episodes[3] in str(p) or not p.place or "test/" in p.file for p in errors), [str(p) for p in errors]
    assert len(errors) <= 3
    assert_places_are_right(dataset, problems)


def test_all_faults_together_are_all_found(dataset, episodes):
    assert len(episodes) >= len(FAULTS)
    expected = {name: inject(name, dataset, id) for name, id in zip(FAULTS, episodes, strict=False)}
    problems = validate(dataset)
    assert [name for name in FAULTS if not is_found(expected[name], problems)] == []
    assert_places_are_right(dataset, problems)


def test_images_that_no_entry_names_and_missing_words_are_warnings(dataset):
    Image.new("RGB", (48, 48)).save(dataset / "train" / "images" / "stray.png")
    id = load(dataset / "test" / LANGUAGE)[0]["id"]
    edit(dataset / "test" / LANGUAGE, id, lambda entry: entry.update(instruction="put the turquoise block down"))
    problems = validate(dataset)
    assert [p.file for p in problems] == ["train/images/stray.png", f"test/{LANGUAGE}"] and all(p.warning for p in problems)
    assert "turquoise" in problems[1].message


def test_the_lab_sheets_folder_without_our_extra_file_can_be_used(dataset):
    (dataset / "dataset.json").unlink()
    assert all(p.warning for p in validate(dataset))
    assert len(read(dataset)) == 42


def test_no_damage_to_the_json_stops_the_checker(dataset):
    """Numbers, texts and containers in random places are replaced by something else, or dropped."""
    draw = random.Random(4)
    originals = {(split, name): load(dataset / split / name) for split in ("train", "validation") for name in (LANGUAGE, ACTIONS)}
    junk = [None, True, -1, 10**400, float("nan"), "", "\0", "x" * 5000, [], [[]], {}, {"id": []}]

    def damage(node):
        while isinstance(node, (dict, list)) and node:
            key = draw.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if draw.random() < 0.35 or not isinstance(node[key], (dict, list)) or not node[key]:
                if draw.random() < 0.2:
                    del node[key]
                else:
                    node[key] = draw.choice(junk)
                return
            node = node[key]

    for _ in range(60):
        for (split, name), content in originals.items():
            content = json.loads(json.dumps(content))
            for _ in range(3):
                damage(content)
            save(dataset / split / name, content)
        validate(dataset)


def test_reading_a_broken_dataset_names_file_entry_and_the_checker(dataset, tmp_path):
    first = load(dataset / "train" / LANGUAGE)[0]["id"]
    decision(lambda row: row["joints"].pop())(dataset, first)
    with pytest.raises(UserError, match=f"actions.json, episode {first} .*validate"):
        read(dataset)
    break_json(dataset, "")
    with pytest.raises(UserError, match="language_commands.json is not JSON"):
        read(dataset, "test")
    with pytest.raises(UserError, match="no dataset in .*nowhere"):
        read(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="unknown split 'trian'; the splits are train, validation, test"):
        read(dataset, "trian")


# The commands


def test_validate_prints_the_problems_counts_them_and_sets_the_exit_code(dataset, written, tmp_path, capsys, monkeypatch):
    import argparse

    from labkit.commands import validate as verb

    def run(*arguments):
        parser = argparse.ArgumentParser()
        verb.add_arguments(parser)
        code = verb.main(parser.parse_args(list(map(str, arguments))))
        return code, capsys.readouterr().out

    code, out = run(written)
    assert code == 0 and "| put | 30 | 6 | 6 |" in out
    id = load(dataset / "train" / LANGUAGE)[2]["id"]
    decision(lambda row: row["action"].pop())(dataset, id)
    code, out = run(dataset, written)
    assert code == 1 and f"actions.json, entry 2 ({id}), decision 0: action: 6 numbers" in out and "1 problem, 0 warnings" in out
    code, out = run("--json", dataset)
    assert code == 1 and [p["file"] for p in json.loads(out)["problems"]] == [f"train/{ACTIONS}"]
    with pytest.raises(UserError, match="no dataset in .*nowhere"):
        run(tmp_path / "nowhere")


# What is shipped


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_a_shipped_dataset_is_sound_and_in_the_workspace(folder):
    assert validate(folder) == []
    held, about = summary(folder), load(folder / "dataset.json")
    assert held["unknown_words"] == {} and about["complete"] and about["counts"] == held["counts"]
    data = samples(read(folder, "train"))
    assert ((data.actions >= LOW[[0, 1, 2, 6]]) & (data.actions <= HIGH[[0, 1, 2, 6]])).all()
    assert all(words(sentence) for sentence in data.instructions)


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_a_shipped_dataset_is_of_this_environment(folder):
    """Sentence, picture and outcome come out again; the picture is compared loosely, since another processor rounds differently."""
    for d in read(folder, "test", limit=4):
        env, observation = replay_start(d)
        assert observation["instruction"] == d.instruction
        assert (observation["rgb"] == d.images[0]).mean() > 0.99
        for action in d.actions:
            *_, info = env.step(action)
        assert info["success"]


def test_shipped_datasets_share_no_episode_with_each_other_or_with_evaluation():
    seeds = [entry["seed"] for folder in SHIPPED for split in SPLITS for entry in load(folder / split / LANGUAGE)]
    assert len(set(seeds)) == len(seeds) > 0
    assert min(seeds) >= 100_000 and max(seeds) < 1_000_000


def test_the_readme_of_the_datasets_lists_every_command_and_the_true_counts():
    from labkit.commands.record import row

    text = (DATA / "demonstrations" / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^python3 -m labkit record .*$", text, re.MULTILINE)
    assert sorted(commands) == sorted(load(folder / "dataset.json")["command"] for folder in SHIPPED)
    for folder in SHIPPED:
        assert row(folder, summary(folder)) in text


def test_the_shipped_datasets_are_small():
    assert sum(summary(folder)["kilobytes"] for folder in SHIPPED) < 6000
