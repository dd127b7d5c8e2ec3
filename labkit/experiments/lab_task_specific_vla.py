"""The lab's task-specific VLA: what is trained, on how much of which data, seen through what, and how robust it is; beside it the tiny VLA."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from labkit.augmentation import Augmentation, commands_of
from labkit.demonstrations import samples
from labkit.experiments import few_shot
from labkit.experiments.measuring import counted
from labkit.policy import load_policy
from labkit.recording import record
from labkit.robustness import CONDITIONS, under
from labkit.rollouts import EVALUATION_SEED, rollout
from labkit.synthetic_paths import synthetic_paths
from labkit.tabletop import Tabletop, Variation
from labkit.tabletop.tasks import yaw_error
from labkit.task_specific_vla import (
    VARIANTS,
    ActionNormaliser,
    TaskSpecificVLA,
    WaypointPolicy,
    load_waypoint_policy,
    merged,
    policy_from_clip,
    set_trainable,
    with_two_frames,
)
from labkit.waypoint_regression import action_accuracy, fit, predict, waypoint_samples

ABOUT = ("task-specific VLA (CLIP towers and a regression head) from the generic policy data/tiny_clip_policy. variants: what trains, 50 "
         "demonstrations of a task, recorded anew for each seed; recipe: the lab sheet's settings, with and without its rate for the towers, "
         "and from the towers alone; amount: 50 or 400 demonstrations, and the wrist's yaw as a range or as cosine and sine; frames: paths of two or "
         "three legs, one picture a decision or two; robustness: forward, with augmentations, under conditions that differ in one thing; domain: put "
         "under a moved camera or in the dim, with demonstrations made there, with augmentation, with both; tokens: the tiny VLA on the "
         "demonstrations of `variants`; readout: generic policies made in 1,200 steps with either readout")
SEEDS, EPISODES, FEWER = range(3), 100, 50
TASKS = ("stack", "forward", "put_held_out")
DOMAINS = {"camera": few_shot.moved(16), "dim": Variation(light=0.2)}
AUGMENTATIONS = {"none": {}, "colour": {"colour": 0.5}, "crop": {"crop": 3}, "noise": {"noise": 15.0}, "words": {},
                 "all": {"colour": 0.5, "crop": 3, "noise": 15.0}}
OURS = {"epochs": 20, "batch_size": 16, "head_rate": 1e-3, "tower_rate": 3e-4, "step_size": 10, "gamma": 0.5, "loss": "l1", "pointing": 0.1}
LORA_RATE = 2e-3
WRIST = {"epochs": 24, "tower_rate": 5e-4, "step_size": 12, "gamma": 0.3}
SHEET = {"epochs": 20, "batch_size": 16, "head_rate": 1e-4, "tower_rate": 5e-6, "weight_decay": 0.01, "step_size": 10, "gamma": 0.9, "loss": "mse"}
PATHS = {"epochs": 12, "batch_size": 128, "head_rate": 1e-3, "tower_rate": 5e-4, "step_size": 4, "gamma": 0.4, "loss": "l1", "pointing": 0.1}
RECORDED_FROM, READOUT_STEPS, NAVIGATE_EPISODES = 7_000_000, 1200, 400


def points() -> list[dict]:
    """The parts that `ABOUT` names, with three seeds each; what is not trained on the seed's data has one."""
    once = [
        *({"part": "readout", "readout": readout, "pointing": pointing}
          for readout, pointing in (("spatial", 0.1), ("spatial", 0.0), ("pooled", 0.0))),
        *({"part": "variants", "task": task, "variant": "none"} for task in TASKS),
        {"part": "robustness", "policy": "generic"},
        *({"part": "domain", "domain": domain, "method": "none"} for domain in DOMAINS),
        *({"part": "tokens", "task": task, "method": "none"} for task in TASKS),
    ]
    parts = [
        *({"part": "frames", "frames": frames, "legs": legs} for frames, legs in ((1, 2), (2, 2), (2, 3))),
        *({"part": "variants", "task": task, "variant": variant} for task in TASKS for variant in VARIANTS),
        *({"part": "recipe", "task": task, "source": source, "tower_rate": rate}
          for task, source, rate in (("forward", "generic", 5e-6), ("forward", "generic", 0.0), ("put_held_out", "towers", 5e-6))),
        *({"part": "robustness", "policy": augmentation} for augmentation in AUGMENTATIONS),
        *({"part": "domain", "domain": domain, "method": method} for domain in DOMAINS for method in ("target", "augmentation", "both")),
        *({"part": "tokens", "task": task, "method": "lora-16"} for task in TASKS),
        *({"part": "amount", "task": task, "demonstrations": count, "yaw": "circle"} for task in ("align", "assemble") for count in (50, 400)),
        {"part": "amount", "task": "align", "demonstrations": 400, "yaw": "range"},
    ]
    return [{**part, "seed": 0} for part in once] + [{**part, "seed": seed} for part in parts for seed in SEEDS]


