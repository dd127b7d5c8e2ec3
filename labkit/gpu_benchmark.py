"""Fine-tuning a Llama model with random weights, measured on one device: bytes by kind, peak memory, tokens a second.

The same bytes by arithmetic are in memory_calculator.py; the speed of the robot's own parts is in benchmarks.py.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from labkit.errors import UserError
from labkit.memory_calculator import KINDS, Training, measured_bytes
from labkit.paths import DATA

STORED = DATA / "benchmarks" / "gpu.json"
# OpenVLA sees 256 patches; the words of an instruction and seven action tokens come on top.
MODEL, SEQUENCE = "llama-2-7b", 290
# Label -> what is trained. bfloat16 moments are what PyTorch's AdamW keeps for bfloat16 parameters.
SETTINGS = {
    "full, bf16 alone": Training(MODEL, "full", moments="bfloat16", batch=1, sequence=SEQUENCE, checkpointing=True),
    "full, fp32 master copy": Training(MODEL, "full", master_copy=True, batch=1, sequence=SEQUENCE, checkpointing=True),
    "LoRA, batch 1": Training(MODEL, "lora", batch=1, sequence=SEQUENCE),
    "LoRA, batch 16": Training(MODEL, "lora", batch=16, sequence=SEQUENCE),
    "QLoRA, batch 1": Training(MODEL, "qlora", batch=1, sequence=SEQUENCE),
    "QLoRA, batch 8": Training(MODEL, "qlora", batch=8, sequence=SEQUENCE),
    "QLoRA, batch 16": Training(MODEL, "qlora", batch=16, sequence=SEQUENCE),
    "QLoRA, batch 16, checkpointing": Training(MODEL, "qlora", batch=16, sequence=SEQUENCE, checkpointing=True),
}
STEPS, WARM_UP = 5, 2
_VERSIONS = ("torch", "transformers", "peft", "bitsandbytes")


@dataclass(frozen=True)
class Measurement:
    """One setting on one device.

    measured: bytes by kind that the real tensors hold after a backward pass, see `memory_calculator.measured_bytes`; None where it did not run.
    calculated: the same by arithmetic, activations included.   peak: largest number of bytes ever allocated in a step, None on a CPU, which
    does not count them.   tokens_per_second: of the whole step, None where it did not run.   note: why something is None.
    """

    label: str
    setting: dict
    measured: dict | None
    calculated: dict
    peak: int | None
    tokens_per_second: float | None
    note: str = ""

    def __str__(self):
        if self.measured is None:
            return f"{self.label}: {self.note}"
        peak = f"peak {amount(self.peak)}" if self.peak else self.note
        static = sum(self.calculated.values()) - self.calculated["activations"]
        return (f"{self.label}: {amount(sum(self.measured.values()))} static (calculated {amount(static)}), {peak}, "
                f"{self.tokens_per_second:,.0f} tokens/s")


def amount(size: float) -> str:
    """Bytes in words: MB, GB or TB, which are powers of ten."""
    unit, name = next((unit, name) for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")) if size >= unit or name == "MB")
    return f"{size / unit:.3g} {name}"


def measure(label: str, training: Training, device: str | torch.device = "cuda", steps: int = STEPS, warm_up: int = WARM_UP,
            seed: int = 0) -> Measurement:
    """Fine-tune a model with random weights on random tokens for a few steps.

    device: any that torch knows; peak memory is counted on CUDA alone.   warm_up: steps before the clock and the peak start; at least 1.
    A setting that does not fit into the device's memory gives a Measurement that says so.
    Raises ValueError for a setting that this cannot run: no batch, or moments in another dtype than the parameters they belong to.
    """
    device = torch.device(device)
    _refuse_what_cannot_run(training, warm_up)
    calculated = training.bytes()
    too_large = _too_large(training.static(), device)
    if too_large:
        return Measurement(label, _plain(training), None, calculated, None, None, too_large)
    try:
        measured, peak, rate = _run(training, device, steps, warm_up, seed)
    except torch.OutOfMemoryError:
        return Measurement(label, _plain(training), None, calculated, None, None, f"out of memory on this {device.type}")
    finally:
        _release(device)
    return Measurement(label, _plain(training), measured, calculated, peak, rate, "" if peak else f"no peak: {device.type} memory is not counted")


def _refuse_what_cannot_run(training, warm_up):
    if training.batch < 1:
        raise ValueError("a step needs a batch of at least 1")
    if warm_up < 1:
        raise ValueError("warm_up is at least 1: the optimiser's moments are made in the first step")
    trained = training.weights if training.method == "full" else training.adapters
    kept = "float32" if training.master_copy else trained
    if training.moments != kept or (training.gradients or training.weights) != training.weights:
        raise ValueError(f"PyTorch's AdamW keeps moments in {kept} here, not in {training.moments}, and gradients in the dtype of the parameters")


def _run(training, device, steps, warm_up, seed):
    run = _Run(training, device, seed)
    for _ in range(warm_up):
        run.step()
    _reset_peak(device)
    begun = time.perf_counter()
    for _ in range(steps):
        run.step()
    peak = _peak(device)
    seconds = time.perf_counter() - begun
    return run.bytes(), peak, steps * run.tokens.numel() / seconds


def static_bytes(training: Training, device: str | torch.device = "cpu", seed: int = 0) -> dict[str, int]:
    """Bytes by kind that real tensors hold after one step: `memory_calculator.measured_bytes`, and the master copy where there is one.

    Raises ValueError as `measure` does.
    """
    _refuse_what_cannot_run(training, warm_up=1)
    run = _Run(training, torch.device(device), seed)
    run.step()
    return run.bytes()


class _Run:
    """A model, its optimiser and a batch of random tokens, ready to step."""

    def __init__(self, training, device, seed):
        self.model = random_model(training, device, seed).train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = MasterCopyAdamW(trained) if training.master_copy else torch.optim.AdamW(trained, lr=1e-5)
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(training.config.vocab_size, (training.batch, training.sequence), generator=generator).to(device)

    def step(self):
        self.optimiser.zero_grad(set_to_none=True)
        self.model(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss.backward()
        self.optimiser.step()

    def bytes(self):
        found = measured_bytes(self.model, self.optimiser)
        if isinstance(self.optimiser, MasterCopyAdamW):
            found["master copy"] = self.optimiser.master_bytes()
        return found


def random_model(training: Training, device: str | torch.device, seed: int = 0):
    """The model of a setting with weights drawn on `device`, one layer at a time, so that no other copy of it ever exists.

    method "qlora": each linear layer but the head becomes bitsandbytes' NF4 as soon as it is drawn.   "lora", "qlora": with peft's LoRA.
    """
    from transformers import LlamaForCausalLM

    dtype, device = getattr(torch, training.weights), torch.device(device)
    with torch.device("meta"):
        model = LlamaForCausalLM(training.config).to(dtype)
    generator = torch.Generator(device).manual_seed(seed)
    for name, module in list(model.named_modules()):
        if training.method == "qlora" and isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, _nf4_layer(module, training, device, generator))
        else:
            _draw(module, device, generator)
    model.tie_weights()
    # The only buffers are the rotary embedding's frequencies, which are computed and not drawn.
    model.model.rotary_emb = type(model.model.rotary_emb)(training.config).to(device)
    if training.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model if training.method == "full" else _with_lora(model, training, seed)


def _draw(module, device, generator):
    """Give a module's own parameters, not those of its parts, a place on the device and values: matrices random ones, norms 1."""
    for name, parameter in module.named_parameters(recurse=False):
        values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        values = values.normal_(0, 0.02, generator=generator) if values.ndim > 1 else values.fill_(1)
        setattr(module, name, nn.Parameter(values))


