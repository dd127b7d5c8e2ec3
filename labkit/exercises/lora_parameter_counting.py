"""Exercises of lesson 4: the LoRA layer, its parameters, merging it, and the rank that an update needs."""

from __future__ import annotations

import math

import torch
from torch import nn

from labkit.exercises.exercise import Case, Exercise, Tolerance, exercise


class _Layer(nn.Module):
    """The three tensors; what is done with them is the mistake."""

    def __init__(self, weight, rank, alpha):
        super().__init__()
        start = {"weight": weight, "A": torch.empty(rank, len(weight[0])).normal_(std=rank**-0.5), "B": torch.empty(len(weight), rank).zero_()}
        for name, values in start.items():
            self.register_parameter(name, nn.Parameter(values, requires_grad=name != "weight"))
        self.scaling = alpha * rank**-1

    def forward(self, x):
        return nn.functional.linear(x, torch.addmm(self.weight, self.B, self.A, alpha=self.scaling))


class _NotFrozen(_Layer):
    def __init__(self, weight, rank, alpha):
        super().__init__(weight, rank, alpha)
        self.weight.requires_grad_(True)


class _NoScaling(_Layer):
    def forward(self, x):
        return x @ self.weight.T + x @ self.A.T @ self.B.T


class _TimesAlpha(_Layer):
    def __init__(self, weight, rank, alpha):
        super().__init__(weight, rank, alpha)
        self.scaling = alpha


class _TimesRank(_Layer):
    def __init__(self, weight, rank, alpha):
        super().__init__(weight, rank, alpha)
        self.scaling = rank / alpha


class _RootOfRank(_Layer):
    def __init__(self, weight, rank, alpha):
        super().__init__(weight, rank, alpha)
        self.scaling = alpha / math.sqrt(rank)


class _UpdateAlone(_Layer):
    def forward(self, x):
        return self.scaling * (x @ self.A.T @ self.B.T)


class _InputInsteadOfBase(_Layer):
    def forward(self, x):
        update = self.scaling * (x @ self.A.T @ self.B.T)
        return x + update if update.shape == x.shape else update + x.mean(-1, keepdim=True)


class _NoGradientToTheInput(_Layer):
    def forward(self, x):
        return x @ self.weight.T + self.scaling * (x.detach() @ self.A.T @ self.B.T)


class _Nonlinear(_Layer):
    def forward(self, x):
        return x @ self.weight.T + self.scaling * (torch.relu(x @ self.A.T) @ self.B.T)


class _BothZero(_Layer):
    def __init__(self, weight, rank, alpha):
        super().__init__(weight, rank, alpha)
        nn.init.zeros_(self.A)


class _BothRandom(_Layer):
    def __init__(self, weight, rank, alpha):
        super().__init__(weight, rank, alpha)
        nn.init.normal_(self.B)


