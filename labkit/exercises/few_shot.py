"""Exercises of lesson 6: two clocks, which decisions are worth learning, a split without leakage, and a paired difference."""

from __future__ import annotations

from bisect import bisect_right

import numpy as np
import torch

from labkit.exercises.exercise import Case, Exercise, Tolerance, exercise


def _correlation(a, b):
    a, b = a - a.mean(), b - b.mean()
    return (a * b).sum() / (a.norm() * b.norm())


def _by_lag(image, speed, longest, of=_correlation):
    return torch.stack([of(image[: len(image) - lag], speed[lag:]) for lag in range(longest + 1)])


def _other_direction(image, speed, longest):
    return _by_lag(speed, image, longest)


def _cyclic(image, speed, longest):
    return torch.stack([_correlation(image, speed.roll(-lag)) for lag in range(longest + 1)])


def _not_centred(image, speed, longest):
    return _by_lag(image, speed, longest, lambda a, b: (a * b).sum() / (a.norm() * b.norm()))


def _not_normalised(image, speed, longest):
    return _by_lag(image, speed, longest, lambda a, b: ((a - a.mean()) * (b - b.mean())).sum())


def _covariance(image, speed, longest):
    return _by_lag(image, speed, longest, lambda a, b: ((a - a.mean()) * (b - b.mean())).mean())


def _centred_once(image, speed, longest):
    return _by_lag(image - image.mean(), speed - speed.mean(), longest, lambda a, b: (a * b).sum() / (a.norm() * b.norm()))


def _longest_left_out(image, speed, longest):
    return _by_lag(image, speed, longest - 1)


def _only_the_lag(image, speed, longest):
    return int(_by_lag(image, speed, longest).argmax())


def _from_the_end(image, speed, longest):
    return _by_lag(image, speed, longest).flip(0)


@exercise("few-shot-lag", points=4, minutes=10)
class Lag(Exercise):
    """How well two records of one motion agree, for each lag of the second."""

    entry = "lag_correlations"
    withheld = ("labkit.preprocessing",)
    close = Tolerance(rtol=1e-4, atol=1e-5)

    def cases(self, rng, hidden):
        sizes = [(8, 2, 1), (30, 6, 4)]
        ### BEGIN HIDDEN TESTS
        if hidden:
            sizes += [(12, 1, 0), (9, 5, 5), (60, 20, 20)]
        ### END HIDDEN TESTS
        for length, longest, lag in sizes:
            motion = rng.gamma(0.7, 2.0, length + longest)
            image = 3 * motion[lag : lag + length] + rng.uniform(0, 0.5, length)
            speed = 1 + motion[:length] + rng.uniform(0, 0.2, length)
            yield Case(
                {"image": torch.from_numpy(image).float(), "speed": torch.from_numpy(speed).float(), "longest": longest},
                says="records of {length} values and lags from 0 to {longest}",
                must="For each lag it is the correlation of image[t] with speed[t + lag], over the t for which both exist.",
                facts={"length": length, "longest": longest, "both": length - longest},
            )

    def expected(self, case):
        """numpy's own correlation, pair by pair."""
        image, speed, longest = (np.asarray(value, np.float64) for value in case.arguments.values())
        found = []
        for lag in range(int(longest) + 1):
            pairs = np.array([(image[t], speed[t + lag]) for t in range(len(image)) if t + lag < len(speed)])
            found.append(np.corrcoef(pairs, rowvar=False)[0, 1])
        return np.array(found)

    misconceptions = {
        "You shifted in the other direction: the robot's stamps are late, so speed[t + lag] belongs to image[t].": _other_direction,
        "You rolled the record round: what falls off at one end came back at the other, where it belongs to nothing. Cut it off.": _cyclic,
        "You did not subtract the means: two records that are both positive correlate at every lag.": _not_centred,
        "You did not divide by the two norms: the longest overlap and the largest motion win, not the best agreement.": _not_normalised,
        "You stopped at the covariance; divide by both standard deviations, or a lag with large motions wins.": _covariance,
        "You centred the whole records once; at lag {longest} only {both} pairs are left, and their own means count.": _centred_once,
        "The last lag, {longest}, is missing: from 0 to {longest} there are {longest} + 1 lags.": _longest_left_out,
        "You return the best lag; asked for is the correlation at every lag.": _only_the_lag,
        "Your list runs backwards: lag 0 comes first.": _from_the_end,
    }


def _newest(at, frame_times):
    shown = bisect_right(frame_times, at)
    return shown - 1 if shown else None


