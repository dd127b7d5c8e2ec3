"""Exercises of the lab's deployment: int8 weights and their error, a cache that answers with what is similar, deadlines, a drift alarm."""

from __future__ import annotations

import numpy as np
import torch

from labkit.exercises.exercise import Case, Exercise, Tolerance, exercise


def _int8(weight, *, size=lambda row: row.abs().max(), most=127, cut=torch.round, empty=1.0, share=torch.div):
    """The right answer with one of its judgements exchanged.   size: of a row, what its scale is made of.   empty: the scale of a row of zeros."""
    steps = torch.stack([size(row) for row in weight]) / most
    steps[steps == 0] = empty
    whole = cut(weight / steps[:, None]).clamp(-128, 127)
    return dict(q=whole, scale=steps, error=share(torch.dist(weight, whole * steps[:, None]), torch.dist(weight, 0 * weight)))


def _one_scale_for_all(weight):
    return _int8(weight, size=lambda row: weight.abs().max())


def _a_scale_for_each_column(weight):
    found = _int8(weight.T)
    return {**found, "q": found["q"].T}


def _up_to_128(weight):
    return _int8(weight, most=128)


def _largest_without_its_sign(weight):
    return _int8(weight, size=torch.max)


def _cut_off(weight):
    return _int8(weight, cut=torch.trunc)


def _range_by_255(weight):
    return _int8(weight, size=lambda row: row.max() - row.min(), most=255)


def _zero_divided_by_zero(weight):
    return _int8(weight, empty=0.0)


def _multiplied(weight):
    found = _int8(weight)
    return {**found, "scale": 1 / found["scale"]}


def _squared_error(weight):
    return _int8(weight, share=lambda lost, all: (lost / all) ** 2)


def _not_a_share(weight):
    return _int8(weight, share=lambda lost, all: lost)


@exercise("lab-int8", points=4, minutes=10)
class Int8(Exercise):
    """A weight matrix as int8 numbers with a scale for each row, and how much that changes it."""

    entry = "int8_weights"
    withheld = ("labkit.serving.quantisation",)
    close = Tolerance(rtol=5e-4, atol=1e-6)

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
                must='"scale" is the largest absolute value of each row divided by 127, or 1 for a row of zeros; "q" the weight divided by that, '
                     'rounded to the nearest; "error" the root of the summed squares of what is lost, divided by that of the weight.',
                facts={"rows": rows, "columns": columns},
            )

    def relevant(self, given, case):
        if not isinstance(given, dict):
            return given
        # One number is a scale for each row, so that the sentence about it is read however it was returned.
        scale = torch.as_tensor(given["scale"])
        return {**given, "scale": scale.flatten().expand(case.facts["rows"])} if scale.numel() == 1 else given

    def expected(self, case):
        """numpy, in double precision."""
        weight = case.arguments["weight"].double().numpy()
        scale = np.abs(weight).max(1) / 127
        scale[scale == 0] = 1
        q = np.rint(weight / scale[:, None])
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
        "Your scale is the other way round: it is what q is multiplied by, the size of one step.": _multiplied,
        "That is the error squared; the norms are wanted, not their squares.": _squared_error,
        'Your "error" grows with the weights; divide by the norm of the weight, so that it is a share.': _not_a_share,
    }


def _requests(walk, rng):
    """The walk somewhere else, turned and mirrored by whole steps: every distance stays what it was, to the bit."""
    points = np.array(walk, np.float64)
    points = points[:, rng.permutation(2)] * rng.choice([-1, 1], 2)
    return torch.from_numpy(points + rng.integers(-100, 101, 2)).float()


def _served(sketches, capacity, threshold, *, used=True, nearest=True, near=lambda d, t: d <= t, room=0, last=False, distance=torch.dist,
            among=slice(None)):
    """The right answer with one of its judgements exchanged.   among: which of the kept ones, the latest used last, are compared."""
    kept, answers = [], []
    for i, sketch in enumerate(sketches):
        away = {j: float(distance(sketch, sketches[j])) for j in kept[among]}
        close = [j for j in away if near(away[j], threshold)]
        if close:
            answers += [min(close, key=away.get) if nearest else close[0]]
            if used:
                kept.remove(answers[-1])
                kept.append(answers[-1])
        else:
            if kept and len(kept) >= capacity + room:
                kept.pop(-1 if last else 0)
            answers += [i]
            kept.append(i)
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


def _room_before_looking(*given):
    return _served(*given, room=-1)


def _never_full(*given):
    return _served(*given, room=10_000)


def _latest_makes_room(*given):
    return _served(*given, last=True)


