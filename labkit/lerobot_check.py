"""`python3 -m labkit.lerobot_check`: does the real lerobot library read what labkit writes, and labkit what lerobot writes?

The library lives in an environment of its own, made on the first use (a few minutes, 2 GB): it needs other versions than the course.
The half of this file under "Their side" runs there, without labkit; the other half here, without lerobot. They meet in folders and .npz files.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np

# The last release for each Python, and what reading and writing datasets needs of its requirements. Both ask for an older torch than the
# course's and do their work with it.
RELEASES = {
    "0.4.4": ["datasets==4.8.5", "huggingface-hub==0.35.3", "draccus==0.10.0", "accelerate", "deepdiff", "pandas<3"],
    "0.6.1": ["datasets==4.8.5", "huggingface-hub==1.33.0", "draccus==0.11.6", "pandas<3"],
}
NEEDED = ["numpy==2.2.6", "pillow==12.3.0", "pyarrow==26.0.1", "av==15.1.0", "opencv-python-headless==4.12.0.88", "jsonlines", "einops", "gymnasium",
          "safetensors", "packaging<26", "termcolor", "tqdm", "requests"]
TORCHVISION = "torchvision==0.28.0"
FIXTURE = {"height": 16, "width": 16, "state": 5, "action": 3, "fps": 10, "lengths": (3, 3), "noise": False}
LARGER = {"height": 40, "width": 56, "state": 9, "action": 5, "fps": 15, "lengths": (70, 40, 60, 50), "noise": True}
FILMED = {"height": 64, "width": 96, "state": 5, "action": 3, "fps": 10, "lengths": (8, 12), "noise": False}


def invented(episode, k, height, width, state, action, noise, **_):
    """Frame k of an episode of a robot that does not exist: picture, depth in mm, state, action and task, from its numbers alone."""
    rows, columns = np.mgrid[:height, :width]
    picture = np.stack([rows * 8 + 40 * episode, columns * 8 + 10 * k, rows + columns], axis=-1) % 256
    if noise:
        picture = np.random.default_rng([episode, k]).integers(0, 256, picture.shape)
    depth = 500 + 100 * episode + 10 * k + rows * 7 + columns
    task = ("pick up the screw", "hand it over")[episode % 2 if k < 30 else 1]
    return {"picture": picture.astype(np.uint8), "depth": depth.astype(np.uint16), "state": (np.arange(state) / 8 + episode - k).astype(np.float32),
            "action": (np.arange(action) * 0.25 - episode + k / 16).astype(np.float32), "task": task}


# Our side


def main(argv=None):
    from labkit.errors import UserError
    from labkit.paths import DATA, WORK

    release = "0.6.1" if sys.version_info >= (3, 12) else "0.4.4"
    parser = argparse.ArgumentParser(prog="python3 -m labkit.lerobot_check", description=__doc__.splitlines()[0])
    parser.add_argument("--demonstrations", type=Path, default=DATA / "demonstrations" / "stack_operators", metavar="FOLDER")
    parser.add_argument("--environment", type=Path, help="where lerobot is, or will be installed (work/lerobot-VERSION)")
    parser.add_argument("--fixture", type=Path, metavar="FOLDER", help="also keep the tiny dataset that lerobot writes for the tests, here")
    args = parser.parse_args(argv)
    environment = args.environment or WORK / f"lerobot-{release}"
    try:
        python = _environment(environment, release)
        return _check(python, args.demonstrations, WORK / "lerobot-check", args.fixture)
    except UserError as error:
        print(f"labkit: {error}", file=sys.stderr)
        return 2


def _environment(folder, release):
    """The interpreter of the environment that holds lerobot; the environment is made where there is none."""
    from labkit.errors import UserError
    from labkit.install import CPU_INDEX, pins

    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if (folder / "complete").is_file() or (python.is_file() and _run([python, "-I", "-c", "import lerobot"]).returncode == 0):
        return python
    print(f"making {folder} with lerobot {release}: a few minutes", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    torch = f"torch=={pins()['torch']}"
    install = [python, "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]
    _run([getattr(sys, "_base_executable", sys.executable), "-m", "venv", folder])
    # As the course does it: what pip has at hand, then PyTorch's CPU index; never the build that brings gigabytes of CUDA.
    sources = (["--no-index"], ["--index-url", CPU_INDEX, "--timeout", "10", "--retries", "0"])
    if all(_run([*install, "--no-deps", *source, torch]).returncode for source in sources):
        raise UserError(f"there is no CPU build of {torch} for this Python: install it and lerobot {release} into an environment of your own "
                        f"and name that with --environment")
    # lerobot would ask for an older torch, and torchvision for another build: without their requirements both come alone.
    for step in (["--no-deps", f"lerobot=={release}", TORCHVISION], [torch, *NEEDED, *RELEASES[release]]):
        done = _run([*install, *step])
        if done.returncode:
            raise UserError(f"pip could not install {' '.join(step)} into {folder}: {' '.join(done.stderr.split())[-300:]}")
    (folder / "complete").touch()
    return python


def _run(command, **options):
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)


def _theirs(python, job, work, **facts):
    """Run one job of the other side; returns what it printed last, as JSON, or raises UserError."""
    from labkit.errors import UserError

    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "cache"), "HF_DATASETS_CACHE": str(work / "cache/datasets")}
    # -I keeps this file's folder out of sys.path: labkit/lerobot.py must not hide the library of that name.
    done = _run([python, "-I", Path(__file__).resolve(), "--their-side", job, json.dumps(facts, default=str)], env=environment, cwd=work)
    if done.returncode:
        raise UserError(f"lerobot could not {job}: {' '.join(done.stderr.split())[-600:]}")
    return json.loads(done.stdout.splitlines()[-1])


class _Report:
    def __init__(self):
        self.failed = 0

    def __call__(self, right, text):
        self.failed += not right
        print(f"{'ok  ' if right else 'FAIL'} {text}", flush=True)


def _check(python, demonstrations, work, fixture):
    from labkit import lerobot
    from labkit.demonstrations import read

    work = work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    about = _theirs(python, "say its versions", work)
    print(", ".join(f"{name} {version}" for name, version in about.items()))
    say, ours = _Report(), read(demonstrations, failures=True)
    lerobot.export(work / "ours", ours, file_megabytes=0.05)
    _they_read_ours(say, python, work, ours, about["lerobot"])
    _we_read_theirs(say, python, work, "larger", LARGER, depth=about["lerobot"] >= "0.6")
    _we_read_their_video(say, python, work)
    if fixture is not None:
        shutil.rmtree(fixture, ignore_errors=True)
        _theirs(python, "write", work, folder=fixture.resolve(), like=FIXTURE, depth=about["lerobot"] >= "0.6", video=False)
        _say_what_it_is(fixture, about)
        say(not lerobot.validate(fixture), f"{fixture} written by lerobot {about['lerobot']}: no problem found in it")
    print("all as it should be" if not say.failed else f"{say.failed} checks failed")
    return 1 if say.failed else 0


def _say_what_it_is(fixture, about):
    versions = ", ".join(f"{name} {version}" for name, version in about.items())
    (fixture / "README.md").write_text(
        f"Two episodes of a robot that does not exist, written by LeRobot's own `LeRobotDataset`: `python3 -m labkit.lerobot_check --fixture "
        f"tests/lerobot_fixture` made it with {versions}.\n", encoding="utf-8")


def _they_read_ours(say, python, work, ours, release):
    """Every frame of an export, as LeRobotDataset gives it, against the demonstrations it was made from."""
    facts = _theirs(python, "read", work, folder=work / "ours", out=work / "ours.npz")
    seen = np.load(work / "ours.npz")
    frames = sum(map(len, ours))
    files = len(list((work / "ours/data").rglob("*.parquet")))
    say(facts["frames"] == frames and facts["episodes"] == len(ours), f"LeRobotDataset loads our export: {frames} frames, {len(ours)} episodes, "
        f"{files} data files")
    images, depth = np.concatenate([d.images for d in ours]), np.concatenate([d.depth for d in ours])
    say(np.array_equal(np.rint(seen["observation.images.camera"] * 255).transpose(0, 2, 3, 1), images), "every pixel of every picture is the same")
    say(np.array_equal(seen["observation.images.camera_depth"][:, 0], np.rint(depth * 1000)), "every depth is the same, in millimetres")
    state = np.concatenate([np.column_stack([d.joints, d.holding]) for d in ours])
    for key, expected in (("observation.state", state), ("action", np.concatenate([d.actions for d in ours])),
                          ("next.reward", np.concatenate([d.rewards for d in ours])), ("seconds", np.concatenate([d.seconds for d in ours]))):
        say(np.array_equal(seen[key], expected.astype(np.float32)), f"{key} is the same, as float32 {expected.shape}")
    say(list(seen["task"]) == [d.instruction for d in ours for _ in range(len(d))], "the task of every frame is its instruction")
    number = np.concatenate([np.full(len(d), index) for index, d in enumerate(ours)])
    say(np.array_equal(seen["episode_index"], number) and np.array_equal(seen["timestamp"], seen["frame_index"]), "counters and timestamps are right")
    following = np.concatenate([np.r_[d.actions[1:], d.actions[-1:]] for d in ours])
    say(np.array_equal(seen["chunk"][:, 1], following.astype(np.float32)), "delta_timestamps give the next decision's action")
    wins = [index for index, d in enumerate(ours) if d.success]
    say(facts["successes"] == wins, f"meta/episodes tells lerobot the {len(wins)} successful of {len(ours)} episodes")
    their = json.loads((work / "rewritten/meta/stats.json").read_text())
    mine = json.loads((work / "ours/meta/stats.json").read_text())
    compared = [(key, name) for key in mine if key in their and key not in ("index", "task_index", "episode_index")
                for name in ("min", "max", "mean", "std")]
    if release < "0.6":
        compared.remove(("observation.images.camera", "std"))
        print("     (not compared: the deviation of pictures, where lerobot before 0.6 overflows 8 bits: huggingface/lerobot#3682)")
    # Theirs is computed in float32 and, over episodes, from means and variances.
    off = max(np.abs(np.array(mine[key][name], float) - np.array(their[key][name], float)).max() / max(1.0, np.abs(np.array(mine[key][name])).max())
              for key, name in compared)
    say(off < 1e-4, f"{len(compared)} minima, maxima, means and deviations are those that lerobot {release} computes itself, to {off:.1e}")


def _we_read_theirs(say, python, work, name, like, depth):
    """A dataset of lerobot's own writer against the numbers it was made from."""
    from labkit import lerobot

    _theirs(python, "write", work, folder=work / name, like=like, depth=depth, video=False)
    problems = lerobot.validate(work / name)
    found = lerobot.read(work / name, camera="wrist")
    files = len(list((work / name / "data").rglob("*.parquet")))
    say(not problems, f"labkit finds nothing wrong with lerobot's own dataset of {files} data files: {problems or found}")
    expected = [[invented(e, k, **like) for k in range(n)] for e, n in enumerate(like["lengths"])]
    frames = [frame for episode in expected for frame in episode]
    same = [np.array_equal(np.concatenate([getattr(e, field) for e in found.episodes]), np.stack([frame[key] for frame in frames]))
            for field, key in (("images", "picture"), ("state", "state"), ("actions", "action"))]
    say(all(same), f"pictures, states and actions of its {len(frames)} frames are the same: {same}")
    if depth:
        seen = np.concatenate([e.depth for e in found.episodes])
        say(np.array_equal(np.rint(seen * 1000), np.stack([frame["depth"] for frame in frames])), "its depth maps are the same")
    said = [e.instruction for e in found.episodes for _ in range(len(e))]
    pieces = f"{len(expected)} recorded episodes, {len(found.episodes)} pieces of one instruction"
    say(said == [frame["task"] for frame in frames], f"the instruction of every frame is the same ({pieces})")
    times = np.concatenate([e.seconds for e in found.episodes])
    right = [k / like["fps"] for episode in expected for k in range(len(episode))]
    say(np.allclose(times, right, atol=1e-6), f"so are the times, {found.fps:g} a second")


