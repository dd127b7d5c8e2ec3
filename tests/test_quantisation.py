"""Properties of the ways to make a policy smaller: torch, bitsandbytes, transformers, onnx and a hand calculation are the judges."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from labkit.actions import action_to_bins, small_action
from labkit.clip_pretraining import Recipe, build_model, build_processor
from labkit.errors import UserError
from labkit.memory import count
from labkit.policy import Decision, load_policy
from labkit.serving.caching import CachingPolicy
from labkit.serving.quantisation import (
    WAYS,
    OnnxTower,
    answer_difference,
    bf16,
    disk_bytes,
    dynamic_int8,
    nf4,
    onnx_fp32,
    onnx_int8,
    printed_recipe,
    static_int8,
    weight_bytes,
)
from labkit.task_specific_vla import GENERIC, load_waypoint_policy, policy_from_clip, set_trainable

IN_ANY_POLICY = ("bf16", "dynamic int8", "nf4")


@pytest.fixture(scope="module")
def waypoint():
    """The lab's generic policy, which the package ships."""
    return load_waypoint_policy(GENERIC)


@pytest.fixture(scope="module")
def two_frames(tmp_path_factory):
    """A random policy with the other options: two frames, no attention over patches."""
    folder = tmp_path_factory.mktemp("towers") / "random-clip"
    build_model(Recipe(width=64, vision_layers=1, seed=3)).save_pretrained(folder)
    build_processor().save_pretrained(folder)
    return policy_from_clip(folder, frames=2)


@pytest.fixture(scope="module")
def smaller(waypoint, observations):
    """Each way, applied to the generic policy once."""
    made = {name: way(waypoint) for name, way in WAYS.items() if name != "onnx int8"}
    return {**made, "onnx int8": onnx_int8(made["onnx fp32"]), "static": static_int8(waypoint, observations)}


@pytest.fixture(scope="module")
def scenes():
    """Twelve first observations."""
    from labkit.tabletop import Tabletop

    env = Tabletop("put")
    return [env.reset(seed=100 + seed)[0] for seed in range(12)]


def linear_layers(model):
    return {name: module for name, module in model.named_modules() if type(module) is nn.Linear}


def state(policy):
    return {name: value.clone() for name, value in policy.model.state_dict().items()}


@pytest.mark.parametrize("way", [*WAYS, "static"])
def test_a_smaller_policy_says_nearly_the_same_in_fewer_bytes(way, smaller, waypoint, scenes):
    found = answer_difference(smaller[way], waypoint, scenes)
    assert found.millimetres.max() < 15 and not found.grips.any() and found.places == len(scenes)
    if way != "onnx fp32":
        assert weight_bytes(smaller[way]) < 0.55 * weight_bytes(waypoint)
    assert type(smaller[way]) is type(waypoint) and smaller[way].name.startswith(waypoint.name + ", ")


@pytest.mark.parametrize("way", IN_ANY_POLICY)
def test_the_policy_that_is_given_stays_as_it_is(way, tiny_policy, two_frames, observations):
    for policy in (tiny_policy, two_frames):
        before, said = state(policy), policy.decide(observations).waypoints
        WAYS[way](policy)
        assert all(torch.equal(value, before[name]) for name, value in policy.model.state_dict().items())
        assert np.array_equal(policy.decide(observations).waypoints, said)


@pytest.mark.parametrize("way", [*WAYS, "static"])
def test_a_copy_of_a_smaller_policy_says_the_same(way, smaller, scenes):
    assert np.array_equal(smaller[way].copy().decide(scenes[:2]).waypoints, smaller[way].decide(scenes[:2]).waypoints)


@pytest.mark.parametrize("way", [*WAYS, "static"])
def test_a_smaller_policy_can_be_cached(way, smaller, scenes):
    cached = CachingPolicy(smaller[way])
    for o in scenes[:2] * 2:
        assert np.array_equal(cached.decide([o]).waypoints, smaller[way].decide([o]).waypoints)
    assert cached.pictures.counts.exact == 2


@pytest.mark.parametrize("way", IN_ANY_POLICY)
def test_the_tiny_vla_says_nearly_the_same(way, shipped_policy, scenes):
    found = answer_difference(WAYS[way](shipped_policy), shipped_policy, scenes)
    assert np.median(found.millimetres) < 5 and found.grips.sum() <= 2


