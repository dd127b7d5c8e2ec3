"""Supervised fine-tuning: the loss over action tokens and `fine_tune`. It imports nothing that comes after it; watch it by callbacks."""

from __future__ import annotations

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
    """How a fine-tuning run went.   loss: one value a step, nats a supervised token.   seconds, tokens: of the whole run."""

    loss: list[float] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0
    trainable: int = 0
    total: int = 0

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

    Raises ValueError for a model whose processor packs the images of a batch together, so that no batch can be taken from it.
    """
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
              weight_decay: float = 0.0, clip: float = 1.0, seed: int = 0, loss=batch_loss, callbacks=(), progress: bool = True) -> History:
    """Fine-tune `policy.model` in place by AdamW on the action tokens; use `policy.copy()` to keep the original.

    peft_config: any peft configuration; the model is wrapped in it and only its parameters train. None trains every parameter that
    requires a gradient.   loss: callable (model, batch) -> scalar.   callbacks: called as callback(step, policy, history) after every step.
    clip: largest gradient norm.   The same seed gives the same weights, bit for bit, at the same number of threads.
    Raises ValueError for no samples or nothing to train.
    """
    from tqdm.auto import tqdm

    if not len(samples):
        raise ValueError("there are no samples to learn from")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if peft_config is not None:
            from peft import get_peft_model

            policy.model = get_peft_model(policy.model, peft_config)
        model = policy.model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        if not trained:
            raise ValueError("no parameter of the model requires a gradient")
        data = {name: policy.to_model(value) for name, value in tokenize(policy, samples).items()}
        optimiser = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=weight_decay, fused=True)
        history = History(trainable=sum(p.numel() for p in trained), total=sum(p.numel() for p in model.parameters()))
        begun = time.perf_counter()
        bar = tqdm(range(steps), desc="fine-tuning", disable=not progress, leave=False)
        for step, rows in zip(bar, _batches(len(samples), batch_size, seed)):
            batch = _trimmed({name: value[rows] for name, value in data.items()})
            value = loss(model, batch)
            optimiser.zero_grad(set_to_none=True)
            value.backward()
            torch.nn.utils.clip_grad_norm_(trained, clip)
            optimiser.step()
            history.loss.append(float(value.detach()))
            history.tokens += int(batch["attention_mask"].sum())
            history.seconds = time.perf_counter() - begun
            if step % 10 == 0:
                bar.set_postfix(loss=f"{history.loss[-1]:.2f}")
            for callback in callbacks:
                callback(step, policy, history)
                model.train()
        model.eval()
    return history


def lora(rank: int = 16, alpha: int | None = None, targets: str = "attention", dropout: float = 0.0):
    """A peft LoRA configuration for the language model of any policy; the vision tower stays untouched.

    alpha: default 2 * rank (so the update is scaled by 2).   targets: "attention" (q, k, v, o) or "all" linear layers.
    """
    from peft import LoraConfig

    layers = {"attention": "q_proj|k_proj|v_proj|o_proj", "all": "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"}
    if targets not in layers:
        raise ValueError(f"targets is 'attention' or 'all', not {targets!r}")
    pattern = rf".*(language_model|text_model).*\.({layers[targets]})"
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


def _trimmed(batch):
    """The batch without the columns on the left that are padding in every row."""
    first = int(batch["attention_mask"].any(0).nonzero().min())
    shape = batch["input_ids"].shape
    return {name: value[:, first:] if value.shape == shape else value for name, value in batch.items()}
