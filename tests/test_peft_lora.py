"""Lesson 4's helpers against torch, peft and arithmetic: peft's layer under our names, merging, replaced projections, and updates cut to a rank."""

import numpy as np
import pytest
import torch
from torch import nn

from labkit import fine_tune, lora
from labkit.demonstrations import read, samples
from labkit.experiments.lora import attention_weights, best_of_rank, cut_to_rank, rank_for, train_attention_only
from labkit.paths import DATA
from labkit.peft_lora import PeftLayer, merged_by_peft, replace_attention


@pytest.fixture
def drawn():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)


def with_numbers(layer, drawn):
    with torch.no_grad():
        layer.B.copy_(drawn(*layer.B.shape))
    return layer


def test_peft_s_layer_is_the_frozen_weight_at_the_start_and_the_formula_afterwards(drawn):
    weight, x = drawn(8, 6), drawn(5, 6)
    layer = PeftLayer(weight, rank=2, alpha=6.0)
    assert torch.equal(layer(x), nn.functional.linear(x, weight))
    with_numbers(layer, drawn)
    assert torch.allclose(layer(x), x @ (weight + 3.0 * layer.B @ layer.A).T, atol=1e-5)


def test_peft_s_layer_trains_a_and_b_alone_under_the_lesson_s_names(drawn):
    layer = with_numbers(PeftLayer(drawn(8, 6), rank=2, alpha=4.0), drawn)
    layer(drawn(5, 6)).sum().backward()
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"A", "B"}
    assert layer.weight.grad is None and all((p.grad != 0).any() for p in (layer.A, layer.B))


def test_merging_by_peft_is_addition_and_leaves_its_arguments_alone(drawn):
    weight, a, b = drawn(8, 6), drawn(2, 6), drawn(8, 2)
    before = weight.clone()
    assert torch.allclose(merged_by_peft(weight, a, b, 6.0), weight + 3.0 * b @ a, atol=1e-6)
    assert torch.equal(weight, before)


def test_replaced_projections_train_as_peft_s_lora_on_the_whole_robot_does(tiny_policy):
    data = samples(read(DATA / "demonstrations" / "stack", "train")[:8])
    by_hand, by_peft = tiny_policy.copy(), tiny_policy.copy()
    from peft import get_peft_model

    by_peft.model = get_peft_model(by_peft.model, lora(rank=4))
    theirs = [m for _, m in by_peft.model.named_modules() if hasattr(m, "lora_A")]
    built = replace_attention(by_hand.model, lambda weight: PeftLayer(weight, 4, 8))
    with torch.no_grad():
        for one, other in zip(built, theirs, strict=True):
            one.A.copy_(other.lora_A["default"].weight)
    losses = [fine_tune(policy, data, steps=3, learning_rate=1e-3, progress=False).loss for policy in (by_hand, by_peft)]
    assert np.allclose(*losses, atol=1e-5) and losses[0][0] != losses[0][-1]
    assert sum(p.numel() for p in by_hand.model.parameters() if p.requires_grad) == sum(p.numel() for m in built for p in (m.A, m.B))


def test_replacing_projections_of_a_model_without_any_is_refused():
    with pytest.raises(ValueError, match="has no q_proj"):
        replace_attention(nn.Sequential(nn.Linear(2, 2)), lambda weight: weight)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_no_other_matrix_of_that_rank_is_nearer(rank, drawn):
    update = drawn(8, 6)
    best = best_of_rank(update, rank)
    assert torch.linalg.matrix_rank(best) == rank
    values = torch.linalg.svdvals(update)
    assert torch.isclose((update - best).norm() ** 2, (values[rank:] ** 2).sum(), atol=1e-5)
    assert all((update - drawn(8, rank) @ drawn(rank, 6)).norm() > (update - best).norm() for _ in range(20))


def test_the_rank_for_a_share_is_the_first_that_reaches_it(drawn):
    update = drawn(12, 9)
    for share in (0.1, 0.5, 0.9, 0.99):
        rank = rank_for(update, share)
        kept = [float(best_of_rank(update, r).norm() ** 2 / update.norm() ** 2) for r in (rank - 1, rank)]
        assert kept[0] < share <= kept[1] + 1e-6


def test_a_cut_at_full_rank_changes_nothing_and_at_rank_one_leaves_rank_one(tiny_policy):
    policy = tiny_policy.copy()
    pretrained = attention_weights(policy.model)
    assert len(pretrained) == 16
    train_attention_only(policy.model)
    assert sum(p.numel() for p in policy.model.parameters() if p.requires_grad) == sum(w.numel() for w in pretrained.values())
    fine_tune(policy, samples(read(DATA / "demonstrations" / "stack", "train")[:8]), steps=2, learning_rate=1e-3, progress=False)
    trained = attention_weights(policy.model)
    whole, thin = attention_weights(cut_to_rank(policy, pretrained, 128).model), attention_weights(cut_to_rank(policy, pretrained, 1).model)
    for name, weight in trained.items():
        assert torch.allclose(whole[name], weight, atol=1e-6)
        assert not torch.equal(weight, pretrained[name])
        values = torch.linalg.svdvals((thin[name] - pretrained[name]).double())
        assert values[1] < 1e-3 * values[0]
    frozen = {name: p for name, p in policy.model.named_parameters() if name not in pretrained}
    assert all(torch.equal(p, dict(tiny_policy.model.named_parameters())[name]) for name, p in frozen.items())
