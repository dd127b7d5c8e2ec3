"""Properties of loading a policy and of asking it, held against plain forward passes, peft and bitsandbytes."""

import json
import shutil

import numpy as np
import pytest
import torch

from labkit.actions import NAMES, bins_to_action
from labkit.errors import UserError
from labkit.policy import QUANTIZATIONS, load_policy
from labkit.sft import batch_loss, fine_tune, lora, tokenize
from labkit.tabletop import Tabletop


def decode_without_cache(policy, observations):
    """(B, 4) bins and (B, 4, 256) logits by four whole forward passes, the chosen token appended each time."""
    instructions, images = [o["instruction"] for o in observations], [o["rgb"] for o in observations]
    batch = policy.prompts(instructions, images, [bool(o["holding"]) for o in observations])
    bins, logits = [], []
    with torch.no_grad():
        for _ in range(4):
            row = policy.model(**batch, use_cache=False).logits[:, -1, policy.action_ids]
            logits.append(row)
            bins.append(row.argmax(-1))
            token = policy.action_ids[bins[-1]][:, None]
            batch["input_ids"] = torch.cat([batch["input_ids"], token], dim=1)
            batch["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones_like(token)], dim=1)
    return torch.stack(bins, 1).numpy(), torch.stack(logits, 1)


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_tests_run_on_one_thread():
    """Results are bit-identical only between runs with the same number of threads."""
    assert torch.get_num_threads() == 1


def test_decoding_with_the_cache_equals_decoding_without(tiny_policy, observations):
    decision = tiny_policy.decide(observations)
    bins, logits = decode_without_cache(tiny_policy, observations)
    assert len({tuple(row) for row in bins}) > 1, "a policy that always says the same cannot fail this test"
    assert np.array_equal(decision.bins, bins)
    chosen = logits.softmax(-1).gather(-1, torch.as_tensor(bins)[..., None])[..., 0].numpy()
    assert np.abs(decision.probabilities - chosen).max() < 1e-5


def test_a_batch_decides_what_each_observation_alone_would(tiny_policy, observations):
    together = tiny_policy.decide(observations)
    alone = [tiny_policy.decide([o]) for o in observations]
    assert np.array_equal(together.bins, np.concatenate([d.bins for d in alone]))
    assert np.abs(together.probabilities - np.concatenate([d.probabilities for d in alone])).max() < 1e-4


def test_only_action_tokens_are_considered(tiny_policy, observations):
    """A word that would win among all tokens must not be said."""
    with torch.no_grad():
        tiny_policy.model.lm_head.weight[10:20] *= 100
    decision = tiny_policy.decide(observations)
    bins, _ = decode_without_cache(tiny_policy, observations)
    assert np.array_equal(decision.bins, bins)
    assert decision.probabilities.min() > 0


def test_waypoints_are_the_centres_of_the_chosen_bins(tiny_policy, observations):
    decision = tiny_policy.decide(observations)
    assert decision.bins.shape == (len(observations), len(NAMES))
    assert np.array_equal(decision.waypoints[:, [0, 1, 2, 6]], bins_to_action(decision.bins))
    assert (decision.waypoints[:, 3:6] == 0).all()


def test_act_obeys_the_instruction_it_is_given_and_else_the_observation_s_own(tiny_policy, observations):
    texts = [o["instruction"] for o in observations]
    first = observations[0]
    own = tiny_policy.act(first)
    assert np.array_equal(own, tiny_policy.act(first, texts[0]))
    by_text = {tuple(tiny_policy.act(first, text)) for text in texts}
    assert len(by_text) > 1 and all(np.array_equal(tiny_policy.act(first, t), tiny_policy.act({**first, "instruction": t})) for t in texts)


def test_the_environment_accepts_what_a_policy_says(tiny_policy):
    env = Tabletop("pick")
    observation, _ = env.reset(seed=0)
    _, _, _, _, info = env.step(tiny_policy.act(observation))
    assert info["decisions"] == 1


def test_a_copy_can_be_changed_without_changing_the_original(tiny_policy, observations):
    before = tiny_policy.decide(observations).bins
    other = tiny_policy.copy()
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.zero_()
    assert np.array_equal(tiny_policy.decide(observations).bins, before)


def test_saving_and_loading_gives_the_same_policy(tiny_policy, observations, tmp_path):
    tiny_policy.save(tmp_path / "saved")
    again = load_policy(tmp_path / "saved", device="cpu")
    assert all(torch.equal(value, again.model.state_dict()[name]) for name, value in tiny_policy.model.state_dict().items())
    assert np.array_equal(again.decide(observations).bins, tiny_policy.decide(observations).bins)
    assert not (tmp_path / "saved" / "pytorch_model.bin").exists(), "weights are stored as safetensors"


def test_an_adapter_is_saved_alone_and_attached_again(tiny_policy, tiny_folder, observations, samples, tmp_path):
    fine_tune(tiny_policy, samples, steps=8, learning_rate=1e-2, peft_config=lora(rank=4), progress=False)
    tiny_policy.save(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < (tiny_folder / "model.safetensors").stat().st_size / 10
    again = load_policy(tiny_folder, adapter=tmp_path / "adapter", device="cpu")
    assert np.array_equal(again.decide(observations).bins, tiny_policy.decide(observations).bins)
    assert not np.array_equal(again.decide(observations).bins, load_policy(tiny_folder, device="cpu").decide(observations).bins)


def one_sentence(*arguments, **options):
    with pytest.raises(UserError) as caught:
        load_policy(*arguments, **options)
    text = str(caught.value)
    assert "\n" not in text and 20 < len(text) < 600 and not text.endswith(":"), text
    return text


@pytest.fixture
def broken(tiny_folder, tmp_path):
    """A copy of the tiny policy to damage."""
    return shutil.copytree(tiny_folder, tmp_path / "broken")


def reconfigure(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["nope", "./nope", "/nowhere/at/all", "~/nope", "C:\\nope"])
def test_a_policy_that_does_not_exist_is_named(name):
    assert "there is no policy" in one_sentence(name)


def test_an_unreachable_hub_is_one_sentence():
    assert "someone/some-vla" in one_sentence("someone/some-vla")


def test_a_folder_that_is_no_model_is_named(tmp_path):
    assert str(tmp_path) in one_sentence(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert "BertConfig" in one_sentence(tmp_path)


def test_weights_that_are_missing_are_named(broken):
    reconfigure(broken, num_hidden_layers=5)
    assert "layers.4" in one_sentence(broken)


def test_weights_that_have_no_place_are_named(broken):
    reconfigure(broken, num_hidden_layers=3)
    assert "layers.3" in one_sentence(broken)


def test_weights_of_another_width_are_named(broken):
    reconfigure(broken, intermediate_size=96)
    assert "gate_proj" in one_sentence(broken) or "mlp" in one_sentence(broken)


@pytest.mark.parametrize("damage", ["no weights", "half the weights", "configuration cut off"])
def test_a_damaged_checkpoint_is_one_sentence(broken, damage):
    weights = broken / "model.safetensors"
    if damage == "no weights":
        weights.unlink()
    elif damage == "half the weights":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    else:
        (broken / "config.json").write_text("{")
    assert str(broken) in one_sentence(broken)


def test_a_missing_tokenizer_is_one_sentence(broken):
    (broken / "tokenizer.json").unlink()
    assert str(broken) in one_sentence(broken)


@pytest.fixture
def adapter(tiny_policy, tmp_path):
    from peft import get_peft_model

    get_peft_model(tiny_policy.model, lora(rank=2)).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_folder_without_an_adapter_is_named(tiny_folder, tmp_path):
    assert "adapter_config.json" in one_sentence(tiny_folder, adapter=tmp_path)


def test_an_adapter_for_other_layers_is_named(tiny_folder, adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["query"]}))
    assert "query" in one_sentence(tiny_folder, adapter=adapter)


def test_an_adapter_of_another_rank_is_named(tiny_folder, adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "r": 3}))
    assert "lora" in one_sentence(tiny_folder, adapter=adapter)


