"""Which tokens should the loss count? A new task learned from action tokens only, from all text, or from every token."""

from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np
import torch

from labkit.batches import IGNORED
from labkit.demonstrations import Samples, samples
from labkit.experiments.measuring import counted, counted_on_old_tasks, shipped, thinned
from labkit.policy import load_policy
from labkit.sft import action_token_loss, batch_loss, fine_tune

ABOUT = ("success in closed loop on a new task after 10, 25, 50 and 100 steps of full fine-tuning on 50 demonstrations, and on the old tasks "
         "after 100, with the loss over action tokens, over text and action tokens, or over every token; with small talk before the "
         "instruction or without")
SEEDS = range(5)
STEPS = (10, 25, 50, 100)
EPISODES = 100
OLD_EPISODES = 50
# Sentences that ask for nothing, all of words that the robot knows.
SMALL_TALK = (
    "hello robot are you ready", "we will do this slowly and carefully", "there is no danger here", "okay thanks that was done already",
    "i will wait until you are done", "this is not hard for you", "you did it and you can do it again", "never see it as a limit",
    "now where are we", "do not wait for me", "here is your next task", "it is a small one",
)


def points() -> list[dict]:
    """task x loss x seed without small talk, and with 32 words of it on the harder task."""
    plain = [{"task": task, "loss": loss, "words": 0, "seed": seed} for task in ("stack", "forward") for loss in LOSSES for seed in SEEDS]
    return plain + [{"task": "stack", "loss": loss, "words": 32, "seed": seed} for loss in LOSSES for seed in SEEDS]


def run(point: dict) -> dict:
    """Fine-tune once; success (counts) by step on the new task and at the end on the old ones."""
    task, words = point["task"], point["words"]
    policy = load_policy("tiny", device="cpu")
    listener, learned = Talkative(policy, words), {}

    def measure(step, policy, history):
        if step + 1 in STEPS:
            learned[str(step + 1)] = counted(listener, task, EPISODES)

    history = fine_tune(policy, training_samples(task, words), steps=max(STEPS), seed=point["seed"], loss=LOSSES[point["loss"]],
                        callbacks=[measure], progress=False)
    old = counted_on_old_tasks(listener, OLD_EPISODES)
    return {"success": learned, "old": old, "episodes": EPISODES, "old_episodes": OLD_EPISODES, "loss_curve": thinned(history.loss)}


def training_samples(task: str, words: int) -> Samples:
    """The shipped demonstrations of `task`, each instruction behind `words` words of small talk."""
    found = samples(shipped(task))
    said = [with_small_talk(text, words, salt=f"train{i}") for i, text in enumerate(found.instructions)]
    return replace(found, instructions=said)


def with_small_talk(instruction: str, words: int, salt: str = "") -> str:
    """`instruction` behind whole sentences of at least `words` words, always the same for the same instruction and salt."""
    rng = np.random.default_rng(zlib.crc32(f"{salt}/{instruction}".encode()))
    said: list[str] = []
    while sum(len(sentence.split()) for sentence in said) < words:
        said.append(SMALL_TALK[rng.integers(len(SMALL_TALK))])
    return " ".join([*said, instruction])


class Talkative:
    """A policy that hears small talk before every instruction; decides as `Policy.decide` does."""

    def __init__(self, policy, words: int):
        self.policy, self.words = policy, words

    def decide(self, observations):
        """observations: as for `Policy.decide`.   Returns its `Decision`."""
        return self.policy.decide(observations, [with_small_talk(o["instruction"], self.words) for o in observations])


def text_loss(model, batch) -> torch.Tensor:
    """Mean cross-entropy over every word and every action token; padding and the places of the image do not count."""
    return _loss_without(model, batch, [model.config.image_token_id])


def every_token_loss(model, batch) -> torch.Tensor:
    """Mean cross-entropy over every token but padding."""
    return _loss_without(model, batch, [])


def _loss_without(model, batch, ids):
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    labels = labels.masked_fill(torch.isin(labels, torch.tensor(ids, dtype=torch.long)), IGNORED)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return action_token_loss(model(**inputs, use_cache=False).logits, labels)


LOSSES = {"action tokens": batch_loss, "text and action tokens": text_loss, "every token": every_token_loss}
