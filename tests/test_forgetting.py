"""Properties of what keeps a policy near its start, held against autograd, torch.func, torch's distributions and arithmetic."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from labkit.batches import IGNORED
from labkit.demonstrations import read
from labkit.demonstrations import samples as samples_of
from labkit.experiments import ewc_versus_mixing as experiment
from labkit.forgetting import (
    KLAnchor,
    action_logits,
    diagonal_fisher,
    displacement,
    ewc_penalty,
    kl_divergence,
    l2_penalty,
    mixed_loss,
    module_of,
    output_fisher,
    per_sample_gradients,
    quadratic_penalty,
    start_of,
    trained,
    with_drawn_actions,
)
from labkit.paths import DATA
from labkit.policy import load_policy
from labkit.sft import batch_loss, fine_tune, lora, tokenize
from labkit.tabletop import Tabletop


@pytest.fixture(scope="module")
def old():
    return experiment.rows_of(samples_of(read(DATA / "demonstrations" / "replay", "train", limit=8)), np.arange(6))


@pytest.fixture(scope="module")
def stack():
    return samples_of(read(DATA / "demonstrations" / "stack", "train", limit=4))


@pytest.fixture
def policy(shipped_policy):
    return shipped_policy.copy()


@pytest.fixture
def batch(policy, old):
    return tokenize(policy, old)



def by_torch_func(model, batch):
    """Gradients of log p of the four action tokens, by functional_call and torch.func.grad on the whole logits, one sample at a time."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def log_p(parameters, one):
        inputs = {name: value for name, value in one.items() if name != "labels"}
        logits = torch.func.functional_call(model, (parameters, buffers), kwargs={**inputs, "use_cache": False}).logits
        return -cross_entropy(logits[0, :-1], one["labels"][0, 1:], ignore_index=IGNORED, reduction="sum")

    for row in range(len(batch["labels"])):
        yield torch.func.grad(log_p)(parameters, {name: value[row : row + 1] for name, value in batch.items()})


