"""One pass over a LeRobot v3 folder: its meta files, numbers and pictures, and everything that is wrong with them.

What is made of such a folder, and how one is written, is in lerobot.py.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from labkit.dataset_check import Problem

VERSION = "v3.0"
INFO, STATS, TASKS, EPISODES = "meta/info.json", "meta/stats.json", "meta/tasks.parquet", "meta/episodes"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
ACTION, STATE = "action", "observation.state"
SUCCESS, REWARD, SECONDS = "next.success", "next.reward", "seconds"  # read where they are there
COUNTERS = ("timestamp", "frame_index", "episode_index", "index", "task_index")
# What meta/episodes says of every episode, beside statistics and whatever a writer adds.
_PLACES = ("episode_index", "length", "dataset_from_index", "dataset_to_index", "data/chunk_index", "data/file_index")
_PICTURES = ("image", "video")
_NUMBERS = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64")
_AGAIN = "write the dataset again, or put a good copy back"


class LeRobotFolder:
    """What a folder holds, as far as it can be read; whatever is wrong goes on the list `problems`, and reading goes on.

    info: content of meta/info.json.   tasks: {task_index: sentence}.   episodes: {episode_index: its row of meta/episodes}.
    columns: {episode_index: {feature: (n, width) float64}} of actions, state, counters and, where they are there, success, reward and seconds.
    Only episodes whose numbers all fit together are in it.
    """

    def __init__(self, folder):
        self.folder, self.problems = Path(folder), []
        self.tasks, self.episodes, self.columns, self._rows = {}, {}, {}, {}
        self.info = self._read_info()
        if self.info is not None:
            self._check_features()
            self.tasks = self._read_tasks()
            self.episodes = self._read_episodes()
            self._read_columns()
            if not (self.folder / STATS).is_file():
                self._add(STATS, "", "is missing: labkit does without it, LeRobot's own policies do not", warning=True)

    @property
    def errors(self) -> list[Problem]:
        """The problems that keep the dataset from being used."""
        return [problem for problem in self.problems if not problem.warning]

    @property
    def features(self) -> dict[str, dict]:
        """{key: {"dtype": ..., "shape": ..., "names": ...}} of the features that info.json describes well enough."""
        found = self.info.get("features") if self.info else None
        return {key: value for key, value in found.items() if _is_described(value)} if isinstance(found, dict) else {}

    @property
    def cameras(self) -> dict[str, str]:
        """{name: key} of the colour cameras, in the order of info.json; `observation.images.wrist` is called wrist."""
        return {_short(key): key for key, value in self.features.items() if value["dtype"] in _PICTURES and not _is_depth(value)}

    @property
    def depths(self) -> dict[str, str]:
        """{name: key} of the depth maps that are stored as images."""
        return {_short(key): key for key, value in self.features.items() if value["dtype"] == "image" and _is_depth(value)}

    def width(self, key) -> int:
        """How many numbers a vector feature has; 0 where there is no such feature."""
        return self.features[key]["shape"][0] if key in self.features else 0

    def names(self, key) -> tuple[str, ...]:
        """What the numbers of a vector feature are called, "0", "1", ... where info.json does not say."""
        names = self.features.get(key, {}).get("names")
        if isinstance(names, dict):  # {"motors": [...]}
            names = next(iter(names.values()), None)
        if not isinstance(names, list) or len(names) != self.width(key):
            names = range(self.width(key))
        return tuple(map(str, names))

    def size(self, key) -> tuple[int, int]:
        """Height and width of a camera's pictures, in pixels, as info.json has them."""
        shape, names = self.features[key]["shape"], self.features[key].get("names")
        if isinstance(names, list) and len(names) == len(shape) and "height" in names and "width" in names:
            return shape[names.index("height")], shape[names.index("width")]
        channels_first = shape[0] in (1, 3) and shape[-1] not in (1, 3)
        return tuple(shape[1:]) if channels_first else tuple(shape[:2])

    def split_of(self, episode: int) -> str:
        """The split that info.json puts an episode in, from ranges like "0:50"; "train" where it says nothing."""
        for name, text in _object(self.info.get("splits")).items():
            found = re.fullmatch(r"(\d+):(\d+)", str(text))
            if found and int(found[1]) <= episode < int(found[2]):
                return name
        return "train"

    def pictures(self, key, episodes):
        """Yields (episode, k, picture) of the wanted episodes' frames, file by file; frames without a good picture become problems.

        picture: (H, W, 3) uint8 of a camera, (H, W) float32 metres of a depth map.
        """
        by_file = defaultdict(list)
        stored_as_video = self.features[key]["dtype"] == "video"
        for episode in episodes:
            if episode in self._rows:
                by_file[self._video(key, episode) if stored_as_video else self._rows[episode][0]].append(episode)
        for file, wanted in by_file.items():
            if stored_as_video:
                yield from self._filmed(file, key, wanted)
            else:
                yield from self._stored(file, key, wanted)

    def _add(self, file, place, message, warning=False):
        self.problems.append(Problem(file, place, message, warning))

    def _add_frames(self, file, frames, message, warning=False):
        """One problem for all (episode, k) that have it."""
        if frames:
            more = f" and {len(frames) - 1:,} more" if len(frames) > 1 else ""
            self._add(file, "episode {}, frame {}".format(*frames[0]) + more, message, warning)

    # From the whole folder down to one number.

    def _read_info(self):
        path = self.folder / INFO
        try:
            info = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            if (self.folder / "meta/episodes.jsonl").is_file():
                self._add("meta/episodes.jsonl", "", _old_version("before v3.0"))
            else:
                self._add(INFO, "", "is missing: this is no LeRobot dataset, or only a part of one; put the file back")
            return None
        except (ValueError, OSError, RecursionError) as error:
            self._add(INFO, "", f"is not JSON ({error}): {_AGAIN}")
            return None
        if not isinstance(info, dict):
            self._add(INFO, "", f"holds a {type(info).__name__}, expected an object: {_AGAIN}")
            return None
        version = re.fullmatch(r"v?(\d+)\.\d+(\.\d+)?", str(info.get("codebase_version")))
        if version is None or version[1] != "3":
            old = version is not None and int(version[1]) < 3
            found = info.get("codebase_version")
            self._add(INFO, "codebase_version", _old_version(found) if old else f"is {found!r}, labkit reads v3.x: write the dataset as v3.0")
            return None
        return info

    def _check_features(self):
        fps, features = self.info.get("fps"), self.info.get("features")
        if isinstance(fps, bool) or not isinstance(fps, (int, float)) or not 0 < fps < 1e6:
            self._add(INFO, "fps", f"is {fps!r}, expected frames a second, a number above 0: correct it")
        if not isinstance(features, dict):
            self._add(INFO, "features", f"is {features!r:.80}, expected an object that describes every column: {_AGAIN}")
            return
        for key, value in features.items():
            if not _is_described(value):
                self._add(INFO, f"features, {key}", f"is {value!r:.80}, expected a dtype and a shape of whole numbers: correct it")
        for key in (ACTION, STATE):
            if key in self.features and (len(self.features[key]["shape"]) != 1 or self.features[key]["dtype"] not in _NUMBERS):
                kind = f"{self.features[key]['dtype']} of shape {self.features[key]['shape']}"
                self._add(INFO, f"features, {key}", f"is {kind}, labkit reads vectors of numbers: write one vector a frame")
                del features[key]
        if ACTION not in features:
            self._add(INFO, "features", f"has no `{ACTION}` that can be read: without actions there is nothing to learn; {_AGAIN}")
        if not self.cameras:
            self._add(INFO, "features", "has no camera (a feature of the dtype image): the policies here read pictures; use another dataset")
        for key, value in self.features.items():
            if value["dtype"] == "video" and _is_depth(value):
                self._add(INFO, f"features, {key}", "is depth kept as video, which labkit does not read: it is left out", warning=True)
            elif value["dtype"] == "video" and find_spec("av") is None:
                fix = "install PyAV (`pip install av`), or write the dataset with images (`use_videos=False`)"
                self._add(INFO, f"features, {key}", f"is kept as video, and no decoder is there: {fix}")
        unused = [key for key in features if key not in (ACTION, STATE, SUCCESS, REWARD, SECONDS, *COUNTERS) and key not in self.cameras.values()
                  and key not in self.depths.values() and not (_is_described(features[key]) and _is_depth(features[key]))]
        if unused:
            self._add(INFO, "features", f"{', '.join(unused)}: labkit has no use for this and leaves it out", warning=True)

    def _table(self, file, wanted=lambda names: names, convert=lambda table: table):
        """What `convert` makes of a parquet file's wanted columns, or None.   wanted: callable (names there) -> names to read."""
        import pyarrow.parquet as pq

        try:
            stored = pq.ParquetFile(self.folder / file, page_checksum_verification=True)
            return convert(stored.read(columns=wanted(stored.schema_arrow.names)))
        except Exception as error:  # of damaged bytes pyarrow says so in half a dozen kinds, text that is no UTF-8 among them
            self._add(file, "", f"cannot be read as parquet ({_in_short(error)}): {_AGAIN}")
            return None

    def _read_tasks(self):
        if not (self.folder / TASKS).is_file():
            self._add(TASKS, "", "is missing: it holds the sentences that say what the robot was asked; put it back")
            return {}
        table = self._table(TASKS, convert=_rows_and_names)
        if table is None:
            return {}
        rows, names = table
        # pandas keeps an index without a name under a name of its own.
        sentence = next((name for name in ("task", "__index_level_0__") if name in names), None)
        if "task_index" not in names or sentence is None:
            self._add(TASKS, "", f"has the columns {', '.join(names)}, expected task_index and task: {_AGAIN}")
            return {}
        tasks = {}
        for index, said in ((row["task_index"], row[sentence]) for row in rows):
            if not isinstance(said, str) or not said.strip():
                self._add(TASKS, f"task {index}", f"is {said!r}, expected a sentence: write what the robot was asked to do")
            elif index in tasks:
                self._add(TASKS, f"task {index}", f"is there twice, as {tasks[index]!r} and {said!r}: give one of them another number")
            else:
                tasks[index] = said
        return tasks

    def _read_episodes(self):
        files = sorted(path.relative_to(self.folder).as_posix() for path in (self.folder / EPISODES).glob("*/*.parquet"))
        if not files:
            self._add(EPISODES, "", f"holds no parquet file: it says where every episode lies; {_AGAIN}")
            return {}
        episodes = {}
        for file in files:
            table = self._table(file, lambda names: [name for name in names if not name.startswith("stats/")], _rows_and_names)
            if table is None:
                continue
            rows, names = table
            missing = [name for name in _PLACES if name not in names]
            if missing:
                self._add(file, "", f"has no column {', '.join(missing)}: {_AGAIN}")
                continue
            for number, row in enumerate(rows):
                index = row["episode_index"]
                if any(isinstance(row[name], bool) or not isinstance(row[name], int) or row[name] < 0 for name in _PLACES):
                    self._add(file, f"row {number}", f"{', '.join(_PLACES)} are not all whole numbers: {_AGAIN}")
                elif index in episodes:
                    self._add(file, f"row {number}", f"episode {index} is there already: {_AGAIN}")
                else:
                    episodes[index] = row
        stated = self.info.get("total_episodes")
        if stated != len(episodes) or sorted(episodes) != list(range(len(episodes))):
            wanted = stated if isinstance(stated, int) else len(episodes)
            gaps = [index for index in range(min(wanted, len(episodes) + 5)) if index not in episodes]
            which = f" (not {_listed(gaps, wanted - sum(index < wanted for index in episodes))})" if gaps else ""
            self._add(EPISODES, "", f"has {len(episodes)} episodes{which}, {INFO} counts {stated}: put the missing files back, or correct it")
        return dict(sorted(episodes.items()))

    def _file_of(self, row):
        template = self.info.get("data_path") or DATA_PATH
        try:
            return template.format(chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            if not any(problem.place == "data_path" for problem in self.problems):
                self._add(INFO, "data_path", f"is {template!r}, which names no file ({error!r}): write {DATA_PATH!r}")
            return None

    def _read_columns(self):
        by_file = defaultdict(list)
        for index, row in self.episodes.items():
            by_file[self._file_of(row)].append(index)
        by_file.pop(None, None)
        expected, whole = 0, True
        for file, episodes in by_file.items():
            if not os.path.isfile(self.folder / file):  # unlike Path.is_file it takes any name, however long
                self._add(file, "", f"is missing: {_episodes(episodes)} in it; put it back")
                whole = False
                continue
            found = self._numbers_of(file)
            if found is None:
                whole = False
                continue
            expected += len(found["index"])
            for episode in episodes:
                self._one_episode(file, episode, found)
            strangers = np.flatnonzero(~np.isin(found["episode_index"][:, 0], episodes))
            if len(strangers):
                self._add(file, f"row {strangers[0]}", f"{len(strangers)} rows belong to no episode that {EPISODES} puts in this file: {_AGAIN}")
        if whole and self.episodes and self.info.get("total_frames") != expected:
            self._add(INFO, "total_frames", f"is {self.info.get('total_frames')}, the files hold {expected} frames: correct it, or {_AGAIN}")

    def _numbers_of(self, file):
        """{feature: (rows, width) float64} of one data file, or None."""
        wanted = {name: 1 for name in COUNTERS} | {key: self.width(key) for key in (ACTION, STATE) if key in self.features}
        there = []

        def columns(names):
            there.extend(names)
            return [name for name in (*wanted, SUCCESS, REWARD, SECONDS) if name in names]

        table = self._table(file, columns)
        if table is None:
            return None
        pictures = [key for key in (*self.cameras.values(), *self.depths.values()) if self.features[key]["dtype"] == "image"]
        missing = [name for name in (*wanted, *pictures) if name not in there]
        if missing:
            self._add(file, "", f"has no column {', '.join(missing)}, which {INFO} describes: {_AGAIN}")
            return None
        found = {}
        for name in table.column_names:
            values = _matrix(table[name], wanted.get(name, 1))
            if isinstance(values, str):
                self._add(file, f"column {name}", f"{values}: correct {INFO}, or {_AGAIN}")
            else:
                found[name] = values
        return found if all(name in found for name in wanted) else None

    def _one_episode(self, file, episode, found):
        row, place = self.episodes[episode], f"episode {episode}"
        rows = np.flatnonzero(found["episode_index"][:, 0] == episode)
        if len(rows) != row["length"] or not len(rows):
            self._add(file, place, f"has {len(rows)} frames, {EPISODES} says {row['length']}: {_AGAIN}")
            return
        mine = {name: values[rows] for name, values in found.items()}
        if row["dataset_to_index"] - row["dataset_from_index"] != len(rows):
            stretch = f"dataset_from_index {row['dataset_from_index']} to dataset_to_index {row['dataset_to_index']}"
            self._add(EPISODES, place, f"{stretch} are not its {len(rows)} frames: {_AGAIN}")
        elif not np.array_equal(mine["index"][:, 0], np.arange(row["dataset_from_index"], row["dataset_to_index"])):
            self._add(file, place, f"index does not run from {row['dataset_from_index']} to {row['dataset_to_index'] - 1}: {_AGAIN}")
        if not np.array_equal(mine["frame_index"][:, 0], np.arange(len(rows))):
            self._add(file, place, f"frame_index does not run from 0 to {len(rows) - 1}: {_AGAIN}")
        for name in (ACTION, STATE, "timestamp"):
            bad = np.argwhere(~np.isfinite(mine[name])) if name in mine else []
            if len(bad):
                k, axis = bad[0]
                called = f"{name} {self.names(name)[axis]}" if name in self.features and self.width(name) > 1 else name
                frames = [(episode, k) for k in np.unique(bad[:, 0])]
                self._add_frames(file, frames, f"{called} is {mine[name][k, axis]}, expected a finite number: mend it, or remove the episode")
        unknown = [k for k in range(len(rows)) if mine["task_index"][k, 0] not in self.tasks]
        if unknown and self.tasks:
            value = mine["task_index"][unknown[0], 0]
            self._add_frames(file, [(episode, k) for k in unknown], f"task_index is {value:g}, {TASKS} has no such task: add its sentence there")
        fps = self.info.get("fps")
        steps = np.diff(mine["timestamp"][:, 0])
        if isinstance(fps, (int, float)) and fps > 0 and len(steps) and not np.allclose(steps, 1 / fps, atol=0.5 / fps):
            self._add(file, place, f"timestamps do not advance by 1/{fps:g} s: labkit takes the frames in their order", warning=True)
        self.columns[episode], self._rows[episode] = mine, (file, rows)

    # Pictures.

    def _stored(self, file, key, episodes):
        """Pictures that are PNG, JPEG or TIFF bytes in a data file."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        place_of = {int(row): (episode, k) for episode in episodes for k, row in enumerate(self._rows[episode][1])}
        depth = key in self.depths.values()
        size, wrong, first = self.size(key), defaultdict(list), 0
        try:
            for batch in pq.ParquetFile(self.folder / file, page_checksum_verification=True).iter_batches(batch_size=256, columns=[key]):
                column = batch.column(0)
                data = column.field("bytes") if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0 else None
                for number in range(len(column)):
                    place = place_of.pop(first + number, None)
                    if place is None:
                        continue
                    picture = "is not stored as {bytes, path}" if data is None else _decoded(data[number].as_py(), size, depth, self._depth_unit(key))
                    if isinstance(picture, str):
                        wrong[picture].append(place)
                    else:
                        yield *place, picture
                first += len(column)
            reason = "is not there"
        except Exception as error:  # as in `_table`
            reason = f"cannot be read ({_in_short(error)})"
        if place_of:
            wrong[reason] += place_of.values()
        for message, frames in wrong.items():
            self._add_frames(file, sorted(frames), f"{key} {message}: {_AGAIN}")

    def _depth_unit(self, key):
        return _object(self.features[key].get("info")).get("depth_unit")

    def _video(self, key, episode):
        row = self.episodes[episode]
        try:
            return self.info["video_path"].format(
                video_key=key, chunk_index=row[f"videos/{key}/chunk_index"], file_index=row[f"videos/{key}/file_index"])
        except (AttributeError, KeyError, IndexError, TypeError, ValueError):
            return None

    def _filmed(self, file, key, episodes):
        """Pictures that are frames of a video: of each wanted time, the frame within half a frame of it."""
        if file is None:
            self._add(EPISODES, _episodes(episodes), f"{EPISODES} or {INFO} (video_path) does not say where the video of {key} is: {_AGAIN}")
            return
        if not os.path.isfile(self.folder / file):
            self._add(file, "", f"is missing: the pictures of {_episodes(episodes)} in it; put it back")
            return
        if find_spec("av") is None:  # said once, of info.json
            return
        start = {episode: self.episodes[episode].get(f"videos/{key}/from_timestamp") or 0.0 for episode in episodes}
        waiting = sorted((start[episode] + time, episode, k) for episode in episodes
                         for k, time in enumerate(self.columns[episode]["timestamp"][:, 0]))
        missed, size, half = [], self.size(key), 0.5 / self.info["fps"]
        for time, picture in self._film(file):
            while waiting and waiting[0][0] < time - half:
                missed.append(waiting.pop(0)[1:])
            while waiting and waiting[0][0] <= time + half:
                _, episode, k = waiting.pop(0)
                if picture.shape[:2] != tuple(size):
                    message = f"is {picture.shape[0]} x {picture.shape[1]} pixels (height x width), {INFO} says {size[0]} x {size[1]}"
                    self._add_frames(file, [(episode, k)], f"{key} {message}: correct {INFO}, or {_AGAIN}")
                    return
                yield episode, k, picture
            if not waiting:
                break
        missed += [(episode, k) for _, episode, k in waiting]
        self._add_frames(file, sorted(missed), f"{key} has no frame at this time: {_AGAIN}")

    def _film(self, file):
        """Yields (seconds, (H, W, 3) uint8) of a video's frames, as far as it can be decoded."""
        import av

        try:
            with av.open(str(self.folder / file)) as container:
                for frame in container.decode(container.streams.video[0]):
                    yield float(frame.time), frame.to_ndarray(format="rgb24")
        except (av.FFmpegError, IndexError) as error:
            self._add(file, "", f"cannot be decoded ({error}): {_AGAIN}")


def _is_described(feature):
    shape = feature.get("shape") if isinstance(feature, dict) else None
    wholes = isinstance(shape, list) and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape)
    if not wholes or not isinstance(feature.get("dtype"), str):
        return False
    return feature["dtype"] not in _PICTURES or len(shape) == 3


