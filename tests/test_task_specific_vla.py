"""Properties of the lab's model: what it reads, what may train, what a folder keeps, and that it drives the robot."""

import json

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPVisionModel

from labkit.clip_pretraining import build_processor
from labkit.errors import UserError
from labkit.rollouts import rollout
from labkit.tabletop import Tabletop
from labkit.tabletop.experts import next_waypoint
from labkit.task_specific_vla import (
    VARIANTS,
    ActionNormaliser,
    TaskSpecificVLA,
    frames_of,
    load_waypoint_policy,
    merged,
    parameter_groups,
    policy_from_clip,
    policy_from_towers,
    set_trainable,
    with_two_frames,
)


@pytest.fixture(params=[("pooled", 1), ("pooled", 2), ("spatial", 1), ("spatial", 2)], ids=lambda p: f"{p[0]}-{p[1]}")
def policy(request, clip_folder):
    return policy_from_clip(clip_folder, readout=request.param[0], frames=request.param[1])


@pytest.fixture
def spatial(clip_folder):
    return policy_from_clip(clip_folder, readout="spatial")


def numbers_of(policy, observations):
    """Normalised outputs for observations, by hand from the parts."""
    images = np.stack([frames_of(o["rgb"], o.get("previous_rgb"), policy.model.frames) for o in observations])
    words = policy.words([o["instruction"] for o in observations], [o["holding"] for o in observations])
    with torch.no_grad():
        return policy.model.eval()(policy.pixels(images), **words)


def test_widths_come_from_the_configurations_of_vit_b_32():
    config = CLIPConfig()
    config.vision_config.num_hidden_layers = config.text_config.num_hidden_layers = 1
    model = TaskSpecificVLA(CLIPVisionModel(config.vision_config), CLIPTextModel(config.text_config))
    assert model.action_head[0].in_features == 768 + 512 and model.action_head[0].out_features == 256
    ids = torch.tensor([[config.text_config.bos_token_id, 320, config.text_config.eos_token_id]])
    assert model(torch.zeros(1, 3, 224, 224), ids).shape == (1, 8)  # the wrist turns: cosine and sine


def test_head_is_the_sheets(clip_folder):
    head = policy_from_clip(clip_folder).model.action_head
    assert [type(layer).__name__ for layer in head] == ["Linear", "ReLU", "Dropout", "Linear"]
    assert head[2].p == 0.1 and head[3].out_features == 8  # seven numbers, and the yaw is a cosine and a sine


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_a_variant_names_is_what_moves(variant, spatial, observations):
    """The published code hands frozen layers to the optimiser: nothing raises and nothing moves."""
    model = spatial.model
    set_trainable(model, variant)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = torch.optim.SGD(parameter_groups(model, 0.1, 0.1), lr=0.1)
    for _ in range(2):  # LoRA's A moves from the second step on: B is zero in the first.
        images = np.stack([o["rgb"] for o in observations])
        words = spatial.words([o["instruction"] for o in observations], [o["holding"] for o in observations])
        optimiser.zero_grad()
        model(spatial.pixels(images), **words).square().sum().backward()
        optimiser.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    in_towers = {name for name in before if "encoder" in name}
    assert {name for name in before if name not in in_towers and "in_proj_bias" not in name} <= moved
    towers_moved = moved & in_towers
    if variant == "frozen":
        assert not towers_moved
    if variant == "language":
        assert not any("vision" in name for name in towers_moved) and any("text_encoder.embeddings.token" in name for name in towers_moved)
    if variant == "last-layers":
        layers = len(model.vision_encoder.encoder.layers)
        assert {name.split("layers.")[1][0] for name in towers_moved if "vision" in name} == {str(layers - 2), str(layers - 1)}
        assert all("layers." in name for name in towers_moved)
    if variant == "lora":
        assert towers_moved and all("lora_" in name for name in towers_moved)
    if variant == "full":
        assert any("patch_embedding" in name for name in towers_moved) and any("token_embedding" in name for name in towers_moved)


