"""Exercises of the lab's deployment: int8 weights and their error, a cache that answers with what is similar, deadlines, a drift alarm."""

from __future__ import annotations

import numpy as np
import torch

from labkit.exercises.exercise import Case, Exercise, Tolerance, exercise


def _sizes(weight):
    return weight.abs().amax(1, keepdim=True)


def _int8(weight, *, sizes=_sizes, most=127, cut=torch.round, zeros=True, power=1):
    """The right answer with one of its judgements exchanged.   sizes: weight -> what the scales are made of, broadcastable to the weight."""
    scale = sizes(weight) / most
    scale = torch.where(scale == 0, 1.0, scale) if zeros else scale
    q = cut(weight / scale).clamp(-128, 127)
    error = ((weight - scale * q).norm() / weight.norm()) ** power
    return {"q": q, "scale": scale.flatten(), "error": error}


def _one_scale_for_all(weight):
    found = _int8(weight, sizes=lambda w: w.abs().amax())
    return {**found, "scale": found["scale"].expand(len(weight))}


def _a_scale_for_each_column(weight):
    return _int8(weight, sizes=lambda w: w.abs().amax(0, keepdim=True))


def _up_to_128(weight):
    return _int8(weight, most=128)


def _largest_without_its_sign(weight):
    return _int8(weight, sizes=lambda w: w.amax(1, keepdim=True))


def _cut_off(weight):
    return _int8(weight, cut=torch.trunc)


def _range_by_255(weight):
    return _int8(weight, sizes=lambda w: w.amax(1, keepdim=True) - w.amin(1, keepdim=True), most=255)


def _zero_divided_by_zero(weight):
    return _int8(weight, zeros=False)


def _squared_error(weight):
    return _int8(weight, power=2)


@exercise("lab-int8", points=4, minutes=10)
class Int8(Exercise):
    """A weight matrix as int8 numbers with a scale for each row, and how much that changes it."""

    entry = "int8_weights"
    withheld = ("labkit.serving.quantisation",)
    close = Tolerance(rtol=5e-4, atol=1e-7)

    def cases(self, rng, hidden):
        shapes = [(3, 5, ()), (4, 4, (2,))]
        ### BEGIN HIDDEN TESTS
        if hidden:
            shapes += [(2, 40, ()), (6, 3, (0, 5)), (1, 1, ())]
        ### END HIDDEN TESTS
        for rows, columns, zero in shapes:
            # Nothing lies near the middle of two steps, so that no way of dividing decides the rounding.
            steps = rng.integers(-110, 111, (rows, columns)) + rng.uniform(0.15, 0.35, (rows, columns)) * rng.choice([-1, 1], (rows, columns))
            largest = rng.integers(0, columns, rows)
            steps[np.arange(rows), largest] = 127 * np.where(np.arange(rows) % 2, 1, -1)
            steps[list(zero)] = 0
            weight = steps * 10 ** rng.uniform(-3, -1, (rows, 1))
            yield Case(
                {"weight": torch.from_numpy(weight).float()},
                says="a weight of {rows} rows and {columns} columns" + (", with a row of zeros" if zero else ""),
                must='"scale" is the largest absolute value of each row through 127, or 1; "q" the weight through its row\'s scale, rounded; "error" '
                     "the norm of what is lost through the norm of the weight.",
                facts={"rows": rows, "columns": columns},
            )

    def expected(self, case):
        """torch's own quantised tensor, given numpy's scales."""
        weight = case.arguments["weight"].double().numpy()
        scale = np.abs(weight).max(1) / 127
        scale[scale == 0] = 1
        stored = torch.quantize_per_channel(torch.from_numpy(weight).float(), torch.from_numpy(scale), torch.zeros(len(scale)), 0, torch.qint8)
        q = stored.int_repr().numpy().astype(np.float64)
        return {"q": q, "scale": scale, "error": float(np.linalg.norm(weight - scale[:, None] * q) / np.linalg.norm(weight))}

    misconceptions = {
        "There is one scale for the whole matrix: a row of small weights then shares the steps of the largest. Give each of the {rows} rows its own.":
            _one_scale_for_all,
        "The scales belong to the {columns} columns; give each of the {rows} rows its own, because a row makes one output and its scale can be "
        "multiplied in afterwards.": _a_scale_for_each_column,
        "You divide by 128: int8 ends at 127, so the largest weight of a row is cut off. Symmetric means from -127 to 127.": _up_to_128,
        "The largest value of a row is not the largest in size: a negative outlier is cut off. Take absolute values first.":
            _largest_without_its_sign,
        "You cut the fraction off; rounding to the nearest halves the error.": _cut_off,
        "You divided the range from least to largest by 255: that is for scales with a zero point; a symmetric one has none.": _range_by_255,
        "A row of zeros has the scale 0, and 0 divided by 0 is NaN: put 1 in its place.": _zero_divided_by_zero,
        "That is the error squared; the norms are wanted, not their squares.": _squared_error,
    }


