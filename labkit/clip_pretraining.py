"""What makes the tiny CLIP towers: captioned tabletop scenes and CLIP's contrastive loss. The policy that stands on them is elsewhere.

    python3 -m labkit.clip_pretraining

makes `data/tiny_clip` again; run it once more to go on after a stop. Lessons never import this module.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from labkit.instructions import BIN_NOUNS, COLOURS, SHAPE_NOUNS, SHAPES, ZONES
from labkit.paths import DATA, ROOT
from labkit.pretrain import CAMERA_JITTER, LAMP_TURN, LIGHT_RANGE
from labkit.recipes import digest_of, half_cosine

TOWERS = DATA / "tiny_clip"
CACHE = ROOT / "data" / ".cache" / "clip"
BIN_YAW = 0.5
HELD_SHARE = 0.2
CAPTION_TOKENS = 20
# Where in a caption each digit stands, and how many there are to choose from.
_DIGITS = {"across": (r"(?<= at )\d", 10), "away": (r"(?<= at \d )\d", 10), "object_turn": (r"(?<= at \d \d turn )\d", 9),
           "bin_turn": (r"(?<=turn )\d$", 9)}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what comes out of the contrastive pretraining.

    scenes: how many are photographed, the last `held_out` of them for the measurement only.   images_per_batch: each with one caption
    for each of its three objects.   width, vision_layers, text_layers, patch: the towers.
    """

    scenes: int = 40_000
    held_out: int = 512
    steps: int = 2_600
    images_per_batch: int = 128
    learning_rate: float = 1.5e-3
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.05
    warm_up: int = 100
    final_rate: float = 0.02
    clip: float = 1.0
    width: int = 128
    vision_layers: int = 4
    text_layers: int = 2
    patch: int = 8
    seed: int = 0

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits that tell this recipe from any other."""
        return digest_of(self)

    def rate(self, step: int) -> float:
        """Learning rate at a step: warm-up, then half a cosine down to `final_rate` of the peak."""
        return self.learning_rate * half_cosine(step, self.steps, self.warm_up, self.final_rate)


def photograph_scene(seed: int):
    """One random scene, in a fifth of the cases with an object gone up with the gripper.

    Returns the picture (48, 48, 3) uint8 and what is in it, (6, 5) float32: three objects, then three bins, each as colour (index), shape
    (index, -1: a bin), x, y in metres and yaw in radians; x is NaN for the object on the pad.
    """

    from labkit.instructions import Command
    from labkit.tabletop.env import Tabletop
    from labkit.tabletop.scene import Variation, sample_scene

    rng = np.random.default_rng([seed, 23])
    variation = Variation(
        camera_shift=tuple(rng.uniform(-CAMERA_JITTER, CAMERA_JITTER, 3)), light=rng.uniform(*LIGHT_RANGE),
        light_direction=rng.uniform(-LAMP_TURN, LAMP_TURN), bin_yaw=BIN_YAW * (rng.random() < 0.5),
    )
    scene = sample_scene(rng, variation)
    facts = np.array([[COLOURS.index(t.colour), SHAPES.index(t.shape), t.x, t.y, t.yaw] for t in scene.things]
                     + [[COLOURS.index(b.colour), -1, b.x, b.y, b.yaw] for b in scene.bins], np.float32)
    env = Tabletop("pick", variation)
    observation, _ = env.reset(seed=seed, options={"scene": scene, "command": Command("pick", scene.things[0].name)})
    if rng.random() >= HELD_SHARE:
        return observation["rgb"], facts
    held = int(rng.integers(len(scene.things)))
    facts[held, 2] = np.nan
    with env.held_up(held):
        return env.photograph(env.camera.shifted(variation.camera_shift))[0], facts


def photographed_scenes(recipe: Recipe, folder: Path):
    """images (n, 48, 48, 3) uint8 and facts (n, 6, 5) float32, see `photograph_scene`; made once, in parts, then read from `folder`."""
    from tqdm.auto import tqdm

    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for first in tqdm(range(0, recipe.scenes, 5000), desc="scenes, by 5000"):
        last = min(first + 5000, recipe.scenes)
        path = folder / f"scenes-seed{recipe.seed}-{first}-{last}.npz"
        if not path.exists():
            images, facts = zip(*(photograph_scene(recipe.seed * 10_000_000 + i) for i in range(first, last)))
            partial = path.with_suffix(".partial.npz")
            np.savez(partial, images=np.stack(images), facts=np.stack(facts))
            partial.rename(path)
        with np.load(path) as stored:
            parts.append((stored["images"], stored["facts"]))
    return tuple(np.concatenate(column) for column in zip(*parts))


def caption(facts: np.ndarray, thing: int, rng) -> str:
    """What a picture shows, in the course's words: one object with its place, and one bin.   facts: (6, 5).   thing: 0, 1 or 2.

    A place is a digit across the table and a digit away from the camera; what is square also has a digit for how it is turned, in steps of
    ten degrees. Digits make the loss ask for the place itself, where "left" would be enough to tell most pictures apart.
    """
    colour, shape, x, y, yaw = facts[thing]
    nouns = SHAPE_NOUNS[SHAPES[int(shape)]]
    named = f"the {COLOURS[int(colour)]} {nouns[rng.integers(len(nouns))]}"
    if np.isnan(x):
        said = f"holding {named}"
    else:
        turn = f" turn {_turn_digit(yaw)}" if SHAPES[int(shape)] == "block" else ""
        said = f"{named} at {_digit(x, -0.175, 0.175)} {_digit(y, -0.125, 0.055)}{turn}"
    tray = rng.integers(3)
    bin_noun = BIN_NOUNS[rng.integers(len(BIN_NOUNS))]
    return f"{said} the {COLOURS[int(facts[3 + tray, 0])]} {bin_noun} {ZONES[tray]} turn {_turn_digit(facts[3 + tray, 4])}"


def _digit(value, low, high):
    return int(np.clip(10 * (value - low) / (high - low), 0, 9))


def _turn_digit(yaw):
    """0 to 8: a square thing looks the same every quarter turn; 4 is within five degrees of straight."""
    return int(np.clip((np.degrees(yaw) + 45) // 10, 0, 8))


def build_tokenizer():
    """The tiny VLA's word-level tokenizer as CLIP's text tower needs it: padded on the right, `<eos>` at the end of every sentence."""
    from tokenizers.processors import TemplateProcessing

    from labkit.tiny_vla import END
    from labkit.tiny_vla import build_tokenizer as build_vla_tokenizer

    tokenizer = build_vla_tokenizer()
    tokenizer.padding_side = "right"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {END}", special_tokens=[(END, tokenizer.eos_token_id)])
    return tokenizer


def build_processor():
    """The `CLIPProcessor` of the tiny towers: 48 x 48 pixels, rescaled to [-1, 1]."""
    from transformers import CLIPProcessor

    from labkit.tiny_vla import build_processor as build_vla_processor

    return CLIPProcessor(image_processor=build_vla_processor().image_processor, tokenizer=build_tokenizer())


def build_model(recipe: Recipe):
    """An untrained `CLIPModel`, the same weights for the same seed."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    from labkit.tabletop.camera import OBSERVATION_SIZE

    tokenizer = build_tokenizer()
    tower = {"hidden_size": recipe.width, "intermediate_size": 3 * recipe.width, "num_attention_heads": 4, "hidden_act": "gelu"}
    config = CLIPConfig(
        vision_config={**tower, "num_hidden_layers": recipe.vision_layers, "image_size": OBSERVATION_SIZE, "patch_size": recipe.patch,
                       "projection_dim": recipe.width},
        text_config={**tower, "num_hidden_layers": recipe.text_layers, "vocab_size": len(tokenizer), "max_position_embeddings": 64,
                     "projection_dim": recipe.width, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None,
                     "eos_token_id": tokenizer.eos_token_id},
        projection_dim=recipe.width,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return CLIPModel(config)


def contrastive_loss(similarity):
    """CLIP's symmetric loss (Radford et al. 2021, figure 3): each picture must find its caption, and each caption its picture.

    similarity: (B, B) scaled cosines, row: picture, column: caption; the pairs are on the diagonal.   Returns a scalar in nats.
    """
    import torch
    from torch.nn.functional import cross_entropy

    pairs = torch.arange(len(similarity))
    return (cross_entropy(similarity, pairs) + cross_entropy(similarity.T, pairs)) / 2


def embed(model, tokenizer, pixels, captions):
    """Unit vectors of pictures and captions.   pixels: (B, 3, 48, 48) float.   captions: N sentences.   Returns (B, D) and (N, D)."""
    from torch.nn.functional import normalize

    words = tokenizer(captions, padding="max_length", max_length=CAPTION_TOKENS, return_tensors="pt")
    # Padding on the right comes after <eos>, which a causal tower cannot see from: no mask is needed.
    text = model.get_text_features(input_ids=words["input_ids"]).pooler_output
    seen = model.get_image_features(pixel_values=pixels).pooler_output
    return normalize(seen, dim=-1), normalize(text, dim=-1)


def to_pixels(images):
    """(B, 48, 48, 3) uint8  ->  (B, 3, 48, 48) float32 in [-1, 1], as the processor gives them."""
    import torch

    return torch.as_tensor(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def pretrain(recipe: Recipe, out: Path = TOWERS, cache: Path = CACHE, threads: int = 1, save_every: int = 100,
             stop_after_seconds: float | None = None, progress: bool = True) -> list[dict]:
    """Train the towers from nothing into `out`, with a resumable state in `cache`; returns the log as a list of dicts.

    Batch number `step` depends on the seed and on `step` alone, so a resumed run goes on as if it had never stopped.
    stop_after_seconds: leave after a checkpoint once this call has trained for so long.
    """
    import torch
    from tqdm.auto import tqdm

    torch.set_num_threads(threads)
    images, facts = photographed_scenes(recipe, cache)
    processor, model = build_processor(), build_model(recipe)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimiser = torch.optim.AdamW([{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}],
                                  recipe.learning_rate, recipe.betas, fused=True)
    state_file, log, first, seconds = cache / f"state-{recipe.digest}.pt", [], 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        log, first, seconds = json.loads(state["log"]), state["step"], state["seconds"]
    begun, losses = time.perf_counter(), []
    for step in tqdm(range(first, recipe.steps), initial=first, total=recipe.steps, desc="contrastive", disable=not progress):
        for group in optimiser.param_groups:
            group["lr"] = recipe.rate(step)
        rng = np.random.default_rng([recipe.seed, 29, step])
        rows = rng.choice(recipe.scenes - recipe.held_out, recipe.images_per_batch, replace=False)
        captions = [caption(facts[row], thing, rng) for thing in range(3) for row in rows]
        seen, text = embed(model, processor.tokenizer, to_pixels(images[rows]), captions)
        scale = model.logit_scale.exp().clamp(max=100)
        loss = sum(contrastive_loss(scale * seen @ part.T) for part in text.split(len(rows))) / 3
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimiser.step()
        losses.append(float(loss.detach()))
        done = step + 1
        if done % save_every == 0 or done == recipe.steps:
            spent = time.perf_counter() - begun
            log.append({"step": done, "nats": float(np.mean(losses)), "seconds": seconds + spent})
            losses = []
            partial = state_file.with_suffix(".partial")
            torch.save({"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": done, "log": json.dumps(log),
                        "seconds": seconds + spent}, partial)
            partial.rename(state_file)
            if stop_after_seconds is not None and spent > stop_after_seconds and done < recipe.steps:
                return log
    # Half precision: every clone carries them. What is measured below is what is stored.
    model.eval().half().save_pretrained(out)
    model.float()
    processor.save_pretrained(out)
    (out / "pretraining.json").write_text(json.dumps({"recipe": asdict(recipe), "log": log}, indent=1) + "\n", encoding="utf-8")
    write_retrieval(model, processor, images[-recipe.held_out:], facts[-recipe.held_out:], recipe.seed, out)
    return log


def write_retrieval(model, processor, images, facts, seed: int, out: Path) -> None:
    """Measure `retrieval` and `digits_read` on held-out scenes into `retrieval.json`."""
    found = {**retrieval(model, processor, images, facts, seed), "digits": digits_read(model, processor, images, facts, seed)}
    (out / "retrieval.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def digits_read(model, processor, images, facts, seed: int = 0) -> dict:
    """How often the picture prefers the true digit of its caption to every other digit in that place: what of a place the towers know.

    images: (n, 48, 48, 3) uint8 and facts (n, 6, 5).   Returns, for `across`, `away`, `object_turn` and `bin_turn`, the accuracy with its
    Wilson interval, the share within one digit, how many captions had the digit, and the accuracy of a guess. Straight bins are left out.
    """
    import torch

    from labkit.rollouts import wilson

    rng = np.random.default_rng([seed, 41])
    captions = [caption(row, 0, rng) for row in facts]
    with torch.no_grad():
        seen, _ = embed(model, processor.tokenizer, to_pixels(images), captions[:1])
    about = {}
    for name, (pattern, options) in _DIGITS.items():
        errors = []
        for i, text in enumerate(captions):
            found = re.search(pattern, text)
            if found is None or (name == "bin_turn" and found.group() == "4"):
                continue
            variants = [text[:found.start()] + str(digit) + text[found.end():] for digit in range(options)]
            with torch.no_grad():
                said = embed(model, processor.tokenizer, to_pixels(images[i:i + 1]), variants)[1]
            errors.append(abs(int((said @ seen[i]).argmax()) - int(found.group())))
        errors = np.array(errors)
        low, high = wilson(int((errors == 0).sum()), len(errors)) if len(errors) else (0.0, 1.0)
        about[name] = {"accuracy": float((errors == 0).mean()) if len(errors) else 0.0, "low": low, "high": high,
                       "within_one": float((errors <= 1).mean()) if len(errors) else 0.0, "captions": len(errors), "chance": 1 / options}
    return about


def retrieval(model, processor, images, facts, seed: int = 0, batch: int = 128) -> dict:
    """How often, among `batch` held-out scenes, a picture finds its caption and a caption its picture, with Wilson intervals.

    images: (n, 48, 48, 3) uint8 and facts (n, 6, 5); what is left over after whole batches is not used.
    """
    import torch

    from labkit.rollouts import wilson

    batch = min(batch, len(images))
    rng, found = np.random.default_rng([seed, 31]), np.zeros((2, 0), bool)
    with torch.no_grad():
        for first in range(0, len(images) - batch + 1, batch):
            part = slice(first, first + batch)
            captions = [caption(row, 0, rng) for row in facts[part]]
            seen, text = embed(model, processor.tokenizer, to_pixels(images[part]), captions)
            pairs, similar = torch.arange(batch), seen @ text.T
            found = np.hstack([found, np.stack([(similar.argmax(1) == pairs).numpy(), (similar.argmax(0) == pairs).numpy()])])
    about = {"batch": batch, "pairs": found.shape[1], "chance": 1 / batch}
    for name, row in zip(("caption_of_picture", "picture_of_caption"), found):
        low, high = wilson(int(row.sum()), row.size)
        about[name] = {"accuracy": float(row.mean()), "low": low, "high": high}
    return about


def write_card(folder: Path) -> Path:
    """Write `README.md` of the towers from what stands beside it: no number in it is typed by hand."""
    training = json.loads((folder / "pretraining.json").read_text(encoding="utf-8"))
    found = json.loads((folder / "retrieval.json").read_text(encoding="utf-8"))
    recipe, last = training["recipe"], training["log"][-1]
    default = asdict(Recipe())
    options = "".join(f" --{name} {recipe[name]}" for name in ("seed", "steps") if name == "seed" or recipe[name] != default[name])
    sides = "\n".join(f"| {name.replace('_', ' ')} | {100 * found[name]['accuracy']:.1f} % | {100 * found[name]['low']:.1f} to "
                      f"{100 * found[name]['high']:.1f} % |" for name in ("caption_of_picture", "picture_of_caption"))
    digits = "\n".join(f"| {name.replace('_', ' ')} | {100 * row['accuracy']:.1f} % | {100 * row['low']:.1f} to {100 * row['high']:.1f} % | "
                       f"{100 * row['within_one']:.0f} % | {100 * row['chance']:.0f} % | {row['captions']} |"
                       for name, row in found["digits"].items())
    text = f"""# Tiny CLIP towers

A `CLIPModel` (transformers) for the tabletop: a vision tower of {recipe['vision_layers']} layers and a text tower of {recipe['text_layers']},
both {recipe['width']} wide, with the tiny VLA's vocabulary, trained from nothing on pictures of `labkit/Tabletop-v0` and captions that say what
lies where. They stand where the lab sheet has `openai/clip-vit-base-patch32`.

Made by `python3 -m labkit.clip_pretraining{options}`.

## Recipe and cost

{recipe['scenes']:,} random scenes, half of them with bins that are turned, a fifth with an object on the pad; {last['step']:,} steps of
{recipe['images_per_batch']} pictures with one caption for each of their three objects; CLIP's symmetric loss; AdamW, learning rate
{recipe['learning_rate']} with {recipe['warm_up']} steps of warm-up, then half a cosine down to {100 * recipe['final_rate']:.0f} % of it. The loss
fell from {training['log'][0]['nats']:.2f} nats (mean of the first steps) to {last['nats']:.2f}; guessing is
{math.log(recipe['images_per_batch']):.2f}. It took {last['seconds'] / 60:.0f} minutes with one thread on a busy machine, without a GPU.

A caption: `the red cube at 3 7 turn 2 the green tray left turn 4`. The digits are the object's place, 0 to 9 across the table and 0 to 9
away from the camera, and how a square thing is turned, in steps of ten degrees (4: straight).

## Retrieval

Among {found['batch']} scenes that training never saw, how often the nearest is the right one ({found['pairs']} pairs, guessing
{100 * found['chance']:.1f} %, Wilson intervals). Scenes that fit the same caption count as wrong.

| find the | accuracy | 95 % interval |
| --- | --- | --- |
{sides}

How often a picture prefers the true digit of its caption to every other one there: what of a place and of a turn the pooled features know.
A digit at the level of a guess was not learned, although the captions say it.

| digit | accuracy | 95 % interval | within one | a guess | captions |
| --- | --- | --- | --- | --- | --- |
{digits}

## Limits

Five colours, three shapes, one table, one camera; `purple cup` and `yellow ball` were never shown.
A teaching object.
"""
    path = folder / "README.md"
    path.write_text(text, encoding="utf-8")
    return path


def main():
    """Command line: `python3 -m labkit.clip_pretraining [--seed 0] [--out data/tiny_clip]`."""
    parser = argparse.ArgumentParser(description="Make the tiny CLIP towers from nothing; run it again to go on after a stop.")
    parser.add_argument("--out", type=Path, default=TOWERS)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--seconds", type=float, help="leave after this long, at a checkpoint; run it again to go on")
    chosen = parser.parse_args()
    log = pretrain(replace(Recipe(), seed=chosen.seed, steps=chosen.steps), chosen.out, chosen.cache, stop_after_seconds=chosen.seconds)
    print(json.dumps(log[-1]))
    if log[-1]["step"] == chosen.steps:
        print(f"wrote {write_card(chosen.out)}")


if __name__ == "__main__":
    main()
