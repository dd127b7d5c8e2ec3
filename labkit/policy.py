"""A policy: a vision-language model that is asked for the next waypoint. Loading it, and asking it. Running the robot is in rollouts.py."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from labkit.actions import NAMES, bins_to_action, full_waypoint
from labkit.adapters import adapters_of, holds_bottleneck, load_adapter, save_adapters
from labkit.batches import PromptBuilder, action_token_ids
from labkit.errors import UserError
from labkit.paths import DATA

SHIPPED = {"tiny": DATA / "tiny_vla", "tiny-early": DATA / "tiny_vla" / "early", "tiny-middle": DATA / "tiny_vla" / "middle"}
QUANTIZATIONS = (None, "nf4")


@dataclass(frozen=True)
class Decision:
    """What the policy said for B observations.

    bins: (B, 4) int, the 256-bin action tokens.   actions: (B, 4) x, y, z in metres and grip.   waypoints: (B, 7) for the environment.
    probabilities: (B, 4) of the chosen bins, among the action tokens.   seconds: what the whole batch took.
    """

    bins: np.ndarray
    actions: np.ndarray
    waypoints: np.ndarray
    probabilities: np.ndarray
    seconds: float


class Policy:
    """A model, its processor, and the ids of its action tokens."""

    def __init__(self, model, processor, name: str = "policy"):
        self.model, self.processor, self.name = model, processor, name
        self.prompts = PromptBuilder(processor)
        self.action_ids = action_token_ids(processor.tokenizer)

    def act(self, observation: dict, instruction: str | None = None) -> np.ndarray:
        """One observation of the tabletop  ->  (7,) waypoint for `env.step`.   instruction: default, the observation's own."""
        return self.decide([observation], None if instruction is None else [instruction]).waypoints[0]

    @torch.no_grad()
    def decide(self, observations, instructions=None, adapter_names=None, logits_processor=()) -> Decision:
        """B observations (and B instructions, default the observations' own)  ->  Decision, in one forward pass with a KV cache.

        The four tokens are decoded greedily, each among the 256 action tokens only.
        adapter_names: B names, where the model holds several of peft's adapters; default, the active one answers all.
        logits_processor: transformers' logits processors, which act on every token's scores first.
        """
        begun = time.perf_counter()
        instructions = [o["instruction"] for o in observations] if instructions is None else list(instructions)
        batch = self.prompts(instructions, [o["rgb"] for o in observations], [bool(o["holding"]) for o in observations])
        batch = {name: self.to_model(value) for name, value in batch.items()}
        self.model.eval()
        ids = self.action_ids.to(self.model.device)
        named = {} if adapter_names is None else {"adapter_names": list(adapter_names)}
        out = self.model.generate(
            **batch, **named, max_new_tokens=len(NAMES), min_new_tokens=len(NAMES), do_sample=False,
            logits_processor=[*logits_processor, _Only(ids)],
            return_dict_in_generate=True, output_scores=True, pad_token_id=self.processor.tokenizer.pad_token_id,
        )
        scores = torch.stack(out.scores, dim=1)[..., ids].float()
        bins = scores.argmax(-1)
        probabilities = scores.softmax(-1).gather(-1, bins.unsqueeze(-1)).squeeze(-1)
        bins = bins.cpu().numpy()
        actions = bins_to_action(bins)
        return Decision(bins, actions, full_waypoint(actions), probabilities.cpu().numpy(), time.perf_counter() - begun)

    def copy(self) -> "Policy":
        """An independent policy with the same weights, for example to fine-tune while the original stays as it is."""
        return Policy(copy.deepcopy(self.model), self.processor, self.name)

    def save(self, folder):
        """Write model (or, where one is attached, only its adapter, peft's or ours) and processor to `folder`."""
        if adapters_of(self.model):
            save_adapters(self.model, folder)
        else:
            self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    def to_model(self, value):
        """A tensor on the model's device and, where it holds floats, in its dtype."""
        value = value.to(self.model.device)
        return value.to(self.model.dtype) if value.is_floating_point() else value


class _Only:
    """A logits processor that leaves only some token ids possible."""

    def __init__(self, ids):
        self.ids = ids

    def __call__(self, input_ids, scores):
        allowed = torch.full_like(scores, -torch.inf)
        allowed[:, self.ids] = scores[:, self.ids]
        return allowed


def load_policy(name: str | Path = "tiny", quantization: str | None = None, adapter: str | Path | None = None, device: str | None = None,
                dtype=None) -> Policy:
    """Load a policy through the Auto classes.

    name: "tiny" (shipped; also "tiny-early" and "tiny-middle"), a folder written by `save_pretrained`, or a hub id.
    quantization: None or "nf4" (bitsandbytes, with double quantisation).   adapter: folder of an adapter to attach, peft's or ours.
    device: default a GPU where there is one, else the CPU.   dtype: default float32.
    Raises UserError, in one sentence, for a missing folder, a checkpoint that does not fit, or an unreachable hub.
    """
    if quantization not in QUANTIZATIONS:
        raise UserError(f"unknown quantization {quantization!r}; choose None or 'nf4'")
    source = SHIPPED.get(str(name), Path(name))
    local = source.exists()
    if not local and (str(name) in SHIPPED or str(name).startswith(("/", ".", "~")) or str(name).count("/") != 1):
        raise UserError(f"there is no policy {str(name)!r}: give 'tiny', 'tiny-early', 'tiny-middle', an existing folder, or a hub id like org/model")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    processor, model = _load(str(source) if local else str(name), quantization, device, dtype)
    if adapter is not None:
        model = _attach(model, Path(adapter))
    return Policy(model.eval(), processor, str(name))


def _load(source, quantization, device, dtype):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    options = {"dtype": dtype or torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
    if quantization:
        options |= {"quantization_config": _nf4(), "device_map": {"": device}}
    try:
        processor = AutoProcessor.from_pretrained(source)
        model, info = AutoModelForImageTextToText.from_pretrained(source, **options)
    except Exception as error:
        raise UserError(f"{source} cannot be loaded as an image-text-to-text model: {_in_one_line(error)}") from error
    # A mismatched tensor would otherwise be replaced by random numbers, and an unexpected one dropped, without an error.
    wrong = sorted(info["missing_keys"]) + sorted(str(key[0]) for key in info["mismatched_keys"]) + sorted(info["unexpected_keys"])
    if wrong:
        raise UserError(f"{source}: the weights do not fit the configuration; {len(wrong)} tensors are missing, have no place or have "
                        f"another shape, the first is {wrong[0]}")
    if quantization:
        _never_repack(model)
        return processor, model
    return processor, model.to(device)


def _nf4():
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)


def _never_repack(model):
    """Keep 4-bit weights as they are on disk.

    On CPUs with AVX512-BF16, bitsandbytes packs them anew when the model first acts. From then on it computes in bfloat16, LoRA gets no
    gradient at all, without a word, and layers whose width is no multiple of 64 (PaliGemma's vision tower has some) raise.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _attach(model, folder):
    from peft import PeftModel

    if not (folder / "adapter_config.json").exists():
        raise UserError(f"{folder} holds no adapter: adapter_config.json is missing")
    if holds_bottleneck(folder):
        return load_adapter(model, folder)
    try:
        return PeftModel.from_pretrained(model, str(folder))
    except Exception as error:
        raise UserError(f"{folder}: the adapter does not fit this model: {_in_one_line(error)}") from error


def _in_one_line(error):
    """What another library says of its trouble, in one line that is not too long."""
    return " ".join(str(error).split())[:300] or type(error).__name__
