"""Properties of the loss and of fine-tuning, held against transformers' own loss, autograd, peft and arithmetic."""

import math

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from labkit.batches import IGNORED, with_action
from labkit.demonstrations import Samples
from labkit.sft import action_token_loss, batch_loss, fine_tune, lora, tokenize, train_only


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def batch(tiny_policy, samples):
    return tokenize(tiny_policy, samples)


def inputs_of(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


def test_the_loss_is_transformers_own(tiny_policy, batch):
    model = tiny_policy.model.eval()
    with torch.no_grad():
        theirs = model(**batch).loss
        assert torch.isclose(batch_loss(model, batch), theirs, atol=1e-6)
        assert torch.isclose(action_token_loss(model(**inputs_of(batch)).logits, batch["labels"]), theirs, atol=1e-6)


def test_the_loss_is_the_mean_negative_log_probability_of_the_action_tokens(tiny_policy, batch):
    """Written out position by position: the token at t is predicted from the logits at t - 1."""
    model, nats = tiny_policy.model.eval(), []
    with torch.no_grad():
        logits = model(**inputs_of(batch)).logits.double()
        for row, labels in zip(logits, batch["labels"]):
            for t in range(1, len(labels)):
                if labels[t] != IGNORED:
                    nats.append(float(row[t - 1].exp().sum().log() - row[t - 1, labels[t]]))
        assert len(nats) == 4 * len(batch["labels"])
        assert math.isclose(float(batch_loss(model, batch)), np.mean(nats), rel_tol=1e-5)


def test_skipping_the_last_mlp_of_the_prompt_changes_no_gradient(tiny_policy, batch):
    """Against a plain forward pass over every position."""
    model, gradients = tiny_policy.model, []
    for loss in (batch_loss(model, batch), action_token_loss(model(**inputs_of(batch)).logits, batch["labels"])):
        model.zero_grad()
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-4, atol=1e-6)


def test_prefix_positions_receive_no_gradient(tiny_policy, batch):
    """The last prompt position predicts the first action token; everything before it, and the last token of all, gets exactly zero."""
    logits = tiny_policy.model(**inputs_of(batch)).logits.detach().requires_grad_()
    action_token_loss(logits, batch["labels"]).backward()
    width = batch["labels"].shape[1]
    assert (logits.grad[:, : width - 5] == 0).all() and (logits.grad[:, -1] == 0).all()
    assert (logits.grad[:, width - 5 : width - 1].abs().sum(-1) > 0).all()


def test_the_gradient_of_the_loss_is_probability_minus_target(tiny_policy, batch):
    logits = tiny_policy.model(**inputs_of(batch)).logits.detach().requires_grad_()
    action_token_loss(logits, batch["labels"]).backward()
    count = 4 * len(batch["labels"])
    expected = logits.detach()[:, -5:-1].softmax(-1)
    expected.scatter_add_(-1, batch["labels"][:, -4:, None], -torch.ones_like(expected[..., :1]))
    assert torch.allclose(logits.grad[:, -5:-1], expected / count, atol=1e-7)


def supervised_from(batch, starts):
    """The same batch with labels from column `starts[row]` on, as if the mask covered less of the prompt."""
    labels = torch.full_like(batch["labels"], IGNORED)
    for row, start in enumerate(starts):
        labels[row, start:] = batch["input_ids"][row, start:]
    return {**batch, "labels": labels}


@pytest.mark.parametrize("starts", [(-4,) * 6, (-1,) * 6, (-4, -2, -1, -3, -4, -1), (-9, -4, -4, -4, -30, -4), (1, -4, -4, -4, -4, -4)],
                         ids=["actions", "last token", "ragged", "longer", "nearly everything"])
