"""Properties of several adapters on one backbone: mixed batches, features, the router, abstention and the ensemble."""

import numpy as np
import pytest
import torch

from labkit.errors import UserError
from labkit.routing import (
    ABSTAIN,
    OFF,
    AdapterRouter,
    EnsemblePolicy,
    RoutedPolicy,
    averaged_log_probabilities,
    bags_of_words,
    choose,
    fit_router,
    instruction_features,
    margins,
    mixed_by_peft,
    picture_features,
    risk_coverage,
    router_scores,
    threshold_for,
    with_adapters,
)
from labkit.sft import lora

NAMES = ("a", "b", "c")


def with_random_lora(policy, seed):
    """The policy with an adapter that changes what it says."""
    from peft import get_peft_model

    policy.model = get_peft_model(policy.model, lora(4))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return policy


@pytest.fixture(scope="module")
def folders(_loaded_tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(NAMES):
        with_random_lora(_loaded_tiny.copy(), seed).save(root / name)
    return {name: root / name for name in NAMES}


@pytest.fixture
def shared(tiny_policy, folders):
    return with_adapters(tiny_policy, folders)


def said_by_one(policy, folder, observations):
    """What the policy says with one adapter loaded and nothing mixed."""
    return with_adapters(policy, {"only": folder}).decide(observations)


def test_a_mixed_batch_says_what_each_adapter_says_alone(tiny_policy, shared, folders, observations):
    names = ["a", "b", OFF, "c", "b", "a"]
    together = shared.decide(observations, adapter_names=names)
    for i, name in enumerate(names):
        alone = tiny_policy.decide(observations) if name == OFF else said_by_one(tiny_policy, folders[name], observations)
        assert together.bins[i].tolist() == alone.bins[i].tolist()
        assert together.probabilities[i] == pytest.approx(alone.probabilities[i], rel=1e-3)


def test_the_adapters_of_the_fixture_say_different_things(tiny_policy, folders, observations):
    said = [said_by_one(tiny_policy, folder, observations).bins for folder in folders.values()] + [tiny_policy.decide(observations).bins]
    assert all((a != b).any() for i, a in enumerate(said) for b in said[:i])


def test_the_first_adapter_answers_where_none_is_named(tiny_policy, shared, folders, observations):
    assert (shared.decide(observations).bins == said_by_one(tiny_policy, folders["a"], observations).bins).all()


def test_loading_adapters_leaves_the_policy_as_it_was(tiny_policy, folders, observations):
    before = tiny_policy.decide(observations).bins
    with_adapters(tiny_policy, folders)
    assert (tiny_policy.decide(observations).bins == before).all() and not hasattr(tiny_policy.model, "disable_adapter")


@pytest.mark.parametrize("given", ["nothing", "an empty folder"])
def test_what_holds_no_adapter_is_refused_in_one_sentence(tiny_policy, given, tmp_path):
    with pytest.raises(UserError, match="no adapter"):
        with_adapters(tiny_policy, {} if given == "nothing" else {"a": tmp_path})


@pytest.mark.parametrize("name", ["forward", "train", "a.b"])
def test_a_name_that_peft_cannot_use_is_refused_before_it_breaks_the_model(tiny_policy, folders, name):
    with pytest.raises(UserError, match="cannot be called"):
        with_adapters(tiny_policy, {"a": folders["a"], name: folders["b"]})


@pytest.mark.parametrize("seed", range(3))
def test_peft_s_layer_is_the_sum_written_out(seed):
    generator = torch.Generator().manual_seed(seed)
    x, weight, A, B = (torch.randn(*shape, generator=generator) for shape in ((5, 6), (4, 6), (3, 2, 6), (3, 4, 2)))
    adapters = [2, ABSTAIN, 0, 1, 2]
    found = mixed_by_peft(x, weight, A, B, 1.5, adapters)
    for row, k, y in zip(x, adapters, found):
        update = 0 if k == ABSTAIN else 1.5 * B[k] @ (A[k] @ row)
        torch.testing.assert_close(y, weight @ row + update, rtol=1e-4, atol=1e-4)


def test_an_ensemble_that_gives_one_member_everything_is_that_member(shared, observations):
    weights = np.eye(4)[[0, 1, 2, 3, 1, 2]]
    ensemble = EnsemblePolicy(shared, (*NAMES, OFF), lambda said: weights)
    routed = RoutedPolicy(shared, lambda said: [(*NAMES, OFF)[k] for k in weights.argmax(1)])
    assert (ensemble.decide(observations).bins == routed.decide(observations).bins).all()


def test_an_ensemble_of_one_adapter_twice_is_that_adapter(shared, observations):
    assert (EnsemblePolicy(shared, ("b", "b")).decide(observations).bins == shared.decide(observations, adapter_names=["b"] * 6).bins).all()


def test_the_first_token_of_an_ensemble_has_the_highest_mean_logit(shared, observations):
    prompt = shared.prompts([o["instruction"] for o in observations], [o["rgb"] for o in observations], [o["holding"] for o in observations])
    with torch.no_grad():
        logits = torch.stack([shared.model(**prompt, adapter_names=[name] * 6).logits[:, -1, shared.action_ids] for name in NAMES])
    assert EnsemblePolicy(shared, NAMES).decide(observations).bins[:, 0].tolist() == logits.mean(0).argmax(-1).tolist()


def test_averaged_logits_are_a_normalised_product_and_any_constant_is_the_same():
    logits = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.tensor([[0.2, 0.5, 0.3]] * 4, dtype=torch.float64)
    product = (logits.softmax(-1) ** weights.T[..., None]).prod(0)
    expected = product / product.sum(-1, keepdim=True)
    torch.testing.assert_close(averaged_log_probabilities(logits, weights).exp(), expected)
    torch.testing.assert_close(averaged_log_probabilities(logits + 5, weights).exp(), expected)


def test_features_do_not_depend_on_the_active_adapter_or_on_the_other_sentences(tiny_policy, shared):
    said = ["stack the red block on the blue block", "move it forward"]
    plain = instruction_features(tiny_policy, said)
    for name in NAMES:
        shared.model.set_adapter(name)
        np.testing.assert_array_equal(instruction_features(shared, said), plain)
    alone = np.concatenate([instruction_features(tiny_policy, [text]) for text in said])
    np.testing.assert_allclose(plain, alone, atol=1e-5)


def test_features_are_the_states_of_the_words_in_the_policy_s_own_prompt(tiny_policy, observations):
    """Causal attention, words before the image: whatever the robot sees, the words' states are the same."""
    text = "stack the red block on the blue block"
    prompt = tiny_policy.prompts([text] * 6, [o["rgb"] for o in observations], [False] * 6)
    words = len(tiny_policy.processor.tokenizer(text)["input_ids"])
    with torch.no_grad():
        states = tiny_policy.model(**prompt, output_hidden_states=True).hidden_states[-1]
    for row in states:
        np.testing.assert_allclose(row[:words].mean(0).numpy(), instruction_features(tiny_policy, [text])[0], atol=1e-5)


def test_layer_0_is_the_mean_embedding_and_a_bag_counts_every_word(tiny_policy):
    text = "put the red block on the red ball"
    ids = tiny_policy.processor.tokenizer(text)["input_ids"]
    bag = bags_of_words(tiny_policy, [text, "red"])
    table = tiny_policy.model.get_input_embeddings().weight.detach().double().numpy()
    np.testing.assert_allclose(instruction_features(tiny_policy, [text], layer=0)[0], bag[0] @ table / len(ids), atol=1e-6)
    assert bag.sum(1).tolist() == [len(ids), 1] and bag.max() == 2


def test_picture_features_see_the_picture_alone_and_no_adapter(tiny_policy, shared, observations):
    images = np.stack([o["rgb"] for o in observations])
    plain = picture_features(tiny_policy, images)
    np.testing.assert_array_equal(picture_features(shared, images), plain)
    np.testing.assert_allclose(picture_features(tiny_policy, images[2:3]), plain[2:3], atol=1e-5)
    assert np.abs(picture_features(tiny_policy, images // 5) - plain).max() > 1e-3 and plain.shape[0] == 6


def test_no_instruction_and_no_image_are_refused(tiny_policy):
    with pytest.raises(ValueError, match="no instructions"):
        instruction_features(tiny_policy, [])
    with pytest.raises(ValueError, match="no images"):
        picture_features(tiny_policy, [])


def clouds(rng, width=5, sizes=(30, 20, 40)):
    routes = np.repeat(np.arange(len(sizes)), sizes)
    return rng.normal(0, 3, (len(sizes), width))[routes] + rng.normal(size=(len(routes), width)), routes


def test_without_shrinkage_scores_are_unmoved_by_any_linear_map_and_any_shift(rng=np.random.default_rng(0)):
    features, routes = clouds(rng)
    queries, turn = rng.normal(size=(7, 5)), rng.normal(size=(5, 5))
    plain = fit_router(features, routes, 0).scores(queries)
    np.testing.assert_allclose(fit_router(features @ turn + 4, routes, 0).scores(queries @ turn + 4), plain, rtol=1e-6)


def test_shrunk_scores_are_unmoved_by_a_turn_and_by_a_change_of_units(rng=np.random.default_rng(1)):
    features, routes = clouds(rng)
    queries, turn = rng.normal(size=(7, 5)), 10 * np.linalg.qr(rng.normal(size=(5, 5)))[0]
    plain = fit_router(features, routes).scores(queries)
    np.testing.assert_allclose(fit_router(features @ turn, routes).scores(queries @ turn), plain, rtol=1e-6)


def test_differences_of_scores_are_log_odds_of_gaussians(rng=np.random.default_rng(2)):
    from scipy.stats import multivariate_normal

    features, routes = clouds(rng)
    router, queries = fit_router(features, routes), rng.normal(size=(6, 5))
    density = np.stack([multivariate_normal(c, router.covariance).logpdf(queries) for c in router.centroids], 1)
    scores = router.scores(queries)
    np.testing.assert_allclose(scores - scores[:, :1], density - density[:, :1], rtol=1e-8)


def test_far_apart_clouds_are_routed_without_a_mistake_and_shuffled_routes_by_chance(rng=np.random.default_rng(3)):
    features, routes = clouds(rng, width=12, sizes=(60, 60, 60))
    fresh = features + rng.normal(0, 0.1, features.shape)
    assert (choose(fit_router(features, routes).scores(fresh)) == routes).mean() > 0.99
    shuffled = [(choose(fit_router(features, rng.permutation(routes)).scores(fresh)) == routes).mean() for _ in range(20)]
    assert 0.2 < np.mean(shuffled) < 0.47


def test_the_tensor_form_is_the_same(rng=np.random.default_rng(4)):
    features, routes = clouds(rng)
    found = router_scores(torch.from_numpy(features), torch.from_numpy(routes), torch.from_numpy(features[:3]), 0.2)
    np.testing.assert_array_equal(found.numpy(), fit_router(features, routes, 0.2).scores(features[:3]))


@pytest.mark.parametrize("features, routes, fault", [(np.zeros((3, 2)), [0, 1], "3 features and 2"), (np.zeros((3, 2)), [0, 2, 2], "route 1")])
def test_a_router_that_cannot_be_fitted_says_why(features, routes, fault):
    with pytest.raises(ValueError, match=fault):
        fit_router(features, routes)


def test_a_route_is_the_best_one_or_none_below_the_margin():
    scores = np.array([[3.0, 1.0, 2.5], [0.0, -1.0, 4.0], [1.0, 1.0, 0.0]])
    assert margins(scores).tolist() == [0.5, 4.0, 0.0]
    assert choose(scores).tolist() == [0, 2, 0]
    assert choose(scores, 0.5).tolist() == [0, 2, ABSTAIN]
    assert choose(scores, 0.6).tolist() == [ABSTAIN, 2, ABSTAIN]


@pytest.mark.parametrize("seed", range(5))
def test_the_curve_ends_at_the_whole_error_and_a_threshold_keeps_its_promise(seed):
    rng = np.random.default_rng(seed)
    confidence = rng.normal(size=80)
    correct = rng.random(80) < 1 / (1 + np.exp(-2 * confidence - 1))
    coverage, risk = risk_coverage(confidence, correct)
    assert coverage[-1] == 1 and risk[-1] == pytest.approx((~correct).mean()) and (np.diff(coverage) > 0).all()
    for promised in (0.0, 0.02, 0.1, 0.5):
        threshold = threshold_for(confidence, correct, promised)
        kept = confidence >= threshold
        assert not kept.any() or (~correct[kept]).mean() <= promised
        smaller = [t for t in confidence if t < threshold]
        assert all((~correct[confidence >= t]).mean() > promised for t in smaller)


def test_all_right_answers_all_and_all_wrong_answers_none():
    confidence = np.arange(4.0)
    assert threshold_for(confidence, np.ones(4, bool), 0.0) == -np.inf
    assert threshold_for(confidence, np.zeros(4, bool), 0.5) == np.inf
    with pytest.raises(ValueError, match="at least one"):
        risk_coverage([], [])


def test_an_adapter_router_names_the_adapter_and_falls_back(tiny_policy):
    told = ["stack the red block on the blue block", "stack the green cup on the red block", "move the red ball forward", "move it forward"]
    router = fit_router(instruction_features(tiny_policy, told, 0), [0, 0, 1, 1])
    seen = [{"instruction": text} for text in told]

    def read(observations):
        return instruction_features(tiny_policy, [o["instruction"] for o in observations], 0)

    assert AdapterRouter(read, router, ("stack", "forward"))(seen) == ["stack", "stack", "forward", "forward"]
    assert AdapterRouter(read, router, ("stack", "forward"), threshold=np.inf, fallback="ensemble")(seen) == ["ensemble"] * 4
