"""Counts and bytes of models, held against torch, transformers, peft, bitsandbytes, autograd, and what others published."""

import math

import pytest
import torch
from torch import nn

from labkit.adapters import BottleneckAdapter
from labkit.memory import (
    ALL_LINEAR,
    ATTENTION,
    LLAMAS,
    OpenVLA,
    adapter_parameters,
    count,
    llama_config,
    lora_parameters,
    meta_lora,
    meta_model,
    openvla_lora_targets,
    openvla_table_1,
)  # fmt: skip
from labkit.memory_calculator import (
    KINDS,
    Training,
    linear_shapes,
    llama_like,
    llama_parameters,
    measured_activation_bytes,
    measured_bytes,
    nf4_constants,
)  # fmt: skip

LLAMA_2 = 6_738_415_616
GB = 1e9


def on_meta(model):
    return {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.fixture(scope="module")
def openvla():
    return meta_model("openvla-7b")


@pytest.mark.parametrize("name", LLAMAS)
def test_the_arithmetic_of_a_llama_agrees_with_transformers_own_modules(name):
    model = meta_model(name)
    assert on_meta(model)
    assert count(model).total == llama_parameters(llama_config(name))
    layer = model.model.layers[0]
    modules = {part.rpartition(".")[2]: tuple(module.weight.shape) for part, module in layer.named_modules() if isinstance(module, nn.Linear)}
    assert modules == linear_shapes(llama_config(name))


@pytest.mark.parametrize("name, published", [
    # The sizes in the names; Llama-2's are in Touvron et al., arXiv 2307.09288, Code Llama's in arXiv 2308.12950.
    ("stories-260k", 260e3), ("stories-15m", 15e6), ("stories-42m", 42e6), ("stories-110m", 110e6), ("tinyllama-1.1b", 1.1e9),
    ("open-llama-3b", 3.4e9), ("llama-2-7b", 6.7e9), ("llama-2-13b", 13e9), ("codellama-34b", 34e9), ("llama-2-70b", 69e9),
])
def test_a_llama_has_the_size_in_its_name(name, published):
    assert llama_parameters(llama_config(name)) == pytest.approx(published, rel=0.015)


def test_a_configuration_becomes_the_model_that_transformers_builds_for_its_task():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    vision = CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    llava = meta_model(LlavaConfig(vision_config=vision, text_config=LlamaConfig(**sizes, vocab_size=20)))
    assert (type(llava).__name__, on_meta(llava)) == ("LlavaForConditionalGeneration", True)
    assert type(meta_model(LlamaConfig(**sizes, vocab_size=20))).__name__ == "LlamaForCausalLM"
    assert type(meta_model(vision)).__name__ == "CLIPVisionModel"


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="llama-2-7b"):
        meta_model("llama-9")


def test_llama_2_has_the_published_number_of_parameters():
    assert count(meta_model("llama-2-7b")) == (LLAMA_2, LLAMA_2)


@pytest.mark.parametrize("rank, targets, published", [
    (16, ATTENTION, 16_777_216), (10, ATTENTION, 10_485_760), (16, ("q_proj", "v_proj"), 8_388_608), (4, ALL_LINEAR, 9_994_240),
    (16, ALL_LINEAR, 39_976_960), (32, ALL_LINEAR, 79_953_920),
])
def test_lora_on_llama_2_adds_what_the_formula_says(rank, targets, published):
    adapted = meta_lora(meta_model("llama-2-7b"), rank, targets)
    assert on_meta(adapted)
    shapes = linear_shapes(llama_config("llama-2-7b"))
    assert count(adapted).trainable == 32 * sum(lora_parameters(shapes[name], rank) for name in targets) == published
    assert tuple(count(adapted)) == adapted.get_nb_trainable_parameters()


@pytest.mark.parametrize("shape", [(7, 5), (12, 12), (6, 3, 4, 4)])
def test_the_formula_for_lora_is_what_peft_adds(shape):
    base = nn.Linear(shape[1], shape[0]) if len(shape) == 2 else nn.Conv2d(shape[1], shape[0], kernel_size=shape[2:])
    assert base.weight.shape == shape
    assert lora_parameters(shape, 3) == count(meta_lora(nn.ModuleDict({"layer": base}), 3, ["layer"])).trainable


def test_one_projection_of_the_lecture():
    assert lora_parameters((4096, 4096), 16) == 131_072
    assert 4096 * 4096 // 131_072 == 128


