"""Properties of the bottleneck adapters, held against hand-written layers, autograd, arithmetic, and the model without them, to the bit."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_other_models import build_idefics3, build_paligemma

from labkit.adapters import (
    ACTIVATIONS,
    BottleneckAdapter,
    BottleneckConfig,
    adapter_size,
    adapters_of,
    add_adapter,
    decoder_layers,
    disabled,
    identity_state,
    load_adapter,
    remove_adapters,
    save_adapter,
    save_adapters,
    set_adapter,
)
from labkit.errors import UserError
from labkit.experiments import adapters as experiment
from labkit.policy import load_policy
from labkit.rollouts import rollout
from labkit.sft import action_token_loss, batch_loss, fine_tune, lora, tokenize
from labkit.sweeps import STORED, load_sweep

WIDTH, LAYERS = 32, 2
PLACEMENTS = ("layer", "houlsby")
every_placement = pytest.mark.parametrize("placement", PLACEMENTS)


def small_llama(width=WIDTH, layers=LAYERS):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        vocab_size=50, hidden_size=width, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2, initializer_range=0.2))


def small_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=WIDTH, n_layer=LAYERS, n_head=2, n_positions=64, initializer_range=0.2))


def small_opt():
    """Its layers have no module for the MLP."""
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(OPTConfig(vocab_size=50, hidden_size=WIDTH, ffn_dim=64, num_hidden_layers=LAYERS, num_attention_heads=2,
                                    word_embed_proj_dim=WIDTH, max_position_embeddings=64))


def vision_language(build):
    model_class, config, _ = build()
    return model_class(config)


MODELS = {"llama": small_llama, "gpt2": small_gpt2, "paligemma": lambda: vision_language(build_paligemma),
          "idefics3": lambda: vision_language(build_idefics3)}
every_model = pytest.mark.parametrize("family", MODELS)


@pytest.fixture
def model(family):
    torch.manual_seed(0)
    return MODELS[family]().eval()


def logits(model, length=7):
    """Of fixed tokens, without an image: two rows."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(0, min(vocabulary, 50), (2, length), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    kinds = {"token_type_ids": torch.zeros_like(ids)} if model.config.model_type == "paligemma" else {}
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **kinds).logits


def shaken(model, std=0.3, seed=1):
    """Every parameter that requires a gradient set to random numbers: what training might have made of it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return model


def snapshot(model):
    """Everything that `remove_adapters` must bring back."""
    return SimpleNamespace(
        modules=[(name, type(module)) for name, module in model.named_modules()],
        hooks=[len(module._forward_hooks) for module in model.modules()],
        attributes=sorted(model.__dict__),
        tensors={name: value.clone() for name, value in model.state_dict().items()},
        trainable=[name for name, p in model.named_parameters() if p.requires_grad],
    )


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_restored(model, before):
    after = snapshot(model)
    assert (after.modules, after.hooks, after.attributes, after.trainable) == (before.modules, before.hooks, before.attributes, before.trainable)
    assert same(after.tensors, before.tensors)


def adapter_parameters_of(model):
    return {name: p for name, p in model.named_parameters() if ".adapters." in name}


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
@pytest.mark.parametrize("activation, by_hand", [
    ("gelu", lambda z: z * 0.5 * (1 + math.erf(z / math.sqrt(2)))), ("relu", lambda z: max(z, 0.0)),
    ("silu", lambda z: z / (1 + math.exp(-z))), ("tanh", math.tanh),
])
def test_an_adapter_is_the_formula_number_by_number(shape, activation, by_hand):
    torch.manual_seed(0)
    adapter, h = BottleneckAdapter(5, 2, activation), torch.randn(shape)
    w_down, b_down, w_up, b_up = (p.tolist() for p in adapter.parameters())
    expected = []
    for row in h.reshape(-1, 5).tolist():
        inside = [by_hand(sum(w * x for w, x in zip(weights, row)) + b) for weights, b in zip(w_down, b_down)]
        expected.append([x + sum(w * z for w, z in zip(weights, inside)) + b for x, weights, b in zip(row, w_up, b_up)])
    assert np.allclose(adapter(h).detach().reshape(-1, 5), expected, atol=1e-6)


def test_every_activation_of_a_configuration_is_tested_above():
    assert set(ACTIVATIONS) == {"gelu", "relu", "silu", "tanh"}


def llama_by_hand(model, ids, adapters):
    """Llama's decoder written out; `forward` is called rather than the module, so that no hook runs.   adapters: layer -> place -> adapter."""
    inner = model.model
    hidden = inner.embed_tokens(ids)
    turns = inner.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    for layer, at in zip(inner.layers, adapters):
        attended, _ = layer.self_attn.forward(layer.input_layernorm(hidden), position_embeddings=turns, attention_mask=None)
        hidden = hidden + at.get("attention", lambda h: h)(attended)
        hidden = hidden + at.get("mlp", lambda h: h)(layer.mlp.forward(layer.post_attention_layernorm(hidden)))
        hidden = at.get("output", lambda h: h)(hidden)
    return model.lm_head(inner.norm(hidden))