def test_groups_hold_every_trained_parameter_once_at_its_own_rate(spatial):
    for variant in VARIANTS:
        policy = spatial.copy()
        set_trainable(policy.model, variant)
        groups = parameter_groups(policy.model, 1e-3, 1e-5)
        listed = [id(p) for group in groups for p in group["params"]]
        assert sorted(listed) == sorted(id(p) for p in policy.model.parameters() if p.requires_grad)
        rates = {group["name"]: group["lr"] for group in groups}
        assert rates == ({"head": 1e-3} if variant == "frozen" else {"head": 1e-3, "towers": 1e-5})


@pytest.mark.parametrize("normaliser", [ActionNormaliser(), ActionNormaliser.tabletop()])
def test_normaliser_puts_the_experts_waypoints_between_minus_one_and_one(normaliser):
    for seed in range(20):
        env = Tabletop("align")
        env.reset(seed=seed)
        waypoint = next_waypoint(env.episode.command, env.episode.scene, env.start, env.state)
        numbers = normaliser(torch.tensor(waypoint, dtype=torch.float32))
        assert numbers.abs().max() <= 1 + 1e-6
        assert np.allclose(normaliser.inverse(numbers).numpy(), waypoint, atol=1e-6)


def test_an_angle_that_comes_round_has_no_seam():
    normaliser, still = ActionNormaliser.tabletop(), torch.zeros(3, 7)
    still[:, 5] = torch.tensor([0.1, 0.1 + np.pi / 2, 0.1 - np.pi])
    numbers = normaliser(still)
    assert normaliser.width == 8 and numbers.shape == (3, 8)
    assert torch.allclose(numbers[0], numbers[1], atol=1e-6) and torch.allclose(numbers[0], numbers[2], atol=1e-6)
    assert torch.allclose(normaliser.inverse(numbers)[:, 5], torch.full((3,), 0.1), atol=1e-6)
    # Halfway between 44 and -44 degrees lies 45, not 0.
    edge = torch.zeros(2, 7)
    edge[:, 5] = torch.deg2rad(torch.tensor([44.0, -44.0]))
    assert torch.isclose(normaliser.inverse(normaliser(edge).mean(0))[5].abs(), torch.tensor(np.pi / 4, dtype=torch.float32), atol=1e-3)


def test_normaliser_refuses_an_axis_that_is_not_there():
    with pytest.raises(ValueError, match="axes 0 to 6"):
        ActionNormaliser(periodic=7)


def test_fitted_normaliser_spans_another_robots_actions_and_survives_a_still_axis():
    actions = np.random.default_rng(0).uniform(-300, 700, (50, 3))
    actions[:, 1] = 4.0
    numbers = ActionNormaliser.fit(actions)(torch.tensor(actions)).numpy()
    assert np.allclose(numbers[:, [0, 2]].min(0), -1, atol=1e-5) and np.allclose(numbers[:, [0, 2]].max(0), 1, atol=1e-5)
    assert np.allclose(numbers[:, 1], 0, atol=1e-6)


def test_a_standardising_normaliser_is_numpys_score_and_leaves_a_still_axis_at_zero():
    actions = np.random.default_rng(1).normal([3.0, -2.0, 5.0], [0.1, 7.0, 1.0], (40, 3))
    actions[:, 2] = 5.0
    numbers = ActionNormaliser.standardising(actions)(torch.tensor(actions)).numpy()
    assert np.allclose(numbers[:, :2].mean(0), 0, atol=1e-4) and np.allclose(numbers[:, :2].std(0), 1, atol=1e-4)
    assert np.allclose(numbers[:, 2], 0, atol=1e-5)


@pytest.mark.parametrize("low, high", [([0, 0], [1, 0]), ([0], [1, 1]), ([0.0], [float("nan")])])
def test_normaliser_refuses_a_range_that_is_none(low, high):
    with pytest.raises(ValueError, match="high above low"):
        ActionNormaliser(low, high)


