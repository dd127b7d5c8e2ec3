"""What keeps the old tasks while a new one is learned: EWC, L2, KL, mixing, LoRA and adapters at equal cost; the lecture's questions 1 and 4."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from labkit.adapters import BottleneckConfig
from labkit.demonstrations import Samples, samples
from labkit.experiments.measuring import OTHERS, shipped
from labkit.forgetting import (
    KLAnchor,
    action_logits,
    diagonal_fisher,
    displacement,
    ewc_penalty,
    kl_divergence,
    l2_penalty,
    start_of,
)
from labkit.policy import Policy, load_policy
from labkit.rollouts import EVALUATION_SEED, lock_step
from labkit.sft import fine_tune, lora, tokenize
from labkit.tabletop import Tabletop, Variation
from labkit.tabletop.scene import OBJECT_AREA, OBJECT_SPACING
from labkit.tabletop.tasks import PRETRAINING_TASKS, index_of

TASK = "stack"
ABOUT = ("success on stack, on the old tasks and beyond them (unseen phrasings, novel objects, an object pushed away before the first grasp) after "
         "1,600 samples on 50 demonstrations, replayed samples and the Fisher pass included: naive fine-tuning, EWC, L2 to the start, KL to the "
         "frozen policy, mixing as a share of the batch and as a weight in the loss, LoRA and adapters; `kl` to the pretrained policy on old "
         "samples, in nats an action token, and what the diagonal Fisher expects of it. Validation points choose the strengths; the others have "
         "other episodes and other training seeds. second task: five of them on forward. question 1: 30 demonstrations, 500 steps, full against "
         "LoRA; question 4: mixing 80/20, 200 steps, with losses by step on demonstrations that were trained on and on others")
SEEDS = range(3)
VALIDATION_SEED, VALIDATION_SEEDS = 2_000_000, (100, 101)
BUDGET, BATCH = 1600, 16
FISHER_SAMPLES = 128
EPISODES, OLD_EPISODES, BEYOND_EPISODES = 100, 50, 50
RATES = {"lora": 1e-3, "adapters": 3e-3}
FULL_RATE = 5e-4
STRENGTHS = {
    "ewc": (1e2, 1e3, 1e4, 1e5),
    "l2": (0.1, 0.5, 2.0),
    "kl": (0.5, 2.0, 8.0),
    "share": (0.0625, 0.125, 0.25, 0.5, 1.0),
    "weight": (0.25, 0.5),
}
# Looked at beyond the old tasks, too, and the first four on a second new task.
WATCHED = ({"method": "naive"}, {"method": "ewc", "strength": 1e3}, {"method": "kl", "strength": 8.0}, {"method": "share", "strength": 0.25},
           {"method": "ewc", "strength": 1e4}, {"method": "lora"}, {"method": "adapters"})
SECOND_TASK = "forward"
QUESTION_4_STEPS = (0, 25, 50, 100, 200)
# name -> (task, variation, held-out phrasing)
BEYOND = {
    "unseen phrasing": ("put", Variation(), True),
    "novel object": ("put", Variation(novel=True), False),
    "pushed object": ("put", Variation(), False),
    "camera": ("put", Variation(camera_shift=(0.1, 0.0, 0.0)), False),
    "light": ("put", Variation(light=0.3), False),
}
FRONTIER_BEYOND = ("unseen phrasing", "novel object", "pushed object")


def points() -> list[dict]:
    """The validation points, the frontier, and the two questions."""
    chosen_from = [{"method": method, "strength": strength} for method, strengths in STRENGTHS.items() for strength in strengths]
    compared = [{"method": "pretrained"}, {"method": "naive"}, *chosen_from, {"method": "lora"}, {"method": "adapters"}]
    return [
        *({"part": "validation", **setting, "seed": seed} for setting in chosen_from for seed in VALIDATION_SEEDS),
        *({"part": "question 4", "alpha": alpha, "seed": seed} for alpha in (0.0, 0.2) for seed in SEEDS),
        *({"part": "frontier", **setting, "seed": seed} for setting in compared for seed in SEEDS),
        *({"part": "question 1", "method": method, "seed": seed} for method in ("naive", "lora") for seed in SEEDS),
        *({"part": "second task", **setting, "seed": seed} for setting in WATCHED[:4] for seed in SEEDS),
    ]


def run(point: dict) -> dict:
    """One point; counts of successes with their episodes, losses and KL in nats an action token."""
    return {"question 1": question_1, "question 4": question_4}.get(point["part"], frontier)(point)


def frontier(point: dict) -> dict:
    """Fine-tune once by one method at the common cost, and measure what was learned and what is left."""
    policy, seed, method = load_policy("tiny", device="cpu"), point["seed"], point["method"]
    task = SECOND_TASK if point["part"] == "second task" else TASK
    history = None if method == "pretrained" else learn(policy, method, point.get("strength"), seed, task)
    if point["part"] == "validation":
        return measured(policy, VALIDATION_SEED)
    setting = {name: point[name] for name in ("method", "strength") if name in point}
    beyond = tuple(BEYOND) if history is None else FRONTIER_BEYOND if setting in WATCHED and task == TASK else ()
    return {**measured(policy, _episodes_of(seed), beyond, task), **_distance(policy, seed), "cost": _cost(method, history)}


def learn(policy, method: str, strength: float | None, seed: int, task: str = TASK, progress: bool = False):
    """Fine-tune `policy` in place on a new task by a method, with as many steps as the budget leaves.   Returns the history.

    method: "naive", a key of STRENGTHS, "lora" or "adapters".   strength: lambda, beta or alpha.
    """
    options = {"steps": (BUDGET - upfront(method)) // BATCH, "batch_size": BATCH, "learning_rate": RATES.get(method, FULL_RATE),
               "seed": seed, "progress": progress}
    if method == "ewc":
        options["penalty"] = ewc_penalty(start_of(policy.model), pretrained_fisher(seed), strength)
    elif method == "l2":
        options["penalty"] = l2_penalty(start_of(policy.model), strength)
    elif method == "kl":
        options |= {"penalty": KLAnchor(policy, replay(), strength, BATCH // 2, seed), "batch_size": BATCH // 2}
    elif method in ("share", "weight"):
        options |= {"mixed_with": replay(), "alpha": strength, "mixed_by": method}
    elif method != "naive":
        options["peft_config"] = lora(16) if method == "lora" else BottleneckConfig(16)
    return fine_tune(policy, new(task), **options)


def upfront(method: str) -> int:
    """What a method costs before its first step, in samples: the Fisher pass, or a forward pass alone, taken for a third, over all replay."""
    return {"ewc": FISHER_SAMPLES, "kl": len(replay()) // 3}.get(method, 0)


def measured(policy, first_episode: int, beyond=(), task: str = TASK) -> dict:
    """Counts of successes on the new task, on each old one, and on those of BEYOND that are named."""
    found = {"success": {task: _count(policy, task, episodes=EPISODES, seed=first_episode)}, "episodes": EPISODES,
             "old": {name: _count(policy, name, episodes=OLD_EPISODES, seed=first_episode) for name in PRETRAINING_TASKS},
             "old_episodes": OLD_EPISODES}
    if beyond:
        found |= {"beyond": {name: beyond_count(policy, name, BEYOND_EPISODES, first_episode) for name in beyond}, "beyond_episodes": BEYOND_EPISODES}
    return found


def beyond_count(policy, name: str, episodes: int, seed: int) -> int:
    """Successes on one suite of BEYOND."""
    return _count(policy, *BEYOND[name], episodes=episodes, seed=seed, table=PushedTabletop if name == "pushed object" else Tabletop)


class PushedTabletop(Tabletop):
    """Somebody moves the object after the policy has looked: the first grasp finds nothing, and one decision fewer is left."""

    def step(self, action):
        """As in `Tabletop`; before the first decision is carried out, the object is somewhere else."""
        if not len(self._reached):
            self._push()
        return super().step(action)

    def _push(self, distance=0.1):
        """Move the object by 10 cm, in the direction that leaves most room to the others and stays where objects are put."""
        import mujoco

        index = index_of(self.episode.scene, self.episode.command.object)
        poses = self.data.qpos[self._objects].reshape(-1, 7)
        others = np.delete(poses[:, :2], index, axis=0)
        angles = np.linspace(0, 2 * np.pi, 32, endpoint=False)
        places = poses[index, :2] + distance * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        places = np.clip(places, *np.array(OBJECT_AREA).T)
        room = np.linalg.norm(places[:, None] - others, axis=-1).min(1).clip(max=OBJECT_SPACING)
        went = np.linalg.norm(places - poses[index, :2], axis=1)
        poses[index, :2] = places[np.argmax(room + went)]
        mujoco.mj_forward(self.model, self.data)


def question_1(point: dict) -> dict:
    """30 demonstrations, 500 steps: full fine-tuning or LoRA of rank 16 on the attention, and where the parameters went."""
    policy, seed = load_policy("tiny", device="cpu"), point["seed"]
    config = lora(16) if point["method"] == "lora" else None
    history = fine_tune(policy, new(TASK, 30), steps=500, batch_size=8, learning_rate=RATES.get(point["method"], FULL_RATE), peft_config=config,
                        seed=seed, progress=False)
    found = {**measured(policy, _episodes_of(seed)), **_distance(policy, seed), "trainable": history.trainable}
    parts = displacement(merged(policy).model, start_of(load_policy("tiny", device="cpu").model), pretrained_fisher(seed))
    return {**found, "displacement": {module: {kind: float(f"{value:.4g}") for kind, value in part.items()} for module, part in parts.items()}}


def question_4(point: dict) -> dict:
    """Mixing 80/20 for 200 steps: losses by step on new and old samples, trained on and not, and success beyond the training distribution."""
    policy, seed = load_policy("tiny", device="cpu"), point["seed"]
    seen, unseen = replay_halves()
    sets = {"new, trained on": new(), "new, others": new_others(), "old, trained on": seen, "old, others": unseen}
    losses = {}

    def look(step, policy, history):
        if step + 1 in QUESTION_4_STEPS:
            losses[str(step + 1)] = {name: loss_on(policy, data) for name, data in sets.items()}

    look(-1, policy, None)
    fine_tune(policy, new(), steps=max(QUESTION_4_STEPS), batch_size=15, learning_rate=FULL_RATE, seed=seed, mixed_with=seen, alpha=point["alpha"],
              callbacks=[look], progress=False)
    return {**measured(policy, _episodes_of(seed), tuple(BEYOND)), **_distance(policy, seed), "losses": losses,
            "sharpened": {name: sharpened(policy, data) for name, data in sets.items()}}


def loss_on(policy, data: Samples) -> float:
    """Mean loss over the action tokens of all samples, in nats."""
    batch = tokenize(policy, data)
    return round(float(action_token_loss_of(action_logits(policy.model, batch), batch["labels"][:, -4:])), 4)


def action_token_loss_of(logits, tokens) -> torch.Tensor:
    """Mean cross-entropy of (N, 4, V) logits that predict (N, 4) tokens."""
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def sharpened(policy, data: Samples) -> dict[str, float]:
    """The loss with the best single temperature for all logits, which changes no decision: how much of a loss is a matter of sharpness."""
    batch = tokenize(policy, data)
    logits, tokens = action_logits(policy.model, batch), batch["labels"][:, -4:]
    tried = {t: float(action_token_loss_of(logits / t, tokens)) for t in np.geomspace(0.1, 3.0, 60).tolist()}
    best = min(tried, key=tried.get)
    return {"temperature": round(best, 3), "loss": round(tried[best], 4)}


@lru_cache(maxsize=None)
def pretrained_fisher(seed: int) -> dict:
    """The diagonal Fisher of the pretrained policy on FISHER_SAMPLES old samples, with actions that it draws itself."""
    rows = np.random.default_rng([seed, 7]).permutation(len(replay()))[:FISHER_SAMPLES]
    return diagonal_fisher(load_policy("tiny", device="cpu"), rows_of(replay(), rows), "model", seed)


@lru_cache(maxsize=None)
def new(task: str = TASK, demonstrations: int | None = None) -> Samples:
    """The demonstrations of a new task, all 50 or the first few."""
    return samples(shipped(task)[:demonstrations])


@lru_cache(maxsize=None)
def new_others() -> Samples:
    """Demonstrations of the new task that nothing is trained on."""
    return samples(shipped(TASK, OTHERS))


@lru_cache(maxsize=None)
def replay() -> Samples:
    """The pretraining demonstrations to mix in."""
    return samples(shipped("replay"))


@lru_cache(maxsize=None)
def replay_halves() -> tuple[Samples, Samples]:
    """The first and the second half of them, with the same tasks in the same shares: one to train on, one to look at."""
    found = shipped("replay")
    return samples(found[: len(found) // 2]), samples(found[len(found) // 2 :])


@lru_cache(maxsize=None)
def replay_others() -> Samples:
    """Pretraining demonstrations that are never mixed in."""
    return samples(shipped("replay", OTHERS))


def rows_of(data: Samples, rows) -> Samples:
    """Some of the samples.   rows: int array."""
    return Samples([data.instructions[i] for i in rows], data.images[rows], data.holding[rows], data.actions[rows])


def merged(policy) -> Policy:
    """A copy with LoRA folded into the weights, so that parameters have the pretrained model's names; without LoRA, the policy itself."""
    if not hasattr(policy.model, "merge_and_unload"):
        return policy
    copy = policy.copy()
    copy.model = copy.model.merge_and_unload()
    return copy


