"""LeRobot datasets: our demonstrations written as LeRobot v3.0 and read back, and other robots' datasets read for training offline.

    meta/info.json                             version, frames a second, features, splits, counts
    meta/stats.json                            minimum, maximum, mean, deviation and quantiles of every feature
    meta/tasks.parquet                         the sentences, by task_index
    meta/episodes/chunk-000/file-000.parquet   one row an episode: where its frames lie, its statistics, our facts about it
    data/chunk-000/file-000.parquet            one row a frame: pictures as PNG, state, action, counters

Format: huggingface.co/docs/lerobot/lerobot-dataset-v3. What may be wrong with such a folder is found by lerobot_files.py; that the real
library reads what is written here, and the other way round, is shown by `python3 -m labkit.lerobot_check`.
"""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from labkit.dataset_check import Problem
from labkit.demonstrations import SPLITS, Demonstration, command_facts, command_from_facts
from labkit.errors import UserError
from labkit.lerobot_files import (
    ACTION,
    COUNTERS,
    DATA_PATH,
    EPISODES,
    INFO,
    REWARD,
    SECONDS,
    STATE,
    STATS,
    SUCCESS,
    TASKS,
    VERSION,
    LeRobotFolder,
)
from labkit.recording import SHARES, split_of
from labkit.tabletop import ENV_ID
from labkit.tabletop.camera import OBSERVATION_SIZE

CAMERA, DEPTH = "observation.images.camera", "observation.images.camera_depth"
FPS = 1
_POSE = ["x", "y", "z", "roll", "pitch", "yaw"]
_OURS = "labkit/"  # what our columns of meta/episodes begin with
_KINDS = {"id": str, "task": str, "operator": str, "success": bool, "seed": (int, type(None)), "speed": float, "variation": str, "command": str}
_QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
_FILES_A_CHUNK = 1000
# Recording rounds to six decimals, which a float32 holds below 8: so they come back as they were.
_DECIMALS = 6


@dataclass(frozen=True, eq=False)
class ForeignEpisode:
    """One episode of another robot, or of ours as others see it: n frames under one instruction.

    images: (n, H, W, 3) uint8 of one camera.   depth: (n, H, W) float32 metres, or None.   state: (n, S).   actions: (n, A), in the dataset's
    own units.   seconds: (n,) since the recording began.   success: True where the dataset does not say.
    Where a `Demonstration` has a vacuum sensor this has none: `holding` is False everywhere.
    """

    id: str
    split: str
    instruction: str
    success: bool
    images: np.ndarray
    depth: np.ndarray | None
    state: np.ndarray
    actions: np.ndarray
    seconds: np.ndarray

    def __len__(self):
        return len(self.actions)

    @property
    def holding(self) -> np.ndarray:
        """(n,) bool, all False."""
        return np.zeros(len(self), bool)


@dataclass(frozen=True, eq=False)
class ForeignDataset:
    """A LeRobot dataset, read for training and evaluation offline: there is no robot here that could carry its actions out.

    `waypoint_regression.waypoint_samples` takes its episodes as it takes demonstrations, actions of any width included.
    camera: the one whose pictures were read, of `cameras`.   fps: frames a second.   state_names, action_names: of their numbers.
    warnings: what the reader left out.
    """

    name: str
    robot: str
    fps: float
    camera: str
    cameras: tuple[str, ...]
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    episodes: list[ForeignEpisode]
    warnings: list[Problem]

    def split(self, name: str) -> list[ForeignEpisode]:
        """The episodes of one split; an empty list for one that the dataset does not have."""
        return [episode for episode in self.episodes if episode.split == name]

    def with_splits(self, shares: tuple[int, int, int] = SHARES) -> "ForeignDataset":
        """The same, dealt out anew over train, validation and test: LeRobot's own writer puts everything into train.

        A recorded episode that was cut where its instruction changes goes into one split as a whole.
        """
        recorded = list(dict.fromkeys(_recorded(episode) for episode in self.episodes))
        split = {id: split_of(index, shares) for index, id in enumerate(recorded)}
        return replace(self, episodes=[replace(episode, split=split[_recorded(episode)]) for episode in self.episodes])

    def __str__(self):
        frames, (height, width) = sum(map(len, self.episodes)), self.episodes[0].images.shape[1:3]
        actions = len(self.action_names)
        return f"{self.name}: {len(self.episodes)} episodes, {frames:,} frames ({self.camera}, {height} x {width}), actions {actions} wide"


