"""Exercises of lesson 7: the diagonal Fisher, the penalty that EWC makes of it, the loss of a mixed batch, and the KL anchor."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy, mse_loss, one_hot

from labkit.exercises.exercise import Case, Exercise, Tolerance, exercise


def _draw(rng, *shape):
    return torch.from_numpy(rng.normal(size=shape)).float()


def _errors(hidden, weight, labels):
    """(N, V) the gradient of -log p(label) with respect to the logits: softmax minus one-hot."""
    return torch.softmax(hidden @ weight.T, dim=-1) - one_hot(labels, len(weight))


def _gradients(hidden, weight, labels):
    """(N, V, d) per-sample gradients of -log p(label)."""
    return _errors(hidden, weight, labels)[:, :, None] * hidden[:, None]


def _square_of_the_mean(hidden, weight, labels):
    return _gradients(hidden, weight, labels).mean(0) ** 2


def _summed(hidden, weight, labels):
    return (_gradients(hidden, weight, labels) ** 2).sum(0)


def _not_squared(hidden, weight, labels):
    return _gradients(hidden, weight, labels).mean(0)


def _absolute(hidden, weight, labels):
    return _gradients(hidden, weight, labels).abs().mean(0)


def _variance(hidden, weight, labels):
    return _gradients(hidden, weight, labels).var(0, unbiased=False)


def _of_probability(hidden, weight, labels):
    p = torch.softmax(hidden @ weight.T, dim=-1).gather(1, labels[:, None])
    return (p[:, :, None] ** 2 * _gradients(hidden, weight, labels) ** 2).mean(0)


def _most_probable(hidden, weight, labels):
    return (_gradients(hidden, weight, (hidden @ weight.T).argmax(-1)) ** 2).mean(0)


def _of_the_logit(hidden, weight, labels):
    return (one_hot(labels, len(weight))[:, :, None] * hidden[:, None] ** 2).mean(0)


def _divided_by_all(hidden, weight, labels):
    return _summed(hidden, weight, labels) / _gradients(hidden, weight, labels).numel() * len(weight)


def _on_its_side(hidden, weight, labels):
    return (_gradients(hidden, weight, labels) ** 2).mean(0).T


def _rooted(hidden, weight, labels):
    return (_gradients(hidden, weight, labels) ** 2).mean(0).sqrt()


@exercise("ewc-fisher", points=4, minutes=10)
class Fisher(Exercise):
    """The diagonal Fisher of an output layer: the mean of squared per-sample gradients of log p."""

    entry = "output_fisher"
    withheld = ("labkit.forgetting",)
    close = Tolerance(rtol=1e-4, atol=1e-6)

    def cases(self, rng, hidden):
        sizes = [(3, 2, 4), (6, 3, 5)]
        ### BEGIN HIDDEN TESTS
        if hidden:
            sizes += [(1, 4, 3), (9, 1, 2), (5, 6, 7)]
        ### END HIDDEN TESTS
        for count, width, classes in sizes:
            weight, states = _draw(rng, classes, width), _draw(rng, count, width)
            # At least one label is not the most probable one.
            labels = (torch.from_numpy(rng.integers(1, classes, count)) + (states @ weight.T).argmax(-1)) % classes
            yield Case(
                {"hidden": states, "weight": weight, "labels": labels},
                says="{count} samples, {width} features and {classes} classes",
                must="Each sample has a gradient of its own, of the shape of the weight; square each, then take the mean over the samples.",
                facts={"count": count, "width": width, "classes": classes},
            )

    def expected(self, case):
        """In closed form, in double precision: the mean over samples of (p - onehot)^2 x^2."""
        hidden, weight, labels = case.arguments.values()
        return _errors(hidden.double(), weight.double(), labels).square().T @ hidden.double().square() / len(hidden)

    misconceptions = {
        "You took the mean first and squared it afterwards. At the end of training the gradients of all samples cancel in the mean, and it would "
        "say that nothing is important; square first.": _square_of_the_mean,
        "You took the sum over the samples; the Fisher is their mean, or it would grow with the number of samples.": _summed,
        "That is the mean gradient, with positive and negative numbers; square every sample's gradient before you take the mean.": _not_squared,
        "You took absolute values; the Fisher is the mean of squares.": _absolute,
        "That is the variance of the gradients: you took their mean off before squaring. The Fisher is the mean of the squares themselves.":
            _variance,
        "That is the gradient of p, not of log p.": _of_probability,
        "You did not use the labels that you were given, but the most probable ones.": _most_probable,
        "That is the gradient of the label's logit; log p also has the logarithm of the softmax's denominator, which adds minus p.": _of_the_logit,
        "You divided by the number of features, too; the mean goes over the {count} samples only.": _divided_by_all,
        "Your matrix lies on its side: it has the shape of the weight, ({classes}, {width}).": _on_its_side,
        "You took the root at the end; the Fisher is the mean of squares itself.": _rooted,
    }


def _twice(theta, start, fisher, strength):
    return strength * (fisher * (theta - start) ** 2).sum()


def _averaged(theta, start, fisher, strength):
    return strength / 2 * (fisher * (theta - start) ** 2).mean()


def _weight_decay(theta, start, fisher, strength):
    return strength / 2 * (fisher * theta**2).sum()


def _no_fisher(theta, start, fisher, strength):
    return strength / 2 * ((theta - start) ** 2).sum()


def _fisher_squared(theta, start, fisher, strength):
    return strength / 2 * ((fisher * (theta - start)) ** 2).sum()


def _not_squared_distance(theta, start, fisher, strength):
    return strength / 2 * (fisher * (theta - start)).sum()


def _absolute_distance(theta, start, fisher, strength):
    return strength / 2 * (fisher * (theta - start).abs()).sum()


def _divided_by_fisher(theta, start, fisher, strength):
    return strength / 2 * ((theta - start) ** 2 / (fisher + 1e-8)).sum()


def _strength_inside(theta, start, fisher, strength):
    return ((strength * (theta - start)) ** 2 * fisher).sum() / 2


def _root_of_the_sum(theta, start, fisher, strength):
    return strength / 2 * ((fisher * (theta - start) ** 2).sum() + 1e-12).sqrt()


def _no_strength(theta, start, fisher, strength):
    return (fisher * (theta - start) ** 2).sum() / 2


@exercise("ewc-penalty", points=3, minutes=5)
class Penalty(Exercise):
    """EWC's penalty: lambda / 2 times the sum of F (theta - theta_0)^2."""

    entry = "ewc"
    withheld = ("labkit.forgetting",)
    close = Tolerance(rtol=1e-4, atol=1e-6)

    def cases(self, rng, hidden):
        shapes = [((5,), 3.0), ((3, 4), 0.5)]
        ### BEGIN HIDDEN TESTS
        if hidden:
            shapes += [((1,), 7.0), ((2, 3, 2), 100.0), ((6,), 0.0)]
        ### END HIDDEN TESTS
        for shape, strength in shapes:
            yield Case(
                {"theta": _draw(rng, *shape), "start": _draw(rng, *shape), "fisher": _draw(rng, *shape).square(), "strength": strength},
                says="parameters of shape {shape} and lambda = {strength}",
                must="Every parameter pays F times the square of its own distance from the start; the sum is multiplied by lambda / 2, and its "
                "gradient pulls theta back.",
                facts={"shape": " x ".join(map(str, shape)), "strength": strength}, asks=("output", "gradients"), gradients=("theta",),
            )  # fmt: skip

    def expected(self, case):
        """One parameter after the other, with the derivative by hand."""
        theta, start, fisher, strength = case.arguments.values()
        triples = list(zip(theta.flatten().tolist(), start.flatten().tolist(), fisher.flatten().tolist()))
        gradient = torch.tensor([strength * f * (t - s) for t, s, f in triples]).reshape(theta.shape)
        return {"output": sum(strength * f * (t - s) ** 2 / 2 for t, s, f in triples), "gradients": {"theta": gradient}}

    misconceptions = {
        "The half is missing: it is lambda / 2, so that the gradient is lambda F times the distance.": _twice,
        "You took the mean over the parameters; the sum is asked for. With a million parameters, the mean would make lambda mean nothing.": _averaged,
        "That pulls towards zero, as weight decay does; EWC pulls towards the start.": _weight_decay,
        "The Fisher is missing: that is L2 to the start, in which all parameters are equally important.": _no_fisher,
        "You squared the Fisher, too; only the distance is squared.": _fisher_squared,
        "The distance is not squared: the penalty could be negative.": _not_squared_distance,
        "You took the absolute distance; the square is asked for.": _absolute_distance,
        "You divided by the Fisher; important parameters, those with a large Fisher, must cost more.": _divided_by_fisher,
        "You squared lambda, too; only the distance is squared.": _strength_inside,
        "You took the root of the sum; the penalty is the sum itself.": _root_of_the_sum,
        "Lambda is missing.": _no_strength,
    }


