"""Exercises of lesson 3: the bottleneck adapter, the state in which it starts, and how many parameters it has."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.functional import gelu

from labkit.exercises.exercise import Case, Exercise, Tolerance, exercise


class _Bottleneck(nn.Module):
    """The two projections; what is done with them is the mistake. Unlike the solution in its form: students have this file."""

    def __init__(self, width, bottleneck):
        super().__init__()
        for name, sides in {"down": (width, bottleneck), "up": (bottleneck, width)}.items():
            self.add_module(name, nn.Linear(*sides))

    def branch(self, hidden):
        return self.up(gelu(self.down(hidden)))


class _NoResidual(_Bottleneck):
    def forward(self, hidden):
        return self.branch(hidden)


class _ResidualTwice(_Bottleneck):
    def forward(self, hidden):
        return hidden + (hidden + self.branch(hidden))


class _NoNonlinearity(_Bottleneck):
    def forward(self, hidden):
        return hidden + self.up(self.down(hidden))


class _NonlinearityAfterUp(_Bottleneck):
    def forward(self, hidden):
        return hidden + gelu(self.up(self.down(hidden)))


class _NonlinearityBeforeDown(_Bottleneck):
    def forward(self, hidden):
        return hidden + self.up(self.down(gelu(hidden)))


class _NonlinearityTwice(_Bottleneck):
    def forward(self, hidden):
        return hidden + gelu(self.branch(hidden))


class _NonlinearityOnTheSum(_Bottleneck):
    def forward(self, hidden):
        return gelu(hidden + self.branch(hidden))


class _NonlinearityOnlyOnTheSum(_Bottleneck):
    def forward(self, hidden):
        return gelu(hidden + self.up(self.down(hidden)))


class _ResidualInside(_Bottleneck):
    def forward(self, hidden):
        inside = self.down(hidden)
        return self.up(inside + gelu(inside))


class _BothResiduals(_Bottleneck):
    def forward(self, hidden):
        inside = self.down(hidden)
        return hidden + self.up(inside + gelu(inside))


class _Relu(_Bottleneck):
    def forward(self, hidden):
        return hidden + self.up(self.down(hidden).relu())


class _TanhApproximation(_Bottleneck):
    def forward(self, hidden):
        return hidden + self.up(gelu(self.down(hidden), approximate="tanh"))


class _BiasesUnused(_Bottleneck):
    def forward(self, hidden):
        return hidden + gelu(hidden @ self.down.weight.T) @ self.up.weight.T


class _ResidualDetached(_Bottleneck):
    def forward(self, hidden):
        return hidden.detach() + self.branch(hidden)


class _BranchDetached(_Bottleneck):
    def forward(self, hidden):
        return hidden + self.branch(hidden.detach())


class _BranchFrozen(_Bottleneck):
    def __init__(self, width, bottleneck):
        super().__init__(width, bottleneck)
        self.requires_grad_(False)

    def forward(self, hidden):
        return hidden + self.branch(hidden)


class _BranchWithoutGradients(_Bottleneck):
    def forward(self, hidden):
        with torch.no_grad():
            branch = self.branch(hidden)
        return hidden + branch


def _draw(rng, *shape):
    return torch.from_numpy(rng.normal(size=shape)).float()


def _adapter_case(rng, shape, bottleneck, gradients=True, scale=1.0):
    """shape: of the hidden state, its width last.   gradients: whether they and the trainable parameters are asked for."""
    width = shape[-1]
    state = {"down.weight": _draw(rng, bottleneck, width), "down.bias": _draw(rng, bottleneck),
             "up.weight": _draw(rng, width, bottleneck), "up.bias": _draw(rng, width)}
    return Case(
        {"hidden": scale * _draw(rng, *shape)},
        says="a hidden state of shape {shape} and a bottleneck of {bottleneck}" + (", and gradients asked for" if gradients else ""),
        must="The result is h + up(gelu(down(h))), and a gradient flows to h on both ways and to all four parameters.",
        facts={"shape": " x ".join(map(str, shape)), "width": width, "bottleneck": bottleneck},
        asks=("output", "gradients", "trainable") if gradients else ("output",),
        gradients=("hidden", *state) if gradients else (), cotangent=_draw(rng, *shape) if gradients else None,
        build={"width": width, "bottleneck": bottleneck}, state=state,
    )  # fmt: skip


@exercise("adapters-module", points=5, minutes=10)
class Adapter(Exercise):
    """The bottleneck adapter as a module: h + W_up gelu(W_down h), with biases."""

    entry = "BottleneckAdapter"
    withheld = ("labkit.adapters",)
    close = Tolerance(rtol=1e-4, atol=1e-5)

    def cases(self, rng, hidden):
        yield _adapter_case(rng, (3, 4), 2, gradients=False)
        yield _adapter_case(rng, (2, 5, 6), 3)
        ### BEGIN HIDDEN TESTS
        if hidden:
            yield _adapter_case(rng, (1, 2), 1)
            yield _adapter_case(rng, (4, 3), 7)
            yield _adapter_case(rng, (2, 3, 2, 5), 4, scale=5.0)
        ### END HIDDEN TESTS

    def expected(self, case):
        """By hand, in double precision: gelu(z) = z P(z) with the normal distribution's P, so its derivative is P(z) + z p(z)."""
        h = case.arguments["hidden"].double()
        w_down, b_down, w_up, b_up = (tensor.double() for tensor in case.state.values())
        z = h @ w_down.T + b_down
        below = (1 + torch.erf(z / math.sqrt(2))) / 2
        output = h + (z * below) @ w_up.T + b_up
        if case.asks == ("output",):
            return output
        g = case.cotangent.double()
        dz = (g @ w_up) * (below + z * torch.exp(-z * z / 2) / math.sqrt(2 * math.pi))
        rows = {name: tensor.reshape(-1, tensor.shape[-1]) for name, tensor in {"h": h, "g": g, "dz": dz, "a": z * below}.items()}
        return {
            "output": output,
            "gradients": {"hidden": g + dz @ w_down, "down.weight": rows["dz"].T @ rows["h"], "down.bias": rows["dz"].sum(0),
                          "up.weight": rows["g"].T @ rows["a"], "up.bias": rows["g"].sum(0)},
            "trainable": {name: tensor.numel() for name, tensor in case.state.items()},
        }

    misconceptions = {
        "The residual is missing: add h. Without it a fresh adapter would wipe out everything that the layers before it computed.": _NoResidual,
        "You added h twice; one residual is enough.": _ResidualTwice,
        "There is no nonlinearity: two linear maps one after the other are one linear map of rank {bottleneck}.": _NoNonlinearity,
        "The nonlinearity comes too late: it stands between `down` and `up`, not after `up`.": _NonlinearityAfterUp,
        "The nonlinearity comes too early: it stands between `down` and `up`, not before `down`.": _NonlinearityBeforeDown,
        "There are two nonlinearities; the one after `up` does not belong there: it could hardly subtract anything.": _NonlinearityTwice,
        "You sent the sum through a nonlinearity, too: the residual way must stay free, or the adapter can never be the identity.":
            _NonlinearityOnTheSum,
        "The nonlinearity stands on the sum; it belongs between `down` and `up`, and the residual way must stay free.": _NonlinearityOnlyOnTheSum,
        "Your residual goes round the nonlinearity inside the bottleneck; it must go round the whole adapter.": _ResidualInside,
        "There is a second residual inside the bottleneck, round the nonlinearity; only the one round the whole adapter belongs there.":
            _BothResiduals,
        "Your nonlinearity is ReLU; GELU is asked for (`torch.nn.functional.gelu`).": _Relu,
        "You used the tanh approximation of GELU; the exact one is asked for.": _TanhApproximation,
        "The biases of `down` and `up` are not used: call the two layers, rather than multiplying by their weights.": _BiasesUnused,
        "The output is right, but h was detached on the residual way: layers and adapters below would hardly learn.": _ResidualDetached,
        "The output is right, but h was detached on its way into the bottleneck: the adapters below would learn as if this one were not there.":
            _BranchDetached,
        "The output is right, but the adapter is frozen. The model around it is frozen; the adapter is what learns.": _BranchFrozen,
        "The output is right, but `down` and `up` get no gradient: something in between switches gradients off.": _BranchWithoutGradients,
    }


