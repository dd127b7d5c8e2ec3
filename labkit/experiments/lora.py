"""How much rank does a new task need? LoRA by rank and learning rate on a near and a far task, and what one update of full rank says beforehand."""

from __future__ import annotations

import re

import numpy as np
import torch

from labkit.adapters import BottleneckConfig
from labkit.demonstrations import samples
from labkit.experiments.measuring import OTHERS, counted, counted_on_layouts_of, counted_on_old_tasks, shipped
from labkit.policy import load_policy
from labkit.sft import batch_loss, fine_tune, lora, tokenize, train_only

ABOUT = ("success after 25, 50 and 100 steps on 50 demonstrations, on the layouts of the demonstrations and on the old tasks after 100, and the "
         "loss on training and other demonstrations. rank: LoRA on the attention, alpha / r = 2, by rank and learning rate; matrices: the same "
         "matrices trained whole, and their update cut down to each rank afterwards; targets, scaling: rank 16 on all linear layers, and with "
         "another alpha / r; methods: adapters, QLoRA and full fine-tuning beside them")
TASKS = ("stack", "forward")
SEEDS = range(3)
STEPS = (25, 50, 100)
EPISODES = 100
OLD_EPISODES = 50
RANKS = (1, 2, 4, 8, 16, 32, 64)
RATES = (1e-3, 3e-3, 1e-2)
MATRICES_RATE, ADAPTER_RATE, FULL_RATE = 2e-3, 1e-2, 5e-4
ATTENTION = re.compile(r"language_model.*\.(q|k|v|o)_proj\.weight$")


def points() -> list[dict]:
    """The parts named above, on both tasks, with three seeds each."""
    parts = [
        {"part": "matrices", "learning_rate": MATRICES_RATE},
        *({"part": "methods", "method": method, "learning_rate": rate} for method, rate in
          (("full", FULL_RATE), ("adapters", ADAPTER_RATE), ("qlora", RATES[0]))),
        *({"part": "rank", "rank": rank, "learning_rate": rate} for rank in RANKS for rate in RATES),
        {"part": "targets", "targets": "all", "learning_rate": RATES[0]},
        *({"part": "scaling", "scaling": scaling, "learning_rate": RATES[0]} for scaling in (0.25, 8.0)),
    ]
    return [{**part, "task": task, "seed": seed} for part in parts for task in TASKS for seed in SEEDS]


def run(point: dict) -> dict:
    """Fine-tune once. Successes are counts; `seen` is on the layouts of the training demonstrations, `losses` in nats per action token."""
    task, learned = point["task"], {}
    policy = load_policy("tiny", quantization="nf4" if point.get("method") == "qlora" else None, device="cpu")
    pretrained = attention_weights(policy.model)
    if point["part"] == "matrices":
        train_attention_only(policy.model)
    train = shipped(task)

    def measure(step, policy, history):
        if step + 1 in STEPS:
            learned[str(step + 1)] = counted(policy, task, EPISODES)

    history = fine_tune(policy, samples(train), steps=max(STEPS), peft_config=_added(point), learning_rate=point["learning_rate"],
                        seed=point["seed"], callbacks=[measure], progress=False)
    old = counted_on_old_tasks(policy, OLD_EPISODES)
    found = {"success": learned, "episodes": EPISODES, "old": old, "old_episodes": OLD_EPISODES, "all_old": sum(old.values()),
             "all_old_episodes": OLD_EPISODES * len(old), "seen": counted_on_layouts_of(policy, train), "seen_episodes": len(train),
             "losses": {"train": loss_on(policy, train), "others": loss_on(policy, shipped(task, OTHERS))}, "trainable": history.trainable}
    if point["part"] == "matrices":
        found["cut"] = {str(rank): counted(cut_to_rank(policy, pretrained, rank), task, EPISODES) for rank in RANKS}
    return found


def _added(point):
    if point.get("method") == "adapters":
        return BottleneckConfig(16)
    if point["part"] == "matrices" or point.get("method") == "full":
        return None
    rank = point.get("rank", 16)
    return lora(rank, alpha=rank * point.get("scaling", 2.0), targets=point.get("targets", "attention"))


def attention_weights(model) -> dict[str, torch.Tensor]:
    """Copies of the language model's attention projections (q, k, v, o) by name; none where LoRA has renamed or NF4 has packed them."""
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if ATTENTION.search(name)}


def train_attention_only(model) -> None:
    """Freeze every parameter but the language model's attention projections, the matrices that LoRA gets by default."""
    train_only(model, ATTENTION)


def rank_for(update: torch.Tensor, share: float) -> int:
    """The smallest rank whose best approximation of `update` keeps at least this share of its squared norm."""
    values = np.linalg.svd(update.double().numpy(), compute_uv=False)
    lost = np.add.accumulate(values[::-1] ** 2)[::-1]  # squared norm of what is left out at ranks 0, 1, 2, ...
    return max(1, np.count_nonzero(lost > (1 - share) * lost[0]))


def best_of_rank(update: torch.Tensor, rank: int) -> torch.Tensor:
    """The matrix of this rank that is nearest to `update`, of the same shape: its largest singular directions (Eckart and Young, 1936)."""
    left, values, right = torch.linalg.svd(update, full_matrices=False)
    return left[:, :rank] * values[:rank] @ right[:rank]


def cut_to_rank(policy, pretrained: dict[str, torch.Tensor], rank: int):
    """A copy of a policy in which every attention projection's update since `pretrained` is replaced by the nearest one of this rank."""
    cut = policy.copy()
    with torch.no_grad():
        for name, weight in cut.model.named_parameters():
            if name in pretrained:
                weight.copy_(pretrained[name] + best_of_rank(weight - pretrained[name], rank))
    return cut


def loss_on(policy, demonstrations) -> float:
    """Mean loss over the action tokens of all decisions, in nats."""
    with torch.no_grad():
        return round(float(batch_loss(policy.model, tokenize(policy, samples(demonstrations)))), 4)
