"""Properties of every exercise: right answers pass, each known mistake is named, mutants fail, and no verdict tells or breaks anything."""

import ast
import re
from collections import namedtuple
from functools import cache
from importlib import import_module
from itertools import chain

import nbformat
import numpy as np
import pytest
import torch
from mutants import FILENAME, at_most, mutants_of

from labkit.exercises import exercise as registry
from labkit.exercises.asking import answer
from labkit.exercises.exercise import PUBLIC, Case, Exercise, Raised, all_exercises, exercise, exercises_of
from labkit.exercises.judging import CORRECT, NOT_ATTEMPTED, WRONG, check, difference, judge, trusted
from labkit.paths import NOTEBOOKS
from labkit.student_copies import without_solutions
from labkit.submission.cells import Cells, cells_of, exercise_ids_of, grade_id, read_notebook

EXERCISES = all_exercises()
SECRETS = ["a secret", "another", "2026 autumn", "", "ünïcode"]

# Mutants that compute the same. Exercise id -> what was changed -> why that changes no result.
EQUIVALENT = {
    "few-shot-lag": {
        "pairs = torch.stack([image[:len(image) - lag], speed[lag:]]) -> pairs = -torch.stack([image[:len(image) - lag], speed[lag:]])":
            "the correlation of two negated records is that of the records",
        "pairs = torch.stack([image[:len(image) - lag], speed[lag:]]) -> pairs = torch.stack([speed[lag:], image[:len(image) - lag]])":
            "a correlation is symmetric",
        "pairs = torch.stack([image[:len(image) - lag], speed[lag:]]) -> pairs = torch.stack([image[:len(speed) - lag], speed[lag:]])":
            "both records have the same length",
        "found.append(torch.corrcoef(pairs)[0, 1]) -> found.append(torch.corrcoef(pairs)[1, 0])": "the matrix is symmetric",
        "found.append(torch.corrcoef(pairs)[0, 1]) -> found.append(torch.corrcoef(pairs)[0, -1])": "place 1 of two is the last one",
    },
    "lab-scale": {
        "return {'mean': actions.mean(dim=0), 'std': torch.where(std == 0, 1.0, std)} -> "
        "return {'mean': actions.mean(dim=0), 'std': torch.where(std <= 0, 1.0, std)}": "no deviation is below zero",
    },
    "lab-best": {
        "if epoch - best == patience: -> if epoch - best >= patience:": "the difference grows by one an epoch and is looked at in each",
    },
    "lab-int8": {
        "scale = weight.abs().amax(dim=1, keepdim=True) / 127 -> scale = weight.abs().amax(dim=-1, keepdim=True) / 127":
            "dimension 1 of two is the last one",
        "scale = torch.where(scale == 0, 1.0, scale) -> scale = torch.where(scale <= 0, 1.0, scale)": "no scale is below zero",
        "error = (weight - scale * q).norm() / weight.norm() -> error = (scale * q - weight).norm() / weight.norm()": "a norm has no sign",
    },
    "lab-cache": {
        "kept, answers = ([], []) -> answers, kept = ([], [])": "both begin as the same empty list",
        "away = [float((sketch - sketches[other]).norm()) for other in kept] -> away = [(sketch - sketches[other]).norm() for other in kept]":
            "tensors of one number compare as that number",
        "away = [float((sketch - sketches[other]).norm()) for other in kept] -> away = [float((sketches[other] - sketch).norm()) for other in kept]":
            "a distance has no sign",
        "if kept and min(away) <= threshold: -> if answers and min(away) <= threshold:": "from the first answer on something is kept",
        "if kept and min(away) <= threshold: -> if number and min(away) <= threshold:": "from the second request on something is kept",
        "if kept and min(away) <= threshold: -> if away and min(away) <= threshold:": "there is a distance for each that is kept",
    },
    "lab-deadline": {
        "p95, missed = ([], []) -> missed, p95 = ([], [])": "both begin as the same empty list",
        "return {'p95': torch.stack(p95), 'missed': torch.stack(missed)} -> return {'p95': p95, 'missed': torch.stack(missed)}":
            "a list of tensors of one number counts as those numbers",
        "return {'p95': torch.stack(p95), 'missed': torch.stack(missed)} -> return {'p95': torch.stack(p95), 'missed': missed}":
            "a list of tensors of one number counts as those numbers",
        "recent = seconds[max(0, end - window):end] -> recent = seconds[max(end - window, 0):end]": "the larger of two has no order",
    },
    "lab-drift": {
        "mean = values.cumsum(0) / torch.arange(1, len(values) + 1) -> mean = values.cumsum(-1) / torch.arange(1, len(values) + 1)":
            "a vector's first dimension is its last",
        "total = (values - mean - delta).cumsum(0) -> total = (values - mean - delta).cumsum(-1)": "a vector's first dimension is its last",
        "evidence = total - total.cummin(0).values -> evidence = total - total.cummin(-1).values": "a vector's first dimension is its last",
    },
    "few-shot-paired": {
        "half = 1.96 * differences.std() / len(differences) ** 0.5 -> half = 1.96 * differences.std() / len(first) ** 0.5":
            "there are as many differences as episodes",
        "half = 1.96 * differences.std() / len(differences) ** 0.5 -> half = 1.96 * differences.std() / len(second) ** 0.5":
            "there are as many differences as episodes",
    },
    "deploy-mixed-batch": {
        "for k in range(len(A)): -> for k in range(len(B)):": "there are as many A as B",
    },
    "deploy-router": {
        "spread = features - centroids[routes] -> spread = centroids[routes] - features": "the sign cancels in the covariance",
        "spread = features - centroids[routes] -> spread = -(features - centroids[routes])": "the sign cancels in the covariance",
        "covariance = spread.T @ spread / len(features) -> covariance = features.T @ spread / len(features)":
            "what is left within a route sums to zero, so its product with the centroids is zero",
        "covariance = spread.T @ spread / len(features) -> covariance = spread.T @ features / len(features)":
            "what is left within a route sums to zero, so its product with the centroids is zero",
        "covariance = spread.T @ spread / len(features) -> covariance = spread.T @ spread / len(routes)": "every feature has a route",
        "covariance = spread.T @ spread / len(features) -> covariance = spread.T @ spread / len(spread)": "every feature has a rest",
        "away = queries.unsqueeze(1) - centroids -> away = centroids - queries.unsqueeze(1)": "a squared distance has no sign",
        "away = queries.unsqueeze(1) - centroids -> away = -(queries.unsqueeze(1) - centroids)": "a squared distance has no sign",
    },
    "deploy-risk-coverage": {
        "wrong = (~correct[confidence.argsort(descending=True)]).cumsum(dim=0) -> "
        "wrong = (~correct[confidence.argsort(descending=True)]).cumsum(dim=-1)":
            "a vector's first dimension is its last",
        "answered = torch.ones_like(wrong).cumsum(dim=0) -> answered = torch.ones_like(confidence).cumsum(dim=0)":
            "there is a confidence for every answer",
        "answered = torch.ones_like(wrong).cumsum(dim=0) -> answered = torch.ones_like(correct).cumsum(dim=0)": "a sum of booleans counts them",
        "answered = torch.ones_like(wrong).cumsum(dim=0) -> answered = torch.ones_like(wrong).cumsum(dim=-1)":
            "a vector's first dimension is its last",
    },
    "deploy-ensemble": {
        "return weighted.sum(dim=0).log_softmax(dim=-1) -> return weighted.sum(dim=0).log_softmax(dim=1)": "dimension 1 of two is the last one",
    },
    "lora-count": {
        "return sum((rank * (outputs + inputs) for outputs, inputs in shapes)) -> "
        "return sum((rank * (outputs + inputs) for inputs, outputs in shapes))":
            "the two names are only added",
    },
    "lora-rank-needed": {
        "energy = torch.linalg.svdvals(update) ** 2 -> energy = -torch.linalg.svdvals(update) ** 2": "the sign cancels in the quotient",
        "kept = energy.cumsum(0) / energy.sum() -> kept = energy.cumsum(-1) / energy.sum()": "a vector's first dimension is its last",
        "return int((kept < share).sum()) + 1 -> return (kept < share).sum() + 1": "a tensor of one number counts as that number",
        "return int((kept < share).sum()) + 1 -> return int((kept <= share).sum()) + 1":
            "rounding decides whether a share is met exactly: no case asks",
    },
    "qlora-levels": {
        "quantiles = torch.special.ndtri(torch.cat([below, above[1:]])) -> quantiles = -torch.special.ndtri(torch.cat([below, above[1:]]))":
            "the sign cancels in the division by the last",
    },
    "qlora-blocks": {
        "codes = (blocks / scales.clamp(min=1e-38) - levels).abs().argmin(dim=-1) -> "
        "codes = (levels - blocks / scales.clamp(min=1e-38)).abs().argmin(dim=-1)": "a distance has no sign",
    },
    "instruct-log-likelihood": {
        "supervised = targets != -100 -> supervised = targets > -100": "tokens are numbered from 0, so no label lies below -100",
        "log_p = torch.log_softmax(logits[:, :-1], dim=-1) -> log_p = torch.log_softmax(logits, dim=-1)": "gather leaves the last place out",
        "log_p = torch.log_softmax(logits[:, :-1], dim=-1) -> log_p = torch.log_softmax(logits[:,], dim=-1)": "gather leaves the last place out",
        "log_p = torch.log_softmax(logits[:, :-1], dim=-1) -> log_p = torch.log_softmax(logits[:, :], dim=-1)": "gather leaves the last place out",
        "return (chosen * supervised).sum(dim=1) -> return (chosen * supervised).sum(dim=-1)": "dimension 1 of two is the last one",
    },
    "instruct-error-matrix": {
        "successes, trials = torch.zeros(2, len(colours), len(colours)) -> trials, successes = torch.zeros(2, len(colours), len(colours))":
            "both begin as the same zeros",
        "successes, trials = torch.zeros(2, len(colours), len(colours)) -> successes, trials = -torch.zeros(2, len(colours), len(colours))":
            "minus zero is zero",
        "successes[place] += float(success) -> successes[place] += success": "torch adds a boolean as 0 or 1",
    },
    "instruct-attention-share": {
        "rows = attention[:, positions] -> rows = -attention[:, positions]": "the sign cancels in the quotient",
    },
    "sft-masked-loss": {
        "supervised = targets != -100 -> supervised = targets > -100": "tokens are numbered from 0, so no label lies below -100",
        "chosen = log_probability[supervised].gather(-1, targets[supervised].unsqueeze(-1)) -> "
        "chosen = log_probability[supervised].gather(1, targets[supervised].unsqueeze(-1))": "dimension 1 of two is the last one",
        "chosen = log_probability[supervised].gather(-1, targets[supervised].unsqueeze(-1)) -> "
        "chosen = log_probability[supervised].gather(-1, targets[supervised].unsqueeze(1))": "dimension 1 of two is the last one",
    },
    "sft-logit-gradient": {
        "supervised = targets != -100 -> supervised = targets > -100": "tokens are numbered from 0, so no label lies below -100",
        "gradient = torch.zeros_like(logits) -> gradient = -torch.zeros_like(logits)": "minus zero is zero",
        "gradient[supervised] = torch.softmax(logits[supervised], dim=-1) -> gradient[supervised] = torch.softmax(logits[supervised], dim=1)":
            "dimension 1 of two is the last one",
    },
}