def test_per_sample_gradients_are_those_of_torch_func(policy, batch):
    for mine, theirs in zip(per_sample_gradients(policy.model, batch), by_torch_func(policy.model, batch), strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert torch.allclose(mine[name], theirs[name], rtol=1e-3, atol=1e-4 * float(theirs[name].abs().max()) + 1e-7), name


def test_their_mean_is_the_gradient_of_the_batch(policy, batch):
    found = list(per_sample_gradients(policy.model, batch))
    (-4 * batch_loss(policy.model, batch)).backward()
    for name, parameter in policy.model.named_parameters():
        mean = torch.stack([g[name] for g in found]).mean(0)
        if parameter.grad is None:
            assert not mean.any()
        else:
            assert torch.allclose(mean, parameter.grad, rtol=1e-3, atol=1e-4 * float(mean.abs().max()) + 1e-6), name


def test_the_fisher_of_the_data_is_the_mean_of_their_squares_and_no_square_of_the_mean(policy, old, batch):
    fisher = diagonal_fisher(policy, old, "data")
    found = [g["language_model.lm_head.weight"] if "language_model.lm_head.weight" in g else g["lm_head.weight"]
             for g in per_sample_gradients(policy.model, batch)]
    name = next(n for n in fisher if n.endswith("lm_head.weight"))
    assert torch.allclose(fisher[name], torch.stack(found).square().mean(0))
    assert not torch.allclose(fisher[name], torch.stack(found).mean(0).square())
    assert all((value >= 0).all() and value.shape == dict(policy.model.named_parameters())[n].shape for n, value in fisher.items())


def test_the_fisher_leaves_the_policy_as_it_was_and_is_the_same_for_the_same_seed(policy, old):
    before = {name: p.clone() for name, p in policy.model.state_dict().items()}
    one, again, other = (diagonal_fisher(policy, old, "model", seed) for seed in (3, 3, 4))
    assert all(torch.equal(value, before[name]) for name, value in policy.model.state_dict().items())
    assert all(p.grad is None for p in policy.model.parameters())
    assert all(torch.equal(one[name], again[name]) for name in one) and any(not torch.equal(one[name], other[name]) for name in one)


def test_unknown_labels_of_the_fisher_are_refused(policy, old):
    with pytest.raises(ValueError, match="'model' or 'data'"):
        diagonal_fisher(policy, old, "guess")


def test_drawn_actions_follow_the_policy_s_own_probabilities_token_by_token(policy, batch):
    """One prompt many times: the first token's frequencies against softmax, within five standard errors."""
    many = {name: value[:1].expand(400, *value.shape[1:]).contiguous() for name, value in batch.items()}
    drawn = with_drawn_actions(policy, many, torch.Generator().manual_seed(0))
    tokens = drawn["labels"][:, -4:]
    assert torch.equal(tokens, drawn["input_ids"][:, -4:]) and torch.equal(drawn["labels"][:, :-4], many["labels"][:, :-4])
    assert torch.isin(tokens, policy.action_ids).all()
    p = action_logits(policy.model, {name: value[:1] for name, value in batch.items()})[0, 0, policy.action_ids].softmax(-1)
    share = torch.stack([(tokens[:, 0] == i).float().mean() for i in policy.action_ids])
    assert ((share - p).abs() <= 5 * (p * (1 - p) / 400).sqrt() + 1e-6 + (p < 1e-3) * 0.02).all()


def test_the_output_layer_s_fisher_in_closed_form_is_that_of_torch_func():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(7, 3, generator=generator), torch.randn(5, 3, generator=generator)
    labels = torch.randint(5, (7,), generator=generator)
    gradients = torch.func.vmap(torch.func.grad(lambda w, x, y: cross_entropy(w @ x, y)), in_dims=(None, 0, 0))(weight, hidden, labels)
    assert torch.allclose(output_fisher(hidden, weight, labels), gradients.square().mean(0), atol=1e-6)


def test_with_labels_from_the_model_the_fisher_is_the_curvature_of_the_kl_divergence():
    """The diagonal of the Hessian of KL(p_0 || p) at the start, by autograd; labels weighed with their probabilities."""
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(1, 3, generator=generator), torch.randn(4, 3, generator=generator)
    p = torch.softmax(hidden @ weight.T, -1)[0]
    expected = sum(p[y] * output_fisher(hidden, weight, torch.tensor([y])) for y in range(4))
    hessian = torch.autograd.functional.hessian(lambda w: kl_divergence(hidden @ weight.T, hidden @ w.T), weight)
    assert torch.allclose(hessian.reshape(12, 12).diagonal().reshape(4, 3), expected, atol=1e-6)



def test_penalties_and_their_gradients_by_arithmetic():
    model = torch.nn.Linear(2, 1)
    start = start_of(model)
    fisher = {"weight": torch.tensor([[2.0, 5.0]]), "bias": torch.tensor([3.0])}
    penalty, plain = ewc_penalty(start, fisher, 4.0), l2_penalty(start, 4.0)
    assert float(penalty(model)) == float(plain(model)) == 0.0
    with torch.no_grad():
        model.weight += torch.tensor([[1.0, -2.0]])
        model.bias += 0.5
    assert float(penalty(model)) == pytest.approx(2 * (2 * 1 + 5 * 4 + 3 * 0.25), rel=1e-5)
    assert float(plain(model)) == pytest.approx(2 * (1 + 4 + 0.25), rel=1e-5)
    penalty(model).backward()
    assert torch.allclose(model.weight.grad, torch.tensor([[8.0, -40.0]]), rtol=1e-4)
    assert float(model.bias.grad) == pytest.approx(6.0, rel=1e-4)


def test_a_fisher_of_ones_makes_ewc_the_l2_penalty():
    theta, start = torch.arange(6.0).reshape(2, 3), torch.ones(2, 3)
    assert quadratic_penalty(theta, start, torch.ones(2, 3), 3.0) == quadratic_penalty(theta, start, 1.0, 3.0)


def test_a_fisher_of_another_model_is_refused():
    start = {"weight": torch.zeros(2)}
    for fisher in ({"weight": torch.zeros(3)}, {"bias": torch.zeros(2)}, {}):
        with pytest.raises(ValueError, match="same parameters"):
            ewc_penalty(start, fisher, 1.0)


def test_the_divergence_is_torch_s_and_moves_the_new_policy_only():
    generator = torch.Generator().manual_seed(0)
    before, after = (torch.randn(3, 4, 6, generator=generator).requires_grad_() for _ in range(2))
    found = kl_divergence(before, after)
    expected = torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=x) for x in (before, after))).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    found.backward()
    assert before.grad is None and torch.allclose(after.grad, (after.softmax(-1) - before.softmax(-1)) / 12, atol=1e-7)
    assert kl_divergence(before, before).item() == 0.0


