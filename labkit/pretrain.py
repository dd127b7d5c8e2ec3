"""What makes the checkpoint: scenes labelled by the expert for every instruction, and the pretraining loop. Lessons never import it."""

from __future__ import annotations

import copy
import json
import time
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import permutations, product
from pathlib import Path

import numpy as np

from labkit.actions import BINS, NAMES, action_to_bins, small_action
from labkit.instructions import COLOURS, SHAPES, ZONES, Command, say
from labkit.recipes import digest_of
from labkit.tabletop.tasks import PRETRAINING_TASKS

CAMERA_JITTER = 0.01
LIGHT_RANGE = (0.85, 1.1)
LAMP_TURN = 0.3
# Share of each (phase, task) in a batch: which object first (two thirds), then where to; `beside` needs the most looking.
MIX = {(0, "pick"): 0.20, (0, "put"): 0.15, (0, "move"): 0.13, (0, "beside"): 0.16,
       (1, "put"): 0.09, (1, "move"): 0.06, (1, "beside"): 0.21}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what comes out of pretraining."""

    scenes: int = 24_000
    steps: int = 16_000
    images_per_batch: int = 16
    commands_per_image: int = 4
    learning_rate: float = 1.5e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.02
    warm_up: int = 200
    constant_until: float = 0.65
    final_rate: float = 0.02
    ordinal_bins: float = 2.0
    clip: float = 1.0
    seed: int = 0
    early: float = 0.10
    middle: float = 0.35

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits that tell this recipe from any other."""
        return digest_of(self)

    def rate(self, step: int) -> float:
        """Learning rate at a step: warm-up, constant, then linear to `final_rate` of the peak."""
        if step < self.warm_up:
            return self.learning_rate * (step + 1) / self.warm_up
        left = (self.steps - step) / max(1.0, self.steps * (1 - self.constant_until))
        return self.learning_rate * max(self.final_rate, min(1.0, left))


@lru_cache(maxsize=1)
def command_catalogue() -> tuple[Command, ...]:
    """Every command of the pretraining tasks, in a fixed order; a stored sample names its command by the index."""
    things = list(product(COLOURS, SHAPES))
    return tuple(
        [Command("pick", a) for a in things]
        + [Command("put", a, c) for a in things for c in COLOURS]
        + [Command("move", a, z) for a in things for z in ZONES]
        + [Command("beside", a, b) for a, b in permutations(things, 2)]
    )


def label_scene(seed: int):
    """One scene, photographed as it is and once with each object gone up with the gripper, labelled for every command.

    Returns images (4, 48, 48, 3) uint8 and samples (n, 8) int32: image, phase, command, mask of unique colours, four bins.
    """

    from labkit.tabletop.env import Tabletop
    from labkit.tabletop.experts import next_waypoint
    from labkit.tabletop.scene import Variation, sample_scene
    from labkit.tabletop.tasks import commands, index_of

    rng = np.random.default_rng([seed, 7])
    variation = Variation(
        camera_shift=tuple(rng.uniform(-CAMERA_JITTER, CAMERA_JITTER, 3)),
        light=rng.uniform(*LIGHT_RANGE), light_direction=rng.uniform(-LAMP_TURN, LAMP_TURN),
    )
    scene = sample_scene(rng, variation)
    env = Tabletop("pick", variation)
    observation, _ = env.reset(seed=seed, options={"scene": scene, "command": Command("pick", scene.things[0].name)})
    catalogue = {command: i for i, command in enumerate(command_catalogue())}
    mask = sum(1 << COLOURS.index(colour) for colour in scene.unique_colours)
    start, images, samples = env.start, [observation["rgb"]], []

    def add(phase, command, state):
        waypoint = next_waypoint(command, scene, start, state)
        samples.append([len(images) - 1, phase, catalogue[command], mask, *action_to_bins(small_action(waypoint))])

    everything = [c for task in PRETRAINING_TASKS for c in commands(task, scene)]
    for command in everything:
        add(0, command, start)
    for index in range(len(scene.things)):
        with env.held_up(index):
            images.append(env.photograph(env.camera.shifted(variation.camera_shift))[0])
            held = replace(env.state, held=index)
        for command in everything:
            if command.task != "pick" and index_of(scene, command.object) == index:
                add(1, command, held)
    return np.stack(images), np.array(samples, np.int32)


