"""Exercises of lesson 2: how likely an instruction makes an action, a matrix of successes, and where attention goes."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import log_softmax

from labkit.batches import IGNORED
from labkit.exercises.exercise import Case, Exercise, Tolerance, exercise


def _chosen(logits, labels, shift=1):
    """(B, T - 1) log-probability of every next token, and which of them are supervised."""
    predicted, targets = (logits[:, :-1], labels[:, 1:]) if shift else (logits, labels)
    found = log_softmax(predicted, -1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return found, targets != IGNORED


def _mean_of_each_row(logits, labels):
    found, supervised = _chosen(logits, labels)
    return (found * supervised).sum(1) / supervised.sum(1)


def _one_number_for_the_batch(logits, labels):
    found, supervised = _chosen(logits, labels)
    return (found * supervised).sum()


def _negative(logits, labels):
    found, supervised = _chosen(logits, labels)
    return -(found * supervised).sum(1)


def _likelihood_without_shift(logits, labels):
    found, supervised = _chosen(logits, labels, shift=0)
    return (found * supervised).sum(1)


def _every_token(logits, labels):
    return _chosen(logits, labels)[0].sum(1)


def _probability(logits, labels):
    found, supervised = _chosen(logits, labels)
    return (found * supervised).sum(1).exp()


def _sum_of_probabilities(logits, labels):
    found, supervised = _chosen(logits, labels)
    return (found.exp() * supervised).sum(1)


def _logits_added_up(logits, labels):
    targets = labels[:, 1:]
    found = logits[:, :-1].gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return (found * (targets != IGNORED)).sum(1)


@exercise("instruct-log-likelihood", points=3, minutes=6)
class LogLikelihood(Exercise):
    """The log-likelihood of each row's action, given its instruction and observation."""

    entry = "log_likelihood"
    withheld = ("labkit.experiments",)

    def cases(self, rng, hidden):
        sizes = [(1, 4, 2, 6), (3, 8, 4, 11)]
        ### BEGIN HIDDEN TESTS
        if hidden:
            sizes += [(2, 2, 1, 3), (6, 30, 7, 626)]
        ### END HIDDEN TESTS
        for rows, length, action, vocabulary in sizes:
            labels = torch.full((rows, length), IGNORED)
            for row in range(rows):
                count = max(1, action - row % 2)  # rows of different lengths, so that a mean is no multiple of the sum
                labels[row, length - count:] = torch.from_numpy(rng.integers(0, vocabulary, count))
            yield Case(
                {"logits": torch.from_numpy(rng.normal(0, 2, (rows, length, vocabulary))).float(), "labels": labels},
                says="{rows} rows of {length} tokens and a vocabulary of {vocabulary}",
                must="Each row gives one number, the sum of log p over its own supervised tokens.",
                facts={"rows": rows, "length": length, "vocabulary": vocabulary},
            )

    def expected(self, case):
        logits, labels = case.arguments["logits"].double(), case.arguments["labels"].tolist()
        found = [0.0] * len(labels)
        for row, tokens in enumerate(labels):
            for t, token in enumerate(tokens):
                if token != IGNORED:
                    scores = logits[row, t - 1].tolist()
                    found[row] += scores[token] - max(scores) - math.log(sum(math.exp(score - max(scores)) for score in scores))
        return torch.tensor(found)

    misconceptions = {
        "You took the mean over each row's tokens; the likelihood of a sequence is a product, so its logarithm is a sum.": _mean_of_each_row,
        "You added everything up; {rows} numbers are asked for, one for each row.": _one_number_for_the_batch,
        "The sign is turned round: this is the loss. A likelier action must get the larger number.": _negative,
        "You compared position t with label t; position t predicts token t + 1.": _likelihood_without_shift,
        "You counted the prompt, too; only the tokens whose label is not -100 are the action.": _every_token,
        "You returned probabilities; their logarithms are asked for (a product of many probabilities soon underflows).": _probability,
        "You added probabilities; the probability of a sequence is a PRODUCT, so add logarithms.": _sum_of_probabilities,
        "You added the logits; they become log-probabilities by log_softmax over the vocabulary.": _logits_added_up,
    }


