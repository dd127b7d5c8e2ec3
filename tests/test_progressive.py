"""Properties of a network of two columns: the old one stays to the bit, the other learns, and the lateral connections are the paper's sum."""

import numpy as np
import pytest
import torch
from torch.nn.functional import relu

from labkit.progressive import ProgressiveVLA, old_column, with_column
from labkit.rollouts import rollout
from labkit.task_specific_vla import frames_of, parameter_groups, policy_from_clip, set_trainable
from labkit.waypoint_regression import WaypointSamples, fit


@pytest.fixture(params=[("pooled", 1), ("pooled", 2), ("spatial", 1), ("spatial", 2)], ids=lambda p: f"{p[0]}-{p[1]}")
def old(request, clip_folder):
    return policy_from_clip(clip_folder, readout=request.param[0], frames=request.param[1], hidden=48)


@pytest.fixture
def spatial(clip_folder):
    return policy_from_clip(clip_folder, readout="spatial", hidden=48)


def seen(observations, before):
    return [{**o, "previous_rgb": b["rgb"]} if before else o for o, b in zip(observations, reversed(observations))]


def to_learn(policy, observations):
    rng = np.random.default_rng(2)
    images = np.stack([frames_of(o["rgb"], None, policy.model.frames) for o in observations])
    actions = np.concatenate([rng.uniform([-0.2, -0.1, 0.0], [0.2, 0.2, 0.1], (len(images), 3)), np.zeros((len(images), 3)),
                              rng.integers(0, 2, (len(images), 1))], axis=1)
    return WaypointSamples([f"e/{i}" for i in range(len(images))], [o["instruction"] for o in observations], images,
                           np.array([bool(o["holding"]) for o in observations]), actions)


def encoded(model, policy, observations):
    images = np.stack([frames_of(o["rgb"], None, policy.model.frames) for o in observations])
    words = policy.words([o["instruction"] for o in observations], [o["holding"] for o in observations])
    return *model.encode_images(policy.pixels(images)), model.encode_sentences(**words)


@pytest.mark.parametrize("everything", [False, True])
def test_training_the_new_column_leaves_the_old_ones_answers_to_the_bit(everything, old, observations):
    """Even where somebody tells every parameter to train, and weight decay would shrink them without a gradient."""
    weights = {name: value.clone() for name, value in old.model.state_dict().items()}
    policy = with_column(old, hidden=24)
    before = {two: old_column(policy).decide(seen(observations, two)).waypoints for two in (False, True)}
    if everything:
        set_trainable(policy.model, "full")
    new_before = policy.decide(observations).waypoints
    samples = to_learn(policy, observations)
    fit(policy, samples, samples, epochs=3, head_rate=1e-2, tower_rate=1e-2, weight_decay=0.5, pointing=0.1, progress=False)
    assert not np.array_equal(policy.decide(observations).waypoints, new_before)
    for two, said in before.items():
        assert np.array_equal(old_column(policy).decide(seen(observations, two)).waypoints, said)
        # Weights that were read from a file may lie elsewhere in memory, and sums then round another way.
        assert np.allclose(old.decide(seen(observations, two)).waypoints, said, atol=1e-6)
    kept = old_column(policy).model.state_dict()
    assert kept.keys() == weights.keys() and all(torch.equal(kept[name], value) for name, value in weights.items())


def test_an_old_column_with_lora_is_kept_with_it(spatial, observations):
    set_trainable(spatial.model, "lora")
    with torch.no_grad():
        for name, p in spatial.model.named_parameters():
            if "lora_B" in name:
                p.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(1))
    said = spatial.decide(observations).waypoints
    assert np.allclose(old_column(with_column(spatial)).decide(observations).waypoints, said, atol=1e-5)


def test_it_drives_the_robot_as_before(spatial):
    kept = old_column(with_column(spatial))
    a, b = (rollout(p, "put", episodes=3, seed=7, progress=False) for p in (spatial, kept))
    assert np.array_equal(a.success, b.success) and np.allclose(a.position_error, b.position_error, atol=1e-6)


def test_a_policy_of_one_column_is_refused(spatial):
    with pytest.raises(ValueError, match="one column"):
        old_column(spatial)


def test_it_learns(old, observations):
    policy = with_column(old, hidden=64, dropout=0.0)
    samples = to_learn(policy, observations)
    curves = fit(policy, samples, samples, epochs=60, head_rate=1e-2, loss="l1", progress=False)
    assert min(curves.validation) < 0.3 * curves.validation[0]


