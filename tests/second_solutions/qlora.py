"""Lesson 5 once more: loops and sums instead of torch's helpers, and one matrix instead of two products.

ALMOST_RIGHT: entry -> answers that are right on the usual inputs and wrong on inputs that the docstring of the entry allows, too.
"""

from statistics import NormalDist

import torch


def normal_float_levels(bits, outermost):
    quantile, half = NormalDist().inv_cdf, 1 << bits - 1
    step_below, step_above = (0.5 - outermost) / (half - 1), (0.5 - outermost) / half
    negative = [quantile(0.5 - k * step_below) for k in range(half - 1, 0, -1)]
    positive = [quantile(0.5 + k * step_above) for k in range(1, half + 1)]
    return [level / positive[-1] for level in negative] + [0.0] + [level / positive[-1] for level in positive]


def quantise_in_blocks(weights, levels, block):
    codes, scales, restored, flat = [], [], [], weights.flatten().tolist()
    for first in range(0, len(flat), block):
        some = flat[first : first + block]
        scales.append(max(map(abs, some)))
        for weight in some:
            distances = [abs(weight - level * scales[-1]) if scales[-1] else abs(level) for level in levels.tolist()]
            codes.append(distances.index(min(distances)))
            restored.append(levels[codes[-1]].item() * scales[-1])
    return torch.tensor(codes).reshape(weights.shape), scales, torch.tensor(restored).reshape(weights.shape)


def bits_per_weight(block, second_block):
    weights = block * (second_block or 1)
    scales = weights // block
    return (4 * weights + (32 * scales if second_block is None else 8 * scales + 32)) / weights


def qlora_linear(x, codes, scales, levels, A, B, alpha):
    base = levels[codes] * scales.repeat_interleave(codes.numel() // scales.numel()).reshape(codes.shape)
    return torch.einsum("ni,oi->no", x, base + alpha / A.shape[0] * torch.einsum("or,ri->oi", B, A))


def always_4_bits(bits, outermost):
    """Wrong where there are not 4 bits."""
    return normal_float_levels(4, outermost)[: 2**bits]


def never_more_than_4_bits(bits, outermost):
    """Wrong where there are more than 4 bits."""
    return normal_float_levels(min(bits, 4), outermost)


def rows_are_blocks(weights, levels, block):
    """Wrong where a row is no block."""
    scales = weights.abs().amax(1)
    codes = (weights / scales[:, None] - levels[:, None, None]).abs().argmin(0)
    return codes, scales, levels[codes] * scales[:, None]


def never_zero(weights, levels, block):
    """Wrong where a block is all zeros."""
    blocks = weights.reshape(-1, block)
    scales = blocks.abs().amax(1, keepdim=True)
    codes = ((blocks / scales)[..., None] - levels).abs().argmin(-1)
    return codes.reshape(weights.shape), scales.flatten(), (levels[codes] * scales).reshape(weights.shape)


def second_block_of_256(block, second_block):
    """Wrong where the second block is another one."""
    return 4 + 32 / block if second_block is None else 4 + 8 / block + 32 / (block * 256)


def blocks_of_64(x, codes, scales, levels, A, B, alpha):
    """Wrong where a block does not hold 64 weights: the number of scales says how many it holds."""
    base = levels[codes] * scales.repeat_interleave(64)[: codes.numel()].reshape(codes.shape)
    return x @ base.T + alpha / len(A) * x @ A.T @ B.T


def one_scale_a_row(x, codes, scales, levels, A, B, alpha):
    """Wrong where there are more or fewer scales than rows."""
    return x @ (levels[codes] * scales.reshape(-1, 1)[: len(codes)]).T + alpha / len(A) * x @ A.T @ B.T


ALMOST_RIGHT = {
    "normal_float_levels": [always_4_bits, never_more_than_4_bits],
    "quantise_in_blocks": [rows_are_blocks, never_zero],
    "bits_per_weight": [second_block_of_256],
    "qlora_linear": [blocks_of_64, one_scale_a_row],
}
