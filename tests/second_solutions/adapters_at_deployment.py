"""Lesson 8 once more: gathered matrices, a triangular solve after sums by one-hot matrices, a loop over answers, a product of powers.

ALMOST_RIGHT: entry -> answers that are right on the usual inputs and wrong on inputs that the docstring of the entry allows, too.
"""

import torch


def mixed_batch_lora(x, weight, A, B, scaling, adapters):
    known = adapters.clamp(min=0)
    inside = torch.bmm(A[known], x.unsqueeze(2))
    update = torch.bmm(B[known], inside).squeeze(2) * (adapters >= 0).unsqueeze(1)
    return torch.nn.functional.linear(x, weight) + update * scaling


def router_scores(features, routes, queries, shrinkage):
    one_hot = torch.nn.functional.one_hot(routes.long()).to(features.dtype)
    sizes = one_hot.sum(0)
    centroids = torch.diag(1 / sizes) @ one_hot.T @ features
    covariance = (features.T @ features - centroids.T @ torch.diag(sizes) @ centroids) / len(features)
    covariance = covariance + torch.diag(torch.full((len(covariance),), float(shrinkage * covariance.trace() / len(covariance))))
    root = torch.linalg.cholesky(covariance)
    scores = []
    for query in queries:
        white = torch.linalg.solve_triangular(root, (query - centroids).T, upper=False)
        scores.append(-white.square().sum(0) / 2)
    return torch.stack(scores)


def risk_coverage(confidence, correct):
    coverage, risk, total, wrong = [], [], len(correct), 0
    for answered, place in enumerate(sorted(range(total), key=lambda i: -float(confidence[i])), start=1):
        wrong += not bool(correct[place])
        coverage.append(answered / total)
        risk.append(wrong / answered)
    return torch.tensor(coverage), torch.tensor(risk)


def ensemble_log_probabilities(logits, weights):
    powers = torch.stack([member.double().softmax(-1) ** w[:, None].double() for member, w in zip(logits, weights.T)])
    together = powers.prod(0)
    return (together / together.sum(-1, keepdim=True)).log()


def two_adapters_at_most(x, weight, A, B, scaling, adapters):
    """Wrong where there are more than three adapters."""
    return mixed_batch_lora(x, weight, A[:3], B[:3], scaling, adapters.clamp(max=2))


def each_adapter_has_a_row(x, weight, A, B, scaling, adapters):
    """Wrong where the adapters of the batch are not all that there are: it numbers those that occur."""
    present = sorted(set(adapters.tolist()) - {-1})
    number = {k: i for i, k in enumerate(present)}
    return mixed_batch_lora(x, weight, A, B, scaling, torch.tensor([number.get(int(k), -1) for k in adapters]))


def few_dimensions(features, routes, queries, shrinkage):
    """Wrong where there are more than four dimensions."""
    return router_scores(features[:, :4], routes, queries[:, :4], shrinkage)


def starts_wrong(confidence, correct):
    """Wrong where a single answer is asked for."""
    return risk_coverage(confidence, correct) if len(correct) > 1 else (torch.ones(1), torch.zeros(1))


def two_or_three_members(logits, weights):
    """Wrong where there are more than three members."""
    return ensemble_log_probabilities(logits[:3], weights[:, :3])


ALMOST_RIGHT = {
    "mixed_batch_lora": [two_adapters_at_most, each_adapter_has_a_row],
    "router_scores": [few_dimensions],
    "risk_coverage": [starts_wrong],
    "ensemble_log_probabilities": [two_or_three_members],
}
