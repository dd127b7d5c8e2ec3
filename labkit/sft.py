"""Supervised fine-tuning: the loss over action tokens and `fine_tune`. It imports nothing that comes after it; watch it by callbacks."""

from __future__ import annotations

import re
import time
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn.functional import cross_entropy, pad

from labkit.batches import IGNORED, with_action
from labkit.demonstrations import Samples


@dataclass
class History:
    """How a fine-tuning run went.   loss: one value a step, nats a supervised token, with the penalty where there is one.

    seconds, tokens: of the whole run.   samples: how many went through the model, and how many of these were `replayed`, that is mixed in.
    """

    loss: list[float] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0
    trainable: int = 0
    total: int = 0
    samples: int = 0
    replayed: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Tokens read by the model, prompt and image included, for each second."""
        return self.tokens / self.seconds

    def __str__(self):
        if not self.loss:
            return f"no steps, {self.trainable:,} of {self.total:,} parameters would be trained"
        return (f"{len(self.loss)} steps in {self.seconds:.1f} s, {self.tokens_per_second:,.0f} tokens/s, loss {self.loss[0]:.2f} to "
                f"{np.mean(self.loss[-10:]):.2f} nats, {self.trainable:,} of {self.total:,} parameters trained")


def action_token_loss(logits, labels):
    """Mean cross-entropy over the supervised tokens (teacher forcing).

    logits: (B, T, V) float, position t predicts token t + 1.   labels: (B, T) int, -100 where not supervised.
    Returns a scalar in nats.   Raises ValueError if a row supervises no token.
    """
    targets = labels[:, 1:]
    if (targets != IGNORED).sum(1).min() == 0:
        raise ValueError("a row of labels is -100 everywhere: it teaches nothing")
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)


def tokenize(policy, samples: Samples) -> dict[str, torch.Tensor]:
    """Everything the model needs to learn from `samples`, as tensors whose first dimension is N: done once, not in every step.

    A policy with a `tokenize` of its own does it itself.
    Raises ValueError for a model whose processor packs the images of a batch together, so that no batch can be taken from it.
    """
    if hasattr(policy, "tokenize"):
        return policy.tokenize(samples)
    prompt = policy.prompts(samples.instructions, samples.images, samples.holding)
    packed = [name for name, value in prompt.items() if len(value) != len(samples)]
    if packed:
        raise ValueError(f"{packed[0]} has {len(prompt[packed[0]])} rows for {len(samples)} samples: this model packs its images together")
    return with_action(prompt, policy.action_ids, samples.actions)


def batch_loss(model, batch) -> torch.Tensor:
    """Loss of one tokenized batch; only the positions that predict an action token go through the last MLP and the output layer."""
    labels = batch["labels"]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    keep = int((labels != IGNORED).any(0).flip(0).nonzero().max()) + 2
    keep = min(keep, labels.shape[1])
    with _last_mlp_on(model, keep, labels.shape[1]):
        logits = model(**inputs, logits_to_keep=keep, use_cache=False).logits
    return action_token_loss(logits[:, -keep:], labels[:, -keep:])


@contextmanager
def _last_mlp_on(model, keep, length):
    """Let the MLP of the last decoder layer see the last `keep` of `length` positions only: nothing reads what it makes of the others.

    The loss and every gradient stay what they are (the skipped positions would receive a gradient of zero), for an eighth less work.
    A model without such a layer runs as it is.
    """
    decoder = getattr(model, "get_decoder", lambda: None)()
    mlp = getattr(decoder.layers[-1], "mlp", None) if hasattr(decoder, "layers") else None
    if mlp is None:
        yield
        return
    hooks = [
        mlp.register_forward_pre_hook(lambda _, inputs: (inputs[0][:, -keep:],)),
        mlp.register_forward_hook(lambda _, inputs, out: pad(out, (0, 0, length - keep, 0))),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def fine_tune(policy, samples: Samples, steps: int = 100, batch_size: int = 16, learning_rate: float = 5e-4, peft_config=None,
              weight_decay: float = 0.0, clip: float = 1.0, seed: int = 0, loss=batch_loss, callbacks=(), progress: bool = True,
              penalty=None, mixed_with: Samples | None = None, alpha: float = 0.0, mixed_by: str = "share") -> History:
    """Fine-tune `policy.model` in place by AdamW on the action tokens; use `policy.copy()` to keep the original.

    peft_config: any peft configuration, or a `BottleneckConfig`: what it adds to the model trains, and nothing else. None trains every
    parameter that requires a gradient.   loss: callable (model, batch) -> scalar.   clip: largest gradient norm.
    callbacks: called as callback(step, policy, history) after every step.
    penalty: callable (model) -> scalar that is added to the loss, see forgetting.py.
    mixed_with: other samples, of pretraining say, whose part in the loss is alpha, between 0 and 1; a batch has `batch_size` samples either
    way. mixed_by: "share", round(alpha * batch_size) of them are the other ones; "weight", half of them are, and the loss is
    (1 - alpha) * loss of the first half + alpha * loss of the second.
    The same seed gives the same weights, bit for bit, at the same number of threads.
    Raises ValueError for no samples or nothing to train, and for an alpha or a mixed_by that is none of these.
    """
    from tqdm.auto import tqdm

    if not len(samples):
        raise ValueError("there are no samples to learn from")
    if mixed_with is not None:
        _refuse_mixing(mixed_with, alpha, mixed_by)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if peft_config is not None:
            policy.model = _adapted(policy.model, peft_config, seed)
        model = policy.model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        if not trained:
            raise ValueError("no parameter of the model requires a gradient")
        everything = samples if mixed_with is None else _joined(samples, mixed_with)
        data = {name: policy.to_model(value) for name, value in tokenize(policy, everything).items()}
        optimiser = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=weight_decay, fused=True)
        history = History(trainable=sum(p.numel() for p in trained), total=sum(p.numel() for p in model.parameters()))
        begun = time.perf_counter()
        bar = tqdm(range(steps), desc="fine-tuning", disable=not progress, leave=False)
        others = 0 if mixed_with is None else len(mixed_with)
        for step, parts in zip(bar, _weighted_rows(len(samples), others, batch_size, alpha, mixed_by, seed)):
            value = 0.0
            for weight, rows in parts:
                batch = _trimmed({name: value[rows] for name, value in data.items()})
                value = value + weight * loss(model, batch)
                history.tokens += int(batch["attention_mask"].sum())
                history.samples += len(rows)
                history.replayed += int((rows >= len(samples)).sum())
            if penalty is not None:
                value = value + penalty(model)
            optimiser.zero_grad(set_to_none=True)
            value.backward()
            torch.nn.utils.clip_grad_norm_(trained, clip)
            optimiser.step()
            history.loss.append(float(value.detach()))
            history.seconds = time.perf_counter() - begun
            if step % 10 == 0:
                bar.set_postfix(loss=f"{history.loss[-1]:.2f}")
            for callback in callbacks:
                callback(step, policy, history)
                model.train()
        model.eval()
    return history


def train_only(model, pattern: str | re.Pattern) -> None:
    """Freeze all parameters of `model` but those in whose names the regular expression is found.

    Raises ValueError where there are none; the model is then as it was.
    """
    chosen = {name for name, _ in model.named_parameters() if re.search(pattern, name)}
    if not chosen:
        raise ValueError(f"no parameter's name matches {getattr(pattern, 'pattern', pattern)!r}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)


def _adapted(model, config, seed):
    """The model with what `config` adds to it. labkit's own configurations add themselves; any other one is peft's."""
    if hasattr(config, "add_to"):
        return config.add_to(model, seed=seed)
    from peft import get_peft_model

    return get_peft_model(model, config)


def lora(rank: int = 16, alpha: int | None = None, targets: str = "attention", dropout: float = 0.0):
    """A peft LoRA configuration for the language model of any policy, or for a language model alone; a vision tower stays untouched.

    alpha: default 2 * rank (so the update is scaled by 2).   targets: "attention" (q, k, v, o) or "all" linear layers.
    """
    from peft import LoraConfig

    layers = {"attention": "q_proj|k_proj|v_proj|o_proj", "all": "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"}
    if targets not in layers:
        raise ValueError(f"targets is 'attention' or 'all', not {targets!r}")
    pattern = rf"(.*(language_model|text_model).*|model\.layers.*)\.({layers[targets]})"
    return LoraConfig(r=rank, lora_alpha=2 * rank if alpha is None else alpha, lora_dropout=dropout, target_modules=pattern)


def _batches(count, batch_size, seed):
    """Endless batches of row numbers: every sample once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    queue = torch.empty(0, dtype=torch.long)
    while True:
        while len(queue) < batch_size:
            queue = torch.cat([queue, torch.randperm(count, generator=generator)])
        yield queue[:batch_size]
        queue = queue[batch_size:]