def _swapped_alpha(losses, replayed, alpha):
    return alpha * losses[~replayed].mean() + (1 - alpha) * losses[replayed].mean()


def _plain_mean(losses, replayed, alpha):
    return losses.mean() + 0 * alpha


def _half_and_half(losses, replayed, alpha):
    return (losses[~replayed].mean() + losses[replayed].mean()) / 2


def _sums(losses, replayed, alpha):
    return (1 - alpha) * losses[~replayed].sum() + alpha * losses[replayed].sum()


def _divided_by_the_batch(losses, replayed, alpha):
    return _sums(losses, replayed, alpha) / len(losses)


def _added_on_top(losses, replayed, alpha):
    return losses[~replayed].mean() + alpha * losses[replayed].mean()


def _weights_normalised(losses, replayed, alpha):
    weights = torch.where(replayed, alpha, 1 - alpha)
    return (weights * losses).sum() / weights.sum()


def _squared_alpha(losses, replayed, alpha):
    return (1 - alpha) ** 2 * losses[~replayed].mean() + alpha**2 * losses[replayed].mean()


@exercise("ewc-mixed-loss", points=3, minutes=6)
class MixedLoss(Exercise):
    """The loss of a mixed batch: (1 - alpha) times the mean over the new samples + alpha times the mean over the replayed ones."""

    entry = "mixed_loss"
    withheld = ("labkit.forgetting",)
    close = Tolerance(rtol=1e-4, atol=1e-6)

    def cases(self, rng, hidden):
        batches = [(6, 2, 0.25), (5, 3, 0.1)]
        ### BEGIN HIDDEN TESTS
        if hidden:
            batches += [(2, 1, 0.7), (8, 7, 0.3), (7, 3, 0.0), (7, 2, 1.0)]
        ### END HIDDEN TESTS
        for size, old, alpha in batches:
            replayed = torch.zeros(size, dtype=torch.bool)
            replayed[torch.from_numpy(rng.permutation(size)[:old])] = True
            yield Case(
                {"losses": _draw(rng, size).abs() + 0.5, "replayed": replayed, "alpha": alpha},
                says="{size} samples, {old} of them replayed, and alpha = {alpha}",
                must="The two groups are averaged apart, and alpha is the weight of the replayed one, however many samples it has.",
                facts={"size": size, "old": old, "new": size - old, "alpha": alpha}, asks=("output", "gradients"), gradients=("losses",),
            )  # fmt: skip

    def expected(self, case):
        """Sample by sample: what each weighs in the loss is its gradient."""
        losses, replayed, alpha = case.arguments.values()
        old = int(replayed.sum())
        weights = [alpha / old if r else (1 - alpha) / (len(losses) - old) for r in replayed.tolist()]
        return {"output": sum(w * value for w, value in zip(weights, losses.tolist())), "gradients": {"losses": torch.tensor(weights)}}

    misconceptions = {
        "Alpha is the weight of the replayed samples, and 1 - alpha that of the new ones; you have them the other way round.": _swapped_alpha,
        "That is the mean over the whole batch: the replayed samples weigh {old} of {size} in it, whatever alpha is.": _plain_mean,
        "Both groups weigh one half in your loss, whatever alpha is.": _half_and_half,
        "You summed inside the groups; take the mean in each, or the larger group counts for more than its weight.": _sums,
        "You divided both groups by the size of the whole batch; the {new} new and the {old} replayed samples have a mean each.":
            _divided_by_the_batch,
        "You added the replayed loss on top; the new one must weigh 1 - alpha, so that the weights sum to 1.": _added_on_top,
        "You weighed each sample and divided by the sum of the weights: then a group counts for more the more samples it has.": _weights_normalised,
        "You multiplied by the weights twice.": _squared_alpha,
    }


