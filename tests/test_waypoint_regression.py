"""Properties of the regression loop: a kill costs nothing, the best weights come back, and what cannot be learned from is named."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from labkit.clip_pretraining import Recipe, build_model, build_processor
from labkit.demonstrations import read
from labkit.errors import UserError
from labkit.paths import DATA
from labkit.task_specific_vla import ActionNormaliser, policy_from_towers, set_trainable
from labkit.waypoint_regression import WaypointSamples, action_accuracy, epochs_of, fit, patch_of, predict, step_faults, waypoint_samples

SETTINGS = {"epochs": 4, "batch_size": 4, "progress": False, "step_size": 2, "gamma": 0.5}


@pytest.fixture
def policy():
    clip = build_model(Recipe(width=32, vision_layers=2, text_layers=2, seed=4))
    policy = policy_from_towers(clip.vision_model, clip.text_model, build_processor(), readout="spatial")
    set_trainable(policy.model, "full")
    return policy


@pytest.fixture(scope="module")
def demonstrations():
    return read(DATA / "demonstrations" / "align", "train", limit=7)


@pytest.fixture
def train(demonstrations):
    return waypoint_samples(demonstrations[:5])


@pytest.fixture
def validation(demonstrations):
    return waypoint_samples(demonstrations[5:])


def weights(policy):
    return {name: value.clone() for name, value in policy.model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Killed(Exception):
    """What a kill looks like from inside."""


def kill_after(epochs):
    def callback(epoch, policy, curves):
        if epoch + 1 == epochs:
            raise Killed
    return callback


def test_samples_are_the_decisions_with_their_names(demonstrations):
    found = waypoint_samples(demonstrations, frames=2)
    k = len(demonstrations[0])
    assert len(found) == sum(len(d) for d in demonstrations)
    assert found.ids[:k] == [f"{demonstrations[0].id}/{i}" for i in range(k)]
    assert found.images.shape[1:] == (2, 48, 48, 3)
    assert not found.images[0, 1].any() and np.array_equal(found.images[1, 1], demonstrations[0].images[0])
    assert np.array_equal(found.images[1, 0], demonstrations[0].images[1])
    assert np.array_equal(found.actions[k], demonstrations[1].actions[0]) and found.actions.shape[1] == 7
    assert found.instructions[k] == demonstrations[1].instruction


def test_nothing_to_learn_from_is_refused():
    with pytest.raises(ValueError, match="no successful demonstration"):
        waypoint_samples([])


def test_one_step_is_adamw_on_the_mean_squared_error(policy, train, validation):
    for module in policy.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    by_hand = policy.copy()
    fit(policy, train, validation, **{**SETTINGS, "epochs": 1, "batch_size": len(train), "clip": 1e9, "weight_decay": 0.1, "tower_rate": 1e-4})
    model = by_hand.model.train()
    towers = [p for t in (model.vision_encoder, model.text_encoder) for p in t.parameters()]
    head = [*model.action_head.parameters(), *model.sentence_attention.parameters()]
    optimiser = torch.optim.AdamW([{"params": head, "lr": 1e-3}, {"params": towers, "lr": 1e-4}], weight_decay=0.1)
    actions, low, high = torch.tensor(train.actions, dtype=torch.float32), model.normaliser.low, model.normaliser.high
    wanted = torch.cat([2 * (actions - low) / (high - low) - 1, (4 * actions[:, 5:6]).sin()], dim=1)
    wanted[:, 5] = (4 * actions[:, 5]).cos()
    out = model(by_hand.pixels(train.images), **by_hand.words(train.instructions, train.holding))
    ((out - wanted) ** 2).mean().backward()
    optimiser.step()
    ours, theirs = weights(policy), weights(by_hand)
    # AdamW's first step is about the rate times the gradient's sign: where the gradient is near zero, rounding decides the sign.
    assert np.mean([torch.isclose(ours[name], theirs[name], atol=2e-5).float().mean().item() for name in ours]) > 0.98


def test_epochs_of_a_curve_are_those_of_a_run(policy, train, validation):
    curves = fit(policy, train, validation, **{**SETTINGS, "epochs": 8, "head_rate": 0.03, "tower_rate": 0.03}, patience=2)
    assert epochs_of(curves.validation, 2) == [curves.best_epoch, len(curves.validation) - 1]
    assert epochs_of([5.0, 3.0, 4.0, 4.0, 1.0], 2) == [1, 3] and epochs_of([3.0, 2.0], 5) == [1, 1]


def test_step_faults_name_what_stood_still_and_what_strayed():
    before = {name: torch.zeros(2) for name in "abcd"}
    after = {**before, "b": torch.tensor([0.0, 1e-30]), "d": torch.ones(2)}
    assert step_faults(before, after, ["a", "b"]) == {"still": ["a"], "moved": ["d"]}
    assert step_faults(before, before, []) == {"still": [], "moved": []}


@pytest.mark.parametrize("variant", ["frozen", "language"])
def test_a_vision_tower_that_stands_still_sees_each_picture_once(policy, train, validation, variant, monkeypatch):
    set_trainable(policy.model, variant)
    slow, calls = policy.copy(), []
    encode = type(policy.model).encode_pictures
    monkeypatch.setattr(type(policy.model), "encode_pictures", lambda model, pixels: calls.append(len(pixels)) or encode(model, pixels))
    curves = fit(policy, train, validation, **SETTINGS)
    distinct = len({picture.tobytes() for picture in train.images[:, 0]})
    assert sum(calls) == distinct + SETTINGS["epochs"] * len(validation)
    # The same samples through an augmentation that changes nothing take the long way.
    same_curves = fit(slow, train, validation, augment=lambda samples, epoch: samples, **SETTINGS)
    assert curves.train == pytest.approx(same_curves.train, rel=1e-4) and curves.validation == pytest.approx(same_curves.validation, rel=1e-4)


def test_curves_hold_the_rates_of_a_step_scheduler(policy, train, validation):
    curves = fit(policy, train, validation, **SETTINGS)
    assert [rate["head"] for rate in curves.rates] == pytest.approx([1e-3, 1e-3, 5e-4, 5e-4])
    assert [rate["towers"] for rate in curves.rates] == pytest.approx([3e-4, 3e-4, 1.5e-4, 1.5e-4])
    assert len(curves.train) == len(curves.validation) == 4


def test_pointing_teaches_the_first_query_where_the_waypoint_leads(policy, train):
    def looked_at(one):
        one.model.eval()
        with torch.no_grad():
            seen = one.model.encode_images(one.pixels(train.images))
            looks = one.model.predict(*seen, one.model.encode_sentences(**one.words(train.instructions, train.holding)))[1]
        wanted = patch_of(train.actions, 8)
        return float(np.mean([looks[i, 0, 0, patch] for i, patch in enumerate(wanted)]))

    without = policy.copy()
    fit(without, train, train, epochs=30, batch_size=5, progress=False)
    fit(policy, train, train, epochs=30, batch_size=5, progress=False, pointing=0.5)
    assert looked_at(policy) > max(0.3, 2 * looked_at(without))


def test_it_learns_what_it_is_shown(policy, train):
    before = np.abs(predict(policy, train)[:, :3] - train.actions[:, :3]).mean()
    curves = fit(policy, train, train, epochs=40, batch_size=5, progress=False)
    after = np.abs(predict(policy, train)[:, :3] - train.actions[:, :3]).mean()
    assert curves.train[-1] < 0.3 * curves.train[0] and after < 0.5 * before


def test_frozen_towers_stay_bit_for_bit(policy, train, validation):
    set_trainable(policy.model, "frozen")
    before = weights(policy)
    fit(policy, train, validation, **SETTINGS)
    after = weights(policy)
    assert all(torch.equal(before[name], after[name]) for name in before if "encoder" in name)
    assert not torch.equal(before["action_head.0.weight"], after["action_head.0.weight"])


def test_the_normaliser_is_no_parameter_and_never_moves(policy, train, validation):
    fit(policy, train, validation, **SETTINGS)
    assert torch.equal(policy.model.normaliser.low, ActionNormaliser().low)


def test_the_weights_of_the_lowest_validation_loss_come_back(policy, train, validation, tmp_path):
    seen = []

    def misled(samples, epoch):
        wrong = samples.actions if epoch < 4 else samples.actions + 0.5
        return WaypointSamples(samples.ids, samples.instructions, samples.images, samples.holding, wrong)

    curves = fit(policy, train, validation, tmp_path, **{**SETTINGS, "epochs": 8}, augment=misled,
                 callbacks=[lambda epoch, policy, curves: seen.append(weights(policy))])
    assert curves.best_epoch == int(np.argmin(curves.validation))
    assert curves.best_epoch != len(curves.validation) - 1, "the test needs a run whose last epoch is not its best"
    assert same(weights(policy), seen[curves.best_epoch]) and not same(weights(policy), seen[-1])
    assert same(load_file(tmp_path / "best.safetensors"), weights(policy))
    assert not policy.model.training


def test_patience_ends_a_run_that_gets_no_better(policy, train, validation):
    curves = fit(policy, train, validation, **{**SETTINGS, "epochs": 200}, patience=3)
    assert curves.stopped_early and len(curves.train) == curves.best_epoch + 1 + 3 < 200


@pytest.mark.parametrize("variant", ["full", "lora"])
def test_a_killed_run_ends_as_one_that_was_not(policy, train, validation, tmp_path, variant):
    set_trainable(policy.model, variant)
    whole, killed, resumed = policy.copy(), policy.copy(), policy.copy()
    expected = fit(whole, train, validation, tmp_path / "whole", **SETTINGS)
    with pytest.raises(Killed):
        fit(killed, train, validation, tmp_path / "killed", **SETTINGS, callbacks=[kill_after(2)])
    torch.manual_seed(999)  # Whatever the process did in between must not matter.
    curves = fit(resumed, train, validation, tmp_path / "killed", **SETTINGS)
    assert same(weights(whole), weights(resumed))
    assert curves.train == expected.train and curves.validation == expected.validation and curves.rates == expected.rates
    assert same(load_file(tmp_path / "whole" / "best.safetensors"), load_file(tmp_path / "killed" / "best.safetensors"))


def test_a_kill_within_an_epoch_costs_no_more_than_that_epoch(policy, train, validation, tmp_path):
    whole, killed, resumed = policy.copy(), policy.copy(), policy.copy()
    fit(whole, train, validation, **SETTINGS)

    class Dying:
        calls = 0

        def __call__(self, samples, epoch):
            if epoch == 3:
                raise Killed
            return samples

    keep = {"augment": lambda samples, epoch: samples}
    with pytest.raises(Killed):
        fit(killed, train, validation, tmp_path, **SETTINGS, augment=Dying())
    done = json.loads(torch.load(tmp_path / "state.pt", weights_only=True)["curves"])
    assert len(done["train"]) == 3
    fit(resumed, train, validation, tmp_path, **SETTINGS, **keep)
    assert same(weights(whole), weights(resumed))


def test_a_finished_run_is_not_trained_again_but_can_be_made_longer(policy, train, validation, tmp_path):
    again, longer, straight = policy.copy(), policy.copy(), policy.copy()
    first = fit(policy, train, validation, tmp_path, **SETTINGS)
    second = fit(again, train, validation, tmp_path, **SETTINGS)
    assert second.seconds == first.seconds and same(weights(policy), weights(again))
    fit(longer, train, validation, tmp_path, **{**SETTINGS, "epochs": 6})
    fit(straight, train, validation, **{**SETTINGS, "epochs": 6})
    assert same(weights(longer), weights(straight))


@pytest.mark.parametrize("change", ["settings", "samples", "weights", "variant"])
def test_another_runs_folder_is_refused(policy, train, validation, tmp_path, change):
    other, settings = policy.copy(), dict(SETTINGS)
    fit(policy, train, validation, tmp_path, **{**SETTINGS, "epochs": 1})
    if change == "settings":
        settings["head_rate"] = 2e-3
    if change == "samples":
        train = train.rows(range(len(train) - 1))
    if change == "weights":
        other.model.action_head[0].bias.data += 1
    if change == "variant":
        set_trainable(other.model, "frozen")
    with pytest.raises(UserError, match="belongs to another run") as caught:
        fit(other, train, validation, tmp_path, **settings)
    assert str(tmp_path) in str(caught.value)


def test_the_global_generator_is_left_alone(policy, train, validation):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    fit(policy, train, validation, **SETTINGS)
    assert torch.equal(before, torch.get_rng_state())


def test_seeds_decide(policy, train, validation):
    a, b, c = (policy.copy() for _ in range(3))
    for one, seed in ((a, 0), (b, 0), (c, 1)):
        fit(one, train, validation, **SETTINGS, seed=seed)
    assert same(weights(a), weights(b)) and not same(weights(a), weights(c))


def test_nan_in_the_first_epoch_names_step_and_samples(policy, train, validation, tmp_path):
    train.actions[6, 2] = np.nan
    with pytest.raises(UserError) as caught:
        fit(policy, train, validation, tmp_path, **{**SETTINGS, "batch_size": 2})
    text = str(caught.value)
    assert train.ids[6] in text and "step " in text and "epoch 0" in text and "no good checkpoint yet" in text and "\n" not in text
    assert sum(name in text for name in train.ids) == 2


def test_nan_later_names_the_last_good_checkpoint_and_brings_it_back(policy, train, validation, tmp_path):
    good = []

    def poison(samples, epoch):
        if epoch < 2:
            return samples
        bad = samples.actions.copy()
        bad[3] = np.inf
        return WaypointSamples(samples.ids, samples.instructions, samples.images, samples.holding, bad)

    with pytest.raises(UserError, match=r"step (6|7|8) \(epoch 2\)") as caught:
        fit(policy, train, validation, tmp_path, **SETTINGS, augment=poison,
            callbacks=[lambda epoch, policy, curves: good.append((weights(policy), curves.best_epoch))])
    best = good[-1][1]
    assert str(tmp_path / "best.safetensors") in str(caught.value) and f"of epoch {best}" in str(caught.value)
    assert train.ids[3] in str(caught.value)
    assert same(weights(policy), good[best][0])


def test_nan_among_the_validation_labels_is_named(policy, train, validation):
    validation.actions[1, 0] = np.nan
    with pytest.raises(UserError, match=validation.ids[1]):
        fit(policy, train, validation, **SETTINGS)


@pytest.mark.parametrize("options, said", [({"loss": "huber"}, "'mse' or 'l1'")])
def test_unknown_options_are_refused(policy, train, validation, options, said):
    with pytest.raises(ValueError, match=said):
        fit(policy, train, validation, **SETTINGS, **options)


def test_nothing_to_train_is_refused(policy, train, validation):
    policy.model.requires_grad_(False)
    with pytest.raises(ValueError, match="requires a gradient"):
        fit(policy, train, validation, **SETTINGS)


def test_no_validation_samples_are_refused(policy, train):
    with pytest.raises(ValueError, match="0 to validate on"):
        fit(policy, train, train.rows([]), **SETTINGS)


def test_accuracy_has_an_axis_and_a_unit(policy, train):
    found = action_accuracy(policy, train)
    assert {name: row["unit"] for name, row in found.items()} == {
        "x": "m", "y": "m", "z": "m", "roll": "rad", "pitch": "rad", "yaw": "rad", "grip": ""}
    said = policy.predict(train.instructions, train.images, train.holding)
    assert found["y"]["error"] == pytest.approx(np.mean(np.abs(said[:, 1] - train.actions[:, 1])), rel=1e-4)
    assert found["grip"]["error"] == np.mean((said[:, 6] > 0.5) != (train.actions[:, 6] > 0.5))