# Reading


def validate(folder) -> list[Problem]:
    """Everything that is wrong with the LeRobot dataset in `folder`, every picture included; an empty list where all is well.

    Raises UserError where there is no such folder.
    """
    files = _opened(folder)
    for key in (*files.cameras.values(), *files.depths.values()):
        for _ in files.pictures(key, files.columns):
            pass
    return files.problems


def describe(folder) -> str:
    """What a dataset without errors holds, in a line or two; its pictures are not looked at.

    Raises UserError that names file, place and fix for a broken one.
    """
    files = _opened(folder)
    _refuse_errors(files)
    cameras = [f"{name} {'{} x {}'.format(*files.size(key))}" for name, key in {**files.cameras, **files.depths}.items()]
    failed = sum(not _succeeded(files, index) for index in files.columns)
    frames = sum(len(columns[ACTION]) for columns in files.columns.values())
    splits = Counter(map(files.split_of, files.columns))
    robot = files.info.get("robot_type") or "unknown"
    return (f"{files.folder}: robot {robot}, {len(files.columns)} episodes ({failed} failed), {frames:,} frames at "
            f"{files.info['fps']:g} a second, {len(files.tasks)} instructions, {', '.join(f'{name} {count}' for name, count in splits.items())}\n"
            f"pictures {', '.join(cameras)}; state ({', '.join(files.names(STATE))}); action ({', '.join(files.names(ACTION))})")


def is_lerobot(folder) -> bool:
    """Does this folder look like a LeRobot dataset, of whatever version?"""
    return (Path(folder) / INFO).is_file() or (Path(folder) / "meta/episodes.jsonl").is_file()


def read(folder, split: str | None = None, limit: int | None = None, failures: bool = False, camera: str | None = None) -> ForeignDataset:
    """A LeRobot dataset of any robot: other cameras, sizes, rates and widths than ours.

    split: one of those that info.json names; default, all.   limit: at most so many recorded episodes.
    failures: those that the dataset marks as failed, too.   camera: whose pictures, by its name or key; default, the first.
    An episode whose instruction changes on the way is cut there.

    Raises UserError that names file, place and fix for a dataset that cannot be used, an unknown split or camera, or one whose pictures do
    not fit into memory.
    """
    files = _opened(folder)
    _refuse_errors(files)
    key = _camera_key(files, camera)
    name = next(short for short, value in files.cameras.items() if value == key)
    splits = {files.split_of(index) for index in files.columns}
    if split is not None and split not in splits:
        raise UserError(f"{files.folder} has no split {split!r}: choose one of {', '.join(sorted(splits))}")
    wanted = [index for index in files.columns if split in (None, files.split_of(index)) and (failures or _succeeded(files, index))][:limit]
    if not wanted:
        raise UserError(f"{files.folder} has no successful episode{'' if split is None else f' in the split {split}'}: read with failures=True")
    depth_key = files.depths.get(f"{name}_depth")
    _refuse_too_many(files, key, wanted, 3 if depth_key is None else 3 + 4)
    images = _stacked(files, key, wanted)
    depths = {} if depth_key is None else _stacked(files, depth_key, wanted)
    _refuse_errors(files)
    episodes = [piece for index in wanted for piece in _pieces(files, index, images[index], depths.get(index))]
    warnings = [problem for problem in files.problems if problem.warning]
    return ForeignDataset(files.folder.resolve().name, files.info.get("robot_type") or "unknown", float(files.info["fps"]), name,
                          tuple(files.cameras), files.names(STATE), files.names(ACTION), episodes, warnings)


def is_ours(folder) -> bool:
    """Was this LeRobot dataset written by `export`, so that `demonstrations` can read it?"""
    return _is_ours(_opened(folder))