def _reverse(start_logits, logits):
    now = torch.softmax(logits, -1)
    return (now * (now.log() - torch.log_softmax(start_logits.detach(), -1))).sum(-1).mean()


def _positions_summed(start_logits, logits):
    start = torch.softmax(start_logits.detach(), -1)
    return (start * (start.log() - torch.log_softmax(logits, -1))).sum()


def _all_averaged(start_logits, logits):
    return _positions_summed(start_logits, logits) / logits.numel()


def _cross_entropy(start_logits, logits):
    return -(torch.softmax(start_logits.detach(), -1) * torch.log_softmax(logits, -1)).sum(-1).mean()


def _anchor_moves(start_logits, logits):
    start = torch.softmax(start_logits, -1)
    return (start * (start.log() - torch.log_softmax(logits, -1))).sum(-1).mean()


def _only_the_best(start_logits, logits):
    choice = start_logits.detach().argmax(-1)
    return cross_entropy(logits.flatten(0, -2), choice.flatten())


def _logits_compared(start_logits, logits):
    return mse_loss(logits, start_logits.detach())


def _probabilities_compared(start_logits, logits):
    return (torch.softmax(logits, -1) - torch.softmax(start_logits.detach(), -1)).square().sum(-1).mean()


def _negative(start_logits, logits):
    return -_positions_summed(start_logits, logits) / logits[..., 0].numel()