def test_other_widths_of_action_are_possible(clip_folder):
    policy = policy_from_clip(clip_folder, normaliser=ActionNormaliser(np.zeros(3), np.ones(3)))
    assert policy.predict(["go"], np.zeros((1, 1, 48, 48, 3), np.uint8), [False]).shape == (1, 3)


def test_every_input_matters(policy, observations):
    first = observations[0]
    base = numbers_of(policy, [first])
    others = [{**first, "instruction": observations[1]["instruction"]}, {**first, "rgb": observations[1]["rgb"]},
              {**first, "holding": 1 - first["holding"]}]
    if policy.model.frames == 2:
        others.append({**first, "previous_rgb": observations[1]["rgb"]})
    for other in others:
        assert not torch.allclose(base, numbers_of(policy, [other]), atol=1e-6)


def test_answers_do_not_depend_on_the_rest_of_the_batch(policy, observations):
    together = numbers_of(policy, observations)
    alone = torch.cat([numbers_of(policy, [o]) for o in observations])
    assert torch.allclose(together, alone, atol=1e-5)


def test_one_frame_is_blind_to_the_picture_before(spatial, observations):
    with_past = [{**o, "previous_rgb": observations[0]["rgb"]} for o in observations]
    assert torch.equal(numbers_of(spatial, observations), numbers_of(spatial, with_past))


def test_frames_are_the_current_picture_then_the_one_before():
    now, before = np.full((4, 4, 3), 9, np.uint8), np.full((4, 4, 3), 5, np.uint8)
    assert frames_of(now, before, 1).tolist() == now[None].tolist()
    assert frames_of(now, before, 2).tolist() == np.stack([now, before]).tolist()
    assert not frames_of(now, None, 2)[1].any()


def test_pooled_readout_has_one_picture_for_all_sentences_and_spatial_has_not(clip_folder, observations):
    picture = observations[0]["rgb"][None, None]
    for readout, differs in (("pooled", False), ("spatial", True)):
        policy = policy_from_clip(clip_folder, readout=readout)
        pooled, patches = policy.model.encode_images(policy.pixels(picture))
        sentences = policy.model.encode_sentences(**policy.words(["pick up the red block", "go to the left"], [0, 0]))
        features = []
        policy.model.action_head.register_forward_pre_hook(lambda _, inputs, kept=features: kept.append(inputs[0].detach()))
        policy.model.predict(pooled.repeat(2, 1, 1), patches.repeat(2, 1, 1, 1), sentences)
        about_picture = features[0][:, sentences.shape[1]:]
        assert (not torch.allclose(about_picture[0], about_picture[1], atol=1e-6)) == differs


def test_pixels_are_the_processors(spatial, observations):
    images = [o["rgb"] for o in observations]
    theirs = spatial.processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    assert torch.allclose(spatial.pixels(np.stack(images)), theirs, atol=1e-5)


def test_pictures_of_another_size_and_shape_are_squeezed_to_the_towers(spatial):
    left_red = np.zeros((60, 100, 3), np.uint8)
    left_red[:, :50, 0] = 255
    seen = spatial.pixels(left_red[None])
    assert seen.shape == (1, 3, 48, 48)
    assert seen[0, 0, :, :20].min() > 0.99 and seen[0, 0, :, 28:].max() < -0.99


def test_wrong_number_of_frames_is_refused(spatial):
    with pytest.raises(ValueError, match="reads 1 frame"):
        spatial.predict(["go"], np.zeros((1, 2, 48, 48, 3), np.uint8), [False])


def test_a_long_sentence_is_cut_but_keeps_the_sensor(spatial):
    words = spatial.words(["pick up the red block then " * 40], [True])
    assert words["input_ids"].shape[1] == spatial.model.text_encoder.config.max_position_embeddings
    assert spatial.processor.tokenizer.decode(words["input_ids"][0, :1]) == "holding"
    assert words["input_ids"][0, -1] == spatial.processor.tokenizer.eos_token_id


