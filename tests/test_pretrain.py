"""Properties of pretraining: its labels are what the expert really does, its batches are mixed as stated, and a kill costs nothing."""

import json
from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch.nn.functional import log_softmax

from labkit import pretrain as pretraining
from labkit.actions import NAMES, action_to_bins, bins_to_action, full_waypoint, small_action
from labkit.batches import PromptBuilder, action_token_ids
from labkit.instructions import COLOURS, NOVEL_OBJECTS, Command, sentences
from labkit.pretrain import MIX, Recipe, Sampler, action_logits, command_catalogue, label_scene, labelled_scenes, ordinal_targets, pretrain
from labkit.tabletop import Tabletop
from labkit.tabletop.experts import next_waypoint
from labkit.tabletop.tasks import PRETRAINING_TASKS, commands, is_held_out
from labkit.tiny_vla import build_model, build_processor

RECIPE = Recipe(scenes=40, steps=6, images_per_batch=4, warm_up=2, early=0.34, middle=0.67, seed=1)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretraining")
    labelled_scenes(RECIPE, folder, workers=1)
    return folder


@pytest.fixture(scope="module")
def scenes(cache):
    return labelled_scenes(RECIPE, cache)


@pytest.fixture
def own_cache(cache, tmp_path):
    """A cache of this test's own that already holds the scenes."""
    for file in cache.glob("scenes-*.npz"):
        (tmp_path / file.name).hardlink_to(file)
    return tmp_path


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def labelled(monkeypatch):
    """label_scene, and the environment it photographed, to play the same scene for real."""
    import labkit.tabletop.env as module

    class Remembered(Tabletop):
        def reset(self, **options):
            played["seed"], played["environment"] = options["seed"], self
            return super().reset(**options)

    def label(seed):
        images, rows = label_scene(seed)
        env = played["environment"]
        return images, rows, env.episode.scene, env.episode.variation, played["seed"]

    played = {}
    monkeypatch.setattr(module, "Tabletop", Remembered)
    return label


def test_labels_and_pictures_are_those_of_the_expert_at_work(labelled):
    """The object is really grasped, by way of its tokens; then picture and next waypoint are compared with what pretraining shows."""
    catalogue, pairs, differing, offsets = command_catalogue(), 0, [], []
    for seed in range(12):
        images, rows, scene, variation, env_seed = labelled(seed)
        for index, thing in enumerate(scene.things):
            env = Tabletop("pick", variation)
            observation, _ = env.reset(seed=env_seed, options={"scene": scene, "command": Command("pick", thing.name)})
            assert np.array_equal(observation["rgb"], images[0])
            wanted = next(row for row in rows if row[1] == 0 and catalogue[row[2]] == Command("pick", thing.name))
            observation, _, _, _, info = env.step(full_waypoint(bins_to_action(wanted[4:])))
            assert info["success"], "the label of the first phase grasps the object"
            difference = np.abs(observation["rgb"].astype(int) - images[1 + index]).max(-1)
            differing.append((difference > 10).sum())
            for row in rows[rows[:, 0] == 1 + index]:
                real = small_action(next_waypoint(catalogue[row[2]], scene, env.start, env.state))
                offsets.append(action_to_bins(real) - row[4:])
                pairs += 1
    assert pairs > 150
    assert max(differing) <= 4, "of 2,304 pixels"
    offsets = np.abs(offsets)
    assert offsets[:, :2].max() <= 2 and offsets[:, :2].mean() < 0.6, "a bin is 2 mm"
    assert (offsets[:, 2:] == 0).all()


def test_every_command_of_the_scene_is_labelled_once_a_phase(labelled):
    catalogue = command_catalogue()
    for seed in range(6):
        images, rows, scene, _, _ = labelled(seed)
        everything = [c for task in PRETRAINING_TASKS for c in commands(task, scene)]
        first = [catalogue[row[2]] for row in rows if row[1] == 0]
        second = [catalogue[row[2]] for row in rows if row[1] == 1]
        assert Counter(first) == Counter(everything)
        assert Counter(second) == Counter(c for c in everything if c.task != "pick")
        assert images.shape == (4, 48, 48, 3) and set(rows[rows[:, 1] == 0][:, 0]) == {0}
        for row in rows:
            if row[1] == 1:
                assert scene.things[row[0] - 1].name == catalogue[row[2]].object
            named = {colour for i, colour in enumerate(COLOURS) if row[3] >> i & 1}
            assert named == scene.unique_colours


def test_a_held_object_leaves_its_place_and_nothing_else_moves(labelled):
    images, _, scene, _, _ = labelled(3)
    changed = [(images[0] != images[1 + i]).any(-1) for i in range(3)]
    assert all(20 < mask.sum() < 200 for mask in changed)
    assert not (changed[0] & changed[1] & changed[2]).any()