def _not_normalised(start_logits, logits):
    start = torch.softmax(start_logits.detach(), -1)
    return (start * (start_logits.detach() - logits)).sum(-1).mean()


def _unweighted(start_logits, logits):
    return (torch.log_softmax(start_logits.detach(), -1) - torch.log_softmax(logits, -1)).sum(-1).mean()


def _symmetric(start_logits, logits):
    return (_reverse(start_logits, logits) + _positions_summed(start_logits, logits) / logits[..., 0].numel()) / 2


@exercise("ewc-kl-anchor", points=4, minutes=8)
class KLAnchor(Exercise):
    """KL from the frozen policy: the mean over positions of KL(p_start || p), which moves the new policy only."""

    entry = "kl_to_start"
    withheld = ("labkit.forgetting",)
    close = Tolerance(rtol=1e-3, atol=1e-5)

    def cases(self, rng, hidden):
        shapes = [(3, 4, 5), (2, 3, 6)]
        ### BEGIN HIDDEN TESTS
        if hidden:
            shapes += [(1, 1, 3), (4, 7), (2, 2, 3, 4)]
        ### END HIDDEN TESTS
        for shape in shapes:
            yield Case(
                {"start_logits": _draw(rng, *shape), "logits": _draw(rng, *shape)},
                says="logits of shape {shape}",
                must="At each position, the sum over the tokens of p_start (log p_start - log p); then the mean over the positions. The gradient "
                "goes to the new policy's logits and to nothing else.",
                facts={"shape": " x ".join(map(str, shape)), "tokens": shape[-1]}, asks=("output", "gradients"), gradients=("logits", "start_logits"),
            )  # fmt: skip

    def expected(self, case):
        """torch's own kl_div in double precision; the gradient is (p - p_start) over the number of positions."""
        start_logits, logits = (value.double() for value in case.arguments.values())
        start, now = (torch.distributions.Categorical(logits=value) for value in (start_logits, logits))
        positions = logits[..., 0].numel()
        return {"output": torch.distributions.kl_divergence(start, now).mean(),
                "gradients": {"logits": (now.probs - start.probs) / positions, "start_logits": None}}

    misconceptions = {
        "That is KL(p || p_start), the other direction: the mean has to be taken with the start's probabilities.": _reverse,
        "You took the sum over the positions; take their mean, or the strength depends on the size of the batch.": _positions_summed,
        "You took the mean over the {tokens} tokens, too; over the tokens it is a sum, over the positions a mean.": _all_averaged,
        "That is the cross-entropy. Its gradient is the same, but it is not 0 at the start: the entropy of p_start has to come off.": _cross_entropy,
        "The value is right, but a gradient flows to the start's logits: the anchor would come along. Detach them.": _anchor_moves,
        "You used only the start's most probable token; the whole distribution is the anchor.": _only_the_best,
        "You compared logits; a constant added to all of them changes no probability, but your distance.": _logits_compared,
        "You compared probabilities by squares; the KL divergence compares their logarithms.": _probabilities_compared,
        "The sign is wrong: a divergence is never negative.": _negative,
        "The logits are not normalised: log p is log_softmax of the logits.": _not_normalised,
        "Each token has to be weighed with its probability at the start.": _unweighted,
        "That is the mean of both directions; only KL(p_start || p) is asked for.": _symmetric,
    }
