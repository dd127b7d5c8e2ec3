"""A policy with smaller weights: each way of the lab sheet's step 6 is one function from a policy to a changed copy. Timing is elsewhere.

The ways: bfloat16, dynamic int8, static int8, NF4 (bitsandbytes), and ONNX Runtime in float32 and int8. torchao is left out: on a CPU it is
slower than plain float32 until torch.compile has built it, which takes a C++ compiler and many times the seconds of an ONNX export.
"""

from __future__ import annotations

import copy
import io
import logging
import re
import tempfile
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from labkit.errors import UserError
from labkit.task_specific_vla import TaskSpecificVLA, merged

# What torch says on the way, in thousands of characters, that is no news to the person who asked for it; nothing else is muted.
_EXPECTED = (
    "torch.ao.quantization is deprecated", "Please use quant_min and quant_max", "torch.quantize_per_tensor, torch.quantize_per_channel",
    "must run observer before calling calculate_qparams", "# The axis name: ", "While compiling, we found certain side effects",
)
_MISSING_TORCHVISION = "torchvision is not installed"
_LARGEST_BATCH = 4096
_OUTPUTS = ["pooler_output", "last_hidden_state"]


def bf16(policy):
    """The copy computes in bfloat16: half the bytes, and three significant digits.   The range of the actions stays in float32."""
    model = _plain(policy)
    model.to(torch.bfloat16)
    if isinstance(model, TaskSpecificVLA):
        model.normaliser = copy.deepcopy(policy.model.normaliser)
        model.action_head.register_forward_hook(_as_float32)
    return _with(policy, model, "bf16")


def _as_float32(module, inputs, output):
    return output.float()


def dynamic_int8(policy, per_channel: bool = True):
    """Each linear layer's weights as int8; its input is quantised on the fly, by the range it has that time.

    per_channel: a scale for each output of a layer; False, torch's default, one scale for the whole matrix, which a head over 256 action tokens
    may not stand.   Embeddings, norms, convolutions and the projections inside `nn.MultiheadAttention` stay in float32.
    Source: `torch.ao.quantization.quantize_dynamic`.
    """
    from torch.ao.quantization import default_dynamic_qconfig, per_channel_dynamic_qconfig, quantize_dynamic

    with _quiet():
        config = per_channel_dynamic_qconfig if per_channel else default_dynamic_qconfig
        return _with(policy, quantize_dynamic(_plain(policy), {nn.Linear: config}), "dynamic int8")


def int8_per_row(weight) -> dict:
    """A matrix as `dynamic_int8` keeps it: {"q": (O, I) whole numbers from -127 to 127, "scale": (O,), "error": share of the norm that is lost}.

    weight: (O, I) float.   Source: `torch.fake_quantize_per_channel_affine`.
    """
    largest = weight.abs().amax(1)
    scale = torch.where(largest > 0, largest / 127, 1.0)
    kept = torch.fake_quantize_per_channel_affine(weight, scale, torch.zeros(len(weight), dtype=torch.int32), 0, -127, 127)
    return {"q": (kept / scale[:, None]).round(), "scale": scale, "error": torch.dist(weight, kept) / weight.norm()}


def printed_recipe(model: nn.Module) -> nn.Module:
    """The lab sheet's four lines of step 6 as they are printed, on any module; the module itself is not changed.

    On a model with embeddings they raise AssertionError; what they make of a stack of linear layers raises NotImplementedError when it is
    asked, since nothing quantises its input. `static_int8` without observations is the least that must be added for an answer.
    """
    import torch.quantization as quantization

    model = copy.deepcopy(model)
    with _quiet():
        model.eval()
        model.qconfig = quantization.get_default_qconfig("fbgemm")
        quantized_model = quantization.prepare(model, inplace=False)
        return quantization.convert(quantized_model, inplace=False)


def static_int8(policy, observations=()):
    """Weights and activations of each linear layer as int8, with ranges fixed beforehand: the printed recipe, mended in two places.

    A quantise stub before each linear layer and a dequantise stub after it, and calibration: `observations` is what the policy is shown while
    the ranges are measured.   With none, as in the sheet, every range is unknown and torch takes whole numbers from 0 to 127: a head that
    regresses a waypoint then says one place whatever it sees, and a language model says nonsense.
    Even calibrated, the scores of a head over action tokens have 8 bits, and it may say another token.
    """
    from torch.ao.quantization import add_quant_dequant, convert, get_default_qconfig, prepare

    model = _plain(policy).eval()
    with _quiet():
        for module in model.modules():
            # By exact type: the output projection of nn.MultiheadAttention is a subclass that must stay as it is.
            if type(module) is nn.Linear:
                module.qconfig = get_default_qconfig("fbgemm")
        add_quant_dequant(model)
        prepare(model, inplace=True)
        changed = _with(policy, model, "static int8" if len(observations) else "static int8, not calibrated")
        if len(observations):
            changed.decide(list(observations))
        convert(model, inplace=True)
    return changed