def _pairs(success, command_times, moves, switches, frame_times, oldest, shortest, *, newest=_newest, fresh=True, idle=None, failed=True):
    """The right answer with one of its four judgements exchanged."""
    frames = [newest(at, frame_times) for at in command_times]
    still = [idle(*asked, shortest) if idle else not asked[1] and asked[0] < shortest for asked in zip(moves, switches)]
    shows = [frame is not None and not (fresh and abs(at - frame_times[frame]) > oldest) for at, frame in zip(command_times, frames)]
    return [[i, frames[i]] for i in range(len(frames)) if shows[i] and not still[i] and (success or not failed)]


def _nearest_frame(*arguments):
    return _pairs(*arguments, newest=lambda time, frames: int(np.argmin([abs(time - at) for at in frames])))


def _next_frame(*arguments):
    return _pairs(*arguments, newest=lambda time, frames: next((i for i, at in enumerate(frames) if at >= time), None))


def _frame_before(*arguments):
    return _pairs(*arguments, newest=lambda time, frames: max((i for i, at in enumerate(frames) if at < time), default=None))


def _first_frame(*arguments):
    return _pairs(*arguments, newest=lambda time, frames: 0 if frames[0] <= time else None)


def _stale_kept(*arguments):
    return _pairs(*arguments, fresh=False)


def _failures_kept(*arguments):
    return _pairs(*arguments, failed=False)


def _idle_kept(*arguments):
    return _pairs(*arguments, idle=lambda move, switch, shortest: False)


def _switches_dropped(*arguments):
    return _pairs(*arguments, idle=lambda move, switch, shortest: move < shortest)


def _switches_only(*arguments):
    return _pairs(*arguments, idle=lambda move, switch, shortest: not switch)


def _either_is_idle(*arguments):
    return _pairs(*arguments, idle=lambda move, switch, shortest: move < shortest or not switch)


def _idle_only(*arguments):
    return _pairs(*arguments, idle=lambda move, switch, shortest: not (move < shortest and not switch))


def _swapped(*arguments):
    return [[frame, command] for command, frame in _pairs(*arguments)]


def _commands_only(*arguments):
    return [command for command, _ in _pairs(*arguments)]


@exercise("few-shot-clean", points=4, minutes=10)
class Clean(Exercise):
    """Which command goes with which frame, and which are not worth learning."""

    entry = "pair_decisions"
    withheld = ("labkit.preprocessing",)
    close = Tolerance(rtol=0, atol=0)

    def cases(self, rng, hidden):
        # Quarters of a second and of a centimetre are exact in floating point, so that "not later than" and "at most" can be asked exactly.
        yield self._later(rng, True, [1.0, 3.0, 5.25, 6.0, 8.25], [0.5, 0.0, 0.0, 0.25, 0.75], [True, False, True, False, False],
                         [0.0, 1.0, 2.5, 3.25, 5.0, 5.5, 5.75, 6.25, 7.0, 8.5])
        yield self._later(rng, False, [1.0, 2.0], [0.5, 0.5], [True, True], [0.5, 1.0, 1.75])
        yield self._later(rng, True, [0.25, 0.75, 1.0], [0.5, 0.5, 0.125], [True, False, False], [0.5, 0.75, 1.0])
        yield self._random(rng, True, 12, 20)
        ### BEGIN HIDDEN TESTS
        if hidden:
            yield self._later(rng, True, [2.0], [0.25], [False], [1.5])
            yield self._later(rng, True, [2.0], [0.25], [True], [1.25])
            yield self._later(rng, True, [0.5], [0.5], [True], [1.0, 2.0])
            for success in (True, False, True):
                yield self._random(rng, success, 25, 30)
        ### END HIDDEN TESTS

    def _later(self, rng, success, command_times, moves, switches, frame_times):
        """The same moments on clocks that started earlier, by a whole number of quarters of a second."""
        begun = 0.25 * int(rng.integers(1, 1000))
        return self._case(success, [begun + t for t in command_times], moves, switches, [begun + t for t in frame_times])

    def _random(self, rng, success, commands, frames):
        times, shown = (sorted((0.25 * rng.choice(60, size, replace=False)).tolist()) for size in (commands, frames))
        return self._case(success, times, (0.125 * rng.integers(0, 5, commands)).tolist(), (rng.random(commands) < 0.4).tolist(), shown)

    def _case(self, success, command_times, moves, switches, frame_times):
        return Case(
            {"success": success, "command_times": command_times, "moves": moves, "switches": switches, "frame_times": frame_times,
             "oldest": 0.5, "shortest": 0.25},
            says="{commands} commands, {frames} frames, success {success}",
            must="A pair is [command, frame]; the frame is the newest that is not later than the command and at most `oldest` before it; "
                 "a command that moves less than `shortest` and switches nothing is left out, and so is all of a failed episode.",
            facts={"commands": len(command_times), "frames": len(frame_times), "success": success},
        )  # fmt: skip

    def expected(self, case):
        """By sorting: all stamps in one row, each command after the frames of its own moment."""
        success, times, moves, switches, shown, oldest, shortest = case.arguments.values()
        row = sorted([(at, 0, i) for i, at in enumerate(shown)] + [(at, 1, i) for i, at in enumerate(times)])
        found, last = [], None
        for at, is_command, i in row:
            if not is_command:
                last = (at, i)
            elif success and last and at - last[0] <= oldest and (switches[i] or moves[i] >= shortest):
                found.append([i, last[1]])
        return found

    misconceptions = {
        "You took the nearest frame; it may come after the command, and then it shows the robot doing what the policy should decide.":
            _nearest_frame,
        "You took the first frame after the command; it shows the robot already on its way.": _next_frame,
        "A frame of the very moment of the command counts: not later means at or before.": _frame_before,
        "You took the first frame of the episode for every command.": _first_frame,
        "Stale frames are still there: where frames were lost, the newest one can be older than `oldest`.": _stale_kept,
        "You kept a failed episode: it teaches how to fail.": _failures_kept,
        "Idle commands are still there: they teach the robot to wait.": _idle_kept,
        "You dropped a command that hardly moves but switches the vacuum: that is the one that lets go.": _switches_dropped,
        "You dropped every command that does not switch the vacuum; one that moves far enough is worth learning.": _switches_only,
        "Idle is a command that moves little AND switches nothing; you dropped it if either holds.": _either_is_idle,
        "You kept the idle commands and dropped the others.": _idle_only,
        "Your pairs are [frame, command]; [command, frame] is asked for.": _swapped,
        "You return commands without their frames.": _commands_only,
    }