def _is_depth(feature):
    about = _object(feature.get("info")) | _object(feature.get("video_info"))
    return bool(about.get("is_depth_map") or about.get("video.is_depth_map"))


def _object(value):
    return value if isinstance(value, dict) else {}


def _short(key):
    return key.removeprefix("observation.images.").removeprefix("observation.")


def _old_version(found):
    return (f"is {found}, labkit reads v3.0: convert it with LeRobot's own `convert_dataset_v21_to_v30`, "
            "see huggingface.co/docs/lerobot/lerobot-dataset-v3")


def _listed(numbers, count=None):
    """The first five of them, and how many more there are; count: where the list itself is not whole."""
    more = (len(numbers) if count is None else count) - len(numbers[:5])
    return ", ".join(map(str, numbers[:5])) + (f" and {more:,} more" if more > 0 else "")


def _episodes(numbers):
    return f"episode {numbers[0]} is" if len(numbers) == 1 else f"episodes {_listed(sorted(numbers))} are"


def _rows_and_names(table):
    return table.to_pylist(), table.column_names


def _in_short(error):
    return " ".join(str(error).split())[:150]


def _matrix(column, width):
    """A column of numbers or of lists of `width` numbers  ->  (rows, width) float64, null as NaN; what is wrong with it, in words, otherwise."""
    import pyarrow as pa
    import pyarrow.compute as pc

    array = column.combine_chunks()
    kind = array.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
        wrong = np.flatnonzero(lengths != width)
        if len(wrong):
            return f"row {wrong[0]} has {lengths[wrong[0]]} numbers, {INFO} says {width}"
        array = array.flatten()
        kind = array.type
    elif width != 1:
        return f"is {kind}, {INFO} says a vector of {width} numbers"
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        return f"is {kind}, expected numbers"
    numbers = pc.fill_null(pc.cast(array, pa.float64()), float("nan"))
    return numbers.to_numpy(zero_copy_only=False).reshape(-1, width)


def _decoded(data, size, depth, unit):
    """Encoded bytes  ->  (H, W, 3) uint8, or (H, W) float32 metres of a depth map; what is wrong with them, in words, otherwise."""
    from PIL import Image

    if data is None:
        return "holds no bytes, only the name of a file"
    try:
        with Image.open(io.BytesIO(data)) as image:
            found = np.asarray(image if depth or image.mode == "RGB" else image.convert("RGB"))
    except Exception:  # Pillow has half a dozen kinds for a broken file
        return "is no picture that can be decoded"
    if found.shape[:2] != tuple(size):
        return f"is {found.shape[0]} x {found.shape[1]} pixels (height x width), {INFO} says {size[0]} x {size[1]}"
    if not depth:
        return found
    if found.ndim != 2:
        return f"has {found.shape[2]} channels, expected one of a depth map"
    # LeRobot's rule where no unit is recorded: whole numbers are millimetres, fractions are metres.
    millimetres = unit == "mm" or (unit is None and found.dtype.kind in "ui")
    return found.astype(np.float32) / 1000 if millimetres else found.astype(np.float32)
