"""What the recipes of the pretrainings share: the digest that names their state on disk, and the course of a learning rate."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict


def digest_of(recipe) -> str:
    """Eight hexadecimal digits that tell a recipe, a dataclass, from any other."""
    return hashlib.sha256(json.dumps(asdict(recipe), sort_keys=True).encode()).hexdigest()[:8]


def half_cosine(step: int, steps: int, warm_up: int, final_rate: float) -> float:
    """Share of the peak at a step: a linear warm-up, then half a cosine down to `final_rate`."""
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return final_rate + (1 - final_rate) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
