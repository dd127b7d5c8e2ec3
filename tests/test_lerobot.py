"""LeRobot datasets: what is exported comes back to the last bit, other robots' sets are read, and every fault gets its sentence.

The folder lerobot_fixture/ was written by LeRobot's own writer; `python3 -m labkit.lerobot_check` compares with the real library.
"""

import dataclasses
import importlib
import io
import json
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from labkit import dataset_check, lerobot, lerobot_files
from labkit import demonstrations as sheet
from labkit.errors import UserError
from labkit.paths import DATA
from labkit.recording import SHARES, split_of

FIXTURE = Path(__file__).parent / "lerobot_fixture"
DATA_FILE, EPISODES_FILE = "data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet"


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def edit_json(folder, **changes):
    path = folder / "meta/info.json"
    path.write_text(json.dumps(load(path) | changes), encoding="utf-8")


def edit_table(path, change):
    """Read a parquet file as a list of rows, let `change` alter them, and write them back."""
    rows = pq.read_table(path).to_pylist()
    pq.write_table(pa.Table.from_pylist(change(rows) or rows), path)


def same(a, b):
    """Are two demonstrations the same in every field, to the last bit and dtype?"""
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if field.name == "poses":
            assert len(x) == len(y) and all(np.array_equal(p, q) for p, q in zip(x, y))
        elif isinstance(x, np.ndarray):
            assert x.dtype == y.dtype and np.array_equal(x, y), field.name
        else:
            assert x == y, field.name
    return True


@pytest.fixture(scope="module")
def ours():
    """Demonstrations of several datasets: failures, steps in the command, a dim room, a moved camera, three operators, all splits."""
    found = []
    for name, split, count in (("assemble", "train", 3), ("stack_operators", "train", None), ("dim", "validation", 2), ("camera", "test", 2),
                               ("align", "test", 1)):
        read = sheet.read(DATA / "demonstrations" / name, split, failures=True)
        failed = [d for d in read if not d.success]
        found += read[:count] if count else read[:4] + failed
    return sorted(found, key=lambda d: sheet.SPLITS.index(d.split))