def demonstrations(folder) -> list[Demonstration]:
    """The demonstrations that `export` wrote, failed ones included: the same ones, but for what `export` says it cannot keep.

    Where the depth was left out, it is 0 everywhere, as where the ray hits nothing.
    Raises UserError that names file, place and fix for a dataset that is broken, or another robot's.
    """
    files = _opened(folder)
    _refuse_errors(files)
    if not _is_ours(files):
        robot = files.info.get("robot_type")
        raise UserError(f"{files.folder / INFO}, robot_type: {robot!r} is not {ENV_ID!r} with labkit's columns in {EPISODES}, so these are no "
                        f"demonstrations of the tabletop: read them with `labkit.lerobot.read`")
    images = _stacked(files, CAMERA, files.columns)
    depths = _stacked(files, DEPTH, files.columns) if DEPTH in files.features else {}
    _refuse_errors(files)
    found = []
    for index in files.columns:
        try:
            found.append(_demonstration(files, index, images[index], depths.get(index)))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{files.folder / EPISODES}, episode {index}: labkit's columns cannot be read ({error!r}): export it again") from error
    return found


def _opened(folder):
    if not Path(folder).is_dir():
        raise UserError(f"there is no dataset in {folder}: name a folder that has {INFO} in it")
    return LeRobotFolder(folder)


def _refuse_errors(files):
    errors = files.errors
    if errors:
        rest = f"; {len(errors) - 1} more: `python3 -m labkit convert {files.folder}` lists them all" if len(errors) > 1 else ""
        raise UserError(errors[0].in_folder(files.folder) + rest)


def _camera_key(files, camera):
    if camera is None:
        return next(iter(files.cameras.values()))
    for name, key in files.cameras.items():
        if camera in (name, key):
            return key
    raise UserError(f"{files.folder} has no camera {camera!r}: choose one of {', '.join(files.cameras)}")


def _refuse_too_many(files, key, episodes, bytes_a_pixel):
    """Pictures are kept as arrays; a set of many gigabytes is said before the machine starts to swap."""
    import psutil

    height, width = files.size(key)
    needed = sum(files.episodes[index]["length"] for index in episodes) * height * width * bytes_a_pixel
    free = psutil.virtual_memory().available
    if needed > 0.8 * free:
        raise UserError(f"{files.folder}: the pictures of {key} need {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free: "
                        f"read fewer episodes with limit=")


def _stacked(files, key, episodes):
    """{episode: (n, H, W, ...)} of one camera's pictures."""
    stacks = {}
    for index, k, picture in files.pictures(key, episodes):
        if index not in stacks:
            stacks[index] = np.zeros((files.episodes[index]["length"], *picture.shape), picture.dtype)
        stacks[index][k] = picture
    return stacks


def _succeeded(files, index):
    ours, flags = files.episodes[index].get(_OURS + "success"), files.columns[index].get(SUCCESS)
    if ours is not None:
        return bool(ours)
    return True if flags is None else bool(np.nan_to_num(flags[:, 0]).any())


def _pieces(files, index, images, depth):
    """A recorded episode as one piece for each stretch of frames with one instruction."""
    columns, tasks = files.columns[index], files.columns[index]["task_index"][:, 0]
    starts = [0, *(np.flatnonzero(np.diff(tasks)) + 1)]
    for number, (start, stop) in enumerate(zip(starts, [*starts[1:], len(tasks)])):
        rows = slice(start, stop)
        yield ForeignEpisode(
            f"{index:06d}" + (f"/{number}" if len(starts) > 1 else ""), files.split_of(index), files.tasks[tasks[start]], _succeeded(files, index),
            images[rows], None if depth is None else depth[rows], columns.get(STATE, np.zeros((len(tasks), 0)))[rows], columns[ACTION][rows],
            columns["timestamp"][rows, 0])


def _recorded(episode):
    return episode.id.split("/")[0]


def _is_ours(files):
    return files.info is not None and files.info.get("robot_type") == ENV_ID and bool(files.episodes) and all(
        _OURS + name in row for row in files.episodes.values() for name in ("id", "success", "end_effector"))


def _demonstration(files, index, images, depth):
    ours = {name.removeprefix(_OURS): value for name, value in files.episodes[index].items() if name.startswith(_OURS)}
    wrong = [name for name, kind in _KINDS.items() if not isinstance(ours[name], kind)]
    if wrong:
        raise ValueError(f"{wrong[0]} is {ours[wrong[0]]!r}")
    columns = files.columns[index]
    state, length = columns[STATE], len(columns[ACTION])
    poses = [np.array(path, np.float64).reshape(-1, len(_POSE)) for path in ours["end_effector"]]
    if len(poses) != length or state.shape[1] != len(_POSE) + 1 or columns[ACTION].shape[1] != len(_POSE) + 1:
        raise ValueError(f"{length} frames, {len(poses)} paths, state {state.shape}, action {columns[ACTION].shape}")
    if files.split_of(index) not in SPLITS:
        raise ValueError(f"unknown split {files.split_of(index)!r}")
    return Demonstration(
        ours["id"], files.split_of(index), files.tasks[columns["task_index"][0, 0]], ours["task"], ours["operator"], ours["success"],
        images, np.zeros(images.shape[:3], np.float32) if depth is None else depth, state[:, -1] > 0.5, _exact(state[:, :-1]),
        _exact(columns[ACTION]), poses, _exact(columns[REWARD][:, 0]), _exact(columns[SECONDS][:, 0]),
        ours["seed"], ours["speed"], json.loads(ours["variation"]), command_from_facts(json.loads(ours["command"])),
    )