every_exercise = pytest.mark.parametrize("asked", EXERCISES.values(), ids=list(EXERCISES))
every_mistake = pytest.mark.parametrize("asked, sentence", [
    pytest.param(e, sentence, id=f"{e.id}-{mistake.__name__.strip('_')}")
    for e in EXERCISES.values() for sentence, mistake in e.misconceptions.items()
])  # fmt: skip


@cache
def lessons() -> dict[str, Cells]:
    """Path -> what runs of the notebook, for every notebook with exercises."""
    notebooks = {path: read_notebook(path) for path in sorted(NOTEBOOKS.glob("*.ipynb"))}
    return {path: cells_of(notebook, exercise_ids_of(notebook)) for path, notebook in notebooks.items() if exercise_ids_of(notebook)}


def lesson_of(asked):
    """(path, cells) of the notebook that asks the exercise."""
    found = [(path, cells) for path, cells in lessons().items() if asked.id in cells.exercises]
    assert len(found) == 1, f"{asked.id} has a cell in {len(found)} notebooks"
    return found[0]


def defined(asked, source=None, filename="<cell>"):
    """What the student's cell defines: the exercise cells down to this one are run in order; `source` stands in place of this one."""
    _, cells = lesson_of(asked)
    ids = list(cells.exercises)
    sources = {id: cells.exercises[id] for id in ids[: ids.index(asked.id)]} | {asked.id: source or cells.exercises[asked.id]}
    namespace = {"__name__": "__main__"}
    exec(compile(imports_needed(cells.setup, "\n".join(sources.values())), "<setup>", "exec"), namespace)
    for id, text in sources.items():
        exec(compile(text, filename if id == asked.id else "<cell>", "exec"), namespace)
    return namespace[asked.entry]


