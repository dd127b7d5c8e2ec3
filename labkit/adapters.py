"""The bottleneck adapter (Houlsby et al., arXiv 1902.00751) for any transformers model: add, choose, switch off, save, load, remove.

LoRA is peft's. Training an adapter is in sft.py; `fine_tune` takes a `BottleneckConfig` where it takes a peft configuration.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import nn

from labkit.errors import UserError

PLACEMENTS = ("layer", "houlsby")
ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What peft calls the method in the same file, so that its loader refuses ours by name.
PEFT_TYPE = "BOTTLENECK"
_PARTS = ("down.weight", "down.bias", "up.weight", "up.bias")
_CHILD = "bottleneck_adapters"
_RECORD = "_bottleneck_record"
# The names that decoder layers give their two halves, in transformers' models.
_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_MLP = ("mlp", "feed_forward", "ffn")


@dataclass(frozen=True)
class BottleneckConfig:
    """What adapters to add.

    bottleneck: m, the width inside.   placement: "layer" (one adapter after each transformer layer) or "houlsby" (two: on the output of
    the attention and of the MLP, before each is added to the residual stream).   activation: "gelu", "relu", "silu" or "tanh".
    init_std: standard deviation of W_up at the start; 0 makes the adapter the identity, bit for bit.
    Raises ValueError for anything else.
    """

    bottleneck: int = 16
    placement: str = "layer"
    activation: str = "gelu"
    init_std: float = 0.0

    def __post_init__(self):
        if isinstance(self.bottleneck, bool) or not isinstance(self.bottleneck, int) or self.bottleneck < 1:
            raise ValueError(f"bottleneck is a whole number from 1 on, not {self.bottleneck!r}")
        if self.placement not in PLACEMENTS:
            raise ValueError(f"placement is 'layer' or 'houlsby', not {self.placement!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is one of {', '.join(ACTIVATIONS)}, not {self.activation!r}")
        if isinstance(self.init_std, bool) or not isinstance(self.init_std, (int, float)) or not 0 <= self.init_std < float("inf"):
            raise ValueError(f"init_std is a number from 0 on, not {self.init_std!r}")

    def add_to(self, model, seed: int = 0):
        """Add these adapters to `model`, freeze the rest, and return the model: what `fine_tune` asks of a configuration of ours."""
        return add_adapter(model, self, seed=seed)


class BottleneckAdapter(nn.Sequential):
    """h + W_up sigma(W_down h): down-projection, nonlinearity, up-projection, residual.

    width: d, of the hidden state.   bottleneck: m.   `down` and `up` are linear layers with biases: 2 m d + m + d parameters.
    """

    def __init__(self, width: int, bottleneck: int, activation: str = "gelu"):
        super().__init__(OrderedDict(down=nn.Linear(width, bottleneck), inside=ACTIVATIONS[activation](), up=nn.Linear(bottleneck, width)))

    def forward(self, hidden):
        """hidden: (..., width) float   ->   the same shape."""
        return super().forward(hidden).add(hidden)


def adapter_size(width: int, bottleneck: int, layers: int, per_layer: int = 1, bias: bool = True) -> int:
    """How many parameters the adapters of a model have: 2 m d each, with biases m + d more (Houlsby et al., section 2.1)."""
    shapes = [(bottleneck, width), (width, bottleneck)] + ([(bottleneck,), (width,)] if bias else [])
    return layers * per_layer * sum(map(prod, shapes))


def identity_state(noise, std: float) -> dict[str, torch.Tensor]:
    """The tensors with which an adapter is the identity and can learn: W_up and both biases zero, W_down not.

    noise: (m, d) standard normal numbers.   std: what W_down's are multiplied by.
    Returns `down.weight` (m, d), `down.bias` (m,), `up.weight` (d, m), `up.bias` (d,).
    """
    with torch.device("meta"):  # names and shapes, without numbers
        of_an_adapter = BottleneckAdapter(*reversed(noise.shape)).state_dict()
    state = {name: noise.new_zeros(tensor.shape) for name, tensor in of_an_adapter.items()}
    state["down.weight"] += std * noise
    return state


def decoder_layers(model) -> nn.ModuleList:
    """The transformer layers of a model's language model, in order; the vision tower's are not among them.

    Raises ValueError for a model in which they cannot be found.
    """
    config = getattr(model, "config", None)
    count = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None) if config is not None else None
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(f"no list of transformer layers was found in {type(model).__name__}: adapters need a transformers model with a decoder")


@dataclass
class _Record:
    """What a model carries beside its adapters.   trainable: names of the parameters that required a gradient before the first one."""

    configs: dict[str, BottleneckConfig] = field(default_factory=dict)
    trainable: frozenset[str] = frozenset()
    acting: str | None = None


class _Site(nn.Module):
    """All adapters behind one module of the model, hooked to its output; at most one of them acts.

    It is a child of that module, so that moving, copying and counting the model takes the adapters along.
    """

    def __init__(self, host):
        super().__init__()
        self.adapters, self.acting = nn.ModuleDict(), None
        host.add_module(_CHILD, self)
        # A bound method is copied with its object: the hook of a copied model runs the copied adapter.
        self.handle = host.register_forward_hook(self.after)

    def after(self, host, inputs, output):
        """A forward hook: the output with the acting adapter applied; None, which keeps the output itself, where none acts."""
        if self.acting not in self.adapters:
            return None
        adapter = self.adapters[self.acting]
        hidden, *others = output if isinstance(output, tuple) else (output,)
        adapted = adapter(hidden.to(adapter.down.weight.dtype)).to(hidden.dtype)
        return (adapted, *others) if isinstance(output, tuple) else adapted


def add_adapter(model, config: BottleneckConfig, name: str = "default", seed: int = 0, build: Callable[[int, int], nn.Module] | None = None):
    """Add adapters to `model` in place, freeze everything else, and let them act; returns the model.

    name: several sets of adapters can sit on one model, see `set_adapter`.   seed: of the random numbers at the start.
    build: callable (width, bottleneck) -> module with linear layers `down` and `up`; default `BottleneckAdapter`.
    W_down starts with standard deviation 1 / sqrt(width), W_up with config.init_std, the biases with 0. Adapters of a model in half
    precision are kept in float32, as peft does.   Raises ValueError for a name that is taken, or a model whose layers are not known.
    """
    if not name or "." in name:
        raise ValueError(f"an adapter's name is not empty and holds no dot: {name!r}")
    hosts = _hosts(model, config.placement).values()
    record = getattr(model, _RECORD, None)
    if record is None:
        record = _Record(trainable=frozenset(n for n, p in model.named_parameters() if p.requires_grad))
    if name in record.configs:
        raise ValueError(f"the model has adapters called {name!r} already; choose another name, or remove them")
    build = build or partial(BottleneckAdapter, activation=config.activation)
    generator, width = torch.Generator().manual_seed(seed), _width(model)
    made = [_started(build(width, config.bottleneck), config.init_std, generator).to(**_like(host)) for host in hosts]
    for host, adapter in zip(hosts, made):
        site = getattr(host, _CHILD, None) or _Site(host)
        site.adapters[name] = adapter
    setattr(model, _RECORD, record)
    record.configs[name] = config
    set_adapter(model, name)
    return model


def set_adapter(model, name: str | None, trainable: bool = True):
    """Let the adapters called `name` act, and no others; None: none, the base model acts.

    trainable: whether their parameters require gradients; all other parameters of the model do not.   Raises ValueError for an unknown name.
    """
    record = _record(model)
    if name is not None and name not in record.configs:
        raise ValueError(f"the model has no adapters called {name!r}; it has {', '.join(record.configs)}")
    _let_act(model, name)
    model.requires_grad_(False)
    for _, site in _sites(model):
        if name in site.adapters:
            site.adapters[name].requires_grad_(trainable)


@contextmanager
def disabled(model):
    """Within this context the model is the base model: no adapter acts, and its output is the base's, bit for bit, whatever was trained.

    Inside, the base's parameters require gradients as they did before the first adapter came. That is not for training: PyTorch multiplies
    by a matrix that needs no gradient with another kernel, whose last bit may differ (`should_fold` in aten/src/ATen/native/LinearAlgebra.cpp).
    """
    record = _record(model)
    acting, trained = record.acting, {name for name, p in model.named_parameters() if p.requires_grad}
    try:
        _let_act(model, None)
        _train_only(model, record.trainable)
        yield model
    finally:
        _let_act(model, acting)
        _train_only(model, trained)


def adapters_of(model) -> dict[str, BottleneckConfig]:
    """Name -> configuration of the adapters that sit on the model; empty where there are none."""
    record = getattr(model, _RECORD, None)
    return {} if record is None else dict(record.configs)


def remove_adapters(model, *names: str):
    """Take away the adapters with these names, or all; with the last ones the model is again what it was, to the bit. Returns the model.

    Raises ValueError for an unknown name, or a model without adapters.
    """
    record = _record(model)
    unknown = [name for name in names if name not in record.configs]
    if unknown:
        raise ValueError(f"the model has no adapters called {unknown[0]!r}; it has {', '.join(record.configs)}")
    for name in names or tuple(record.configs):
        del record.configs[name]
        for host, site in _sites(model):
            if name in site.adapters:
                del site.adapters[name]
            if not site.adapters:
                site.handle.remove()
                delattr(host, _CHILD)
        if record.acting == name:
            set_adapter(model, None)
    if not record.configs:
        delattr(model, _RECORD)
        _train_only(model, record.trainable)
    return model


def _hosts(model, placement):
    """Where adapters go, by a name that does not depend on the model's family -> the module whose output they change."""
    hosts = {}
    for i, layer in enumerate(decoder_layers(model)):
        if placement == "layer":
            hosts[f"layers.{i}.output"] = layer
            continue
        for half, names in (("attention", _ATTENTION), ("mlp", _MLP)):
            found = [getattr(layer, name) for name in names if isinstance(getattr(layer, name, None), nn.Module)]
            if not found:
                raise ValueError(f"{type(layer).__name__} has no module for its {half} ({', '.join(names)}): use placement='layer'")
            hosts[f"layers.{i}.{half}"] = found[0]
    return hosts