@pytest.mark.parametrize("d, m", [(4096, 64), (5, 3)])
def test_the_formula_for_an_adapter_is_what_torch_counts(d, m):
    with torch.device("meta"):
        adapter = BottleneckAdapter(d, m)
    assert adapter_parameters(d, m) == sum(p.numel() for p in adapter.parameters())
    assert adapter_parameters(d, m, bias=False) == adapter.down.weight.numel() + adapter.up.weight.numel()


def test_adapters_and_lora_add_the_same_number_to_llama_2():
    assert 32 * adapter_parameters(4096, 64, bias=False) == count(meta_lora(meta_model("llama-2-7b"), 16)).trainable


def test_count_tells_trained_from_frozen():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2).requires_grad_(False))
    assert count(model) == (16, 26)
    assert count(model).share == 16 / 26


def test_openvlas_towers_have_the_parameters_of_transformers_own(openvla):
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel, SiglipVisionConfig, SiglipVisionModel

    sizes = dict(image_size=224, patch_size=14, num_attention_heads=16)
    with torch.device("meta"):
        siglip = SiglipVisionModel(SiglipVisionConfig(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, **sizes))
        dino = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(hidden_size=1024, num_hidden_layers=24, num_register_tokens=4, **sizes))
    towers = openvla.vision_backbone
    assert count(towers.fused_featurizer).total == count(siglip).total == 427_680_704
    # transformers' has a mask token, and a position for the class token; timm's, which OpenVLA uses, has neither.
    assert count(towers.featurizer).total == count(dino).total - 2 * 1024 == 303_230_976


def test_the_released_openvla_has_the_parameters_of_its_files(openvla):
    # 15,082,474,368 bytes in bfloat16 in the safetensors files of huggingface.co/openvla/openvla-7b.
    assert on_meta(openvla)
    assert count(openvla).total == 15_082_474_368 // 2


def test_openvlas_own_fine_tuning_script_prints_the_same_numbers():
    # github.com/openvla/openvla, vla-scripts/finetune.py at rank 32, as many public logs have it:
    # "trainable params: 110,828,288 || all params: 7,652,065,472 || trainable%: 1.4483"; its adapter file holds 878 tensors.
    model = meta_model("openvla-7b")
    adapted = meta_lora(model, 32, openvla_lora_targets(model))
    assert count(adapted) == (110_828_288, 7_652_065_472)
    assert f"{100 * count(adapted).share:.4f}" == "1.4483"
    assert sum("lora_" in name for name, _ in adapted.named_parameters()) == 878
    assert on_meta(adapted)


def test_table_1_of_openvla_to_the_digit():
    rows = openvla_table_1()
    assert {row.strategy: row.trainable for row in rows} == {
        "full": 7_188_124_608, "last layer": 465_055_744, "frozen vision": 6_760_443_904, "sandwich": 914_240_448,
        "LoRA r=32": 97_603_968, "LoRA r=64": 195_207_936,
    }
    assert all(round(row.trainable / 1e6, 1) == row.printed for row in rows)


def test_openvlas_lora_reaches_the_head_and_the_patch_embedding():
    with torch.device("meta"):
        model = OpenVLA(fused=False)
    adapted = meta_lora(model, 2, openvla_lora_targets(model)).base_model.model
    assert hasattr(adapted.language_model.lm_head, "lora_A")
    assert isinstance(adapted.vision_backbone.featurizer.patch_embed.proj.lora_A["default"], nn.Conv2d)


@pytest.mark.parametrize("options, gigabytes", [
    (dict(model=7.0e9), 84), (dict(model=7.0e9, master_copy=True), 112), (dict(model=7.0e9, moments="bfloat16"), 56),
    (dict(model="llama-2-7b"), 80.9), (dict(model="llama-2-7b", master_copy=True), 107.8),
    (dict(model="llama-2-7b", method="qlora"), 4.1), (dict(model="llama-2-7b", method="qlora", rank=64, targets=ALL_LINEAR), 6.4),
])
def test_what_stays_in_memory_between_two_steps(options, gigabytes):
    assert Training(**options).static() / GB == pytest.approx(gigabytes, abs=0.051)