def _state(noise, down, up):
    return {"down.weight": down, "down.bias": torch.zeros(len(noise)), "up.weight": up, "up.bias": torch.zeros(noise.shape[1])}


def _both_zero(noise, std):
    return _state(noise, 0 * noise, 0 * noise.T)


def _both_random(noise, std):
    return _state(noise, std * noise, std * noise.T)


def _down_zero(noise, std):
    return _state(noise, 0 * noise, std * noise.T)


def _all_units_alike(noise, std):
    return _state(noise, torch.full_like(noise, std), 0 * noise.T)


def _std_ignored(noise, std):
    return _state(noise, noise, 0 * noise.T)


def _std_as_variance(noise, std):
    return _state(noise, std**0.5 * noise, 0 * noise.T)


def _weights_transposed(noise, std):
    return _state(noise, std * noise.T, 0 * noise)


def _bias_of_one(noise, std):
    return {**_state(noise, std * noise, 0 * noise.T), "up.bias": torch.ones(noise.shape[1])}


@exercise("adapters-start", points=3, minutes=6)
class Start(Exercise):
    """The tensors with which an adapter starts: exactly the identity, and yet able to learn."""

    entry = "initial_state"
    withheld = ("labkit.adapters",)
    close = Tolerance(rtol=1e-5, atol=0)

    def cases(self, rng, hidden):
        sizes = [(2, 3, 0.5), (3, 5, 0.02)]
        ### BEGIN HIDDEN TESTS
        if hidden:
            sizes += [(1, 4, 0.1), (6, 2, 2.0)]
        ### END HIDDEN TESTS
        for bottleneck, width, std in sizes:
            yield Case(
                {"noise": _draw(rng, bottleneck, width), "std": std},
                says="a bottleneck of {bottleneck}, a width of {width} and std = {std}",
                must="W_up and both biases are zero, so that nothing is added to h; W_down is random, so that W_up has something to learn from.",
                facts={"bottleneck": bottleneck, "width": width, "std": std},
            )

    def expected(self, case):
        noise, std = case.arguments["noise"], case.arguments["std"]
        bottleneck, width = len(noise), len(noise[0])
        return {"down.weight": [[std * float(n) for n in row] for row in noise], "down.bias": [0.0] * bottleneck,
                "up.weight": [[0.0] * bottleneck for _ in range(width)], "up.bias": [0.0] * width}

    misconceptions = {
        "Both matrices are zero. That is the identity, and it stays one: the gradient of W_up is a product with gelu(W_down h) = 0, and that of "
        "W_down a product with W_up = 0. Nothing but the bias of `up` could ever learn.": _both_zero,
        "Both matrices are random, so the adapter changes h before it has learned anything; W_up must be zero.": _both_random,
        "You made W_down zero and W_up random. That is the identity, too, but it learns only because GELU has a slope at 0 (with ReLU, as "
        "PyTorch differentiates it, it never would); here, as in the lecture, W_up is the zero one.": _down_zero,
        "All numbers of W_down are the same. Then all {bottleneck} units of the bottleneck get the same gradient and stay copies of one "
        "another.": _all_units_alike,
        "You did not use std: the noise has standard deviation 1, and W_down should have {std}.": _std_ignored,
        "You multiplied by the root of std; it is a standard deviation already, not a variance.": _std_as_variance,
        "The weights lie on their side: torch.nn.Linear keeps (outputs, inputs), so `down` has ({bottleneck}, {width}).": _weights_transposed,
        "The bias of `up` is 1, so the adapter adds 1 to every feature; it must add nothing.": _bias_of_one,
    }


