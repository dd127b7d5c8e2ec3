"""The model card of the tiny VLA: measured by `measure`, written by `write_card`. No number in it is typed by hand."""

from __future__ import annotations

import json
from pathlib import Path

from labkit.freeze import write_freeze
from labkit.rollouts import EVALUATION_SEED, blind_success, rollout
from labkit.tabletop import Variation
from labkit.tabletop.tasks import PRETRAINING_TASKS, TASKS

NEW_TASKS = ("put_held_out", "stack", "forward", "spatial")


def measure(folder: Path, episodes: int = 200, progress: bool = True) -> dict:
    """Run every row of the card in closed loop on held-out seeds; writes and returns `evaluation.json` of `folder`."""
    from labkit.policy import load_policy

    policy = load_policy(folder)
    rows = []

    def add(label, task, result):
        low, high = result.interval
        rows.append({"suite": label, "task": task, "success": round(result.rate, 4), "low": round(low, 4), "high": round(high, 4),
                     "episodes": len(result.success)})

    for task in (*PRETRAINING_TASKS, *NEW_TASKS):
        add("as trained" if task in PRETRAINING_TASKS else "never trained", task, rollout(policy, task, episodes, progress=progress))
    for task in PRETRAINING_TASKS:
        add("phrasings never trained on", task, rollout(policy, task, episodes, held_out_phrasing=True, progress=progress))
        add("another instruction of the same scene", task, rollout(policy, task, episodes, instruction="another", progress=progress))
        add("instruction-blind expert (chance)", task, blind_success(task, episodes))
    add("camera moved 16 cm", "put", rollout(policy, "put", episodes, variation=Variation(camera_shift=(0.16, 0, 0)), progress=progress))
    add("dim light (0.2)", "put", rollout(policy, "put", episodes, variation=Variation(light=0.2), progress=progress))
    add("novel objects", "pick", rollout(policy, "pick", episodes, variation=Variation(novel=True), progress=progress))
    for name in ("early", "middle"):
        if (folder / name).exists():
            other = load_policy(folder / name)
            for task in PRETRAINING_TASKS:
                add(f"{name} checkpoint", task, rollout(other, task, episodes, progress=progress))
    evaluation = {"seed": EVALUATION_SEED, "rows": rows}
    (folder / "evaluation.json").write_text(json.dumps(evaluation, indent=1) + "\n", encoding="utf-8")
    return evaluation


def write_card(folder: Path, command: str) -> Path:
    """Write `README.md` and `freeze.json` of a checkpoint from what stands beside it.   command: what made it."""
    training = json.loads((folder / "pretraining.json").read_text(encoding="utf-8"))
    evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    recipe, last = training["recipe"], training["log"][-1]
    samples = last["step"] * recipe["images_per_batch"] * recipe["commands_per_image"]
    freeze = write_freeze(folder)
    table = ["| suite | task | success | 95 % interval | episodes |", "| --- | --- | --- | --- | --- |"]
    table += [f"| {r['suite']} | {r['task']} | {100 * r['success']:.1f} % | {100 * r['low']:.1f} to {100 * r['high']:.1f} % | {r['episodes']} |"
              for r in evaluation["rows"]]
    about = "\n".join(f"- `{name}`: {TASKS[name].about}" for name in (*PRETRAINING_TASKS, *NEW_TASKS))
    lines = f"""# The tiny VLA

A vision-language-action policy small enough for a laptop: `LlavaForConditionalGeneration` with a tiny CLIP vision tower and a tiny Llama,
a word-level tokenizer and 256-bin action tokens, trained from nothing on scenes of `labkit/Tabletop-v0`. It sees one 48 x 48 RGB image,
one sentence and one word for the vacuum sensor, and says the next waypoint (x, y, z, grip).

Made by `{command}`. Freeze: `{freeze}` (environment, vocabulary and checkpoint; see `freeze.json`).

## Recipe and cost

{recipe['scenes']:,} scenes labelled by the noise-free expert for every instruction they allow; {last['step']:,} steps of
{recipe['images_per_batch']} images with {recipe['commands_per_image']} instructions each, {samples:,} samples in all; AdamW, learning rate
{recipe['learning_rate']} with {recipe['warm_up']} steps of warm-up, constant to {100 * recipe['constant_until']:.0f} %, then linear to
{100 * recipe['final_rate']:.0f} % of it; targets are a Gaussian of {recipe['ordinal_bins']:.0f} bins around the true bin.
It took {last['seconds'] / 60:.0f} minutes with one thread on two busy cores, without a GPU. `early/` is the same run at
{100 * recipe['early']:.0f} % of its steps, `middle/` at {100 * recipe['middle']:.0f} %, both stored in half precision.

## Success in closed loop

Seeds {evaluation['seed']} onwards, which pretraining never saw; Wilson intervals. Measured by `python -m labkit pretrain --card-only`.

{chr(10).join(table)}

{about}

"Another instruction" gives the policy a different valid sentence of the same scene and counts the original one: what is left is luck.
"Instruction-blind" is an expert that knows everything but the sentence.

## Limits

It knows {len(TASKS)} kinds of task by name and {len(PRETRAINING_TASKS)} by training, five colours, three shapes, one table, one camera.
It does not read depth, remembers nothing between decisions, and says something for any sentence, also for one it does not understand.
It is a teaching object, not a robot controller.
"""
    path = folder / "README.md"
    path.write_text(lines, encoding="utf-8")
    return path
