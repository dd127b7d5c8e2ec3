"""The lab once more: numbers cut out of names instead of matched, sets instead of lists, sums instead of torch's statistics, running minima.

ALMOST_RIGHT: entry -> answers that are right on the usual inputs and wrong on inputs that the docstring of the entry allows, too.
"""

from itertools import accumulate
from math import isnan, nan

import torch


def learning_rates(names, head_rate, tower_rate, last):
    rates, towers = {}, {}
    for name in names:
        before, found, after = name.partition(".layers.")
        if name.startswith("head."):
            rates[name] = head_rate
        elif found:
            towers.setdefault(before, {}).setdefault(int(after.split(".")[0]), []).append(name)
    for layers in towers.values():
        for number in sorted(layers)[-last:]:
            rates |= dict.fromkeys(layers[number], tower_rate)
    return rates


def moved_wrongly(before, after, trained):
    changed = {name for name in before if not bool((before[name] == after[name]).all())}
    return {"still": [name for name in trained if name not in changed], "moved": [name for name in before if name in changed - set(trained)]}


def action_scale(actions):
    values = actions.double()
    mean = values.sum(0) / len(values)
    variance = ((values - mean) ** 2).sum(0) / len(values)
    return {"mean": mean, "std": torch.tensor([v**0.5 if v > 1e-12 else 1.0 for v in variance.tolist()])}


def best_and_last(losses, patience):
    known = [loss if not isnan(loss) else float("inf") for loss in losses]
    running = list(accumulate(known, min))
    since = 0
    for epoch in range(1, len(known)):
        since = 0 if running[epoch] < running[epoch - 1] else since + 1
        if since == patience:
            return (epoch - since, epoch)
    return (len(known) - 1 - since, len(known) - 1)


def transformers_5_only(names, head_rate, tower_rate, last):
    """Wrong where the layers have the names that transformers 4 gave them."""
    return learning_rates([name for name in names if "_model." not in name], head_rate, tower_rate, last)


def nothing_moves_below_a_millionth(before, after, trained):
    """Wrong where a step is smaller than a tolerance."""
    near = {name: value if (value - before[name]).abs().max() > 5e-7 else before[name] for name, value in after.items()}
    return moved_wrongly(before, near, trained)


def at_least_one_still(before, after, trained):
    """Wrong where nothing that should have moved did."""
    found = moved_wrongly(before, after, trained)
    return {**found, "still": found["still"][: len(trained) - 1]}


def scaled_by_two_rows(actions):
    """Wrong where there is one action only."""
    return action_scale(actions) if len(actions) > 1 else {"mean": actions[0], "std": torch.full((actions.shape[1],), nan)}


def first_counts(losses, patience):
    """Wrong where the first loss is NaN: nothing is less."""
    if isnan(losses[0]):
        return [0, min(patience, len(losses) - 1)]
    return best_and_last(losses, patience)


def nan_is_no_epoch(losses, patience):
    """Wrong where NaN epochs should count against the patience."""
    kept = [epoch for epoch, loss in enumerate(losses) if not isnan(loss)]
    best, last = best_and_last([losses[epoch] for epoch in kept], patience)
    return [kept[best], kept[last]]


ALMOST_RIGHT = {
    "learning_rates": [transformers_5_only],
    "moved_wrongly": [nothing_moves_below_a_millionth, at_least_one_still],
    "action_scale": [scaled_by_two_rows],
    "best_and_last": [first_counts, nan_is_no_epoch],
}