def labelled_scenes(recipe: Recipe, folder: Path, workers: int = 2):
    """images (m, 48, 48, 3) uint8 and samples (n, 8) int32 of all scenes; made once (a few minutes), then read from `folder`."""
    from multiprocessing import get_context

    from tqdm.auto import tqdm

    path = folder / f"scenes-{recipe.scenes}-seed{recipe.seed}.npz"
    if not path.exists():
        seeds = [recipe.seed * 10_000_000 + i for i in range(recipe.scenes)]
        images, samples, count = [], [], 0
        with get_context("spawn").Pool(workers) as pool:
            for more, rows in tqdm(pool.imap(label_scene, seeds, chunksize=64), total=len(seeds), desc="scenes"):
                rows[:, 0] += count
                count += len(more)
                images.append(more)
                samples.append(rows)
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, images=np.concatenate(images), samples=np.concatenate(samples))
        partial.rename(path)
    with np.load(path) as stored:
        return stored["images"], stored["samples"]


class Sampler:
    """Draws batches: each image comes with several commands, so that the words, not the picture, make the difference.

    Batch number `step` depends on the seed and on `step` alone, so a resumed run goes on as if it had never stopped.
    """

    def __init__(self, images, samples, recipe: Recipe):
        self.images, self.samples, self.recipe = images, samples, recipe
        tasks = np.array([PRETRAINING_TASKS.index(c.task) for c in command_catalogue()])
        kinds = list(MIX)
        kind = np.full(len(samples), -1)
        for k, (phase, task) in enumerate(kinds):
            kind[(samples[:, 1] == phase) & (tasks[samples[:, 2]] == PRETRAINING_TASKS.index(task))] = k
        frequency = np.bincount(kind, minlength=len(kinds))
        weight = np.array([MIX[k] for k in kinds])[kind] / frequency[kind]
        self._first = np.searchsorted(samples[:, 0], np.arange(len(images) + 1))
        self._total = np.concatenate([[0.0], np.cumsum(weight)])
        self._usable = np.flatnonzero(np.diff(self._first) >= 1)
        share = self._total[self._first[1:]] - self._total[self._first[:-1]]
        self._images_cdf = np.cumsum(share) / share.sum()

    def batch(self, step: int):
        """image indices (G,), sample rows (G * K, 8) grouped by image, G * K sentences."""
        r = self.recipe
        rng = np.random.default_rng([r.seed, 11, step])
        chosen = np.searchsorted(self._images_cdf, rng.random(r.images_per_batch))
        low, high = self._total[self._first[chosen]], self._total[self._first[chosen + 1]]
        points = low[:, None] + (high - low)[:, None] * rng.random((r.images_per_batch, r.commands_per_image))
        rows = self.samples[np.clip(np.searchsorted(self._total, points.ravel(), side="right") - 1, 0, len(self.samples) - 1)]
        catalogue = command_catalogue()
        sentences = [
            say(catalogue[row[2]], rng, unique_colours=frozenset(c for i, c in enumerate(COLOURS) if row[3] >> i & 1)) for row in rows
        ]
        return chosen, rows, sentences


def ordinal_targets(bins, width: float):
    """(..., ) int bins  ->  (..., 256) probabilities: a Gaussian of `width` bins around the true one."""
    import torch

    distance = torch.arange(BINS).sub(bins.unsqueeze(-1)).float()
    return torch.softmax(-0.5 * (distance / width) ** 2, dim=-1)