def imports_needed(setup, sources):
    """The imports of the set-up cell whose names the cells use: the others load models and simulators, which takes seconds."""
    used = {node.id for node in ast.walk(ast.parse(sources)) if isinstance(node, ast.Name)}
    kept = [node for node in ast.parse(setup).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    for node in kept:
        node.names = [a for a in node.names if (a.asname or a.name).partition(".")[0] in used]
    return ast.unparse(ast.Module([node for node in kept if node.names], []))


def notebook_solution(asked):
    return defined(asked)


def second_module(asked):
    return import_module(f"second_solutions.{type(asked).__module__.rpartition('.')[2]}")


def second_solution(asked):
    return getattr(second_module(asked), asked.entry)


def almost_right(asked):
    """Answers that are wrong on unusual inputs only; none where the module is missing, which the test of right answers reports."""
    try:
        return getattr(second_module(asked), "ALMOST_RIGHT", {}).get(asked.entry, [])
    except ModuleNotFoundError:
        return []


def stub(asked):
    """The student's cell as it is handed out."""
    path, _ = lesson_of(asked)
    copy = without_solutions(nbformat.read(path, as_version=4))
    return defined(asked, next(cell.source for cell in copy.cells if grade_id(cell) == asked.id))


every_almost_right = pytest.mark.parametrize("asked, entry", [
    pytest.param(e, entry, id=f"{e.id}-{entry.__name__}") for e in EXERCISES.values() for entry in almost_right(e)
])  # fmt: skip


def verdict(asked, entry, secret=PUBLIC, hidden=False):
    return judge(asked, lambda case: answer(entry, case), secret, hidden)


def verdict_on(asked, answers, secret=PUBLIC, hidden=False):
    """What is said of these answers, one for each case."""
    left = iter(answers)
    return judge(asked, lambda case: next(left), secret, hidden)


def drawn_with_expected(asked, secret=PUBLIC, hidden=False):
    return [(case, asked.expected(case)) for case in asked.drawn(secret, hidden)]


@every_exercise
@pytest.mark.parametrize("solution", [notebook_solution, second_solution], ids=["notebook", "second"])
def test_right_answers_earn_all_points_on_public_cases_and_on_those_of_any_secret(asked, solution):
    entry = solution(asked)
    for found in [verdict(asked, entry), *(verdict(asked, entry, secret, hidden=True) for secret in SECRETS)]:
        assert (found.status, found.earned, found.passed) == (CORRECT, asked.points, found.total), found


@every_exercise
def test_rounding_costs_a_right_answer_no_point_under_any_of_many_secrets(asked):
    entry = second_solution(asked)
    assert {verdict(asked, entry, f"student {n}", hidden=True).status for n in range(30)} == {CORRECT}


@every_exercise
def test_the_order_of_the_lesson_is_that_of_the_notebook(asked):
    path, cells = lesson_of(asked)
    assert [e.id for e in exercises_of(path.stem)] == list(cells.exercises)


@every_mistake
def test_each_known_mistake_is_named_by_its_own_sentence(asked, sentence):
    """So no two mistakes of an exercise give the same answers to the public cases, or the later one would bear the earlier one's name."""
    mistake = asked.misconceptions[sentence]
    found = verdict(asked, mistake)
    assert (found.status, found.earned, found.misconception) == (WRONG, 0, sentence)
    assert found.sentence in {sentence.format(**case.facts) for case in asked.drawn()}


@every_mistake
def test_each_known_mistake_answers_every_public_case(asked, sentence):
    """A mistake that raises would lend its sentence to everything else that raises."""
    answers = [answer(asked.misconceptions[sentence], case) for case in asked.drawn()]
    assert not [given for given in answers if isinstance(given, Raised)]


@every_mistake
def test_each_known_mistake_fails_on_the_hidden_cases_of_any_secret(asked, sentence):
    for secret in SECRETS:
        assert verdict(asked, asked.misconceptions[sentence], secret, hidden=True).status == WRONG, secret


@every_exercise
def test_sentences_fit_every_case_differ_and_end_with_a_full_stop(asked):
    for case in chain(asked.drawn(), *(asked.drawn(secret, hidden=True) for secret in SECRETS)):
        said = [sentence.format(**case.facts) for sentence in asked.misconceptions]
        must, says = case.must.format(**case.facts), case.says.format(**case.facts)
        assert len(set(said)) == len(said)
        assert [s for s in [*said, must] if not re.fullmatch(r"[^{}\n]+[^.{}]\.", s)] == []
        assert re.fullmatch(r"[^{}\n]+[^.{}]", says), "it stands in the middle of a sentence"


@every_exercise
def test_the_stub_of_the_student_s_copy_is_not_attempted(asked, capsys):
    assert check(stub(asked), asked.id) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{asked.id}: {NOT_ATTEMPTED} (0 of {asked.points} points). `{asked.entry}`") and said.count("\n") == 1


@every_exercise
def test_half_an_answer_is_not_attempted(asked):
    right = [expected for _, expected in drawn_with_expected(asked)]
    for place in range(len(right)):
        found = verdict_on(asked, [*right[:place], Raised("NotImplementedError"), *right[place + 1 :]])
        assert (found.status, found.earned, found.passed) == (NOT_ATTEMPTED, 0, len(right) - 1)


@cache
def fates(id):
    """What was changed -> which cases notice it: "public", "hidden", or None where neither does."""
    asked = EXERCISES[id]
    public, hidden = drawn_with_expected(asked), drawn_with_expected(asked, SECRETS[0], hidden=True)
    found = {}
    for mutant in mutants_of(lesson_of(asked)[1].exercises[id]):
        noticed = next((name for name, cases in (("public", public), ("hidden", hidden)) if is_noticed(asked, mutant, cases)), None)
        found[mutant.what] = noticed if mutant.what not in found or noticed is None else found[mutant.what]
    return found


def is_noticed(asked, mutant, cases):
    with at_most():
        entry = defined(asked, mutant.source, FILENAME)
        return any(difference(answer(entry, case), expected, asked.close) for case, expected in cases)


@every_exercise
@pytest.mark.filterwarnings("ignore")
def test_every_small_change_of_the_solution_is_rejected(asked):
    noticed, equivalent = fates(asked.id), EQUIVALENT.get(asked.id, {})
    counts = {by: list(noticed.values()).count(by) for by in ("public", "hidden", None)}
    print(f"{asked.id}: {len(noticed)} mutants, {counts['public']} rejected by the public cases alone, {counts['hidden']} more by the hidden ones, "
          f"{counts[None]} by neither; {len(equivalent)} are known to compute the same")
    assert [what for what, by in noticed.items() if by is None and what not in equivalent] == []


@pytest.mark.parametrize("id, what", [pytest.param(id, what, id=f"{id}-{n}") for id, changes in EQUIVALENT.items() for n, what in enumerate(changes)])
@pytest.mark.filterwarnings("ignore")
def test_every_change_that_is_called_equivalent_is_made_and_not_rejected(id, what):
    assert fates(id).get(what, "no such mutant") is None and EQUIVALENT[id][what]


@every_almost_right
def test_an_answer_that_is_wrong_on_unusual_inputs_fails_on_the_hidden_cases_of_any_secret(asked, entry):
    for secret in SECRETS:
        assert verdict(asked, entry, secret, hidden=True).status == WRONG, secret


def kinds(code):
    source = f"def f(a, b):\n    c = a[1:]\n    ### BEGIN SOLUTION\n    {code}\n    ### END SOLUTION\n    return a + 1"
    return {mutant.what.removeprefix(f"{code} -> ") for mutant in mutants_of(source)}


@pytest.mark.parametrize("code, some", [
    ("b = 3", {"pass", "b = 4", "b = 2", "b = -3"}),
    ("b = -1", {"b = 0", "b = -2", "b = 1"}),
    ("b = a < c", {"b = a <= c", "b = a == c", "b = b < c", "b = ~(a < c)"}),
    ("b = a - c", {"b = a + c", "b = c - a", "b = a", "b = -(a - c)"}),
    ("b = a[1:]", {"b = a", "b = a[0:]", "b = a[2:]", "b = a[:]", "b = a[1:-1]"}),
    ("b = a[:len(c)]", {"b = a[:len(c) + 1]", "b = a[:len(c) - 1]", "b = a[1:len(c)]", "b = a[:len(b)]"}),
    ("b = a[c]", {"b = a[~c]", "b = a[b]"}),
    ("b = ~a", {"b = a"}),
    ("b = a.mean(dim=0)", {"b = a.sum(dim=0)", "b = a.mean(dim=-1)", "b = a.mean()", "b = a"}),
    ("b = f(a, 2)", {"b = f(2, a)", "b = f(a)", "b = a"}),
    ("b += a", {"b -= a", "b = a", "pass"}),
    ("return (a, c)", {"return (c, a)", "return (a,)", "pass"}),
    ("b = a if c else b", {"b = a", "b = b"}),
    ("b = [i for i in a if i > 0]", {"b = [i for i in a]", "b = [i for i in a if i >= 0]"}),
    ("b = a and c", {"b = a or c", "b = c"}),
])
def test_the_usual_slips_are_among_the_mutants(code, some):
    assert some <= kinds(code)


def test_only_the_solution_is_changed():
    assert all("c = a[1:]\n" in m.source and "return a + 1" in m.source for m in mutants_of(
        "def f(a):\n    c = a[1:]\n    ### BEGIN SOLUTION\n    c = 2 * a\n    ### END SOLUTION\n    return a + 1"))


def test_a_mutant_that_never_ends_is_stopped():
    namespace = {}
    exec(compile("def f():\n    while True:\n        pass", FILENAME, "exec"), namespace)
    with pytest.raises(RecursionError), at_most(1000):
        namespace["f"]()


def numbers_in(value):
    """Every number in nested lists, dicts and tensors."""
    if isinstance(value, dict):
        return list(chain(*map(numbers_in, value.values())))
    if isinstance(value, (list, tuple)):
        return list(chain(*map(numbers_in, value)))
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return torch.as_tensor(value).double().flatten().tolist()
    return [float(value)] if isinstance(value, (bool, int, float, np.number)) else []


def told(sentence, secret, known):
    """Numbers of `secret` that the sentence gives to three digits or more, and that are not among the `known` ones."""
    found = []
    for text in re.findall(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?", sentence):
        mantissa, _, exponent = text.partition("e")
        half_a_unit = 0.5001 * 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))

        def agrees(values, number=float(text), margin=half_a_unit):
            return bool((np.abs(np.array(values, float) - number) <= margin).any())

        if len(re.sub(r"\D", "", mantissa).lstrip("0")) >= 3 and agrees(secret) and not agrees(known):
            found.append(text)
    return found