@pytest.mark.parametrize("placement, places", [("layer", ["output"]), ("houlsby", ["attention", "mlp"])])
def test_adapters_act_after_the_layer_or_before_each_residual_addition(placement, places):
    """Against the decoder written out by hand."""
    torch.manual_seed(0)
    model = small_llama().eval()
    ids = torch.randint(0, 50, (2, 6))
    add_adapter(model, BottleneckConfig(4, placement))
    shaken(model)
    sites = [module for module in model.modules() if hasattr(module, "adapters")]
    adapters = [{place: sites[len(places) * i + k].adapters["default"] for k, place in enumerate(places)} for i in range(LAYERS)]
    with torch.no_grad():
        expected, plain = llama_by_hand(model, ids, adapters), llama_by_hand(model, ids, [{}] * LAYERS)
        found = model(ids).logits
    assert torch.allclose(found, expected, atol=1e-4) and not torch.allclose(found, plain, atol=0.1)


@every_model
@every_placement
def test_a_zero_start_is_the_identity_bit_for_bit(model, placement):
    before = logits(model)
    add_adapter(model, BottleneckConfig(5, placement))
    assert torch.equal(logits(model), before)
    assert all((p != 0).any() for name, p in adapter_parameters_of(model).items() if name.endswith("down.weight")), "it must be able to learn"


@every_placement
def test_a_zero_start_decides_what_the_frozen_base_decides_bit_for_bit(tiny_policy, observations, placement):
    """Frozen, because PyTorch takes another kernel for a weight that needs no gradient, and its last bit may differ."""
    frozen = tiny_policy.copy()
    frozen.model.requires_grad_(False)
    add_adapter(tiny_policy.model, BottleneckConfig(8, placement))
    mine, theirs = tiny_policy.decide(observations), frozen.decide(observations)
    assert np.array_equal(mine.probabilities, theirs.probabilities) and np.array_equal(mine.bins, theirs.bins)


@every_model
def test_a_nearly_zero_start_is_nearly_the_identity(model):
    before, changes = logits(model), []
    for std in (1e-5, 1e-4, 1e-3):
        add_adapter(model, BottleneckConfig(5, init_std=std))
        changes.append(float((logits(model) - before).abs().max()))
        remove_adapters(model)
    assert 0 < changes[0] < 1e-2 and 5 < changes[1] / changes[0] < 20 and 5 < changes[2] / changes[1] < 20


def test_the_random_numbers_have_the_standard_deviation_that_was_asked_for():
    model = add_adapter(small_llama(width=256, layers=4), BottleneckConfig(64, init_std=0.2))
    for name, p in adapter_parameters_of(model).items():
        expected = {"down.weight": 256**-0.5, "up.weight": 0.2}.get(".".join(name.split(".")[-2:]), 0.0)
        assert math.isclose(float(p.detach().std()), expected, rel_tol=0.03), name


def test_the_same_seed_gives_the_same_start_and_the_global_generator_is_left_alone():
    models = [small_llama() for _ in range(3)]
    before = torch.get_rng_state()
    found = []
    for model, seed in zip(models, (5, 5, 6)):
        with torch.random.fork_rng(devices=[]):
            add_adapter(model, BottleneckConfig(4, init_std=0.1), seed=seed)
        found.append(adapter_parameters_of(model))
    assert torch.equal(torch.get_rng_state(), before)
    assert same(found[0], found[1]) and not same(found[0], found[2])