def test_held_out_combinations_and_novel_objects_are_never_shown(scenes):
    _, samples = scenes
    seen = {command_catalogue()[i] for i in set(samples[:, 2])}
    assert not [c for c in seen if is_held_out(c)]
    assert not [c for c in seen if {c.object, c.destination} & set(NOVEL_OBJECTS)]
    assert {c.task for c in seen} == set(PRETRAINING_TASKS)


def test_the_catalogue_is_as_large_as_combinatorics_says():
    """15 objects: pick 15, put 15 x 5, move 15 x 3, beside 15 x 14."""
    assert len(command_catalogue()) == len(set(command_catalogue())) == 15 + 75 + 45 + 210


def test_scenes_are_made_once_and_are_the_same_again(cache, tmp_path, scenes):
    file = next(cache.glob("scenes-*.npz"))
    before = file.stat().st_mtime_ns
    labelled_scenes(RECIPE, cache)
    assert file.stat().st_mtime_ns == before
    images, samples = labelled_scenes(replace(RECIPE, scenes=3), tmp_path, workers=1)
    assert np.array_equal(images, scenes[0][: len(images)]) and np.array_equal(samples, scenes[1][: len(samples)])
    other, _ = labelled_scenes(replace(RECIPE, scenes=3, seed=2), tmp_path, workers=1)
    assert not np.array_equal(images, other)


def test_samples_are_drawn_with_the_shares_of_the_mix(scenes):
    sampler, catalogue = Sampler(*scenes, replace(RECIPE, images_per_batch=16)), command_catalogue()
    counts, batches = Counter(), 250
    for step in range(batches):
        _, rows, _ = sampler.batch(step)
        counts.update((int(row[1]), catalogue[row[2]].task) for row in rows)
    assert np.isclose(sum(MIX.values()), 1)
    for kind, share in MIX.items():
        # Four samples share an image, so the effective number of draws lies between 4,000 images and 16,000 samples.
        assert abs(counts[kind] / (64 * batches) - share) < 4 * np.sqrt(share * (1 - share) / (16 * batches)), kind


def test_a_batch_groups_its_samples_by_image_and_says_their_commands(scenes):
    sampler, catalogue = Sampler(*scenes, RECIPE), command_catalogue()
    for step in range(5):
        chosen, rows, said = sampler.batch(step)
        assert np.array_equal(rows[:, 0], np.repeat(chosen, RECIPE.commands_per_image))
        for row, text in zip(rows, said):
            unique = frozenset(colour for i, colour in enumerate(COLOURS) if row[3] >> i & 1)
            assert any(plain in text for plain in sentences(catalogue[row[2]], unique_colours=unique))


def test_a_batch_depends_on_the_seed_and_the_step_alone(scenes):
    one, other = Sampler(*scenes, RECIPE), Sampler(*scenes, RECIPE)
    one.batch(0)
    one.batch(1)
    assert np.array_equal(one.batch(5)[1], other.batch(5)[1]) and one.batch(5)[2] == other.batch(5)[2]
    assert len({one.batch(step)[1].tobytes() for step in range(8)}) == 8
    assert not np.array_equal(one.batch(5)[1], Sampler(*scenes, replace(RECIPE, seed=2)).batch(5)[1])


def test_ordinal_targets_are_a_gaussian_around_the_true_bin():
    bins = torch.tensor([[0, 1, 128, 255]])
    targets = ordinal_targets(bins, 2.0)
    assert targets.shape == (1, 4, 256)
    assert torch.allclose(targets.sum(-1), torch.ones(1, 4))
    assert torch.equal(targets.argmax(-1), bins)
    expected = norm.pdf(np.arange(256), 128, 2)
    assert np.allclose(targets[0, 2], expected / expected.sum(), atol=1e-7)


def test_the_learning_rate_warms_up_stays_and_falls_to_its_last_share():
    recipe = Recipe(steps=1000, warm_up=100, constant_until=0.6, final_rate=0.02, learning_rate=1.0)
    rates = np.array([recipe.rate(step) for step in range(1000)])
    assert np.allclose(rates[:100], np.arange(1, 101) / 100)
    assert np.allclose(rates[100:601], 1.0)
    assert np.allclose([rates[700], rates[800], rates[900]], [0.75, 0.5, 0.25])
    assert (np.diff(rates[600:]) <= 0).all() and np.isclose(rates[-1], 0.02)


@pytest.fixture(scope="module")
def model():
    return build_model(3)