def test_what_trains_is_the_column_and_nothing_else(old):
    policy = with_column(old)
    handed = {id(p) for group in parameter_groups(policy.model, 1.0, 1.0) for p in group["params"]}
    own = {id(p) for name, p in policy.model.named_parameters() if not name.startswith("old.")}
    assert handed == own and all(p.requires_grad for name, p in policy.model.named_parameters() if not name.startswith("old."))


def test_every_weight_of_the_column_gets_a_gradient_the_lateral_ones_too(old, observations):
    model = with_column(old).model.train()
    numbers, looks = model.predict(*encoded(model, old, observations))
    numbers.square().sum().backward()
    still = [name for name, p in model.named_parameters() if not name.startswith("old.") and (p.grad is None or not p.grad.any())]
    assert still == [] and all(p.grad is None for p in model.old.parameters())


def test_its_answer_is_the_papers_sum(spatial, observations):
    """Equation 1, level by level, from the columns' own parts."""
    model = with_column(spatial, hidden=24).model
    pooled, patches, sentence = encoded(model, spatial, observations)
    with torch.no_grad():
        seen_old, _ = model.old.sentence_attention(patches[:, 0], sentence)
        h_old = torch.cat([sentence, pooled[:, 0], seen_old], 1) @ model.old.action_head[0].weight.T + model.old.action_head[0].bias
        seen_own, _ = model.sentence_attention(patches[:, 0], sentence)
        h_own = torch.cat([sentence, pooled[:, 0], seen_own], 1) @ model.hidden.weight.T + model.hidden.bias
        h_own = relu(h_own + seen_old @ model.from_old_looks.weight.T)
        wanted = h_own @ model.out.weight.T + model.out.bias + relu(h_old) @ model.from_old_hidden.weight.T
        numbers, looks = model.predict(pooled, patches, sentence)
    assert torch.allclose(numbers, wanted, atol=1e-6) and torch.allclose(looks.sum(-1), torch.ones(looks.shape[:-1]))


def test_an_old_column_alone_can_speak_through_the_lateral_connection(old, observations):
    """With the column silent and the lateral weights of the last level those of the old head, it says what the old column says."""
    model = with_column(old).model
    last = model.old.action_head[3]
    with torch.no_grad():
        model.out.weight.zero_()
        model.out.bias.copy_(last.bias)
        model.from_old_hidden.weight.copy_(last.weight)
        parts = encoded(model, old, observations)
        assert torch.allclose(model.predict(*parts)[0], model.old.predict(*parts)[0], atol=1e-6)


def test_a_copied_column_says_what_the_old_one_says_and_learns_to_say_something_else(old, observations):
    policy = with_column(old, copied=True)
    said = old_column(policy).decide(observations).waypoints
    assert np.allclose(policy.decide(observations).waypoints, said, atol=1e-6)
    samples = to_learn(policy, observations)
    fit(policy, samples, samples, epochs=3, head_rate=1e-2, progress=False)
    assert not np.allclose(policy.decide(observations).waypoints, said, atol=1e-3)
    assert np.array_equal(old_column(policy).decide(observations).waypoints, said)


def test_a_column_of_another_width_is_not_copied(old):
    with pytest.raises(ValueError, match="48 wide, this one's 24"):
        with_column(old, hidden=24, copied=True)


def test_the_old_column_has_no_dropout_while_the_other_trains(old, observations):
    model = with_column(old, dropout=0.0).model.train()
    assert model.training and not any(part.training for part in model.old.modules())
    parts = encoded(model, old, observations)
    with torch.no_grad():
        assert torch.equal(model.predict(*parts)[0], model.predict(*parts)[0])


def test_the_same_seed_is_the_same_column(spatial):
    state = torch.get_rng_state()
    one, same, other = (with_column(spatial, seed=seed).model.hidden.weight for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other) and torch.equal(state, torch.get_rng_state())


def test_the_old_policy_may_change_afterwards(spatial, observations):
    policy = with_column(spatial)
    assert isinstance(policy.model, ProgressiveVLA)
    said = old_column(policy).decide(observations).waypoints
    with torch.no_grad():
        spatial.model.action_head[3].bias.add_(1.0)
    assert np.array_equal(old_column(policy).decide(observations).waypoints, said)