def _requests(walk, rng):
    """The walk somewhere else, turned and mirrored by whole steps: every distance stays what it was, to the bit."""
    points = np.array(walk, np.float64)
    points = points[:, rng.permutation(2)] * rng.choice([-1, 1], 2)
    return torch.from_numpy(points + rng.integers(-100, 101, 2)).float()


def _served(sketches, capacity, threshold, *, used=True, stored=False, nearest=True, near=lambda d, t: d <= t, room=0, last=False, power=1):
    """The right answer with one of its judgements exchanged."""
    kept, answers = [], []
    for i, sketch in enumerate(sketches):
        away = [float((sketch - sketches[j]).norm()) ** power for j in kept]
        close = [place for place in range(len(kept)) if near(away[place], threshold)]
        if close:
            place = min(close, key=lambda p: away[p]) if nearest else close[0]
            found = kept.pop(place) if used else kept[place]
            if used:
                kept.append(found)
        else:
            found = i
        if not close or stored:
            if capacity + room and len(kept) >= capacity + room:
                kept.pop(-1 if last else 0)
            kept.append(i)
        answers.append(found)
    return answers


def _first_in_first_out(*given):
    return _served(*given, used=False)


def _chained(sketches, capacity, threshold):
    kept, answers = [], []
    for i, sketch in enumerate(sketches):
        close = [j for j in kept if (sketch - sketches[j]).norm() <= threshold]
        found = min(close, key=lambda j: float((sketch - sketches[j]).norm())) if close else i
        kept = [*[j for j in kept if j != found], i][-capacity:]
        answers.append(answers[found] if found < i else i)
    return answers


def _first_that_is_close(*given):
    return _served(*given, nearest=False)


def _threshold_excluded(*given):
    return _served(*given, near=lambda d, t: d < t)


def _one_more_kept(*given):
    return _served(*given, room=1)


def _never_full(*given):
    return _served(*given, room=10_000)


def _latest_makes_room(*given):
    return _served(*given, last=True)


def _squared_distance(*given):
    return _served(*given, power=2)


# No request in them has two kept ones at the same distance, and several are exactly 5 from another.
_SHORT = [(1, 5), (2, 0), (2, 1), (7, 5), (5, 1), (2, 4), (9, 0), (5, 5)]
_LONGER = [(0, 3), (5, 5), (8, 1), (10, 0), (8, 2), (11, 5), (9, 3), (4, 3), (0, 3), (7, 0)]
_LONGEST = [(6, 4), (8, 1), (10, 0), (3, 2), (3, 0), (0, 6), (0, 0), (9, 1), (5, 3), (0, 4), (10, 0), (11, 6), (8, 4), (0, 3), (8, 0), (7, 6)]


@exercise("lab-cache", points=4, minutes=12)
class Cache(Exercise):
    """Which picture's features answer each request, from a small cache of the least recently used."""

    entry = "answered_by"
    withheld = ("labkit.serving.caching",)
    close = Tolerance(rtol=0, atol=0)

    def cases(self, rng, hidden):
        walks = [(_SHORT, 2, 5.0), (_LONGER, 3, 5.0)]
        ### BEGIN HIDDEN TESTS
        if hidden:
            walks += [([(0, 0), (1, 0), (9, 0), (0, 0), (9, 0)], 1, 2.0), (_LONGEST, 4, 5.0), ([(5, 5), (5, 5), (6, 5), (5, 5)], 2, 0.0),
                      ([(0, 0)], 3, 1.0)]
        ### END HIDDEN TESTS
        for walk, capacity, threshold in walks:
            yield Case(
                {"sketches": _requests(walk, rng), "capacity": capacity, "threshold": threshold},
                says="{requests} requests, room for {capacity} and a threshold of {threshold:g}",
                must="Each request is answered by the nearest kept one that is no further away than the threshold, which is then the latest used; "
                     "or by itself, and then it is kept, and where there is no room the one that was used longest ago goes.",
                facts={"requests": len(walk), "capacity": capacity, "threshold": threshold},
            )

    def relevant(self, given, case):
        return [float(number) for number in given]

    def expected(self, case):
        """The course's own cache, which keeps a Python OrderedDict, with numpy's distances."""
        from labkit.serving.caching import FeatureCache

        points = case.arguments["sketches"].double().numpy()
        cache = FeatureCache(case.arguments["capacity"], case.arguments["threshold"], lambda one, others: np.hypot(*(np.array(others) - one).T))
        # A key of its own for each request, so that nothing but similarity is a hit.
        return [float(cache.get(i, lambda i=i: points[i], lambda i=i: i)) for i in range(len(points))]

    misconceptions = {
        "A hit must count as use: what is asked for all the time may not be the first to go.": _first_in_first_out,
        "You keep a request that was answered by a similar one, so small steps lead the cache far from what was ever encoded: keep only what you "
        "encode.": _chained,
        "Of several that are close enough you take the first; the nearest is the least stale.": _first_that_is_close,
        "What is exactly {threshold:g} away is still close enough.": _threshold_excluded,
        "Your cache keeps {capacity} and one more: make room before you add, not after.": _one_more_kept,
        "Nothing ever leaves your cache; it has room for {capacity}, and a robot runs for hours.": _never_full,
        "You throw out the one that was used last; the one used longest ago goes.": _latest_makes_room,
        "You compare a squared distance with the threshold.": _squared_distance,
    }