def test_sharing_an_image_among_prompts_equals_repeating_it(model, scenes):
    processor = build_processor()
    prompts, ids = PromptBuilder(processor), action_token_ids(processor.tokenizer)
    chosen, rows, said = Sampler(*scenes, RECIPE).batch(0)
    images, tokens = scenes[0], ids[torch.as_tensor(rows[:, 4:]).long()]
    text = prompts.text(said, rows[:, 1] == 1)
    shared = action_logits(model, text, RECIPE.commands_per_image, prompts.pixels(images[chosen]), tokens)
    plain = model(
        input_ids=torch.cat([text["input_ids"], tokens], 1), attention_mask=torch.cat([text["attention_mask"], torch.ones_like(tokens)], 1),
        pixel_values=prompts.pixels(images[rows[:, 0]]),
    ).logits[:, -len(NAMES) - 1 : -1]
    assert shared.shape == plain.shape and torch.allclose(shared, plain, atol=1e-5)


def test_the_pretraining_loss_with_narrow_targets_is_the_fine_tuning_loss(model, scenes):
    """As the Gaussian narrows to one bin, and words are ruled out, the ordinal loss becomes plain cross-entropy."""
    bins = torch.as_tensor(scenes[1][:8, 4:]).long()
    logits = torch.randn(8, 4, 256, generator=torch.Generator().manual_seed(0))
    ordinal = -(ordinal_targets(bins, 0.05) * log_softmax(logits, -1)).sum(-1).mean()
    assert torch.isclose(ordinal, torch.nn.functional.cross_entropy(logits.flatten(0, 1), bins.flatten()))


@pytest.fixture(scope="module")
def uninterrupted(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    for file in cache.glob("scenes-*.npz"):
        (folder / file.name).hardlink_to(file)
    pretrain(RECIPE, folder / "out", folder)
    return folder / "out"


def test_a_run_that_was_stopped_and_resumed_is_bit_identical_to_one_that_was_not(uninterrupted, own_cache):
    out = own_cache / "out"
    pretrain(RECIPE, out, own_cache, stop_after=2)
    assert not (out / "model.safetensors").exists()
    pretrain(RECIPE, out, own_cache, stop_after=1)
    pretrain(RECIPE, out, own_cache)
    for name in ("", "early", "middle"):
        assert same(weights(out / name), weights(uninterrupted / name)), name


def test_a_run_that_was_killed_between_two_saves_is_bit_identical_to_one_that_was_not(uninterrupted, own_cache, monkeypatch):
    class Dies(Sampler):
        def batch(self, step):
            if step == 5:
                raise KeyboardInterrupt
            return super().batch(step)

    out = own_cache / "out"
    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "Sampler", Dies)
        with pytest.raises(KeyboardInterrupt):
            pretrain(RECIPE, out, own_cache, save_every=2)
    pretrain(RECIPE, out, own_cache)
    assert same(weights(out), weights(uninterrupted)) and same(weights(out / "early"), weights(uninterrupted / "early"))


def test_a_run_leaves_three_checkpoints_and_its_recipe(uninterrupted):
    early, middle, final = (weights(uninterrupted / name) for name in ("early", "middle", ""))
    assert early.keys() == middle.keys() == final.keys()
    assert not same(early, middle) and not same(middle, final)
    recipe = json.loads((uninterrupted / "pretraining.json").read_text())["recipe"]
    assert recipe == json.loads(json.dumps(asdict(RECIPE)))


def test_pretraining_teaches_the_bins(cache, tmp_path):
    """Forty steps on a few scenes bring the loss well below ln 256, that of knowing nothing about the bin."""
    for file in cache.glob("scenes-*.npz"):
        (tmp_path / file.name).hardlink_to(file)
    log = pretrain(replace(RECIPE, steps=50, warm_up=10, images_per_batch=8), tmp_path / "out", tmp_path)
    assert log[-1]["step"] == 50 and log[-1]["object_nats"] < np.log(256)


def test_another_seed_gives_another_model(uninterrupted, tmp_path):
    recipe = replace(RECIPE, scenes=8, steps=1, seed=9)
    labelled_scenes(recipe, tmp_path, workers=1)
    pretrain(recipe, tmp_path / "out", tmp_path)
    assert not same(weights(tmp_path / "out"), weights(uninterrupted))


def test_another_recipe_does_not_go_on_from_the_state_of_this_one(own_cache):
    pretrain(RECIPE, own_cache / "out", own_cache, stop_after=3)
    shorter = replace(RECIPE, steps=2, learning_rate=1e-4)
    pretrain(shorter, own_cache / "shorter", own_cache)
    alone = own_cache / "alone"
    alone.mkdir()
    next(alone.parent.glob("scenes-*.npz")).rename(alone / f"scenes-{RECIPE.scenes}-seed{RECIPE.seed}.npz")
    pretrain(shorter, alone / "out", alone)
    assert same(weights(own_cache / "shorter"), weights(alone / "out"))