@exercise("lora-layer", points=5, minutes=12)
class LoRALayer(Exercise):
    """A linear layer with a frozen weight and a trainable update of low rank."""

    entry = "LoRALinear"
    close = Tolerance(rtol=1e-4, atol=1e-4)
    withheld = ("peft", "labkit.peft_lora")

    def cases(self, rng, hidden):
        yield self._trained(rng, 1, 4, 3, 2, 4.0, asks=("output",))
        yield self._trained(rng, 5, 6, 8, 3, 6.0)
        yield self._fresh(rng, 3, 5, 7, 2, 1.0)
        ### BEGIN HIDDEN TESTS
        if hidden:
            yield self._trained(rng, 2, 16, 16, 4, 1.0)
            yield self._trained(rng, 3, 9, 5, 1, 0.5)
            yield self._fresh(rng, 2, 6, 4, 3, 8.0)
        ### END HIDDEN TESTS

    def _trained(self, rng, batch, inputs, outputs, rank, alpha, asks=("output", "gradients", "trainable")):
        weight, a, b, x, cotangent = (torch.from_numpy(rng.normal(0, 1, shape)).float() for shape in (
            (outputs, inputs), (rank, inputs), (outputs, rank), (batch, inputs), (batch, outputs)))
        return Case(
            {"x": x}, facts=_facts(inputs, outputs, rank, alpha), build={"weight": weight, "rank": rank, "alpha": alpha},
            state={"weight": weight, "A": a, "B": b}, cotangent=cotangent, gradients=("x", "A", "B", "weight"), asks=asks,
            says="{inputs} inputs, {outputs} outputs, rank {rank} and alpha {alpha}",
            must="The output is x W^T plus alpha / r times x A^T B^T; only A ({rank} x {inputs}) and B ({outputs} x {rank}) are trained.",
        )

    def _fresh(self, rng, batch, inputs, outputs, rank, alpha):
        weight, x, cotangent = (torch.from_numpy(rng.normal(0, 1, shape)).float() for shape in ((outputs, inputs), (batch, inputs), (batch, outputs)))
        return Case(
            {"x": x}, facts=_facts(inputs, outputs, rank, alpha), build={"weight": weight, "rank": rank, "alpha": alpha}, cotangent=cotangent,
            says="a fresh layer of rank {rank}", must="A fresh layer gives what the frozen weight alone gives, since B starts at zero; A does not.",
            gradients=("B",), asks=("output", "gradients"),
        )

    def relevant(self, given, case):
        """Of a fresh layer, whose A nobody can foresee: the output, and whether B has anything to learn from."""
        if case.state is not None:
            return given
        return {"output": given["output"], "can B learn": float((given["gradients"]["B"] != 0).any())}

    def expected(self, case):
        x = case.arguments["x"].double().requires_grad_()
        weight = case.build["weight"].double()
        rank, alpha = case.build["rank"], case.build["alpha"]
        if case.state is None:
            return {"output": x.detach() @ weight.T, "can B learn": 1.0}
        state = case.state
        a, b = state["A"].double().requires_grad_(), state["B"].double().requires_grad_()
        output = torch.stack([sum(((weight + alpha / rank * b @ a)[:, i] * row[i] for i in range(len(row))), torch.zeros(len(weight))) for row in x])
        if case.asks == ("output",):
            return output.detach()
        found = torch.autograd.grad((output * case.cotangent).sum(), [x, a, b], allow_unused=True)
        gradients = dict(zip(("x", "A", "B"), found)) | {"weight": None}
        answer = {"output": output.detach(), "gradients": {name: gradients[name] for name in case.gradients}}
        return answer | {"trainable": {"A": a.numel(), "B": b.numel()}} if "trainable" in case.asks else answer

    misconceptions = {
        "The weight is trained as well; it is frozen: requires_grad=False.": _NotFrozen,
        "The scaling is missing: the update is multiplied by alpha / r, {scaling} here.": _NoScaling,
        "You multiplied by alpha; the scaling is alpha / r, so that changing the rank does not change the size of the update.": _TimesAlpha,
        "You turned the scaling over: it is alpha / r, {scaling} here.": _TimesRank,
        "You divided by the root of the rank (that is rsLoRA); the original scaling is alpha / r.": _RootOfRank,
        "The frozen weight is missing: LoRA ADDS to x W^T.": _UpdateAlone,
        "You added the input (an adapter's residual); LoRA adds to the output of the frozen weight, x W^T.": _InputInsteadOfBase,
        "You detached the input: the layers before this one learn through the update, too.": _NoGradientToTheInput,
        "There is a nonlinearity between A and B; with one, the update could not be merged into the weight.": _Nonlinear,
        "A and B are both zero at the start: then both gradients are zero, and stay it. One of the two must be random, and it is A.": _BothZero,
        "B is random at the start: the robot is damaged before the first step. Start B at zero and A at random.": _BothRandom,
    }


def _facts(inputs, outputs, rank, alpha):
    return {"rank": rank, "alpha": f"{alpha:g}", "scaling": f"{alpha / rank:g}", "inputs": inputs, "outputs": outputs}


def _sizes(shapes):
    return [(int(out), int(inputs)) for out, inputs in shapes]


def _product(shapes, rank):
    return sum(rank * out * inputs for out, inputs in _sizes(shapes))


def _square(shapes, rank):
    return sum(2 * rank * out for out, _ in _sizes(shapes))


def _twice_the_input(shapes, rank):
    return sum(2 * rank * inputs for _, inputs in _sizes(shapes))


def _only_a(shapes, rank):
    return sum(rank * inputs for _, inputs in _sizes(shapes))


def _only_b(shapes, rank):
    return sum(rank * out for out, _ in _sizes(shapes))


def _with_the_base(shapes, rank):
    return sum(rank * (out + inputs) + out * inputs for out, inputs in _sizes(shapes))


def _first_matrix(shapes, rank):
    out, inputs = _sizes(shapes)[0]
    return rank * (out + inputs)


def _without_rank(shapes, rank):
    return sum(out + inputs for out, inputs in _sizes(shapes))


def _rank_squared(shapes, rank):
    return sum(rank * (out + inputs) + rank * rank for out, inputs in _sizes(shapes))


