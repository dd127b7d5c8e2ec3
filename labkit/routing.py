"""Several adapters on one backbone: which one answers, by the words of the instruction or by the picture; and what to do when neither says.

Training an adapter is in sft.py, asking a policy in policy.py. Nothing here knows the names of tasks: adapters are numbered, or called by the
names they were loaded under.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from labkit.errors import UserError
from labkit.peft_lora import peft_layer
from labkit.policy import Decision, Policy

# What peft calls a row of a mixed batch that no adapter touches.
OFF = "__base__"
ABSTAIN = -1


def with_adapters(policy: Policy, folders: dict[str, Path]) -> Policy:
    """A copy of `policy` with one named LoRA adapter for each folder, all on the same frozen backbone; the first is active.

    folders: name -> folder written by `save` of a policy with a peft adapter.
    Raises UserError for no folders, for one without an adapter, and for a name that peft cannot use.
    """
    from peft import PeftModel

    if not folders:
        raise UserError("there are no adapters to load")
    for name, folder in folders.items():
        # peft keeps adapters in a ModuleDict, whose own attributes are taken: "forward" is one of them.
        if hasattr(torch.nn.ModuleDict(), name) or "." in name:
            raise UserError(f"an adapter cannot be called {name!r}: torch's ModuleDict, where peft keeps it, uses that name; take another one")
        if not (Path(folder) / "adapter_config.json").exists():
            raise UserError(f"{folder} holds no adapter: adapter_config.json is missing")
    (first, folder), *others = folders.items()
    shared = policy.copy()
    shared.model = PeftModel.from_pretrained(shared.model, str(folder), adapter_name=first)
    for name, folder in others:
        shared.model.load_adapter(str(folder), adapter_name=name)
    shared.model.eval()
    return shared


@torch.no_grad()
def instruction_features(policy: Policy, instructions, layer: int = -1) -> np.ndarray:
    """What the frozen language model makes of each sentence: its hidden states, averaged over the sentence's tokens.

    instructions: N sentences.   layer: of the hidden states; 0 is the embeddings, -1 the last.   Returns (N, width) float64.
    Adapters are off meanwhile, so the features do not depend on which one is active. In the tiny VLA the words come before the image, so
    they are the states that the policy itself computes for these words, whatever it sees.   Raises ValueError for no instructions.
    """
    if not len(instructions):
        raise ValueError("there are no instructions")
    batch = policy.processor.tokenizer(list(instructions), padding=True, return_tensors="pt").to(policy.model.device)
    policy.model.eval()
    with _without_adapters(policy.model):
        decoder = policy.model.get_decoder()
        states = decoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True, use_cache=False)
    states = states.hidden_states[layer].double()
    real = batch["attention_mask"].unsqueeze(-1).double()
    return ((states * real).sum(1) / real.sum(1)).cpu().numpy()


@torch.no_grad()
def picture_features(policy: Policy, images) -> np.ndarray:
    """What the vision tower makes of each picture: its last hidden states, averaged over the patches.

    images: (N, H, W, 3) uint8.   Returns (N, width) float64.   Raises ValueError for no images.
    """
    if not len(images):
        raise ValueError("there are no images")
    pixels = policy.to_model(policy.prompts.pixels(np.asarray(images)))
    policy.model.eval()
    with _without_adapters(policy.model):
        states = policy.model.get_submodule(_vision_tower(policy.model))(pixels).last_hidden_state
    # The first state is that of the class token, which belongs to no patch.
    return states[:, 1:].double().mean(1).cpu().numpy()


def _without_adapters(model):
    """A context in which none of peft's adapters acts, where the model has any."""
    return model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()


def _vision_tower(model):
    """The name of the module that reads the picture."""
    found = [name for name, _ in model.named_modules() if name.rpartition(".")[2] == "vision_tower"]
    if not found:
        raise ValueError(f"{type(model).__name__} has no vision_tower")
    return found[0]


def bags_of_words(policy: Policy, instructions) -> np.ndarray:
    """(N, vocabulary) how often each token stands in each sentence: the features of a router that has no language model."""
    ids = [policy.processor.tokenizer(text)["input_ids"] for text in instructions]
    return np.stack([np.bincount(row, minlength=len(policy.processor.tokenizer)) for row in ids]).astype(float)