def _watched(seconds, window, deadline, *, start=None, end=1, rank=0.95, late=lambda s, d: s > d, share=True, whole=False):
    """The right answer with one of its judgements exchanged."""
    found = {"p95": [], "missed": []}
    for i in range(len(seconds)):
        recent = seconds[max(0, i + 1 - window if start is None else start(i)) : max(1, i + end)]
        found["p95"].append(rank(recent) if callable(rank) else torch.quantile(recent, rank))
        misses = late(seconds[: i + 1] if whole else recent, deadline).float()
        found["missed"].append(misses.mean() if share else misses.sum())
    return {name: torch.stack(values) for name, values in found.items()}


def _all_so_far(*given):
    return _watched(*given, start=lambda i: 0)


def _without_the_latest(seconds, window, deadline):
    return _watched(seconds, window, deadline, start=lambda i: i - window, end=0)


def _window_too_long(seconds, window, deadline):
    return _watched(seconds, window, deadline, start=lambda i: i - window)


def _mean_and_spread(*given):
    return _watched(*given, rank=lambda recent: recent.mean() + 1.645 * recent.std(correction=0))


def _largest(*given):
    return _watched(*given, rank=lambda recent: recent.max())


def _lower_end(*given):
    return _watched(*given, rank=0.05)


def _in_time_missed(*given):
    return _watched(*given, late=lambda s, d: s >= d)


def _counted(*given):
    return _watched(*given, share=False)


@exercise("lab-deadline", points=3, minutes=8)
class Deadline(Exercise):
    """The 95th percentile and the share of missed deadlines of the latest decisions, after each decision."""

    entry = "latest"
    withheld = ("labkit.serving.monitor",)

    def cases(self, rng, hidden):
        runs = [(4, 3), (9, 4)]
        ### BEGIN HIDDEN TESTS
        if hidden:
            runs += [(30, 20), (6, 1), (3, 8), (1, 5)]
        ### END HIDDEN TESTS
        for count, window in runs:
            deadline = 0.125  # a number that floats hold exactly, and so one decision can take exactly as long
            seconds = rng.uniform(0.02, 0.1, count)
            seconds[1::3] = rng.uniform(0.13, 0.4, len(seconds[1::3]))
            seconds[2::5] = deadline
            yield Case(
                {"seconds": torch.from_numpy(seconds).float(), "window": window, "deadline": deadline},
                says="{count} decisions, a window of {window} and a deadline of {deadline} s",
                must='After each decision, "p95" is the 95th percentile of the last {window}, that one included (of all, where there are fewer), '
                     'interpolated as torch.quantile does, and "missed" the share of these that took longer than the deadline.',
                facts={"count": count, "window": window, "deadline": deadline},
            )

    def expected(self, case):
        """By hand: the sorted window, and what lies 95 % of the way along it."""
        seconds, window, deadline = case.arguments.values()
        p95, missed = [], []
        for end in range(1, len(seconds) + 1):
            recent = sorted(seconds.tolist()[max(0, end - window) : end])
            place = 0.95 * (len(recent) - 1)
            below = int(place)
            above = min(below + 1, len(recent) - 1)
            p95.append(recent[below] + (place - below) * (recent[above] - recent[below]))
            missed.append(sum(s > deadline for s in recent) / len(recent))
        return {"p95": p95, "missed": missed}

    misconceptions = {
        "You look at all decisions since the start: after an hour no fault moves the numbers any more. Look at the last {window}.": _all_so_far,
        "The latest decision is missing from its own window.": _without_the_latest,
        "Your window holds one decision more than {window}.": _window_too_long,
        "Mean plus 1.645 deviations is the 95th percentile of a normal distribution; response times have a long tail. Take the percentile itself.":
            _mean_and_spread,
        "That is the longest time; one outlier in the window sets it. The 95th percentile is interpolated.": _largest,
        "That is the 5th percentile: the quick ones.": _lower_end,
        "A decision that takes exactly {deadline} s has met the deadline.": _in_time_missed,
        '"missed" is a share of the window, not a count.': _counted,
    }