@exercise("lora-count", points=3, minutes=5)
class Count(Exercise):
    """How many parameters LoRA trains in a list of weight matrices."""

    entry = "count_lora"
    close = Tolerance(rtol=0, atol=0)
    withheld = ("labkit.memory",)

    def cases(self, rng, hidden):
        matrices = [(1, 2), (4, 16), (3, 8)]
        ### BEGIN HIDDEN TESTS
        if hidden:
            matrices += [(9, 64), (1, 1), (2, 5)]
        ### END HIDDEN TESTS
        for count, rank in matrices:
            sides = 8 + 8 * rng.permutation(500)[: 2 * count].reshape(count, 2)
            shapes = [sorted(pair.tolist(), reverse=bool(n % 2)) for n, pair in enumerate(sides)]
            yield Case(
                {"shapes": shapes, "rank": rank},
                says="{count} matrices, the first of {out} outputs and {inputs} inputs, and rank {rank}",
                must="Each matrix gets A with r x inputs and B with outputs x r entries.",
                facts={"count": len(shapes), "out": shapes[0][0], "inputs": shapes[0][1], "rank": rank},
            )

    def expected(self, case):
        """Counted on tensors that exist."""
        rank = case.arguments["rank"]
        return sum(torch.empty(rank, inputs, device="meta").numel() + torch.empty(out, rank, device="meta").numel()
                   for out, inputs in case.arguments["shapes"])

    misconceptions = {
        "You multiplied outputs by inputs: that is the whole matrix, {rank} times. A and B are thin: r x inputs and outputs x r.": _product,
        "You took every matrix as square: the outputs ({out} in the first) and the inputs ({inputs}) both count, once each.": _square,
        "You counted the inputs twice: A has r x inputs entries, B has outputs x r.": _twice_the_input,
        "You counted A alone; B is trained, too.": _only_a,
        "You counted B alone; A is trained, too.": _only_b,
        "You counted the frozen matrices as well; only A and B are trained.": _with_the_base,
        "You counted the first of {count} matrices; add them all up.": _first_matrix,
        "The rank is missing: A and B are r times as long.": _without_rank,
        "You added r x r entries; there is no matrix between A and B.": _rank_squared,
    }


def _update(A, B, alpha, scaling=None):
    return torch.einsum("dr,rk->dk", B, A).mul(alpha / len(A) if scaling is None else scaling)


def _merged_without_scaling(weight, A, B, alpha):
    return weight + B @ A


def _merged_times_alpha(weight, A, B, alpha):
    return weight + _update(A, B, alpha, alpha)


def _replaced(weight, A, B, alpha):
    return _update(A, B, alpha)


def _subtracted(weight, A, B, alpha):
    return weight - _update(A, B, alpha)


def _divided_by_the_width(weight, A, B, alpha):
    return weight + _update(A, B, alpha, alpha / A.shape[1])


def _elementwise(weight, A, B, alpha):
    return weight + alpha / A.shape[0] * B.sum(1, keepdim=True) * A.sum(0, keepdim=True)


@exercise("lora-merge", points=3, minutes=5)
class Merge(Exercise):
    """The one matrix that does what the frozen weight and its update do together."""

    entry = "merged"
    close = Tolerance(rtol=1e-4, atol=1e-5)
    withheld = ("peft", "labkit.peft_lora")

    def cases(self, rng, hidden):
        sizes = [(3, 4, 2, 4.0), (6, 5, 3, 6.0)]
        ### BEGIN HIDDEN TESTS
        if hidden:
            sizes += [(8, 8, 4, 1.0), (7, 2, 1, 16.0)]
        ### END HIDDEN TESTS
        for out, inputs, rank, alpha in sizes:
            weight, a, b = (torch.from_numpy(rng.normal(0, 1, shape)).float() for shape in ((out, inputs), (rank, inputs), (out, rank)))
            yield Case(
                {"weight": weight, "A": a, "B": b, "alpha": alpha},
                says="a weight of {out} x {inputs}, rank {rank} and alpha {alpha}",
                must="Multiplying by the merged matrix gives what the frozen weight and the update give together.",
                facts={"out": out, "inputs": inputs, "rank": rank, "alpha": f"{alpha:g}", "scaling": f"{alpha / rank:g}"},
            )

    def expected(self, case):
        """Column by column: what each unit vector becomes on the two paths."""
        weight, a, b = (case.arguments[name].double() for name in ("weight", "A", "B"))
        scaling = case.arguments["alpha"] / len(a)
        columns = [weight @ unit + scaling * (b @ (a @ unit)) for unit in torch.eye(weight.shape[1], dtype=torch.double)]
        return torch.stack(columns, dim=1)

    misconceptions = {
        "The scaling alpha / r ({scaling} here) is missing: merged, the robot would move by another update than it learned.": _merged_without_scaling,
        "You multiplied by alpha; the scaling is alpha / r.": _merged_times_alpha,
        "The frozen weight is missing: merging ADDS the update to it.": _replaced,
        "You subtracted the update; that is how an adapter is taken out again.": _subtracted,
        "You divided alpha by the number of inputs ({inputs}); divide by the rank ({rank}), the rows of A.": _divided_by_the_width,
        "That is a product of sums; B A is a matrix product.": _elementwise,
    }


