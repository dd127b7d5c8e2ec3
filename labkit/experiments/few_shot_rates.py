"""Which learning rate does each method of the few-shot experiment get? Chosen on episodes and seeds on which nothing is reported."""

from __future__ import annotations

from labkit.experiments import few_shot

ABOUT = ("success on stack after 100 steps on twenty demonstrations, on validation episodes and with other training seeds than few_shot's: full "
         "fine-tuning and LoRA of rank 8 and 16 on the final checkpoint, full fine-tuning and LoRA of rank 16 on the early and the middle one, each "
         "with three learning rates")
EPISODE_SEED, SEEDS, COUNT = 2_000_000, (100, 101), 20
CANDIDATES = {"full": (2e-4, 5e-4, 1e-3), "lora-8": (1e-3, 3e-3, 1e-2), "lora-16": (1e-3, 3e-3, 1e-2)}


def points() -> list[dict]:
    """Every candidate, with two seeds on the final checkpoint and with one on the others."""
    return [{"checkpoint": checkpoint, "method": method, "learning_rate": rate, "seed": seed}
            for checkpoint in few_shot.CHECKPOINTS for method, rates in CANDIDATES.items() for rate in rates
            for seed in (SEEDS if checkpoint == "tiny" else SEEDS[:1]) if checkpoint == "tiny" or method != "lora-8"]


def run(point: dict) -> dict:
    """Fine-tune once; successes on the validation episodes."""
    policy, data = few_shot.load_policy(point["checkpoint"], device="cpu"), few_shot.recorded(few_shot.TASK, COUNT, point["seed"])
    few_shot.learn(policy, few_shot.samples(data), point["method"], point["seed"], point["learning_rate"])
    return {"success": few_shot.counted(policy, few_shot.TASK, few_shot.EPISODES, seed=EPISODE_SEED), "episodes": few_shot.EPISODES}
