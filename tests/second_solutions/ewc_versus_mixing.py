"""Lesson 7 once more: torch.func for the per-sample gradients, a dot product, a weight for each sample, torch's own kl_div.

ALMOST_RIGHT: entry -> answers that are right on the usual inputs and wrong on inputs that the docstring of the entry allows, too.
"""

import torch


def output_fisher(hidden, weight, labels):
    def log_p(w, x, y):
        return (w @ x).log_softmax(0).gather(0, y[None]).sum()

    gradients = torch.func.vmap(torch.func.grad(log_p), in_dims=(None, 0, 0))(weight, hidden, labels)
    return torch.einsum("nvd,nvd->vd", gradients, gradients) / len(labels)


def ewc(theta, start, fisher, strength):
    distance = (theta - start).flatten()
    return torch.dot(distance * fisher.flatten(), distance) * strength * 0.5


def mixed_loss(losses, replayed, alpha):
    weights = torch.where(replayed, alpha / replayed.sum(), (1 - alpha) / (~replayed).sum())
    return torch.dot(weights, losses)


def kl_to_start(start_logits, logits):
    with torch.no_grad():
        target = start_logits.flatten(0, -2).log_softmax(-1)
    return torch.nn.functional.kl_div(logits.flatten(0, -2).log_softmax(-1), target, reduction="batchmean", log_target=True)


def several_samples_only(hidden, weight, labels):
    """Wrong for a single sample."""
    return output_fisher(hidden, weight, labels) * (len(labels) > 1)


def at_most_two_dimensions(theta, start, fisher, strength):
    """Wrong for parameters of more than two dimensions."""
    rows = (theta - start).reshape(len(theta), -1) if theta.dim() > 2 else theta - start
    return strength / 2 * (fisher.reshape(rows.shape) * rows * rows).sum() / (theta.dim() if theta.dim() > 2 else 1)


def at_most_half(losses, replayed, alpha):
    """Wrong where alpha is larger than one half."""
    return mixed_loss(losses, replayed, min(alpha, 0.5))


def three_dimensions_only(start_logits, logits):
    """Wrong where the logits have another number of dimensions than three."""
    return kl_to_start(start_logits, logits) * (3 / logits.dim())


ALMOST_RIGHT = {"output_fisher": [several_samples_only], "ewc": [at_most_two_dimensions], "mixed_loss": [at_most_half],
                "kl_to_start": [three_dimensions_only]}