def _started(adapter, std, generator):
    """The adapter at its beginning. Numbers are drawn on the CPU, so that every device gets the same ones."""
    noise = torch.randn(adapter.down.weight.shape, generator=generator)
    state = identity_state(noise, noise.shape[1] ** -0.5)
    state["up.weight"] = std * torch.randn(adapter.up.weight.shape, generator=generator)
    adapter.load_state_dict(state)
    return adapter


def _like(host):
    """Device of the module, and the dtype its adapter should have. Quantized weights are whole numbers and say nothing about it."""
    floats = [p for p in host.parameters() if p.is_floating_point()]
    device = (floats or list(host.parameters()))[0].device
    precise = floats and floats[0].dtype == torch.float64
    return {"device": device, "dtype": torch.float64 if precise else torch.float32}


def _width(model):
    return model.config.get_text_config(decoder=True).hidden_size


def _sites(model):
    """(module of the model, the site at it), of all that have one."""
    return [(module, getattr(module, _CHILD)) for module in model.modules() if isinstance(getattr(module, _CHILD, None), _Site)]


def _let_act(model, name):
    _record(model).acting = name
    for _, site in _sites(model):
        site.acting = name


def _train_only(model, names):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)


def _record(model) -> _Record:
    record = getattr(model, _RECORD, None)
    if record is None:
        raise ValueError(f"this {type(model).__name__} has no bottleneck adapters; add some with add_adapter(model, BottleneckConfig())")
    return record