def _evidence(values, delta, threshold, *, means=None, minimum=lambda total: total.cummin(0).values, sign=1, over=lambda e, t: e > t, first=0,
              base=0):
    """The right answer with one of its judgements exchanged."""
    count = torch.arange(1, len(values) + 1)
    mean = values.cumsum(0) / count if means is None else means(values)
    total = (sign * (values - mean) - delta).cumsum(0)
    evidence = total - minimum(total)
    places = over(evidence, threshold).nonzero().flatten()
    return {"evidence": evidence, "alarm": int(places[first]) + base if len(places) else -1}


def _whole_mean(*given):
    return _evidence(*given, means=lambda values: values.mean().expand(len(values)))


def _first_value(*given):
    return _evidence(*given, means=lambda values: values[0].expand(len(values)))


def _no_slack(values, delta, threshold):
    return _evidence(values, 0.0, threshold)


def _slack_added(values, delta, threshold):
    return _evidence(values, -delta, threshold)


def _least_of_all(*given):
    return _evidence(*given, minimum=lambda total: total.min())


def _no_minimum(*given):
    return _evidence(*given, minimum=lambda total: torch.zeros_like(total))


def _faster(*given):
    return _evidence(*given, sign=-1)


def _counted_from_one(*given):
    return _evidence(*given, base=1)


@exercise("lab-drift", points=4, minutes=10)
class Drift(Exercise):
    """The Page-Hinkley test: how much speaks for slower decisions, and the first that raises an alarm."""

    entry = "page_hinkley"
    withheld = ("labkit.serving.monitor",)
    close = Tolerance(rtol=1e-3, atol=1e-3)

    def cases(self, rng, hidden):
        # (steady, then slower) decisions, and whether whole numbers make the evidence meet the threshold exactly.
        streams = [(6, 4, 12.0, False), (10, 5, 10.0, False)]
        ### BEGIN HIDDEN TESTS
        if hidden:
            streams += [(7, 1, 6.0, True), (20, 0, 15.0, False), (12, 6, -10.0, False), (40, 20, 8.0, False)]
        ### END HIDDEN TESTS
        for steady, after, slower, whole in streams:
            if whole:
                delta, threshold, values = 1.0, 6.0, rng.integers(10, 90) + np.array([0] * steady + [8.0])
            else:
                delta, threshold, usual = 1.5, 15.0, rng.uniform(20, 30)
                values = usual + rng.uniform(-3, 3, steady + after) + slower * (np.arange(steady + after) >= steady)
            yield Case(
                {"values": torch.from_numpy(values).float(), "delta": delta, "threshold": threshold},
                says="{count} response times, delta {delta} ms and threshold {threshold} ms",
                must='"evidence" is, at each time, the sum so far of value - mean so far - delta, less the least that this sum has been up to then; '
                     '"alarm" the first place, counted from 0, where it is greater than the threshold, or -1.',
                facts={"count": len(values), "delta": delta, "threshold": threshold},
            )

    def expected(self, case):
        """Page's recursion: evidence grows by value - mean - delta, and never below zero."""
        values, delta, threshold = case.arguments.values()
        evidence, total, now = [], 0.0, 0.0
        for count, value in enumerate(values.double().tolist(), start=1):
            total += value
            # The least sum so far is the first one at the latest, so the first evidence is zero.
            now = max(0.0, now + value - total / count - delta)
            evidence.append(now)
        return {"evidence": evidence, "alarm": next((i for i, e in enumerate(evidence) if e > threshold), -1)}

    misconceptions = {
        "Your mean knows the future: at each time only the values up to then are there.": _whole_mean,
        "You compare with the first value alone; one odd beginning and the alarm never stops. Take the mean of all values so far.": _first_value,
        "Without delta every small excess adds up, and some day there is an alarm about nothing.": _no_slack,
        "delta is taken off at each step, not added: it is the slack that noise is allowed.": _slack_added,
        "Your minimum knows the future: take the least that the sum has been up to each time.": _least_of_all,
        "The least sum so far is not taken off: after a long steady time the sum is far below zero, and a drift would need as long again to be seen.":
            _no_minimum,
        "You look for decisions that become quicker; slower ones are asked for.": _faster,
        "You count places from 1; they are counted from 0.": _counted_from_one,
    }
