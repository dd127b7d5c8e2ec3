"""Properties of the course's language: sentences, vocabulary, tokenizer, and the tokens that stand for actions."""

from collections import defaultdict
from itertools import permutations, product

import numpy as np
import pytest

from labkit.actions import BINS, HIGH, LOW, NAMES, action_to_bins, bins_to_action, full_waypoint, small_action
from labkit.batches import action_token_ids
from labkit.instructions import (
    BIN_NOUNS,
    COLOURS,
    EXTREMES,
    FRAMES,
    SHAPE_NOUNS,
    SHAPES,
    ZONES,
    Command,
    say,
    sentences,
    unknown_words,
    vocabulary,
    words,
)
from labkit.tabletop import Variation
from labkit.tabletop.scene import sample_scene
from labkit.tabletop.tasks import TASKS, commands, meaning
from labkit.tiny_vla import build_processor, build_tokenizer

THINGS = list(product(COLOURS, SHAPES))
BLOCKS = [thing for thing in THINGS if thing[1] == "block"]
EVERY_COLOUR = frozenset(COLOURS)
# What the lecture and the lab sheet say to their robots, word for word.
LECTURE_AND_LAB = """
pick up the red cup and place it in the blue bin
pick up the cup
grasp the mug
move the container to the bin
pick up the red cup
place the blue block in the bin
pick up the blue block and place it in the cup
Pick up the leftmost object
pick up the red object
place the blue object in the green container
move the yellow object to the red container
put the fabric in the container
""".strip().splitlines()


def single_commands():
    """Every command of one step that any scene can give."""
    return (
        [Command("pick", a) for a in THINGS]
        + [Command("put", a, c) for a in THINGS for c in COLOURS]
        + [Command("move", a, z) for a in THINGS for z in ZONES]
        + [Command("beside", a, b) for a, b in permutations(THINGS, 2)]
        + [Command("stack", a, b) for a in THINGS for b in BLOCKS if a != b]
        + [Command("forward", a) for a in THINGS]
        + [Command("spatial", a, e) for a in THINGS[:1] for e in EXTREMES]
        + [Command("align", a, c) for a in BLOCKS for c in COLOURS]
    )


def multi_step_commands(count=60):
    """Paths and assemblies of `count` random scenes."""
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng, Variation(novel=bool(i % 2))) for i in range(count)]
    found = {c for scene in scenes for task in ("navigate", "assemble") for c in commands(task, scene)[:: 5]}
    return sorted(found, key=repr)


def framed(texts, frames):
    return [frame.format(s=text) for text in texts for frame in dict.fromkeys(frames)]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory):
    from transformers import AutoProcessor

    folder = tmp_path_factory.mktemp("processor")
    build_processor().save_pretrained(folder)
    return AutoProcessor.from_pretrained(folder)


def every_sentence(held_out):
    frames = FRAMES.held_out if held_out else FRAMES.trained
    texts = [text for c in single_commands() for text in sentences(c, held_out, EVERY_COLOUR)]
    return framed(texts, frames) + [text for c in multi_step_commands() for text in sentences(c, held_out, EVERY_COLOUR)]


@pytest.fixture(scope="module")
def trained_and_held_out(tokenizer):
    """For both kinds of phrasing, every sentence with every polite frame, and its token ids."""
    both = []
    for held_out in (False, True):
        texts = list(dict.fromkeys(every_sentence(held_out)))
        both.append((texts, tokenizer(texts)["input_ids"]))
    return both


def test_every_sentence_of_every_command_tokenizes_without_an_unknown_word(trained_and_held_out, tokenizer):
    for texts, ids in trained_and_held_out:
        assert len(texts) > 10_000
        silent = [text for text, row in zip(texts, ids) if tokenizer.unk_token_id in row]
        assert silent == []


def test_a_sentence_becomes_one_token_a_word_and_can_be_read_back(tokenizer):
    text = "please put the red mug next to the yellow sphere"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.split())
    assert tokenizer.decode(ids) == text
    assert tokenizer("Please, PUT the red mug next to the yellow sphere!")["input_ids"] == ids


def test_no_held_out_phrasing_is_a_trained_one(trained_and_held_out):
    (_, trained), (held_out_texts, held_out) = trained_and_held_out
    seen = set(map(tuple, trained))
    assert [text for text, row in zip(held_out_texts, held_out) if tuple(row) in seen] == []