def save_adapter(model, folder, name: str | None = None):
    """Write one set of adapters to `folder`: safetensors and a JSON file, nothing pickled, nothing of the base model.

    name: default, the one that acts, or the only one there is.   Raises ValueError where that is not one.
    """
    from safetensors.torch import save_file

    record, folder = _record(model), Path(folder)
    name = name or record.acting or (list(record.configs)[0] if len(record.configs) == 1 else None)
    if name not in record.configs:
        raise ValueError(f"which adapters should be saved? The model has {', '.join(record.configs)}")
    config = record.configs[name]
    about = {"peft_type": PEFT_TYPE, **asdict(config), "base": _base(model)}
    tensors = {f"{place}.{part}": tensor.detach().contiguous() for place, host in _hosts(model, config.placement).items()
               for part, tensor in getattr(host, _CHILD).adapters[name].state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def save_adapters(model, folder):
    """Write all adapters of the model: a single set to `folder` itself, several to one folder each, called by their names."""
    names = list(adapters_of(model))
    for name in names:
        save_adapter(model, Path(folder) if len(names) == 1 else Path(folder) / name, name)


def load_adapter(model, folder, name: str = "default", trainable: bool = False):
    """Add the adapters that `save_adapter` wrote to `folder` and let them act; returns the model.

    Raises UserError, one sentence that names the file and the fix, where a file is missing or broken or the adapters belong to another
    model; the model is then as it was. Raises ValueError for a name that is taken.
    """
    folder = Path(folder)
    about = _read_about(folder / CONFIG)
    config = _config(folder / CONFIG, about)
    _refuse_another_model(folder / CONFIG, about.get("base"), _base(model))
    tensors = _read_tensors(folder / WEIGHTS)
    hosts = _hosts(model, config.placement)
    _refuse_other_shapes(folder / WEIGHTS, tensors, hosts, _width(model), config.bottleneck)
    add_adapter(model, config, name)
    with torch.no_grad():
        for place, host in hosts.items():
            for part, parameter in getattr(host, _CHILD).adapters[name].named_parameters():
                parameter.copy_(tensors[f"{place}.{part}"])
    set_adapter(model, name, trainable)
    return model


def holds_bottleneck(folder) -> bool:
    """Whether the adapter in `folder` is one of ours (peft's have another type in the same file)."""
    try:
        return _read_about(Path(folder) / CONFIG).get("peft_type") == PEFT_TYPE
    except UserError:
        return False


def _base(model):
    text = model.config.get_text_config(decoder=True)
    return {"model_type": model.config.model_type, "width": text.hidden_size, "layers": text.num_hidden_layers}


def _read_about(path):
    if not path.is_file():
        raise UserError(f"{path} is missing: give the folder that save_adapter wrote.")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}): save the adapters again.") from error
    if not isinstance(about, dict):
        raise UserError(f"{path} holds no JSON object: save the adapters again.")
    return about