def test_lora_is_merged_before_anything_is_rounded(two_frames, observations):
    policy = two_frames.copy()
    set_trainable(policy.model, "lora")
    with torch.no_grad():
        for name, p in policy.model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    small = dynamic_int8(policy)
    assert not any("lora" in name for name in small.model.state_dict())
    own, without = (answer_difference(small, p, observations).millimetres.mean() for p in (policy, two_frames))
    assert own < 0.5 * without


def test_in_bf16_only_the_range_of_the_actions_stays_exact(waypoint, smaller, scenes):
    dtypes = {name: value.dtype for name, value in smaller["bf16"].model.state_dict().items() if value.is_floating_point()}
    assert {name for name, dtype in dtypes.items() if dtype != torch.bfloat16} == {"normaliser.low", "normaliser.high"}
    # The last step, back to metres, is not rounded again: by hand, from the numbers that the head says.
    said, policy = [], smaller["bf16"].copy()
    policy.model.action_head[-1].register_forward_hook(lambda module, inputs, output: said.append(output.double()))
    places = policy.decide(scenes).waypoints[:, :3]
    low, high = (edge.double().numpy() for edge in (waypoint.model.normaliser.low, waypoint.model.normaliser.high))
    assert np.allclose(places, low[:3] + (said[0].numpy()[:, :3] + 1) / 2 * (high - low)[:3], atol=1e-6)


def test_bf16_takes_half_the_bytes(tiny_policy):
    assert weight_bytes(bf16(tiny_policy)) == pytest.approx(weight_bytes(tiny_policy) / 2, rel=0.01)


@pytest.mark.parametrize("per_channel", [True, False])
def test_int8_weights_are_int8_and_the_nearest_ones(two_frames, per_channel):
    small, exact = dynamic_int8(two_frames, per_channel), linear_layers(two_frames.model)
    assert exact and not linear_layers(small.model)
    for name, layer in exact.items():
        weight = small.model.get_submodule(name).weight()
        assert weight.dtype == torch.qint8 and weight.int_repr().dtype == torch.int8
        scale = weight.q_per_channel_scales()[:, None] if per_channel else weight.q_scale()
        assert ((weight.dequantize() - layer.weight).abs() <= 0.501 * scale).all(), name


def test_one_scale_for_a_whole_matrix_is_coarser_than_one_a_channel(waypoint, scenes):
    whole, each = (answer_difference(dynamic_int8(waypoint, per), waypoint, scenes).millimetres.mean() for per in (False, True))
    assert each < whole


def test_embeddings_and_norms_keep_their_precision(two_frames):
    kept = {name: value for name, value in dynamic_int8(two_frames).model.state_dict().items() if isinstance(value, torch.Tensor)}
    for name in ("text_encoder.embeddings.token_embedding.weight", "vision_encoder.post_layernorm.weight"):
        assert torch.equal(kept[name], two_frames.model.state_dict()[name])


def test_the_printed_lines_raise_on_the_whole_model(waypoint):
    with pytest.raises(AssertionError, match="[Ee]mbedding"):
        printed_recipe(waypoint.model)


def test_the_printed_lines_make_a_head_that_cannot_be_asked(waypoint):
    head = waypoint.model.action_head
    broken = printed_recipe(head)
    with pytest.raises(NotImplementedError):
        broken(torch.zeros(1, head[0].in_features))
    assert head(torch.zeros(1, head[0].in_features)).shape == (1, 8) and not hasattr(head, "qconfig")


def test_without_calibration_every_picture_gets_the_same_place_and_with_it_its_own(waypoint, scenes):
    asked = waypoint.decide(scenes).waypoints[:, :6]
    blind = static_int8(waypoint).decide(scenes).waypoints[:, :6]
    assert len(np.unique(blind, axis=0)) == 1 and len(np.unique(asked, axis=0)) == len(scenes)
    seeing = static_int8(waypoint, scenes[:6]).decide(scenes).waypoints[:, :6]
    assert len(np.unique(seeing, axis=0)) == len(scenes)
    spread = np.linalg.norm(asked[:, :3] - asked[:, :3].mean(0), axis=1).mean()
    assert np.linalg.norm((seeing - asked)[:, :3], axis=1).mean() < 0.1 * spread < np.linalg.norm((blind - asked)[:, :3], axis=1).mean()


