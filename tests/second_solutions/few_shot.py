"""Lesson 6 once more: sums instead of a correlation function, bisection instead of lists, a loop over sets, and counts instead of differences.

ALMOST_RIGHT: entry -> answers that are right on the usual inputs and wrong on inputs that the docstring of the entry allows, too.
"""

from bisect import bisect_right

import torch


def lag_correlations(image, speed, longest):
    found, x, y = torch.empty(longest + 1), image.double(), speed.double()
    for lag in range(longest + 1):
        a, b = x[: len(x) - lag], y[lag:]
        n = len(a)
        covariance = (a * b).sum() - a.sum() * b.sum() / n
        found[lag] = covariance / ((a.square().sum() - a.sum() ** 2 / n) * (b.square().sum() - b.sum() ** 2 / n)).sqrt()
    return found


def pair_decisions(success, command_times, moves, switches, frame_times, oldest, shortest):
    pairs = []
    for command, (time, move, switch) in enumerate(zip(command_times, moves, switches)):
        frame = bisect_right(frame_times, time) - 1
        if not success or frame < 0 or frame_times[frame] < time - oldest:
            continue
        if switch or move >= shortest:
            pairs.append((command, frame))
    return pairs


def held_out_rows(episodes, order, count):
    chosen = {int(e) for e in order[:count]}
    return [int(e) in chosen for e in episodes]


def paired_difference(first, second):
    n = len(first)
    gained, lost = (second & ~first).sum().item(), (first & ~second).sum().item()
    middle = (gained - lost) / n
    squares = gained * (1 - middle) ** 2 + lost * (1 + middle) ** 2 + (n - gained - lost) * middle**2
    half = 1.96 * (squares / (n - 1)) ** 0.5 / n**0.5
    return [middle, middle - half, middle + half]


def short_lags_only(image, speed, longest):
    """Wrong where the longest lag is more than half of the record."""
    return lag_correlations(image, speed, min(longest, len(image) // 2)) if longest <= len(image) // 2 else lag_correlations(image, speed, 1)


def a_frame_for_everything(success, command_times, moves, switches, frame_times, oldest, shortest):
    """Wrong where a command comes before the first frame."""
    pairs = dict(pair_decisions(success, command_times, moves, switches, frame_times, oldest, shortest))
    early = [c for c, time in enumerate(command_times) if time < frame_times[0] and success]
    return sorted([*pairs.items(), *((c, 0) for c in early)])


def never_all(episodes, order, count):
    """Wrong where every episode is held out."""
    return held_out_rows(episodes, order, min(count, len(order) - 1))


ALMOST_RIGHT = {"lag_correlations": [short_lags_only], "pair_decisions": [a_frame_for_everything], "held_out_rows": [never_all]}
