"""A tiny language model with a policy's interface: it reads a command and answers with four words. For the appendix that runs the lessons on text.

The text is the course's own: the sentences of instructions.py. What fine-tunes a robot (sft.py, forgetting.py, peft) fine-tunes this model, too.
"""

from __future__ import annotations

import copy
import time
from itertools import product

import numpy as np
import torch

from labkit.batches import supervised_sequence
from labkit.demonstrations import Samples
from labkit.instructions import COLOURS, SHAPES, ZONES, Command, say, sentences, vocabulary
from labkit.rollouts import EVALUATION_SEED, Rollouts

ANSWER = 4  # words
NOTHING = "none"
TASKS = ("pick", "put", "move", "beside")
_DESTINATIONS = {"pick": ("",), "put": COLOURS, "move": ZONES, "forward": ("forward",)}
_LONGEST = 24


class TextPolicy:
    """A causal language model, its tokenizer and the words it answers with; `fine_tune` takes it like any policy."""

    def __init__(self, model, tokenizer, name: str = "text"):
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.action_ids = torch.tensor([tokenizer.convert_tokens_to_ids(word) for word in answer_words()])

    def copy(self) -> "TextPolicy":
        """An independent policy with the same weights."""
        return TextPolicy(copy.deepcopy(self.model), self.tokenizer, self.name)

    def to_model(self, value):
        """A tensor on the model's device."""
        return value.to(self.model.device)

    def prompts(self, instructions, images=None, holding=None) -> dict[str, torch.Tensor]:
        """N sentences  ->  input_ids and attention_mask (N, T), padded on the left, each ending in `<act>`: now answer."""
        found = self.tokenizer([f"{text} <act>" for text in instructions], padding="max_length", max_length=_LONGEST, return_tensors="pt")
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    def tokenize(self, samples: Samples) -> dict[str, torch.Tensor]:
        """Prompts with their answers; only the four words of the answer are supervised.   samples: see `text_samples`."""
        prompt, words = self.prompts(samples.instructions), self.action_ids[torch.as_tensor(samples.actions)]
        ids, labels = supervised_sequence(prompt["input_ids"], words)
        return {"input_ids": ids, "labels": labels, "attention_mask": torch.cat([prompt["attention_mask"], torch.ones_like(words)], 1)}

    @torch.no_grad()
    def answer(self, instructions) -> list[str]:
        """The four most likely words, one after the other, for each sentence."""
        batch = {name: self.to_model(value) for name, value in self.prompts(instructions).items()}
        self.model.eval()
        out = self.model.generate(**batch, max_new_tokens=ANSWER, min_new_tokens=ANSWER, do_sample=False, pad_token_id=self.tokenizer.pad_token_id)
        return [" ".join(self.tokenizer.convert_ids_to_tokens(row)) for row in out[:, -ANSWER:].tolist()]


def text_policy(seed: int = 0, width: int = 64, layers: int = 2) -> TextPolicy:
    """An untrained one, a `LlamaForCausalLM`; the same weights for the same seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from labkit.tiny_vla import build_tokenizer

    tokenizer = build_tokenizer()
    config = LlamaConfig(hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, num_attention_heads=4, vocab_size=len(tokenizer),
                         tie_word_embeddings=False, initializer_range=0.04, max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TextPolicy(LlamaForCausalLM(config), tokenizer)


def answer_words() -> list[str]:
    """The words of the course, sorted, which an answer is made of."""
    return vocabulary()


def right_answer(command: Command) -> str:
    """A command in four words: what to do, colour, shape, where; "none" where it leads nowhere.   A reference object is named by its colour."""
    where = command.destination[0] if isinstance(command.destination, tuple) else command.destination
    return " ".join([command.task, *command.object, where or NOTHING])


def all_commands(task: str) -> list[Command]:
    """Every command of a task over all objects and destinations; another object of another colour where it leads to one."""
    objects = list(product(COLOURS, SHAPES))
    if task in _DESTINATIONS:
        return [Command(task, thing, where) for thing in objects for where in _DESTINATIONS[task]]
    return [Command(task, thing, other) for thing in objects for other in objects if other[0] != thing[0]]


def text_samples(tasks, count: int, seed: int = 0, held_out: bool = False, backwards: bool = False, one_phrasing: bool = False) -> Samples:
    """Sentences with their answers, drawn over `tasks` in turn: a dataset for `fine_tune`.

    held_out: phrasings that pretraining keeps aside.   backwards: answers in another style, the words in reverse order.
    one_phrasing: always the same words for the same command.
    Returns Samples without pictures, whose actions are (count, 4) places in `answer_words()`.
    """
    rng, places = np.random.default_rng(seed), {word: place for place, word in enumerate(answer_words())}
    commands = {task: all_commands(task) for task in tasks}
    said, answers = [], []
    for n in range(count):
        options = commands[tasks[n % len(tasks)]]
        command = options[rng.integers(len(options))]
        said.append(sentences(command)[0] if one_phrasing else say(command, rng, held_out))
        words = right_answer(command).split()
        answers.append([places[word] for word in (reversed(words) if backwards else words)])
    return Samples(said, np.zeros((count, 0)), np.zeros(count, bool), np.array(answers))


def answered(policy: TextPolicy, task: str, count: int = 100, seed: int = EVALUATION_SEED, held_out: bool = False,
             backwards: bool = False) -> Rollouts:
    """How often all four words are right, on sentences drawn from `seed`: success of a policy that has no body."""
    asked = text_samples([task], count, seed, held_out, backwards)
    words, begun = answer_words(), time.perf_counter()
    given = policy.answer(asked.instructions)
    right = np.array([text == " ".join(words[place] for place in places) for text, places in zip(given, asked.actions)])
    nothing = np.zeros(count)
    return Rollouts(task, right, seed + np.arange(count), np.ones(count, int), nothing, nothing, time.perf_counter() - begun)