def test_calibrated_layers_hold_int8_and_ranges_that_were_measured(smaller):
    layers = {name: module for name, module in smaller["static"].model.named_modules() if type(module) is torch.ao.nn.quantized.Linear}
    assert layers and not linear_layers(smaller["static"].model)
    assert all(layer.weight().dtype == torch.qint8 for layer in layers.values())
    assert all(layer.scale != 1.0 for layer in layers.values())


def test_a_language_model_goes_through_the_same_recipe(tiny_policy, observations):
    small = static_int8(tiny_policy, observations)
    assert not linear_layers(small.model) and np.isfinite(small.decide(observations).waypoints).all()


def test_nf4_is_what_bitsandbytes_makes_of_each_matrix(two_frames):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from bitsandbytes.nn import Linear4bit

    small, exact = nf4(two_frames), linear_layers(two_frames.model)
    kept = linear_layers(small.model)
    assert list(kept) == ["action_head.3"] and len(exact) > 5
    for name, layer in exact.items():
        if name in kept:
            continue
        found = small.model.get_submodule(name)
        assert type(found) is Linear4bit and found.weight.dtype == torch.uint8 and found.weight.numel() == layer.weight.numel() / 2
        packed, quantised = quantize_4bit(layer.weight.detach(), quant_type="nf4", blocksize=64, compress_statistics=True)
        assert torch.equal(dequantize_4bit(found.weight.data, found.weight.quant_state), dequantize_4bit(packed, quantised))


def test_nf4_of_the_tiny_vla_is_what_transformers_loads(tiny_policy, tmp_path, observations):
    tiny_policy.save(tmp_path)
    ours, theirs = nf4(tiny_policy), load_policy(tmp_path, quantization="nf4", device="cpu")
    assert set(linear_layers(ours.model)) == set(linear_layers(theirs.model)) == {"lm_head"}
    assert np.array_equal(ours.decide(observations).bins, theirs.decide(observations).bins)
    assert weight_bytes(ours) == pytest.approx(weight_bytes(theirs), rel=0.01)


@pytest.fixture(scope="module")
def two_frames_in_onnx(two_frames):
    return onnx_fp32(two_frames)


@pytest.mark.parametrize("rows", [[0], [1, 4], range(6)], ids=len)
def test_the_graphs_say_what_the_towers_say_for_any_batch_and_sentence(rows, two_frames, two_frames_in_onnx, observations):
    asked = [{**observations[i], "previous_rgb": observations[i - 1]["rgb"]} for i in rows]
    assert np.allclose(two_frames_in_onnx.decide(asked).waypoints, two_frames.decide(asked).waypoints, atol=1e-6)


@pytest.mark.parametrize("text", ["go", "word " * 80], ids=["short", "cut off at the longest"])
def test_the_shortest_and_the_longest_sentence_are_read(text, two_frames, two_frames_in_onnx, observations):
    assert np.allclose(two_frames_in_onnx.act(observations[0], text), two_frames.act(observations[0], text), atol=1e-6)


def test_both_towers_run_as_valid_graphs_without_parameters_or_paths_of_this_machine(two_frames_in_onnx):
    import onnx

    for tower in two_frames_in_onnx.model.towers():
        assert isinstance(tower, OnnxTower) and count(tower).total == 0
        onnx.checker.check_model(onnx.load_from_string(tower.graph))
        assert b"site-packages" not in tower.graph and b"labkit" not in tower.graph


def test_the_int8_graphs_hold_int8_within_seven_bits(smaller):
    import onnx
    from onnx import numpy_helper

    for tower in smaller["onnx int8"].model.towers():
        graph = onnx.load_from_string(tower.graph).graph
        assert {"MatMulInteger", "DynamicQuantizeLinear"} <= {node.op_type for node in graph.node}
        weights = [numpy_helper.to_array(t) for t in graph.initializer if t.data_type == onnx.TensorProto.INT8]
        matrices = [w for w in weights if w.ndim == 2 and w.size > 1000]
        assert matrices and all(np.abs(w.astype(int)).max() <= 64 for w in matrices)
        floats = sum(numpy_helper.to_array(t).nbytes for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT)
        assert floats < 0.2 * sum(w.nbytes for w in weights)