def run(point: dict) -> dict:
    """Train what the point says and count."""
    return {"variants": by_variant, "recipe": by_recipe, "amount": by_amount, "frames": by_frames, "robustness": under_conditions,
            "domain": in_domain, "tokens": by_tokens, "readout": by_readout}[point["part"]](point)


@lru_cache(maxsize=4)
def recorded(task: str, count: int, seed: int, variation: Variation = Variation()):
    """`count` demonstrations to train on, ten to validate and ten to test, from the simulator's seeds that belong to `seed`: three lists."""
    made = list(record(task, episodes=count + 20, seed=RECORDED_FROM + 10_000 * seed, variation=variation, shares=(1, 0, 0), keep_failures=False))
    return made[:count], made[count : count + 10], made[count + 10 :]


def specialise(policy: WaypointPolicy, variant: str, demonstrations, seed: int, augment=None, **changes):
    """Fit `policy` in place to (train, validation, ...) demonstrations by our settings with some changed.   Returns the curves."""
    settings = {**OURS, **({"tower_rate": LORA_RATE} if variant == "lora" else {}), **changes}
    set_trainable(policy.model, variant, seed=seed)
    train, validation = (waypoint_samples(part, policy.model.frames) for part in demonstrations[:2])
    curves = fit(policy, train, validation, seed=seed, augment=augment, progress=False, **settings)
    policy.model = merged(policy.model)
    return curves


def accuracy(policy: WaypointPolicy, demonstrations) -> dict[str, float]:
    """Mean absolute error of each axis on the test demonstrations, in metres and radians; the grip's is a share."""
    found = action_accuracy(policy, waypoint_samples(demonstrations[2], policy.model.frames))
    return {axis: round(value["error"], 4) for axis, value in found.items()}


def on_an_old_task(policy) -> dict[str, int]:
    """Successes on put, which the policy knew before."""
    return {"old": counted(policy, "put", FEWER), "old_episodes": FEWER}


def by_variant(point: dict) -> dict:
    """Successes on the new task and on put, an old one; the error by axis."""
    policy, data = load_waypoint_policy(), recorded(point["task"], 50, point["seed"])
    about = {}
    if point["variant"] != "none":
        curves = specialise(policy, point["variant"], data, point["seed"])
        about = {"trainable": curves.trainable, "seconds": round(curves.seconds, 1)}
    about["error"] = accuracy(policy, data)
    return {"success": counted(policy, point["task"], EPISODES), "episodes": EPISODES, **on_an_old_task(policy), **about}


def by_recipe(point: dict) -> dict:
    """The lab sheet's settings on the last two layers; how far the towers move, as a share of their norm."""
    policy = policy_from_clip(seed=point["seed"]) if point["source"] == "towers" else load_waypoint_policy()
    data, before = recorded(point["task"], 50, point["seed"]), weights_of_towers(policy)
    curves = specialise(policy, "last-layers", data, point["seed"], **{**SHEET, "tower_rate": point["tower_rate"], "pointing": 0.0})
    moved = (weights_of_towers(policy) - before).norm() / before.norm()
    return {"success": counted(policy, point["task"], EPISODES), "episodes": EPISODES, "towers_moved": round(float(moved), 6),
            "error": accuracy(policy, data), "loss": round(curves.train[-1], 5)}


def weights_of_towers(policy: WaypointPolicy) -> torch.Tensor:
    """All weights of both towers, end to end."""
    return torch.cat([p.detach().flatten() for tower in policy.model.towers() for p in tower.parameters()])


def by_amount(point: dict) -> dict:
    """Successes after full fine-tuning on so many demonstrations; the error by axis, and of the yaw apart for grasping and placing, in radians."""
    align = point["task"] == "align"
    variation = Variation(bin_yaw=0.5) if align else Variation()
    data, policy = recorded(point["task"], point["demonstrations"], point["seed"], variation), load_waypoint_policy()
    policy = with_a_new_wrist(policy, point["yaw"]) if align else policy
    curves = specialise(policy, "full", data, point["seed"], **(WRIST if align else {}))
    held_out = waypoint_samples(data[1] + data[2])
    turned = [yaw_error(*both) for both in zip(predict(policy, held_out)[:, 5], held_out.actions[:, 5])]
    turn = {name: float(np.mean([error for error, held in zip(turned, held_out.holding) if held == holds]))
            for name, holds in (("grasp", False), ("place", True))}
    return {"success": counted(policy, point["task"], EPISODES, variation=variation), "episodes": EPISODES, "error": accuracy(policy, data),
            "turn": {name: round(value, 4) for name, value in turn.items()}, "seconds": round(curves.seconds, 1)}


def with_a_new_wrist(policy: WaypointPolicy, yaw: str) -> WaypointPolicy:
    """A copy whose head says the wrist's yaw as cosine and sine ("circle") or as one number from -1 to 1 ("range").

    What it says about the yaw starts at zero, the rest is the same.
    """
    old, copy = policy.model, policy.copy()
    normaliser = ActionNormaliser() if yaw == "range" else ActionNormaliser.tabletop()
    copy.model = TaskSpecificVLA(copy.model.vision_encoder, copy.model.text_encoder, old.readout, old.frames, old.action_head[3].in_features,
                                 old.action_head[2].p, normaliser)
    kept = {name: value.clone() for name, value in old.state_dict().items() if not name.startswith("normaliser.")}
    for name in ("action_head.3.weight", "action_head.3.bias"):
        kept[name][[old.normaliser.periodic, -1]] = 0.0
        kept[name] = kept[name][: normaliser.width]
    copy.model.load_state_dict(kept, strict=False)
    copy.model.eval()
    return copy


