"""Lesson 3 once more: parameters without torch.nn.Linear's call and the error function by name, a loop instead of scaled noise, counting one by one.

ALMOST_RIGHT: entry -> answers that are right on the usual inputs and wrong on inputs that the docstring of the entry allows, too.
"""

import torch


class Projection(torch.nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(outputs, inputs))
        self.bias = torch.nn.Parameter(torch.empty(outputs))


class BottleneckAdapter(torch.nn.Module):
    def __init__(self, width, bottleneck):
        super().__init__()
        self.down, self.up = Projection(width, bottleneck), Projection(bottleneck, width)

    def forward(self, hidden):
        inside = torch.einsum("...d,md->...m", hidden, self.down.weight) + self.down.bias
        active = inside * torch.special.ndtr(inside)
        return torch.einsum("...m,dm->...d", active, self.up.weight).add(self.up.bias).add(hidden)


def initial_state(noise, std):
    down, up = torch.nn.Linear(noise.shape[1], noise.shape[0]), torch.nn.Linear(noise.shape[0], noise.shape[1])
    for parameter in (*up.parameters(), down.bias):
        torch.nn.init.zeros_(parameter)
    down.weight.data.copy_(noise).mul_(std)
    return torch.nn.ModuleDict({"down": down, "up": up}).state_dict()


def adapter_parameters(width, bottleneck, layers, per_layer, bias):
    sizes = [width * bottleneck, bottleneck * width, bottleneck * bias, width * bias]
    return sum(size for _ in range(layers) for _ in range(per_layer) for size in sizes)


class OneSequenceAtATime(BottleneckAdapter):
    """Wrong where the hidden state has another number of dimensions than two or three."""

    def forward(self, hidden):
        return super().forward(hidden.flatten(0, -3) if hidden.dim() > 3 else hidden)


class NarrowOnly(BottleneckAdapter):
    """Wrong where the bottleneck is as wide as the model, or wider."""

    def forward(self, hidden):
        return super().forward(hidden) if len(self.down.bias) < hidden.shape[-1] else hidden


class SmallInputsOnly(BottleneckAdapter):
    """Wrong where the numbers are large."""

    def forward(self, hidden):
        return super().forward(hidden.clamp(-4, 4))


def narrow_only(noise, std):
    """Wrong where the bottleneck is wider than the model."""
    return initial_state(noise, std if noise.shape[0] < noise.shape[1] else 0.0)


def at_most_two_a_layer(width, bottleneck, layers, per_layer, bias):
    """Wrong where a layer has more than two adapters."""
    return adapter_parameters(width, bottleneck, layers, min(per_layer, 2), bias)


ALMOST_RIGHT = {"BottleneckAdapter": [OneSequenceAtATime, NarrowOnly, SmallInputsOnly], "initial_state": [narrow_only],
                "adapter_parameters": [at_most_two_a_layer]}