def test_an_adapter_whose_matrices_are_both_zero_learns_nothing_but_its_bias():
    """Why `identity_state` leaves W_down random: against autograd."""
    noise, h = torch.randn(3, 5), torch.randn(7, 5)
    for std, learns in ((0.5, {"up.weight", "up.bias"}), (0.0, {"up.bias"})):
        adapter = BottleneckAdapter(5, 3)
        adapter.load_state_dict(identity_state(noise, std))
        assert torch.equal(adapter(h), h)
        adapter(h).square().sum().backward()
        assert {name for name, p in adapter.named_parameters() if p.grad.abs().max() > 0} == learns


@every_model
@every_placement
def test_the_number_of_parameters_is_the_formula_s_and_all_are_in_the_language_model(model, placement):
    total = sum(p.numel() for p in model.parameters())
    add_adapter(model, BottleneckConfig(5, placement))
    added = adapter_parameters_of(model)
    per_layer = 2 if placement == "houlsby" else 1
    assert sum(p.numel() for p in added.values()) == LAYERS * per_layer * (2 * 5 * WIDTH + 5 + WIDTH)
    assert sum(p.numel() for p in added.values()) == adapter_size(WIDTH, 5, LAYERS, per_layer)
    assert sum(p.numel() for p in model.parameters()) == total + adapter_size(WIDTH, 5, LAYERS, per_layer)
    assert not [name for name in added if "vision" in name]


@pytest.mark.parametrize("per_layer, bias, expected", [(1, False, 16_777_216), (2, False, 33_554_432), (1, True, 16_910_336), (2, True, 33_820_672)])
def test_on_a_7b_model_the_formula_gives_what_counting_gives(per_layer, bias, expected):
    from transformers import LlamaConfig, LlamaForCausalLM

    assert adapter_size(4096, 64, 32, per_layer, bias) == expected
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
    assert sum(p.numel() for p in model.parameters()) == 6_738_415_616
    add_adapter(model, BottleneckConfig(64, PLACEMENTS[per_layer - 1]))
    added = adapter_parameters_of(model)
    assert all(p.is_meta for p in added.values())
    assert sum(p.numel() for name, p in added.items() if bias or name.endswith("weight")) == expected


@every_placement
def test_only_adapters_receive_a_gradient_and_all_of_them_do(tiny_policy, samples, placement):
    add_adapter(tiny_policy.model, BottleneckConfig(4, placement, init_std=0.1))
    batch_loss(tiny_policy.model, tokenize(tiny_policy, samples)).backward()
    with_gradient = {name for name, p in tiny_policy.model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert with_gradient == set(adapter_parameters_of(tiny_policy.model))
    assert with_gradient == {name for name, p in tiny_policy.model.named_parameters() if p.requires_grad}


@every_placement
def test_skipping_the_last_mlp_of_the_prompt_changes_no_gradient_of_an_adapter(tiny_policy, samples, placement):
    """`batch_loss` takes a short cut through the module that an adapter hangs on; against a plain forward pass."""
    model, batch, found = tiny_policy.model, tokenize(tiny_policy, samples), []
    add_adapter(model, BottleneckConfig(4, placement, init_std=0.1))
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    for loss in (batch_loss(model, batch), action_token_loss(model(**inputs).logits, batch["labels"])):
        model.zero_grad()
        loss.backward()
        found.append({name: p.grad.clone() for name, p in adapter_parameters_of(model).items()})
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_gives_the_same_gradients():
    model, found = add_adapter(small_llama(), BottleneckConfig(4, init_std=0.1)).train(), []
    ids = torch.randint(0, 50, (2, 6))
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        found.append({name: p.grad.clone() for name, p in adapter_parameters_of(model).items()})
    assert found[0] and all(torch.allclose(found[0][name], found[1][name], atol=1e-6) for name in found[0])


@every_placement
def test_fine_tuning_trains_the_adapters_alone_and_lowers_the_loss(tiny_policy, samples, placement):
    before = snapshot(tiny_policy.model)
    config = BottleneckConfig(8, placement)
    history = fine_tune(tiny_policy, samples, steps=40, batch_size=6, learning_rate=1e-2, peft_config=config, progress=False)
    assert history.trainable == adapter_size(128, 8, 4, 2 if placement == "houlsby" else 1)
    assert history.total == history.trainable + sum(before.tensors[name].numel() for name in before.trainable)
    assert history.loss[-1] < 0.5 * history.loss[0]
    assert adapters_of(tiny_policy.model) == {"default": config}
    after = tiny_policy.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.tensors.items())


