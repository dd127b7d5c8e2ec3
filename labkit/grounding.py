"""Where a policy looks and what its image patches know: attention and features at the patches, and which patches show an object.

For models of the LLaVA family, whose image is one run of image tokens. What is made of these tensors is the lesson's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from labkit.tabletop.camera import pixels_of
from labkit.tabletop.tasks import index_of

PATCH = 8
_REACH = 4.0  # pixels around an object's centre that still show it; objects are about 8 pixels wide


@dataclass(frozen=True)
class Insight:
    """What went on in the language model for one observation.

    tokens: (T,) strings.   image: (T,) bool, the places of the image patches.   attention: (layers, heads, T, T), row i: how much position i
    looks at each other one.   states: (layers + 1, T, D), what enters the first layer and leaves each.
    """

    tokens: list[str]
    image: torch.Tensor
    attention: torch.Tensor
    states: torch.Tensor


def look_inside(policy, observation: dict, instruction: str | None = None) -> Insight:
    """Run the prompt of one observation through the model and keep attention and states."""
    text = observation["instruction"] if instruction is None else instruction
    batch = policy.prompts([text], [observation["rgb"]], [bool(observation["holding"])])
    model, before = policy.model, policy.model.config._attn_implementation
    model.set_attn_implementation("eager")  # the fused kernels do not tell their weights
    try:
        with torch.no_grad():
            inputs = {name: policy.to_model(value) for name, value in batch.items()}
            out = model(**inputs, output_attentions=True, output_hidden_states=True, use_cache=False)
    finally:
        model.set_attn_implementation(before)
    ids = batch["input_ids"][0]
    return Insight(
        policy.processor.tokenizer.convert_ids_to_tokens(ids), ids == model.config.image_token_id,
        torch.stack(out.attentions)[:, 0].float(), torch.stack(out.hidden_states)[:, 0].float(),
    )


def object_patches(env, name: tuple[str, str], size: int = 48) -> np.ndarray:
    """(patches,) bool: which patches of the observation show the object (colour, shape), row by row from the upper left."""
    episode = env.episode
    centre = env.state.positions[index_of(episode.scene, name)]
    column, row = pixels_of(centre[None], env.camera.shifted(episode.variation.camera_shift))[0]
    starts = np.arange(0, size, PATCH)
    near_column = (starts - _REACH < column) & (column < starts + PATCH + _REACH)
    near_row = (starts - _REACH < row) & (row < starts + PATCH + _REACH)
    return (near_row[:, None] & near_column[None]).ravel()