@pytest.fixture(scope="module")
def exported(ours, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets") / "ours"
    lerobot.export(folder, ours)
    return folder


# There and back


def test_what_is_exported_comes_back_the_same_to_the_last_bit(ours, exported):
    back = lerobot.demonstrations(exported)
    assert any(not d.success for d in ours) and any(d.variation for d in ours) and any(d.command.steps for d in ours)
    assert len({d.operator for d in ours}) > 2 and len({d.split for d in ours}) == 3
    assert len(back) == len(ours) and all(same(a, b) for a, b in zip(ours, back))
    assert lerobot.validate(exported) == []


def test_an_episode_without_seed_and_command_comes_back_without_them(ours, tmp_path):
    bare = [dataclasses.replace(d, seed=None, command=None) for d in ours[:2]]
    lerobot.export(tmp_path / "set", bare)
    assert all(same(a, b) for a, b in zip(bare, lerobot.demonstrations(tmp_path / "set")))
    assert pq.read_schema(tmp_path / "set" / EPISODES_FILE).field("labkit/seed").type == pa.int64()


def test_episodes_are_sorted_by_split_and_info_gives_the_ranges(ours, tmp_path):
    info = lerobot.export(tmp_path / "set", ours[::-1])
    order = [d.split for d in lerobot.demonstrations(tmp_path / "set")]
    assert order == sorted(order, key=sheet.SPLITS.index)
    for split, text in info["splits"].items():
        first, last = map(int, text.split(":"))
        assert order[first:last] == [split] * order.count(split)
    assert load(tmp_path / "set/meta/info.json") == info


def test_a_large_export_goes_into_several_files_and_chunks_and_is_read_whole(ours, tmp_path, monkeypatch):
    monkeypatch.setattr(lerobot, "_FILES_A_CHUNK", 2)
    lerobot.export(tmp_path / "set", ours, file_megabytes=0.01)
    files = sorted(path.relative_to(tmp_path / "set/data").as_posix() for path in (tmp_path / "set/data").rglob("*.parquet"))
    assert len(files) > 3 and files[:3] == ["chunk-000/file-000.parquet", "chunk-000/file-001.parquet", "chunk-001/file-000.parquet"]
    assert lerobot.validate(tmp_path / "set") == []
    assert all(same(a, b) for a, b in zip(ours, lerobot.demonstrations(tmp_path / "set")))


def test_the_same_export_has_the_same_bytes(ours, exported, tmp_path):
    lerobot.export(tmp_path / "again", ours)
    files = sorted(path.relative_to(exported) for path in exported.rglob("*") if path.is_file())
    assert len(files) == 5 and all((exported / file).read_bytes() == (tmp_path / "again" / file).read_bytes() for file in files)


def test_without_depth_the_rest_comes_back(ours, tmp_path):
    lerobot.export(tmp_path / "set", ours[:3], depth=False)
    back = lerobot.demonstrations(tmp_path / "set")
    assert all(same(dataclasses.replace(a, depth=np.zeros_like(a.depth)), b) for a, b in zip(ours, back))
    assert lerobot.DEPTH not in pq.read_schema(tmp_path / "set" / DATA_FILE).names


# The format, as https://huggingface.co/docs/lerobot/lerobot-dataset-v3 and the library's own files have it


def test_columns_are_those_of_info_json_and_of_the_types_that_lerobot_writes(exported):
    info, schema = load(exported / "meta/info.json"), pq.read_schema(exported / DATA_FILE)
    assert schema.names == list(info["features"])
    theirs = pq.read_schema(FIXTURE / DATA_FILE)
    # LeRobot names the list's element "element", pyarrow "item" or "element": a name within parquet that no reader asks for.
    plain = {"timestamp", "frame_index", "episode_index", "index", "task_index", lerobot.CAMERA}
    for name in plain:
        assert schema.field(name).type == theirs.field("observation.images.wrist" if name == lerobot.CAMERA else name).type
    for name in ("observation.state", "action"):
        assert (schema.field(name).type.value_type, schema.field(name).type.list_size) == (pa.float32(), 7)
        assert isinstance(theirs.field(name).type, type(schema.field(name).type))
    described = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    expected = json.loads(theirs.metadata[b"huggingface"])["info"]["features"]
    assert described["timestamp"] == expected["timestamp"] and described[lerobot.CAMERA] == expected["observation.images.wrist"]
    assert described["action"] == expected["action"] | {"length": 7}


def test_info_and_episodes_have_every_key_that_lerobot_writes(exported):
    info, theirs = load(exported / "meta/info.json"), load(FIXTURE / "meta/info.json")
    assert set(theirs) <= set(info) and info["codebase_version"] == theirs["codebase_version"] and info["data_path"] == theirs["data_path"]
    mine, their = (set(pq.read_schema(folder / EPISODES_FILE).names) for folder in (exported, FIXTURE))

    def swapped(name):
        return name.replace("images.wrist", "images.camera")

    assert {swapped(name) for name in their} <= mine
    statistics = load(exported / "meta/stats.json")
    for key, value in load(FIXTURE / "meta/stats.json").items():
        assert set(statistics[swapped(key)]) == set(value)
    assert np.shape(statistics[lerobot.CAMERA]["mean"]) == (3, 1, 1) and np.shape(statistics[lerobot.DEPTH]["mean"]) == (1, 1, 1)


def test_the_sentences_are_the_index_that_pandas_makes_of_tasks_parquet(exported, ours):
    table = pq.read_table(exported / "meta/tasks.parquet")
    assert json.loads(table.schema.metadata[b"pandas"])["index_columns"] == ["task"]
    assert table["task_index"].to_pylist() == list(range(len(table))) and set(table["task"].to_pylist()) == {d.instruction for d in ours}


def test_statistics_are_those_of_the_numbers(ours, exported):
    statistics, depth = load(exported / "meta/stats.json"), np.concatenate([np.rint(d.depth * 1000) for d in ours])
    pictures = np.concatenate([d.images for d in ours]).reshape(-1, 3) / 255
    state = np.concatenate([np.column_stack([d.joints, d.holding]) for d in ours]).astype(np.float32).astype(float)
    for key, values in ((lerobot.CAMERA, pictures), (lerobot.DEPTH, depth.reshape(-1, 1)), ("observation.state", state)):
        found = {name: np.ravel(value) for name, value in statistics[key].items()}
        for name, expected in (("min", values.min(0)), ("max", values.max(0)), ("mean", values.mean(0)), ("std", values.std(0))):
            assert np.allclose(found[name], expected, rtol=1e-6, atol=1e-9), (key, name)
        for name, share in (("q01", 0.01), ("q10", 0.1), ("q50", 0.5), ("q90", 0.9), ("q99", 0.99)):
            below, up_to = (values < found[name] - 1e-9).mean(0), (values <= found[name] + 1e-9).mean(0)
            assert (below <= share).all() and (up_to >= share - 1e-12).all(), (key, name)
    rows = pq.read_table(exported / EPISODES_FILE).to_pylist()
    assert all(np.allclose(row["stats/action/max"], d.actions.max(0), atol=1e-6) for row, d in zip(rows, ours))
    assert statistics["action"]["count"] == [sum(map(len, ours))]


# What cannot be written


def test_an_export_refuses_a_folder_that_holds_something_and_what_is_no_dataset(ours, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="full is not empty"):
        lerobot.export(tmp_path / "full", ours)
    broken = dataclasses.replace(ours[0], actions=np.full_like(ours[0].actions, np.nan))
    for wrong, said in (([], "no demonstrations"), ([ours[0], ours[0]], "comes twice"), ([broken], "not finite")):
        with pytest.raises(ValueError, match=said):
            lerobot.export(tmp_path / "other", wrong)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_an_export_that_is_cut_off_leaves_no_folder_and_can_be_repeated(ours, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(lerobot, "_write_tasks", killed)
        lerobot.export(tmp_path / "set", ours[:2])
    assert not (tmp_path / "set").exists()
    lerobot.export(tmp_path / "set", ours[:2])
    assert lerobot.validate(tmp_path / "set") == [] and [path.name for path in tmp_path.iterdir()] == ["set"]


# Other robots


def test_a_set_that_lerobot_wrote_is_read_to_the_last_number():
    """The frames follow from their episode and place, by the rule that made them."""
    assert lerobot.validate(FIXTURE) == [] and "lerobot 0." in (FIXTURE / "README.md").read_text()
    found = lerobot.read(FIXTURE)
    assert (found.robot, found.fps, found.camera, found.cameras) == ("invented", 10.0, "wrist", ("wrist",))
    assert found.action_names == ("motor 0", "motor 1", "motor 2") and len(found.state_names) == 5
    assert [e.instruction for e in found.episodes] == ["pick up the screw", "hand it over"] and {e.split for e in found.episodes} == {"train"}
    y, x = np.mgrid[:16, :16]
    for e, episode in enumerate(found.episodes):
        assert episode.images.shape == (3, 16, 16, 3) and episode.success and not episode.holding.any()
        assert np.allclose(episode.seconds, [0, 0.1, 0.2])
        for k in range(3):
            assert np.array_equal(episode.images[k], np.stack([(8 * y + 40 * e) % 256, (8 * x + 10 * k) % 256, y + x], -1))
            assert np.array_equal(episode.actions[k], [0 - e + k / 16, 0.25 - e + k / 16, 0.5 - e + k / 16])
            assert np.array_equal(episode.state[k], np.arange(5) / 8 + e - k)
            assert np.allclose(episode.depth[k], (500 + 100 * e + 10 * k + 7 * y + x) / 1000, atol=1e-6)


def encoded(picture, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, kind)
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.fixture
def foreign(tmp_path):
    """A robot with two cameras of other sizes, 4 wide states, 9 wide actions in double precision, 30 frames a second, in several files."""
    folder, rng = tmp_path / "kitchen", np.random.default_rng(5)
    lengths, tasks = [4, 2, 3, 5, 2], [[0] * 4, [1] * 2, [0] * 3, [1, 1, 0, 0, 0], [2] * 2]
    files = [(0, 0), (0, 0), (0, 1), (1, 0), (1, 0)]
    first, episodes, rows = 0, [], {}
    for e, (n, told, (chunk, file)) in enumerate(zip(lengths, tasks, files)):
        for k in range(n):
            rows.setdefault((chunk, file), []).append({
                "observation.images.front": encoded(rng.integers(0, 256, (20, 30, 3), np.uint8)),
                "observation.image": encoded(np.full((8, 6), 10 * e + k, np.uint8)),
                "observation.state": rng.normal(size=4).tolist(), "action": (np.arange(9) + 100 * e + k).tolist(),
                "next.success": e != 2 and k == n - 1, "observation.force": [0.0, 1.0],
                "timestamp": k / 30, "frame_index": k, "episode_index": e, "index": first + k, "task_index": told[k],
            })  # fmt: skip
        episodes.append({"episode_index": e, "length": n, "tasks": ["?"], "data/chunk_index": chunk, "data/file_index": file,
                         "dataset_from_index": first, "dataset_to_index": first + n})
        first += n
    for (chunk, file), table in rows.items():
        path = folder / f"data/chunk-{chunk:03d}/file-{file:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(table), path)
    for number, part in enumerate((episodes[:3], episodes[3:])):
        path = folder / f"meta/episodes/chunk-000/file-{number:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(part), path)
    # pandas names an index without a name like this.
    sentences = {"task_index": [0, 1, 2], "__index_level_0__": ["fold the towel", "fill the cup", "wipe"]}
    pq.write_table(pa.table(sentences), folder / "meta/tasks.parquet")
    counters = {name: {"dtype": "int64", "shape": [1], "names": None} for name in ("frame_index", "episode_index", "index", "task_index")}
    info = {"codebase_version": "v3.0", "robot_type": "aloha", "fps": 30, "total_episodes": 5, "total_frames": first, "total_tasks": 3,
            "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet", "splits": {"train": "0:3", "val": "3:5"},
            "features": counters | {
                "observation.images.front": {"dtype": "image", "shape": [20, 30, 3], "names": ["height", "width", "channel"]},
                "observation.image": {"dtype": "image", "shape": [3, 8, 6], "names": ["channels", "height", "width"]},
                "observation.state": {"dtype": "float64", "shape": [4], "names": {"motors": ["a", "b", "c", "d"]}},
                "action": {"dtype": "float64", "shape": [9], "names": None},
                "next.success": {"dtype": "bool", "shape": [1], "names": None}, "timestamp": {"dtype": "float32", "shape": [1], "names": None},
                "observation.force": {"dtype": "float32", "shape": [2], "names": None}}}
    (folder / "meta/info.json").write_text(json.dumps(info))
    (folder / "meta/stats.json").write_text("{}")
    return folder


def test_other_cameras_sizes_rates_and_widths_in_several_files_are_read(foreign):
    found = lerobot.read(foreign, failures=True)
    assert (found.robot, found.fps, found.cameras, found.camera) == ("aloha", 30.0, ("front", "image"), "front")
    assert found.state_names == ("a", "b", "c", "d") and found.action_names == tuple(map(str, range(9)))
    assert [len(e) for e in found.episodes] == [4, 2, 3, 2, 3, 2]
    stored = [row for path in sorted((foreign / "data").rglob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert np.array_equal(np.concatenate([e.actions for e in found.episodes]), [row["action"] for row in stored])
    assert np.array_equal(np.concatenate([e.state for e in found.episodes]), [row["observation.state"] for row in stored])
    pictures = np.concatenate([e.images for e in found.episodes])
    assert pictures.shape == (16, 20, 30, 3)
    assert all(np.array_equal(picture, np.asarray(Image.open(io.BytesIO(row["observation.images.front"]["bytes"])))) for picture, row in
               zip(pictures, stored))
    other = lerobot.read(foreign, camera="image", failures=True).episodes[1]
    assert other.images.shape == (2, 8, 6, 3) and set(np.unique(other.images[1])) == {11}  # grey becomes colour
    assert all("observation.force" in str(problem) for problem in found.warnings) and len(found.warnings) == 1


def test_an_episode_is_cut_where_its_instruction_changes_and_stays_in_one_split(foreign):
    found = lerobot.read(foreign, failures=True)
    assert [(e.id, e.instruction) for e in found.episodes[3:5]] == [("000003/0", "fill the cup"), ("000003/1", "fold the towel")]
    assert [e.split for e in found.episodes] == ["train"] * 3 + ["val"] * 3
    dealt = found.with_splits((2, 1, 1))
    by_recorded = {}
    for e in dealt.episodes:
        by_recorded.setdefault(e.id.split("/")[0], set()).add(e.split)
    assert all(len(splits) == 1 for splits in by_recorded.values()) and len(by_recorded) == 5
    assert [splits.pop() for splits in by_recorded.values()] == [split_of(i, (2, 1, 1)) for i in range(5)]
    assert {e.split for e in found.with_splits().episodes} <= {split_of(i, SHARES) for i in range(5)}


def test_failed_episodes_splits_and_limits_choose_the_episodes(foreign):
    assert [e.id[:6] for e in lerobot.read(foreign).episodes] == ["000000", "000001", "000003", "000003", "000004"]
    assert [e.id for e in lerobot.read(foreign, failures=True).episodes if not e.success] == ["000002"]
    assert {e.split for e in lerobot.read(foreign, split="val").episodes} == {"val"}
    assert [e.id for e in lerobot.read(foreign, limit=2).episodes] == ["000000", "000001"]
    assert len(lerobot.read(foreign).split("train")) == 2 and lerobot.read(foreign).split("nothing") == []
    with pytest.raises(UserError, match="no split 'test': choose one of train, val"):
        lerobot.read(foreign, split="test")
    with pytest.raises(UserError, match="no camera 'wrist': choose one of front, image"):
        lerobot.read(foreign, camera="wrist")


def test_a_set_without_state_has_a_state_of_no_width(foreign):
    features = load(foreign / "meta/info.json")["features"]
    edit_json(foreign, features={key: value for key, value in features.items() if key != "observation.state"})
    found = lerobot.read(foreign)
    assert found.state_names == () and all(e.state.shape == (len(e), 0) for e in found.episodes)


def test_our_own_export_is_read_like_any_other_robots(ours, exported):
    found, won = lerobot.read(exported), [d for d in ours if d.success]
    assert len(found.episodes) == len(won) and found.action_names[-1] == "grip" and found.state_names[-1] == "holding"
    for e, d in zip(found.episodes, won):
        assert (e.instruction, e.split) == (d.instruction, d.split) and np.array_equal(e.images, d.images) and np.array_equal(e.depth, d.depth)
        assert np.allclose(e.actions, d.actions, atol=1e-6)
    assert found.warnings == []


def test_another_robots_set_is_no_demonstration(foreign):
    assert not lerobot.is_ours(foreign) and lerobot.is_lerobot(foreign)
    with pytest.raises(UserError, match="'aloha' is not 'labkit/Tabletop-v0'.*labkit.lerobot.read"):
        lerobot.demonstrations(foreign)


def test_another_robots_set_trains_and_is_evaluated_offline():
    """The regression of the lab takes its episodes as it takes demonstrations; three actions wide, from 16 x 16 pictures."""
    import torch
    from transformers import CLIPTextModel, CLIPVisionModel

    from labkit.clip_pretraining import Recipe, build_model, build_processor
    from labkit.task_specific_vla import ActionNormaliser, policy_from_towers
    from labkit.waypoint_regression import action_accuracy, fit, waypoint_samples

    torch.set_num_threads(1)
    found = lerobot.read(FIXTURE)
    samples = waypoint_samples(found.episodes)
    assert samples.ids[4] == "000001/1" and samples.actions.shape == (6, 3)
    clip = build_model(Recipe(width=32, vision_layers=1, seed=3)).config
    towers = CLIPVisionModel(clip.vision_config), CLIPTextModel(clip.text_config)
    policy = policy_from_towers(*towers, build_processor(), normaliser=ActionNormaliser.fit(samples.actions))
    before = action_accuracy(policy, samples)
    curves = fit(policy, samples, samples, epochs=20, head_rate=3e-3, progress=False)
    after = action_accuracy(policy, samples)
    assert list(after) == ["0", "1", "2"] and curves.train[-1] < 0.5 * curves.train[0]
    assert all(after[axis]["error"] < before[axis]["error"] for axis in after)


# What is wrong is said, with its file, its place and what mends it


def _rows(name, change):
    def breaks(folder):
        edit_table(folder / name, change)
    return breaks


def _set(row, /, **values):
    def change(rows):
        rows[row] |= values
    return change


def _info(**changes):
    def breaks(folder):
        edit_json(folder, **changes)
    return breaks


def _feature(key, value):
    def breaks(folder):
        features = load(folder / "meta/info.json")["features"]
        edit_json(folder, features={k: v for k, v in (features | {key: value}).items() if v is not None})
    return breaks


def _remove(name):
    def breaks(folder):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return breaks


def _overwrite(name, content):
    def breaks(folder):
        (folder / name).write_bytes(content)
    return breaks


def _without(*columns):
    def change(rows):
        return [{key: value for key, value in row.items() if key not in columns} for row in rows]
    return change


def _old(folder):
    shutil.rmtree(folder / "meta")
    (folder / "meta").mkdir()
    (folder / "meta/episodes.jsonl").write_text("{}\n")


TASKS_FILE = "meta/tasks.parquet"
NAN = [0.0, float("nan"), 0, 0, 0, 0, 0, 0, 0]
SMALL, BLACK = encoded(np.zeros((5, 7, 3), np.uint8)), encoded(np.zeros((20, 30, 3), np.uint8))
FRONT, LAST = "observation.images.front", "data/chunk-001/file-000.parquet"
FAULTS = {
    "no info": (_remove("meta/info.json"), "meta/info.json: is missing"),
    "info no json": (_overwrite("meta/info.json", b"{"), "meta/info.json: is not JSON"),
    "info a list": (_overwrite("meta/info.json", b"[]"), "meta/info.json: holds a list"),
    "info no text": (_overwrite("meta/info.json", b"\xff\xfe{"), "meta/info.json: is not JSON"),
    "v2.1": (_info(codebase_version="v2.1"), "codebase_version: is v2.1, labkit reads v3.0: convert it with LeRobot's own"),
    "v2.1 by its files": (_old, "meta/episodes.jsonl: is before v3.0, labkit reads v3.0: convert it"),
    "v4": (_info(codebase_version="v4.0"), "codebase_version: is 'v4.0', labkit reads v3.x"),
    "no version": (_info(codebase_version=None), "codebase_version: is None"),
    "fps": (_info(fps=0), "fps: is 0, expected frames a second"),
    "fps text": (_info(fps="thirty"), "fps: is 'thirty', expected frames a second"),
    "features": (_info(features=[]), "features: is [], expected an object"),
    "a feature": (_feature("action", {"dtype": "float32", "shape": [0]}), "features, action: is {'dtype': 'float32', 'shape': [0]}, expected"),
    "no action": (_feature("action", None), "features: has no `action`"),
    "action matrix": (_feature("action", {"dtype": "float32", "shape": [3, 3]}), "action: is float32 of shape [3, 3], labkit reads vectors"),
    "no camera": (lambda folder: [_feature(key, None)(folder) for key in (FRONT, "observation.image")], "features: has no camera"),
    "data path": (_info(data_path="data/{nothing}.parquet"), "data_path: is 'data/{nothing}.parquet', which names no file"),
    "no tasks": (_remove("meta/tasks.parquet"), "meta/tasks.parquet: is missing"),
    "tasks no parquet": (_overwrite("meta/tasks.parquet", b"PAR1 broken"), "meta/tasks.parquet: cannot be read as parquet"),
    "tasks columns": (_rows(TASKS_FILE, _without("task_index")), "tasks.parquet: has the columns __index_level_0__, expected task_index"),
    "task empty": (_rows(TASKS_FILE, _set(2, __index_level_0__=" ")), "meta/tasks.parquet, task 2: is ' ', expected a sentence"),
    "task twice": (_rows(TASKS_FILE, _set(2, task_index=1)), "meta/tasks.parquet, task 1: is there twice"),
    "no task": (_rows(LAST, _set(6, task_index=9)), f"{LAST}, episode 4, frame 1: task_index is 9, meta/tasks.parquet has no such task"),
    "no episodes": (_remove("meta/episodes"), "meta/episodes: holds no parquet file"),
    "an episodes file": (_remove("meta/episodes/chunk-000/file-001.parquet"), "meta/episodes: has 3 episodes (not 3, 4), meta/info.json counts 5"),
    "episodes columns": (_rows(EPISODES_FILE, _without("length")), f"{EPISODES_FILE}: has no column length"),
    "episode number": (_rows(EPISODES_FILE, _set(1, length=None)), f"{EPISODES_FILE}, row 1: episode_index, length"),
    "episode twice": (_rows(EPISODES_FILE, _set(1, episode_index=0)), f"{EPISODES_FILE}, row 1: episode 0 is there already"),
    "total episodes": (_info(total_episodes=7), "meta/episodes: has 5 episodes (not 5, 6), meta/info.json counts 7"),
    "total frames": (_info(total_frames=99), "total_frames: is 99, the files hold 16 frames"),
    "a chunk": (_remove("data/chunk-001"), "data/chunk-001/file-000.parquet: is missing: episodes 3, 4 are in it; put it back"),
    "a data file": (_remove("data/chunk-000/file-001.parquet"), "data/chunk-000/file-001.parquet: is missing: episode 2 is in it"),
    "data no parquet": (_overwrite(LAST, b"no"), f"{LAST}: cannot be read as parquet"),
    "data columns": (_rows(LAST, _without("action", FRONT)), f"{LAST}: has no column action, {FRONT}, which meta/info.json describes"),
    "action width": (_feature("action", {"dtype": "float64", "shape": [8]}), "column action: row 0 has 9 numbers, meta/info.json says 8"),
    "state no vector": (_rows(LAST, lambda rows: [r | {"observation.state": 1.0} for r in rows]), f"{LAST}, column observation.state: is double"),
    "text": (_rows(LAST, lambda rows: [r | {"timestamp": "now"} for r in rows]), f"{LAST}, column timestamp: is string, expected numbers"),
    "NaN": (_rows(LAST, _set(0, action=NAN)), f"{LAST}, episode 3, frame 0: action 1 is nan, expected a finite number"),
    "NaN in several": (_rows(LAST, lambda rows: [r | {"action": NAN} for r in rows]), f"{LAST}, episode 3, frame 0 and 4 more: action 1 is nan"),
    "infinite state": (_rows(LAST, _set(5, **{"observation.state": [0, 0, float("inf"), 0]})), "episode 4, frame 0: observation.state c is inf"),
    "null action": (_rows(LAST, _set(5, action=None)), f"{LAST}, column action: row 5 has 0 numbers"),
    "length": (_rows(EPISODES_FILE, _set(1, length=3)), f"{DATA_FILE}, episode 1: has 2 frames, meta/episodes says 3"),
    "empty episode": (_rows(EPISODES_FILE, _set(1, length=0)), f"{DATA_FILE}, episode 1: has 2 frames, meta/episodes says 0"),
    "from and to": (_rows(EPISODES_FILE, _set(1, dataset_to_index=9)), "episode 1: dataset_from_index 4 to dataset_to_index 9 are not its 2 frames"),
    "index": (_rows(LAST, _set(1, index=3)), f"{LAST}, episode 3: index does not run from 9 to 13"),
    "frame index": (_rows(LAST, _set(1, frame_index=3)), f"{LAST}, episode 3: frame_index does not run from 0 to 4"),
    "strangers": (_rows(EPISODES_FILE, _set(2, **{"data/file_index": 0})), "rows belong to no episode|has 0 frames, meta/episodes says 3"),
    "no bytes": (_rows(LAST, _set(2, **{FRONT: {"bytes": None, "path": "a.png"}})), f"frame 2: {FRONT} holds no bytes, only the name of a file"),
    "no picture": (_rows(LAST, _set(2, **{FRONT: {"bytes": b"GIF", "path": "a"}})), f"frame 2: {FRONT} is no picture that can be decoded"),
    "cut picture": (_rows(LAST, _set(2, **{FRONT: {"bytes": BLACK["bytes"][:-30], "path": ""}})), "episode 3, frame 2"),
    "size": (_rows(LAST, _set(3, **{FRONT: SMALL})), f"episode 3, frame 3: {FRONT} is 5 x 7 pixels (height x width), meta/info.json says 20 x 30"),
    "no struct": (_rows(LAST, lambda rows: [r | {FRONT: "a.png"} for r in rows]), f"{FRONT} is not stored as {{bytes, path}}"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_named_with_file_place_and_fix(name, foreign):
    assert all(problem.warning for problem in lerobot.validate(foreign))
    breaks, said = FAULTS[name]
    breaks(foreign)
    errors = [str(problem) for problem in lerobot.validate(foreign) if not problem.warning]
    assert any(any(text in error for text in said.split("|")) for error in errors), errors
    for error in errors:
        assert "\n" not in error and len(error) < 400 and (":" in error.split(": ", 1)[1] or ";" in error)
    if name != "no struct" and "picture" not in name and name != "size" and name != "no bytes":
        with pytest.raises(UserError) as refused:
            lerobot.read(foreign)
        assert str(refused.value).startswith(str(foreign)) and "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["no bytes", "no picture", "cut picture", "size", "no struct"])
def test_a_bad_picture_stops_the_reading_of_its_camera_only(name, foreign):
    FAULTS[name][0](foreign)
    with pytest.raises(UserError, match=f"{LAST}, episode 3, frame"):
        lerobot.read(foreign)
    assert len(lerobot.read(foreign, camera="image").episodes) == 5


def test_all_faults_are_in_one_report(foreign):
    for name in ("fps", "no tasks", "a chunk", "size"):
        FAULTS[name][0](foreign) if name != "size" else edit_table(foreign / DATA_FILE, _set(0, **{FRONT: SMALL}))
    edit_table(foreign / "data/chunk-000/file-001.parquet", _set(0, action=NAN))
    errors = [str(problem) for problem in lerobot.validate(foreign) if not problem.warning]
    expected = ("fps: is 0", "tasks.parquet: is missing", "chunk-001/file-000.parquet: is missing", "action 1 is nan", "5 x 7 pixels")
    assert len(errors) == len(expected) and all(any(text in error for error in errors) for text in expected)
    with pytest.raises(UserError, match="fps: is 0.*; 3 more: `python3 -m labkit convert .*kitchen` lists them all"):
        lerobot.read(foreign)


def test_warnings_do_not_keep_a_set_from_being_used(foreign):
    (foreign / "meta/stats.json").unlink()
    edit_table(foreign / DATA_FILE, _set(1, timestamp=0.5))
    said = " ".join(map(str, lerobot.read(foreign).warnings))
    assert said.count("warning: ") == 3 and "stats.json: is missing" in said and "1/30 s" in said and "observation.force" in said


def test_a_video_without_a_decoder_is_refused_in_one_sentence(foreign, monkeypatch):
    monkeypatch.setattr(lerobot_files, "find_spec", lambda name: None)
    features = load(foreign / "meta/info.json")["features"]
    features[FRONT]["dtype"] = "video"
    edit_json(foreign, features=features)
    errors = [str(problem) for problem in lerobot.validate(foreign) if not problem.warning]
    assert any(f"features, {FRONT}: is kept as video, and no decoder is there: install PyAV" in error for error in errors)


def test_pictures_that_do_not_fit_into_memory_are_refused(foreign, monkeypatch):
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 20_000})())
    with pytest.raises(UserError, match="need 0.0 GB.*limit="):
        lerobot.read(foreign)
    assert len(lerobot.read(foreign, limit=1).episodes) == 1


def test_a_folder_that_is_not_there_is_named(tmp_path):
    for act in (lerobot.validate, lerobot.read, lerobot.demonstrations, lerobot.describe):
        with pytest.raises(UserError, match="there is no dataset in .*nowhere"):
            act(tmp_path / "nowhere")


@pytest.mark.parametrize("file", [DATA_FILE, EPISODES_FILE, "meta/tasks.parquet", "meta/info.json"])
def test_no_damage_to_a_file_gets_past_the_reader_as_a_raw_error(file, foreign):
    rng, path = np.random.default_rng(11), foreign / file
    whole = path.read_bytes()
    for _ in range(25):
        damaged = bytearray(whole[:rng.integers(len(whole))] if rng.random() < 0.3 else whole)
        for place in rng.integers(0, max(len(damaged), 1), 4):
            if damaged:
                damaged[place] = rng.integers(256)
        path.write_bytes(bytes(damaged))
        lerobot.validate(foreign)
        try:
            lerobot.read(foreign)
        except UserError as error:
            assert "\n" not in str(error)


def test_a_number_of_ours_that_changed_on_the_disk_is_noticed(exported, tmp_path):
    """A bit of each of the last 40 bytes of the first episode's actions, flipped one at a time: parquet's checksum catches it."""
    folder = Path(shutil.copytree(exported, tmp_path / "set"))
    whole, row_group = (folder / DATA_FILE).read_bytes(), pq.read_metadata(folder / DATA_FILE).row_group(0)
    column = next(row_group.column(i) for i in range(row_group.num_columns) if row_group.column(i).path_in_schema.startswith("action"))
    last = column.data_page_offset + column.total_compressed_size
    for place in range(last - 40, last):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        (folder / DATA_FILE).write_bytes(bytes(damaged))
        assert any(DATA_FILE in str(problem) for problem in lerobot.validate(folder)), place


def _places(value, path=()):
    """Every place inside a JSON value, as the keys that lead there."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from _places(value[key], (*path, key))


def test_no_odd_value_in_info_json_gets_past_the_reader_as_a_raw_error(foreign):
    rng, whole = np.random.default_rng(7), (foreign / "meta/info.json").read_text()
    places, odd = [path for path in _places(json.loads(whole)) if path], (None, [], {}, "x" * 300, -1, 10**15, float("nan"), True, [[1]], {"a": 1})
    for choice in rng.permutation(len(places) * len(odd))[:100]:
        info = json.loads(whole)
        *way, last = places[choice // len(odd)]
        inside = info
        for key in way:
            inside = inside[key]
        inside[last] = odd[choice % len(odd)]
        (foreign / "meta/info.json").write_text(json.dumps(info))
        lerobot.validate(foreign)
        try:
            lerobot.describe(foreign), lerobot.read(foreign)
        except UserError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("name, value", [("variation", "{"), ("command", "[1]"), ("end_effector", None), ("id", None), ("speed", "fast")])
def test_broken_facts_of_ours_are_said_in_one_sentence(name, value, exported, tmp_path):
    folder = Path(shutil.copytree(exported, tmp_path / "set"))
    edit_table(folder / EPISODES_FILE, lambda rows: [row | {"labkit/" + name: value} for row in rows])
    with pytest.raises(UserError, match="episode 0: labkit's columns cannot be read .*: export it again"):
        lerobot.demonstrations(folder)


# The command


def convert(*words):
    verb = importlib.import_module("labkit.commands.convert")
    parser = ArgumentParser()
    verb.add_arguments(parser)
    return verb.main(parser.parse_args(list(map(str, words))))


def test_convert_goes_there_and_back(ours, tmp_path, capsys):
    sheet.write(tmp_path / "sheet", ours, recipe={"seed": 1})
    assert convert(tmp_path / "sheet", tmp_path / "lerobot") == 0
    assert f"{len(ours)} episodes (1 failed)" in capsys.readouterr().out
    assert convert(tmp_path / "lerobot", tmp_path / "back") == 0
    assert dataset_check.validate(tmp_path / "back") == []
    pairs = zip(*(sheet.read(tmp_path / name, failures=True) for name in ("sheet", "back")))
    assert all(same(a, b) for a, b in pairs)
    assert "convert" in load(tmp_path / "back/dataset.json")["command"]
    for out in ("lerobot", "back"):
        with pytest.raises(UserError, match="is not empty"):
            convert(tmp_path / ("sheet" if out == "lerobot" else "lerobot"), tmp_path / out)


def test_convert_can_leave_out_failures_and_depth(ours, tmp_path):
    sheet.write(tmp_path / "sheet", ours, recipe={"seed": 1})
    convert(tmp_path / "sheet", tmp_path / "lerobot", "--drop-failures", "--no-depth")
    back = lerobot.demonstrations(tmp_path / "lerobot")
    assert all(d.success for d in back) and len(back) == sum(d.success for d in ours) and not any(d.depth.any() for d in back)


def test_convert_says_what_a_set_holds_and_everything_that_is_wrong(foreign, tmp_path, capsys):
    assert convert(foreign) == 0
    said = capsys.readouterr().out
    assert "robot aloha, 5 episodes (1 failed), 16 frames at 30 a second, 3 instructions, train 3, val 2" in said
    assert "front 20 x 30, image 8 x 6" in said and "warning: " in said
    with pytest.raises(UserError, match="another robot.*labkit.lerobot.read"):
        convert(foreign, tmp_path / "out")
    edit_json(foreign, fps=-1, total_frames=3)
    assert convert(foreign) == 1 and convert(foreign, tmp_path / "out") == 1
    said = capsys.readouterr().out
    assert "fps: is -1" in said and "total_frames: is 3" in said and "2 problems, 1 warnings" in said
    assert not (tmp_path / "out").exists()


def test_convert_refuses_broken_demonstrations(ours, tmp_path, capsys):
    sheet.write(tmp_path / "sheet", ours[:2], recipe={"seed": 1})
    next((tmp_path / "sheet/train/images").iterdir()).unlink()
    assert convert(tmp_path / "sheet", tmp_path / "lerobot") == 1 and not (tmp_path / "lerobot").exists()
    assert "is missing" in capsys.readouterr().out


def test_reading_a_set_loads_neither_torch_nor_lerobot():
    code = "import sys; from labkit import lerobot; lerobot.read(sys.argv[1]); print({'torch', 'lerobot', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code, str(FIXTURE)], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.stdout.strip() == "set()", done.stderr