def nf4(policy):
    """Each linear layer but the last as bitsandbytes' NF4: 4 bits a weight, a scale for 64 of them, and those scales in 8 bits; CPU or GPU.

    The last layer says the action and stays as it is, as bitsandbytes leaves a language model's head.   Source: QLoRA, arXiv 2305.14314.
    """
    model = _plain(policy)
    linear = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    for name in linear:
        if name != linear[-1]:
            model.set_submodule(name, _nf4_layer(model.get_submodule(name)))
    return _with(policy, model, "nf4")


def _nf4_layer(linear):
    from bitsandbytes.nn import Linear4bit, Params4bit

    layer = Linear4bit(linear.in_features, linear.out_features, bias=linear.bias is not None, compute_dtype=torch.float32,
                       compress_statistics=True, quant_type="nf4", device="meta")
    layer.weight = Params4bit(linear.weight.detach().clone(), requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer)
    layer.bias = linear.bias
    # Repacked for AVX512-BF16, it would compute in bfloat16: see labkit/policy.py.
    layer.support_avx512bf16_for_cpu = False
    return layer.to(linear.weight.device)


def onnx_fp32(policy):
    """Both towers as graphs in ONNX Runtime, in float32; the head, a few small layers, stays in torch.

    Only inference is left of the towers: they have no parameters.   Raises UserError for a policy that is not a `WaypointPolicy`.
    """
    return _in_onnx_runtime(policy, "onnx fp32", lambda graph: graph)


def onnx_int8(policy):
    """As `onnx_fp32`, with the weights of the towers' matrices, tokens and convolution as int8 and activations quantised on the fly.

    What `onnx_fp32` gave is taken as well, and saves the seconds of a second export.
    Source: `onnxruntime.quantization.quantize_dynamic`, with a scale for each output channel and seven of the eight bits: a processor without
    VNNI instructions adds two 8-bit products in 16 bits, and with the eighth bit they would overflow without a word.
    """
    return _in_onnx_runtime(policy, "onnx int8", _quantise_graph)


WAYS = {"bf16": bf16, "dynamic int8": dynamic_int8, "nf4": nf4, "onnx fp32": onnx_fp32, "onnx int8": onnx_int8}


class OnnxTower(nn.Module):
    """A CLIP tower that runs in ONNX Runtime: called and answering like the tower that it was exported from."""

    def __init__(self, graph: bytes, config):
        """graph: a serialised ONNX model with the outputs `pooler_output` and `last_hidden_state`.   config: the tower's."""
        super().__init__()
        self.graph, self.config, self._session = graph, config, None

    def forward(self, attention_mask=None, **inputs):
        """pixel_values (N, 3, H, W), or input_ids and attention_mask (B, T)  ->  pooler_output and last_hidden_state, in float32."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        if "input_ids" in inputs:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"]) if attention_mask is None else attention_mask
        if self._session is None:
            self._session = self._start()
        found = self._session.run(_OUTPUTS, {name: value.numpy() for name, value in inputs.items()})
        pooled, states = map(torch.from_numpy, found)
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=pooled)

    def _start(self):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
        # Threads that wait in a loop for the next call would take the processor from everybody else between two calls.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return onnxruntime.InferenceSession(self.graph, options, providers=["CPUExecutionProvider"])

    def get_extra_state(self) -> torch.Tensor:
        """The graph, (bytes,) uint8: a state_dict holds it like any other weight."""
        return torch.frombuffer(bytearray(self.graph), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Take over the graph of a state_dict."""
        self.graph, self._session = state.numpy().tobytes(), None

    def __getstate__(self):
        # A session cannot be copied; it starts again from the graph.
        return {**self.__dict__, "_session": None}


def _in_onnx_runtime(policy, way, change):
    model = _plain(policy)
    if not isinstance(model, TaskSpecificVLA):
        raise UserError(f"{policy.name!r} generates token by token, and its graph would be asked four times a decision with a growing cache: give a "
                        f"WaypointPolicy, or choose 'bf16', 'dynamic int8' or 'nf4'")
    if not isinstance(model.vision_encoder, OnnxTower):
        model.vision_encoder, model.text_encoder = _towers_in_onnx(policy, model)
    for tower in model.towers():
        tower.graph = change(tower.graph)
    return _with(policy, model, way)


def _towers_in_onnx(policy, model):
    vision, text, size = model.vision_encoder, model.text_encoder, model.image_size
    batch, longest = (torch.export.Dim(name, min=low, max=high) for name, low, high in (
        ("batch", 1, _LARGEST_BATCH), ("words", 2, text.config.max_position_embeddings)))
    words = policy.words(["pick up the red block", "pick up the blue cup"], [False, True])
    pictures = _exported(_Eye(vision), {"pixel_values": torch.zeros(2, 3, size, size)}, {0: batch})
    sentences = _exported(_Reader(text), words, {0: batch, 1: longest})
    return OnnxTower(pictures, vision.config), OnnxTower(sentences, text.config)


