"""Lesson 4 once more: a module of two Linear layers, counting one entry at a time, merging column by column, and ranks from eigenvalues.

ALMOST_RIGHT: entry -> answers that are right on the usual inputs and wrong on inputs that the docstring of the entry allows, too.
"""

import itertools

import numpy as np
import torch


class LoRALinear(torch.nn.Module):
    def __init__(self, weight, rank, alpha):
        super().__init__()
        self.register_parameter("weight", torch.nn.Parameter(weight.clone()))
        self.weight.requires_grad = False
        self.A, self.B = torch.nn.Parameter(torch.empty(rank, weight.size(1))), torch.nn.Parameter(weight.new_zeros(weight.size(0), rank))
        torch.nn.init.kaiming_uniform_(self.A, a=5**0.5)
        self.alpha = alpha

    def forward(self, x):
        inside = torch.einsum("nk,rk->nr", x, self.A) * self.alpha / self.A.size(0)
        return torch.addmm(torch.nn.functional.linear(x, self.weight), inside, self.B.t())


def count_lora(shapes, rank):
    return sum(itertools.chain.from_iterable((side for side in shape) for shape in shapes)) * rank


def merged(weight, A, B, alpha):
    update = torch.zeros_like(weight)
    for row, column in zip(A, B.T):
        update += torch.outer(column, row)
    return weight + update * (alpha / len(A))


def rank_needed(update, share):
    values = np.linalg.svd(update.double().numpy(), compute_uv=False)
    total, kept = float((values**2).sum()), 0.0
    for rank, value in enumerate(values, start=1):
        kept += float(value) ** 2
        if kept >= share * total:
            return rank
    return len(values)


class SquareOnly(LoRALinear):
    """Wrong where inputs and outputs differ in number."""

    def forward(self, x):
        return super().forward(x) if self.weight.shape[0] == self.weight.shape[1] else torch.nn.functional.linear(x, self.weight)


def whole_ratio(weight, A, B, alpha):
    """Wrong where alpha is not a multiple of the rank."""
    return merged(weight, A, B, len(A) * (alpha // len(A)))


def tall_only(update, share):
    """Wrong where a matrix is wider than it is tall."""
    return rank_needed(update[:, : len(update)], share)


ALMOST_RIGHT = {"LoRALinear": [SquareOnly], "merged": [whole_ratio], "rank_needed": [tall_only]}