def test_computing_only_the_logits_that_count_changes_nothing(tiny_policy, batch, starts):
    model = tiny_policy.model
    other = supervised_from(batch, starts)
    results = []
    for compute in (batch_loss, lambda m, b: action_token_loss(m(**inputs_of(b)).logits, b["labels"])):
        model.zero_grad()
        value = compute(model, other)
        value.backward()
        results.append((value.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    assert torch.isclose(results[0][0], results[1][0], atol=1e-6)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-6)


def test_the_output_layer_sees_only_the_positions_that_predict_an_action_token(tiny_policy, batch):
    seen = []
    tiny_policy.model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    batch_loss(tiny_policy.model, batch)
    assert seen == [5], "four that predict, and the last token, whose prediction has no label"


def test_padding_does_not_change_the_loss(tiny_policy, samples):
    model = tiny_policy.model.eval()
    short = Samples(samples.instructions[:1], samples.images[:1], samples.holding[:1], samples.actions[:1])
    both = Samples(samples.instructions[:2], samples.images[:2], samples.holding[:2], samples.actions[:2])
    alone, padded = tokenize(tiny_policy, short), tokenize(tiny_policy, both)
    assert (padded["attention_mask"][0] == 0).sum() >= 5 and (alone["attention_mask"] == 1).all()
    first = {name: value[:1] for name, value in padded.items()}
    with torch.no_grad():
        assert abs(float(batch_loss(model, alone) - batch_loss(model, first))) < 1e-5


def test_a_row_that_supervises_nothing_is_refused(batch):
    batch["labels"][2] = IGNORED
    with pytest.raises(ValueError, match="teaches nothing"):
        action_token_loss(torch.zeros(*batch["labels"].shape, 700), batch["labels"])


def test_the_same_seed_gives_the_same_weights_bit_for_bit(tiny_policy, samples):
    runs = []
    for seed in (3, 3, 4):
        policy = tiny_policy.copy()
        torch.rand(7)
        history = fine_tune(policy, samples, steps=5, batch_size=4, seed=seed, progress=False)
        runs.append((state(policy.model), history.loss))
    assert same(runs[0][0], runs[1][0]) and runs[0][1] == runs[1][1]
    assert not same(runs[0][0], runs[2][0]) and runs[0][1] != runs[2][1]


def test_the_same_seed_gives_the_same_adapter_bit_for_bit_even_with_dropout(tiny_policy, samples):
    runs = []
    for seed in (3, 3, 4):
        policy = tiny_policy.copy()
        torch.rand(7)
        fine_tune(policy, samples, steps=4, batch_size=4, seed=seed, peft_config=lora(rank=4, dropout=0.2), progress=False)
        runs.append(state(policy.model))
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


def test_fine_tuning_leaves_the_global_random_state_alone(tiny_policy, samples):
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    fine_tune(tiny_policy, samples, steps=2, batch_size=4, progress=False)
    assert torch.equal(torch.rand(3), expected)


def test_a_run_lowers_the_loss_and_learns_the_actions(tiny_policy, samples, observations):
    history = fine_tune(tiny_policy, samples, steps=60, batch_size=6, learning_rate=2e-3, progress=False)
    assert history.loss[0] > 5 and np.mean(history.loss[-5:]) < 0.5
    error = np.abs(tiny_policy.decide(observations).actions - samples.actions)
    assert np.median(error[:, :3]) < 0.002, "half a bin or so"


def test_lora_leaves_the_base_untouched_and_can_be_switched_off(tiny_policy, samples, batch):
    model = tiny_policy.model
    before = state(model)
    with torch.no_grad():
        plain = model.eval()(**inputs_of(batch)).logits
    fine_tune(tiny_policy, samples, steps=6, learning_rate=1e-2, peft_config=lora(rank=4), progress=False)
    with torch.no_grad():
        adapted = tiny_policy.model(**inputs_of(batch)).logits
        with tiny_policy.model.disable_adapter():
            off = tiny_policy.model(**inputs_of(batch)).logits
    assert not torch.allclose(adapted, plain, atol=1e-2)
    assert torch.equal(off, plain)
    assert same(state(tiny_policy.model.unload()), before)


def test_merging_lora_keeps_what_it_learned(tiny_policy, samples, batch):
    fine_tune(tiny_policy, samples, steps=6, learning_rate=1e-2, peft_config=lora(rank=4, targets="all"), progress=False)
    with torch.no_grad():
        adapted = tiny_policy.model.eval()(**inputs_of(batch)).logits
        merged = tiny_policy.model.merge_and_unload()(**inputs_of(batch)).logits
    assert torch.allclose(merged, adapted, atol=1e-4)


@pytest.mark.parametrize("targets, matrices", [("attention", 4 * 2 * 128), ("all", 4 * 2 * 128 + 3 * (128 + 384))])
def test_lora_trains_as_many_numbers_as_its_rank_says_and_only_in_the_language_model(tiny_policy, samples, targets, matrices):
    """A rank-r update of a (d, k) matrix has r (d + k) numbers; four layers of width 128 with an MLP of 384."""
    history = fine_tune(tiny_policy, samples, steps=1, peft_config=lora(rank=4, targets=targets), progress=False)
    assert history.trainable == 4 * 4 * matrices
    assert history.total == sum(p.numel() for p in tiny_policy.model.parameters())
    assert not [name for name, p in tiny_policy.model.named_parameters() if p.requires_grad and "language_model" not in name]


def test_lora_scales_its_update_by_alpha_over_rank():
    assert (lora(rank=8).lora_alpha, lora(rank=8, alpha=4).lora_alpha) == (16, 4)
    with pytest.raises(ValueError, match="everything"):
        lora(targets="everything")


def test_only_parameters_whose_names_match_are_trained_and_a_pattern_without_any_changes_nothing(tiny_policy):
    model = tiny_policy.model
    for pattern, wanted in ((r"layers\.1\..*proj\.weight$", ("layers.1.", "proj.weight")), ("norm", ("norm",))):
        train_only(model, pattern)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {name for name, _ in model.named_parameters() if all(part in name for part in wanted)} != set()
        with pytest.raises(ValueError, match="no parameter's name matches 'nothing'"):
            train_only(model, "nothing")
        assert trained == {name for name, p in model.named_parameters() if p.requires_grad}


def test_frozen_parameters_stay_as_they_are(tiny_policy, samples):
    for name, parameter in tiny_policy.model.named_parameters():
        parameter.requires_grad_("lm_head" in name)
    before = state(tiny_policy.model)
    history = fine_tune(tiny_policy, samples, steps=3, progress=False)
    after = state(tiny_policy.model)
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["lm_head.weight"]
    assert history.trainable == tiny_policy.model.lm_head.weight.numel()


@pytest.mark.parametrize("clip", [0.5, 0.01])
def test_no_step_uses_a_gradient_longer_than_the_clip(tiny_policy, samples, clip):
    norms = []

    def record(optimiser, arguments, options):
        gradients = [p.grad.flatten() for group in optimiser.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.cat(gradients).norm()))

    hook = register_optimizer_step_pre_hook(record)
    try:
        fine_tune(tiny_policy, samples, steps=4, clip=clip, loss=lambda model, batch: 100 * batch_loss(model, batch), progress=False)
    finally:
        hook.remove()
    assert len(norms) == 4 and max(norms) <= clip * 1.00001
    assert np.allclose(norms, clip, rtol=1e-3), "the loss is a hundredfold, so every gradient is too long and is cut to the clip"