@pytest.mark.parametrize("task", TASKS)
def test_a_phrasing_is_held_out_for_every_task(task):
    rng = np.random.default_rng(1)
    for _ in range(20):
        for command in commands(task, sample_scene(rng))[:3]:
            assert sentences(command, held_out=True) and not set(sentences(command)) & set(sentences(command, held_out=True))


def test_two_commands_of_one_scene_never_share_a_sentence():
    """Otherwise no robot could know which of them is meant."""
    rng = np.random.default_rng(2)
    plain = [task for task in TASKS if task != "navigate"]
    for i in range(80):
        scene = sample_scene(rng, Variation(novel=i % 3 == 2, objects=3 + i % 3 if i % 4 else 3))
        if len(scene.things) > 3:
            tasks = [task for task in plain if task != "assemble"]
        else:
            tasks = [*plain, "navigate"] if i < 6 else plain
        meanings = defaultdict(set)
        for task in tasks:
            for command in commands(task, scene):
                for held_out in (False, True):
                    texts = sentences(command, held_out, scene.unique_colours)
                    frames = FRAMES.trained + FRAMES.held_out if i < 12 and task != "navigate" else ("{s}",)
                    for text in framed(texts, frames):
                        meanings[tuple(words(text))].add(command)
        ambiguous = {text: found for text, found in meanings.items() if len(found) > 1}
        assert ambiguous == {}


def test_no_sentence_about_full_names_can_mean_two_commands_in_any_scene():
    meanings = defaultdict(set)
    for command in single_commands():
        for text in sentences(command) + sentences(command, held_out=True):
            meanings[tuple(words(text))].add((command.task, command.object if command.task != "spatial" else "", command.destination))
    assert {text: found for text, found in meanings.items() if len(found) > 1} == {}


def test_a_sentence_means_the_command_it_was_made_of():
    rng = np.random.default_rng(3)
    for task in TASKS:
        scene = sample_scene(rng, confusable=True)
        while not commands(task, scene):
            scene = sample_scene(rng)
        options = commands(task, scene)
        for held_out in (False, True):
            command = options[rng.integers(len(options))]
            assert meaning(say(command, rng, held_out, scene.unique_colours), scene) == command
    assert meaning("tidy the table", scene) is None


def test_the_colour_alone_names_an_object_only_where_no_other_has_it():
    rng = np.random.default_rng(4)
    for _ in range(100):
        scene = sample_scene(rng)
        for thing in scene.things:
            named = [text for text in sentences(Command("pick", thing.name), unique_colours=scene.unique_colours) if " object" in text]
            alone = sum(other.colour == thing.colour for other in scene.things) == 1
            assert bool(named) == alone


def test_every_synonym_of_objects_and_bins_is_used():
    said = " ".join(sentences(Command("put", ("red", "cup"), "blue"))).split()
    assert set(SHAPE_NOUNS["cup"]) | set(BIN_NOUNS) <= set(said)


def test_say_draws_every_sentence_and_repeats_itself_for_the_same_seed():
    command = Command("pick", ("red", "cup"))
    drawn = {say(command, np.random.default_rng(seed)) for seed in range(600)}
    assert drawn == set(framed(sentences(command), FRAMES.trained))
    assert say(command, np.random.default_rng(7)) == say(command, np.random.default_rng(7))


def test_a_task_without_phrasings_is_named():
    with pytest.raises(ValueError, match="juggle"):
        sentences(Command("juggle"))


@pytest.mark.parametrize("text", LECTURE_AND_LAB)
def test_the_words_of_lecture_and_lab_sheet_are_known(text, tokenizer):
    assert unknown_words(text) == []
    assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]


def test_unknown_words_are_named_exactly_where_the_tokenizer_falls_silent(tokenizer):
    assert unknown_words("Pick up the teal gadget, please!") == ["teal", "gadget"]
    rng = np.random.default_rng(5)
    mixed = vocabulary() + ["teal", "gadget", "zebra", "e-mail", "Zürich", "block's", "3.5", "RED", "don't"]
    for _ in range(300):
        text = " ".join(rng.choice(mixed, 6))
        ids = tokenizer(text)["input_ids"]
        assert len(unknown_words(text)) == ids.count(tokenizer.unk_token_id), text