def test_the_anchor_is_zero_at_the_start_counts_its_samples_and_uses_every_one_before_any_again(policy, old):
    anchor = KLAnchor(policy, old, strength=5.0, batch_size=2, seed=0)
    assert [float(anchor(policy.model).detach()) for _ in range(3)] == pytest.approx([0.0] * 3, abs=1e-5) and anchor.seen == 6
    assert len(anchor.queue) == 0
    with torch.no_grad():
        policy.model.get_output_embeddings().weight.mul_(1.1)
    assert float(anchor(policy.model).detach()) > 1e-3


def test_action_logits_are_those_that_the_loss_is_made_of(policy, batch):
    logits = action_logits(policy.model, batch)
    assert logits.shape[:2] == (6, 4)
    found = cross_entropy(logits.flatten(0, 1), batch["labels"][:, -4:].flatten())
    assert float(found) == pytest.approx(float(batch_loss(policy.model, batch).detach()), rel=1e-5)



def test_the_mixed_loss_by_hand():
    losses, replayed = torch.tensor([1.0, 2.0, 6.0, 10.0]), torch.tensor([False, False, False, True])
    assert float(mixed_loss(losses, replayed, 0.25)) == pytest.approx(0.75 * 3 + 0.25 * 10)


def test_defaults_of_fine_tuning_are_unchanged_by_a_penalty_of_nothing_and_by_a_share_of_nothing(policy, stack, old):
    """Bit for bit, so that no stored result of another lesson depends on whether something could have been mixed in."""
    runs = [policy.copy() for _ in range(2)]
    fine_tune(runs[0], stack, steps=3, batch_size=4, progress=False)
    fine_tune(runs[1], stack, steps=3, batch_size=4, progress=False, penalty=lambda model: torch.zeros(()))
    assert all(torch.equal(a, b) for a, b in zip(runs[0].model.parameters(), runs[1].model.parameters()))
    shared = policy.copy()
    fine_tune(shared, stack, steps=3, batch_size=4, progress=False, mixed_with=old, alpha=0.0)
    assert all(torch.allclose(a, b, atol=2e-3) for a, b in zip(runs[0].model.parameters(), shared.model.parameters()))


@pytest.mark.parametrize("by, alpha, replayed", [("share", 0.25, 2), ("share", 0.5, 4), ("share", 1.0, 8), ("share", 0.0, 0), ("weight", 0.25, 4)])
def test_a_mixed_batch_has_as_many_samples_as_any_other_and_so_many_of_them_replayed(policy, stack, old, by, alpha, replayed):
    history = fine_tune(policy, stack, steps=3, batch_size=8, progress=False, mixed_with=old, alpha=alpha, mixed_by=by)
    assert (history.samples, history.replayed) == (24, 3 * replayed)


def test_weights_of_the_two_halves_sum_to_one_in_the_loss(policy, stack, old):
    """At a learning rate of 0 and with one batch of everything, both ways of mixing have the loss that arithmetic gives."""
    new = experiment.rows_of(stack, np.arange(6))
    each = [float(batch_loss(policy.model, tokenize(policy, data)).detach()) for data in (new, old)]
    options = {"steps": 1, "batch_size": 12, "learning_rate": 0.0, "progress": False, "mixed_with": old}
    for alpha in (0.0, 0.3, 1.0):
        history = fine_tune(policy.copy(), new, alpha=alpha, mixed_by="weight", **options)
        assert history.loss[0] == pytest.approx((1 - alpha) * each[0] + alpha * each[1], rel=1e-4)
    history = fine_tune(policy.copy(), new, alpha=0.5, **options)
    assert history.loss[0] == pytest.approx(sum(each) / 2, rel=1e-4)


