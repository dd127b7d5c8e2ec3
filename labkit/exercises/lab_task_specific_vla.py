"""Exercises of the lab: which parameters train and how fast, a test that they do, a scale for actions, and which epoch to keep."""

from __future__ import annotations

import math
import operator
import re

import numpy as np
import torch

from labkit.exercises.exercise import Case, Exercise, Tolerance, exercise

_LAYER = re.compile(r"(.*layers)\.(\d+)\.")


def _towers(vision, text, prefix=""):
    """The parameters of a head and two CLIP towers with so many layers, by name, on the meta device, with the layers of each tower."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

    small = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "projection_dim": 8}
    with torch.device("meta"):
        eyes = CLIPVisionModel(CLIPVisionConfig(num_hidden_layers=vision, image_size=16, patch_size=8, **small))
        ears = CLIPTextModel(CLIPTextConfig(num_hidden_layers=text, vocab_size=16, bos_token_id=0, eos_token_id=1, **small))
        head = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(8, 7))
    places = {"vision." + (prefix and "vision_model."): eyes, "text." + (prefix and "text_model."): ears, "head.": head}
    named = {place + name: parameter for place, model in places.items() for name, parameter in model.named_parameters()}
    return named, [eyes.encoder.layers, ears.encoder.layers]


def _rates(names, head_rate, tower_rate, last, *, number=int, apart=True, keep=None, head=None, off=0):
    """The right answer with one of its judgements exchanged."""
    layers = {name: _LAYER.match(name) for name in names}
    found = {}
    for name, layer in layers.items():
        if name.startswith("head."):
            found[name] = head_rate if head is None else head
        elif layer:
            same = [other[2] for other in layers.values() if other and (other[1] == layer[1] or not apart)]
            ordered = sorted(set(same), key=number)
            if keep or layer[2] in ordered[len(ordered) - last + off :]:
                found[name] = tower_rate
        elif keep:
            found[name] = tower_rate
    return found


def _order_of_letters(*given):
    return _rates(*given, number=str)


def _counted_together(*given):
    return _rates(*given, apart=False)


def _whole_towers(*given):
    return _rates(*given, keep=True)


def _one_layer_short(names, head_rate, tower_rate, last):
    return _rates(names, head_rate, tower_rate, last, off=1)


def _one_rate(names, head_rate, tower_rate, last):
    return _rates(names, head_rate, tower_rate, last, head=tower_rate)


def _one_rate_of_the_head(names, head_rate, tower_rate, last):
    return _rates(names, head_rate, head_rate, last)


def _first_layers(names, head_rate, tower_rate, last):
    return {name: rate for name, rate in _rates(names, head_rate, tower_rate, last, keep=True).items()
            if name.startswith("head.") or (layer := _LAYER.match(name)) and int(layer[2]) < last}


def _without_the_head(*given):
    return {name: rate for name, rate in _rates(*given).items() if not name.startswith("head.")}


@exercise("lab-rates", points=4, minutes=10)
class Rates(Exercise):
    """Which parameters of the model train, and each one's learning rate."""

    entry = "learning_rates"
    withheld = ("labkit.task_specific_vla", "labkit.waypoint_regression")
    close = Tolerance(rtol=1e-6, atol=0)

    def cases(self, rng, hidden):
        towers = [(3, 2, 2, ""), (12, 4, 2, "")]
        ### BEGIN HIDDEN TESTS
        if hidden:
            towers += [(12, 12, 1, ""), (12, 10, 3, ""), (3, 3, 2, "transformers 4"), (2, 2, 2, "")]
        ### END HIDDEN TESTS
        for vision, text, last, prefix in towers:
            named, _ = _towers(vision, text, prefix)
            yield Case(
                {"names": list(named), "head_rate": float(rng.choice([1e-4, 1e-3])), "tower_rate": float(rng.choice([5e-6, 2e-5])), "last": last},
                says="towers of {vision} and {text} layers, of which the last {last} train" + (", named as in transformers 4" if prefix else ""),
                must="It maps every name under `head.` to head_rate, every one in the last {last} layers of each tower to tower_rate, and no others.",
                facts={"vision": vision, "text": text, "last": last, "names_in_all": len(named)} | ({"prefix": prefix} if prefix else {}),
            )

    def relevant(self, given, case):
        """The rate of every name, in their order; -1 where a name is not in the answer."""
        names = case.arguments["names"]
        if not set(given) <= set(names) or min(given.values(), default=0.0) < 0:
            raise ValueError("a name that no parameter has, or a rate that is none")
        return [float(given.get(name, -1.0)) for name in names]

    def expected(self, case):
        """torch's own: the parameters that belong to the modules `encoder.layers[-last:]`."""
        facts, given = case.facts, case.arguments
        named, towers = _towers(facts["vision"], facts["text"], facts.get("prefix", ""))
        chosen = {id(parameter) for layers in towers for parameter in layers[-given["last"] :].parameters()}
        in_towers = {name: given["tower_rate"] if id(parameter) in chosen else -1.0 for name, parameter in named.items()}
        return [given["head_rate"] if name.startswith("head.") else rate for name, rate in in_towers.items()]

    misconceptions = {
        "You compared the layers' numbers as text, where 9 comes after 11: turn them into int.": _order_of_letters,
        "You counted the layers of both towers together: where one has fewer, none of its layers is among the last {last}. Count each for itself.":
            _counted_together,
        "The whole towers are in it, embeddings and all: {names_in_all} names, where only the last {last} layers of each train.": _whole_towers,
        "One layer of each tower is missing: the last {last} are those numbered from count - {last} on.": _one_layer_short,
        "The head has the towers' rate: what starts at random needs the larger one.": _one_rate,
        "The towers have the head's rate: what is pretrained needs the smaller one.": _one_rate_of_the_head,
        "These are the first {last} layers; layer 0 is the one next to the image.": _first_layers,
        "The head is missing: it is what starts at random.": _without_the_head,
    }


