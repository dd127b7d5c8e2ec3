"""The same lesson code on other families of vision-language models, built small with random weights and saved here.

The first SmolVLM models on the hub are of the class Idefics3, processor included; SmolVLM2 has a class of its own. Its own processor
asks for torchvision and num2words, which the course does not install, so here it takes the processor of Idefics3.
"""

import numpy as np
import pytest
import torch

from labkit.batches import IGNORED
from labkit.demonstrations import Samples
from labkit.instructions import vocabulary
from labkit.policy import load_policy
from labkit.rollouts import rollout
from labkit.sft import batch_loss, fine_tune, lora, tokenize

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}:{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def small_tokenizer(*special):
    """A byte-level BPE of about 700 pieces, trained on the course's words: unlike the tiny VLA's, it cuts words to pieces."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<pad>", "<bos>", "<eos>", "<image>", *special],
    )
    inner.train_from_iterator([" ".join(vocabulary())], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", extra_special_tokens={"image_token": "<image>"},
    )


def text_size(tokenizer):
    return dict(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, max_position_embeddings=256, initializer_range=0.2, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )


def vision_size(pixels):
    return dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=pixels, patch_size=16,
                initializer_range=0.2)


def idefics3_processor():
    from transformers import Idefics3ImageProcessorPil, Idefics3Processor

    tokenizer = small_tokenizer("<fake_token_around_image>", "<end_of_utterance>", "<global-img>")
    images = Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 64}, do_image_splitting=False)
    return Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=CHAT_TEMPLATE)


def sizes_for(processor, vision_type):
    from transformers import LlamaConfig

    tokenizer = processor.tokenizer
    return dict(
        vision_config={"model_type": vision_type, **vision_size(64)}, text_config=LlamaConfig(**text_size(tokenizer)), scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), pad_token_id=tokenizer.pad_token_id,
    )


def build_idefics3():
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    processor = idefics3_processor()
    return Idefics3ForConditionalGeneration, Idefics3Config(**sizes_for(processor, "idefics3_vision")), processor


def build_smolvlm():
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    processor = idefics3_processor()
    return SmolVLMForConditionalGeneration, SmolVLMConfig(**sizes_for(processor, "smolvlm_vision")), processor


def build_paligemma():
    from transformers import (
        GemmaConfig,
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
        PaliGemmaProcessor,
        SiglipImageProcessorPil,
        SiglipVisionConfig,
    )

    tokenizer = small_tokenizer()
    images = SiglipImageProcessorPil(size={"height": 48, "width": 48})
    images.image_seq_length = 9
    processor = PaliGemmaProcessor(images, tokenizer)
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**vision_size(48), projection_dim=32), text_config=GemmaConfig(**text_size(processor.tokenizer)),
        projection_dim=32, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return PaliGemmaForConditionalGeneration, config, processor


FAMILIES = {"idefics3": build_idefics3, "smolvlm": build_smolvlm, "paligemma": build_paligemma}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    model_class, config, processor = FAMILIES[request.param]()
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("other") / request.param
    model_class(config).save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture
def policy(folder):
    return load_policy(folder, device="cpu")


def test_the_auto_classes_load_it_under_its_own_class(policy, folder):
    assert folder.name in type(policy.model).__name__.lower()
    assert len(set(policy.action_ids.tolist())) == 256


def test_action_tokens_are_ordinary_pieces_of_its_vocabulary(policy):
    pieces = policy.processor.tokenizer.convert_ids_to_tokens(policy.action_ids.tolist())
    assert not set(pieces) & set(policy.processor.tokenizer.all_special_tokens)
    assert not [piece for piece in pieces if piece.startswith("<loc") or piece.startswith("<seg")]


def test_the_prompt_is_what_its_own_processor_makes(policy, observations):
    """One image per row, the sentence and the sensor's word in the text, padding on the left."""
    texts = [o["instruction"] for o in observations]
    batch = policy.prompts(texts, [o["rgb"] for o in observations], [bool(o["holding"]) for o in observations])
    decoded = policy.processor.tokenizer.batch_decode(batch["input_ids"])
    for text, said, o in zip(texts, decoded, observations):
        assert f"{text} {'holding' if o['holding'] else 'empty'}" in said
    assert len({int((row == policy.model.config.image_token_id).sum()) for row in batch["input_ids"]}) == 1
    assert (batch["attention_mask"][:, -1] == 1).all() and (batch["attention_mask"][:, 0] == 0).any()
    assert "labels" not in batch


def teacher_forced_bins(policy, observations):
    """Greedy bins by four whole forward passes without a cache, one observation at a time, so without padding."""
    rows = []
    for o in observations:
        batch = policy.prompts([o["instruction"]], [o["rgb"]], [bool(o["holding"])])
        row = []
        for _ in range(4):
            with torch.no_grad():
                logits = policy.model(**batch, use_cache=False).logits[:, -1, policy.action_ids]
            row.append(int(logits.argmax()))
            for name, mark in (("input_ids", policy.action_ids[row[-1]]), ("attention_mask", 1), ("token_type_ids", 1)):
                if name in batch:
                    batch[name] = torch.cat([batch[name], torch.full((1, 1), int(mark))], dim=1)
        rows.append(row)
    return np.array(rows)


def test_a_padded_batch_with_the_cache_decides_what_plain_forward_passes_decide(policy, observations):
    bins = policy.decide(observations).bins
    assert len({tuple(row) for row in bins}) > 1
    assert np.array_equal(bins, teacher_forced_bins(policy, observations))


def test_it_drives_the_robot(policy):
    found = rollout(policy, "pick", episodes=2, progress=False)
    assert len(found.success) == 2 and (found.decisions >= 1).all()


def test_its_loss_is_transformers_own_and_masks_the_prompt(policy, samples):
    batch = tokenize(policy, samples)
    assert ((batch["labels"] != IGNORED).sum(1) == 4).all()
    with torch.no_grad():
        assert torch.isclose(batch_loss(policy.model, batch), policy.model(**batch).loss, atol=1e-5)


def test_padding_does_not_change_its_loss(policy, samples):
    def part(count):
        columns = (samples.instructions, samples.images, samples.holding, samples.actions)
        return tokenize(policy, Samples(*(column[:count] for column in columns)))

    alone, padded = part(1), {name: value[:1] for name, value in part(2).items()}
    assert (padded["attention_mask"] == 0).any()
    with torch.no_grad():
        assert abs(float(batch_loss(policy.model, alone) - batch_loss(policy.model, padded))) < 1e-4


def test_it_can_be_fine_tuned(policy, samples, observations):
    history = fine_tune(policy, samples, steps=40, batch_size=6, learning_rate=5e-3, progress=False)
    assert history.loss[-1] < 0.5 * history.loss[0]
    assert policy.decide(observations).bins.shape == (len(observations), 4)


def test_lora_trains_its_language_model_only_and_can_be_saved_and_attached(policy, folder, samples, observations, tmp_path):
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    fine_tune(policy, samples, steps=2, batch_size=3, learning_rate=0.05, peft_config=lora(rank=4), progress=False)
    trained = [name for name, p in policy.model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 4 * 2 and not [name for name in trained if "vision" in name]
    policy.save(tmp_path / "adapter")
    again = load_policy(folder, adapter=tmp_path / "adapter", device="cpu")
    assert np.array_equal(again.decide(observations).bins, policy.decide(observations).bins)
    restored = policy.model.unload().state_dict()
    assert all(torch.equal(restored[name], value) for name, value in before.items())


def test_it_can_be_quantized_and_still_acts(folder, observations):
    policy = load_policy(folder, quantization="nf4", device="cpu")
    assert any(type(module).__name__ == "Linear4bit" for module in policy.model.modules())
    assert policy.decide(observations).bins.shape == (len(observations), 4)


def test_the_same_seed_gives_the_same_weights_bit_for_bit(folder, samples):
    runs = []
    for _ in range(2):
        policy = load_policy(folder, device="cpu")
        fine_tune(policy, samples, steps=2, batch_size=4, seed=5, progress=False)
        runs.append(policy.model.state_dict())
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
