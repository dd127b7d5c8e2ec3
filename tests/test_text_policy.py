"""The text model of the appendix: its sentences and answers, what is supervised, and that the robot's functions train it as they train a robot."""

import numpy as np
import pytest
import torch

from labkit import fine_tune, lora
from labkit.batches import IGNORED
from labkit.forgetting import KLAnchor, diagonal_fisher, ewc_penalty, start_of
from labkit.instructions import COLOURS, SHAPES, ZONES, Command, sentences
from labkit.sft import batch_loss, tokenize
from labkit.text_policy import ANSWER, TASKS, all_commands, answer_words, answered, right_answer, text_policy, text_samples


def spelled(places):
    return " ".join(answer_words()[place] for place in places)


@pytest.fixture(scope="module")
def policy():
    return text_policy(width=32)


def test_a_command_is_answered_in_four_words_of_the_course():
    assert right_answer(Command("put", ("red", "cup"), "blue")) == "put red cup blue"
    assert right_answer(Command("pick", ("red", "cup"))) == "pick red cup none"
    assert right_answer(Command("stack", ("red", "cup"), ("green", "block"))) == "stack red cup green"
    for task in (*TASKS, "stack", "forward"):
        for command in all_commands(task):
            words = right_answer(command).split()
            assert len(words) == ANSWER and set(words) <= set(answer_words())


def test_all_commands_are_there_once():
    objects = len(COLOURS) * len(SHAPES)
    assert len(set(all_commands("put"))) == objects * len(COLOURS) and len(set(all_commands("move"))) == objects * len(ZONES)
    assert len(set(all_commands("beside"))) == objects * (len(COLOURS) - 1) * len(SHAPES)


@pytest.mark.parametrize("held_out", [False, True])
def test_a_sentence_says_the_command_of_its_answer(held_out):
    found = text_samples(TASKS, 80, seed=3, held_out=held_out)
    by_answer = {right_answer(command): command for task in TASKS for command in all_commands(task)}
    for n, (said, places) in enumerate(zip(found.instructions, found.actions)):
        command = by_answer[spelled(places)]
        same = [c for c in all_commands(command.task) if right_answer(c) == right_answer(command)]
        assert command.task == TASKS[n % len(TASKS)]
        assert any(text in said for c in same for text in sentences(c, held_out))


def test_backwards_is_another_style_of_the_same_answers():
    plain, turned = text_samples(TASKS, 12, seed=1), text_samples(TASKS, 12, seed=1, backwards=True)
    assert plain.instructions == turned.instructions
    assert np.array_equal(plain.actions[:, ::-1], turned.actions)


def test_one_phrasing_is_always_the_same_and_seeds_are_repeatable():
    one = text_samples(["put"], 200, seed=0, one_phrasing=True)
    said = {}
    for text, places in zip(one.instructions, one.actions):
        assert said.setdefault(spelled(places), text) == text
    assert text_samples(TASKS, 20, seed=5).instructions == text_samples(TASKS, 20, seed=5).instructions
    assert text_samples(TASKS, 20, seed=5).instructions != text_samples(TASKS, 20, seed=6).instructions


def test_the_four_words_and_nothing_else_are_supervised(policy):
    found = text_samples(TASKS, 8, seed=2)
    batch = tokenize(policy, found)
    assert (batch["labels"] != IGNORED).sum(1).tolist() == [ANSWER] * 8
    labels = [" ".join(policy.tokenizer.convert_ids_to_tokens(row)) for row in batch["labels"][:, -ANSWER:].tolist()]
    assert labels == [spelled(places) for places in found.actions]
    for row, text in zip(batch["input_ids"], found.instructions):
        assert policy.tokenizer.decode(row[:-ANSWER], skip_special_tokens=True).split() == text.split()


def test_the_robot_s_loss_on_text_is_transformers_own(policy):
    batch = tokenize(policy, text_samples(TASKS, 8, seed=2))
    with torch.no_grad():
        theirs = policy.model(**batch).loss
        assert torch.isclose(batch_loss(policy.model, batch), theirs, atol=1e-5)


def test_it_learns_in_seconds_and_answers_unseen_sentences():
    policy = text_policy()
    assert answered(policy, "put", 30).rate == 0
    fine_tune(policy, text_samples(TASKS, 2000, seed=1), steps=150, batch_size=32, learning_rate=3e-3, progress=False)
    assert answered(policy, "put", 30).rate > 0.9


def test_lora_trains_its_matrices_alone_and_ewc_and_kl_accept_it(policy):
    found = text_samples(TASKS, 8, seed=4)
    adapted = policy.copy()
    history = fine_tune(adapted, found, steps=2, peft_config=lora(rank=2), progress=False)
    assert history.trainable == 2 * 4 * 2 * (32 + 32)  # layers, projections, rank, both sides
    start, fisher = start_of(policy.model), diagonal_fisher(policy, found)
    assert ewc_penalty(start, fisher, 1.0)(policy.model) == 0
    assert KLAnchor(policy, found, 1.0)(policy.model).abs() < 1e-6
    moved = policy.copy()
    fine_tune(moved, found, steps=2, progress=False)
    assert ewc_penalty(start, fisher, 1.0)(moved.model) > 0 and KLAnchor(policy, found, 1.0)(moved.model) > 0


def test_a_copy_is_independent(policy):
    before = text_samples(TASKS, 4, seed=0)
    copy = policy.copy()
    fine_tune(copy, before, steps=1, progress=False)
    assert not torch.equal(copy.model.lm_head.weight, policy.model.lm_head.weight)