def _biases_left_out(width, bottleneck, layers, per_layer, bias):
    return layers * per_layer * 2 * bottleneck * width


def _biases_always(width, bottleneck, layers, per_layer, bias):
    return layers * per_layer * (2 * bottleneck * width + bottleneck + width)


def _one_projection(width, bottleneck, layers, per_layer, bias):
    return layers * per_layer * (bottleneck * width + (bottleneck + width if bias else 0))


def _one_a_layer(width, bottleneck, layers, per_layer, bias):
    return layers * (2 * bottleneck * width + (bottleneck + width if bias else 0))


def _one_layer(width, bottleneck, layers, per_layer, bias):
    return per_layer * (2 * bottleneck * width + (bottleneck + width if bias else 0))


def _square_matrix(width, bottleneck, layers, per_layer, bias):
    return layers * per_layer * (width * width + (width if bias else 0))


def _sides_added(width, bottleneck, layers, per_layer, bias):
    return layers * per_layer * (2 * (bottleneck + width) + (bottleneck + width if bias else 0))


def _both_biases_wide(width, bottleneck, layers, per_layer, bias):
    return layers * per_layer * (2 * bottleneck * width + (2 * width if bias else 0))


def _both_biases_narrow(width, bottleneck, layers, per_layer, bias):
    return layers * per_layer * (2 * bottleneck * width + (2 * bottleneck if bias else 0))


