"""Augmentation for regression: other colours, crops, noise and words around the same action. It makes no scenes; recording.py does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from labkit.demonstrations import Demonstration
from labkit.instructions import Command, say
from labkit.waypoint_regression import WaypointSamples


@dataclass(frozen=True)
class Augmentation:
    """What may change in a sample, drawn anew for each sample and epoch; `fit(augment=...)` calls it. All frames of a sample change alike.

    colour: largest change of brightness, of contrast, and of the gain of each colour channel, as a share.   crop: pixels by which the picture
    may move, up or down, left or right; the edge is repeated. The action stays, so a crop claims that the camera moves and the robot need not know.
    noise: standard deviation of what is added to every value, in grey levels of 255.
    commands: episode id -> what its instruction means, to say it in other words; episodes without one keep their sentence.
    """

    colour: float = 0.0
    crop: int = 0
    noise: float = 0.0
    commands: Mapping[str, Command] = field(default_factory=dict)
    seed: int = 0

    def __call__(self, samples: WaypointSamples, epoch: int) -> WaypointSamples:
        """The samples of one epoch: the same seed and epoch give the same ones. ids, holding and actions are untouched."""
        rng = np.random.default_rng([self.seed, epoch])
        images = samples.images
        if self.colour:
            images = _recoloured(images, self.colour, rng)
        if self.crop:
            images = _cropped(images, self.crop, rng)
        if self.noise:
            images = _as_bytes(images + rng.normal(0.0, self.noise, images.shape))
        said = [self._said(id, sentence, rng) for id, sentence in zip(samples.ids, samples.instructions)]
        return replace(samples, images=images, instructions=said)

    def _said(self, id, sentence, rng):
        command = self.commands.get(id.rpartition("/")[0])
        return sentence if command is None else say(command, rng)


def commands_of(demonstrations: Iterable[Demonstration]) -> dict[str, Command]:
    """Episode id -> command, of the demonstrations that know theirs."""
    return {d.id: d.command for d in demonstrations if d.command is not None}


def _as_bytes(values):
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _recoloured(images, most, rng):
    """images: (N, frames, H, W, 3) uint8. Contrast around each sample's own mean, then the gain of each channel, then brightness."""
    count = len(images)
    contrast, brightness = (rng.uniform(1 - most, 1 + most, (count, 1, 1, 1, 1)) for _ in range(2))
    gains = rng.uniform(1 - most, 1 + most, (count, 1, 1, 1, 3))
    mean = images.mean((1, 2, 3, 4), keepdims=True)
    return _as_bytes(((images - mean) * contrast + mean) * gains * brightness)


def _cropped(images, most, rng):
    """images: (N, frames, H, W, 3) uint8, each moved by whole pixels."""
    height, width = images.shape[2:4]
    padded = np.pad(images, ((0, 0), (0, 0), (most, most), (most, most), (0, 0)), mode="edge")
    moves = rng.integers(0, 2 * most + 1, (len(images), 2))
    return np.stack([picture[:, down : down + height, right : right + width] for picture, (down, right) in zip(padded, moves)])
