"""What keeps a fine-tuned policy near its start: the diagonal Fisher, EWC, L2 to the start, KL to the frozen policy; and how far it went.

Mixing pretraining data into the batches is in sft.py (`fine_tune(..., mixed_with=...)`), which also takes a penalty from here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.nn.functional import kl_div, mse_loss

from labkit.actions import NAMES
from labkit.batches import IGNORED
from labkit.demonstrations import Samples
from labkit.sft import batch_loss, tokenize

LABELS = ("model", "data")
# Part of a parameter's name -> module that it belongs to; the first that fits.
MODULES = {"vision_tower": "vision tower", "projector": "projector", "embed_tokens": "embeddings", "lm_head": "output layer",
           "self_attn": "attention", ".mlp.": "MLP", "norm": "norms"}


def diagonal_fisher(policy, samples: Samples, labels: str = "model", seed: int = 0) -> dict[str, torch.Tensor]:
    """The diagonal of the Fisher information of a policy's parameters: the mean over samples of the squared gradient of log p(action).

    log p of one sample is the sum over its action tokens. labels: "model" draws the action from the policy itself, token by token, which
    makes it the Fisher information (Kirkpatrick et al., arXiv 1612.00796; Martens, arXiv 1412.1193, section 9.2); "data" takes the
    demonstrated action, the empirical Fisher (Kunstner et al., arXiv 1905.12558).   seed: of the drawn actions.
    Returns name -> tensor of the parameter's shape, in 1 / (parameter's unit) squared, for every parameter that requires a gradient.
    It costs one backward pass a sample, at batch 1.   Raises ValueError for other labels.
    """
    if labels not in LABELS:
        raise ValueError(f"labels is 'model' or 'data', not {labels!r}")
    batch = {name: policy.to_model(value) for name, value in tokenize(policy, samples).items()}
    if labels == "model":
        batch = with_drawn_actions(policy, batch, torch.Generator().manual_seed(seed))
    total = {name: torch.zeros_like(p) for name, p in trained(policy.model).items()}
    for gradients in per_sample_gradients(policy.model, batch):
        for name, gradient in gradients.items():
            total[name] += gradient.square()
    return {name: value / len(samples) for name, value in total.items()}


def output_fisher(hidden, weight, labels) -> torch.Tensor:
    """The diagonal Fisher of the weight of one output layer with a softmax, in closed form: mean over samples of (p - onehot)^2 x^2.

    hidden: (N, d) what goes into the layer.   weight: (V, d).   labels: (N,) int, drawn from the model or taken from the data.
    Returns (V, d).
    """
    errors = torch.softmax(hidden @ weight.T, dim=-1) - torch.nn.functional.one_hot(labels, len(weight))
    return errors.square().T @ hidden.square() / len(hidden)


def per_sample_gradients(model, batch) -> Iterator[dict[str, torch.Tensor]]:
    """The gradient of log p(action) for one sample after the other: name -> tensor of the parameter's shape.

    batch: tokenized samples, see `tokenize`.   The gradient of a batch is their mean; its square is not the mean of their squares.
    """
    parameters = trained(model)
    model.eval()
    for row in range(len(batch["labels"])):
        one = {name: value[row : row + 1] for name, value in batch.items()}
        log_p = -batch_loss(model, one) * int((one["labels"] != IGNORED).sum())
        gradients = torch.autograd.grad(log_p, list(parameters.values()), allow_unused=True)
        yield {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(parameters.items(), gradients)}


@torch.no_grad()
def with_drawn_actions(policy, batch, generator) -> dict[str, torch.Tensor]:
    """The batch with actions that the policy itself draws in place of the demonstrated ones, each token given those before it.

    generator: a `torch.Generator` on the CPU.
    """
    ids, labels = batch["input_ids"].clone(), batch["labels"].clone()
    actions = policy.action_ids.to(ids.device)
    policy.model.eval()
    for place in range(ids.shape[1] - len(NAMES), ids.shape[1]):
        inputs = {name: value for name, value in batch.items() if name != "labels"} | {"input_ids": ids}
        scores = policy.model(**inputs, use_cache=False).logits[:, place - 1, actions].float()
        drawn = torch.multinomial(scores.softmax(-1).cpu(), 1, generator=generator).squeeze(1).to(ids.device)
        ids[:, place] = labels[:, place] = actions[drawn]
    return {**batch, "input_ids": ids, "labels": labels}


def trained(model) -> dict[str, torch.Tensor]:
    """Name -> parameter, of those that require a gradient."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def start_of(model) -> dict[str, torch.Tensor]:
    """Name -> copy of every parameter that requires a gradient: what an anchor pulls back to."""
    return {name: p.detach().clone() for name, p in trained(model).items()}


