"""What a policy has seen and read once need not be encoded again: a cache of pictures and sentences around a `WaypointPolicy`.

Exact, by a digest of the picture and the words themselves; or, where a threshold is given, by similarity, at the risk of a stale answer.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d

from labkit.errors import UserError
from labkit.task_specific_vla import WaypointPolicy

SKETCH = 12


@dataclass
class Counts:
    """What a cache was asked.   exact: the same thing was there.   similar: something close enough was.   misses: it had to be encoded.

    evicted: entries that made room for another.
    """

    exact: int = 0
    similar: int = 0
    misses: int = 0
    evicted: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of questions answered from the cache; 0 before the first."""
        asked = self.exact + self.similar + self.misses
        return (self.exact + self.similar) / asked if asked else 0.0


class FeatureCache:
    """A bounded store of encodings: the least recently used one makes room. For one thread at a time, as `PolicyCore` asks its policy."""

    def __init__(self, capacity: int, threshold: float | None = None, distance=None):
        """capacity: entries.   threshold: how far apart two sketches may be, by `distance(sketch, sketches) -> (N,)`, to count as the same; None,
        never.   Raises ValueError for a capacity below 1, a threshold below 0 or one without a distance.
        """
        if capacity < 1 or (threshold is not None and (threshold < 0 or distance is None)):
            raise ValueError(f"capacity is at least 1, a threshold at least 0 and with a distance; got {capacity}, {threshold}, {distance}")
        self.capacity, self.threshold, self.distance = capacity, threshold, distance
        self.counts, self._entries = Counts(), OrderedDict()

    def __len__(self):
        return len(self._entries)

    def clear(self) -> None:
        """Forget everything but the counts."""
        self._entries.clear()

    def get(self, key, sketch, encode):
        """What `encode()` gives for this key, from the store where it can.   sketch(): what similarity is judged by; called only where it matters.

        Something similar is answered with, and never stored under the second name: a chain of small steps does not lead far from what was encoded.
        """
        if key in self._entries:
            self.counts.exact += 1
            return self._use(key)
        drawn = None if self.threshold is None else sketch()
        near = None if drawn is None else self._nearest(drawn)
        if near is not None:
            self.counts.similar += 1
            return self._use(near)
        self.counts.misses += 1
        value = encode()
        if len(self._entries) >= self.capacity:
            self._entries.popitem(last=False)
            self.counts.evicted += 1
        self._entries[key] = (drawn, value)
        return value

    def _use(self, key):
        self._entries.move_to_end(key)
        return self._entries[key][1]

    def _nearest(self, drawn):
        if not self._entries:
            return None
        keys = list(self._entries)
        distances = self.distance(drawn, [self._entries[key][0] for key in keys])
        best = int(np.argmin(distances))
        return keys[best] if distances[best] <= self.threshold else None


class CachingPolicy(WaypointPolicy):
    """A `WaypointPolicy` that encodes a picture or a sentence once; the head decides anew each time. It shares the policy's weights.

    Every picture and every sentence is encoded alone, whoever shares the batch, so that a hit is to the bit what a miss would have been; for one
    observation and one frame that is the policy's own answer to the bit, and else the same up to the order of sums.
    A policy with two frames sees every picture twice, once as the previous one: half of its encoding is saved without any repetition in the world.
    After its weights have changed, call `clear`.
    """

    def __init__(self, policy: WaypointPolicy, pictures: int = 256, sentences: int = 256, picture_threshold: float | None = None,
                 sentence_threshold: float | None = None):
        """pictures, sentences: how many encodings are kept.   picture_threshold: see `picture_distance`; sentence_threshold: see
        `sentence_distance`; None, exact only.   Raises UserError for another kind of policy.
        """
        if not isinstance(policy, WaypointPolicy):
            raise UserError(f"{getattr(policy, 'name', policy)!r} has no encodings of pictures and of sentences that could be kept apart: give a "
                            f"WaypointPolicy")
        super().__init__(policy.model, policy.processor, f"{policy.name}, cached")
        self.pictures = FeatureCache(pictures, picture_threshold, picture_distance)
        self.sentences = FeatureCache(sentences, sentence_threshold, sentence_distance)

    def clear(self) -> None:
        """Forget all encodings, for example after fine-tuning."""
        self.pictures.clear()
        self.sentences.clear()

    @torch.no_grad()
    def predict(self, instructions, images, holding) -> np.ndarray:
        """B sentences, (B, frames, H, W, 3) uint8 pictures and B sensor values  ->  (B, A) actions in metres and radians."""
        self.model.eval()
        seen = [[self._picture(frame) for frame in frames] for frames in images]
        pooled, patches = (torch.stack([torch.cat([frame[part] for frame in frames]) for frames in seen]) for part in (0, 1))
        read = torch.cat([self._sentence(text, bool(held)) for text, held in zip(instructions, holding, strict=True)])
        return self.model.normaliser.inverse(self.model.predict(pooled, patches, read)[0]).double().numpy()

    def _picture(self, image):
        image = np.ascontiguousarray(image)
        key = (image.shape, hashlib.blake2b(image.tobytes(), digest_size=16).digest())
        return self.pictures.get(key, lambda: picture_sketch(image), lambda: self.model.encode_pictures(self.pixels(image[None])))

    def _sentence(self, text, held):
        return self.sentences.get((text, held), lambda: (held, sentence_sketch(text)),
                                  lambda: self.model.encode_sentences(**self.words([text], [held])))


def answered_from(sketches, capacity: int, threshold: float) -> list[int]:
    """Whose encoding a `FeatureCache` answers each of N requests with, its own or an earlier one's.

    sketches: (N, 2), apart by their distance in the plane; each is asked under a key of its own.   capacity, threshold: as of `FeatureCache`.
    """
    points = np.asarray(sketches, np.float64)
    cache = FeatureCache(capacity, threshold, lambda one, others: np.linalg.norm(np.array(others) - one, axis=1))
    return [cache.get(i, lambda i=i: points[i], lambda i=i: i) for i in range(len(points))]


def picture_sketch(image) -> np.ndarray:
    """(H, W, 3) uint8  ->  (12, 12, 3) float32: the mean colour of each of 12 x 12 fields, in grey levels from 0 to 255."""
    pixels = torch.as_tensor(np.ascontiguousarray(image)).movedim(-1, 0).float()
    return adaptive_avg_pool2d(pixels, SKETCH).movedim(0, -1).numpy()


def picture_distance(sketch, sketches) -> np.ndarray:
    """(N,) grey levels, 0 to 255: how much the field that changed most has changed, for each of N sketches.

    Not the mean over all fields: an object that has moved changes two fields out of 144, and the mean would hide it.
    """
    return np.abs(np.stack(sketches) - sketch).max(axis=(1, 2, 3))


def sentence_sketch(text: str) -> Counter:
    """How often each word is there, without capitals and punctuation."""
    return Counter(re.findall(r"[\w']+", text.lower()))


def sentence_distance(sketch, sketches) -> np.ndarray:
    """(N,) from 0, the same words, to 1, none in common (Jaccard's distance of two bags of words); infinite where the vacuum sensor differs.

    One word out of six is a small distance and may be the colour that everything depends on: `threshold` 0 already forgives capitals and
    punctuation, and the order of the words.
    """
    held, words = sketch
    return np.array([1 - (words & others).total() / max((words | others).total(), 1) if held == also_held else np.inf
                     for also_held, others in sketches])
