"""Parameters of models, counted on torch's meta device: no weight is ever allocated or downloaded. Bytes are in memory_calculator.py."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from labkit.adapters import adapter_size

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")

# Llama models by size. Columns: hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads, vocab_size,
# tie_word_embeddings.
LLAMAS = {
    # github.com/karpathy/llama2.c (README, "models"; model.py ties embedding and head), huggingface.co/Xenova/llama2.c-stories*
    "stories-260k": (64, 172, 5, 8, 4, 512, True),
    "stories-15m": (288, 768, 6, 6, 6, 32_000, True),
    "stories-42m": (512, 1376, 8, 8, 8, 32_000, True),
    "stories-110m": (768, 2048, 12, 12, 12, 32_000, True),
    # config.json of huggingface.co/TinyLlama/TinyLlama-1.1B-Chat-v1.0, openlm-research/open_llama_3b, meta-llama/Llama-2-{7b,13b,70b}-hf,
    # codellama/CodeLlama-34b-hf
    "tinyllama-1.1b": (2048, 5632, 22, 32, 4, 32_000, False),
    "open-llama-3b": (3200, 8640, 26, 32, 32, 32_000, False),
    "llama-2-7b": (4096, 11_008, 32, 32, 32, 32_000, False),
    "llama-2-13b": (5120, 13_824, 40, 40, 40, 32_000, False),
    "codellama-34b": (8192, 22_016, 48, 64, 8, 32_000, False),
    "llama-2-70b": (8192, 28_672, 80, 64, 8, 32_000, False),
}
# config.json of huggingface.co/openvla/openvla-7b: Llama-2's 32,000 tokens, <PAD>, and empty places up to a multiple of 64.
_OPENVLA_TOKENS = 32_064
# timm's vit_so400m_patch14_siglip_224 and vit_large_patch14_reg4_dinov2 (timm/models/vision_transformer.py), both at 224 pixels.
_SIGLIP = dict(width=1152, depth=27, mlp=4304, attention_pool=True)
_DINOV2 = dict(width=1024, depth=24, mlp=4096, registers=4, layer_scale=True)
OPENVLAS = ("openvla-7b", "openvla-7b-siglip")


class Count(NamedTuple):
    """How many parameters a model has.   total: all, adapters included.   trainable: those that require a gradient."""

    trainable: int
    total: int

    @property
    def share(self) -> float:
        """Trainable parameters as a fraction of all, adapters included; peft prints it in per cent."""
        return self.trainable / self.total


def count(model) -> Count:
    """Trainable and total parameters of any model, on any device; 4-bit weights count as the numbers that they stand for."""
    sizes = [(p.requires_grad, _numbers(p)) for p in model.parameters()]
    return Count(sum(size for trained, size in sizes if trained), sum(size for _, size in sizes))


def _numbers(parameter):
    # bitsandbytes packs two weights into a byte, so that numel() is half of what was there.
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def lora_parameters(shape, rank: int) -> int:
    """Parameters of LoRA's A (rank x in) and B (out x rank) for one weight: r (d + k), Hu et al., arXiv 2106.09685, section 4.

    shape: of the weight, (out, in), or (out, in, height, width) of a convolution, whose A is a convolution of the same kernel.
    """
    out, *inputs = shape
    return torch.Size([rank, *inputs]).numel() + torch.Size([out, rank]).numel()


def adapter_parameters(d: int, m: int, bias: bool = True) -> int:
    """Parameters of one bottleneck adapter: 2 m d, with biases m + d more. Houlsby et al., arXiv 1902.00751, section 2.1."""
    return adapter_size(d, m, layers=1, bias=bias)


def llama_config(name: str):
    """The `LlamaConfig` of a model in LLAMAS. Raises ValueError for another name."""
    from transformers import LlamaConfig

    if name not in LLAMAS:
        raise ValueError(f"no configuration is known for {name!r}; choose one of {', '.join(LLAMAS)}")
    hidden, mlp, layers, heads, kv_heads, vocabulary, tied = LLAMAS[name]
    return LlamaConfig(hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
                       num_key_value_heads=kv_heads, vocab_size=vocabulary, tie_word_embeddings=tied)


def meta_model(config_or_name):
    """A model without weights: every parameter has its shape and dtype, and lies on torch's meta device.

    config_or_name: a transformers configuration, a name in LLAMAS, "openvla-7b" (as released: SigLIP and DINOv2) or "openvla-7b-siglip"
    (SigLIP only, the model of OpenVLA's Table 1, arXiv 2406.09246, footnote 4).   Raises ValueError for another name.
    """
    if config_or_name in OPENVLAS:
        with torch.device("meta"):
            return OpenVLA(fused=config_or_name == "openvla-7b")
    config = llama_config(config_or_name) if isinstance(config_or_name, str) else config_or_name
    import transformers

    kind = transformers.AutoModel
    if type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        kind = transformers.AutoModelForImageTextToText
    elif type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = transformers.AutoModelForCausalLM
    with torch.device("meta"):
        return kind.from_config(config)


def meta_lora(model, rank: int, targets=ATTENTION):
    """peft's LoRA on a model of `meta_model`, changed in place; returns peft's model, to be counted.

    targets: last parts of module names, as peft's `target_modules`.
    """
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=rank, target_modules=list(targets)), low_cpu_mem_usage=True)


class OpenVLA(nn.Module):
    """OpenVLA's parameters under its own names (prismatic/extern/hf/modeling_prismatic.py in github.com/openvla/openvla); no forward pass.

    The towers are timm's, not transformers': timm computes q, k and v by one matrix, so that LoRA there needs a third less, has no mask token,
    and gives DINOv2's class token no position. With transformers' Dinov2WithRegisters the model would count 2,048 parameters more.
    """

    def __init__(self, fused: bool):
        super().__init__()
        from transformers import LlamaForCausalLM

        config = llama_config("llama-2-7b")
        config.vocab_size = _OPENVLA_TOKENS
        siglip, wide = VisionTower(**_SIGLIP), config.hidden_size
        towers = {"featurizer": VisionTower(**_DINOV2), "fused_featurizer": siglip} if fused else {"featurizer": siglip}
        self.vision_backbone = nn.ModuleDict(towers)
        seen = sum(tower.pos_embed.shape[-1] for tower in towers.values())
        widths = (seen, 4 * seen, wide, wide) if fused else (seen, wide, wide)
        self.projector = nn.ModuleDict({f"fc{i}": nn.Linear(*pair) for i, pair in enumerate(zip(widths, widths[1:]), start=1)})
        self.language_model = LlamaForCausalLM(config)


class VisionTower(nn.Module):
    """The parameters of timm's VisionTransformer at 224 pixels and patches of 14, with timm's names; no forward pass."""

    def __init__(self, width, depth, mlp, registers=0, layer_scale=False, attention_pool=False):
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, kernel_size=14, stride=14)})
        self.pos_embed = nn.Parameter(torch.empty(1, (224 // 14) ** 2, width))
        if registers:
            self.cls_token = nn.Parameter(torch.empty(1, 1, width))
            self.reg_token = nn.Parameter(torch.empty(1, registers, width))
        self.blocks = nn.ModuleList(_block(width, mlp, layer_scale) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        if attention_pool:
            self.attn_pool = _attention_pool(width, mlp)


def _block(width, mlp, layer_scale):
    scales = {name: nn.ParameterDict({"gamma": nn.Parameter(torch.empty(width))}) for name in ("ls1", "ls2")} if layer_scale else {}
    attention = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
    return nn.ModuleDict({"norm1": nn.LayerNorm(width), "attn": attention, "norm2": nn.LayerNorm(width), "mlp": _mlp(width, mlp), **scales})


def _attention_pool(width, mlp):
    pool = nn.ModuleDict({"q": nn.Linear(width, width), "kv": nn.Linear(width, 2 * width), "proj": nn.Linear(width, width),
                          "norm": nn.LayerNorm(width), "mlp": _mlp(width, mlp)})
    pool.latent = nn.Parameter(torch.empty(1, 1, width))
    return pool


def _mlp(width, mlp):
    return nn.ModuleDict({"fc1": nn.Linear(width, mlp), "fc2": nn.Linear(mlp, width)})


class Row(NamedTuple):
    """A row of OpenVLA's Table 1.   printed: trained parameters in millions, as in the paper.   trainable: rebuilt here."""

    strategy: str
    printed: float
    trainable: int


# OpenVLA, arXiv 2406.09246, Table 1, column "Train Params", in millions.
_PRINTED = {"full": 7188.1, "last layer": 465.1, "frozen vision": 6760.4, "sandwich": 914.2, "LoRA r=32": 97.6, "LoRA r=64": 195.2}


def openvla_table_1() -> list[Row]:
    """The trained parameters in OpenVLA's Table 1, counted on the model without weights, and what the paper prints.

    last layer: the last transformer layer, the final norm, the head and the token embeddings.   sandwich: these, the vision tower and the
    projector.   LoRA: on every linear layer, and on the convolution that embeds the patches (see `openvla_lora_targets`).
    """
    model = meta_model("openvla-7b-siglip")
    vision, projector, language = model.vision_backbone, model.projector, model.language_model
    last_layer = (language.model.layers[-1], language.model.norm, language.lm_head, language.model.embed_tokens)
    parts = {
        "full": (model,), "last layer": last_layer, "frozen vision": (projector, language), "sandwich": (vision, projector, *last_layer),
    }
    rebuilt = {strategy: sum(count(part).total for part in trained) for strategy, trained in parts.items()}
    for rank in (32, 64):
        adapted = meta_lora(model, rank, openvla_lora_targets(model))
        rebuilt[f"LoRA r={rank}"] = count(adapted).trainable
        model = adapted.unload()
    return [Row(strategy, _PRINTED[strategy], trainable) for strategy, trainable in rebuilt.items()]


def openvla_lora_targets(model) -> list[str]:
    """Where OpenVLA's fine-tuning script puts LoRA: the last part of the name of every linear layer, the head's included.

    Among them is "proj", an attention's output in timm, and so peft adapts the convolution `patch_embed.proj`, too. peft's own word for this,
    "all-linear", would leave the head out, and refuses modules that are no transformers model.
    """
    return sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)})
