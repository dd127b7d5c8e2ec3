"""Bottleneck adapters on a new task: how wide, how many a layer, and how they start; against full fine-tuning and against one matrix."""

from __future__ import annotations

import torch

from labkit.adapters import BottleneckConfig, add_adapter
from labkit.demonstrations import samples
from labkit.experiments.measuring import counted, counted_on_old_tasks, shipped, thinned
from labkit.policy import Policy, load_policy
from labkit.sft import fine_tune, train_only

TASK = "stack"
ABOUT = ("success in closed loop on stack after 10, 25, 50 and 100 steps on 50 demonstrations, and on the old tasks after the last step (for each "
         "start of the adapters also before the first): bottleneck adapters by width, placement and standard deviation of W_up at the start, full "
         "fine-tuning, one whole matrix of the model with as many parameters, and adapters that start with both matrices zero; learning rates "
         "chosen on validation episodes, and smaller ones for adapters and full fine-tuning")
SEEDS = range(3)
STEPS = (10, 25, 50, 100)
EPISODES = 100
OLD_EPISODES = 50
WIDTHS = (4, 16, 64)
# 0.35 is about what He et al. (arXiv 1502.01852) give a layer that is trained from nothing: the root of 2 / 16.
STARTS = (0.02, 0.1, 0.2, 0.35, 1.0)
# Episodes and training seeds that only choose the learning rate; success is reported on others.
VALIDATION_SEED = 2_000_000
VALIDATION_SEEDS = (100, 101)
CANDIDATES = (1e-3, 3e-3, 1e-2, 3e-2)
# The best of the candidates for each, as the validation points of this sweep have it; full fine-tuning has the course's.
RATES = {"layer": 1e-2, "houlsby": 1e-2, "random": 1e-2, "one matrix": 1e-2, "full": 5e-4}
# Smaller ones, for what a gentler training learns and keeps.
GENTLER = {"layer": (1e-3, 3e-3), "full": (1e-4, 2e-4)}
# A whole weight matrix, (128, 128): about as many parameters as adapters of width 16 after each layer have.
MATRIX = "language_model.layers.1.self_attn.v_proj.weight"


def points() -> list[dict]:
    """The validation points, then every setting with every seed, then two of them with smaller learning rates."""
    compared = [_adapter("layer", 16), _adapter("houlsby", 16), _adapter("layer", 16, 0.35), {"method": "one matrix"}]
    validation = [{**setting, "use": "validation", "learning_rate": rate, "seed": seed}
                  for setting in compared for rate in CANDIDATES for seed in VALIDATION_SEEDS]
    settings = [
        {"method": "full", "learning_rate": RATES["full"]},
        *({**_adapter(placement, width), "learning_rate": RATES[placement]} for placement in ("layer", "houlsby") for width in WIDTHS),
        *({**_adapter("layer", 16, std), "learning_rate": RATES["random"]} for std in STARTS),
        {"method": "one matrix", "learning_rate": RATES["one matrix"]},
        {"method": "both zero", "learning_rate": RATES["layer"]},
    ]
    slower = ((_adapter("layer", 16), GENTLER["layer"]), ({"method": "full"}, GENTLER["full"]))
    gentler = [{**setting, "learning_rate": rate} for setting, rates in slower for rate in rates]
    return validation + [{**setting, "use": use, "seed": seed} for use, chosen in (("test", settings), ("gentler", gentler))
                         for setting in chosen for seed in SEEDS]


def _adapter(placement, width, std=0.0):
    return {"method": "adapter", "placement": placement, "bottleneck": width, "init_std": std}


def run(point: dict) -> dict:
    """Fine-tune once; success (counts) by step on the new task and at the end on the old ones, and before the first step where starts differ."""
    policy = prepared(point)
    data = samples(shipped(TASK))
    options = {"steps": max(STEPS), "learning_rate": point["learning_rate"], "seed": point["seed"], "progress": False}
    if point["use"] == "validation":
        fine_tune(policy, data, **options)
        return {"success": {str(max(STEPS)): counted(policy, TASK, EPISODES, seed=VALIDATION_SEED)}, "episodes": EPISODES}
    # Adapters of other widths and places start as the identity, as the first of these does.
    before = counted_on_old_tasks(policy, OLD_EPISODES) if (point.get("placement"), point.get("bottleneck")) == ("layer", 16) else None
    learned = {}

    def measure(step, policy, history):
        if step + 1 in STEPS:
            learned[str(step + 1)] = counted(policy, TASK, EPISODES)

    history = fine_tune(policy, data, callbacks=[measure], **options)
    return {"success": learned, "episodes": EPISODES, "before": before, "old": counted_on_old_tasks(policy, OLD_EPISODES),
            "old_episodes": OLD_EPISODES, "trained": history.trainable, "loss_curve": thinned(history.loss)}


def prepared(point: dict) -> Policy:
    """The policy with what the setting adds, and with what it trains requiring a gradient."""
    policy = load_policy("tiny", device="cpu")
    if point["method"] == "one matrix":
        train_only(policy.model, MATRIX)
    elif point["method"] in ("adapter", "both zero"):
        config = BottleneckConfig(point.get("bottleneck", 16), point.get("placement", "layer"), init_std=point.get("init_std", 0.0))
        add_adapter(policy.model, config, seed=point["seed"])
        if point["method"] == "both zero":
            zero_everything(policy.model)
    return policy


def zero_everything(model) -> None:
    """Set every parameter that requires a gradient to zero: adapters that are the identity and have nothing to learn with."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