def test_a_damaged_adapter_is_one_sentence(tiny_folder, adapter):
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert str(adapter) in one_sentence(tiny_folder, adapter=adapter)


def test_an_unknown_quantization_is_named(tiny_folder):
    assert "int3" in one_sentence(tiny_folder, quantization="int3")


@pytest.mark.parametrize("quantization", [q for q in QUANTIZATIONS if q])
def test_a_quantized_policy_acts_and_is_smaller(tiny_folder, observations, quantization):
    plain, small = load_policy(tiny_folder, device="cpu"), load_policy(tiny_folder, quantization=quantization, device="cpu")
    assert small.decide(observations).bins.shape == (len(observations), 4)
    assert small.model.get_memory_footprint() < 0.5 * plain.model.get_memory_footprint()


def test_nf4_stores_what_bitsandbytes_itself_would(tiny_folder):
    import bitsandbytes.functional as bnb

    plain, small = load_policy(tiny_folder, device="cpu"), load_policy(tiny_folder, quantization="nf4", device="cpu")
    name = "model.language_model.layers.1.mlp.up_proj"
    weight = plain.model.get_submodule(name).weight.detach()
    stored = small.model.get_submodule(name).weight
    packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    assert stored.quant_state.nested, "the blocks' constants are quantised, too"
    assert torch.equal(bnb.dequantize_4bit(stored.data, stored.quant_state), bnb.dequantize_4bit(packed, state))