@dataclass(frozen=True)
class Router:
    """Linear discriminant analysis (Fisher 1936): the nearest centroid, in units of how much sentences of one route differ anyway.

    centroids: (K, d), one for each route.   covariance: (d, d) within routes, shrunk, see `fit_router`.
    """

    centroids: np.ndarray
    covariance: np.ndarray

    def scores(self, features) -> np.ndarray:
        """(N, d) features  ->  (N, K) minus half the squared Mahalanobis distance to every centroid; the highest is the best.

        The difference of two scores is the log-odds between the two routes, in nats, if both are equally frequent.
        """
        away = np.asarray(features, float)[:, None] - self.centroids
        whitened = np.linalg.solve(self.covariance, away.reshape(-1, away.shape[-1]).T).T.reshape(away.shape)
        return -0.5 * (away * whitened).sum(-1)


def fit_router(features, routes, shrinkage: float = 0.1) -> Router:
    """Centroids and the covariance that they share.

    features: (N, d).   routes: (N,) int, the number of the route that each row belongs to, 0 to K - 1.
    shrinkage: how many times the mean variance is added to each variance, so that few sentences in many dimensions can be inverted.
    Raises ValueError where lengths differ, or where a number between 0 and the largest has no row.
    """
    features, routes = np.asarray(features, float), np.asarray(routes)
    if len(features) != len(routes):
        raise ValueError(f"{len(features)} features and {len(routes)} numbers of routes")
    missing = sorted(set(range(routes.max() + 1)) - set(routes.tolist()))
    if missing:
        raise ValueError(f"no feature belongs to route {missing[0]}")
    members = np.eye(routes.max() + 1)[routes]  # (N, K), of which the mean within routes is a least-squares fit
    centroids = np.linalg.lstsq(members, features)[0]
    within = np.atleast_2d(np.cov(features - members @ centroids, rowvar=False, ddof=0))
    return Router(centroids, within + np.identity(len(within)) * shrinkage * np.trace(within) / len(within))


def router_scores(features, routes, queries, shrinkage):
    """(M, K) tensor: scores of the queries (M, d) by a router that is fitted on `features` (N, d), see `fit_router`."""
    as_array = [torch.as_tensor(value).numpy() for value in (features, routes, queries)]
    return torch.from_numpy(fit_router(*as_array[:2], shrinkage).scores(as_array[2]))


def margins(scores) -> np.ndarray:
    """(N, K) scores  ->  (N,) best minus second best, at least 0: for a `Router`, the log-odds of the best route against the next, in nats."""
    best = np.sort(np.asarray(scores, float), axis=1)
    return best[:, -1] - best[:, -2]


def choose(scores, threshold: float = 0.0) -> np.ndarray:
    """(N,) int: the number of the adapter with the highest score, or ABSTAIN (-1) where the margin is below `threshold`."""
    scores = np.asarray(scores, float)
    return np.where(margins(scores) < threshold, ABSTAIN, scores.argmax(1))


def risk_coverage(confidence, correct) -> tuple[torch.Tensor, torch.Tensor]:
    """The risk-coverage curve of a selective classifier (El-Yaniv and Wiener, JMLR 11, 2010).

    confidence: (N,).   correct: (N,) bool.   Returns coverage (N,), k / N, and risk (N,), the share of wrong ones among the k most confident,
    for k = 1 to N.   Raises ValueError for none.
    """
    from scipy.stats import rankdata

    confidence, correct = np.asarray(confidence, float), np.asarray(correct, bool)
    if not len(confidence):
        raise ValueError("a curve needs at least one answer")
    place = rankdata(-confidence, method="ordinal")  # 1 for the most confident
    wrong = np.bincount(place, weights=~correct)[1:]
    return torch.from_numpy(np.sort(place) / len(place)), torch.from_numpy(np.add.accumulate(wrong) / np.sort(place))


def threshold_for(confidence, correct, risk: float) -> float:
    """The smallest threshold at which the answered ones (confidence at or above it) are wrong in at most `risk` of the cases.

    Thresholds lie half-way between neighbouring confidences. Infinite where none will do, minus infinite where all may be answered.
    """
    confidence, correct = np.asarray(confidence, float), np.asarray(correct, bool)
    levels = np.unique(confidence)
    for threshold in (-np.inf, *(levels[1:] + levels[:-1]) / 2):
        if (~correct[confidence >= threshold]).mean() <= risk:
            return float(threshold)
    return float("inf")