def _nf4_layer(linear, training, device, generator):
    from bitsandbytes.nn import Linear4bit, Params4bit

    dtype, double = linear.weight.dtype, training.double_quantisation
    weight = torch.empty(linear.weight.shape, dtype=dtype, device=device).normal_(0, 0.02, generator=generator)
    layer = Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, compress_statistics=double, quant_type="nf4",
                       device="meta")
    layer.weight = Params4bit(weight, requires_grad=False, compress_statistics=double, quant_type="nf4", module=layer).to(device)
    # Repacked weights would train LoRA with gradients of zero: see policy.py.
    layer.support_avx512bf16_for_cpu = False
    return layer


def _with_lora(model, training, seed):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=training.rank, lora_alpha=2 * training.rank, target_modules=list(training.targets))
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # peft draws from the global generators
        return get_peft_model(model, config, autocast_adapter_dtype=training.adapters == "float32")


class MasterCopyAdamW:
    """AdamW on a float32 copy of every parameter, written back after each step: mixed-precision training as it is usually counted."""

    def __init__(self, parameters, learning_rate: float = 1e-5):
        self.parameters = list(parameters)
        self.masters = [nn.Parameter(p.detach().float().clone()) for p in self.parameters]
        # One optimiser a parameter: a float32 gradient then lives for one parameter at a time.
        self.optimisers = [torch.optim.AdamW([master], lr=learning_rate) for master in self.masters]

    @property
    def state(self) -> dict:
        """As of a torch optimiser: parameter -> its moments."""
        return {key: value for optimiser in self.optimisers for key, value in optimiser.state.items()}

    def master_bytes(self) -> int:
        """Bytes of the copy."""
        return sum(master.nbytes for master in self.masters)

    @torch.no_grad()
    def step(self):
        """One step of every parameter that has a gradient."""
        for parameter, master, optimiser in zip(self.parameters, self.masters, self.optimisers):
            if parameter.grad is not None:
                master.grad = parameter.grad.float()
                optimiser.step()
                master.grad = None
                parameter.copy_(master)

    def zero_grad(self, set_to_none: bool = True):
        """Forget the gradients of the parameters, as a torch optimiser does."""
        for parameter in self.parameters:
            parameter.grad = None