def _exported(tower, inputs, varying):
    """The tower as a serialised ONNX model, for inputs named like its own.   varying: which of their axes vary in length."""
    with _quiet():
        program = torch.onnx.export(tower.eval(), tuple(inputs.values()), dynamo=True, verbose=False, input_names=list(inputs),
                                    output_names=_OUTPUTS, dynamic_shapes=tuple(varying for _ in inputs))
    return _without_notes(program.model_proto).SerializeToString()


def _without_notes(model):
    """The exporter's notes, from which line of Python each node comes, would be a tenth of a small graph."""
    for part in (*model.graph.node, *model.graph.value_info, model.graph):
        del part.metadata_props[:]
    return model


class _Eye(nn.Module):
    """A vision tower that answers with a plain pair of tensors, as a graph does."""

    def __init__(self, tower):
        super().__init__()
        self.tower = tower

    def forward(self, pixel_values):
        out = self.tower(pixel_values=pixel_values)
        return out.pooler_output, out.last_hidden_state


class _Reader(nn.Module):
    """A text tower that answers with a plain pair of tensors, as a graph does."""

    def __init__(self, tower):
        super().__init__()
        self.tower = tower

    def forward(self, input_ids, attention_mask):
        out = self.tower(input_ids=input_ids, attention_mask=attention_mask)
        return out.pooler_output, out.last_hidden_state


def _quantise_graph(graph):
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder:
        whole, prepared, small = (Path(folder) / name for name in ("whole.onnx", "prepared.onnx", "small.onnx"))
        whole.write_bytes(graph)
        quant_pre_process(whole, prepared, skip_symbolic_shape=True)
        quantize_dynamic(prepared, small, weight_type=QuantType.QInt8, per_channel=True, reduce_range=True)
        return small.read_bytes()


def weight_bytes(policy) -> int:
    """Bytes that the policy's weights take in memory, with the scales of quantised ones; the workspace of a forward pass is not counted."""
    seen = {}
    for tensor in _tensors(policy.model.state_dict()):
        size = tensor.numel() * tensor.element_size()
        if tensor.is_quantized and tensor.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric):
            size += tensor.q_per_channel_scales().nbytes + tensor.q_per_channel_zero_points().nbytes
        # Tied weights have one address and count once.
        seen[tensor.data_ptr(), size] = size
    return sum(seen.values())


def disk_bytes(policy) -> int:
    """Bytes of a file with the policy's weights, as `torch.save` writes a state_dict."""
    file = io.BytesIO()
    torch.save(policy.model.state_dict(), file)
    return file.getbuffer().nbytes


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


@dataclass(frozen=True)
class Difference:
    """How the answers of one policy differ from another's on the same N observations.

    millimetres: (N,) between the two places.   degrees: (N,) between the two yaws of the wrist, a quarter turn being none.
    grips: (N,) bool, where one switches the vacuum on and the other off.   places: how many different places the first policy says, to 0.1 mm.
    """

    millimetres: np.ndarray
    degrees: np.ndarray
    grips: np.ndarray
    places: int

    def __str__(self):
        return (f"{self.millimetres.mean():.1f} mm apart on average, {self.millimetres.max():.1f} at worst; the vacuum differs in "
                f"{int(self.grips.sum())} of {len(self.grips)} answers, which name {self.places} places")


def answer_difference(policy, reference, observations) -> Difference:
    """Ask both policies about the same observations.   Raises ValueError where there are none."""
    observations = list(observations)
    if not observations:
        raise ValueError("a difference needs at least one observation")
    a, b = (p.decide(observations).waypoints for p in (policy, reference))
    turned = (a[:, 5] - b[:, 5] + np.pi / 4) % (np.pi / 2) - np.pi / 4
    places = np.unique((a[:, :3] / 1e-4).round(), axis=0)
    return Difference(1000 * np.linalg.norm(a[:, :3] - b[:, :3], axis=1), np.degrees(np.abs(turned)), (a[:, 6] > 0.5) != (b[:, 6] > 0.5),
                      len(places))


def _plain(policy):
    """A copy of the policy's model, LoRA added to the weights it belongs to: what is left is plain layers."""
    if isinstance(policy.model, TaskSpecificVLA):
        return merged(policy.model).eval()
    model = copy.deepcopy(policy.model)
    return (model.merge_and_unload() if hasattr(model, "merge_and_unload") else model).eval()


def _with(policy, model, way):
    changed = copy.copy(policy)
    changed.model, changed.name = model, f"{policy.name}, {way}"
    return changed


@contextmanager
def _quiet():
    """Without the lines of torch that are expected here."""
    exporter = logging.getLogger("torch.onnx._internal.exporter._registration")
    with warnings.catch_warnings():
        for message in _EXPECTED:
            warnings.filterwarnings("ignore", message=f"\\s*{re.escape(message)}")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch|onnx|copyreg")
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch|onnx|copyreg")
        exporter.addFilter(_is_wanted)
        try:
            yield
        finally:
            exporter.removeFilter(_is_wanted)


def _is_wanted(record):
    return _MISSING_TORCHVISION not in record.getMessage()
