"""Exercises of lesson 8: a batch of several adapters, a router's scores, the risk-coverage curve, and an ensemble of logits."""

from __future__ import annotations

import numpy as np
import torch

from labkit.exercises.exercise import Case, Exercise, Tolerance, exercise


def _updates(x, A, B, scaling):
    """(K, N, d) what each of the K adapters would add to each of the N rows."""
    return scaling * torch.einsum("nk,ark,adr->and", x, A, B)


def _first_row_for_all(x, weight, A, B, scaling, adapters):
    first = int(adapters[0])
    return x @ weight.T + (_updates(x, A, B, scaling)[first] if first >= 0 else 0)


def _all_at_once(x, weight, A, B, scaling, adapters):
    return x @ weight.T + _updates(x, A, B, scaling).sum(0)


def _mean_of_all(x, weight, A, B, scaling, adapters):
    return x @ weight.T + _updates(x, A, B, scaling).mean(0)


def _minus_one_is_the_last(x, weight, A, B, scaling, adapters):
    return x @ weight.T + _updates(x, A, B, scaling)[adapters, torch.arange(len(x))]


def _chosen(x, A, B, scaling, adapters):
    on = (adapters >= 0)[:, None]
    return torch.where(on, _updates(x, A, B, scaling)[adapters.clamp(min=0), torch.arange(len(x))], 0)


def _no_scaling(x, weight, A, B, scaling, adapters):
    return x @ weight.T + _chosen(x, A, B, 1.0, adapters)


def _update_alone(x, weight, A, B, scaling, adapters):
    return _chosen(x, A, B, scaling, adapters)


def _nothing_without_adapter(x, weight, A, B, scaling, adapters):
    return torch.where((adapters >= 0)[:, None], x @ weight.T + _chosen(x, A, B, scaling, adapters), 0)


def _sorted_by_adapter(x, weight, A, B, scaling, adapters):
    right = x @ weight.T + _chosen(x, A, B, scaling, adapters)
    return right[adapters.argsort(stable=True)]


@exercise("deploy-mixed-batch", points=5, minutes=12)
class MixedBatch(Exercise):
    """One linear layer under several LoRA adapters, of which every row of the batch has its own."""

    entry = "mixed_batch_lora"
    close = Tolerance(rtol=1e-4, atol=1e-4)
    withheld = ("peft", "labkit.routing")

    def cases(self, rng, hidden):
        grids = [(5, 4, 2, 2, [1, 0, -1]), (6, 8, 3, 3, [2, -1, 0, 1, 0, 2])]
        ### BEGIN HIDDEN TESTS
        if hidden:
            grids += [(4, 4, 1, 2, [1, -1, -1, 0]), (7, 6, 3, 4, [3, 1, 3, -1, 2]), (4, 5, 2, 3, [1, 1, 2, 1]), (9, 3, 2, 2, [-1, 1, -1]),
                      (3, 7, 2, 1, [0, -1])]
        ### END HIDDEN TESTS
        for inputs, outputs, rank, count, adapters in grids:
            rows = len(adapters)
            x, weight, A, B = (torch.from_numpy(rng.normal(size=shape)).float() for shape in (
                (rows, inputs), (outputs, inputs), (count, rank, inputs), (count, outputs, rank)))
            yield Case(
                {"x": x, "weight": weight, "A": A, "B": B, "scaling": float(rng.choice([0.5, 2.0, 3.0])), "adapters": torch.tensor(adapters)},
                says="{rows} rows, {count} adapters and the choices {choices}",
                must="Every row is x W^T plus the scaled update of its own adapter, in the order of the rows; a row with -1 is x W^T alone.",
                facts={"rows": rows, "count": count, "choices": " ".join(map(str, adapters)), "first": adapters[0]},
            )

    def expected(self, case):
        """peft's own mixed batch."""
        from labkit.routing import mixed_by_peft

        return mixed_by_peft(*case.arguments.values())

    misconceptions = {
        "You gave every row the adapter of the first row ({first}); each row has its own.": _first_row_for_all,
        "You added all {count} adapters to every row; a row has one of them.": _all_at_once,
        "You added the mean of all {count} adapters; a row has one of them.": _mean_of_all,
        "A row with -1 got the LAST adapter, because Python counts -1 from the end; it means: no adapter.": _minus_one_is_the_last,
        "The update is not multiplied by `scaling`.": _no_scaling,
        "That is the update alone; x W^T of the frozen weight is missing.": _update_alone,
        "A row without an adapter came out as zeros; it is x W^T, as before any training.": _nothing_without_adapter,
        "The rows come out sorted by adapter; they must keep their places in the batch.": _sorted_by_adapter,
    }