def trainable_norms(policy, samples):
    """Gradient norm of every LoRA B matrix (at the start, B = 0 and only B has a gradient)."""
    policy.model.train()
    policy.model.zero_grad()
    batch_loss(policy.model, tokenize(policy, samples)).backward()
    return [0.0 if p.grad is None else float(p.grad.norm()) for name, p in policy.model.named_parameters() if "lora_B" in name]


def copy_dequantized(small, plain):
    """Give the plain policy the weights that the quantised one stands for."""
    from bitsandbytes.functional import dequantize_4bit

    with torch.no_grad():
        for name, module in small.model.named_modules():
            if type(module).__name__ == "Linear4bit":
                plain.model.get_submodule(name).weight.copy_(dequantize_4bit(module.weight.data, module.weight.quant_state))


def test_lora_on_nf4_gets_the_gradients_that_lora_on_dequantized_weights_gets(tiny_folder, samples):
    from peft import get_peft_model

    small, plain = load_policy(tiny_folder, quantization="nf4", device="cpu"), load_policy(tiny_folder, device="cpu")
    copy_dequantized(small, plain)
    for policy in (small, plain):
        torch.manual_seed(0)
        policy.model = get_peft_model(policy.model, lora(rank=4))
    quantized, exact = trainable_norms(small, samples), trainable_norms(plain, samples)
    assert len(exact) == 16 and min(exact) > 0
    assert np.allclose(quantized, exact, rtol=1e-3)


def packed_weights(model):
    """The 4-bit bytes of every quantised layer, by the layer's name in the plain model."""
    from bitsandbytes.nn import Linear4bit

    return {
        name.replace("base_model.model.", "").replace(".base_layer", ""): module.weight.data.clone()
        for name, module in model.named_modules() if type(module) is Linear4bit
    }


def test_qlora_learns_and_leaves_the_nf4_base_alone(tiny_folder, samples):
    policy = load_policy(tiny_folder, quantization="nf4", device="cpu")
    before = packed_weights(policy.model)
    history = fine_tune(policy, samples, steps=12, learning_rate=5e-3, peft_config=lora(rank=8), progress=False)
    assert np.mean(history.loss[-3:]) < history.loss[0] - 0.3
    after = packed_weights(policy.model)
    assert len(before) == len(after) > 20 and all(torch.equal(after[name], value) for name, value in before.items())


def test_a_quantized_policy_that_has_acted_gets_the_same_gradients_as_one_that_has_not(tiny_folder, samples, observations):
    """On CPUs with AVX512-BF16, bitsandbytes left to itself repacks the weights of a model that acts, and LoRA gets no gradient."""
    from peft import get_peft_model

    norms = []
    for acts in (False, True):
        policy = load_policy(tiny_folder, quantization="nf4", device="cpu")
        if acts:
            policy.decide(observations)
        torch.manual_seed(0)
        policy.model = get_peft_model(policy.model, lora(rank=4))
        norms.append(trainable_norms(policy, samples))
    assert min(norms[0]) > 0 and norms[0] == norms[1]


def test_evaluating_a_quantized_policy_while_it_trains_changes_nothing(tiny_folder, samples, observations):
    losses = []
    for callbacks in ((), [lambda step, policy, history: policy.decide(observations)]):
        policy = load_policy(tiny_folder, quantization="nf4", device="cpu")
        losses.append(fine_tune(policy, samples, steps=4, peft_config=lora(rank=4), callbacks=callbacks, progress=False).loss)
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]


def test_a_quantized_policy_decides_what_its_dequantized_weights_decide(tiny_folder, observations):
    """In float32: no other number format slips in between."""
    small, plain = load_policy(tiny_folder, quantization="nf4", device="cpu"), load_policy(tiny_folder, device="cpu")
    copy_dequantized(small, plain)
    a, b = small.decide(observations), plain.decide(observations)
    assert np.array_equal(a.bins, b.bins) and np.allclose(a.probabilities, b.probabilities, atol=1e-5)


def test_the_shipped_policy_decodes_with_the_cache_as_without(shipped_policy, observations):
    assert np.array_equal(shipped_policy.decide(observations).bins, decode_without_cache(shipped_policy, observations)[0])


def test_the_shipped_policy_in_nf4_mostly_decides_the_same(shipped_policy, observations):
    small = load_policy("tiny", quantization="nf4", device="cpu")
    difference = np.abs(small.decide(observations).actions - shipped_policy.decide(observations).actions)
    assert np.median(difference[:, :2]) < 0.02


@pytest.mark.parametrize("name", ["tiny-early", "tiny-middle"])
def test_the_checkpoints_of_the_same_run_load(shipped_policy, name, observations):
    assert load_policy(name, device="cpu").decide(observations).bins.shape == (len(observations), 4)