def _weighted_rows(count, others, batch_size, alpha, mixed_by, seed):
    """Endless lists of (weight in the loss, row numbers): rows from `count` on are those of the other samples."""
    if not others:
        yield from ([(1.0, rows)] for rows in _batches(count, batch_size, seed))
        return
    replayed = round(alpha * batch_size) if mixed_by == "share" else batch_size // 2
    for new, old in zip(_batches(count, batch_size - replayed, seed), _batches(others, replayed, seed)):
        if mixed_by == "share":
            yield [(1.0, torch.cat([new, old + count]))]
        else:
            yield [(1.0 - alpha, new), (alpha, old + count)]


def _refuse_mixing(mixed_with, alpha, mixed_by):
    if not len(mixed_with):
        raise ValueError("there are no samples to mix in")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is a share between 0 and 1, not {alpha}")
    if mixed_by not in ("share", "weight"):
        raise ValueError(f"mixed_by is 'share' or 'weight', not {mixed_by!r}")


def _joined(a, b):
    """The samples of both, one under the other."""
    return Samples(list(a.instructions) + list(b.instructions), *(np.concatenate([getattr(a, name), getattr(b, name)])
                                                                 for name in ("images", "holding", "actions")))


def _trimmed(batch):
    """The batch without the columns on the left that are padding in every row."""
    first = int(batch["attention_mask"].any(0).nonzero().min())
    shape = batch["input_ids"].shape
    return {name: value[:, first:] if value.shape == shape else value for name, value in batch.items()}