def test_the_first_step_is_adamw_s(tiny_policy, samples):
    """torch's own AdamW on the same gradient gives the same weights; its first step moves every weight by about the learning rate."""
    rate, decay = 1e-3, 0.1
    theirs = tiny_policy.copy().model.train()
    optimiser = torch.optim.AdamW(theirs.parameters(), lr=rate, weight_decay=decay)
    batch_loss(theirs, tokenize(tiny_policy, samples)).backward()
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
    optimiser.step()
    fine_tune(tiny_policy, samples, steps=1, batch_size=len(samples), learning_rate=rate, weight_decay=decay, progress=False)
    ours = dict(tiny_policy.model.named_parameters())
    # The batch holds the same rows in another order, so rounding differs where a gradient is next to nothing.
    differences = torch.cat([(p - ours[name]).abs().flatten() for name, p in theirs.named_parameters()])
    assert (differences < 1e-5).float().mean() > 0.98 and differences.max() < 2.1 * rate


def test_every_sample_is_learned_from_once_before_any_comes_again(tiny_policy, samples):
    rows = []

    def listen(model, batch):
        rows.extend(map(tuple, batch["labels"][:, -4:].tolist()))
        return batch_loss(model, batch)

    fine_tune(tiny_policy, samples, steps=6, batch_size=4, loss=listen, progress=False)
    everything = set(map(tuple, tokenize(tiny_policy, samples)["labels"][:, -4:].tolist()))
    assert len(rows) == 24 and len(everything) == len(samples) == 6
    assert all(set(rows[first : first + 6]) == everything for first in range(0, 24, 6))