def _still(before, after, trained, *, same=torch.equal, those=None):
    names = trained if those is None else those(before, trained)
    return [name for name in names if same(before[name], after[name])]


def _moved(before, after, trained, *, same=torch.equal):
    return [name for name in before if name not in trained and not same(before[name], after[name])]


def _report(still, moved):
    return {"still": still, "moved": moved}


def _with_a_tolerance(*given):
    return _report(_still(*given, same=torch.allclose), _moved(*given, same=torch.allclose))


def _any_number_the_same(*given):
    def same(a, b):
        return bool((a == b).any())

    return _report(_still(*given, same=same), _moved(*given, same=same))


def _by_their_mean(*given):
    def same(a, b):
        return bool(torch.isclose(a.mean(), b.mean(), rtol=0, atol=1e-9))

    return _report(_still(*given, same=same), _moved(*given, same=same))


def _all_that_stand_still(before, after, trained):
    return _report(_still(before, after, trained, those=lambda before, trained: list(before)), _moved(before, after, trained))


def _all_that_moved(before, after, trained):
    return _report(_still(before, after, trained), [name for name in before if not torch.equal(before[name], after[name])])


def _the_other_way_round(before, after, trained):
    return _report([name for name in trained if not torch.equal(before[name], after[name])],
                   [name for name in before if name not in trained and torch.equal(before[name], after[name])])


def _swapped(*given):
    return _report(_moved(*given), _still(*given))


@exercise("lab-moved", points=4, minutes=8)
class Moved(Exercise):
    """A test of a training step: what should have moved and did not, and what moved and should not have."""

    entry = "moved_wrongly"
    withheld = ("labkit.task_specific_vla", "labkit.waypoint_regression")

    def cases(self, rng, hidden):
        scenes = [("a large step", 1e-2, (), ()), ("a step of a rate like 5e-6", 5e-6, ("vision.layers.1.weight",), ()),
                  ("a step that also moved a frozen layer", 1e-3, (), ("text.embeddings.weight",))]
        ### BEGIN HIDDEN TESTS
        if hidden:
            scenes += [("a step too small for a tolerance", 1e-7, (), ("vision.layers.0.weight",)),
                       ("a step that moved nothing", 0.0, (), ()),
                       ("a step that moved the wrong half", 1e-4, ("head.0.weight", "head.0.bias"), ("vision.layers.0.weight",))]
        ### END HIDDEN TESTS
        for says, size, stuck, thawed in scenes:
            trained = ["head.0.weight", "head.0.bias", "vision.layers.1.weight"]
            shapes = {"vision.layers.0.weight": (3, 4), "vision.layers.1.weight": (4, 4), "text.embeddings.weight": (5, 3), "head.0.weight": (2, 6),
                      "head.0.bias": (2,)}
            before = {name: torch.from_numpy(rng.uniform(0.2, 0.9, shape)).float() for name, shape in shapes.items()}
            after = {}
            for name, value in before.items():
                step = torch.zeros_like(value)
                if size and (name in thawed or name in trained and name not in stuck):
                    # One number goes up and one down, and the others stay: so it is after a step in which a ReLU was closed.
                    step.view(-1)[0], step.view(-1)[1] = size, -size
                after[name] = value + step
            yield Case(
                {"before": before, "after": after, "trained": trained}, says=says,
                must='"still" lists the names in `trained` whose values are all the same as before; "moved" those not in it of which one differs.',
                facts={"meant": len(trained), "frozen": len(before) - len(trained)},
            )

    def relevant(self, given, case):
        """How often each list has each name, in the order of `before`."""
        names = list(case.arguments["before"])
        if not set(given["still"]) | set(given["moved"]) <= set(names):
            raise ValueError("a name that no parameter has")
        return {kind: [list(listed).count(name) for name in names] for kind, listed in given.items()}

    def expected(self, case):
        """numpy's comparison of the bytes: 1 for a name that is listed."""
        before, after, trained = case.arguments.values()
        same = {name: before[name].numpy().tobytes() == after[name].numpy().tobytes() for name in before}
        return {"still": [int(name in trained and same[name]) for name in before],
                "moved": [int(name not in trained and not same[name]) for name in before]}

    misconceptions = {
        "You allow for a tolerance: a step at a rate like 5e-6 is smaller than any, and would count as none. Ask whether the values are equal.":
            _with_a_tolerance,
        "One number that stayed does not make a tensor stand still: all of them must be the same.": _any_number_the_same,
        "A mean can stay while the values move: compare value by value.": _by_their_mean,
        '"still" has frozen names, too: only the {meant} that are meant to train belong there.': _all_that_stand_still,
        '"moved" has trained names, too: only the {frozen} that are meant to stay belong there.': _all_that_moved,
        "You have what went right; asked for is what went wrong.": _the_other_way_round,
        '"still" and "moved" are exchanged.': _swapped,
    }


