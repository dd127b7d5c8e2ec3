"""Exercises of lesson 1: the labels with their mask, the masked loss, and its gradient by hand."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy, log_softmax, one_hot, softmax

from labkit.batches import IGNORED
from labkit.exercises.exercise import Case, Exercise, Tolerance, exercise


def _whole_sequence_as_labels(prompt_ids, action_ids):
    ids = torch.cat([prompt_ids, action_ids])
    return ids, ids.clone()


def _action_masked(prompt_ids, action_ids):
    return torch.cat([prompt_ids, action_ids]), torch.cat([prompt_ids, torch.full_like(action_ids, IGNORED)])


def _masked_with_zero(prompt_ids, action_ids):
    return torch.cat([prompt_ids, action_ids]), torch.cat([torch.zeros_like(prompt_ids), action_ids])


def _shifted_labels(prompt_ids, action_ids):
    ids, labels = _right_labels(prompt_ids, action_ids)
    return ids, torch.cat([labels[1:], torch.full_like(labels[:1], IGNORED)])


def _last_prompt_token_supervised(prompt_ids, action_ids):
    ids, labels = _right_labels(prompt_ids, action_ids)
    labels[len(prompt_ids) - 1] = prompt_ids[-1]
    return ids, labels


def _first_action_token_masked(prompt_ids, action_ids):
    ids, labels = _right_labels(prompt_ids, action_ids)
    labels[len(prompt_ids)] = IGNORED
    return ids, labels


def _action_not_in_the_input(prompt_ids, action_ids):
    return prompt_ids, action_ids


def _masked_input(prompt_ids, action_ids):
    _, labels = _right_labels(prompt_ids, action_ids)
    return labels, labels


def _action_first(prompt_ids, action_ids):
    return torch.cat([action_ids, prompt_ids]), torch.cat([action_ids, torch.full_like(prompt_ids, IGNORED)])


def _labels_only(prompt_ids, action_ids):
    return _right_labels(prompt_ids, action_ids)[1]


def _right_labels(prompt_ids, action_ids):
    ids = prompt_ids.tolist() + action_ids.tolist()
    labels = [IGNORED if place < len(prompt_ids) else token for place, token in enumerate(ids)]
    return torch.tensor(ids), torch.tensor(labels)


@exercise("sft-labels", points=3, minutes=6)
class Labels(Exercise):
    """One training sequence: the prompt, the action, and labels that supervise the action alone."""

    entry = "training_sequence"
    withheld = ("labkit.batches",)

    def cases(self, rng, hidden):
        sizes = [(3, 2), (6, 4), (11, 4)]
        ### BEGIN HIDDEN TESTS
        if hidden:
            sizes += [(1, 1), (1, 7), (40, 7)]
        ### END HIDDEN TESTS
        for prompt, action in sizes:
            # No id is 0 or small enough to be mistaken for a place.
            ids = torch.from_numpy(rng.permutation(500)[: prompt + action] + 100)
            if prompt > 5:
                ids[1] = ids[-1]  # a token may stand in the prompt and in the action
            yield Case(
                {"prompt_ids": ids[:prompt], "action_ids": ids[prompt:]},
                says="a prompt of {prompt} tokens and an action of {action}",
                must="Both results have {length} entries: the first is what the model reads, the second is -100 or the token to be predicted.",
                facts={"prompt": prompt, "action": action, "length": prompt + action},
            )

    def expected(self, case):
        return _right_labels(**case.arguments)

    misconceptions = {
        "You supervise all {length} tokens; the {prompt} of the prompt are given, not predicted: their label is -100.": _whole_sequence_as_labels,
        "You masked the {action} action tokens and left the prompt: it is the other way round.": _action_masked,
        "You masked with 0, and 0 is a token like any other (<pad>); cross_entropy leaves out -100 and nothing else.": _masked_with_zero,
        "You moved the labels by one place. The loss does that (position t predicts token t + 1), so here label t belongs to token t.":
            _shifted_labels,
        "The last token of the prompt still has a label: the mask ends one place too early.": _last_prompt_token_supervised,
        "The first action token has no label: the mask reaches one place too far.": _first_action_token_masked,
        "The model must read the action, too: with teacher forcing the input is the prompt AND the action, and the labels are as long.":
            _action_not_in_the_input,
        "You masked the input as well: the model must read the prompt. Only the labels hold -100.": _masked_input,
        "You put the action before the prompt; a decoder reads from left to right, and would see the answer before the question.": _action_first,
        "Return two tensors, the input and the labels; only one came back.": _labels_only,
    }


def _mean_over_every_position(logits, labels):
    targets = labels[:, 1:]
    return cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum") / targets.numel()


def _mask_ignored(logits, labels):
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].clamp(min=0).flatten())


def _no_shift(logits, labels):
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def _shift_the_other_way(logits, labels):
    return cross_entropy(logits[:, 1:].flatten(0, 1), labels[:, :-1].flatten(), ignore_index=IGNORED)


def _sum(logits, labels):
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")


def _sum_over_batch(logits, labels):
    return _sum(logits, labels) / len(logits)


def _mean_of_row_means(logits, labels):
    return torch.stack([_reference_loss(row[None], tokens[None]) for row, tokens in zip(logits, labels)]).mean()


def _sign_forgotten(logits, labels):
    return -_reference_loss(logits, labels)


def _probability_instead_of_logarithm(logits, labels):
    targets = labels[:, 1:]
    chosen = softmax(logits[:, :-1], -1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return -chosen[targets != IGNORED].mean()


def _logits_instead_of_log_probabilities(logits, labels):
    targets = labels[:, 1:]
    chosen = logits[:, :-1].gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return -chosen[targets != IGNORED].mean()


def _softmax_over_positions(logits, labels):
    targets = labels[:, 1:]
    chosen = log_softmax(logits[:, :-1], 1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return -chosen[targets != IGNORED].mean()


def _base_two(logits, labels):
    return _reference_loss(logits, labels) / 0.6931471805599453


def _one_loss_a_token(logits, labels):
    targets = labels[:, 1:]
    return cross_entropy(logits[:, :-1].transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")


def _reference_loss(logits, labels):
    """One position after the other, in double precision: what the sentence says, as slowly as it is said."""
    losses = []
    for row, tokens in zip(logits.double(), labels):
        for t in range(1, len(tokens)):
            if tokens[t] != IGNORED:
                scores = row[t - 1]
                losses.append(torch.logsumexp(scores, 0) - scores[tokens[t]])
    return torch.stack(losses).mean()


def _loss_case(rng, rows, prompt, action, vocabulary, asks=("output",), padding=0, scattered=False):
    """rows sequences; row i supervises action + i tokens, so that a mean over rows is not a mean over tokens.

    scattered: with a label on the first token, which nothing predicts; another turn in the middle; padding on the right; token 0 as a target.
    """
    length = padding + prompt + action + rows - 1
    labels = torch.full((rows, length), IGNORED)
    for i in range(rows):
        labels[i, length - action - i :] = torch.from_numpy(rng.integers(0, vocabulary, action + i))
    if scattered:
        labels[:, 0] = torch.from_numpy(rng.integers(0, vocabulary, rows))
        labels[1:, 2:4] = torch.from_numpy(rng.integers(0, vocabulary, (rows - 1, 2)))
        labels[0, -2:] = IGNORED
        labels[-1, -1] = 0
    supervised = int((labels[:, 1:] != IGNORED).sum())
    return Case(
        {"logits": torch.from_numpy(rng.normal(0, 2, (rows, length, vocabulary))).float(), "labels": labels},
        says="a batch of {rows} x {length} tokens, {supervised} of them supervised, and a vocabulary of {vocabulary}"
        + (", where the first token has a label, too, though nothing stands before it" if scattered else ""),
        must="The {supervised} supervised tokens, each predicted by the position before it, count alike, and nothing else counts.",
        facts={"rows": rows, "length": length, "positions": rows * (length - 1), "supervised": supervised, "vocabulary": vocabulary},
        asks=asks, gradients=("logits",),
    )  # fmt: skip


### BEGIN HIDDEN TESTS
def _large(case):
    """With logits so large that the exponential overflows where it is taken by hand."""
    case.arguments["logits"].mul_(100)
    return case
### END HIDDEN TESTS


@exercise("sft-masked-loss", points=4, minutes=8)
class MaskedLoss(Exercise):
    """Mean cross-entropy over the supervised tokens only."""

    entry = "masked_loss"
    withheld = ("labkit.sft",)
    close = Tolerance(rtol=1e-4, atol=1e-6)

    def cases(self, rng, hidden):
        yield _loss_case(rng, rows=1, prompt=3, action=2, vocabulary=7)
        yield _loss_case(rng, rows=3, prompt=5, action=4, vocabulary=11)
        yield _loss_case(rng, rows=2, prompt=4, action=3, vocabulary=5, asks=("output", "gradients"))
        yield _loss_case(rng, rows=3, prompt=6, action=4, vocabulary=8, scattered=True)
        ### BEGIN HIDDEN TESTS
        if hidden:
            yield _loss_case(rng, rows=1, prompt=1, action=1, vocabulary=2)
            yield _loss_case(rng, rows=5, prompt=8, action=4, vocabulary=626, padding=6, asks=("output", "gradients"))
            yield _large(_loss_case(rng, rows=2, prompt=3, action=3, vocabulary=9))
        ### END HIDDEN TESTS

    def expected(self, case):
        logits = case.arguments["logits"].clone().requires_grad_()
        loss = _reference_loss(logits, case.arguments["labels"])
        if case.asks == ("output",):
            return loss.detach()
        return {"output": loss.detach(), "gradients": {"logits": torch.autograd.grad(loss, logits)[0]}}

    misconceptions = {
        "You divided by all {positions} positions; only the {supervised} supervised tokens count.": _mean_over_every_position,
        "You counted all {positions} positions; where the label is -100 there is nothing to predict.": _mask_ignored,
        "You compared position t with label t; position t predicts token t + 1, so the logits lose their last place and the labels their first.":
            _no_shift,
        "You shifted the wrong way: position t predicts token t + 1, not token t - 1.": _shift_the_other_way,
        "You added up and did not divide: the mean over the {supervised} supervised tokens is asked for.": _sum,
        "You divided by the number of rows; divide by the number of supervised tokens, {supervised} here.": _sum_over_batch,
        "You took the mean of each row first; then a token of a long answer counts less than one of a short answer.": _mean_of_row_means,
        "The sign is missing: the loss is MINUS the log-probability, so that it falls as the policy learns.": _sign_forgotten,
        "You averaged probabilities; the loss is the mean of their logarithms.": _probability_instead_of_logarithm,
        "You took the logits themselves; they become log-probabilities by log_softmax over the vocabulary.": _logits_instead_of_log_probabilities,
        "Your softmax runs over the positions; the tokens of the vocabulary, the last dimension, compete with each other.": _softmax_over_positions,
        "Your logarithm has base 2 (bits); the natural logarithm (nats) is asked for.": _base_two,
        "You return one loss for each token; one number is asked for, their mean over the supervised ones.": _one_loss_a_token,
    }


def _gradient(logits, labels, divide_by=None, shift=1, minus_one_hot=True, keep_masked=False, sign=1.0):
    """(softmax - one-hot) / count at the positions that predict a supervised token, with one part changed."""
    length = logits.shape[1]
    targets = torch.full_like(labels, IGNORED)
    targets[:, : length - shift] = labels[:, shift:]
    supervised = targets != IGNORED
    found = softmax(logits, -1)
    if minus_one_hot:
        found = found - one_hot(targets.clamp(min=0), logits.shape[-1])
    if not keep_masked:
        found = found * supervised[..., None]
    return sign * found / (supervised.sum() if divide_by is None else divide_by)


def _not_divided(logits, labels):
    return _gradient(logits, labels, divide_by=1)


def _divided_by_every_position(logits, labels):
    return _gradient(logits, labels, divide_by=labels[:, 1:].numel())


def _divided_by_rows(logits, labels):
    return _gradient(logits, labels, divide_by=len(logits))


def _gradient_without_shift(logits, labels):
    return _gradient(logits, labels, shift=0)


def _without_one_hot(logits, labels):
    return _gradient(logits, labels, minus_one_hot=False)


def _prefix_not_zero(logits, labels):
    return _gradient(logits, labels, keep_masked=True)


def _descent_direction(logits, labels):
    return _gradient(logits, labels, sign=-1.0)


def _last_position_missing(logits, labels):
    return _gradient(logits, labels)[:, :-1]


def _only_the_supervised_rows(logits, labels):
    return _gradient(logits, labels)[:, :-1][labels[:, 1:] != IGNORED]


@exercise("sft-logit-gradient", points=4, minutes=10)
class LogitGradient(Exercise):
    """The gradient of the masked loss with respect to the logits, without autograd."""

    entry = "logit_gradient"
    close = Tolerance(rtol=1e-4, atol=1e-6)

    def cases(self, rng, hidden):
        yield _loss_case(rng, rows=1, prompt=2, action=2, vocabulary=4)
        yield _loss_case(rng, rows=3, prompt=4, action=3, vocabulary=6)
        yield _loss_case(rng, rows=3, prompt=6, action=4, vocabulary=8, scattered=True)
        ### BEGIN HIDDEN TESTS
        if hidden:
            yield _loss_case(rng, rows=1, prompt=1, action=1, vocabulary=2)
            yield _loss_case(rng, rows=4, prompt=9, action=4, vocabulary=50, padding=3)
            yield _large(_loss_case(rng, rows=2, prompt=3, action=3, vocabulary=9))
        ### END HIDDEN TESTS

    def expected(self, case):
        logits = case.arguments["logits"].clone().requires_grad_()
        return torch.autograd.grad(_reference_loss(logits, case.arguments["labels"]), logits)[0]

    misconceptions = {
        "You did not divide: the loss is a mean over {supervised} supervised tokens, and so is its gradient.": _not_divided,
        "You divided by all {positions} positions; the loss is a mean over {supervised} supervised tokens.": _divided_by_every_position,
        "You divided by the number of rows; the loss is a mean over {supervised} supervised tokens.": _divided_by_rows,
        "Your gradient sits where the action tokens are; it belongs one place earlier, where they are predicted.": _gradient_without_shift,
        "You kept the probabilities and did not subtract 1 at the right token: this pushes every token down, the right one too.":
            _without_one_hot,
        "Your gradient is not zero where the label is -100: multiply by the mask.": _prefix_not_zero,
        "The sign is turned round: this is the direction of a step downhill, and the gradient points uphill.": _descent_direction,
        "The last position is missing: the gradient has the shape of the logits, with zeros where nothing is predicted.": _last_position_missing,
        "You return only the supervised positions; the gradient has the shape of the logits, with zeros everywhere else.":
            _only_the_supervised_rows,
    }