def test_tokens_are_the_tiny_vlas_words():
    from labkit.tiny_vla import build_tokenizer

    ours, theirs = build_processor().tokenizer, build_tokenizer()
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours("pick up the red block")["input_ids"] == theirs("pick up the red block")["input_ids"] + [theirs.eos_token_id]


@pytest.mark.parametrize("options, said", [({"readout": "patches"}, "readout"), ({"frames": 3}, "frames"), ({"frames": 0}, "frames")])
def test_unknown_options_are_refused(clip_folder, options, said):
    with pytest.raises(ValueError, match=said):
        policy_from_clip(clip_folder, **options)


def test_lora_begins_as_the_model_it_adapts_and_merges_into_it(spatial, observations):
    before = numbers_of(spatial, observations)
    set_trainable(spatial.model, "lora")
    assert torch.allclose(numbers_of(spatial, observations), before, atol=1e-6)
    for name, p in spatial.model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    adapted = numbers_of(spatial, observations)
    assert not torch.allclose(adapted, before, atol=1e-3)
    plain = merged(spatial.model)
    assert not any("lora" in name for name, _ in plain.named_parameters())
    spatial.model = plain
    assert torch.allclose(numbers_of(spatial, observations), adapted, atol=1e-5)


def test_lora_twice_is_refused(spatial):
    set_trainable(spatial.model, "lora")
    with pytest.raises(ValueError, match="LoRA already"):
        set_trainable(spatial.model, "full")


def test_unknown_variant_is_refused(spatial):
    with pytest.raises(ValueError, match="frozen, language, last-layers, lora, full"):
        set_trainable(spatial.model, "half")


def test_a_second_frame_changes_nothing_until_it_is_trained(clip_folder, observations):
    for readout in ("pooled", "spatial"):
        one = policy_from_clip(clip_folder, readout=readout)
        two = with_two_frames(one)
        with_past = [{**o, "previous_rgb": observations[0]["rgb"]} for o in observations]
        assert torch.allclose(numbers_of(one, observations), numbers_of(two, with_past), atol=1e-6)
        words = two.words(["go"], [0])
        picture = np.stack([frames_of(observations[0]["rgb"], observations[1]["rgb"], 2)])
        two.model(two.pixels(picture), **words).sum().backward()
        added = two.model.action_head[0].weight.grad[:, one.model.action_head[0].in_features:]
        assert added.abs().max() > 0
        with pytest.raises(ValueError, match="two frames already"):
            with_two_frames(two)


def test_a_saved_policy_says_the_same_and_holds_no_pickle(policy, observations, tmp_path):
    policy.model.normaliser = ActionNormaliser(np.full(7, -2.0), np.full(7, 3.0), periodic=4, period=1.0)
    policy.save(tmp_path)
    loaded = load_waypoint_policy(tmp_path)
    assert torch.equal(numbers_of(policy, observations), numbers_of(loaded, observations))
    assert np.array_equal(policy.decide(observations).waypoints, loaded.decide(observations).waypoints)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".safetensors", ".jinja"}


def test_half_precision_on_disk_is_single_in_memory(spatial, observations, tmp_path):
    spatial.save(tmp_path, torch.float16)
    loaded = load_waypoint_policy(tmp_path)
    assert {value.dtype for value in loaded.model.state_dict().values()} == {torch.float32}
    ours, theirs = numbers_of(spatial, observations), numbers_of(loaded, observations)
    assert not torch.equal(ours, theirs) and torch.allclose(ours, theirs, atol=1e-2)


def test_saving_lora_writes_a_plain_model_and_leaves_the_policy_as_it_is(spatial, observations, tmp_path):
    set_trainable(spatial.model, "lora")
    for name, p in spatial.model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    spatial.save(tmp_path)
    assert any("lora_" in name for name, _ in spatial.model.named_parameters())
    loaded = load_waypoint_policy(tmp_path)
    assert torch.allclose(numbers_of(loaded, observations), numbers_of(spatial, observations), atol=1e-5)
    set_trainable(loaded.model, "lora")


