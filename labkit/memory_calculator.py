"""Bytes that fine-tuning a Llama model needs, by kind: calculated from its shapes, and measured on real models. Counts are in memory.py."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property
from numbers import Real

import torch

from labkit.memory import ALL_LINEAR, ATTENTION, LLAMAS, llama_config, lora_parameters

KINDS = ("weights", "quantisation constants", "adapters", "gradients", "optimiser", "master copy", "activations")
METHODS = ("full", "lora", "qlora")
ATTENTIONS = ("sdpa", "eager")
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
# QLoRA, Dettmers et al., arXiv 2305.14314, section 3: blocks of 64 weights share a constant, blocks of 256 constants share a second one.
NF4_BLOCK, NF4_SECOND_BLOCK = 64, 256
# A parameter count this near to a published model's, as a ratio, takes that model's shapes.
_NEAR = 1.05


@dataclass(frozen=True)
class Training:
    """What is trained, and how.

    model: a name in LLAMAS, a LlamaConfig, or a number of parameters, whose shapes `llama_like` guesses (the number itself is kept).
    method: "full", "lora" (frozen weights, adapters) or "qlora" (the same, with the layers' weights in NF4; embedding, head and norms stay).
    weights: dtype of weights and activations.   gradients: of full fine-tuning; default, that of the weights.   moments: AdamW keeps two
    numbers a trained parameter in this dtype; float32 makes 8 bytes, PyTorch's own AdamW uses the dtype of the parameter.
    master_copy: a float32 copy of the trained parameters.   adapters: dtype of LoRA's parameters and their gradients; float32 is peft's default.
    double_quantisation: of NF4's constants.   checkpointing: keep each layer's input and compute the rest again.
    attention: "sdpa" keeps no attention matrix, "eager" does.   batch, sequence: sequences of tokens in a step; 0 leaves activations out.
    Raises ValueError for an unknown word or model, or a number that makes no sense.
    """

    model: object
    method: str = "full"
    weights: str = "bfloat16"
    gradients: str | None = None
    moments: str = "float32"
    master_copy: bool = False
    rank: int = 16
    targets: tuple[str, ...] = ATTENTION
    adapters: str = "float32"
    double_quantisation: bool = True
    checkpointing: bool = False
    attention: str = "sdpa"
    batch: int = 0
    sequence: int = 512

    def __post_init__(self):
        dtypes = (self.weights, self.gradients or self.weights, self.moments, self.adapters)
        for word, known in ((self.method, METHODS), (self.attention, ATTENTIONS), *((d, tuple(DTYPES)) for d in dtypes)):
            if word not in known:
                raise ValueError(f"{word!r} is none of {', '.join(known)}")
        if not self.targets or not set(self.targets) <= set(ALL_LINEAR):
            raise ValueError(f"targets are some of {', '.join(ALL_LINEAR)}, not {self.targets!r}")
        if self.rank < 1 or self.batch < 0 or self.sequence < 1:
            raise ValueError(f"rank and sequence are 1 or more, batch 0 or more, not {self.rank}, {self.sequence} and {self.batch}")
        _ = self.config

    @cached_property
    def config(self):
        """The LlamaConfig that the shapes come from."""
        if isinstance(self.model, str):
            return llama_config(self.model)
        return llama_like(self.model) if isinstance(self.model, Real) else self.model

    @property
    def parameters(self) -> int:
        """Of the model, without adapters: the number that was given, or that of the shapes."""
        return int(self.model) if isinstance(self.model, Real) else llama_parameters(self.config)

    def bytes(self) -> dict[str, int]:
        """Bytes by kind, in the order of KINDS. Not among them: CUDA's context, fragmentation, and what lives only within a step."""
        config, size = self.config, DTYPES[self.weights]
        full, found = self.method == "full", dict.fromkeys(KINDS, 0)
        quantised = self.parameters - _unquantised(config) if self.method == "qlora" else 0
        matrices = config.num_hidden_layers * len(ALL_LINEAR) if quantised else 0
        lora = 0 if full else config.num_hidden_layers * sum(lora_parameters(linear_shapes(config)[name], self.rank) for name in self.targets)
        trained = self.parameters if full else lora
        found["weights"] = (self.parameters - quantised) * size + math.ceil(quantised / 2)
        found["quantisation constants"] = nf4_constants(quantised, self.double_quantisation, matrices)
        found["adapters"] = lora * DTYPES[self.adapters]
        found["gradients"] = trained * DTYPES[(self.gradients or self.weights) if full else self.adapters]
        found["optimiser"] = 2 * trained * DTYPES[self.moments]
        found["master copy"] = trained * DTYPES["float32"] if self.master_copy else 0
        found["activations"] = activation_bytes(self)
        return found

    def static(self) -> int:
        """Bytes that are there between two steps: all kinds but the activations."""
        return self.total() - self.bytes()["activations"]

    def total(self) -> int:
        """Bytes of all kinds together."""
        return sum(self.bytes().values())


def linear_shapes(config) -> dict[str, tuple[int, int]]:
    """The linear layers of one transformer layer of a LlamaConfig: name -> shape of the weight, (out, in)."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    hidden, mlp, q, kv = config.hidden_size, config.intermediate_size, config.num_attention_heads * head, config.num_key_value_heads * head
    shapes = ((q, hidden), (kv, hidden), (kv, hidden), (hidden, q), (mlp, hidden), (mlp, hidden), (hidden, mlp))
    return dict(zip(ALL_LINEAR, shapes))


def llama_parameters(config) -> int:
    """Parameters of a LlamaConfig, by arithmetic."""
    return config.num_hidden_layers * sum(out * into for out, into in linear_shapes(config).values()) + _unquantised(config)


def _unquantised(config):
    """Embedding, head and norms: what bitsandbytes leaves in 16 bits."""
    embeddings = (1 if config.tie_word_embeddings else 2) * config.vocab_size * config.hidden_size
    return embeddings + (2 * config.num_hidden_layers + 1) * config.hidden_size


def nf4_constants(weights: int, double_quantisation: bool = True, matrices: int = 0) -> int:
    """Bytes of the constants of so many NF4 weights: a float32 a block, or an int8 a block and a float32 for 256 of these.

    With double quantisation that is 8 / 64 + 32 / (64 * 256) = 0.127 bits a weight, as in QLoRA, arXiv 2305.14314, section 3.
    matrices: for each of them bitsandbytes keeps the 16 values of NF4 and, of the second quantisation, 256 values and an offset, in float32.
    """
    blocks = math.ceil(weights / NF4_BLOCK)
    if double_quantisation:
        return blocks + 4 * math.ceil(blocks / NF4_SECOND_BLOCK) + 4 * (16 + 256 + 1) * matrices
    return 4 * blocks + 4 * 16 * matrices


def activation_bytes(training: Training) -> int:
    """Bytes that the forward pass keeps for the backward pass; with checkpointing, and one layer computed again, the most at a time.

    After Korthikanti et al., arXiv 2205.05198, section 4.1, who add up the inputs that each operation saves; their layer, with GELU, a
    4 h wide MLP, dropout and attention matrices, comes to s b h (34 + 5 a s / h) bytes in 16 bits. Here the same sum is taken over
    transformers' Llama layer: RMSNorm in float32, SwiGLU, grouped key and value heads, no dropout. A frozen linear layer saves no input,
    LoRA's A does, in the dtype of the adapters. Left out: RMSNorm's and attention's one number a row, and, of LoRA, that the first
    layer has nothing to propagate below its adapters (a few per cent less in a small model). `measured_activation_bytes` checks it.
    """
    config, shapes = training.config, linear_shapes(training.config)
    tokens, size, hidden = training.batch * training.sequence, DTYPES[training.weights], config.hidden_size
    layer = tokens * _layer_bytes_a_token(training, shapes) + _attention_matrix_bytes(training)
    inputs = config.num_hidden_layers * tokens * size * hidden + layer if training.checkpointing else config.num_hidden_layers * layer
    # The final norm, the head's input, and log-probabilities in float32 (Korthikanti et al., section 4.3).
    last = tokens * (4 * hidden + (2 * size * hidden if training.method == "full" else 0) + 4 * config.vocab_size)
    return inputs + last


def _layer_bytes_a_token(training, shapes):
    size, (mlp, hidden) = DTYPES[training.weights], shapes["gate_proj"]
    q, kv = shapes["q_proj"][0], shapes["q_proj"][0] if training.attention == "eager" else shapes["k_proj"][0]
    norms, attention, gates = 2 * 4 * hidden, size * (2 * q + 2 * kv), size * 3 * mlp
    if training.method == "full":
        # Of both norms the normed state, which its weight needs, and the product; of the MLP what goes into down_proj.
        return norms + attention + gates + size * (4 * hidden + mlp)
    return norms + attention + gates + _lora_bytes_a_token(training, shapes)


def _lora_bytes_a_token(training, shapes):
    size = DTYPES[training.adapters]
    between = size * training.rank * len(training.targets)
    if training.adapters != training.weights:
        # Each adapter casts its input, and keeps the copy.
        return between + sum(size * shapes[name][1] for name in training.targets)
    # q, k and v share their input, gate and up theirs; o's is the attention's output, which is kept anyway.
    shared = {"q_proj": "attention", "k_proj": "attention", "v_proj": "attention", "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "down"}
    kept = {shared[name]: shapes[name][1] for name in training.targets if name in shared}
    return between + size * sum(kept.values())


def _attention_matrix_bytes(training):
    """Eager attention keeps its softmax in float32, and again in the dtype of the weights where that is another."""
    if training.attention == "sdpa":
        return 0
    size = 4 if training.weights == "float32" else 4 + DTYPES[training.weights]
    return size * training.batch * training.config.num_attention_heads * training.sequence**2


def llama_like(parameters: float):
    """A LlamaConfig of about so many parameters, from 0.25M to 72G.

    Within 5 % of a model in LLAMAS it is that model. Between two of them depth, shape of the MLP and size of a group of query heads are
    interpolated geometrically; width of a head, vocabulary and tying are the smaller one's; the widths follow. No such model exists.
    Raises ValueError outside.
    """
    from transformers import LlamaConfig

    sizes = _sizes()
    size, nearest = min(sizes, key=lambda pair: abs(math.log(pair[0] / parameters)))
    if abs(math.log(size / parameters)) <= math.log(_NEAR):
        return llama_config(nearest)
    if not sizes[0][0] < parameters < sizes[-1][0]:
        raise ValueError(f"Llama models from {sizes[0][0]:,} to {sizes[-1][0]:,} parameters are known, not of {parameters:,.0f}")
    (less, small), (more, large) = next(pair for pair in zip(sizes, sizes[1:]) if pair[0][0] < parameters < pair[1][0])
    small, large, way = llama_config(small), llama_config(large), math.log(parameters / less) / math.log(more / less)

    def between(feature):
        return feature(small) ** (1 - way) * feature(large) ** way

    layers = round(between(lambda c: c.num_hidden_layers))
    group = round(between(lambda c: c.num_attention_heads / c.num_key_value_heads))
    mlp = between(lambda c: c.intermediate_size / c.hidden_size)
    head, square = small.hidden_size // small.num_attention_heads, layers * (2 + 2 / group)
    embeddings = (1 if small.tie_word_embeddings else 2) * small.vocab_size
    # The width h solves (square + 3 layers mlp) h^2 + embeddings h = parameters; rounded to whole heads, the MLP makes up for the rest.
    a = square + 3 * layers * mlp
    wanted = (math.sqrt(embeddings**2 + 4 * a * parameters) - embeddings) / (2 * a)
    groups = max(1, round(wanted / (head * group)))
    width = groups * group * head
    return LlamaConfig(
        hidden_size=width, intermediate_size=round((parameters / width - square * width - embeddings) / (3 * layers)), num_hidden_layers=layers,
        num_attention_heads=groups * group, num_key_value_heads=groups, vocab_size=small.vocab_size, tie_word_embeddings=small.tie_word_embeddings,
    )


@cache
def _sizes():
    """(parameters, name) of the models in LLAMAS, from small to large."""
    return sorted((llama_parameters(llama_config(name)), name) for name in LLAMAS)


def measured_bytes(model, optimizer=None) -> dict[str, int]:
    """Bytes that a real model holds between two steps: the kinds of `Training.bytes` that are static, and "buffers".

    Parameters, with bitsandbytes' packed weights and their constants; gradients where there are any; the state of `optimizer`.
    Adapters are peft's LoRA and labkit's bottlenecks. Storage that several tensors share counts once. Works on the meta device, too.
    """
    found = dict.fromkeys((*KINDS[:5], "buffers"), 0)
    constants = {}
    for name, parameter in model.named_parameters():
        found["adapters" if "lora_" in name or "bottleneck_adapters" in name else "weights"] += parameter.nbytes
        found["gradients"] += 0 if parameter.grad is None else parameter.grad.nbytes
        for tensor in _tensors_of(getattr(parameter, "quant_state", None)):
            constants[tensor.data_ptr()] = tensor.nbytes
    found["quantisation constants"] = sum(constants.values())
    found["buffers"] = sum(buffer.nbytes for buffer in model.buffers())
    if optimizer is not None:
        states = optimizer.state.values()
        found["optimiser"] = sum(value.nbytes for state in states for value in state.values() if isinstance(value, torch.Tensor))
    return found


def _tensors_of(state):
    """The tensors of a bitsandbytes QuantState: constants, code and offset, and those of its own quantisation."""
    if state is None:
        return []
    own = [value for value in (state.absmax, state.code, state.offset) if isinstance(value, torch.Tensor)]
    return own + _tensors_of(state.state2)


def measured_activation_bytes(model, **batch) -> int:
    """Bytes that `model(**batch)` saves for the backward pass, beside its parameters: what autograd hands to a hook.

    batch: with labels the loss is among it. Storage that several saved tensors share counts once. A checkpointed layer counts by its input.
    """
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**batch)
    return sum(storage.nbytes() for storage in saved.values())