def _memory(device):
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_host_memory()


def _free_host_memory():
    import psutil

    return psutil.virtual_memory().available


def _too_large(needed, device):
    """Why a setting of so many static bytes is not tried; empty where it is."""
    free = _memory(device)
    return f"not run: {amount(needed)} static, {amount(free)} free on this {device.type}" if needed > free else ""


def _reset_peak(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device):
    """Largest number of bytes allocated since `_reset_peak`, after everything that was started has ended; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def _release(device):
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure_all(settings: dict[str, Training], device: str | torch.device, report: Callable[[Measurement], None] = print) -> list[Measurement]:
    """Measure one setting after the other.   settings: label -> Training.   report: called after each."""
    found = []
    for label, training in settings.items():
        found.append(measure(label, training, device))
        report(found[-1])
    return found


def run_benchmark(device: str | torch.device = "cuda", settings: dict[str, Training] | None = None, path: Path = STORED,
                  report: Callable[[Measurement], None] = print) -> Path:
    """Measure every setting on a GPU and store the measurements with their provenance; returns the file.

    settings: default SETTINGS.   Raises UserError where there is no CUDA GPU and `device` asks for one: nothing else is stored in its place.
    """
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA GPU on this machine, so that nothing was measured; the calculator of lesson 5 gives the arithmetic")
    return store(measure_all(settings or SETTINGS, device, report), device, Path(path))


def store(measurements: Iterable[Measurement], device: torch.device, path: Path) -> Path:
    """Write measurements and where they come from as JSON; an older file is replaced in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    text = json.dumps({"about": provenance(device), "measurements": [asdict(m) for m in measurements]}, indent=1)
    unfinished.write_text(text + "\n", encoding="utf-8")
    os.replace(unfinished, path)
    return path


def provenance(device: torch.device) -> dict:
    """Where measurements come from: what is measured, the command, the date, versions and the device."""
    about = {
        "measures": "fine-tuning of Llama models with random weights on random tokens: static bytes by kind, peak allocated bytes, tokens a second",
        "command": "python3 -m labkit benchmark --gpu",
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version(), **{package: version(package) for package in _VERSIONS}},
        "device": {"type": device.type, "name": platform.machine()},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about["device"] = {"type": "cuda", "name": properties.name, "bytes": properties.total_memory}
        about["versions"]["cuda"] = torch.version.cuda
    return about


def load_measurements(path: Path = STORED) -> tuple[list[Measurement], str]:
    """Stored measurements, and one sentence that says where they come from, or that nothing was measured, and which command would do it."""
    if not Path(path).exists():
        return [], "Not measured here: no CUDA GPU was at hand, so what follows is arithmetic (`python3 -m labkit benchmark --gpu` measures it)."
    stored = json.loads(Path(path).read_text(encoding="utf-8"))
    return [Measurement(**m) for m in stored["measurements"]], f"Measured before, {_where(stored['about'])}."


def measured_here_or_stored(settings: dict[str, Training] | None = None, path: Path = STORED,
                            report: Callable[[Measurement], None] = lambda measurement: None) -> tuple[list[Measurement], str]:
    """On a machine with a CUDA GPU every setting is measured, and nothing stored; elsewhere as `load_measurements`."""
    if not torch.cuda.is_available():
        return load_measurements(path)
    return measure_all(settings or SETTINGS, "cuda", report), f"Measured here, {_where(provenance(torch.device('cuda')))}."


def _where(about):
    return f"on {about['device']['name']} ({about['device']['type']}), {about['date']}, torch {about['versions']['torch']}"


def _plain(training):
    """A setting as JSON can hold it; a configuration becomes its number of parameters."""
    setting = asdict(training) | {"targets": list(training.targets)}
    return setting if isinstance(training.model, (str, int, float)) else setting | {"model": training.parameters}


def kinds_of(measurement: Measurement) -> dict[str, tuple[int | None, int]]:
    """kind -> (measured bytes or None, calculated bytes), for every kind of the calculator that is not empty."""
    measured = measurement.measured or {}
    return {kind: (measured.get(kind), measurement.calculated[kind]) for kind in KINDS if measurement.calculated[kind] or measured.get(kind)}