@pytest.mark.parametrize("options", [{"alpha": -0.1}, {"alpha": 1.5}, {"alpha": 0.5, "mixed_by": "chance"}])
def test_impossible_mixtures_are_refused(policy, stack, old, options):
    with pytest.raises(ValueError, match="alpha is a share|mixed_by"):
        fine_tune(policy, stack, steps=1, progress=False, mixed_with=old, **options)


def test_ewc_with_a_huge_strength_keeps_important_parameters_nearer_than_naive_fine_tuning(policy, stack, old):
    fisher, start = diagonal_fisher(policy, old), start_of(policy.model)
    far = {}
    for label, penalty in {"naive": None, "ewc": ewc_penalty(start, fisher, 1e5)}.items():
        robot = policy.copy()
        fine_tune(robot, stack, steps=8, batch_size=8, progress=False, penalty=penalty)
        far[label] = sum(part["weighted"] for part in displacement(robot.model, start, fisher).values())
    assert far["ewc"] < far["naive"]



def test_displacement_adds_up_to_all_parameters_and_merged_lora_moves_the_attention_only(policy, stack, old):
    start, fisher = start_of(policy.model), diagonal_fisher(policy, old, "data")
    assert sum(part["squared"] for part in displacement(policy.model, start, fisher).values()) == 0.0
    fine_tune(policy, stack, steps=2, batch_size=4, peft_config=lora(4), progress=False)
    parts = displacement(experiment.merged(policy).model, start, fisher)
    assert {module for module, part in parts.items() if part["squared"] > 0} == {"attention"}
    assert "other" not in parts
    with torch.no_grad():
        moved = load_policy("tiny", device="cpu")
        for parameter in moved.model.parameters():
            parameter += 0.5
    total = sum(part["squared"] for part in displacement(moved.model, start, fisher).values())
    assert total == pytest.approx(0.25 * sum(p.numel() for p in trained(moved.model).values()), rel=1e-3)


def test_every_parameter_belongs_to_a_named_module(policy):
    assert {module_of(name) for name, _ in policy.model.named_parameters()} <= {
        "vision tower", "projector", "embeddings", "output layer", "attention", "MLP", "norms"}



def test_the_budget_counts_the_fisher_pass_and_what_the_anchor_sees():
    steps = {method: (experiment.BUDGET - experiment.upfront(method)) // experiment.BATCH for method in ("naive", "share", "ewc", "kl")}
    assert steps["naive"] == steps["share"] == 100 and steps["ewc"] == 92 and math.isclose(steps["kl"], 94)


def test_halves_of_the_replay_share_no_episode_and_the_tasks_evenly():
    first, second = experiment.replay_halves()
    assert len(first) + len(second) == len(experiment.replay()) and abs(len(first) - len(second)) <= 4
    pictures = {image.tobytes() for image in first.images}
    assert not any(image.tobytes() in pictures for image in second.images)


def test_a_pushed_object_is_where_the_first_grasp_is_not_and_the_rest_of_the_table_stays():
    for seed in range(5):
        pushed, still = experiment.PushedTabletop("put"), Tabletop("put")
        (first, _), (same, _) = pushed.reset(seed=seed), still.reset(seed=seed)
        assert np.array_equal(first["rgb"], same["rgb"]), "the policy cannot see it coming"
        before = pushed.state.positions.copy()
        pushed.step(np.array([0.0, 0.3, 0.25, 0, 0, 0, 0]))
        moved = np.linalg.norm((pushed.state.positions - before)[:, :2], axis=1)
        assert (moved > 0.05).sum() == 1 and np.sort(moved)[-2] < 0.01