def _exact(values):
    return np.round(np.asarray(values, np.float64), _DECIMALS) + 0.0


# Writing


def export(folder, demonstrations: Iterable[Demonstration], *, depth: bool = True, file_megabytes: float = 100) -> dict:
    """Write demonstrations as a LeRobot v3.0 dataset into a folder that is empty or absent, all or nothing. Returns what info.json says.

    A frame is a decision. observation.state: x y z in metres, roll pitch yaw in radians, holding (0 or 1).   action: the waypoint and grip,
    all seven.   depth: 16-bit PNG in millimetres, marked as LeRobot 0.6 marks it; False leaves it out.   next.reward, next.success, seconds:
    what the decision brought, and how long its motion took.   Splits are ranges of episodes in info.json. meta/episodes says of every episode
    its id, task, operator, success, seed, speed, variation, command and the tip's path, in columns `labkit/...`.
    Failed episodes are written, too, and LeRobot's own training takes every episode it finds: give it `episodes=[...]`, or leave them out here.

    What the format cannot hold: LeRobot's frames come at a fixed rate and our decisions do not, so fps is 1 and a timestamp counts decisions.
    State, action, reward and seconds are float32: they come back rounded to six decimals, as they were recorded. Episodes are sorted by split.
    What dataset.json says of recipe and provenance stays behind.

    file_megabytes: a data file that has grown so large is followed by another.
    Raises UserError for a folder that holds something, ValueError for no demonstrations, an id that comes twice, or NaN.
    """
    folder = Path(folder)
    ordered = sorted(demonstrations, key=lambda d: SPLITS.index(d.split))
    _refuse_unwritable(folder, ordered)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    tasks = {sentence: index for index, sentence in enumerate(dict.fromkeys(d.instruction for d in ordered))}
    features = _features(depth)
    rows, total = _write_frames(partial, ordered, tasks, features, depth, file_megabytes * 1e6)
    info = {
        "codebase_version": VERSION, "robot_type": ENV_ID, "total_episodes": len(ordered), "total_frames": sum(map(len, ordered)),
        "total_tasks": len(tasks), "chunks_size": _FILES_A_CHUNK, "data_files_size_in_mb": 100, "video_files_size_in_mb": 200, "fps": FPS,
        "splits": _ranges([d.split for d in ordered]), "data_path": DATA_PATH, "video_path": None, "features": features,
    }  # fmt: skip
    _write_episodes(partial, ordered, rows)
    _write_tasks(partial, tasks)
    for file, content in ((STATS, _described(total, features)), (INFO, info)):
        (partial / file).write_text(json.dumps(content, indent=4, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
    if folder.is_dir():
        folder.rmdir()
    partial.rename(folder)
    return info


def _refuse_unwritable(folder, ordered):
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: choose another folder, or remove it")
    if not ordered:
        raise ValueError("there are no demonstrations to export")
    seen = set()
    for d in ordered:
        if d.id in seen:
            raise ValueError(f"the id {d.id!r} comes twice")
        seen.add(d.id)
        if not all(np.isfinite(values).all() for values in (d.joints, d.actions, d.rewards, d.seconds)):
            raise ValueError(f"the episode {d.id!r} has numbers that are not finite: `python3 -m labkit validate` says where")


def _features(depth):
    """info.json's description of every column of the data files, in their order."""
    picture = ["height", "width", "channels"]
    vectors = {STATE: ("float32", [*_POSE, "holding"]), ACTION: ("float32", [*_POSE, "grip"])}
    scalars = {REWARD: "float32", SUCCESS: "bool", SECONDS: "float32", "timestamp": "float32"} | {name: "int64" for name in COUNTERS[1:]}
    found = {CAMERA: {"dtype": "image", "shape": [OBSERVATION_SIZE, OBSERVATION_SIZE, 3], "names": picture}}
    if depth:
        found[DEPTH] = {"dtype": "image", "shape": [OBSERVATION_SIZE, OBSERVATION_SIZE, 1], "names": picture,
                        "info": {"is_depth_map": True, "depth_unit": "mm"}}
    found |= {key: {"dtype": dtype, "shape": [len(names)], "names": names} for key, (dtype, names) in vectors.items()}
    return found | {key: {"dtype": dtype, "shape": [1], "names": None} for key, dtype in scalars.items()}


def _ranges(splits):
    return {name: f"{splits.index(name)}:{splits.index(name) + splits.count(name)}" for name in SPLITS if name in splits}


def _write_frames(folder, ordered, tasks, features, depth, most_bytes):
    """Write the data files; returns for every episode where it lies and its statistics, and a summary of everything."""
    import pyarrow.parquet as pq

    schema, rows, total, writer, first, number, size = _schema(features), [], {}, None, 0, 0, 0
    try:
        for index, d in enumerate(ordered):
            if writer is not None and size >= most_bytes:
                writer.close()
                writer, number, size = None, number + 1, 0
            place = dict(zip(("chunk_index", "file_index"), divmod(number, _FILES_A_CHUNK)))
            if writer is None:
                path = folder / DATA_PATH.format(**place)
                path.parent.mkdir(parents=True, exist_ok=True)
                # Statistics and dictionaries of pictures would be copies of them; LeRobot looks for episodes alone.
                writer = pq.ParquetWriter(path, schema, compression="snappy", use_dictionary=False, write_statistics=["episode_index"],
                                          write_page_checksum=True)
            columns = _columns(d, index, first, tasks[d.instruction], depth)
            table = _table(columns, schema)
            writer.write_table(table)  # one row group an episode, as LeRobot writes it
            size += table.nbytes
            summary = _summary(columns)
            total = _joined(total, summary)
            statistics = {f"stats/{key}/{name}": value for key, part in _described(summary, features).items() for name, value in part.items()}
            rows.append({f"data/{name}": value for name, value in place.items()}
                        | {"dataset_from_index": first, "dataset_to_index": first + len(d)} | statistics)
            first += len(d)
    finally:
        if writer is not None:
            writer.close()
    return rows, total


def _columns(d, index, first, task, depth):
    """{feature: (n, ...) array} of one episode, pictures as they are."""
    n = len(d)
    count = np.arange(n)
    pictures = {CAMERA: d.images} | ({DEPTH: np.rint(d.depth * 1000).astype(np.uint16)} if depth else {})
    success = np.zeros(n, bool)
    success[-1] = d.success
    return pictures | {
        STATE: np.column_stack([d.joints, d.holding]).astype(np.float32), ACTION: np.asarray(d.actions, np.float32),
        REWARD: np.asarray(d.rewards, np.float32), SUCCESS: success, SECONDS: np.asarray(d.seconds, np.float32),
        "timestamp": (count / FPS).astype(np.float32), "frame_index": count, "episode_index": np.full(n, index), "index": first + count,
        "task_index": np.full(n, task),
    }  # fmt: skip


def _schema(features):
    """The parquet schema; its metadata tell Hugging Face's `datasets`, and the hub's viewer, which columns are pictures."""
    import pyarrow as pa

    fields, described = [], {}
    for key, feature in features.items():
        (length, *_), dtype = feature["shape"], feature["dtype"]
        if dtype == "image":
            fields.append((key, pa.struct([("bytes", pa.binary()), ("path", pa.string())])))
            described[key] = {"_type": "Image"}
        else:
            kind = pa.type_for_alias(dtype)
            value = {"dtype": dtype, "_type": "Value"}
            fields.append((key, kind if length == 1 else pa.list_(kind, length)))
            described[key] = value if length == 1 else {"feature": value, "length": length, "_type": "List"}
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": described}})})


def _table(columns, schema):
    import pyarrow as pa

    def stored(key, values):
        if key in (CAMERA, DEPTH):
            return [{"bytes": _png(picture), "path": f"frame-{k:06d}.png"} for k, picture in enumerate(values)]
        return list(values) if values.ndim > 1 else values

    return pa.table([pa.array(stored(field.name, columns[field.name]), field.type) for field in schema], schema=schema)


def _png(picture):
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _write_episodes(folder, ordered, rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = []
    for index, (d, row) in enumerate(zip(ordered, rows)):
        facts = {
            "id": d.id, "task": d.task, "operator": d.operator, "success": bool(d.success), "seed": d.seed, "speed": float(d.speed),
            "variation": json.dumps(d.variation), "command": json.dumps(command_facts(d.command)),
            "end_effector": [np.asarray(path, np.float64).tolist() for path in d.poses],
        }  # fmt: skip
        table.append({"episode_index": index, "tasks": [d.instruction], "length": len(d), **row, "meta/episodes/chunk_index": 0,
                      "meta/episodes/file_index": 0, **{_OURS + name: value for name, value in facts.items()}})
    stored = pa.Table.from_pylist(table)
    seed = stored.schema.get_field_index(_OURS + "seed")
    # Without a seed in any episode the column would have no type, and LeRobot could not join it to another's.
    stored = stored.set_column(seed, _OURS + "seed", stored[seed].cast(pa.int64()))
    path = folder / EPISODES / "chunk-000/file-000.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(stored, path, compression="snappy", write_page_checksum=True)


def _write_tasks(folder, tasks):
    """The sentences, in a file from which pandas makes a frame that they are the index of: that is how LeRobot looks them up."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def column(name, kind, numpy_kind):
        return {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy_kind, "metadata": None}

    about = {"index_columns": ["task"], "column_indexes": [], "pandas_version": "2.3.3", "creator": {"library": "pyarrow", "version": pa.__version__},
             "columns": [column("task_index", "int64", "int64"), column("task", "unicode", "object")]}
    table = pa.table({"task_index": pa.array(tasks.values(), pa.int64()), "task": pa.array(tasks.keys(), pa.string())})
    pq.write_table(table.replace_schema_metadata({"pandas": json.dumps(about)}), folder / TASKS)


# Statistics: exact, from the values (numbers) or from how often each occurs (pictures), so that episodes can be joined.


def _summary(columns):
    """{feature: (n, width) numbers, or for pictures (frames, histogram of each channel (channels, values))}."""
    found = {}
    for key, values in columns.items():
        if key in (CAMERA, DEPTH):
            channels = values.reshape(-1, 3).T if values.ndim == 4 else values.reshape(1, -1)
            found[key] = len(values), np.stack([np.bincount(channel, minlength=2 ** (8 * values.itemsize)) for channel in channels])
        else:
            found[key] = np.asarray(values, np.float64).reshape(len(values), -1)
    return found


def _joined(total, summary):
    """Two summaries as one; an empty total is the start."""
    def join(a, b):
        return (a[0] + b[0], a[1] + b[1]) if isinstance(a, tuple) else np.concatenate([a, b])

    return {key: join(total[key], part) for key, part in summary.items()} if total else summary


def _described(summary, features):
    """LeRobot's statistics: lists as wide as the feature; of pictures (channels, 1, 1), colours from 0 to 1, depth in its unit."""
    found = {}
    for key, part in summary.items():
        if isinstance(part, tuple):
            scale = 1.0 if "info" in features[key] else 1 / 255
            channels = [_of_histogram(counts, scale) for counts in part[1]]
            found[key] = {name: [[[channel[name]]] for channel in channels] for name in channels[0]} | {"count": [part[0]]}
        else:
            numbers = {"min": part.min(0), "max": part.max(0), "mean": part.mean(0), "std": part.std(0)}
            numbers |= {name: np.quantile(part, share, axis=0, method="inverted_cdf") for name, share in _QUANTILES.items()}
            found[key] = {name: value.tolist() for name, value in numbers.items()} | {"count": [len(part)]}
    return found


def _of_histogram(counts, scale):
    there, total, values = np.flatnonzero(counts), counts.sum(), np.arange(len(counts)) * scale
    mean = (values * counts).sum() / total
    found = {"min": values[there[0]], "max": values[there[-1]], "mean": mean, "std": np.sqrt(((values - mean) ** 2 * counts).sum() / total)}
    below = np.cumsum(counts)
    found |= {name: values[np.searchsorted(below, np.ceil(share * total))] for name, share in _QUANTILES.items()}
    return {name: float(value) for name, value in found.items()}