def by_frames(point: dict) -> dict:
    """Successes on paths of two and of three legs after training the head and the text tower on synthetic paths of so many legs."""
    frames, legs, seed = point["frames"], point["legs"], point["seed"]
    policy = with_two_frames(load_waypoint_policy()) if frames == 2 else load_waypoint_policy()
    train = synthetic_paths(800, RECORDED_FROM + 100_000 * seed, 8 if legs == 2 else 5, frames, legs)
    validation = synthetic_paths(20, RECORDED_FROM + 100_000 * seed + 50_000, 4, frames, legs)
    set_trainable(policy.model, "language")
    curves = fit(policy, train, validation, seed=seed, progress=False, **PATHS)
    found, counts = rollout(policy, "navigate", NAVIGATE_EPISODES, progress=False), legs_of(NAVIGATE_EPISODES)
    return {"success": {str(n): int(found.success[counts == n].sum()) for n in (2, 3)},
            "of": {str(n): int((counts == n).sum()) for n in (2, 3)}, "loss": round(curves.train[-1], 4), "samples": len(train),
            "seconds": round(curves.seconds, 1)}


def legs_of(episodes: int) -> np.ndarray:
    """How many legs the path of each evaluation episode has."""
    env, found = Tabletop("navigate"), []
    for seed in range(EVALUATION_SEED, EVALUATION_SEED + episodes):
        env.reset(seed=seed)
        found.append(len(env.episode.command.steps))
    return np.array(found)


def augmentation(name: str, demonstrations, seed: int) -> Augmentation | None:
    """One of AUGMENTATIONS for the first of (train, ...) demonstrations."""
    if name == "none":
        return None
    said = commands_of(demonstrations[0]) if name in ("words", "all") else {}
    return replace(Augmentation(**AUGMENTATIONS[name]), commands=said, seed=seed)


def under_conditions(point: dict) -> dict:
    """Successes on a new task and on put under each condition, fine-tuned by LoRA on forward; the generic policy beside it."""
    policy = load_waypoint_policy()
    if point["policy"] != "generic":
        data = recorded("forward", 50, point["seed"])
        specialise(policy, "lora", data, point["seed"], augmentation(point["policy"], data, point["seed"]))
    old = point["policy"] in ("generic", "none")
    return {kind: {name: int(under(policy, task, name, FEWER, progress=False).success.sum()) for name in CONDITIONS}
            for kind, task in (("success", "forward"), ("old", "put")) if kind == "success" or old} | {"episodes": FEWER, "old_episodes": FEWER}


def in_domain(point: dict) -> dict:
    """Successes on put where the camera or the light differs, after LoRA on 50 demonstrations from there, on augmented ones from home, or on both."""
    domain, method, seed = point["domain"], point["method"], point["seed"]
    policy, there = load_waypoint_policy(), DOMAINS[point["domain"]]
    if method != "none":
        data = recorded("put", 50, seed, there if method in ("target", "both") else Variation())
        name = {"camera": "crop", "dim": "colour"}[domain] if method in ("augmentation", "both") else "none"
        # The attention is not told where to look: the label's place is one of the usual camera's picture.
        specialise(policy, "lora", data, seed, augmentation(name, data, seed), pointing=0.0)
    return {"success": counted(policy, "put", EPISODES, variation=there), "episodes": EPISODES, **on_an_old_task(policy)}


def by_tokens(point: dict) -> dict:
    """The tiny VLA, which says its action in tokens, on the same demonstrations and episodes."""
    policy, data = load_policy("tiny", device="cpu"), recorded(point["task"], 50, point["seed"])
    about = {}
    if point["method"] != "none":
        about["seconds"] = round(few_shot.learn(policy, samples(data[0]), point["method"], point["seed"]).seconds, 1)
    return {"success": counted(policy, point["task"], EPISODES), "episodes": EPISODES, **on_an_old_task(policy), **about}


def by_readout(point: dict) -> dict:
    """Successes of a generic policy on pick and put, made in fewer steps than the shipped one."""
    from labkit.clip_policy_pretraining import Recipe, pretrain

    with tempfile.TemporaryDirectory() as folder:
        made = Recipe(steps=READOUT_STEPS, readout=point["readout"], pointing=point["pointing"], seed=point["seed"])
        log = pretrain(made, out=Path(folder), cache=Path(folder), progress=False)
        policy = load_waypoint_policy(folder)
    return {"success": {task: counted(policy, task, EPISODES) for task in ("pick", "put")}, "episodes": EPISODES, "loss": round(log[-1]["loss"], 4)}
