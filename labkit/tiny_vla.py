"""The tiny VLA from nothing: its tokenizer, processor and untrained `LlavaForConditionalGeneration`. Training it is in pretrain.py."""

from __future__ import annotations

from labkit.actions import BINS
from labkit.instructions import vocabulary
from labkit.tabletop.camera import OBSERVATION_SIZE

PATCH = 8
PAD, UNKNOWN, IMAGE, ACT, END = "<pad>", "<unk>", "<image>", "<act>", "<eos>"
# The sentence comes before the image, so that every patch can look at the words while it is encoded.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<act>{% endif %}"
)


def build_tokenizer():
    """A word-level `PreTrainedTokenizerFast`: lower-case words, four special tokens, and `<a0>` to `<a255>` at the end."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [PAD, UNKNOWN, IMAGE, ACT, END, *vocabulary(), *(f"<a{i}>" for i in range(BINS))]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(r"[^a-z0-9'<>_ ]+"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, unk_token=UNKNOWN, eos_token=END, padding_side="left",
        additional_special_tokens=[IMAGE, ACT], model_max_length=256, clean_up_tokenization_spaces=False,
    )


def build_processor():
    """The `LlavaProcessor` of the tiny VLA: 48 x 48 pixels, rescaled to [-1, 1], 36 patches."""
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    images = CLIPImageProcessorPil(
        do_resize=False, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3,
        size={"shortest_edge": OBSERVATION_SIZE}, crop_size={"height": OBSERVATION_SIZE, "width": OBSERVATION_SIZE},
    )
    return LlavaProcessor(
        image_processor=images, tokenizer=build_tokenizer(), patch_size=PATCH, vision_feature_select_strategy="default",
        image_token=IMAGE, num_additional_image_tokens=1, chat_template=CHAT_TEMPLATE,
    )


def build_model(seed: int = 0, width: int = 128, vision_layers: int = 2, layers: int = 4):
    """An untrained `LlavaForConditionalGeneration` with about 1.4M parameters, the same weights for the same seed."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tokenizer = build_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=width, intermediate_size=3 * width, num_hidden_layers=vision_layers, num_attention_heads=4,
        image_size=OBSERVATION_SIZE, patch_size=PATCH, projection_dim=width,
    )
    text = LlamaConfig(
        hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, num_attention_heads=4, vocab_size=len(tokenizer),
        tie_word_embeddings=False, initializer_range=0.04, max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1, vision_feature_select_strategy="default", image_seq_length=(OBSERVATION_SIZE // PATCH) ** 2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlavaForConditionalGeneration(config)