def _router(features, routes, queries, shrinkage, covariance=None, share=None, inverse=np.linalg.inv, score=lambda away: -(away**2) / 2):
    """scipy's Mahalanobis distances, with numpy's covariance of what is left of every route, or with one part of that changed."""
    from scipy.spatial.distance import cdist

    features, routes, queries = features.numpy(), routes.numpy(), queries.numpy()
    of_route = [features[routes == k] for k in range(int(routes.max()) + 1)]
    centroids = np.array([np.average(rows, axis=0) for rows in of_route])
    parts = [len(rows) * np.cov(rows, rowvar=False, ddof=0) for rows in of_route]
    within = sum(parts) / len(features) if covariance is None else covariance(features)
    added = shrinkage * np.trace(within) / len(within) if share is None else share(within)
    return torch.from_numpy(score(cdist(queries, centroids, "mahalanobis", VI=inverse(within + added * np.identity(len(within))))))


def _around_the_mean_of_all(features, routes, queries, shrinkage):
    return _router(features, routes, queries, shrinkage, covariance=lambda rows: np.cov(rows, rowvar=False, ddof=0))


def _not_centred(features, routes, queries, shrinkage):
    return _router(features, routes, queries, shrinkage, covariance=lambda rows: rows.T @ rows / len(rows))


def _euclidean(features, routes, queries, shrinkage):
    return _router(features, routes, queries, shrinkage, inverse=lambda within: np.identity(len(within)))


def _not_shrunk(features, routes, queries, shrinkage):
    return _router(features, routes, queries, shrinkage, share=lambda within: 0)


def _shrunk_by_the_number(features, routes, queries, shrinkage):
    return _router(features, routes, queries, shrinkage, share=lambda within: shrinkage)


def _shrunk_by_the_sum(features, routes, queries, shrinkage):
    return _router(features, routes, queries, shrinkage, share=lambda within: shrinkage * np.trace(within))


def _shrunk_by_every_entry(features, routes, queries, shrinkage):
    return _router(features, routes, queries, shrinkage, share=lambda within: shrinkage * within.mean())


def _distances(features, routes, queries, shrinkage):
    return _router(features, routes, queries, shrinkage, score=lambda away: away**2 / 2)


def _not_halved(features, routes, queries, shrinkage):
    return _router(features, routes, queries, shrinkage, score=lambda away: -(away**2))


def _root(features, routes, queries, shrinkage):
    return _router(features, routes, queries, shrinkage, score=lambda away: -away)


def _covariance_for_its_inverse(features, routes, queries, shrinkage):
    return _router(features, routes, queries, shrinkage, inverse=lambda within: within)


@exercise("deploy-router", points=5, minutes=12)
class RouterScores(Exercise):
    """How well each query fits each route: linear discriminant analysis with a shrunk covariance."""

    entry = "router_scores"
    close = Tolerance(rtol=1e-4, atol=1e-5)
    withheld = ("labkit.routing", "sklearn")

    def cases(self, rng, hidden):
        grids = [([4, 3], 1, 3, 0.1), ([4, 3, 6], 5, 4, 0.5)]
        ### BEGIN HIDDEN TESTS
        if hidden:
            grids += [([3, 5], 3, 2, 1.0), ([5, 7, 3, 4], 4, 8, 0.1), ([3, 2, 4], 1, 5, 0.3), ([9, 4], 6, 12, 0.2)]
        ### END HIDDEN TESTS
        for sizes, queries, width, shrinkage in grids:
            yield self._case(rng, sizes, queries, width, shrinkage)

    def _case(self, rng, sizes, queries, width, shrinkage):
        routes = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
        # Far from the origin and of different variances, as hidden states are.
        scale = rng.uniform(0.5, 2.5, width)
        places = 2 + scale * rng.normal(size=(len(sizes), width))
        features = places[routes] + scale * rng.normal(size=(len(routes), width))
        asked = 2 + 2 * rng.normal(size=(queries, width))
        return Case(
            {"features": torch.from_numpy(features), "routes": torch.from_numpy(routes), "queries": torch.from_numpy(asked), "shrinkage": shrinkage},
            says="{rows} training features of {count} routes, {queries} queries and a shrinkage of {shrinkage}",
            must="The score of each of the {queries} queries (rows) for each of the {count} routes (columns) is minus half the squared Mahalanobis "
                 "distance to its centroid.",
            facts={"rows": len(routes), "count": len(sizes), "queries": queries, "shrinkage": shrinkage, "width": width},
        )

    def expected(self, case):
        return _router(*case.arguments.values())

    misconceptions = {
        "Your covariance is taken around the mean of all {rows} features; take away from each feature the centroid of its OWN route, or the "
        "difference between routes counts as noise.": _around_the_mean_of_all,
        "Your covariance is that of the features themselves; take away the centroid of its route from each of them first.": _not_centred,
        "These are plain squared distances; divide by the covariance, or a colour's name weighs as much as the verb.": _euclidean,
        "The covariance is not shrunk; with few sentences in many dimensions its inverse is wild, or not there at all.": _not_shrunk,
        "You added {shrinkage} itself to the variances; add {shrinkage} times their MEAN, so that the scale of the features does not matter.":
            _shrunk_by_the_number,
        "You added a share of the SUM of the {width} variances; it is their mean.": _shrunk_by_the_sum,
        "You took the mean of all entries of the covariance; the variances are on its diagonal.": _shrunk_by_every_entry,
        "These grow with the distance; a score is highest for the best route.": _distances,
        "The half is missing: without it, differences of scores are twice the log-odds.": _not_halved,
        "You took the root; the squared distance is asked for.": _root,
        "You multiplied by the covariance; a Mahalanobis distance uses its INVERSE.": _covariance_for_its_inverse,
    }


