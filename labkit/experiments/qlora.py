"""What do 4 bits cost a robot? LoRA on an NF4 base against LoRA on an fp32 base, other codebooks, and two things that must not be done."""

from __future__ import annotations

import re
import time
import warnings

import numpy as np
import torch
from torch import nn

from labkit.demonstrations import samples
from labkit.experiments.measuring import counted, counted_on_old_tasks, shipped, thinned
from labkit.memory_calculator import measured_bytes
from labkit.policy import load_policy
from labkit.rollouts import EVALUATION_SEED
from labkit.sft import fine_tune, lora, train_only

ABOUT = ("learning: success on a new task after 25, 50 and 100 steps of LoRA (rank 16, learning rate 1e-3, 50 demonstrations) on an fp32 base and "
         "on an NF4 base, on the old tasks after 100, seconds, bytes; the NF4 ones merged in two ways; untouched: the old tasks with the base's "
         "linear layers as they are, in bitsandbytes' NF4, and in codebooks of 16, 8 and 4 levels; norms: `stack` learned by the language model's "
         "norms alone (learning rate 0.03), kept in fp32, or in 4 bits after every step")
TASK_SEEDS = {"stack": range(5), "forward": range(3)}
SEEDS = range(3)
STEPS = (25, 50, 100)
RANK = 16
LEARNING_RATE, NORM_LEARNING_RATE = 1e-3, 3e-2
EPISODES = 100
OLD_EPISODES = 50
BASES = {"fp32": None, "nf4": "nf4"}
BLOCK = 64
NORMS = re.compile(r"language_model.*norm")


def points() -> list[dict]:
    """The three experiments."""
    return [
        *({"part": "learning", "task": task, "targets": targets, "base": base, "seed": seed}
          for task, seeds in TASK_SEEDS.items() for targets in ("attention", "all") for seed in seeds for base in BASES),
        *({"part": "untouched", "levels": base, "bits": bits, "seed": seed} for base, bits in (("fp32", 32), ("nf4", 4)) for seed in SEEDS),
        *({"part": "untouched", "levels": levels, "bits": bits, "seed": seed} for levels in LEVELS for bits in (4, 3, 2) for seed in SEEDS),
        *({"part": "norms", "kept": kept, "seed": seed} for kept in ("fp32", "4 bits") for seed in SEEDS),
    ]


def run(point: dict) -> dict:
    """One of the three experiments, once."""
    part, seed = point["part"], point["seed"]
    if part == "learning":
        return learning(point["task"], point["base"], point["targets"], seed)
    if part == "norms":
        return norms(point["kept"], seed)
    if point["levels"] in BASES:
        policy = load_policy("tiny", quantization=BASES[point["levels"]], device="cpu")
    else:
        policy = with_levels(load_policy("tiny", device="cpu"), LEVELS[point["levels"]](point["bits"], seed))
    # Each seed has its own episodes; the policies share them.
    old = counted_on_old_tasks(policy, EPISODES, seed=EVALUATION_SEED + EPISODES * seed)
    return {"old": old, "all": sum(old.values()), "episodes": EPISODES, "all_episodes": EPISODES * len(old)}


def learning(task: str, base: str, targets: str, seed: int) -> dict:
    """LoRA on one base, once. `merged` has success by way of merging and step; `changed` the share of 4-bit codes that merging changes."""
    policy = load_policy("tiny", quantization=BASES[base], device="cpu")
    learned, merged, changed, spent = {}, {"into 4 bits": {}, "on the fp32 base": {}}, {}, 0.0

    def measure(step, policy, history):
        nonlocal spent
        begun = time.perf_counter()
        if step + 1 in STEPS:
            learned[str(step + 1)] = counted(policy, task, EPISODES)
            if base == "nf4" and task == "stack":
                in_4_bits = merged_into_4_bits(policy)
                changed[str(step + 1)] = round(codes_changed(policy, in_4_bits), 4)
                merged["into 4 bits"][str(step + 1)] = counted(in_4_bits, task, EPISODES)
                merged["on the fp32 base"][str(step + 1)] = counted(on_fp32_base(policy), task, EPISODES)
        if step + 1 < max(STEPS):  # the history's clock stops before the last call
            spent += time.perf_counter() - begun

    history = fine_tune(policy, samples(shipped(task)), steps=max(STEPS), learning_rate=LEARNING_RATE, peft_config=lora(RANK, targets=targets),
                        seed=seed, callbacks=[measure], progress=False)
    old = counted_on_old_tasks(policy, OLD_EPISODES)
    found = {"success": learned, "episodes": EPISODES, "old": old, "all_old": sum(old.values()), "old_episodes": OLD_EPISODES,
             "all_old_episodes": OLD_EPISODES * len(old), "seconds": round(history.seconds - spent, 2), "trainable": history.trainable,
             "bytes": measured_bytes(policy.model), "loss_curve": thinned(history.loss)}
    return {**found, "merged": merged, "changed": changed} if changed else found


def merged_into_4_bits(policy):
    """A copy of a policy with LoRA on an NF4 base, merged by peft: the update is added to the dequantised weights, and the sum quantised again."""
    merged = policy.copy()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Merge lora module to 4-bit linear")
        merged.model = merged.model.merge_and_unload()
    return merged