def _we_read_their_video(say, python, work):
    """The same with pictures in mp4 files, which lose a little; with PyAV of the other environment, where this Python can load it."""
    from labkit import lerobot
    from labkit.errors import UserError

    try:
        _theirs(python, "write", work, folder=work / "film", like=FILMED, depth=False, video=True)
    except UserError as error:
        print(f"not tried: reading videos ({error})")
        return
    if find_spec("av") is None:
        said = [str(problem) for problem in lerobot.validate(work / "film")]
        say(any("no decoder is there" in text for text in said), f"without PyAV the video is refused: {said[0]}")
        packages = _run([python, "-I", "-c", "import av, pathlib; print(pathlib.Path(av.__file__).parent.parent)"]).stdout.strip()
        sys.path.append(packages)  # at the end: only what the course does not have comes from there
    try:
        import av
    except ImportError as error:
        print(f"not tried: reading videos (PyAV of the other environment does not load here: {error})")
        return
    found, like = lerobot.read(work / "film"), FILMED
    frames = [invented(e, k, **like)["picture"] for e, n in enumerate(like["lengths"]) for k in range(n)]
    seen = np.concatenate([e.images for e in found.episodes]).astype(float)
    off = np.abs(seen[:, None] - np.stack(frames)[None]).mean((2, 3, 4))
    nearest = off.argmin(1)
    say(len(seen) == len(frames) and np.array_equal(nearest, np.arange(len(frames))), f"each of the {len(frames)} frames read from its videos with "
        f"PyAV {av.__version__} is nearest to the picture it was made from: off by {np.diag(off).mean():.1f} of 255, the next one by "
        f"{np.sort(off, axis=1)[:, 1].mean():.1f}")


