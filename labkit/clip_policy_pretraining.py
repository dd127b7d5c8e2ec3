"""What makes the lab's generic policy: the tiny CLIP towers and a head, fitted to the expert on the pretraining tasks.

    python3 -m labkit.clip_policy_pretraining

makes `data/tiny_clip_policy` again from `data/tiny_clip`; run it once more to go on after a stop. Lessons never import this module. The scenes,
their labels and the mixture of tasks are those of the tiny VLA (pretrain.py).
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from labkit.actions import bins_to_action, full_waypoint
from labkit.paths import ROOT
from labkit.pretrain import Recipe as SceneRecipe
from labkit.pretrain import Sampler, labelled_scenes
from labkit.recipes import digest_of, half_cosine
from labkit.tabletop.tasks import PRETRAINING_TASKS
from labkit.task_specific_vla import GENERIC, TINY_CLIP, WaypointPolicy, load_waypoint_policy, policy_from_clip
from labkit.waypoint_regression import LOSSES, pointing_loss

CACHE = ROOT / "data" / ".cache" / "clip_policy"
SCENES = ROOT / "data" / ".cache" / "pretrain"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what comes out, apart from the towers it begins with.   pointing: weight of `pointing_loss`."""

    scenes: int = 24_000
    steps: int = 3_000
    images_per_batch: int = 32
    commands_per_image: int = 4
    head_rate: float = 2e-3
    tower_rate: float = 5e-4
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.98)
    warm_up: int = 100
    final_rate: float = 0.02
    clip: float = 1.0
    loss: str = "l1"
    pointing: float = 0.1
    readout: str = "spatial"
    seed: int = 0

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits that tell this recipe from any other."""
        return digest_of(self)

    def share(self, step: int) -> float:
        """Of the learning rates, at a step: warm-up, then half a cosine down to `final_rate`."""
        return half_cosine(step, self.steps, self.warm_up, self.final_rate)


def batch_loss(policy: WaypointPolicy, images, sentences, holding, actions, loss, pointing: float = 0.0):
    """Loss of one batch, each picture encoded once for all its sentences.

    images: (G, 48, 48, 3) uint8.   sentences, holding: G * K, grouped by image.   actions: (G * K, 7) metres and radians.
    pointing: weight of `pointing_loss`, where the readout is spatial.   Returns a scalar.
    """
    import torch

    model = policy.model
    repeats = len(sentences) // len(images)
    pooled, patches = (seen.repeat_interleave(repeats, 0) for seen in model.encode_images(policy.pixels(images)))
    numbers, looks = model.predict(pooled, patches, model.encode_sentences(**policy.words(sentences, holding)))
    value = loss(numbers, model.normaliser(torch.as_tensor(actions, dtype=torch.float32)))
    if pointing and model.readout == "spatial":
        value = value + pointing * pointing_loss(looks, actions, model.vision_encoder.config.patch_size)
    return value


def pretrain(recipe: Recipe, towers: Path = TINY_CLIP, out: Path = GENERIC, cache: Path = CACHE, scenes: Path = SCENES, threads: int = 1,
             save_every: int = 100, stop_after_seconds: float | None = None, progress: bool = True) -> list[dict]:
    """Fit towers and head into `out`, with a resumable state in `cache`; returns the log as a list of dicts.

    Batch number `step` depends on the seed and on `step` alone, so a resumed run goes on as if it had never stopped.
    stop_after_seconds: leave after a checkpoint once this call has trained for so long.
    """
    import torch
    from tqdm.auto import tqdm

    from labkit.task_specific_vla import parameter_groups, set_trainable

    torch.set_num_threads(threads)
    drawn = SceneRecipe(scenes=recipe.scenes, images_per_batch=recipe.images_per_batch, commands_per_image=recipe.commands_per_image,
                        seed=recipe.seed)
    images, samples = labelled_scenes(drawn, scenes, workers=threads)
    sampler, policy = Sampler(images, samples, drawn), policy_from_clip(towers, seed=recipe.seed, readout=recipe.readout)
    set_trainable(policy.model, "full")
    groups = parameter_groups(policy.model, recipe.head_rate, recipe.tower_rate)
    optimiser = torch.optim.AdamW(groups, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True)
    peaks = [group["lr"] for group in groups]
    cache.mkdir(parents=True, exist_ok=True)
    state_file, log, first, seconds = cache / f"state-{recipe.digest}.pt", [], 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        policy.model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        log, first, seconds = json.loads(state["log"]), state["step"], state["seconds"]
    policy.model.train()
    begun, losses = time.perf_counter(), []
    for step in tqdm(range(first, recipe.steps), initial=first, total=recipe.steps, desc="generic policy", disable=not progress):
        for group, peak in zip(optimiser.param_groups, peaks):
            group["lr"] = peak * recipe.share(step)
        chosen, rows, sentences = sampler.batch(step)
        # Dropout is the only thing random in a step that the sampler does not draw.
        torch.manual_seed(int(np.random.SeedSequence([recipe.seed, 37, step]).generate_state(1)[0]))
        waypoints = full_waypoint(bins_to_action(rows[:, 4:]))
        waypoints[:, -1] = waypoints[:, -1] > 0.5
        loss = batch_loss(policy, images[chosen], sentences, rows[:, 1] == 1, waypoints, LOSSES[recipe.loss], recipe.pointing)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), recipe.clip)
        optimiser.step()
        losses.append(float(loss.detach()))
        done = step + 1
        if done % save_every == 0 or done == recipe.steps:
            spent = time.perf_counter() - begun
            log.append({"step": done, "loss": float(np.mean(losses)), "seconds": seconds + spent})
            losses = []
            partial = state_file.with_suffix(".partial")
            torch.save({"model": policy.model.state_dict(), "optimiser": optimiser.state_dict(), "step": done, "log": json.dumps(log),
                        "seconds": seconds + spent}, partial)
            partial.rename(state_file)
            if stop_after_seconds is not None and spent > stop_after_seconds and done < recipe.steps:
                return log
    policy.model.eval()
    # Half precision: every clone carries it.
    policy.save(out, torch.float16)
    (out / "pretraining.json").write_text(json.dumps({"recipe": asdict(recipe), "log": log}, indent=1) + "\n", encoding="utf-8")
    return log


def measure(policy: WaypointPolicy, episodes: int = 200, progress: bool = True) -> dict:
    """Success in closed loop on the pretraining tasks and on the lab's, on seeds that no training has seen: {"seed": ..., "rows": [...]}."""
    from labkit.rollouts import EVALUATION_SEED, rollout
    from labkit.tabletop import Variation

    rows = []
    for task in (*PRETRAINING_TASKS, "put_held_out", "align", "navigate", "assemble"):
        found = rollout(policy, task, episodes, variation=Variation(bin_yaw=0.5) if task == "align" else Variation(), progress=progress)
        low, high = found.interval
        rows.append({"task": task, "trained": task in PRETRAINING_TASKS, "success": round(found.rate, 4), "low": round(low, 4),
                     "high": round(high, 4), "episodes": episodes})
    return {"seed": EVALUATION_SEED, "rows": rows}


