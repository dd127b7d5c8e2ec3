"""Properties of prompts, labels and collation, held against transformers' own processor."""

import numpy as np
import pytest
import torch

from labkit.actions import HIGH, LOW, action_to_bins
from labkit.batches import IGNORED, PromptBuilder, action_token_ids, prompt_text, with_action
from labkit.tiny_vla import build_processor

SENTENCES = [
    "pick up the red block", "please put the yellow sphere next to the purple mug", "go to the blue bin then go to the red cube", "grasp it",
]


def reference(processor, sentences, images, holding):
    """The same batch by transformers alone: chat template, processor, padding on the left."""
    messages = [
        [{"role": "user", "content": [{"type": "text", "text": f"{s} {'holding' if h else 'empty'}"}, {"type": "image"}]}]
        for s, h in zip(sentences, holding)
    ]
    texts = [processor.apply_chat_template(m, add_generation_prompt=True) for m in messages]
    return processor(text=texts, images=[[image] for image in images], padding=True, return_tensors="pt")


def pictures(count, size=48, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def processor():
    return build_processor()


def test_the_shortcut_gives_what_the_processor_gives(processor):
    images, holding = pictures(4), [False, True, True, False]
    ours, theirs = PromptBuilder(processor)(SENTENCES, images, holding), reference(processor, SENTENCES, images, holding)
    assert set(ours) == set(theirs)
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert torch.equal(ours["attention_mask"], theirs["attention_mask"])
    assert (ours["pixel_values"] - theirs["pixel_values"]).abs().max() <= 1e-6
    assert ours["pixel_values"].dtype == torch.float32


def test_real_camera_images_give_what_the_processor_gives(processor, observations):
    sentences, images = [o["instruction"] for o in observations], [o["rgb"] for o in observations]
    holding = [bool(o["holding"]) for o in observations]
    ours, theirs = PromptBuilder(processor)(sentences, images, holding), reference(processor, sentences, images, holding)
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert (ours["pixel_values"] - theirs["pixel_values"]).abs().max() <= 1e-6


@pytest.mark.parametrize("size", [32, 64])
def test_the_shortcut_follows_the_size_of_the_images(size):
    processor = build_processor()
    processor.image_processor.crop_size = {"height": size, "width": size}
    builder = PromptBuilder(processor)
    ours, theirs = builder(SENTENCES, pictures(4, size), [True] * 4), reference(processor, SENTENCES, pictures(4, size), [True] * 4)
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert torch.equal(builder.text(SENTENCES, [True] * 4)["input_ids"], theirs["input_ids"])
    assert (ours["input_ids"][0] == processor.image_token_id).sum() == (size // 8) ** 2


def test_a_processor_that_resizes_does_not_take_the_shortcut():
    processor = build_processor()
    processor.image_processor.do_resize = True
    images = pictures(4, 96)
    ours, theirs = PromptBuilder(processor)(SENTENCES, images, [False] * 4), reference(processor, SENTENCES, images, [False] * 4)
    assert ours["pixel_values"].shape == (4, 3, 48, 48)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_vacuum_sensor_is_one_word_of_the_prompt(processor):
    empty, holding = PromptBuilder(processor)(["grasp it"] * 2, pictures(2), [False, True])["input_ids"]
    changed = (empty != holding).nonzero().flatten()
    assert len(changed) == 1
    assert processor.tokenizer.convert_ids_to_tokens([empty[changed], holding[changed]]) == ["empty", "holding"]


def test_the_sentence_comes_before_the_image_and_the_act_token_last(processor):
    ids = PromptBuilder(processor)(["grasp it"], pictures(1), [False])["input_ids"][0].tolist()
    tokens = processor.tokenizer.convert_ids_to_tokens(ids)
    assert tokens == ["grasp", "it", "empty", *["<image>"] * 36, "<act>"]
    assert prompt_text(processor, "grasp it", False) == "grasp it empty <image><act>"


def test_padding_is_on_the_left_whatever_the_tokenizer_said():
    processor = build_processor()
    processor.tokenizer.padding_side = "right"
    batch = PromptBuilder(processor)(SENTENCES, pictures(4), [False] * 4)
    act = processor.tokenizer.convert_tokens_to_ids("<act>")
    assert (batch["input_ids"][:, -1] == act).all()
    padding = batch["input_ids"] == processor.tokenizer.pad_token_id
    assert padding.any() and torch.equal(batch["attention_mask"], (~padding).long())
    assert (padding.long().diff(dim=1) <= 0).all(), "once the text begins, no padding follows"


def test_a_batch_does_not_depend_on_what_was_tokenized_before(processor):
    used = PromptBuilder(processor)
    used(SENTENCES[::-1], pictures(4, seed=1), [True, False, True, False])
    a, b = (builder(SENTENCES, pictures(4), [False] * 4) for builder in (used, PromptBuilder(processor)))
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_labels_supervise_the_four_action_tokens_and_nothing_else(processor):
    ids = action_token_ids(processor.tokenizer)
    prompt = PromptBuilder(processor)(SENTENCES, pictures(4), [False] * 4)
    actions = np.random.default_rng(2).uniform(LOW, HIGH, (4, 4))
    batch = with_action(prompt, ids, actions)
    width = prompt["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][:, :width], prompt["input_ids"])
    assert (batch["labels"][:, :width] == IGNORED).all()
    assert torch.equal(batch["labels"][:, width:], batch["input_ids"][:, width:])
    spoken = processor.tokenizer.batch_decode(batch["labels"][:, width:])
    assert [text.replace(" ", "") for text in spoken] == ["".join(f"<a{b}>" for b in row) for row in action_to_bins(actions)]
    assert torch.equal(batch["attention_mask"].sum(1), prompt["attention_mask"].sum(1) + 4)
    assert torch.equal(batch["pixel_values"], prompt["pixel_values"])


def test_every_tensor_as_long_as_the_text_grows_with_it(processor):
    """PaliGemma marks the answer in token_type_ids; newer processors mark text and image in mm_token_type_ids."""
    ids = torch.tensor([[0, 7, 8], [9, 7, 8]])
    prompt = {"input_ids": ids, "attention_mask": (ids > 0).long(), "token_type_ids": torch.zeros_like(ids),
              "mm_token_type_ids": torch.ones_like(ids), "pixel_values": torch.zeros(2, 3, 8, 8)}
    batch = with_action(prompt, action_token_ids(processor.tokenizer), np.zeros((2, 4)))
    assert batch["attention_mask"].tolist() == [[0, 1, 1, 1, 1, 1, 1], [1] * 7]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1, 1]] * 2
    assert batch["mm_token_type_ids"].tolist() == [[1, 1, 1, 0, 0, 0, 0]] * 2
    assert batch["pixel_values"].shape == (2, 3, 8, 8)


def test_actions_without_numbers_are_refused(processor):
    prompt = PromptBuilder(processor)(["grasp it"], pictures(1), [False])
    with pytest.raises(ValueError, match="finite"):
        with_action(prompt, action_token_ids(processor.tokenizer), np.full((1, 4), np.nan))


def test_a_prompt_without_a_chat_template_starts_with_the_image():
    class Bare:
        image_token = "<image>"
        chat_template = None

    assert prompt_text(Bare(), "grasp it", True) == "<image>grasp it holding"


def test_a_typed_special_token_adds_no_picture(tiny_policy):
    image = np.zeros((1, 48, 48, 3), np.uint8)
    plain = tiny_policy.prompts(["pick up the red block"], image, [False])["input_ids"]
    typed = tiny_policy.prompts(["pick up the <image> red <act> block"], image, [False])["input_ids"]
    token = tiny_policy.processor.tokenizer.convert_tokens_to_ids("<image>")
    assert (typed == token).sum() == (plain == token).sum() == 36