# Their side


def _their_side(job, facts):
    _let_torchvision_load()
    if job == "say its versions":
        from importlib.metadata import version

        python = ".".join(map(str, sys.version_info[:3]))
        return {name: version(name) for name in ("lerobot", "datasets", "torch", "pyarrow", "numpy")} | {"Python": python}
    return _their_reading(**facts) if job == "read" else _their_writing(**facts)


def _let_torchvision_load():
    """PyPI's torchvision is built for CUDA; beside a CPU torch its operators are missing, and two of them are asked for when it is imported.

    lerobot's datasets need only its transforms, which are plain Python.
    """
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _let_torchvision_load.library = library  # it undefines them when it is collected


def _their_reading(folder, out):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset("labkit/ours", root=folder)
    items = [dataset[i] for i in range(len(dataset))]
    arrays = {key: np.stack([np.asarray(item[key]) for item in items]) for key in items[0]}
    ahead = LeRobotDataset("labkit/ours", root=folder, delta_timestamps={"action": [0.0, 1.0]})
    np.savez(out, **arrays, chunk=np.stack([np.asarray(ahead[i]["action"]) for i in range(len(ahead))]))
    _rewrite(dataset, items, str(Path(folder).parent / "rewritten"))
    successes = [row["episode_index"] for row in dataset.meta.episodes if row["labkit/success"]]
    some = LeRobotDataset("labkit/ours", root=folder, episodes=successes)
    assert some.num_episodes == len(successes) and some[0]["task"] == items[0]["task"]
    return {"frames": dataset.num_frames, "episodes": dataset.num_episodes, "successes": successes}