def _statistics(actions, *, axis=0, correction=0, least=None, robust=False):
    """mean and std, and what stands in for a std of zero."""
    values = actions.double()
    mean = values.median(0).values if robust else values.mean(axis)
    std = values.std(axis, correction=correction)
    return {"mean": mean, "std": torch.where(std > 1e-8, std, torch.ones_like(std)) if least is None else std.clamp_min(least)}


def _zero_spread_kept(actions):
    return _statistics(actions, least=0.0)


def _one_number_for_all(actions):
    width = actions.shape[1]
    found = _statistics(actions.reshape(-1, 1))
    return {name: value.expand(width) for name, value in found.items()}


def _over_the_columns(actions):
    return _statistics(actions, axis=1)


def _unbiased(actions):
    return _statistics(actions, correction=1)


def _variance(actions):
    found = _statistics(actions)
    varies = actions.double().std(0, correction=0) > 1e-8
    return {"mean": found["mean"], "std": torch.where(varies, found["std"] ** 2, found["std"])}


def _median(actions):
    return _statistics(actions, robust=True)


def _range(actions):
    values = actions.double()
    spread = values.amax(0) - values.amin(0)
    return {"mean": values.mean(0), "std": torch.where(spread > 1e-8, spread, torch.ones_like(spread))}


@exercise("lab-scale", points=3, minutes=6)
class Scale(Exercise):
    """The mean and the standard deviation of each of an action's numbers, fit to divide by."""

    entry = "action_scale"
    withheld = ("labkit.task_specific_vla", "labkit.waypoint_regression")
    close = Tolerance(rtol=1e-4, atol=1e-6)

    def cases(self, rng, hidden):
        sizes = [(5, ()), (8, (3, 4))]
        ### BEGIN HIDDEN TESTS
        if hidden:
            sizes += [(100, (3, 4)), (3, (0, 1, 2, 3, 4, 5, 6)), (1, (0, 1, 2, 3, 4, 5, 6))]
        ### END HIDDEN TESTS
        for rows, constant in sizes:
            actions = rng.normal([0, 0, 0.06, 0, 0, 0, 0.5], [0.1, 0.15, 0.03, 0.02, 0.02, 0.4, 0.5], (rows, 7))
            actions[:, list(constant)] = (4 * actions[0, list(constant)]).round() / 4  # quarters have exact means
            yield Case(
                {"actions": torch.from_numpy(actions).float()},
                says="{rows} actions of 7 numbers" + (", {fixed} of which never change" if constant else ""),
                must='"mean" and "std" have 7 values, one for each number of an action; where the std is 0, there is 1 in its place.',
                facts={"rows": rows, "fixed": len(constant)},
            )

    def expected(self, case):
        """numpy, column by column."""
        columns = case.arguments["actions"].numpy().astype(np.float64).T
        spread = [1.0 if np.ptp(column) == 0 else column.std() for column in columns]
        return {"mean": columns.mean(1), "std": np.array(spread)}

    misconceptions = {
        "A number that never changes has a std of 0, or nearly; dividing by it makes NaN, or a rounding error huge: put 1 in its place.":
            _zero_spread_kept,
        "There is one mean and one std for everything: metres and radians have scales of their own, one for each of the 7 numbers.":
            _one_number_for_all,
        "You went along the 7 numbers; the statistics are over the {rows} actions.": _over_the_columns,
        "You divided by n - 1 (torch's default); here it is n: correction=0.": _unbiased,
        "That is the variance; its root has the unit of the number.": _variance,
        "That is the median; the mean is asked for.": _median,
        "That is the range from the least to the largest; one outlier would set it.": _range,
    }