def test_llama_2_in_nf4_with_embeddings_and_head_in_16_bits():
    found = Training("llama-2-7b", method="qlora").bytes()
    stored = found["weights"] + found["quantisation constants"]
    assert stored / GB == pytest.approx(3.87, abs=0.01)
    assert 2 * LLAMA_2 / stored == pytest.approx(3.49, abs=0.01)


def test_a_full_fine_tuning_is_the_sum_of_bytes_a_parameter():
    found = Training("llama-2-7b", weights="float32", master_copy=True, moments="bfloat16", gradients="bfloat16").bytes()
    each = {kind: found[kind] / LLAMA_2 for kind in KINDS}
    assert each == {"weights": 4, "quantisation constants": 0, "adapters": 0, "gradients": 2, "optimiser": 4, "master copy": 4, "activations": 0}


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(256, 512), (96, 130)])
def test_the_constants_of_nf4_are_those_in_bitsandbytes_objects(shape, double):
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(torch.randn(shape, generator=torch.Generator().manual_seed(0)), blocksize=64, compress_statistics=double,
                                      quant_type="nf4")
    own = [state.absmax, state.code, *([state.offset, state.state2.absmax, state.state2.code] if double else [])]
    assert nf4_constants(math.prod(shape), double, matrices=1) == sum(t.numel() * t.element_size() for t in own)
    assert packed.nbytes == math.prod(shape) / 2


def test_nf4_with_double_quantisation_takes_4_127_bits_a_weight():
    weights = 4096 * 4096
    assert 4 + 8 * nf4_constants(weights) / weights == pytest.approx(4.127, abs=1e-3)


@pytest.mark.parametrize("wrong", [
    dict(method="qlorra"), dict(weights="int8"), dict(moments="float8"), dict(attention="flash"), dict(targets=("qkv",)), dict(targets=()),
    dict(rank=0), dict(batch=-1), dict(sequence=0), dict(model="openvla-7b"), dict(model=1e12), dict(model=1000),
])
def test_what_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError):
        Training(**{"model": "llama-2-7b", **wrong})


@pytest.mark.parametrize("parameters", [1e6 * 70_000 ** (i / 12) for i in range(13)])
def test_guessed_shapes_are_a_possible_llama_of_about_that_size(parameters):
    config = llama_like(parameters)
    near = min(abs(math.log(llama_parameters(llama_config(name)) / parameters)) for name in LLAMAS) <= math.log(1.05)
    assert count(meta_model(config)).total == pytest.approx(parameters, rel=0.05 if near else 0.005)
    assert config.hidden_size % config.num_attention_heads == config.num_attention_heads % config.num_key_value_heads == 0
    assert 2 < config.intermediate_size / config.hidden_size < 4


def test_a_number_of_parameters_near_a_published_model_takes_its_shapes():
    assert llama_like(7e9).to_dict() == llama_config("llama-2-7b").to_dict()
    assert Training(7e9).parameters == 7_000_000_000


def test_larger_models_need_more_memory_whatever_the_method():
    for method in ("full", "lora", "qlora"):
        totals = [Training(1e6 * 70_000 ** (i / 12), method=method, batch=1).total() for i in range(13)]
        assert totals == sorted(totals)


def test_checkpointing_and_smaller_batches_save_activations_and_nothing_else():
    options = dict(model="llama-2-7b", method="qlora", sequence=512)
    much, little = Training(**options, batch=8), Training(**options, batch=8, checkpointing=True)
    assert much.static() == little.static() == Training(**options, batch=0).total()
    assert much.total() > 3 * little.total()
    assert much.bytes()["activations"] == 8 * Training(**options, batch=1).bytes()["activations"]


def grouped_llama():
    """11.6M parameters, untied, with grouped key and value heads."""
    from transformers import LlamaConfig

    return LlamaConfig(hidden_size=320, intermediate_size=864, num_hidden_layers=8, num_attention_heads=10, num_key_value_heads=5,
                       vocab_size=3000, tie_word_embeddings=False)


def trained_once(model, **batch):
    """The model and its optimiser after one step of AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model.train()(**batch).loss.backward()
    optimizer.step()
    return model, optimizer


def real_model(config, method, folder=None, dtype=torch.float32, targets=ATTENTION):
    """A Llama with random weights as it is fine-tuned by this method, with LoRA of rank 8; NF4 is written to and read from `folder`."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(config).to(dtype)
    if method == "qlora":
        model.save_pretrained(folder)
        model = read_in_nf4(folder, dtype)
    return model if method == "full" else get_peft_model(model, LoraConfig(r=8, target_modules=list(targets)))


