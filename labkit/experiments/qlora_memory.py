"""Does the memory calculator tell the truth? The static bytes of real models with random weights, as large as a machine of 24 GB holds."""

from __future__ import annotations

from dataclasses import replace

from labkit.gpu_benchmark import static_bytes
from labkit.memory_calculator import Training

ABOUT = ("static bytes, by kind, of Llama models with random weights on a CPU after one step of full fine-tuning, LoRA or QLoRA (rank 16 on the "
         "attention's projections), beside what the calculator says")
# Each with the methods that fit into 24 GB, with room for others.
SIZES = {
    "stories-15m": ("full", "full with a master copy", "lora", "qlora"),
    "stories-110m": ("full", "full with a master copy", "lora", "qlora"),
    "tinyllama-1.1b": ("full", "lora", "qlora"),
    "open-llama-3b": ("lora", "qlora"),
    "llama-2-7b": ("qlora",),
}
METHODS = {
    "full": dict(method="full", moments="bfloat16"), "full with a master copy": dict(method="full", master_copy=True),
    "lora": dict(method="lora"), "qlora": dict(method="qlora"),
}


def points() -> list[dict]:
    """Every size with the methods that fit."""
    return [{"model": model, "method": method} for model, methods in SIZES.items() for method in methods]


def setting(point: dict) -> Training:
    """What a point trains: one sequence of 16 tokens, since only what stays between two steps is looked at."""
    return Training(point["model"], **METHODS[point["method"]], batch=1, sequence=16)


def run(point: dict) -> dict:
    """Bytes by kind, measured and calculated."""
    training = setting(point)
    return {"parameters": training.parameters, "measured": static_bytes(training, "cpu"), "calculated": replace(training, batch=0).bytes()}