def averaged_log_probabilities(logits, weights):
    """Log-probabilities of an ensemble that averages logits: the normalised geometric mean of its members' distributions.

    logits: (K, N, V) of K members.   weights: (N, K), each row sums to 1.   Returns (N, V).   Source: Hinton, product of experts (1999).
    """
    logits, weights = torch.as_tensor(logits), torch.as_tensor(weights)
    return torch.einsum("knv,nk->nv", logits, weights.to(logits.dtype)).log_softmax(-1)


def mixed_by_peft(x, weight, A, B, scaling: float, adapters):
    """One linear layer under several LoRA adapters of which each row of the batch has its own, as peft computes it.

    x: (N, k).   weight: (d, k).   A: (K, r, k).   B: (K, d, r).   adapters: (N,) int, ABSTAIN (-1) for none.   Returns (N, d).
    """
    names, rank = [str(k) for k in range(len(A))], A.shape[1]
    layer = peft_layer(weight.clone(), rank, scaling * rank, names).eval()
    with torch.no_grad():
        for name, down, up in zip(names, A, B):
            layer.lora_A[name].weight.copy_(down)
            layer.lora_B[name].weight.copy_(up)
    return layer(x, adapter_names=[OFF if k == ABSTAIN else str(int(k)) for k in adapters]).detach()


@dataclass
class RoutedPolicy:
    """A policy that takes, for every observation, the adapter that `route` names; one batch may hold all of them.

    policy: with named adapters, see `with_adapters`.   route: N observations -> N names, OFF for the backbone alone.
    """

    policy: Policy
    route: Callable[[list[dict]], list[str]]

    def decide(self, observations, instructions=None) -> Decision:
        """B observations (and B instructions, default the observations' own)  ->  Decision, in one forward pass."""
        observations = _told(observations, instructions)
        return self.policy.decide(observations, adapter_names=self.route(observations))


@dataclass
class EnsemblePolicy:
    """A policy whose members, one for each name, speak together: at every action token their logits are averaged.

    policy: with named adapters.   names: K of them, OFF for the backbone alone.   weigh: N observations -> (N, K) weights that sum to 1;
    default, all the same. A row that gives everything to one member is that member's own decision.   It costs K forward passes.
    """

    policy: Policy
    names: tuple[str, ...]
    weigh: Callable[[list[dict]], np.ndarray] | None = None

    def decide(self, observations, instructions=None) -> Decision:
        """B observations (and B instructions, default the observations' own)  ->  Decision; the members are rows of one batch."""
        observations = _told(observations, instructions)
        members, count = len(self.names), len(observations)
        weights = np.full((count, members), 1 / members) if self.weigh is None else np.asarray(self.weigh(observations))
        named = [name for name in self.names for _ in range(count)]
        said = self.policy.decide(observations * members, adapter_names=named, logits_processor=[_Averaged(torch.as_tensor(weights))])
        return Decision(*(value[:count] for value in (said.bins, said.actions, said.waypoints, said.probabilities)), said.seconds)


def _told(observations, instructions):
    if instructions is None:
        return list(observations)
    return [{**seen, "instruction": text} for seen, text in zip(observations, instructions)]


@dataclass
class _Averaged:
    """A logits processor for a batch of K copies of the same N prompts: every copy gets the weighted mean of all, so all say the same token."""

    weights: torch.Tensor  # (N, K)

    def __call__(self, input_ids, scores):
        count, members = self.weights.shape
        # A forbidden token has the score -inf, and 0 times that is nan.
        finite = scores.clamp(min=-1e9).reshape(members, count, -1)
        together = averaged_log_probabilities(finite, self.weights.to(scores.device))
        return together.repeat(members, 1)


@dataclass
class AdapterRouter:
    """From observations to names of adapters: a router behind a reader of features.

    read: N observations -> (N, d) features.   router: fitted on such features.   names: K names, in the router's order.
    threshold: margin below which it abstains.   fallback: the name that it says then.
    """

    read: Callable[[list[dict]], np.ndarray]
    router: Router
    names: tuple[str, ...]
    threshold: float = 0.0
    fallback: str = OFF

    def __call__(self, observations) -> list[str]:
        chosen = choose(self.router.scores(self.read(observations)), self.threshold)
        return [self.fallback if k == ABSTAIN else self.names[k] for k in chosen]