def _table(objects, containers, done, colours):
    """Colour x colour -> (successes, trials), counted one by one."""
    counts = {(a, b): [0, 0] for a in colours for b in colours}
    for a, b, success in zip(objects, containers, done):
        counts[a, b][0] += bool(success)
        counts[a, b][1] += 1
    return counts


def _matrix(counts, colours, cell):
    return torch.tensor([[float(cell(*counts[a, b])) for b in colours] for a in colours])


def _rate(done, asked):
    return done / asked if asked else math.nan


def _transposed(objects, containers, done, colours):
    return _matrix(_table(containers, objects, done, colours), colours, _rate)


def _zero_where_never_asked(objects, containers, done, colours):
    return _matrix(_table(objects, containers, done, colours), colours, lambda s, n: s / n if n else 0.0)


def _counts(objects, containers, done, colours):
    return _matrix(_table(objects, containers, done, colours), colours, lambda s, n: s)


def _share_of_all_episodes(objects, containers, done, colours):
    return _matrix(_table(objects, containers, done, colours), colours, lambda s, n: s / len(done) if n else math.nan)


def _failures(objects, containers, done, colours):
    return _matrix(_table(objects, containers, [not d for d in done], colours), colours, _rate)


def _alphabetical(objects, containers, done, colours):
    return _matrix(_table(objects, containers, done, colours), sorted(colours), _rate)


def _last_episode_only(objects, containers, done, colours):
    found = torch.full((len(colours), len(colours)), math.nan)
    for a, b, success in zip(objects, containers, done):
        found[colours.index(a), colours.index(b)] = float(success)
    return found


@exercise("instruct-error-matrix", points=3, minutes=6)
class ErrorMatrix(Exercise):
    """Success by colour of the object and colour of the container, from a list of episodes."""

    entry = "success_matrix"
    withheld = ("labkit.experiments",)

    def cases(self, rng, hidden):
        sizes = [(2, 7), (3, 14)]
        ### BEGIN HIDDEN TESTS
        if hidden:
            sizes += [(5, 60), (1, 3)]
        ### END HIDDEN TESTS
        for count, episodes in sizes:
            colours = ["red", "green", "blue", "yellow", "purple"][:count]
            objects, containers = (rng.choice(colours, episodes).tolist() for _ in range(2))
            if count > 1:  # one combination is never asked, another one succeeds now and then
                containers = [colours[0] if (a, b) == (colours[0], colours[-1]) else b for a, b in zip(objects, containers)]
                objects, containers = objects + [colours[1]] * 3, containers + [colours[0]] * 3
            done = (rng.random(len(objects)) < 0.6).tolist()
            done[-3:] = [True, True, False]
            yield Case(
                {"objects": objects, "containers": containers, "done": done, "colours": colours},
                says="{episodes} episodes and the colours {colours}",
                must="Row i, column j is the share of successes when object i was to go into container j; nan where that was never asked.",
                facts={"episodes": len(objects), "colours": ", ".join(colours)},
            )

    def expected(self, case):
        return _matrix(_table(**case.arguments), case.arguments["colours"], _rate)

    misconceptions = {
        "Rows and columns are swapped: the object chooses the row, the container the column.": _transposed,
        "Never tried is not the same as always failed: a combination without episodes is nan, not 0.": _zero_where_never_asked,
        "You counted successes; divide by the number of episodes of that combination.": _counts,
        "You divided by all {episodes} episodes; each cell has its own number of episodes.": _share_of_all_episodes,
        "You counted failures; a cell holds the share of successes.": _failures,
        "You sorted the colours; the rows and columns follow the order of `colours`.": _alphabetical,
        "Later episodes overwrite earlier ones of the same combination; average them.": _last_episode_only,
    }