def _rewrite(dataset, items, folder):
    """The same frames through lerobot's own writer, for its statistics. Releases that know no depth write without it."""
    import lerobot
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    counters = ("timestamp", "frame_index", "episode_index", "index", "task_index")
    features = {key: value for key, value in dataset.features.items() if key not in counters}
    if lerobot.__version__ < "0.6":
        features = {key: value for key, value in features.items() if not value.get("info")}
    copy = LeRobotDataset.create("labkit/rewritten", dataset.fps, features, root=folder, use_videos=False)
    for item, following in zip(items, [*items[1:], None]):
        frame = {"task": item["task"]}
        for key, feature in features.items():
            value = np.asarray(item[key])
            if feature["dtype"] == "image":
                depth = bool(feature.get("info"))
                value = value.transpose(1, 2, 0).astype(np.uint16) if depth else np.rint(value * 255).astype(np.uint8).transpose(1, 2, 0)
            frame[key] = value.reshape(1) if tuple(feature["shape"]) == (1,) else value
        copy.add_frame(frame)
        if following is None or following["episode_index"] != item["episode_index"]:
            copy.save_episode()
    copy.finalize()


def _their_writing(folder, like, depth, video):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    kind, picture = "video" if video else "image", ["height", "width", "channels"]
    size = (like["height"], like["width"])
    features = {"observation.images.wrist": {"dtype": kind, "shape": (*size, 3), "names": picture},
                "observation.state": {"dtype": "float32", "shape": (like["state"],), "names": [f"joint {i}" for i in range(like["state"])]},
                "action": {"dtype": "float32", "shape": (like["action"],), "names": [f"motor {i}" for i in range(like["action"])]}}
    if depth:
        features["observation.images.wrist_depth"] = {"dtype": kind, "shape": (*size, 1), "names": picture, "info": {"is_depth_map": True}}
    dataset = LeRobotDataset.create("labkit/theirs", like["fps"], features, root=folder, robot_type="invented", use_videos=video)
    dataset.meta.update_chunk_settings(data_files_size_in_mb=1)  # so that a small dataset has several files
    for episode, length in enumerate(like["lengths"]):
        for k in range(length):
            made = invented(episode, k, **like)
            frame = {"observation.images.wrist": made["picture"], "observation.state": made["state"], "action": made["action"], "task": made["task"]}
            dataset.add_frame(frame | ({"observation.images.wrist_depth": made["depth"][..., None]} if depth else {}))
        dataset.save_episode()
    dataset.finalize()
    return {}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--their-side"]:
        print("\n" + json.dumps(_their_side(sys.argv[2], json.loads(sys.argv[3]))))
    else:
        sys.exit(main())