def test_the_same_seed_trains_the_same_adapters_bit_for_bit(tiny_policy, samples):
    runs = []
    for seed in (3, 3, 4):
        policy = tiny_policy.copy()
        fine_tune(policy, samples, steps=3, batch_size=4, peft_config=BottleneckConfig(4), seed=seed, progress=False)
        runs.append(adapter_parameters_of(policy.model))
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


def test_training_can_go_on_without_a_configuration(tiny_policy, samples):
    fine_tune(tiny_policy, samples, steps=2, peft_config=BottleneckConfig(4), progress=False)
    history = fine_tune(tiny_policy, samples, steps=2, progress=False)
    assert history.trainable == adapter_size(128, 4, 4) and list(adapters_of(tiny_policy.model)) == ["default"]


@every_placement
def test_switched_off_the_trained_policy_is_the_base_to_the_bit(tiny_policy, samples, observations, placement):
    base = tiny_policy.copy()
    inputs = {name: value for name, value in tokenize(base, samples).items() if name != "labels"}
    fine_tune(tiny_policy, samples, steps=10, learning_rate=1e-2, peft_config=BottleneckConfig(8, placement), progress=False)
    with torch.no_grad():
        expected, on = base.model.eval()(**inputs).logits, tiny_policy.model(**inputs).logits
        with disabled(tiny_policy.model):
            assert torch.equal(tiny_policy.model(**inputs).logits, expected)
            assert np.array_equal(tiny_policy.decide(observations).bins, base.decide(observations).bins)
            assert np.array_equal(tiny_policy.decide(observations).probabilities, base.decide(observations).probabilities)
        assert not torch.equal(on, expected) and torch.equal(tiny_policy.model(**inputs).logits, on), "and on again it is what it was"


@every_model
def test_an_error_inside_does_not_leave_the_adapters_off(model):
    add_adapter(model, BottleneckConfig(4))
    on = logits(shaken(model))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    with pytest.raises(ValueError), disabled(model):
        raise ValueError
    assert torch.equal(logits(model), on) and [name for name, p in model.named_parameters() if p.requires_grad] == trained


@every_model
@every_placement
def test_removing_leaves_the_model_as_it_was_to_the_bit(model, placement):
    next(model.parameters()).requires_grad_(False)  # a model may come with something frozen
    before, said = snapshot(model), logits(model)
    add_adapter(model, BottleneckConfig(5, placement))
    shaken(model)
    assert not torch.equal(logits(model), said)
    assert remove_adapters(model) is model
    assert_restored(model, before)
    assert torch.equal(logits(model), said) and adapters_of(model) == {}


@every_placement
def test_a_copy_is_independent_in_training_switching_and_removing(tiny_policy, samples, observations, placement):
    tiny_policy.decide(observations)  # transformers adds hooks of its own in the first call
    plain = snapshot(tiny_policy.model)
    add_adapter(tiny_policy.model, BottleneckConfig(4, placement))
    shaken(tiny_policy.model)
    said, before = tiny_policy.decide(observations).probabilities, snapshot(tiny_policy.model)
    other = tiny_policy.copy()
    assert np.array_equal(other.decide(observations).probabilities, said)
    fine_tune(other, samples, steps=3, learning_rate=1e-2, progress=False)
    assert not np.array_equal(other.decide(observations).probabilities, said)
    with disabled(other.model):
        assert np.array_equal(tiny_policy.decide(observations).probabilities, said)
    remove_adapters(other.model)
    assert np.array_equal(tiny_policy.decide(observations).probabilities, said)
    assert_restored(tiny_policy.model, before)
    assert_restored(other.model, plain)


@pytest.fixture
def two(tiny_policy, observations):
    """A policy with two sets of adapters, of different widths and places, and what it says with each and with none."""
    model, said = tiny_policy.model.requires_grad_(False), {None: tiny_policy.decide(observations).probabilities}
    for name, config in (("stack", BottleneckConfig(4)), ("spatial", BottleneckConfig(6, "houlsby"))):
        add_adapter(model, config, name)
        shaken(model, seed=len(name))
        said[name] = tiny_policy.decide(observations).probabilities
    return SimpleNamespace(policy=tiny_policy, model=model, said=said, observations=observations)