def ewc_penalty(start: dict, fisher: dict, strength: float) -> Callable:
    """Elastic weight consolidation: strength / 2 * sum of F (theta - theta_0)^2 (Kirkpatrick et al., arXiv 1612.00796, equation 3).

    start, fisher: name -> tensor.   Returns a callable (model) -> scalar, for `fine_tune(penalty=...)`.
    Raises ValueError where a name or a shape of the two differs.
    """
    wrong = [name for name in {**start, **fisher} if name not in start or name not in fisher or start[name].shape != fisher[name].shape]
    if wrong:
        raise ValueError(f"{wrong[0]}: start and Fisher do not have the same parameters")

    def penalty(model):
        return sum(quadratic_penalty(p, start[name], fisher[name], strength) for name, p in trained(model).items())

    return penalty


def quadratic_penalty(theta, start, fisher, strength: float) -> torch.Tensor:
    """strength / 2 * sum of F (theta - theta_0)^2, of one tensor.   theta, start, fisher: the same shape; fisher may also be 1.0."""
    weight = torch.as_tensor(fisher, dtype=theta.dtype, device=theta.device).expand_as(theta)
    return mse_loss(theta, start, reduction="sum", weight=weight).mul(strength / 2)


def l2_penalty(start: dict, strength: float) -> Callable:
    """strength / 2 * sum of (theta - theta_0)^2, as L2-SP (Li et al., arXiv 1802.01483): EWC that takes every parameter for equally important.

    Returns a callable (model) -> scalar.
    """

    def penalty(model):
        return sum(quadratic_penalty(p, start[name], 1.0, strength) for name, p in trained(model).items())

    return penalty


def mixed_loss(losses, replayed, alpha: float) -> torch.Tensor:
    """(1 - alpha) * mean over the new samples + alpha * mean over the replayed ones (the lecture's data mixing objective).

    losses: (B,) float, nats.   replayed: (B,) bool, with at least one of each kind.
    """
    old = int(replayed.sum())
    return losses @ torch.where(replayed, alpha / old, (1 - alpha) / (len(losses) - old)).to(losses.dtype)


def kl_divergence(start_logits, logits) -> torch.Tensor:
    """Mean over positions of KL(p_start || p), in nats: what the new policy loses on what the old one says.

    start_logits, logits: (..., V) float.   No gradient flows into start_logits.
    """
    after, before = (torch.log_softmax(value.float(), dim=-1) for value in (logits, start_logits.detach()))
    return kl_div(after, before, reduction="sum", log_target=True) / before[..., 0].numel()


class KLAnchor:
    """strength * KL(frozen policy || policy) on batches of `samples`, in nats an action token: a penalty for `fine_tune`.

    It needs what the old tasks look like, and no right answers. What the frozen policy says is computed once, for all samples.
    batch_size: samples a step.   seed: of their order.   `seen`: how many samples it has used so far.
    """

    def __init__(self, policy, samples: Samples, strength: float, batch_size: int = 8, seed: int = 0):
        self.batch = {name: policy.to_model(value) for name, value in tokenize(policy, samples).items()}
        self.start_logits = action_logits(policy.model, self.batch)
        self.strength, self.batch_size, self.seen = strength, batch_size, 0
        self.generator, self.queue = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long)

    def __call__(self, model):
        while len(self.queue) < self.batch_size:
            self.queue = torch.cat([self.queue, torch.randperm(len(self.start_logits), generator=self.generator)])
        rows, self.queue = self.queue[: self.batch_size], self.queue[self.batch_size :]
        self.seen += len(rows)
        logits = _action_logits(model, {name: value[rows] for name, value in self.batch.items()})
        return self.strength * kl_divergence(self.start_logits[rows], logits)


@torch.no_grad()
def action_logits(model, batch) -> torch.Tensor:
    """(N, 4, V) logits of the demonstrated action tokens, given those before them.   batch: tokenized samples."""
    model.eval()
    parts = [{name: value[i : i + 64] for name, value in batch.items()} for i in range(0, len(batch["labels"]), 64)]
    return torch.cat([_action_logits(model, part) for part in parts])


def _action_logits(model, batch):
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return model(**inputs, logits_to_keep=len(NAMES) + 1, use_cache=False).logits[:, :-1]


def module_of(name: str) -> str:
    """The part of the model that a parameter belongs to, by its name."""
    return next((module for part, module in MODULES.items() if part in name), "other")


def displacement(model, start: dict, fisher: dict) -> dict[str, dict[str, float]]:
    """How far the parameters went, by module: `squared`, the sum of (theta - theta_0)^2, and `weighted`, the sum of F (theta - theta_0)^2 / 2.

    The sum of `weighted` is what the diagonal Fisher expects of KL(p_start || p) for a whole action, in nats.
    start, fisher: name -> tensor; the model has a parameter of each name (merge LoRA first).   Raises KeyError where it has not.
    """
    now, found = dict(model.named_parameters()), {}
    for name, before in start.items():
        change = (now[name].detach() - before).square()
        parts = found.setdefault(module_of(name), {"squared": 0.0, "weighted": 0.0})
        parts["squared"] += float(change.sum())
        parts["weighted"] += float((fisher[name] * change).sum()) / 2
    return found