def test_a_state_dict_holds_the_graphs(two_frames, two_frames_in_onnx, observations):
    other = two_frames_in_onnx.copy()
    for tower in other.model.towers():
        tower.graph = b""
    other.model.load_state_dict(two_frames_in_onnx.model.state_dict())
    assert np.array_equal(other.decide(observations).waypoints, two_frames_in_onnx.decide(observations).waypoints)


@pytest.mark.parametrize("way", [onnx_fp32, onnx_int8])
def test_a_policy_that_generates_tokens_is_refused_with_the_ways_that_are_open_to_it(way, tiny_policy):
    with pytest.raises(UserError, match="token by token.*dynamic int8"):
        way(tiny_policy)


def test_bytes_of_a_plain_model_are_four_a_number(two_frames):
    numbers = sum(p.numel() for p in two_frames.model.parameters()) + 2 * 7  # and the range of the actions
    assert weight_bytes(two_frames) == 4 * numbers
    assert 1.0 < disk_bytes(two_frames) / weight_bytes(two_frames) < 1.2


def test_bytes_of_quantised_layers_are_one_a_number_and_their_scales():
    layer = nn.Sequential(nn.Linear(100, 50), nn.Linear(50, 3))
    found = weight_bytes(dynamic_int8(_Holder(layer)))
    # int8 weights; float32 biases; a scale and a zero point of 8 bytes for each output; a scale and a zero point of each layer's own.
    expected = (5000 + 150) + 4 * 53 + 16 * 53
    assert expected <= found <= expected + 2 * 16


def test_tied_weights_count_once():
    tied = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False))
    tied[1].weight = tied[0].weight
    assert weight_bytes(_Holder(tied)) == 400


class _Holder:
    name = "holder"

    def __init__(self, model):
        self.model = model


class Says:
    """A policy that says prepared waypoints."""

    def __init__(self, waypoints):
        self.waypoints = np.array(waypoints, float)

    def decide(self, observations):
        return Decision(action_to_bins(small_action(self.waypoints)), small_action(self.waypoints), self.waypoints, self.waypoints[:, :4], 0.0)


def test_differences_are_those_of_a_hand_calculation():
    quarter = np.pi / 2
    a = Says([[0.1, 0.0, 0.03, 0, 0, 0.75, 1.0], [0.1, 0.00004, 0.03, 0, 0, 0.0, 0.2], [0.0, 0.0, 0.0, 0, 0, -0.1, 0.4]])
    b = Says([[0.1, 0.0, 0.03, 0, 0, -0.75, 0.9], [0.07, 0.04004, 0.03, 0, 0, quarter, 0.6], [0.0, 0.0, 0.012, 0, 0, 0.1, 0.4]])
    found = answer_difference(a, b, [{}] * 3)
    assert np.allclose(found.millimetres, [0, 50, 12])
    assert np.allclose(found.degrees, np.degrees([quarter - 1.5, 0, 0.2]))
    assert found.grips.tolist() == [False, True, False] and found.places == 2
    assert "1 of 3" in str(found) and "50.0 at worst" in str(found)


def test_a_difference_of_nothing_is_refused(waypoint):
    with pytest.raises(ValueError, match="at least one"):
        answer_difference(waypoint, waypoint, [])


def test_the_ways_leave_no_warning_and_no_filter_behind(two_frames, two_frames_in_onnx, observations, recwarn):
    import logging
    import warnings

    exporter = logging.getLogger("torch.onnx._internal.exporter._registration")
    before = list(warnings.filters), copy.copy(exporter.filters)
    for way in (bf16, dynamic_int8, nf4, lambda p: static_int8(p, observations), static_int8):
        way(two_frames)
    straight = onnx_int8(two_frames)
    assert [str(w.message)[:80] for w in recwarn] == []
    assert (list(warnings.filters), exporter.filters) == before
    # And int8 of what is in ONNX already is int8 of the policy; that one stays as it was.
    onwards = onnx_int8(two_frames_in_onnx)
    assert np.array_equal(straight.decide(observations).waypoints, onwards.decide(observations).waypoints)
    assert np.allclose(two_frames_in_onnx.decide(observations).waypoints, two_frames.decide(observations).waypoints, atol=1e-6)