def _config(path, about):
    if about.get("peft_type") != PEFT_TYPE:
        raise UserError(f"{path} describes adapters of the type {about.get('peft_type')}, not {PEFT_TYPE}: load them with "
                        "load_policy(adapter=...) or peft.")
    names = BottleneckConfig.__dataclass_fields__
    missing = [name for name in names if name not in about]
    if missing:
        raise UserError(f"{path} has no entry {missing[0]!r}: save the adapters again.")
    try:
        return BottleneckConfig(**{name: about[name] for name in names})
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: {error}; save the adapters again.") from error


def _refuse_another_model(path, made_for, model):
    said = {"model_type": "a {} model", "width": "layers that are {} wide", "layers": "{} layers"}
    if not isinstance(made_for, dict):
        raise UserError(f"{path} does not say which model the adapters belong to: save the adapters again.")
    for key, words in said.items():
        if made_for.get(key) != model[key]:
            raise UserError(f"{path}: the adapters were made for {words.format(made_for.get(key))}, this model has "
                            f"{words.format(model[key])}: load them into the model that they were trained with.")


def _read_tensors(path):
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise UserError(f"{path} is missing: give the folder that save_adapter wrote, with both files.")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({' '.join(str(error).split())[:200]}): save the adapters again.") from error


def _refuse_other_shapes(path, tensors, hosts, width, bottleneck):
    shapes = dict(zip(_PARTS, ((bottleneck, width), (bottleneck,), (width, bottleneck), (width,))))
    wanted = {f"{place}.{part}": shape for place in hosts for part, shape in shapes.items()}
    strange = sorted(set(tensors) ^ set(wanted))
    if strange:
        raise UserError(f"{path}: {strange[0]} is {'missing' if strange[0] in wanted else 'not expected'} (one of {len(strange)} such tensors): "
                        "save the adapters again.")
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != shape:
            raise UserError(f"{path}: {name} has the shape {tuple(tensors[name].shape)}, this model and {CONFIG} ask for {shape}: "
                            "load it into the model that it was trained with.")