def _squared_distance(*given):
    return _served(*given, distance=lambda a, b: torch.dist(a, b) ** 2)


def _added_differences(*given):
    return _served(*given, distance=lambda a, b: torch.dist(a, b, p=1))


def _latest_only(*given):
    return _served(*given, among=slice(-1, None))


def _requests_from_one(*given):
    return [answer + 1 for answer in _served(*given)]


# No request in them has two near ones at the same distance, and several are exactly 5 from another.
_SHORT = [(5, 1), (6, 6), (7, 1), (1, 5), (7, 6), (3, 6), (7, 0), (1, 0)]
_LONGER = [(0, 5), (9, 1), (5, 6), (1, 5), (1, 10), (7, 2), (3, 5), (11, 2), (16, 2), (0, 2)]


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
            walks += [
                ([(0, 0), (1, 0), (9, 0), (0, 0), (9, 0)], 1, 2.0), ([(5, 5), (5, 5), (6, 5), (5, 5)], 2, 0.0), ([(0, 0)], 3, 1.0),
                ([(6, 4), (8, 1), (10, 0), (3, 2), (3, 0), (0, 6),
                  (0, 0), (9, 1), (5, 3), (0, 4), (10, 0), (11, 6), (8, 4), (0, 3), (8, 0), (7, 6)], 4, 5.0),
                # From 26 points on torch.cdist multiplies matrices, and whoever uses it would lose digits.
                (rng.uniform(0, 12, (24, 2)), 5, 2.5),
            ]
        ### END HIDDEN TESTS
        for walk, capacity, threshold in walks:
            yield Case(
                {"sketches": _requests(walk, rng), "capacity": capacity, "threshold": threshold},
                says="{requests} requests, room for {capacity} and a threshold of {threshold:g}",
                must="Each request is answered by the nearest kept one (its number, counted from 0) that is no further away than the threshold, "
                     "which is then the latest used; or by itself, and then it is kept, and where there is no room the one used longest ago goes.",
                facts={"requests": len(walk), "capacity": capacity, "threshold": threshold},
            )

    def expected(self, case):
        """The course's own cache, which keeps a Python OrderedDict, with numpy's distances."""
        from labkit.serving.caching import answered_from

        return answered_from(*case.arguments.values())

    misconceptions = {
        "A hit must count as use: what is asked for all the time may not be the first to go.": _first_in_first_out,
        "You keep a request that was answered by a similar one, so small steps lead the cache far from what was ever encoded: keep only what you "
        "encode.": _chained,
        "Of several that are close enough you take the first; the nearest is the least stale.": _first_that_is_close,
        "What is exactly {threshold:g} away is still close enough.": _threshold_excluded,
        "Your cache keeps {capacity} and one more: make room before you add, not after.": _one_more_kept,
        "You make room before you look: what is asked for may be what goes, and a hit needs no room.": _room_before_looking,
        "Nothing ever leaves your cache; it has room for {capacity}, and a robot runs for hours.": _never_full,
        "You throw out the one that was used last; the one used longest ago goes.": _latest_makes_room,
        "You compare a squared distance with the threshold.": _squared_distance,
        "You add up the differences of the two numbers; the distance is the length of the straight line.": _added_differences,
        "You compare with the latest one only; any of the {capacity} that are kept may answer.": _latest_only,
        "You count requests from 1; they are counted from 0.": _requests_from_one,
    }


def _watched(seconds, window, deadline, *, start=None, end=1, rank=lambda recent: recent.quantile(0.95), late=torch.gt, share=torch.mean):
    """The right answer with one of its judgements exchanged.   start: of a decision, the first one that is looked at.   end: the last, and one."""
    found = {"p95": [], "missed": []}
    for i in range(len(seconds)):
        recent = seconds[max(0, i + 1 - window if start is None else start(i)) : max(1, i + end)]
        found["p95"].append(rank(recent))
        found["missed"].append(share(late(recent, deadline).float()))
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
    return _watched(*given, rank=lambda recent: recent.quantile(0.05))


def _in_time_missed(*given):
    return _watched(*given, late=torch.ge)


def _met(*given):
    return _watched(*given, late=torch.le)


def _counted(*given):
    return _watched(*given, share=torch.sum)


def _always_a_whole_window(seconds, window, deadline):
    return _watched(seconds, window, deadline, share=lambda late: late.sum() / window)