def on_fp32_base(policy):
    """A policy whose LoRA was learned on the NF4 base, on the base that was never quantised."""
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    other = load_policy("tiny", device="cpu")
    other.model = get_peft_model(other.model, policy.model.peft_config["default"])
    set_peft_model_state_dict(other.model, get_peft_model_state_dict(policy.model))
    return other


def codes_changed(before, after) -> float:
    """Share of the 4-bit codes, in the layers that had LoRA, that differ between a policy with LoRA and the merged one."""
    from peft.tuners.lora import LoraLayer

    adapted = {name.removeprefix("base_model.model."): m.get_base_layer() for name, m in before.model.named_modules() if isinstance(m, LoraLayer)}
    pairs = [(codes(layer), codes(after.model.get_submodule(name))) for name, layer in adapted.items()]
    return float(sum((a != b).sum() for a, b in pairs) / sum(a.numel() for a, _ in pairs))


def codes(layer) -> torch.Tensor:
    """The 4-bit codes of a bitsandbytes layer, one a weight; bitsandbytes packs two in a byte."""
    packed = layer.weight.data.flatten()
    return torch.stack([packed >> 4, packed & 15], 1).flatten()


def quantile_levels(bits: int, seed: int = 0) -> torch.Tensor:
    """(2^bits,) NormalFloat levels between -1 and 1: quantiles of the normal distribution, with an exact zero.

    QLoRA, arXiv 2305.14314, section 3; the outermost probability from Yoshida, arXiv 2306.06965, section 2. With 4 bits it is 0.9677083.
    """
    from scipy.stats import norm

    outermost = 1 - (1 / (2 * 2**bits) + 1 / (2 * (2**bits - 1))) / 2
    zero, last = 2 ** (bits - 1) - 1, 2**bits - 1
    quantiles = norm.ppf(np.interp(range(last + 1), [0, zero, last], [1 - outermost, 0.5, outermost]))
    return torch.tensor(quantiles / quantiles.max(), dtype=torch.float32)


def uniform_levels(bits: int, seed: int = 0) -> torch.Tensor:
    """(2^bits,) evenly spaced levels from -1 to 1."""
    return torch.linspace(-1, 1, 2**bits)


def random_levels(bits: int, seed: int) -> torch.Tensor:
    """(2^bits,) levels drawn evenly between -1 and 1, sorted: a codebook that knows nothing about weights."""
    return (2 * torch.rand(2**bits, generator=torch.Generator().manual_seed(seed)) - 1).sort().values


LEVELS = {"quantile": quantile_levels, "uniform": uniform_levels, "random": random_levels}


def with_levels(policy, levels: torch.Tensor, block: int = BLOCK, decoded_by: torch.Tensor | None = None):
    """A copy of an fp32 policy whose linear layers, all that bitsandbytes would quantise, hold what comes back from a codebook.

    levels: sorted, between -1 and 1.   block: weights that share a scale.   decoded_by: another table to read the codes with.
    """
    copy = policy.copy()
    for layer in quantisable(copy.model):
        layer.weight.data = from_codebook(layer.weight.data, levels, block, decoded_by)
    return copy


def quantisable(model) -> list[nn.Linear]:
    """The linear layers that bitsandbytes turns into 4 bits: all but the head."""
    return [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and not name.endswith("lm_head")]


def from_codebook(weight: torch.Tensor, levels: torch.Tensor, block: int = BLOCK, decoded_by: torch.Tensor | None = None) -> torch.Tensor:
    """The weight quantised in blocks by their largest absolute value, and dequantised again; same shape.   Arguments as in `with_levels`."""
    blocks = weight.reshape(-1, block)
    scales = blocks.abs().amax(1, keepdim=True).clamp(min=1e-38)
    found = torch.bucketize(blocks / scales, (levels[1:] + levels[:-1]) / 2)
    return ((levels if decoded_by is None else decoded_by)[found] * scales).reshape(weight.shape)


def norms(kept: str, seed: int) -> dict:
    """`stack` learned by the norms of the language model alone; kept in fp32, or quantised again after every step."""
    policy = load_policy("tiny", device="cpu")
    callbacks = [] if kept == "fp32" else [norms_to_4_bits]
    history = fine_tune_norms(policy, samples(shipped("stack")), max(STEPS), seed, callbacks, progress=False)
    return {"success": counted(policy, "stack", EPISODES), "episodes": EPISODES, "trainable": history.trainable, "loss_curve": thinned(history.loss)}


def fine_tune_norms(policy, found, steps: int, seed: int, callbacks=(), progress: bool = True):
    """Fine-tune the norms of the language model and nothing else; returns the History."""
    train_only(policy.model, NORMS)
    return fine_tune(policy, found, steps=steps, learning_rate=NORM_LEARNING_RATE, seed=seed, callbacks=callbacks, progress=progress)


def norms_to_4_bits(step, policy, history) -> None:
    """A callback of `fine_tune`: what is left of the norms after a round trip through bitsandbytes' NF4."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for name, parameter in policy.model.named_parameters():
        if NORMS.search(name):
            parameter.data = dequantize_4bit(*quantize_4bit(parameter.data, quant_type="nf4", blocksize=BLOCK))