def read_in_nf4(folder, dtype):
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    model = LlamaForCausalLM.from_pretrained(folder, quantization_config=nf4, device_map={"": "cpu"}, dtype=dtype)
    for module in model.modules():
        # See _never_repack in labkit/policy.py.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


TOKENS = torch.arange(8).reshape(2, 4)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("config", [llama_config("stories-15m"), grouped_llama()], ids=["stories-15m", "grouped"])
def test_a_real_model_holds_the_bytes_that_were_calculated(config, method, tmp_path):
    dtype = "bfloat16" if method == "qlora" else "float32"
    model, optimizer = trained_once(real_model(config, method, tmp_path, getattr(torch, dtype)), input_ids=TOKENS, labels=TOKENS)
    calculated = Training(config, method, weights=dtype, rank=8).bytes()
    measured = measured_bytes(model, optimizer)
    # One thousandth: AdamW's step counters (4 bytes a tensor), and blocks that a matrix does not fill.
    for kind in measured.keys() & calculated.keys():
        assert measured[kind] == pytest.approx(calculated[kind], rel=1e-3), kind
    assert measured["buffers"] < 1000


def test_4_bit_weights_count_as_the_weights_that_they_stand_for(tmp_path):
    config = grouped_llama()
    model = real_model(config, "qlora", tmp_path)
    assert count(model).total == llama_parameters(config) + count(model).trainable
    assert tuple(count(model)) == model.get_nb_trainable_parameters()


def test_measured_bytes_are_torchs_own_and_tied_weights_count_once():
    from transformers import LlamaForCausalLM

    model, optimizer = trained_once(LlamaForCausalLM(llama_config("stories-260k")), input_ids=TOKENS, labels=TOKENS)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    measured = measured_bytes(model, optimizer)
    assert measured["weights"] == measured["gradients"] == 4 * 260_032
    assert measured["weights"] + measured["buffers"] == model.get_memory_footprint()
    assert measured["optimiser"] == 2 * 4 * 260_032 + 4 * len(list(model.parameters()))


def test_measured_bytes_of_a_model_without_weights():
    found = measured_bytes(meta_model("llama-2-7b"))
    assert found["weights"] == 4 * LLAMA_2


def small_llama(layers=4, attention="sdpa"):
    from transformers import LlamaConfig

    return LlamaConfig(hidden_size=96, intermediate_size=260, num_hidden_layers=layers, num_attention_heads=6, num_key_value_heads=2,
                       vocab_size=110, attn_implementation=attention)


def kept_by_autograd(model, checkpointing=False):
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    ids = torch.zeros(3, 40, dtype=torch.long)
    return measured_activation_bytes(model.train(), input_ids=ids, labels=ids)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method, targets, tolerance", [
    ("full", ATTENTION, 0.015), ("lora", ATTENTION, 0.05), ("lora", ALL_LINEAR, 0.05), ("lora", ("q_proj", "down_proj"), 0.08),
])
def test_the_calculated_activations_are_what_autograd_keeps(method, targets, tolerance, attention, dtype):
    config = small_llama(attention=attention)
    training = Training(config, method, weights=dtype, rank=8, targets=targets, attention=attention, batch=3, sequence=40)
    model = real_model(config, method, dtype=getattr(torch, dtype), targets=targets)
    assert training.bytes()["activations"] == pytest.approx(kept_by_autograd(model), rel=tolerance)


def test_the_activations_of_qlora_are_those_of_lora_on_16_bit_weights(tmp_path):
    training = Training(small_llama(), "qlora", rank=8, batch=3, sequence=40)
    measured = kept_by_autograd(real_model(small_llama(), "qlora", tmp_path, torch.bfloat16))
    assert training.bytes()["activations"] == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_with_checkpointing_a_further_layer_costs_its_input(method):
    measured, calculated = [], []
    for layers in (2, 5):
        config = small_llama(layers)
        measured.append(kept_by_autograd(real_model(config, method, dtype=torch.bfloat16), checkpointing=True))
        training = Training(config, method, rank=8, batch=3, sequence=40, checkpointing=True)
        calculated.append(training.bytes()["activations"])
    assert calculated[1] - calculated[0] == pytest.approx(measured[1] - measured[0], rel=0.01)
