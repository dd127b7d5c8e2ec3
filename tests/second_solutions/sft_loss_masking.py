"""Lesson 1 once more: padding instead of writing into a copy, one-hot vectors instead of gather, numbers instead of tensors.

ALMOST_RIGHT: entry -> answers that are right on the usual inputs and wrong on inputs that the docstring of the entry allows, too.
"""

import math

import torch
from torch.nn.functional import cross_entropy, one_hot, pad


def training_sequence(prompt_ids, action_ids):
    return torch.hstack((prompt_ids, action_ids)), pad(action_ids, (len(prompt_ids), 0), value=-100)


def masked_loss(logits, labels):
    counts = labels.ne(-100).float()
    counts[:, 0] = 0
    wanted = one_hot(labels.clamp(min=0), logits.shape[-1]) * counts.unsqueeze(-1)
    before = logits.roll(1, dims=1)  # position 0 now holds the last logits, and counts for nothing
    return ((before.logsumexp(-1) * counts).sum() - (before * wanted).sum()) / counts.sum()


def logit_gradient(logits, labels):
    scores, tokens = logits.tolist(), labels.tolist()
    count = sum(token >= 0 for row in tokens for token in row[1:])
    gradient = [[[0.0] * len(row[0]) for _ in row] for row in scores]
    for row, row_scores, row_tokens in zip(gradient, scores, tokens):
        for t, token in enumerate(row_tokens[1:]):
            if token >= 0:
                powers = [math.exp(score - max(row_scores[t])) for score in row_scores[t]]
                row[t] = [(power / sum(powers) - (k == token)) / count for k, power in enumerate(powers)]
    return torch.tensor(gradient)


def masks_by_value(prompt_ids, action_ids):
    """Wrong where a token stands in the prompt and in the action."""
    input_ids = torch.cat([prompt_ids, action_ids])
    return input_ids, torch.where(torch.isin(input_ids, action_ids), input_ids, -100)


def first_label_from_the_last_position(logits, labels):
    """Wrong where the first token has a label: roll wraps around."""
    return cross_entropy(logits.flatten(0, 1), labels.roll(-1, dims=1).flatten())


def first_label_counted(logits, labels):
    """Wrong where the first token has a label, which nothing predicts."""
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / (labels != -100).sum()


def labels_at_the_end(logits, labels):
    """Wrong where what is supervised does not end the row: several turns, or padding on the right."""
    counts = [int((row != -100).sum()) for row in labels]
    losses = [cross_entropy(z[-n - 1 : -1], row[-n:], reduction="none") for z, row, n in zip(logits, labels, counts)]
    return torch.cat(losses).mean()


def masks_token_0(logits, labels):
    """Wrong where token 0 is to be predicted."""
    targets = labels[:, 1:]
    return cross_entropy(logits[:, :-1][targets > 0], targets[targets > 0])


def exponentials_by_hand(logits, labels):
    """Wrong where an exponential overflows."""
    targets = labels[:, 1:]
    powers = logits[:, :-1].exp()
    chosen = (powers / powers.sum(-1, keepdim=True))[targets != -100]
    return -chosen.gather(-1, targets[targets != -100].unsqueeze(-1)).log().mean()


def gradient_of(loss):
    def gradient(logits, labels):
        leaf = logits.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf, labels), leaf)[0]

    gradient.__name__ = loss.__name__
    return gradient


LOSSES = [first_label_from_the_last_position, first_label_counted, labels_at_the_end, masks_token_0, exponentials_by_hand]
ALMOST_RIGHT = {"training_sequence": [masks_by_value], "masked_loss": LOSSES, "logit_gradient": [gradient_of(loss) for loss in LOSSES]}
