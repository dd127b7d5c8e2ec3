"""How every lesson starts: versions, device, threads, seed and the look of the figures, in one call."""

from __future__ import annotations

import platform
from importlib.metadata import version

from labkit.processes import THREADS

_SHOWN = ("torch", "transformers", "peft", "mujoco", "gymnasium")


def set_up(seed: int = 0, threads: int = int(THREADS["OMP_NUM_THREADS"])) -> str:
    """Prepare a notebook and print one line about where it runs; returns the device, "cuda" or "cpu".

    threads: the course's number; another one gives other rounding, and so other figures.
    seed: for torch's global generator, which only code of a lesson itself may draw from; labkit's functions take their own seeds.
    """
    import torch

    from labkit.plots import style
    from labkit.quiet import quiet_libraries

    quiet_libraries()
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    style()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    versions = ", ".join(f"{name} {version(name)}" for name in _SHOWN)
    print(f"Python {platform.python_version()}, {versions}; {device}, {threads} thread{'s' * (threads > 1)}, seed {seed}")
    return device