def changed(value, change):
    """The nested value with `change` done to every number and tensor."""
    if isinstance(value, dict):
        return {name: changed(item, change) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [changed(item, change) for item in value]
    return value if value is None or isinstance(value, str) else change(torch.as_tensor(value))


CHANGES = {
    "one more": lambda v: v + 1, "slightly more": lambda v: v * 1.05 + 0.05, "negative": lambda v: -v - 0.5, "nan": lambda v: v * float("nan"),
    "inf": lambda v: v + float("inf"), "one more dimension": lambda v: v[None] + 1, "text": lambda v: "text", "nothing": lambda v: None,
    "reversed": lambda v: v.flatten().flip(0).reshape(v.shape) + 0.5,
}  # fmt: skip


def known_numbers(asked, cases, answers):
    texts = " ".join([*asked.misconceptions, *(case.says + case.must for case in cases)])
    shapes = [item.shape for item in answers if isinstance(item, torch.Tensor)]
    return numbers_in([[case.facts for case in cases], answers, shapes, list(map(float, re.findall(r"-?\d+", texts)))])


@every_exercise
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("only_the_last", [False, True], ids=["all", "last"])
def test_no_sentence_tells_a_hidden_answer(asked, change, only_the_last):
    for secret in SECRETS[:2]:
        cases, right = zip(*drawn_with_expected(asked, secret, hidden=True))
        wrong = [e if only_the_last and i < len(right) - 1 else changed(e, CHANGES[change]) for i, e in enumerate(right)]
        found = verdict_on(asked, wrong, secret, hidden=True)
        assert found.status == WRONG
        assert told(found.sentence, numbers_in(right), known_numbers(asked, cases, wrong)) == [], found.sentence


@every_mistake
def test_no_sentence_of_a_known_mistake_tells_a_hidden_answer(asked, sentence):
    cases, right = zip(*drawn_with_expected(asked, SECRETS[0], hidden=True))
    given = [answer(asked.misconceptions[sentence], case) for case in cases]
    said = verdict_on(asked, given, SECRETS[0], hidden=True).sentence
    assert told(said, numbers_in(right), known_numbers(asked, cases, given)) == [], said


@pytest.mark.parametrize("sentence, found", [
    ("your answer is 2, not 0.3679", ["0.3679"]), ("not 3.68e-01", ["3.68e-01"]), ("not 0.36", []), ("your answer is 1.234", []),
    ("token 417 is wanted", ["417"]),
])
def test_a_told_number_would_be_found(sentence, found):
    assert told(sentence, [np.exp(-1), 417, 1.234], [2, 1.234]) == found


class Doubled(Exercise):
    """Twice the input."""

    id, points, minutes, entry = "doubled", 2, 1, "doubled"

    def cases(self, rng, hidden):
        for asks in (("output",), ("output", "gradients")):
            yield Case({"x": torch.from_numpy(rng.normal(size=3))}, "{n} numbers", "Each is doubled.", {"n": 3}, asks, ("x",))

    def expected(self, case):
        output = 2 * case.arguments["x"].numpy()
        return output if case.asks == ("output",) else {"output": output, "gradients": {"x": [2, 2, 2]}}


class Unprintable:
    def __repr__(self):
        raise ValueError("no")


class Unsayable(Exception):
    def __str__(self):
        raise ValueError("no")


def raising(error):
    def doubled(x):
        raise error

    return doubled


def endless(x):
    return endless(x)


SAID = {
    "nothing": (lambda x: None, r"`doubled` returns None: is `return` missing\?"),
    "text": (lambda x: "six", r"your answer is 'six', not numbers\."),
    "an empty list": (lambda x: [], r"your answer is \[\], not numbers\."),
    "a dict": (lambda x: {"a": 1}, r"your answer is \{'a': 1\}, not numbers\."),
    "rows of different lengths": (lambda x: [[1], [1, 2]], r"your answer is \[\[1\], \[1, 2\]\], not numbers\."),
    "a shape": (lambda x: 2 * x[:2], r"has shape \(2,\), not \(3,\)\."),
    "a number": (lambda x: 7, r"has shape \(\), not \(3,\)\."),
    "other numbers": (lambda x: [7, 8, 9], r"your answer is \[7, 8, 9\], which is not right\. Each is doubled\."),
    "nan": (lambda x: 2 * x + float("nan"), r"your answer holds nan\."),
    "inf": (lambda x: [1.0, float("inf"), 2.0], r"your answer holds inf\."),
    "complex numbers": (lambda x: x * (1 + 2j), r"\dj\b.*not numbers\."),
    "a complex number": (lambda x: 1 + 2j, r"your answer is \(1\+2j\), not numbers\."),
    "a huge integer": (lambda x: 10**400, r"your answer is 10000+ \.\.\., not numbers\."),
    "an integer too long to write": (lambda x: 10**5000, r"your answer is .*\bint\b.*, not numbers\."),
    "a list with such an integer": (lambda x: [10**5000, 1, 2], r"your answer is .*\blist\b.*, not numbers\."),
    "an object that cannot be shown": (lambda x: Unprintable(), r"your answer is .*Unprintable.*, not numbers\."),
    "a tensor without values": (lambda x: torch.zeros(3, device="meta"), r"your answer is .*meta.*, not numbers\."),
    "a sparse tensor": (lambda x: torch.ones(3).to_sparse(), r"your answer is .*tensor.*"),
    "a class": (lambda x: Exercise, r"your answer is <class .*>, not numbers\."),
    "an iterator": (lambda x: iter([1, 2, 3]), r"your answer is <list_iterator.*>, not numbers\."),
    "detached": (lambda x: 2 * x.detach(), r"no gradient flows back from the output"),
    "numpy": (lambda x: 2 * x.detach().numpy(), r"no gradient flows back from the output"),
    "too few parameters": (lambda: 0, r"it raises TypeError: .*takes 0 positional arguments but 1 was given"),
    "too many parameters": (lambda x, y: 0, r"it raises TypeError: .*missing 1 required positional argument: 'y'"),
    "an error": (raising(ValueError("too bad")), r"it raises ValueError.*: too bad\."),
    "an error in the middle of {braces}": (raising(KeyError("{n} {missing}")), r"it raises KeyError.*\{n\} \{missing\}"),
    "an error without words": (raising(ValueError()), r"it raises ValueError\.$"),
    "an error with a full stop": (raising(ValueError("too bad.")), r"it raises ValueError: too bad\.$"),
    "an error that cannot be said": (raising(Unsayable()), r"it raises Unsayable"),
    "a way out": (raising(SystemExit(0)), r"it raises SystemExit"),
    "endless recursion": (endless, r"it raises RecursionError.*maximum recursion depth"),
    "torch's own NotImplementedError": (lambda x: torch.softmax(torch.arange(3), 0), r"it raises NotImplementedError.*not implemented for 'Long'"),
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
@pytest.mark.filterwarnings("error")
def test_whatever_comes_back_gets_a_sentence_that_fits(name):
    entry, said = SAID[name]
    found = verdict(Doubled(), entry)
    assert (found.status, found.earned, found.misconception) == (WRONG, 0, None)
    assert re.search(said, found.sentence), found.sentence
    assert not found.sentence.startswith("With") or found.sentence.startswith("With 3 numbers: ")


@every_exercise
@pytest.mark.parametrize("name", SAID)
@pytest.mark.filterwarnings("ignore")
def test_whatever_comes_back_is_no_right_answer_of_an_exercise(asked, name):
    said, _ = SAID[name]
    found = verdict(asked, said if "parameters" in name else lambda *arguments: said(torch.ones(3)))
    assert found.status == WRONG and found.earned == 0 and len(found.sentence) < 1000


@pytest.mark.parametrize("container", [
    lambda x: 2 * x, lambda x: (2 * x).float(), lambda x: list(2 * x), lambda x: tuple(2 * x), lambda x: torch.nn.Parameter(x + x),
], ids=["tensor", "single precision", "list", "tuple", "parameter"])  # fmt: skip
def test_numbers_are_right_in_whatever_they_are_kept(container):
    cases = Doubled().drawn()[:1]
    assert difference(answer(container, cases[0]), Doubled().expected(cases[0]), Doubled.close) == ""


def test_a_named_tuple_is_a_tuple():
    asked, Pair = EXERCISES["sft-labels"], namedtuple("Pair", "input_ids labels")
    assert verdict(asked, lambda *arguments: Pair(*second_solution(asked)(*arguments))).status == CORRECT


def test_two_tensors_of_which_one_is_too_short_are_told_apart():
    asked = EXERCISES["sft-labels"]

    def training_sequence(*arguments):
        input_ids, labels = second_solution(asked)(*arguments)
        return input_ids, labels[1:]

    assert "number 1 has shape (4,), not (5,)." in verdict(asked, training_sequence).sentence


@pytest.mark.parametrize("code", ["raise ValueError('too bad')", "torch.nn.functional.cross_entropy(torch.zeros(2, 3), torch.tensor([5, 5]))"])
@pytest.mark.parametrize("filename", ["/tmp/ipykernel_1/123.py", "<cell>", r"C:\Temp\ipykernel_12\3.py"])
def test_an_error_is_found_in_the_line_of_the_student_s_cell(code, filename):
    namespace = {"torch": torch}
    exec(compile(f"def doubled(x):\n    y = 2 * x\n    {code}\n    return y", filename, "exec"), namespace)
    assert re.search(r"it raises \w+ in line 3 of your cell: ", verdict(Doubled(), namespace["doubled"]).sentence)


@pytest.mark.parametrize("entry", [
    raising(ValueError("first\nsecond \x1b[31mred")), raising(type("Two\nlines", (Exception,), {})()), lambda x: torch.ones(3, 3, 3) * 1j,
], ids=["message", "kind", "value"])  # fmt: skip
def test_a_verdict_is_one_printable_line(entry):
    assert str(verdict(Doubled(), entry)).isprintable()


@pytest.fixture
def no_traces(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(registry, "_EXERCISES", all_exercises())


@pytest.fixture
def doubled_is_asked(no_traces):
    exercise("doubled", points=2, minutes=1)(Doubled)


def doubled(x):
    return x + x


def test_check_prints_one_verdict_and_returns_the_points(doubled_is_asked, capsys):
    assert check(doubled) == 2
    assert capsys.readouterr().out == "doubled: correct (2 of 2 points). All 2 cases agree with an independent calculation.\n"
    assert check(lambda x: x, exercise="doubled") == 0
    said = capsys.readouterr().out
    assert said.startswith("doubled: not yet (0 of 2 points, 0 of 2 cases). With 3 numbers: ") and said.count("\n") == 1


@pytest.mark.parametrize("call", [lambda: check(len), lambda: check(doubled, "no-such-id"), lambda: check(3), lambda: trusted(len, otherwise=len)])
def test_who_checks_something_else_hears_what_can_be_checked(call):
    with pytest.raises(ValueError) as error:
        call()
    assert [e.id for e in EXERCISES.values() if f"{e.entry} ({e.id})" not in str(error.value)] == []


def test_an_unsolved_exercise_is_replaced_by_the_library_s(doubled_is_asked, capsys):
    assert trusted(doubled, otherwise=len) is doubled
    assert trusted(raising(NotImplementedError()), otherwise=len) is len
    assert capsys.readouterr().out.splitlines() == [
        "From here on: your own doubled.", "From here on: the library version of doubled (not attempted).",
    ]  # fmt: skip


@every_exercise
def test_what_the_student_changes_in_place_reaches_no_case(asked):
    cases, before = asked.drawn(), asked.drawn()

    def spoil(*arguments):
        for value in arguments:
            with torch.no_grad():
                value.zero_()
        return arguments[0]

    for case in cases:
        answer(spoil, case)
    assert list(map(content, cases)) == list(map(content, before))


def test_nested_arguments_are_copies():
    case = Case({"x": {"a": [torch.ones(2), [1, 2]]}}, "", "")

    def spoil(x):
        x["a"][0].zero_()
        x["a"][1].append(3)
        x["b"] = 0

    answer(spoil, case)
    assert content(case.arguments) == content({"x": {"a": [torch.ones(2), [1, 2]]}})


def test_what_is_returned_is_not_changed_afterwards():
    kept = torch.zeros(1)

    def count(x):
        kept.add_(1)
        return kept

    case = Case({"x": 1}, "", "")
    first, second = answer(count, case), answer(count, case)
    assert (float(first), float(second)) == (1, 2)


def test_arguments_carry_a_gradient_only_where_one_is_asked_for():
    case, with_gradient = Doubled().drawn()
    assert answer(lambda x: x.requires_grad, case) is False
    assert answer(lambda x: x * x.requires_grad, with_gradient)["gradients"]["x"].tolist() == [1, 1, 1]


def test_check_leaves_the_random_numbers_alone_and_gives_every_call_the_same(doubled_is_asked):
    drawn = []

    def noisy(x):
        drawn.append(torch.rand(1).item())
        return 2 * x

    before = torch.get_rng_state()
    assert check(noisy, "doubled") == 2
    assert torch.equal(torch.get_rng_state(), before)
    assert len(drawn) == 2 and len(set(drawn)) == 1


def test_check_leaves_the_random_numbers_of_other_devices_alone(doubled_is_asked, monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    assert check(doubled) == 2 and seeded == []


class Adapter(torch.nn.Module):
    def __init__(self, inputs, outputs, rank):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(outputs, inputs), requires_grad=False)
        self.down = torch.nn.Parameter(torch.randn(rank, inputs))
        self.up = torch.nn.Parameter(torch.zeros(outputs, rank))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x):
        self.calls += 1
        return x @ self.weight.T + x @ self.down.T @ self.up.T


class WithoutTheFrozenLayer(Adapter):
    def forward(self, x):
        return super().forward(x) - x @ self.weight.T


class Adapted(Exercise):
    """A frozen linear layer with a trainable branch of low rank."""

    entry = "Adapter"

    def cases(self, rng, hidden):
        def draw(*shape):
            return torch.from_numpy(rng.normal(size=shape)).float()

        for rows, inputs, outputs, rank in [(2, 3, 4, 1), (5, 4, 3, 2)]:
            yield Case(
                {"x": draw(rows, inputs)}, "{rows} rows", "The branch is added to the frozen layer.", {"rows": rows},
                asks=("output", "gradients", "state", "trainable"), gradients=("x", "weight", "down", "up"), cotangent=draw(rows, outputs),
                build={"inputs": inputs, "outputs": outputs, "rank": rank},
                state={"weight": draw(outputs, inputs), "down": draw(rank, inputs), "up": draw(outputs, rank), "calls": torch.tensor(7)},
            )  # fmt: skip

    def expected(self, case):
        x, cotangent = case.arguments["x"].numpy(), case.cotangent.numpy()
        weight, down, up = (case.state[name].numpy() for name in ("weight", "down", "up"))
        return {
            "output": x @ (weight + up @ down).T,
            "gradients": {"x": cotangent @ (weight + up @ down), "weight": None, "down": up.T @ cotangent.T @ x, "up": cotangent.T @ x @ down.T},
            "state": {**case.state, "calls": 8},
            "trainable": {"down": down.size, "up": up.size},
        }

    misconceptions = {"With {rows} rows the frozen layer is missing.": WithoutTheFrozenLayer}


@pytest.fixture
def adapted(no_traces):
    exercise("adapted", points=5, minutes=9)(Adapted)
    return all_exercises()["adapted"]


def test_a_right_class_earns_its_points(adapted, capsys):
    assert check(Adapter) == 5
    assert capsys.readouterr().out.startswith("adapted: correct (5 of 5 points)")


def test_a_known_mistake_in_a_class_is_named(adapted):
    assert verdict(adapted, WithoutTheFrozenLayer).sentence == "With 2 rows the frozen layer is missing."


def test_the_state_and_the_arguments_of_the_constructor_are_copies(adapted):
    class Spoiled(Adapter):
        def forward(self, x):
            found = super().forward(x)
            with torch.no_grad():
                self.weight.zero_(), x.zero_()
            return found

    case = adapted.drawn()[0]
    answer(Spoiled, case)
    assert content(case) == content(adapted.drawn()[0])


class OtherNames(Adapter):
    def __init__(self, inputs, outputs, rank):
        super().__init__(inputs, outputs, rank)
        self.A, self.B = self.down, self.up
        del self.down, self.up


class OtherSizes(Adapter):
    def __init__(self, inputs, outputs, rank):
        super().__init__(outputs, inputs, rank)


class OtherArguments(Adapter):
    def __init__(self, inputs, outputs, r):
        super().__init__(inputs, outputs, r)


class FrozenBranch(Adapter):
    def __init__(self, inputs, outputs, rank):
        super().__init__(inputs, outputs, rank)
        self.up.requires_grad_(False)


class TrainedLayer(Adapter):
    def __init__(self, inputs, outputs, rank):
        super().__init__(inputs, outputs, rank)
        self.weight.requires_grad_(True)


class WrongGradient(Adapter):
    def forward(self, x):
        return super().forward(x) + x @ self.down.T @ (self.up - self.up.detach()).T


class Detached(Adapter):
    def forward(self, x):
        return super().forward(x).detach()


class Transposed(Adapter):
    def forward(self, x):
        return super().forward(x).T


class NotCounted(Adapter):
    def forward(self, x):
        self.calls -= 1
        return super().forward(x)


@pytest.mark.parametrize("entry, said", [
    (OtherNames, r"the parameters are A, B, calls, weight; the exercise asks for calls, down, up, weight\."),
    (OtherSizes, r"size mismatch for weight"),
    (OtherArguments, r"it raises TypeError: .*unexpected keyword argument 'rank'"),
    (FrozenBranch, r"your answer, gradients, up is (missing|None)"),
    (TrainedLayer, r"your answer, gradients, weight is a tensor \(4, 3\)"),
    (WrongGradient, r"your answer, gradients, up is a tensor \(4, 1\) .*, which is not right\."),
    (Detached, r"no gradient flows back from the output"),
    (Transposed, r"output has shape \(4, 2\), not \(2, 4\)\."),
    (NotCounted, r"your answer, state, calls is 7, which is not right\."),
])
def test_what_is_wrong_with_a_class_is_said(adapted, entry, said):
    found = verdict(adapted, entry)
    assert found.status == WRONG and re.search(said, found.sentence), found.sentence


def test_a_class_without_forward_is_told_that_it_is_missing(adapted):
    class Adapter(torch.nn.Module):
        def __init__(self, inputs, outputs, rank):
            super().__init__()
            self.weight, self.down, self.up = (torch.nn.Parameter(torch.zeros(s)) for s in ((outputs, inputs), (rank, inputs), (outputs, rank)))
            self.register_buffer("calls", torch.tensor(0))

    found = verdict(adapted, Adapter)
    assert found.status == WRONG and "forward" in found.sentence


def content(value):
    """Everything in a case, tensors as their bytes, so that == compares bit for bit."""
    if isinstance(value, Case):
        return content(vars(value))
    if isinstance(value, dict):
        return [(name, content(item)) for name, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [content(item) for item in value]
    return (str(value.dtype), tuple(value.shape), value.detach().numpy().tobytes()) if isinstance(value, torch.Tensor) else value


def structure(value):
    """What is asked, without the values."""
    if isinstance(value, Case):
        return [structure(part) for part in (value.arguments, value.build, value.state)] + [value.says, value.must, value.asks, value.gradients]
    if isinstance(value, dict):
        return [(name, structure(item)) for name, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [structure(item) for item in value]
    return (str(value.dtype), tuple(value.shape)) if isinstance(value, torch.Tensor) else type(value)


@every_exercise
def test_a_secret_has_the_same_cases_every_time_and_another_secret_has_others(asked):
    seen = [content(asked.drawn(secret, hidden=True)) for secret in [PUBLIC, *SECRETS]]
    assert seen == [content(asked.drawn(secret, hidden=True)) for secret in [PUBLIC, *SECRETS]]
    assert len({str(cases) for cases in seen}) == len(seen)


@every_exercise
def test_hidden_cases_are_those_that_students_see_with_other_values_and_more(asked):
    public, hidden = asked.drawn(), asked.drawn(SECRETS[0], hidden=True)
    assert len(hidden) > len(public)
    assert list(map(structure, hidden[: len(public)])) == list(map(structure, public))
    assert all(content(a.arguments) != content(b.arguments) for a, b in zip(hidden, public))


def test_a_taken_id_and_a_taken_name_are_refused(no_traces):
    taken = next(iter(EXERCISES.values()))
    with pytest.raises(ValueError, match="there already"):
        exercise(taken.id, points=1, minutes=1)(type("Other", (Exercise,), {"entry": "another"}))
    with pytest.raises(ValueError, match="there already"):
        exercise("another", points=1, minutes=1)(type("Other", (Exercise,), {"entry": taken.entry}))
    assert all_exercises() == EXERCISES


@every_exercise
def test_an_exercise_says_what_it_is(asked):
    assert re.fullmatch(r"[A-Za-z0-9-]+", asked.id), "nbgrader takes no other characters"
    assert asked.points > 0 and asked.minutes > 0 and asked.title.endswith(".")