def _sorted_wrong(confidence, correct, ascending=False):
    return (~correct[confidence.argsort(descending=not ascending)]).double()


def _steps(correct):
    return torch.arange(1, len(correct) + 1, dtype=torch.float64)


def _least_confident_first(confidence, correct):
    k = _steps(correct)
    return k / len(k), _sorted_wrong(confidence, correct, ascending=True).cumsum(0) / k


def _not_sorted(confidence, correct):
    k = _steps(correct)
    return k / len(k), (~correct).double().cumsum(0) / k


def _share_of_all(confidence, correct):
    k = _steps(correct)
    return k / len(k), _sorted_wrong(confidence, correct).cumsum(0) / len(k)


def _accuracy(confidence, correct):
    k = _steps(correct)
    return k / len(k), 1 - _sorted_wrong(confidence, correct).cumsum(0) / k


def _one_too_few(confidence, correct):
    k, wrong = _steps(correct), _sorted_wrong(confidence, correct)
    return (k - 1) / len(k), (wrong.cumsum(0) - wrong) / (k - 1).clamp(min=1)


def _answer_by_answer(confidence, correct):
    k = _steps(correct)
    return k / len(k), _sorted_wrong(confidence, correct)


def _counts(confidence, correct):
    return _steps(correct), _sorted_wrong(confidence, correct).cumsum(0)


def _confidence_for_coverage(confidence, correct):
    return confidence.sort(descending=True).values, _sorted_wrong(confidence, correct).cumsum(0) / _steps(correct)


@exercise("deploy-risk-coverage", points=3, minutes=8)
class RiskCoverage(Exercise):
    """How often the answered ones are wrong, against how many are answered."""

    entry = "risk_coverage"
    close = Tolerance(rtol=1e-4, atol=1e-6)
    withheld = ("labkit.routing", "sklearn")

    def cases(self, rng, hidden):
        grids = [(4, [1, 0, 1, 0]), (7, [0, 1, 1, 1, 0, 1, 1])]
        ### BEGIN HIDDEN TESTS
        if hidden:
            grids += [(1, [0]), (5, [1] * 5), (6, [0, 0, 1, 1, 1, 1]), (30, rng.integers(0, 2, 30).tolist())]
        ### END HIDDEN TESTS
        for count, correct in grids:
            # In random order, and never two alike: which of two equals comes first is nobody's mistake.
            confidence = torch.from_numpy(rng.permutation(np.linspace(0.05, 1.4, count)))
            if count > 1:
                confidence[[0, int(confidence.argmax())]] = confidence[[int(confidence.argmax()), 0]]
                confidence[[0, 1]] = confidence[[1, 0]]
            yield Case(
                {"confidence": confidence.float(), "correct": torch.tensor(correct, dtype=torch.bool)},
                says="{count} answers of which {right} are right",
                must="Entry k - 1 is about the k most confident answers: k / {count} of all, and the share of wrong ones among these k.",
                facts={"count": count, "right": sum(correct)},
            )

    def expected(self, case):
        """The definition, one k at a time."""
        confidence, correct = (value.tolist() for value in case.arguments.values())
        ranked = [right for _, right in sorted(zip(confidence, correct), reverse=True)]
        n = len(ranked)
        return (torch.tensor([k / n for k in range(1, n + 1)]), torch.tensor([ranked[:k].count(False) / k for k in range(1, n + 1)]))

    misconceptions = {
        "You began with the LEAST confident answers; abstaining drops those first.": _least_confident_first,
        "The answers are not sorted: begin with the most confident one.": _not_sorted,
        "You divided by all {count} answers; the risk is the share among those that were answered.": _share_of_all,
        "That is the accuracy; the risk is the share of WRONG answers.": _accuracy,
        "Your curve is one answer behind: the first entry is about 1 answer, not about 0.": _one_too_few,
        "That is each answer by itself; the risk at k is the share of wrong ones among ALL of the first k.": _answer_by_answer,
        "These are counts; divide by {count}, and the wrong ones by the answered ones.": _counts,
        "Coverage is a share of the answers, 1 / {count} to 1, not the confidence.": _confidence_for_coverage,
    }


