"""Exercises of lesson 5: the levels of NormalFloat, quantising in blocks, bits a weight, and LoRA on a quantised layer."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import torch

from labkit.exercises.exercise import Case, Exercise, Tolerance, exercise

_quantile = NormalDist().inv_cdf


# Halfway between the smallest probabilities of 16 and of 15 levels (Yoshida, arXiv 2306.06965, section 2): NF4's.
_NF4_OUTERMOST = (1 / 32 + 1 / 30) / 2


def _from_probabilities(probabilities):
    """Levels from probabilities: quantiles, over the largest of them."""
    levels = torch.tensor([_quantile(p) for p in probabilities], dtype=torch.float64)
    return (levels / levels.abs().max()).float()


def _halves(outermost, below, above):
    """Probabilities from the outermost to one half in `below` even steps, and on in `above`; one half itself comes once."""
    return [*np.linspace(outermost, 0.5, below + 1)[:-1], 0.5, *np.linspace(0.5, 1 - outermost, above + 1)[1:]]


def _uniform_levels(bits, outermost):
    return torch.linspace(-1, 1, 2**bits)


def _quantiles_without_zero(bits, outermost):
    return _from_probabilities(np.linspace(outermost, 1 - outermost, 2**bits))


def _middles_of_equal_bins(bits, outermost):
    return _from_probabilities((np.arange(2**bits) + 0.5) / 2**bits)


def _levels_not_normalised(bits, outermost):
    return torch.tensor([_quantile(p) for p in _halves(outermost, 2 ** (bits - 1) - 1, 2 ** (bits - 1))])


def _one_level_short(bits, outermost):
    return _from_probabilities(_halves(outermost, 2 ** (bits - 1) - 1, 2 ** (bits - 1) - 1))


def _one_level_too_many(bits, outermost):
    return _from_probabilities(_halves(outermost, 2 ** (bits - 1), 2 ** (bits - 1)))


def _zero_twice(bits, outermost):
    levels = _right_levels(bits, outermost)
    return torch.cat([levels[: 2 ** (bits - 1)], levels[2 ** (bits - 1) - 1 :]])


def _more_below_than_above(bits, outermost):
    return -_right_levels(bits, outermost).flip(0)


def _another_outermost(bits, outermost):
    return _right_levels(bits, 1 / 2 ** (bits + 1))


def _from_probability_zero(bits, outermost):
    return torch.cat([torch.tensor([float("nan")]), torch.zeros(2**bits - 2), torch.tensor([float("nan")])])


def _distribution_function(bits, outermost):
    levels = torch.tensor([NormalDist().cdf(p) for p in _halves(outermost, 2 ** (bits - 1) - 1, 2 ** (bits - 1))])
    return levels / levels.abs().max()


def _from_large_to_small(bits, outermost):
    return _right_levels(bits, outermost).flip(0)


def _right_levels(bits=4, outermost=_NF4_OUTERMOST):
    """From the probabilities one after the other; of NF4 where nothing else is said."""
    half = 2 ** (bits - 1)
    below = [_quantile(outermost + i * (0.5 - outermost) / (half - 1)) for i in range(half - 1)]
    above = [_quantile(0.5 + i * (0.5 - outermost) / half) for i in range(1, half + 1)]
    return torch.tensor([*below, 0.0, *above], dtype=torch.float64).div(above[-1]).float()


@exercise("qlora-levels", points=4, minutes=10)
class Levels(Exercise):
    """The levels of NormalFloat: quantiles of the normal distribution between -1 and 1, with an exact zero."""

    entry = "normal_float_levels"
    withheld = ("bitsandbytes", "labkit.experiments")
    close = Tolerance(rtol=1e-4, atol=1e-6)

    def cases(self, rng, hidden):
        asked = [(bits, float(rng.uniform(0.01, 0.1))) for bits in (2, 3, 4)]
        ### BEGIN HIDDEN TESTS
        if hidden:
            asked += [(4, _NF4_OUTERMOST), (5, float(rng.uniform(0.001, 0.3))), (8, float(rng.uniform(0.001, 0.01)))]
        ### END HIDDEN TESTS
        for bits, outermost in asked:
            half = 2 ** (bits - 1)
            yield Case(
                {"bits": bits, "outermost": outermost}, says="{bits} bits and the outermost probability {outermost:.4f}",
                must="There are {count} levels in ascending order: {below} negative ones, one exact zero, {half} positive ones, from -1 to 1.",
                facts={"bits": bits, "outermost": outermost, "count": 2 * half, "half": half, "below": half - 1},
            )

    def expected(self, case):
        """NF4 itself: the table of a real bitsandbytes object."""
        if case.arguments != {"bits": 4, "outermost": _NF4_OUTERMOST}:
            return _right_levels(**case.arguments)
        from bitsandbytes.functional import quantize_4bit

        _, state = quantize_4bit(torch.ones(64), quant_type="nf4")
        return state.code

    misconceptions = {
        "Your levels are evenly spaced; take evenly spaced probabilities, and the normal distribution's quantiles at them.": _uniform_levels,
        "Your quantiles are symmetric, so that none of them is zero: space the negative and the positive half apart, both from 1/2.":
            _quantiles_without_zero,
        "You took the middles of bins of equal probability; NormalFloat spaces probabilities evenly from the outermost one to 1/2, on either side.":
            _middles_of_equal_bins,
        "Divide by the largest level: they must run from -1 to 1, because the weights will be divided by the largest of their block.":
            _levels_not_normalised,
        "There is one level too few: the positive half has one more than the negative half, which makes {half}.": _one_level_short,
        "There is one level too many: the negative half has one less than the positive half, which makes {below}.": _one_level_too_many,
        "Zero is there twice: both halves end at probability 1/2, and one of the two is to be left out.": _zero_twice,
        "The halves are exchanged: the positive one has the additional level.": _more_below_than_above,
        "Your outermost probability is 1/2^(b+1); it is given, as `outermost`.": _another_outermost,
        "You start at probability 0, where the quantile is minus infinity: start at the outermost probability.": _from_probability_zero,
        "You took the distribution function (from a value to a probability); its inverse, the quantile function, is called ppf or ndtri.":
            _distribution_function,
        "Your levels run from large to small; ascending order is asked for.": _from_large_to_small,
    }


def _in_blocks(weights, levels, block, scales_of=lambda b: b.abs().amax(1, keepdim=True), place=None, rows=None):
    """Codes, scales and restored weights, with one part changed.   rows: how the weights are cut into blocks."""
    blocks = weights.reshape(-1, block) if rows is None else rows
    scales = scales_of(blocks)
    scaled = blocks / torch.where(scales == 0, torch.ones_like(scales), scales)
    codes = _nearest(scaled, levels) if place is None else place(scaled, levels)
    return codes, scales, levels[codes] * scales


def _nearest(values, levels):
    return torch.bucketize(values.contiguous(), (levels[1:] + levels[:-1]) / 2)


def _shaped(weights, codes, scales, restored):
    return codes.reshape_as(weights), scales.flatten(), restored.reshape_as(weights)


def _scale_of_the_whole_tensor(weights, levels, block):
    return _shaped(weights, *_in_blocks(weights, levels, block, lambda b: b.abs().max().expand(len(b), 1)))


def _one_scale_alone(weights, levels, block):
    codes, scales, restored = _in_blocks(weights, levels, block, rows=weights.reshape(1, -1))
    return codes.reshape(weights.shape), scales[0, 0], restored.reshape(weights.shape)


def _largest_instead_of_largest_absolute(weights, levels, block):
    return _shaped(weights, *_in_blocks(weights, levels, block, lambda b: b.amax(1, keepdim=True)))


def _standard_deviation(weights, levels, block):
    return _shaped(weights, *_in_blocks(weights, levels, block, lambda b: b.std(1, keepdim=True)))


def _level_below(weights, levels, block):
    def place(values, table):
        return (torch.searchsorted(table, values.contiguous(), right=True) - 1).clamp(0, len(table) - 1)

    return _shaped(weights, *_in_blocks(weights, levels, block, place=place))


def _evenly_rounded(weights, levels, block):
    def place(values, table):
        return ((values + 1) / 2 * (len(table) - 1)).round().long().clamp(0, len(table) - 1)

    return _shaped(weights, *_in_blocks(weights, levels, block, place=place))


def _not_divided_by_the_scale(weights, levels, block):
    blocks = weights.reshape(-1, block)
    codes, scales = _nearest(blocks, levels), blocks.abs().amax(1, keepdim=True)
    return _shaped(weights, codes, scales, levels[codes] * scales)


def _not_multiplied_by_the_scale(weights, levels, block):
    codes, scales, _ = _in_blocks(weights, levels, block)
    return _shaped(weights, codes, scales, levels[codes])


def _columns_as_blocks(weights, levels, block):
    codes, scales, restored = _in_blocks(weights, levels, block, rows=weights.reshape(block, -1).T)
    return _shaped(weights, codes.T, scales, restored.T)


def _one_scale_a_row(weights, levels, block):
    codes, scales, restored = _in_blocks(weights, levels, block, rows=weights)
    return _shaped(weights, codes, scales, restored)


def _levels_instead_of_codes(weights, levels, block):
    codes, scales, restored = _in_blocks(weights, levels, block)
    return _shaped(weights, levels[codes], scales, restored)


def _left_in_blocks(weights, levels, block):
    codes, scales, restored = _in_blocks(weights, levels, block)
    return codes, scales.flatten(), restored


def _nan_for_zeros(weights, levels, block):
    """As torch does it: nothing divided by nothing, whose place is the first or the last."""
    blocks = weights.reshape(-1, block)
    scales = blocks.abs().amax(1, keepdim=True)
    codes = ((blocks / scales)[..., None] - levels).abs().argmin(-1)
    return _shaped(weights, codes, scales, levels[codes] * scales)


def _away_from_ties(values, levels, margin):
    """Values that lie almost halfway between two levels put on the nearest one, so that rounding decides nothing."""
    middles = (levels[1:] + levels[:-1]) / 2
    tied = (values[..., None] - middles).abs().amin(-1) < margin
    return torch.where(tied, levels[_nearest(values, levels)], values)


def _weights(rng, rows, columns, levels, block, zeros=False, heavy=False):
    """Weights whose blocks have different scales; the largest of the first one is negative."""
    drawn = rng.standard_t(2, (rows * columns // block, block)) if heavy else rng.normal(size=(rows * columns // block, block))
    blocks = torch.from_numpy(drawn).float()
    blocks[0] *= -blocks[0, blocks[0].abs().argmax()].sign()
    blocks = _away_from_ties(blocks / blocks.abs().amax(1, keepdim=True), levels, 1e-3)
    scales = torch.from_numpy(rng.uniform(0.2, 3.0, (len(blocks), 1))).float()
    if zeros:
        scales[-1] = 0
    return (blocks * scales).reshape(rows, columns)


@exercise("qlora-blocks", points=4, minutes=12)
class Blocks(Exercise):
    """A matrix in 4 bits: a scale a block, the nearest level a weight, and back."""

    entry = "quantise_in_blocks"
    withheld = ("bitsandbytes", "labkit.experiments")
    close = Tolerance(rtol=1e-4, atol=1e-6)

    def cases(self, rng, hidden):
        few, nf4 = torch.tensor([-1.0, -0.3, 0.0, 0.5, 1.0]), _right_levels()
        grids = [(2, 8, few, 4, {}), (4, 128, nf4, 64, {}), (3, 8, few, 4, {"zeros": True})]
        ### BEGIN HIDDEN TESTS
        if hidden:
            grids += [(1, 64, nf4, 64, {}), (8, 32, nf4, 64, {}), (3, 64, nf4, 16, {"heavy": True}), (16, 128, nf4, 64, {"heavy": True}),
                      (4, 64, nf4, 64, {"zeros": True}), (6, 6, _right_levels(3, 0.07), 9, {})]
        ### END HIDDEN TESTS
        for rows, columns, levels, block, kind in grids:
            yield Case(
                {"weights": _weights(rng, rows, columns, levels, block, **kind), "levels": levels, "block": block},
                says="{rows} x {columns} weights in {blocks} blocks of {block}, and {count} levels"
                + (", the last block all zeros" if kind.get("zeros") else ""),
                must="There is a code and a restored weight for every weight, in the same shape, and a scale for each of the {blocks} blocks.",
                facts={"rows": rows, "columns": columns, "blocks": rows * columns // block, "block": block, "count": len(levels)},
            )

    def expected(self, case):
        """NF4 in blocks of 64: what bitsandbytes stores and gives back, with codes unpacked (the first of two is in the upper half of a byte)."""
        weights, levels, block = case.arguments.values()
        if block != 64 or len(levels) != 16:
            return _shaped(weights, *_in_blocks(weights, levels, block))
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        # A block a row: bitsandbytes 0.50 on CPUs with AVX-512 dequantises rows that do not end with a block wrongly, without a word.
        packed, state = quantize_4bit(weights.reshape(-1, block), quant_type="nf4", blocksize=block)
        codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).reshape(weights.shape)
        return codes.long(), state.absmax, dequantize_4bit(packed, state).reshape(weights.shape)

    misconceptions = {
        "You used one scale for the whole tensor; every block of {block} has its own.": _scale_of_the_whole_tensor,
        "You return one scale for the whole tensor; every block of {block} has its own, {blocks} in all.": _one_scale_alone,
        "You took the largest weight of a block; the scale is the largest ABSOLUTE weight, or a large negative one falls off the end.":
            _largest_instead_of_largest_absolute,
        "You divided by the standard deviation; the levels end at -1 and 1, so the scale is the largest absolute weight of the block.":
            _standard_deviation,
        "You took the level below; the nearest one is asked for, which may be above.": _level_below,
        "You rounded to an even grid; the levels are not evenly spaced: look for the nearest one in the table.": _evenly_rounded,
        "You looked for the nearest level before dividing by the scale.": _not_divided_by_the_scale,
        "The restored weights lie between -1 and 1: multiply the levels by the scale of their block.": _not_multiplied_by_the_scale,
        "Your blocks run across the rows; a block is {block} neighbours in the order in which the weights lie in memory.": _columns_as_blocks,
        "You have one scale a row; a block is {block} neighbours, however long the row is.": _one_scale_a_row,
        "Your codes are levels; a code is the PLACE of a level in the table, a whole number that fits into 4 bits.": _levels_instead_of_codes,
        "Your blocks are right, and they are still in rows of {block}: give codes and restored weights the shape of the weights.": _left_in_blocks,
        "A block of zeros has the scale 0, and 0/0 is nan, which has no nearest level: its codes must be those of the level zero.": _nan_for_zeros,
    }


# The sizes that bitsandbytes offers; the second one is always 256.
_BITSANDBYTES_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def _bits(block, second_block, code=4.0, first=32.0, quantised=8.0, second=32.0):
    """Bits a weight, with one part changed: all that is stored for the weights that share a float32, over their number."""
    blocks = second_block or 1
    weights = block * blocks
    return (code * weights + (first if second_block is None else quantised * blocks + second)) / weights


def _codes_alone(block, second_block):
    return 4.0


def _bytes_for_bits(block, second_block):
    return _bits(block, second_block, first=4.0, quantised=1.0, second=4.0)


def _half_precision_scales(block, second_block):
    return _bits(block, second_block, first=16.0, second=16.0)


def _a_scale_a_weight(block, second_block):
    return 36.0 if second_block is None else 12.0 + 32.0 / second_block


def _second_scales_forgotten(block, second_block):
    return _bits(block, second_block, second=0.0)


def _second_scale_a_first_block(block, second_block):
    return 4 + 32.0 / block if second_block is None else 4 + 8 / block + 32 / second_block


def _first_scales_kept(block, second_block):
    return _bits(block, second_block) + (0.0 if second_block is None else 32.0 / block)


def _double_quantisation_ignored(block, second_block):
    return 4 + 32.0 / block


def _always_doubly_quantised(block, second_block):
    return _bits(block, second_block or 256)


def _four_bit_scales(block, second_block):
    return _bits(block, second_block, quantised=4.0)


def _blocks_instead_of_their_inverse(block, second_block):
    return 4.0 + block / 32 if second_block is None else 4.0 + block / 8 + block * second_block / 32


def _overhead_alone(block, second_block):
    return _bits(block, second_block, code=0.0)


def _compression(block, second_block):
    return 16 / _bits(block, second_block)


@exercise("qlora-bits", points=2, minutes=5)
class Bits(Exercise):
    """What a weight costs in bits, its share of the scales included."""

    entry = "bits_per_weight"
    withheld = ("bitsandbytes", "labkit.memory_calculator", "labkit.experiments")
    close = Tolerance(rtol=1e-6, atol=1e-6)

    def cases(self, rng, hidden):
        sizes = [int(8 * n) for n in rng.permutation(np.arange(4, 64))[:5]]
        pairs = [(sizes[0], None), (sizes[1], sizes[2]), (sizes[3], sizes[4])]
        ### BEGIN HIDDEN TESTS
        if hidden:
            pairs += [(64, None), (64, 256), (4096, None), (32, 256), (1, 1)]
        ### END HIDDEN TESTS
        for block, second in pairs:
            told = "plain float32 scales" if second is None else "scales in 8 bits, {second} of which share a float32"
            yield Case(
                {"block": block, "second_block": second}, says="blocks of {block} weights and " + told,
                must="Count 4 bits for the code, and add the bits of everything that is stored for a block, divided by the weights that share it.",
                facts={"block": block, "second": second or 0},
            )

    def expected(self, case):
        """The bytes of a real bitsandbytes object where it knows these blocks, else of tensors of the same make."""
        block, second = case.arguments.values()
        if block not in _BITSANDBYTES_BLOCKS or second not in (None, 256):
            count = block * (second or 1)
            stored = {"codes": 4 * count, "scales": (32 if second is None else 8) * count // block, "second": 0 if second is None else 32}
            return sum(stored.values()) / count
        from bitsandbytes.functional import quantize_4bit

        weights = torch.ones(block * 256)
        packed, state = quantize_4bit(weights, quant_type="nf4", blocksize=block, compress_statistics=second is not None)
        stored = packed.nbytes + state.absmax.nbytes + (state.state2.absmax.nbytes if second else 0)
        return 8 * stored / weights.numel()

    misconceptions = {
        "You counted the codes alone; the scales must be stored, too.": _codes_alone,
        "You counted bytes and bits together: a float32 is 32 bits, an 8-bit scale is 8.": _bytes_for_bits,
        "Your scales have 16 bits; bitsandbytes keeps them in float32.": _half_precision_scales,
        "You stored a scale for every weight; {block} weights share one.": _a_scale_a_weight,
        "The 8-bit scales need scales of their own, in float32, and you forgot them.": _second_scales_forgotten,
        "A second scale is shared by a block of blocks: divide its bits by both block sizes.": _second_scale_a_first_block,
        "With double quantisation the float32 scales are no longer kept; the 8-bit ones stand in their place.": _first_scales_kept,
        "You left double quantisation out: with a second block size the scales have 8 bits.": _double_quantisation_ignored,
        "You counted double quantisation even where second_block is None.": _always_doubly_quantised,
        "Double quantisation stores the scales in 8 bits, not in 4.": _four_bit_scales,
        "Turn the fraction round: the larger the block, the LESS a weight pays for the scale.": _blocks_instead_of_their_inverse,
        "That is what the scales cost; add the 4 bits of the code.": _overhead_alone,
        "That is how many times smaller than 16 bits it is; the bits of a weight are asked for.": _compression,
    }


def _dequantised(codes, scales, levels):
    return levels[codes] * scales.repeat_interleave(codes.numel() // len(scales)).reshape_as(codes)


def _layer(x, weight, A, B, scaling):
    return torch.nn.functional.linear(x, torch.addmm(weight, B, A, alpha=scaling))


def _without_scaling(x, codes, scales, levels, A, B, alpha):
    return _layer(x, _dequantised(codes, scales, levels), A, B, 1.0)


def _alpha_not_divided(x, codes, scales, levels, A, B, alpha):
    return _layer(x, _dequantised(codes, scales, levels), A, B, alpha)


def _divided_by_the_width(x, codes, scales, levels, A, B, alpha):
    return _layer(x, _dequantised(codes, scales, levels), A, B, alpha / A.shape[1])


def _base_without_gradient(x, codes, scales, levels, A, B, alpha):
    with torch.no_grad():
        base = x @ _dequantised(codes, scales, levels).T
    return base + alpha / len(A) * (x @ A.T @ B.T)


def _adapter_input_detached(x, codes, scales, levels, A, B, alpha):
    return x @ _dequantised(codes, scales, levels).T + alpha / len(A) * (x.detach() @ A.T @ B.T)


def _adapter_frozen(x, codes, scales, levels, A, B, alpha):
    return _layer(x, _dequantised(codes, scales, levels), A.detach(), B.detach(), alpha / len(A))


def _A_frozen(x, codes, scales, levels, A, B, alpha):
    return _layer(x, _dequantised(codes, scales, levels), A.detach(), B, alpha / len(A))


def _codes_as_weights(x, codes, scales, levels, A, B, alpha):
    return _layer(x, codes.to(x.dtype), A, B, alpha / len(A))


def _levels_without_scales(x, codes, scales, levels, A, B, alpha):
    return _layer(x, levels[codes], A, B, alpha / len(A))


def _codes_times_scales(x, codes, scales, levels, A, B, alpha):
    return _layer(x, _dequantised(codes, scales, torch.arange(len(levels), dtype=x.dtype)), A, B, alpha / len(A))


def _scales_in_turn(x, codes, scales, levels, A, B, alpha):
    weight = levels[codes] * scales.repeat(codes.numel() // len(scales)).reshape(codes.shape)
    return _layer(x, weight, A, B, alpha / len(A))


def _adapter_scaled_like_the_base(x, codes, scales, levels, A, B, alpha):
    weight = levels[codes] + alpha / len(A) * B @ A
    return x @ (weight.reshape(len(scales), -1) * scales[:, None]).reshape(codes.shape).T


def _base_alone(x, codes, scales, levels, A, B, alpha):
    return x @ _dequantised(codes, scales, levels).T


def _adapter_alone(x, codes, scales, levels, A, B, alpha):
    return alpha / len(A) * (x @ A.T @ B.T)


def _rounded_update(x, codes, scales, levels, A, B, alpha):
    """Merged, quantised with the old scales, with the gradient passed straight through the rounding."""
    merged = _dequantised(codes, scales, levels) + alpha / len(A) * B @ A
    blocks = merged.reshape(len(scales), -1) / scales[:, None]
    rounded = (levels[_nearest(blocks.detach(), levels)] * scales[:, None]).reshape(codes.shape)
    return x @ (merged + (rounded - merged).detach()).T


@exercise("qlora-linear", points=4, minutes=10)
class QLoRALinear(Exercise):
    """A linear layer on a quantised base, with LoRA beside it, and gradients where they are due."""

    entry = "qlora_linear"
    withheld = ("bitsandbytes", "peft", "labkit.experiments")
    close = Tolerance(rtol=1e-4, atol=2e-5)

    def cases(self, rng, hidden):
        sizes = [(1, 4, 2, 1, 4, 2.0, False), (3, 8, 4, 2, 4, 8.0, True), (2, 16, 8, 4, 64, 4.0, True)]
        ### BEGIN HIDDEN TESTS
        if hidden:
            sizes += [(5, 16, 4, 3, 16, 6.0, True), (2, 12, 9, 5, 6, 1.0, True), (4, 64, 64, 8, 64, 16.0, True)]
        ### END HIDDEN TESTS
        for rows, into, out, rank, block, alpha, gradients in sizes:
            draw = {"x": (rows, into), "A": (rank, into), "B": (out, rank)}
            drawn = {name: torch.from_numpy(rng.normal(0, shape[-1] ** -0.5, shape)).float() for name, shape in draw.items()}
            yield Case(
                {"x": drawn["x"], "codes": torch.from_numpy(rng.integers(0, 16, (out, into))),
                 "scales": torch.from_numpy(rng.uniform(0.2, 2.0, out * into // block)).float(), "levels": _right_levels(),
                 "A": drawn["A"], "B": drawn["B"], "alpha": alpha},
                says="{rows} rows of {into} numbers, a base of {out} x {into} codes in blocks of {block}, rank {rank} and alpha {alpha}",
                must="The base is levels[codes] times the scale of its block; LoRA adds alpha / {rank} times B A; gradients reach x, A and B.",
                facts={"rows": rows, "into": into, "out": out, "rank": rank, "block": block, "alpha": int(alpha)},
                asks=("output", "gradients") if gradients else ("output",), gradients=("x", "A", "B") if gradients else (),
                cotangent=torch.from_numpy(rng.normal(size=(rows, out))).float() if gradients else None,
            )  # fmt: skip

    def expected(self, case):
        """The output, and the gradients by their formulas, in double precision: no autograd."""
        x, codes, scales, levels, A, B, alpha = (v.double() if torch.is_tensor(v) and v.is_floating_point() else v for v in case.arguments.values())
        block, s = codes.numel() // len(scales), alpha / A.shape[0]
        flat = [levels[code] * scales[i // block] for i, code in enumerate(codes.flatten().tolist())]
        weight = torch.stack(flat).reshape(codes.shape) + s * B @ A
        output = x @ weight.T
        if case.asks == ("output",):
            return output
        c = case.cotangent.double()
        return {"output": output, "gradients": {"x": c @ weight, "A": s * B.T @ c.T @ x, "B": s * c.T @ x @ A.T}}

    misconceptions = {
        "LoRA's part is not scaled: multiply it by alpha / rank.": _without_scaling,
        "You multiplied LoRA's part by alpha; it is alpha divided by the rank, {rank} here.": _alpha_not_divided,
        "You divided alpha by the width, {into}; the rank is the number of rows of A, {rank}.": _divided_by_the_width,
        "No gradient reaches x through the base: frozen means that the base's weights get none; the layers below need what flows through it.":
            _base_without_gradient,
        "No gradient reaches x through LoRA: the layers below must learn of it, too.": _adapter_input_detached,
        "A and B receive no gradient; they are all that trains.": _adapter_frozen,
        "A receives no gradient; A and B train both.": _A_frozen,
        "You used the codes as weights; a code is a place in the table of levels.": _codes_as_weights,
        "You forgot the scales: levels[codes] lie between -1 and 1.": _levels_without_scales,
        "You multiplied the codes by the scales; look the level of each code up first.": _codes_times_scales,
        "Your scales come in turn, 1 2 3 1 2 3; {block} neighbours share a scale, 1 1 1 2 2 2 (repeat_interleave, or a reshape into blocks).":
            _scales_in_turn,
        "You multiplied LoRA's part by the scales of the base, too; they belong to the codes alone.": _adapter_scaled_like_the_base,
        "LoRA is missing: that is the frozen base alone.": _base_alone,
        "The base is missing: that is LoRA alone.": _adapter_alone,
        "You merged LoRA into the base and rounded the sum to 4 bits: small updates are lost. QLoRA keeps the two apart.": _rounded_update,
    }