def test_swapping_gives_each_its_own_output_again_to_the_bit(two):
    assert len({tuple(said.flatten()) for said in two.said.values()}) == 3
    for name in ("stack", None, "spatial", "stack", "spatial", None, "stack"):
        set_adapter(two.model, name)
        assert np.array_equal(two.policy.decide(two.observations).probabilities, two.said[name])


@pytest.mark.parametrize("name, count", [("stack", adapter_size(128, 4, 4)), ("spatial", adapter_size(128, 6, 4, 2)), (None, 0)])
def test_only_those_that_act_learn(two, name, count):
    set_adapter(two.model, name)
    assert sum(p.numel() for p in two.model.parameters() if p.requires_grad) == count
    set_adapter(two.model, name, trainable=False)
    assert not [name for name, p in two.model.named_parameters() if p.requires_grad]


def test_training_one_leaves_the_other_as_it_was(two, samples):
    set_adapter(two.model, "stack")
    fine_tune(two.policy, samples, steps=2, progress=False)
    set_adapter(two.model, "spatial")
    assert np.array_equal(two.policy.decide(two.observations).probabilities, two.said["spatial"])


def test_one_can_be_removed_and_the_other_stays(two):
    remove_adapters(two.model, "spatial")
    assert list(adapters_of(two.model)) == ["stack"]
    assert np.array_equal(two.policy.decide(two.observations).probabilities, two.said[None]), "what acted is gone, so the base acts"
    set_adapter(two.model, "stack")
    assert np.array_equal(two.policy.decide(two.observations).probabilities, two.said["stack"])


def test_several_are_saved_to_a_folder_each(two, tiny_folder, tmp_path):
    two.policy.save(tmp_path)
    again = load_policy(tiny_folder, device="cpu")
    for name in ("stack", "spatial"):
        load_adapter(again.model, tmp_path / name, name)
        assert np.array_equal(again.decide(two.observations).probabilities, two.said[name])
    assert adapters_of(again.model) == adapters_of(two.model)