def _first_episodes(episodes, order, count):
    return episodes < count


def _first_rows(episodes, order, count):
    return torch.arange(len(episodes)) < count


def _rows_in_order(episodes, order, count):
    return torch.isin(torch.arange(len(episodes)), order[:count])


def _one_row_each(episodes, order, count):
    first = torch.tensor([not (episodes[:i] == e).any() for i, e in enumerate(episodes)])
    return (episodes[:, None] == order[:count]).any(1) & first


def _training_rows(episodes, order, count):
    return (episodes[:, None] != order[:count]).all(1)


def _last_of_the_order(episodes, order, count):
    return torch.isin(episodes, order[len(order) - count :])


def _places_in_order(episodes, order, count):
    return torch.isin(episodes, order.argsort()[:count])


def _row_numbers(episodes, order, count):
    return (episodes[:, None] == order[:count]).any(1).nonzero().flatten()


@exercise("few-shot-split", points=2, minutes=5)
class Split(Exercise):
    """Which decisions are held out, so that no episode is on both sides."""

    entry = "held_out_rows"
    withheld = ("labkit.preprocessing",)
    close = Tolerance(rtol=0, atol=0)

    def cases(self, rng, hidden):
        sizes = [(5, 2), (9, 3)]
        ### BEGIN HIDDEN TESTS
        if hidden:
            sizes += [(2, 1), (20, 7), (6, 6)]
        ### END HIDDEN TESTS
        for number, count in sizes:
            episodes = np.repeat(rng.permutation(number), rng.permutation(np.resize([2, 3, 4], number)))
            order = rng.permutation(number)
            while count < number and (set(order[:count]) in (set(range(count)), set(order[-count:]), set(np.argsort(order)[:count]))
                                      or set(np.argsort(order)[:count]) == set(order[-count:])):
                order = rng.permutation(number) if number > 2 else np.array([1, 0])
                if number == 2:
                    break
            yield Case(
                {"episodes": torch.from_numpy(episodes), "order": torch.from_numpy(order), "count": count},
                says="{decisions} decisions of {number} episodes, {count} of them held out",
                must="Held out are all decisions of the first {count} episodes that `order` names, and no others.",
                facts={"decisions": len(episodes), "number": number, "count": count},
            )

    def expected(self, case):
        episodes, order, count = case.arguments.values()
        chosen = set(order.tolist()[:count])
        return [1.0 if e in chosen else 0.0 for e in episodes.tolist()]

    misconceptions = {
        "You took the episodes with the smallest numbers; `order` was shuffled so that no operator, room or hour is held out as a whole.":
            _first_episodes,
        "You held out the first {count} decisions; then an episode lies on both sides, and the test has seen its table before.": _first_rows,
        "You held out decisions whose row number stands in `order`; `order` names episodes, and each has several decisions.": _rows_in_order,
        "You held out one decision of each chosen episode; its other decisions show the same table in training.": _one_row_each,
        "You marked the decisions that stay in training; the held-out ones are asked for.": _training_rows,
        "You took the last {count} episodes of `order`; the first are asked for.": _last_of_the_order,
        "`order` lists the episodes themselves, not the place of each in the order.": _places_in_order,
        "You return row numbers; a mask with one entry for each of the {decisions} decisions is asked for.": _row_numbers,
    }