def _mixture(logits, weights):
    return torch.einsum("knv,nk->nv", logits.softmax(-1), weights).log()


def _equal_weights(logits, weights):
    return logits.mean(0).log_softmax(-1)


def _not_normalised(logits, weights):
    return torch.einsum("knv,nk->nv", logits.log_softmax(-1), weights)


def _logits_alone(logits, weights):
    return torch.einsum("knv,nk->nv", logits, weights)


def _probabilities(logits, weights):
    return torch.einsum("knv,nk->nv", logits, weights).softmax(-1)


def _heaviest_member(logits, weights):
    return logits[weights.argmax(1), torch.arange(len(weights))].log_softmax(-1)


def _normalised_over_rows(logits, weights):
    return torch.einsum("knv,nk->nv", logits, weights).log_softmax(0)


def _weights_of_the_first_row(logits, weights):
    return torch.einsum("knv,k->nv", logits, weights[0]).log_softmax(-1)


@exercise("deploy-ensemble", points=3, minutes=6)
class Ensemble(Exercise):
    """Log-probabilities of an ensemble that averages logits, each row with its own weights."""

    entry = "ensemble_log_probabilities"
    close = Tolerance(rtol=1e-4, atol=1e-4)
    withheld = ("labkit.routing",)

    def cases(self, rng, hidden):
        grids = [(2, 2, 3), (3, 4, 6)]
        ### BEGIN HIDDEN TESTS
        if hidden:
            grids += [(1, 2, 4), (4, 3, 9), (2, 5, 16), (3, 3, 3), (2, 1, 5)]
        ### END HIDDEN TESTS
        for members, rows, tokens in grids:
            yield Case(
                {"logits": torch.from_numpy(rng.normal(0, 3, (members, rows, tokens))).float(),
                 "weights": torch.from_numpy(rng.dirichlet(np.ones(members), rows)).float()},
                says="{members} members, {rows} rows and {tokens} tokens",
                must="Every row is a distribution over {tokens} tokens, in logarithms: its logits are averaged with its own {members} weights first.",
                facts={"members": members, "rows": rows, "tokens": tokens},
            )

    def expected(self, case):
        """The normalised weighted geometric mean of the members' distributions, in double precision."""
        from scipy.special import logsumexp

        logits, weights = (value.double().numpy() for value in case.arguments.values())
        log_p = logits - logsumexp(logits, axis=-1, keepdims=True)
        product = sum(weights[:, k, None] * log_p[k] for k in range(len(logits)))
        return torch.from_numpy(product - logsumexp(product, axis=-1, keepdims=True))

    misconceptions = {
        "You averaged probabilities; logits are asked for. One member that is sure of a token then no longer outvotes the doubt of the others.":
            _mixture,
        "All members have the same weight; each row has its own weights.": _equal_weights,
        "Averaged log-probabilities are no distribution until they are normalised again.": _not_normalised,
        "These are averaged logits; log-probabilities are asked for.": _logits_alone,
        "These are probabilities; their logarithms are asked for.": _probabilities,
        "You took the member with the largest weight and left the others out.": _heaviest_member,
        "You normalised over the {rows} rows; a distribution is over the {tokens} tokens.": _normalised_over_rows,
        "Every row got the weights of the first row.": _weights_of_the_first_row,
    }