def _shares(attention, positions, image, target, of="image"):
    onto = attention[:, positions] @ torch.stack([target, image], 1).to(attention.dtype)
    return onto[..., 0] / onto[..., 1] if of == "image" else onto[..., 0]


def _read_the_wrong_way(attention, positions, image, target):
    return _shares(attention.transpose(1, 2), positions, image, target).mean()


def _share_of_everything(attention, positions, image, target):
    return _shares(attention, positions, image, target, of="all").mean()


def _from_every_position(attention, positions, image, target):
    return _shares(attention, list(range(attention.shape[1])), image, target).mean()


def _pooled(attention, positions, image, target):
    weights = attention[:, positions]
    return weights[..., target].sum() / weights[..., image].sum()


def _first_head(attention, positions, image, target):
    return _shares(attention[:1], positions, image, target).mean()


def _first_position(attention, positions, image, target):
    return _shares(attention, positions[:1], image, target).mean()


def _mean_over_patches(attention, positions, image, target):
    weights = attention[:, positions]
    return (weights[..., target].mean(-1) / weights[..., image].mean(-1)).mean()


def _summed_over_heads(attention, positions, image, target):
    return _shares(attention, positions, image, target).sum(0).mean()


def _one_share_a_head(attention, positions, image, target):
    return _shares(attention, positions, image, target).mean(1)


@exercise("instruct-attention-share", points=4, minutes=8)
class AttentionShare(Exercise):
    """Of the attention that goes to the image, the share that goes to one object."""

    entry = "attention_share"
    withheld = ("labkit.experiments",)
    close = Tolerance(rtol=1e-3, atol=1e-6)

    def cases(self, rng, hidden):
        sizes = [(2, 7, 4, 2, 2), (4, 12, 6, 2, 3)]
        ### BEGIN HIDDEN TESTS
        if hidden:
            sizes += [(1, 5, 2, 1, 1), (4, 52, 36, 4, 3)]
        ### END HIDDEN TESTS
        for heads, length, patches, asked, covered in sizes:
            attention = torch.softmax(torch.from_numpy(rng.normal(0, 2, (heads, length, length))).float(), -1)
            image = torch.zeros(length, dtype=torch.bool)
            image[1 : 1 + patches] = True
            target = torch.zeros(length, dtype=torch.bool)
            target[1 + torch.from_numpy(rng.permutation(patches)[:covered])] = True
            yield Case(
                {"attention": attention, "positions": list(range(length - asked, length)), "image": image, "target": target},
                says="{heads} heads, {length} positions, {patches} of them image patches, {covered} on the object",
                must="For each head and each asked position: the attention on the object, over that on the whole image; then the mean.",
                facts={"heads": heads, "length": length, "patches": patches, "covered": covered},
            )

    def expected(self, case):
        attention, positions, image, target = (case.arguments[name] for name in ("attention", "positions", "image", "target"))
        weights = attention.double().tolist()
        shares = []
        for head in weights:
            for i in positions:
                onto_image = sum(w for w, here in zip(head[i], image.tolist()) if here)
                shares.append(sum(w for w, here in zip(head[i], target.tolist()) if here) / onto_image)
        return sum(shares) / len(shares)

    misconceptions = {
        "You read the matrix the wrong way: attention[h, i, j] is how much position i LOOKS AT position j.": _read_the_wrong_way,
        "You divided by nothing: words get attention, too. Divide by what goes to the {patches} image patches.": _share_of_everything,
        "You averaged over all {length} positions; only those in `positions` ask.": _from_every_position,
        "You added up before dividing; then a head that looks at the image more counts more. Divide first, average last.": _pooled,
        "You looked at the first head only; there are {heads}.": _first_head,
        "You looked at the first position only; average over all of `positions`.": _first_position,
        "You averaged over patches, which compares attention per patch; the share adds the {covered} patches of the object up.": _mean_over_patches,
        "You added the heads up; average over them.": _summed_over_heads,
        "You return one share for each head; one number is asked for, their mean.": _one_share_a_head,
    }