def _distance(policy, seed):
    """`kl` on old samples that nothing was trained on, and `expected_kl`, what the diagonal Fisher makes of the way that the parameters went."""
    start = load_policy("tiny", device="cpu")
    batch = tokenize(start, replay_others())
    kl = float(kl_divergence(action_logits(start.model, batch), action_logits(policy.model, batch)))
    expected = None
    if not hasattr(policy.model, "_bottleneck_record"):
        parts = displacement(merged(policy).model, start_of(start.model), pretrained_fisher(seed))
        expected = float(f"{sum(part['weighted'] for part in parts.values()) / 4:.4g}")
    return {"kl": round(kl, 4), "expected_kl": expected}


def _cost(method, history):
    if history is None:
        return {"steps": 0, "samples": 0, "seconds": 0.0}
    anchored = history.samples if method == "kl" else 0
    return {"steps": len(history.loss), "samples": history.samples + anchored + upfront(method), "seconds": round(history.seconds, 2)}


def _episodes_of(seed):
    """Each seed has its own episodes; the methods share them."""
    return EVALUATION_SEED + EPISODES * seed


def _count(policy, task, variation=Variation(), held_out_phrasing=False, *, episodes, seed, table=Tabletop):
    """Successes, as `rollout` counts them, without timing the policy."""
    environments = [table(task, variation, held_out_phrasing) for _ in range(episodes)]
    observations = [env.reset(seed=seed + i)[0] for i, env in enumerate(environments)]
    return int(lock_step(policy, environments, observations)[0].sum())
