"""What every test file shares: one thread, no network, and the policies under test."""

import os

import pytest

from labkit.processes import THREADS

# Before anything imports torch or transformers: that is why every heavy import of this file stands inside a fixture.
os.environ.update(THREADS, HF_HUB_OFFLINE="1")

# Short and long sentences in one batch, so that every batch has padding.
SENTENCES = [
    "pick up the red block",
    "please take the yellow mug and put it in the purple container",
    "move the green ball to the left",
    "now put the blue cube on top of the red cube",
    "grasp the leftmost object",
    "place the purple sphere next to the green cup please",
]


@pytest.fixture(scope="session")
def shipped_policy():
    """The policy in data/tiny_vla; tests that need it are skipped until it is finished."""
    from labkit.policy import SHIPPED, load_policy

    if not (SHIPPED["tiny"] / "freeze.json").exists():
        pytest.skip("data/tiny_vla holds no finished checkpoint (freeze.json is missing): `python -m labkit pretrain` makes it")
    return load_policy("tiny", device="cpu")


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """Tiny towers with random weights, saved as CLIP is saved."""
    from labkit.clip_pretraining import Recipe, build_model, build_processor

    folder = tmp_path_factory.mktemp("towers") / "random-clip"
    build_model(Recipe(width=32, vision_layers=3, seed=3)).save_pretrained(folder)
    build_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """The tiny VLA with random weights, saved as `save_pretrained` does."""
    from labkit.tiny_vla import build_model, build_processor

    folder = tmp_path_factory.mktemp("policies") / "random-tiny"
    build_model(seed=1).save_pretrained(folder)
    build_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def _loaded_tiny(tiny_folder):
    from labkit.policy import load_policy

    return load_policy(tiny_folder, device="cpu")


@pytest.fixture
def tiny_policy(_loaded_tiny):
    """The tiny VLA with random weights, for this test alone."""
    return _loaded_tiny.copy()


@pytest.fixture(scope="session")
def observations():
    """Six first observations of six scenes, with sentences of different lengths."""
    from labkit.tabletop import Tabletop

    env = Tabletop("put")
    seen = [env.reset(seed=seed)[0] for seed in range(len(SENTENCES))]
    return [{**o, "instruction": text, "holding": i % 2} for i, (o, text) in enumerate(zip(seen, SENTENCES))]


@pytest.fixture(scope="session")
def samples(observations):
    """What `fine_tune` learns from: the observations, each with an action drawn at random."""
    import numpy as np

    from labkit.actions import HIGH, LOW
    from labkit.demonstrations import Samples

    return Samples(
        [o["instruction"] for o in observations], np.stack([o["rgb"] for o in observations]),
        np.array([bool(o["holding"]) for o in observations]),
        np.random.default_rng(5).uniform(LOW, HIGH, (len(observations), 4)),
    )
