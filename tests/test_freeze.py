"""Environment, vocabulary and checkpoint stay what they were when the checkpoint was made, and everything stored says so."""

import hashlib
import json

import numpy as np
import pytest

from labkit import freeze, instructions
from labkit.paths import DATA
from labkit.tabletop import scene

CHECKPOINT = DATA / "tiny_vla"
STORED = freeze.stored_freeze()
DATASETS = sorted(DATA.glob("demonstrations/*/dataset.json"))


@pytest.mark.parametrize("part", ["environment", "vocabulary", "checkpoint"])
def test_nothing_has_drifted_since_the_checkpoint_was_made(part):
    assert freeze.frozen_parts()[part] == STORED[part]


def test_the_checkpoint_part_is_the_hash_of_its_bytes():
    assert STORED["checkpoint"] == hashlib.sha256((CHECKPOINT / "model.safetensors").read_bytes()).hexdigest()


def test_the_model_card_shows_the_freeze():
    assert f"`{freeze.freeze_hash()}`" in (CHECKPOINT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", DATASETS, ids=lambda path: path.parent.name)
def test_every_shipped_dataset_carries_the_freeze(path):
    assert json.loads(path.read_text(encoding="utf-8"))["freeze"] == freeze.freeze_hash()


def test_a_new_word_breaks_the_freeze(monkeypatch):
    monkeypatch.setattr(instructions, "RESERVED_WORDS", [*instructions.RESERVED_WORDS, "banana"])
    assert freeze.frozen_parts()["vocabulary"] != STORED["vocabulary"]


def test_a_moved_bin_breaks_the_freeze(monkeypatch):
    monkeypatch.setattr(scene, "BIN_PLACES", ((-0.15, 0.175), *scene.BIN_PLACES[1:]))
    assert freeze.frozen_parts()["environment"] != STORED["environment"]


def test_the_tokenizer_of_the_checkpoint_has_the_frozen_vocabulary():
    tokens = json.loads((CHECKPOINT / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    assert [token for token in tokens if token.isalnum() or "'" in token] == instructions.vocabulary()


def test_a_golden_episode_ends_where_it_did_when_the_environment_was_frozen():
    measured, golden = freeze.golden_episode(), STORED["golden_episode"]
    assert measured["instruction"] == golden["instruction"]
    np.testing.assert_allclose(measured["positions"], golden["positions"], atol=0.003)
    assert abs(measured["brightness"] - golden["brightness"]) < 0.5