def _missed_since_the_start(*given):
    return {**_watched(*given), "missed": _all_so_far(*given)["missed"]}


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
                must='After each decision, "p95" is the 95th percentile of the last {window}, that one included (of all so far, where there '
                     'are fewer), interpolated as torch.quantile does; "missed" is the share of these decisions that took longer than the deadline.',
                facts={"count": count, "window": window, "deadline": deadline},
            )

    def expected(self, case):
        """By hand: the sorted window, and what lies 95 % of the way along it."""
        seconds, window, deadline = case.arguments.values()
        p95, missed = [], []
        for count in range(1, len(seconds) + 1):
            recent = sorted(seconds.tolist()[max(0, count - window) : count])
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
        "Of {window} decisions that is the longest, and one outlier sets it; the 95th percentile lies between the two longest, where torch.quantile "
        "interpolates.": _largest,
        "That is the 5th percentile: the quick ones.": _lower_end,
        "A decision that takes exactly {deadline} s has met the deadline.": _in_time_missed,
        '"missed" is the share that took longer than the deadline, not the share that met it.': _met,
        '"missed" is a share of the window, not a count.': _counted,
        'You divide "missed" by {window} from the beginning; as long as there are fewer decisions, divide by as many as there are.':
            _always_a_whole_window,
        '"p95" is right, but "missed" is of all decisions since the start; it is of the last {window}, too.': _missed_since_the_start,
    }


def _means(values):
    return torch.stack([values[:count].mean() for count in range(1, len(values) + 1)])


def _evidence(values, delta, threshold, *, means=_means, minimum=lambda total: total.cummin(0).values, rise=torch.sub, above=torch.gt, base=0):
    """The right answer with one of its judgements exchanged.   rise: of values and their means, what is added up."""
    total = (rise(values, means(values)) - delta).cumsum(0)
    found = total - minimum(total)
    places = [place for place, alarming in enumerate(above(found, threshold)) if alarming]
    return {"evidence": found, "alarm": places[0] + base if places else -1}


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


def _least_before(*given):
    return _evidence(*given, minimum=lambda total: torch.cat([total[:1], total.cummin(0).values[:-1]]))


def _mean_before(*given):
    return _evidence(*given, means=lambda values: torch.cat([values[:1], _means(values)[:-1]]))


def _faster(*given):
    return _evidence(*given, rise=lambda values, mean: mean - values)


def _both_ways(*given):
    return _evidence(*given, rise=lambda values, mean: (values - mean).abs())


def _at_the_threshold(*given):
    return _evidence(*given, above=torch.ge)


def _no_alarm_is_zero(*given):
    return {**_evidence(*given), "alarm": max(0, _evidence(*given)["alarm"])}


def _counted_from_one(*given):
    return _evidence(*given, base=1)


@exercise("lab-drift", points=4, minutes=10)
class Drift(Exercise):
    """The Page-Hinkley test: how much speaks for slower decisions, and the first that raises an alarm."""

    entry = "page_hinkley"
    withheld = ("labkit.serving.monitor",)
    close = Tolerance(rtol=1e-3, atol=1e-3)

    def cases(self, rng, hidden):
        # (steady, then slower) decisions, how much slower, and whether whole numbers make the evidence meet the threshold exactly.
        streams = [(6, 4, 12.0, False), (7, 1, 8.0, True), (10, 5, 10.0, False)]
        ### BEGIN HIDDEN TESTS
        if hidden:
            streams += [(20, 0, 0.0, False), (12, 6, -10.0, False), (40, 20, 8.0, False), (1, 0, 0.0, False)]
        ### END HIDDEN TESTS
        for steady, after, slower, whole in streams:
            delta, threshold = (1.0, 6.0) if whole else (1.5, 15.0)
            usual = rng.integers(20, 30) if whole else rng.uniform(20, 30) + rng.uniform(-3, 3, steady + after)
            values = usual + slower * (np.arange(steady + after) >= steady)
            yield Case(
                {"values": torch.from_numpy(values).float(), "delta": delta, "threshold": threshold},
                says="{count} response times, delta {delta} ms and threshold {threshold} ms",
                must='To a sum each value adds what it is above the mean of the values up to it, less delta; "evidence" is this sum less the least '
                     'that it has been so far; "alarm" the first place, counted from 0, where the evidence is greater than the threshold, or -1.',
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
        "The present sum belongs to the least so far, too: evidence is never below zero.": _least_before,
        "Your mean is that of the values before; the mean so far counts the present value, too.": _mean_before,
        "You look for decisions that become quicker; slower ones are asked for.": _faster,
        "You add up how far values lie from the mean to either side; only those above it speak for slower decisions.": _both_ways,
        "Evidence of exactly {threshold} is not above the threshold.": _at_the_threshold,
        "Where nothing is above the threshold you say 0, which is the first place; say -1.": _no_alarm_is_zero,
        "You count places from 1; they are counted from 0.": _counted_from_one,
    }