def _with_half(first, second, half):
    middle = second.double().mean() - first.double().mean()
    return middle + half * torch.tensor([0.0, -1.0, 1.0], dtype=torch.float64)


def _spread(first, second, unbiased=True):
    return (second.double() - first.double()).std(unbiased=unbiased)


def _unpaired(first, second):
    variance = sum(x.double().mean() * (1 - x.double().mean()) / len(x) for x in (first, second))
    return _with_half(first, second, 1.96 * variance.sqrt())


def _root_forgotten(first, second):
    return _with_half(first, second, 1.96 * _spread(first, second) / len(first))


def _spread_of_episodes(first, second):
    return _with_half(first, second, 1.96 * _spread(first, second))


def _standard_error(first, second):
    return _with_half(first, second, _spread(first, second) / len(first) ** 0.5)


def _variance(first, second):
    return _with_half(first, second, 1.96 * _spread(first, second) ** 2 / len(first) ** 0.5)


def _turned_round(first, second):
    return _with_half(second, first, 1.96 * _spread(first, second) / len(first) ** 0.5)


def _biased_spread(first, second):
    return _with_half(first, second, 1.96 * _spread(first, second, unbiased=False) / len(first) ** 0.5)


def _one_rate(first, second):
    d = second.double()
    return _with_half(first, second, 1.96 * d.std() / len(d) ** 0.5)


def _only_disagreements(first, second):
    differ = first != second
    d = (second.double() - first.double())[differ]
    half = 1.96 * d.std() / len(d) ** 0.5
    return torch.stack([d.mean(), d.mean() - half, d.mean() + half])


@exercise("few-shot-paired", points=3, minutes=8)
class Paired(Exercise):
    """The difference of two success rates on the same episodes, with its 95 % interval."""

    entry = "paired_difference"
    withheld = ("labkit.rollouts",)
    close = Tolerance(rtol=1e-4, atol=1e-6)

    def cases(self, rng, hidden):
        sizes = [(10, 0.4, 0.2), (60, 0.5, 0.15)]
        ### BEGIN HIDDEN TESTS
        if hidden:
            sizes += [(7, 0.5, 0.4), (200, 0.8, 0.1), (25, 0.3, 0.5)]
        ### END HIDDEN TESTS
        for episodes, rate, change in sizes:
            first = rng.random(episodes) < rate
            second = first ^ (rng.random(episodes) < change)
            # One disagreement in each direction at least: otherwise several mistakes give the same interval.
            first[:4], second[:4] = [True, False, False, False], [False, True, True, False]
            yield Case(
                {"first": torch.from_numpy(first), "second": torch.from_numpy(second)},
                says="{episodes} episodes, of which the first policy solves {a} and the second {b}",
                must="The middle is the mean of second - first over the episodes; the half width is 1.96 standard errors of that mean.",
                facts={"episodes": episodes, "a": int(first.sum()), "b": int(second.sum())},
            )

    def expected(self, case):
        """From the four counts alone: n times the sample variance of the differences, see Newcombe (1998), method 1."""
        first, second = (np.asarray(x) for x in case.arguments.values())
        n, gained, lost = len(first), int((second & ~first).sum()), int((first & ~second).sum())
        middle = (gained - lost) / n
        half = 1.96 * np.sqrt((gained + lost - (gained - lost) ** 2 / n) / (n - 1) / n)
        return middle + half * np.array([0, -1, 1])

    misconceptions = {
        "You treated the two as if they had run different episodes: shared luck cancels in the difference, so the interval is narrower.": _unpaired,
        "You divided by the number of episodes; a standard error divides by its root.": _root_forgotten,
        "Your interval is that of one episode's difference; the mean of {episodes} is better known by the root of {episodes}.": _spread_of_episodes,
        "You forgot the 1.96: one standard error on each side holds 68 %, not 95 %.": _standard_error,
        "You took the variance in place of the standard deviation.": _variance,
        "The sign is turned round: second minus first, so that an improvement is positive.": _turned_round,
        "Divide the sum of squares by n - 1, not n: the mean was estimated from the same {episodes} episodes.": _biased_spread,
        "You took the spread of the second policy's successes; it is the spread of the differences that counts.": _one_rate,
        "You left out the episodes on which both agree; they are differences, too, of zero.": _only_disagreements,
    }