@every_placement
def test_decoding_with_the_cache_equals_decoding_without(tiny_policy, observations, placement):
    add_adapter(tiny_policy.model, BottleneckConfig(4, placement))
    shaken(tiny_policy.model, std=0.1)
    decision, chosen = tiny_policy.decide(observations), []
    batch = tiny_policy.prompts(*zip(*[(o["instruction"], o["rgb"], bool(o["holding"])) for o in observations]))
    for _ in range(4):
        with torch.no_grad():
            chosen.append(tiny_policy.model(**batch, use_cache=False).logits[:, -1, tiny_policy.action_ids].argmax(-1))
        token = tiny_policy.action_ids[chosen[-1]][:, None]
        batch["input_ids"] = torch.cat([batch["input_ids"], token], dim=1)
        batch["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones_like(token)], dim=1)
    assert len({tuple(row) for row in decision.bins}) > 1
    assert np.array_equal(decision.bins, torch.stack(chosen, 1).numpy())


def test_an_adapted_policy_drives_the_robot(tiny_policy):
    add_adapter(tiny_policy.model, BottleneckConfig(4))
    assert len(rollout(tiny_policy, "pick", episodes=2, progress=False).success) == 2


@every_placement
def test_on_a_4_bit_base_adapters_start_as_the_identity_learn_and_can_be_removed(tiny_folder, samples, observations, placement):
    policy = load_policy(tiny_folder, quantization="nf4", device="cpu")
    said, before = policy.decide(observations).probabilities, snapshot(policy.model)
    add_adapter(policy.model, BottleneckConfig(8, placement))
    started = policy.decide(observations).probabilities
    set_adapter(policy.model, None)
    assert np.array_equal(policy.decide(observations).probabilities, started)
    set_adapter(policy.model, "default")
    history = fine_tune(policy, samples, steps=30, batch_size=6, learning_rate=1e-2, progress=False)
    assert history.loss[-1] < 0.6 * history.loss[0]
    assert all(p.abs().max() > 0 for p in adapter_parameters_of(policy.model).values()), "every tensor has learned"
    other = policy.copy()
    assert np.array_equal(other.decide(observations).bins, policy.decide(observations).bins)
    with disabled(policy.model):
        assert np.array_equal(policy.decide(observations).probabilities, said)
    remove_adapters(policy.model)
    assert_restored(policy.model, before)


@every_placement
def test_adapters_of_a_model_in_half_precision_are_kept_in_single_precision_and_start_as_the_identity(placement):
    torch.manual_seed(0)
    model = small_llama().to(torch.bfloat16).eval()
    before = logits(model)
    add_adapter(model, BottleneckConfig(4, placement))
    assert torch.equal(logits(model), before) and logits(model).dtype == torch.bfloat16
    assert {p.dtype for p in adapter_parameters_of(model).values()} == {torch.float32}
    assert not torch.equal(logits(shaken(model)), before)


def test_another_module_can_be_built_in_the_place_of_ours():
    class Linear(torch.nn.Module):
        def __init__(self, width, bottleneck):
            super().__init__()
            self.down, self.up = torch.nn.Linear(width, bottleneck), torch.nn.Linear(bottleneck, width)

        def forward(self, hidden):
            return hidden + self.up(self.down(hidden))

    model = small_llama().eval()
    before = logits(model)
    add_adapter(model, BottleneckConfig(3), build=Linear)
    assert torch.equal(logits(model), before)
    assert sum(isinstance(module, Linear) for module in model.modules()) == LAYERS


def test_a_module_that_cannot_be_built_leaves_the_model_as_it_was():
    model = small_llama()
    before = snapshot(model)
    with pytest.raises(NotImplementedError):
        add_adapter(model, BottleneckConfig(3), build=lambda width, bottleneck: exec("raise NotImplementedError"))
    assert_restored(model, before)


@every_model
@every_placement
def test_saving_and_loading_brings_back_every_bit(model, family, placement, tmp_path):
    torch.manual_seed(0)
    fresh, config = MODELS[family]().eval(), BottleneckConfig(5, placement, "tanh", 0.25)
    shaken(add_adapter(model, config))
    save_adapter(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == adapter_size(WIDTH, 5, LAYERS, 2 if placement == "houlsby" else 1)
    assert load_adapter(fresh, tmp_path) is fresh
    assert same(adapter_parameters_of(fresh), adapter_parameters_of(model)) and torch.equal(logits(fresh), logits(model))
    assert adapters_of(fresh) == {"default": config}
    assert not [name for name, p in fresh.named_parameters() if p.requires_grad], "what is loaded is for use; set_adapter makes it trainable"
    set_adapter(fresh, "default")
    assert sum(p.numel() for p in fresh.parameters() if p.requires_grad) == sum(tensor.numel() for tensor in stored.values())


def test_a_policy_saves_its_adapters_alone_and_load_policy_attaches_them(tiny_policy, tiny_folder, samples, observations, tmp_path):
    fine_tune(tiny_policy, samples, steps=8, learning_rate=1e-2, peft_config=BottleneckConfig(4), progress=False)
    tiny_policy.save(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    again = load_policy(tiny_folder, adapter=tmp_path / "adapter", device="cpu")
    assert np.array_equal(again.decide(observations).probabilities, tiny_policy.decide(observations).probabilities)
    with disabled(again.model):
        assert np.array_equal(again.decide(observations).bins, load_policy(tiny_folder, device="cpu").decide(observations).bins)
    quantized = load_policy(tiny_folder, quantization="nf4", adapter=tmp_path / "adapter", device="cpu")
    assert same(adapter_parameters_of(quantized.model), adapter_parameters_of(tiny_policy.model))


def test_without_adapters_a_policy_saves_its_model_as_before(tiny_policy, tmp_path):
    add_adapter(tiny_policy.model, BottleneckConfig(4))
    remove_adapters(tiny_policy.model)
    tiny_policy.save(tmp_path)
    again = load_policy(tmp_path, device="cpu")
    assert same(again.model.state_dict(), tiny_policy.model.state_dict())


def test_peft_s_own_adapters_are_still_peft_s(tiny_policy, tiny_folder, samples, observations, tmp_path):
    fine_tune(tiny_policy, samples, steps=2, peft_config=lora(rank=2), progress=False)
    tiny_policy.save(tmp_path)
    again = load_policy(tiny_folder, adapter=tmp_path, device="cpu")
    assert type(again.model).__name__.startswith("Peft")
    assert np.array_equal(again.decide(observations).bins, tiny_policy.decide(observations).bins)
    with pytest.raises(UserError, match="type LORA"):
        load_adapter(load_policy(tiny_folder, device="cpu").model, tmp_path)


@pytest.fixture
def folder(tmp_path):
    save_adapter(add_adapter(small_llama(), BottleneckConfig(4, "houlsby")), tmp_path)
    return tmp_path


def config_with(**changes):
    def change(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def tensors_with(change):
    def rewrite(folder):
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return rewrite


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def remove(name):
    return lambda folder: (folder / name).unlink()


FIRST = "layers.0.attention.down.weight"
BROKEN = {
    "no configuration": (remove("adapter_config.json"), small_llama, "adapter_config.json is missing: give the folder"),
    "no weights": (remove("adapter_model.safetensors"), small_llama, "adapter_model.safetensors is missing: give the folder"),
    "no JSON": (write("adapter_config.json", "{"), small_llama, "adapter_config.json is no JSON"),
    "another JSON": (write("adapter_config.json", "[]"), small_llama, "adapter_config.json holds no JSON object"),
    "another type": (config_with(peft_type="LORA"), small_llama, "type LORA, not BOTTLENECK: load them with"),
    "no type": (write("adapter_config.json", "{}"), small_llama, "type None, not BOTTLENECK"),
    "an entry missing": (write("adapter_config.json", '{"peft_type": "BOTTLENECK"}'), small_llama, "has no entry 'bottleneck'"),
    "no base": (config_with(base=None), small_llama, "does not say which model"),
    "a strange width": (config_with(bottleneck="wide"), small_llama, "bottleneck is a whole number from 1 on, not 'wide'"),
    "a strange placement": (config_with(placement=["layer"]), small_llama, "placement is 'layer' or 'houlsby'"),
    "a strange activation": (config_with(activation="sin"), small_llama, "activation is one of gelu, relu"),
    "broken weights": (write("adapter_model.safetensors", "broken"), small_llama, "adapter_model.safetensors cannot be read as safetensors"),
    "another width": (lambda folder: None, lambda: small_llama(width=64), "32 wide, this model has layers that are 64 wide: load them into"),
    "another depth": (lambda folder: None, lambda: small_llama(layers=3), "2 layers, this model has 3 layers"),
    "another model": (lambda folder: None, small_gpt2, "a llama model, this model has a gpt2 model"),
    "another bottleneck than it says": (config_with(bottleneck=5), small_llama, f"{FIRST} has the shape (4, 32), this model"),
    "another placement than it says": (config_with(placement="layer"), small_llama, "layers.0.attention.down.bias is not expected"),
    "a tensor missing": (tensors_with(lambda tensors: tensors.pop(FIRST)), small_llama, f"{FIRST} is missing"),
    "a tensor too many": (tensors_with(lambda tensors: tensors.update(x=torch.zeros(1))), small_llama, "x is not expected"),
    "a tensor of another shape": (tensors_with(lambda tensors: tensors.update({FIRST: torch.zeros(4, 31)})), small_llama, "(4, 31)"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_what_cannot_be_loaded_is_one_sentence_and_leaves_the_model_as_it_was(folder, fault):
    spoil, make, said = BROKEN[fault]
    spoil(folder)
    model = make()
    before = snapshot(model)
    with pytest.raises(UserError) as error:
        load_adapter(model, folder)
    text = str(error.value)
    assert said in text and str(folder) in text and text.endswith(".") and "\n" not in text, text
    assert_restored(model, before)


def test_load_policy_says_the_same(tiny_folder, folder, tmp_path):
    with pytest.raises(UserError, match="made for a llama model, this model has a llava model"):
        load_policy(tiny_folder, adapter=folder, device="cpu")
    with pytest.raises(UserError, match="adapter_config.json is missing"):
        load_policy(tiny_folder, adapter=tmp_path / "nowhere", device="cpu")


@pytest.mark.parametrize("options, said", [
    ({"bottleneck": 0}, "from 1 on, not 0"), ({"bottleneck": 1.5}, "not 1.5"), ({"bottleneck": True}, "not True"),
    ({"placement": "everywhere"}, "'layer' or 'houlsby', not 'everywhere'"), ({"activation": "swish"}, "gelu, relu, silu, tanh, not 'swish'"),
    ({"init_std": -0.1}, "not -0.1"), ({"init_std": float("nan")}, "not nan"), ({"init_std": "small"}, "not 'small'"),
])
def test_a_configuration_says_what_is_wrong_with_it(options, said):
    with pytest.raises(ValueError, match="(?s).*" + said):
        BottleneckConfig(**options)


@pytest.mark.parametrize("call, said", [
    (lambda model: add_adapter(model, BottleneckConfig()), "has adapters called 'default' already"),
    (lambda model: add_adapter(model, BottleneckConfig(), "a.b"), "holds no dot: 'a.b'"),
    (lambda model: add_adapter(model, BottleneckConfig(), ""), "not empty"),
    (lambda model: set_adapter(model, "fold"), "no adapters called 'fold'; it has default"),
    (lambda model: remove_adapters(model, "fold"), "no adapters called 'fold'; it has default"),
    (lambda model: save_adapter(model, "unused", "fold"), "which adapters should be saved"),
])
def test_a_wrong_name_is_named(call, said):
    model = add_adapter(small_llama(), BottleneckConfig())
    before = snapshot(model)
    with pytest.raises(ValueError, match=said):
        call(model)
    assert_restored(model, before)


@pytest.mark.parametrize("call", [
    lambda model: set_adapter(model, "default"), remove_adapters, lambda model: save_adapter(model, "unused"),
    lambda model: disabled(model).__enter__(),
])
def test_a_model_without_adapters_says_so(call):
    with pytest.raises(ValueError, match="has no bottleneck adapters; add some"):
        call(small_llama())


def test_models_whose_layers_are_unknown_are_refused_by_name():
    with pytest.raises(ValueError, match="OPTDecoderLayer has no module for its mlp .*: use placement='layer'"):
        add_adapter(small_opt(), BottleneckConfig(4, "houlsby"))
    model = small_opt().eval()
    before = logits(model)
    assert torch.equal(logits(add_adapter(model, BottleneckConfig(4, "layer"))), before)
    with pytest.raises(ValueError, match="no list of transformer layers was found in Linear"):
        decoder_layers(torch.nn.Linear(2, 2))


def test_saving_several_without_saying_which_is_refused(tmp_path):
    model = add_adapter(add_adapter(small_llama(), BottleneckConfig(), "a"), BottleneckConfig(), "b")
    set_adapter(model, None)
    with pytest.raises(ValueError, match="which adapters should be saved\\? The model has a, b"):
        save_adapter(model, tmp_path)
    save_adapters(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.skipif(not (STORED / "adapters.json").exists(), reason="the sweep was not run")
def test_the_learning_rates_of_the_sweep_are_the_best_of_its_validation_points():
    sweep = load_sweep("adapters")
    compared = {"layer": {"placement": "layer", "init_std": 0.0}, "houlsby": {"placement": "houlsby"}, "random": {"init_std": 0.35},
                "one matrix": {"method": "one matrix"}}
    for name, settings in compared.items():
        means = {rate: sweep.values("success.100", use="validation", learning_rate=rate, **settings).mean() for rate in experiment.CANDIDATES}
        assert experiment.RATES[name] == max(means, key=means.get), (name, means)


def test_validation_and_test_share_neither_episodes_nor_seeds():
    from labkit.rollouts import EVALUATION_SEED

    assert not set(experiment.SEEDS) & set(experiment.VALIDATION_SEEDS)
    ends = [set(range(first, first + experiment.EPISODES)) for first in (EVALUATION_SEED, experiment.VALIDATION_SEED)]
    assert not ends[0] & ends[1]


@pytest.mark.parametrize("point, trained", [
    ({"method": "full"}, None), ({"method": "one matrix"}, 128 * 128), ({"method": "both zero", "seed": 0}, adapter_size(128, 16, 4)),
    ({"method": "adapter", "placement": "houlsby", "bottleneck": 4, "init_std": 0.0, "seed": 0}, adapter_size(128, 4, 4, 2)),
])
def test_each_setting_trains_what_it_is_called_after(shipped_policy, point, trained):
    policy = experiment.prepared(point)
    assert sum(p.numel() for p in policy.model.parameters() if p.requires_grad) == (trained or sum(p.numel() for p in policy.model.parameters()))
    if point["method"] == "both zero":
        assert all((p == 0).all() for p in adapter_parameters_of(policy.model).values())