def test_batches_carry_no_column_that_is_padding_in_every_row(tiny_policy, samples):
    def listen(model, batch):
        assert batch["attention_mask"][:, 0].any()
        assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["labels"].shape
        widths.add(batch["input_ids"].shape[1])
        return batch_loss(model, batch)

    widths = set()
    fine_tune(tiny_policy, samples, steps=6, batch_size=1, loss=listen, progress=False)
    assert len(widths) > 1


def test_the_history_counts_tokens_and_keeps_every_loss(tiny_policy, samples):
    """Words and sensor, 36 patches, <act> and four action tokens, for every sample once."""
    history = fine_tune(tiny_policy, samples, steps=3, batch_size=2, progress=False)
    assert history.tokens == sum(len(text.split()) + 1 + 36 + 1 + 4 for text in samples.instructions)
    assert len(history.loss) == 3 and history.seconds > 0 and history.tokens_per_second > 0
    assert "3 steps" in str(history)


def test_callbacks_are_called_after_every_step_and_may_ask_the_policy(tiny_policy, samples, observations):
    modes, steps = [], []

    def callback(step, policy, history):
        steps.append((step, len(history.loss)))
        policy.decide(observations[:1])

    def listen(model, batch):
        modes.append(model.training)
        return batch_loss(model, batch)

    undisturbed = tiny_policy.copy()
    fine_tune(tiny_policy, samples, steps=3, callbacks=[callback], loss=listen, progress=False)
    assert steps == [(0, 1), (1, 2), (2, 3)]
    assert modes == [True] * 3 and not tiny_policy.model.training
    fine_tune(undisturbed, samples, steps=3, progress=False)
    assert same(state(undisturbed.model), state(tiny_policy.model)), "watching changes nothing"


def test_nothing_to_learn_from_and_nothing_to_train_are_refused(tiny_policy, samples):
    with pytest.raises(ValueError, match="no samples"):
        fine_tune(tiny_policy, Samples([], samples.images[:0], samples.holding[:0], samples.actions[:0]), progress=False)
    tiny_policy.model.requires_grad_(False)
    with pytest.raises(ValueError, match="requires a gradient"):
        fine_tune(tiny_policy, samples, steps=1, progress=False)


def test_a_model_that_packs_its_images_is_refused_with_its_reason(tiny_policy, samples):
    class Packed:
        action_ids = tiny_policy.action_ids

        @staticmethod
        def prompts(instructions, images, holding):
            batch = tiny_policy.prompts(instructions, images, holding)
            return {**batch, "pixel_values": batch["pixel_values"].reshape(-1, 192)}

    with pytest.raises(ValueError, match="packs its images"):
        tokenize(Packed(), samples)


def test_more_supervision_than_the_actions_makes_another_gradient(tiny_policy, samples):
    """The mask matters: supervising the words, too, changes what is learned."""
    batch = with_action(tiny_policy.prompts(samples.instructions, samples.images, samples.holding), tiny_policy.action_ids, samples.actions)
    everything = {**batch, "labels": torch.where(batch["attention_mask"] == 1, batch["input_ids"], IGNORED)}
    tiny_policy.model.zero_grad()
    batch_loss(tiny_policy.model, batch).backward()
    masked = tiny_policy.model.lm_head.weight.grad.clone()
    tiny_policy.model.zero_grad()
    batch_loss(tiny_policy.model, everything).backward()
    assert not torch.allclose(masked, tiny_policy.model.lm_head.weight.grad, atol=1e-3)