def test_every_word_of_the_vocabulary_has_a_token_of_its_own(tokenizer):
    ids = [tokenizer(word)["input_ids"] for word in vocabulary()]
    assert all(len(row) == 1 for row in ids)
    assert len({row[0] for row in ids} - {tokenizer.unk_token_id}) == len(vocabulary()) == len(set(vocabulary()))


def test_saving_and_loading_the_processor_changes_nothing(reloaded, tokenizer, trained_and_held_out):
    texts, ids = trained_and_held_out[1]
    assert reloaded.tokenizer(texts[::7])["input_ids"] == ids[::7]
    assert reloaded.tokenizer.get_vocab() == tokenizer.get_vocab()
    for name in ("pad_token_id", "unk_token_id", "eos_token_id", "padding_side"):
        assert getattr(reloaded.tokenizer, name) == getattr(tokenizer, name), name
    original = build_processor()
    message = [{"role": "user", "content": [{"type": "text", "text": "take the cup empty"}, {"type": "image"}]}]
    prompts = [p.apply_chat_template(message, add_generation_prompt=True) for p in (original, reloaded)]
    assert prompts == ["take the cup empty <image><act>"] * 2
    image = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    a, b = (p(text=prompts[0], images=[[image]], return_tensors="pt") for p in (original, reloaded))
    assert all(a[name].equal(b[name]) for name in ("input_ids", "attention_mask", "pixel_values"))
    assert (a["input_ids"] == reloaded.tokenizer.convert_tokens_to_ids("<image>")).sum() == 36


def test_an_action_survives_its_tokens_within_half_a_bin():
    actions = np.random.default_rng(0).uniform(LOW, HIGH, (5000, 4))
    error = np.abs(bins_to_action(action_to_bins(actions)) - actions)
    half = np.array([0.5, 0.6, 0.25, 1.0]) / 256 / 2
    assert (error <= half + 1e-12).all()
    assert (error.max(0) > 0.98 * half).all(), "half a bin is the worst error, not a bound that is never reached"


def test_every_bin_survives_its_action():
    bins = np.repeat(np.arange(BINS)[:, None], len(NAMES), axis=1)
    assert np.array_equal(action_to_bins(bins_to_action(bins)), bins)


def test_actions_beyond_the_workspace_go_to_the_nearest_end_bin():
    assert action_to_bins(LOW).tolist() == action_to_bins(LOW - 5).tolist() == [0] * 4
    assert action_to_bins(HIGH).tolist() == action_to_bins(HIGH + 5).tolist() == [255] * 4


@pytest.mark.parametrize("action, message", [
    ([0, 0, np.nan, 1], "finite"), ([np.inf, 0, 0, 1], "finite"), ([0, 0, 0], "4 numbers"), (np.zeros((2, 7)), "4 numbers"),
])
def test_actions_that_are_no_actions_are_refused(action, message):
    with pytest.raises(ValueError, match=message):
        action_to_bins(action)


def test_the_full_waypoint_keeps_place_and_grip_and_leaves_the_gripper_vertical():
    action = np.array([[0.1, -0.2, 0.05, 1.0]])
    assert full_waypoint(action).tolist() == [[0.1, -0.2, 0.05, 0.0, 0.0, 0.0, 1.0]]
    assert np.array_equal(small_action(full_waypoint(action)), action)


def test_each_bin_of_the_tiny_vla_has_a_token_that_no_sentence_can_contain(tokenizer):
    ids = action_token_ids(tokenizer)
    assert ids.tolist() == tokenizer.convert_tokens_to_ids([f"<a{i}>" for i in range(256)])
    assert not set(ids.tolist()) & {tokenizer(word)["input_ids"][0] for word in vocabulary()}


def test_another_tokenizer_gives_up_its_last_ordinary_tokens():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    def word_level(count):
        listed = ["<pad>", "<unk>", *(f"w{i}" for i in range(count))]
        inner = Tokenizer(models.WordLevel({token: i for i, token in enumerate(listed)}, unk_token="<unk>"))
        made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>")
        made.add_tokens(["<loc0>", "<loc1>"])
        return made

    many = word_level(300)
    assert many.convert_ids_to_tokens(action_token_ids(many).tolist()) == [f"w{i}" for i in range(44, 300)]
    with pytest.raises(ValueError, match="255 ordinary tokens"):
        action_token_ids(word_level(255))