def _one_bias(width, bottleneck, layers, per_layer, bias):
    return layers * per_layer * (2 * bottleneck * width + (width if bias else 0))


def _biases_once_a_layer(width, bottleneck, layers, per_layer, bias):
    return layers * (per_layer * 2 * bottleneck * width + (bottleneck + width if bias else 0))


@exercise("adapters-count", points=2, minutes=4)
class Count(Exercise):
    """How many parameters the adapters of a whole model have."""

    entry = "adapter_parameters"
    withheld = ("labkit.adapters", "labkit.memory")
    close = Tolerance(rtol=0, atol=0)

    def cases(self, rng, hidden):
        kinds = [(1, False), (2, True), (2, False)]
        ### BEGIN HIDDEN TESTS
        if hidden:
            kinds += [(1, True), (3, True), (5, False)]
        ### END HIDDEN TESTS
        for per_layer, bias in kinds:
            # The width is larger than the bottleneck, as in a real model, and there are more layers than adapters in one.
            width, bottleneck, layers = (int(rng.integers(*span)) for span in ((12, 60), (2, 12), (6, 13)))
            facts = {"width": width, "bottleneck": bottleneck, "layers": layers, "per_layer": per_layer, "bias": bias}
            yield Case(
                dict(facts), says="d = {width}, m = {bottleneck}, {layers} layers, {per_layer} a layer, bias = {bias}",
                must="Each adapter has two matrices and, with biases, one bias for each of its two projections.", facts=facts,
            )  # fmt: skip

    def expected(self, case):
        """Counted on modules, without memory for their numbers."""
        width, bottleneck, layers, per_layer, bias = case.arguments.values()
        with torch.device("meta"):
            one = nn.Sequential(nn.Linear(width, bottleneck, bias=bias), nn.Linear(bottleneck, width, bias=bias))
        return sum(p.numel() for _ in range(layers * per_layer) for p in one.parameters())

    misconceptions = {
        "You left the biases out, where bias = True asks for them: m for `down` and d for `up`.": _biases_left_out,
        "You counted biases where bias = False.": _biases_always,
        "You counted one projection; there are two, down and up.": _one_projection,
        "You counted one adapter a layer; `per_layer` says how many there are.": _one_a_layer,
        "You counted one layer; there are {layers}.": _one_layer,
        "You counted a square d x d matrix; the bottleneck makes it two thin ones, d x m each.": _square_matrix,
        "You added the sides of the matrices; a matrix of m rows and d columns has m times d numbers.": _sides_added,
        "Only one of the two biases has d numbers, that of `up`; that of `down` has m.": _both_biases_wide,
        "Only one of the two biases has m numbers, that of `down`; that of `up` has d.": _both_biases_narrow,
        "There are two biases, one for each projection; you counted that of `up` only.": _one_bias,
        "Each of the {per_layer} adapters of a layer has biases of its own.": _biases_once_a_layer,
    }