def _followed(losses, patience, *, better=operator.lt, wait=0):
    """[best, last], from the epochs that brought a new least loss and the gaps between them."""
    lows = [0] + [i for i, new in enumerate(losses) if new == new and all(better(new, old) for old in losses[:i] if old == old)]
    ends = [low + patience + wait for low in lows]
    stop = next((n for n, end in enumerate(ends[:-1]) if lows[n + 1] > end), len(lows) - 1)
    return [lows[stop], min(ends[stop], len(losses) - 1)]


def _last_kept(losses, patience):
    last = _followed(losses, patience)[1]
    return [last, last]


def _best_of_all(losses, patience):
    return [int(np.nanargmin(losses)), _followed(losses, patience)[1]]


def _never_stops(losses, patience):
    return [int(np.nanargmin(losses)), len(losses) - 1]


def _ties_replace(losses, patience):
    return _followed(losses, patience, better=operator.le)


def _one_too_patient(losses, patience):
    return _followed(losses, patience, wait=1)


def _one_too_hasty(losses, patience):
    return _followed(losses, patience, wait=-1)


def _against_the_one_before(losses, patience):
    best, worse = 0, 0
    for epoch in range(1, len(losses)):
        worse = 0 if losses[epoch] < losses[epoch - 1] else worse + 1
        best = epoch if losses[epoch] < losses[best] else best
        if worse == patience:
            return [best, epoch]
    return [best, len(losses) - 1]


def _number_of_epochs(losses, patience):
    best, last = _followed(losses, patience)
    return [best + 1, last + 1]


def _swapped_epochs(losses, patience):
    return _followed(losses, patience)[::-1]


@exercise("lab-best", points=3, minutes=8)
class Best(Exercise):
    """Which epoch's weights to keep, and after which epoch to stop."""

    entry = "best_and_last"
    withheld = ("labkit.task_specific_vla", "labkit.waypoint_regression")
    close = Tolerance(rtol=0, atol=0)

    def cases(self, rng, hidden):
        curves = [([5.0, 3.0, 4.0, 4.5, 4.75, 5.0], 2),
                  ([4.0, 3.0, 2.0, 2.5], 3), ([5.0, 3.0, 4.0, 3.5, 3.25, 1.0], 3), ([3.0, 2.0, 2.0, 2.5, 2.75], 3)]
        ### BEGIN HIDDEN TESTS
        if hidden:
            curves += [([float("nan"), 3.0, 2.0, 2.5, 2.25, 2.125], 3), ([2.0, float("nan"), float("nan"), 1.0], 2), ([1.0], 1),
                       ([float("nan")] * 3 + [1.0], 2),
                       ([9.0, 8.0, 8.5, 7.0, 7.5, 7.25, 6.0], 1), ([float(x) for x in rng.permutation(12)], 4)]
        ### END HIDDEN TESTS
        for losses, patience in curves:
            higher = float(rng.uniform(0.1, 9))
            losses = [math.nan if math.isnan(loss) else round(loss + higher, 4) for loss in losses]
            yield Case(
                {"losses": losses, "patience": patience}, says="validation losses {losses} and a patience of {patience}",
                must="The first is the epoch with the least loss so far, counted from 0 and the earlier of two that are equal; the second the epoch "
                     "that is the {patience}th in a row without a new least, or the last there is.",
                facts={"losses": str(losses), "patience": patience, "epochs": len(losses)},
            )

    def expected(self, case):
        """Running minima by numpy."""
        losses, patience = np.array(case.arguments["losses"]), case.arguments["patience"]
        running = np.fmin.accumulate(losses)
        improved = [i for i in range(len(losses)) if losses[i] < (np.inf if i == 0 or np.isnan(running[i - 1]) else running[i - 1])]
        for epoch in range(len(losses)):
            so_far = [i for i in improved if i <= epoch] or [0]
            if epoch - so_far[-1] >= patience:
                return np.array([so_far[-1], epoch])
        return np.array([(improved or [0])[-1], len(losses) - 1])

    misconceptions = {
        "You keep the last epoch: stopping early helps only if the best weights are loaded again.": _last_kept,
        "Your best epoch comes after the stop: nobody has trained it.": _best_of_all,
        "You never stop: after {patience} epochs without a new least loss the rest is a waste.": _never_stops,
        "Of two equal losses you keep the later; no better is no reason to train longer.": _ties_replace,
        "You stop one epoch late: {patience} epochs without a new least are enough.": _one_too_patient,
        "You stop one epoch early: wait for {patience} without a new least.": _one_too_hasty,
        "You compare with the epoch before; a curve that creeps back down has not found a new least.": _against_the_one_before,
        "You count epochs from 1; they are counted from 0, like the rows of a table.": _number_of_epochs,
        "The two are exchanged: best first, then last.": _swapped_epochs,
    }