@pytest.mark.parametrize("damage, said", [
    (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    (lambda f: (f / "task_specific_vla.json").unlink(), "task_specific_vla.json is missing"),
    (lambda f: (f / "task_specific_vla.json").write_text("{"), "does not describe"),
    (lambda f: (f / "model.safetensors").write_bytes(b"no weights"), "does not fit"),
    (lambda f: (f / "task_specific_vla.json").write_text(
        json.dumps({**json.loads((f / "task_specific_vla.json").read_text()), "hidden": 64})), "does not fit"),
])
def test_a_damaged_folder_is_named_in_one_sentence(spatial, tmp_path, damage, said):
    spatial.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=said) as caught:
        load_waypoint_policy(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_clip_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot be loaded as a CLIP model"):
        policy_from_clip(tmp_path / "nothing")


def test_a_full_clip_model_gives_both_towers(clip_folder):
    clip = CLIPModel.from_pretrained(clip_folder)
    policy = policy_from_clip(clip_folder)
    pixels, ids = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0)), policy.words(["go", "red"], [0, 1])["input_ids"]
    with torch.no_grad():
        assert torch.allclose(policy.model.vision_encoder(pixels).pooler_output, clip.vision_model(pixel_values=pixels).pooler_output, atol=1e-6)
        assert torch.allclose(policy.model.text_encoder(ids).pooler_output, clip.text_model(input_ids=ids).pooler_output, atol=1e-6)


def test_the_same_seed_gives_the_same_head(clip_folder):
    a, b, c = (policy_from_clip(clip_folder, seed=seed).model.action_head[0].weight for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


class Scripted(torch.nn.Module):
    """Answers with one fixed normalised waypoint, whatever it sees."""

    def __init__(self, model, waypoint):
        super().__init__()
        self.frames, self.image_size, self.normaliser, self.text_encoder = 1, 48, model.normaliser, model.text_encoder
        self.numbers = model.normaliser(torch.tensor(waypoint, dtype=torch.float32))

    def forward(self, pixel_values, input_ids, attention_mask):
        return self.numbers.expand(len(input_ids), -1)


def test_decide_gives_seven_numbers_that_reach_the_wrist(spatial):
    env = Tabletop("align")
    observation, _ = env.reset(seed=3)
    waypoint = np.array([0.05, 0.0, 0.1, 0.1, -0.05, 0.4, 0.0])
    spatial.model = Scripted(spatial.model, waypoint)
    decision = spatial.decide([observation])
    assert np.allclose(decision.waypoints[0], waypoint, atol=1e-6)
    assert np.allclose(decision.actions[0], waypoint[[0, 1, 2, 6]], atol=1e-6)
    assert np.isnan(decision.probabilities).all() and decision.seconds > 0
    seen = []
    env.arm.on_control_step = lambda: seen.append(env.arm.end_effector)
    env.step(decision.waypoints[0])
    assert np.abs(np.array(seen)[:, 5] - 0.4).min() < 0.01


def test_rollout_drives_it_and_counts_only_successes(policy):
    result = rollout(policy, "align", episodes=3, progress=False)
    assert result.success.shape == (3,) and (result.decisions == 3).sum() + result.success.sum() >= 3


def test_act_can_be_given_another_sentence(spatial, observations):
    own, other = spatial.act(observations[0]), spatial.act(observations[0], observations[1]["instruction"])
    assert own.shape == (7,) and not np.allclose(own, other)


def test_a_copy_is_independent(spatial, observations):
    before = numbers_of(spatial, observations)
    with torch.no_grad():
        spatial.copy().model.action_head[3].weight.zero_()
    assert torch.equal(numbers_of(spatial, observations), before)


def test_towers_can_be_passed_in(clip_folder):
    vision, text = CLIPVisionModel.from_pretrained(clip_folder), CLIPTextModel.from_pretrained(clip_folder)
    a = policy_from_towers(vision, text, build_processor(), readout="spatial")
    b = policy_from_clip(clip_folder, readout="spatial")
    assert all(torch.equal(x, y) for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values()))