def action_logits(model, prompts, images_repeated: int, pixels, tokens):
    """(B, 4, V) logits of the four action positions; each image is encoded once and shared by `images_repeated` prompts in a row."""
    import torch

    seen = model.model.get_image_features(pixel_values=pixels, return_dict=True)
    seen.pooler_output = [features for features in seen.pooler_output for _ in range(images_repeated)]
    ids = torch.cat([prompts["input_ids"], tokens[:, :-1]], dim=1)
    mask = torch.cat([prompts["attention_mask"], torch.ones_like(tokens[:, :-1])], dim=1)
    hidden = model.model(input_ids=ids, attention_mask=mask, mm_encoder_outputs={"image": seen}).last_hidden_state
    return model.lm_head(hidden[:, -len(NAMES):])


def pretrain(recipe: Recipe, out: Path, cache: Path, threads: int = 1, save_every: int = 250, stop_after: int | None = None):
    """Train from nothing into `out`, writing a resumable state to `cache` on the way; returns the log as a list of dicts.

    out: gets the final checkpoint, and `early/` and `middle/` from the same run.   stop_after: steps to run in this call, for tests.
    """
    import torch
    from torch.nn.functional import log_softmax
    from tqdm.auto import tqdm

    from labkit.batches import PromptBuilder, action_token_ids
    from labkit.tiny_vla import build_model, build_processor

    torch.set_num_threads(threads)
    images, samples = labelled_scenes(recipe, cache)
    sampler, processor, model = Sampler(images, samples, recipe), build_processor(), build_model(recipe.seed)
    prompts, action_ids = PromptBuilder(processor), action_token_ids(processor.tokenizer)
    optimiser = torch.optim.AdamW(model.parameters(), recipe.learning_rate, recipe.betas, weight_decay=recipe.weight_decay, fused=True)
    state_file, log, first, seconds = cache / f"state-{recipe.digest}.pt", [], 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        log, first, seconds = json.loads(state["log"]), state["step"], state["seconds"]

    def save(folder, dtype=torch.float32):
        copy.deepcopy(model).to(dtype).save_pretrained(folder)
        processor.save_pretrained(folder)

    marks = {round(recipe.steps * recipe.early): out / "early", round(recipe.steps * recipe.middle): out / "middle"}
    sums, begun = np.zeros(4), time.perf_counter() - seconds
    last = recipe.steps if stop_after is None else min(recipe.steps, first + stop_after)
    with tqdm(total=recipe.steps, initial=first, desc="pretraining") as bar:
        for step in range(first, last):
            for group in optimiser.param_groups:
                group["lr"] = recipe.rate(step)
            chosen, rows, sentences = sampler.batch(step)
            bins = torch.as_tensor(rows[:, 4:]).long()
            text = prompts.text(sentences, rows[:, 1] == 1)
            logits = action_logits(model, text, recipe.commands_per_image, prompts.pixels(images[chosen]), action_ids[bins])
            logp = log_softmax(logits.float(), dim=-1)[..., action_ids]
            nats = -(ordinal_targets(bins, recipe.ordinal_bins) * logp).sum(-1)
            loss = nats.mean()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimiser.step()
            place, held = nats.detach()[:, :2].mean(1).numpy(), rows[:, 1] == 1
            sums += [place[~held].sum(), (~held).sum(), place[held].sum(), held.sum()]
            bar.update()
            done = step + 1
            if done % 50 == 0:
                log.append({"step": done, "object_nats": float(sums[0] / sums[1]), "destination_nats": float(sums[2] / sums[3]),
                            "rate": recipe.rate(step), "seconds": time.perf_counter() - begun})
                bar.set_postfix(object=f"{log[-1]['object_nats']:.2f}", destination=f"{log[-1]['destination_nats']:.2f}")
                sums[:] = 0
            if done in marks:
                # Half precision: these two are only compared with, and every clone carries them.
                save(marks[done], torch.float16)
            if done % save_every == 0 or done == last:
                partial = state_file.with_suffix(".partial")
                torch.save({"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": done,
                            "log": json.dumps(log), "seconds": time.perf_counter() - begun}, partial)
                partial.rename(state_file)
    if last == recipe.steps:
        save(out)
        (out / "pretraining.json").write_text(json.dumps({"recipe": asdict(recipe), "log": log}, indent=1) + "\n")
    return log