def _energies(update):
    """Squared singular values, the largest first: the eigenvalues of the Gram matrix."""
    update = update.double()
    gram = update.T @ update if update.shape[1] <= update.shape[0] else update @ update.T
    return sorted(torch.linalg.eigvalsh(gram).tolist(), reverse=True)


def _needed(energies, share):
    kept, needed = 0.0, 0
    while kept < share * sum(energies):
        kept += energies[needed]
        needed += 1
    return needed


def _plain_sum(update, share):
    return _needed([max(energy, 0.0) ** 0.5 for energy in _energies(update)], share)


def _off_by_one(update, share):
    return _needed(_energies(update), share) - 1


def _one_too_many(update, share):
    return _needed(_energies(update), share) + 1


def _each_alone(update, share):
    squares = torch.linalg.svdvals(update.double()) ** 2
    return int((squares / squares.sum() >= 1 - share).sum())


def _relative_to_the_largest(update, share):
    values = torch.linalg.svdvals(update.double())
    return int((values >= (1 - share) * values[0]).sum())


def _numerical_rank(update, share):
    return int(torch.linalg.matrix_rank(update.double()))


def _share_of_the_size(update, share):
    return math.ceil(share * min(update.shape))


def _smallest_first(update, share):
    return _needed(_energies(update)[::-1], share)


@exercise("lora-rank-needed", points=4, minutes=8)
class RankNeeded(Exercise):
    """The smallest rank that keeps a given share of an update."""

    entry = "rank_needed"
    withheld = ("labkit.experiments",)
    close = Tolerance(rtol=0, atol=0.1)

    def cases(self, rng, hidden):
        sizes = [(4, 3, 0.5, 1.0), (10, 8, 0.9, 0.5), (12, 12, 0.8, 0.85)]
        ### BEGIN HIDDEN TESTS
        if hidden:
            sizes += [(20, 7, 0.97, 0.7), (30, 30, 0.5, 0.95), (5, 5, 0.3, 0.2), (4, 40, 0.9, 0.95), (16, 24, 0.95, 0.8)]
        ### END HIDDEN TESTS
        for rows, columns, share, decay in sizes:
            yield Case(
                {"update": _with_spectrum(rng, rows, columns, decay, share), "share": share},
                says="an update of {rows} x {columns} and a share of {share}",
                must="It is the smallest r for which the r largest squared singular values make up at least that share of all of them.",
                facts={"rows": rows, "columns": columns, "share": share},
            )

    def expected(self, case):
        """Added up one after the other."""
        return _needed(_energies(case.arguments["update"]), case.arguments["share"])

    misconceptions = {
        "You added the singular values; the size of an update (its squared Frobenius norm) is the sum of their SQUARES.": _plain_sum,
        "One too few: with that many directions the share is not reached yet.": _off_by_one,
        "One too many: one direction less already reaches the share.": _one_too_many,
        "You counted the directions that are large on their own; add the largest ones up until the share is reached.": _each_alone,
        "You compared with the largest singular value; compare the SUM of squares with the total.": _relative_to_the_largest,
        "That is the numerical rank, which is nearly always full; the question is how few directions hold most of the update.": _numerical_rank,
        "You took a share of the number of directions; take the share of the update that they hold.": _share_of_the_size,
        "You began with the smallest singular values; the best approximation keeps the largest.": _smallest_first,
    }


def _with_spectrum(rng, rows, columns, decay, share):
    """A random matrix whose singular values fall by `decay`, none of whose cumulated shares is close to `share`."""
    count = min(rows, columns)
    while True:
        values = decay ** torch.arange(count) * (1 + 0.2 * torch.from_numpy(rng.random(count)))
        values = values.sort(descending=True).values
        shares = (values**2).cumsum(0) / (values**2).sum()
        if (shares - share).abs().min() > 0.004:
            break
    left, _ = torch.linalg.qr(torch.from_numpy(rng.normal(0, 1, (rows, count))))
    right, _ = torch.linalg.qr(torch.from_numpy(rng.normal(0, 1, (columns, count))))
    return (left @ torch.diag(values.double()) @ right.T).float()