def write_card(folder: Path) -> Path:
    """Write `README.md` of the generic policy from `pretraining.json` and `evaluation.json` beside it."""
    training = json.loads((folder / "pretraining.json").read_text(encoding="utf-8"))
    evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    recipe, last = training["recipe"], training["log"][-1]
    default = asdict(Recipe())
    options = "".join(f" --{name} {recipe[name]}" for name in ("seed", "steps", "readout") if name == "seed" or recipe[name] != default[name])
    rows = "\n".join(f"| {r['task']} | {'yes' if r['trained'] else 'no'} | {100 * r['success']:.1f} % | {100 * r['low']:.1f} to "
                     f"{100 * r['high']:.1f} % | {r['episodes']} |" for r in evaluation["rows"])
    text = f"""# The lab's generic policy

A `TaskSpecificVLA` (labkit/task_specific_vla.py) with the {recipe['readout']} readout, before it is specific to any task: the towers of
`data/tiny_clip` and a head that says x, y, z, roll, pitch, yaw and grip, fitted to the expert on pick, put, move and beside. Its wrist never
turns: no pretraining task asks for it.

Made by `python3 -m labkit.clip_policy_pretraining{options}`.

## Recipe and cost

The {recipe['scenes']:,} labelled scenes of the tiny VLA; {last['step']:,} steps of {recipe['images_per_batch']} pictures with
{recipe['commands_per_image']} instructions each; every parameter trains; {recipe['loss'].upper()} loss on normalised actions, and
{recipe['pointing']} times the negative log of the first query's attention at the place the waypoint leads to (`pointing_loss`); AdamW, learning rate
{recipe['head_rate']} for the head and {recipe['tower_rate']} for the towers, {recipe['warm_up']} steps of warm-up, then half a cosine down to
{100 * recipe['final_rate']:.0f} %. It took {last['seconds'] / 60:.0f} minutes with one thread on a busy machine, without a GPU, after the towers.

## Success in closed loop

Seeds {evaluation['seed']} onwards, which no training saw; Wilson intervals; the bins of `align` are turned by up to 0.5 rad.

| task | trained on it | success | 95 % interval | episodes |
| --- | --- | --- | --- | --- |
{rows}
"""
    path = folder / "README.md"
    path.write_text(text, encoding="utf-8")
    return path


def main():
    """Command line: `python3 -m labkit.clip_policy_pretraining [--seed 0] [--out data/tiny_clip_policy]`."""
    parser = argparse.ArgumentParser(description="Make the lab's generic policy; run it again to go on after a stop.")
    parser.add_argument("--towers", type=Path, default=TINY_CLIP)
    parser.add_argument("--out", type=Path, default=GENERIC)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--readout", default=Recipe.readout)
    parser.add_argument("--episodes", type=int, default=200, help="episodes a task for the card")
    parser.add_argument("--seconds", type=float, help="leave after this long, at a checkpoint; run it again to go on")
    chosen = parser.parse_args()
    recipe = replace(Recipe(), seed=chosen.seed, steps=chosen.steps, readout=chosen.readout)
    log = pretrain(recipe, chosen.towers, chosen.out, stop_after_seconds=chosen.seconds)
    print(json.dumps(log[-1]))
    if log[-1]["step"] == recipe.steps:
        evaluation = measure(load_waypoint_policy(chosen.out), chosen.episodes)
        (chosen.out / "evaluation.json").write_text(json.dumps(evaluation, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {write_card(chosen.out)}")


if __name__ == "__main__":
    main()
