"""From observations to tensors: prompts, action tokens, labels with the loss mask, and collation. Knows no optimiser and no robot."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn.functional import pad

from labkit.actions import BINS, action_to_bins

IGNORED = -100
# What tensors beside input_ids say of an action token: it is read, and (PaliGemma) it belongs to the answer, not to the prompt.
_ACTION_MARKS = {"attention_mask": 1, "token_type_ids": 1}


def action_token_ids(tokenizer) -> torch.Tensor:
    """(256,) int64 ids that stand for the bins.

    The tiny VLA has tokens of its own, `<a0>` to `<a255>`. Any other tokenizer gives up its last 256 ordinary tokens,
    the rare ones, as OpenVLA does (arXiv 2406.09246, section 3.2).   Raises ValueError where it has fewer.
    """
    vocabulary = tokenizer.get_vocab()
    if "<a0>" in vocabulary:
        return torch.tensor([vocabulary[f"<a{i}>"] for i in range(BINS)])
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    ordinary = sorted(i for i in vocabulary.values() if i not in special)
    if len(ordinary) < BINS:
        raise ValueError(f"the tokenizer has {len(ordinary)} ordinary tokens; the 256 action bins do not fit")
    return torch.tensor(ordinary[-BINS:])


def prompt_text(processor, instruction: str, holding: bool) -> str:
    """The text of one prompt, in the model's own chat template where it has one, ready for the first action token."""
    # Angle brackets spell special tokens: a typed "<image>" must not become a picture.
    spoken = instruction.replace("<", " ").replace(">", " ")
    request = f"{spoken} {'holding' if holding else 'empty'}"
    if getattr(processor, "chat_template", None):
        content = [{"type": "text", "text": request}, {"type": "image"}]
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return f"{getattr(processor, 'image_token', '<image>')}{request}"


@dataclass
class PromptBuilder:
    """Turns (instruction, image, vacuum sensor) into the tensors a model reads, left-padded to one length.

    Any `transformers` processor works. A processor that only rescales its images (the tiny VLA's) takes a shortcut that gives the
    same tensors many times faster.
    """

    processor: object
    _known: dict = field(default_factory=dict, repr=False)
    _image_tokens: dict = field(default_factory=dict, repr=False)

    def __post_init__(self):
        self.processor.tokenizer.padding_side = "left"
        images = self.processor.image_processor
        self._plain = (
            type(self.processor).__name__ == "LlavaProcessor" and images.do_rescale and images.do_normalize
            and not images.do_resize and not images.do_center_crop
        )

    def __call__(self, instructions, images, holding) -> dict[str, torch.Tensor]:
        """instructions: B sentences.   images: (B, H, W, 3) uint8.   holding: B booleans.

        Returns input_ids and attention_mask (B, T) int64, pixel_values, and whatever else the processor adds for the model to read.
        """
        if self._plain:
            return {**self.text(instructions, holding, np.shape(images[0])[:2]), "pixel_values": self.pixels(images)}
        texts = [prompt_text(self.processor, text, bool(h)) for text, h in zip(instructions, holding)]
        batch = self.processor(text=texts, images=[[np.asarray(i)] for i in images], padding=True, return_tensors="pt")
        # PaliGemma's processor makes labels of its own; those of the action tokens come from `with_action`.
        return {name: value for name, value in batch.items() if name != "labels"}

    def text(self, instructions, holding, size=None) -> dict[str, torch.Tensor]:
        """Left-padded input_ids and attention_mask (B, T) of plain prompts, each sentence tokenized once.

        size: (height, width) of the images in pixels; default, the size that the image processor names.
        """
        crop = self.processor.image_processor.crop_size
        patches = self._patches((crop["height"], crop["width"]) if size is None else tuple(size))
        rows = [self._ids(text, bool(h), patches) for text, h in zip(instructions, holding)]
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.processor.tokenizer.pad_token_id)
        for i, row in enumerate(rows):
            ids[i, width - len(row):] = torch.tensor(row)
        return {"input_ids": ids, "attention_mask": (ids != self.processor.tokenizer.pad_token_id).long()}

    def pixels(self, images) -> torch.Tensor:
        """(B, H, W, 3) uint8  ->  (B, 3, H, W) float32, rescaled and normalised as the plain image processor does."""
        config = self.processor.image_processor
        mean, std = torch.tensor(config.image_mean).view(3, 1, 1), torch.tensor(config.image_std).view(3, 1, 1)
        images = torch.as_tensor(np.asarray(images)).permute(0, 3, 1, 2)
        return (images * config.rescale_factor - mean) / std

    def _patches(self, size):
        """How many tokens stand for one image of this size: the processor itself says it, once a size."""
        if size not in self._image_tokens:
            blank = np.zeros((*size, 3), np.uint8)
            ids = self.processor(text=self.processor.image_token, images=[[blank]])["input_ids"][0]
            self._image_tokens[size] = list(ids).count(self.processor.image_token_id)
        return self._image_tokens[size]

    def _ids(self, instruction, holding, patches):
        key = (instruction, holding, patches)
        if key not in self._known:
            token = self.processor.image_token
            text = prompt_text(self.processor, instruction, holding).replace(token, token * patches)
            self._known[key] = self.processor.tokenizer(text)["input_ids"]
        return self._known[key]


def supervised_sequence(prompt_ids, answer_ids) -> tuple[torch.Tensor, torch.Tensor]:
    """What the model reads and what it learns to predict (teacher forcing), for action tokens and for text alike.

    prompt_ids: (..., P) and answer_ids: (..., A) int64.   Returns input_ids and labels, both (..., P + A); labels are -100 over the prompt.
    """
    return torch.cat([prompt_ids, answer_ids], dim=-1), pad(answer_ids, (prompt_ids.shape[-1], 0), value=IGNORED)


def with_action(prompt: dict, action_ids, actions) -> dict[str, torch.Tensor]:
    """Append the action tokens and their labels to a batch of prompts.

    actions: (B, 4) waypoints.   Returns the batch with input_ids, labels and every other tensor of that shape (B, T + 4); only the four
    action tokens are supervised.
    """
    tokens = action_ids[torch.as_tensor(action_to_bins(actions))]
    ids, labels = supervised_sequence(prompt["input_ids"], tokens)
    longer = {name: torch.cat([value, torch.full_like(tokens, _ACTION_MARKS.get(name, 0))], dim=1)
              for name, value in prompt.items() if value.shape == prompt["input_ids"].shape}
    return {**prompt, **longer, "input_ids": ids, "labels": labels}
