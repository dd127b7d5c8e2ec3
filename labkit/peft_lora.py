"""peft's LoRA one matrix at a time, under lesson 4's names: what the student's layer is held against, and stands in for it where it is missing."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import nn

_PROJECTION = re.compile(r".*language_model.*\.(q|k|v|o)_proj")


def peft_layer(weight: torch.Tensor, rank: int, alpha: float, names=("default",)) -> nn.Module:
    """peft's own layer: LoRA on one frozen weight (d, k), with an adapter of this rank and alpha under each name."""
    from peft import LoraConfig, PeftModel

    outputs, inputs = weight.shape
    linear = nn.Linear(inputs, outputs, bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"])
    model = PeftModel(nn.Sequential(linear), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    return model.base_model.model[0]


class PeftLayer(nn.Module):
    """peft's LoRA on one weight matrix.

    weight: (d, k), frozen.   A: (rank, k), random.   B: (d, rank), zero.   forward: (..., k) -> (..., d), the update scaled by alpha / rank.
    """

    def __init__(self, weight: torch.Tensor, rank: int, alpha: float):
        super().__init__()
        self.layer = peft_layer(weight, rank, alpha)
        self.weight, self.A, self.B = self.layer.base_layer.weight, self.layer.lora_A["default"].weight, self.layer.lora_B["default"].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def merged_by_peft(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, alpha: float) -> torch.Tensor:
    """The (d, k) matrix that peft makes of a frozen weight and its update.   A: (r, k).   B: (d, r)."""
    layer = PeftLayer(weight.clone(), len(A), alpha)
    with torch.no_grad():
        layer.A.copy_(A)
        layer.B.copy_(B)
        layer.layer.merge()
    return layer.layer.base_layer.weight.detach()


def replace_attention(model, build: Callable[[torch.Tensor], nn.Module]) -> list[nn.Module]:
    """Put `build(weight)` in the place of every attention projection of the language model, and freeze all else; returns the new modules.

    build: from a weight (d, k) to a module from (N, k) to (N, d). It decides what of itself is trained.
    Raises ValueError where the model has no such projection without a bias.
    """
    model.requires_grad_(False)
    found = {name: m for name, m in model.named_modules() if _PROJECTION.fullmatch(name) and isinstance(m, nn.Linear) and m.bias is None}
    if not found:
        raise ValueError(f"{type(model).__name__} has no q_proj, k_proj, v_proj or o_proj without a bias in a language_model")
    built = [build(linear.weight.detach().clone()) for linear in found.values()]
    for name, module in zip(found, built):
        model.set_submodule(name, _OnTokens(module))
    return built


class _OnTokens(nn.Module):
    """A module for (N, k) on (batch, tokens, k)."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
