"""Properties of augmentation: what it changes, by how much, and what it leaves alone. The judges are numpy's statistics and the phrasings."""

import numpy as np
import pytest

from labkit.augmentation import Augmentation, commands_of
from labkit.demonstrations import read
from labkit.instructions import sentences, words
from labkit.paths import DATA
from labkit.waypoint_regression import WaypointSamples, waypoint_samples


@pytest.fixture(scope="module")
def demonstrations():
    return read(DATA / "demonstrations" / "assemble", "train", limit=6)


@pytest.fixture(params=[1, 2])
def samples(demonstrations, request):
    return waypoint_samples(demonstrations, frames=request.param)


def grey(count=200, frames=1, size=48, level=128):
    return WaypointSamples([f"e/{i}" for i in range(count)], ["go"] * count, np.full((count, frames, size, size, 3), level, np.uint8),
                           np.zeros(count, bool), np.zeros((count, 7)))


EVERYTHING = {"colour": 0.3, "crop": 2, "noise": 8.0}


def test_the_same_seed_and_epoch_give_the_same_and_others_do_not(samples):
    augment = Augmentation(**EVERYTHING, seed=1)
    first, again, later = augment(samples, 0), augment(samples, 0), augment(samples, 1)
    assert np.array_equal(first.images, again.images) and not np.array_equal(first.images, later.images)
    assert not np.array_equal(first.images, Augmentation(**EVERYTHING, seed=2)(samples, 0).images)


def test_what_was_done_is_untouched_and_the_samples_given_are_as_they_were(samples, demonstrations):
    before = samples.images.copy(), list(samples.instructions)
    found = Augmentation(**EVERYTHING, commands=commands_of(demonstrations))(samples, 3)
    assert found.ids == samples.ids and found.actions is samples.actions and found.holding is samples.holding
    assert found.images.shape == samples.images.shape and found.images.dtype == np.uint8
    assert np.array_equal(samples.images, before[0]) and samples.instructions == before[1]


def test_without_anything_to_change_nothing_changes(samples):
    found = Augmentation()(samples, 0)
    assert np.array_equal(found.images, samples.images) and found.instructions == samples.instructions


def test_noise_has_the_standard_deviation_that_was_asked_for_and_no_mean():
    difference = Augmentation(noise=6.0)(grey(), 0).images.astype(float) - 128
    assert difference.std() == pytest.approx(6.0, rel=0.02) and abs(difference.mean()) < 0.05


def test_colours_change_by_no_more_than_was_asked_for_and_differ_between_channels():
    found = Augmentation(colour=0.2)(grey(), 0).images.reshape(200, -1, 3).astype(float)
    assert (found.max(1) == found.min(1)).all()  # an even picture stays even
    assert found.min() >= np.floor(128 * 0.8**2) and found.max() <= np.ceil(128 * 1.2**2)
    assert (found[:, 0].max(1) - found[:, 0].min(1)).max() > 10


def test_contrast_moves_values_away_from_the_mean_and_keeps_it():
    samples = grey(level=100)
    samples.images[:, :, :24] = 140
    found = Augmentation(colour=0.1)(samples, 0).images.astype(float)
    ratio = (found[:, 0, 0, 0, 0] - found[:, 0, -1, 0, 0]) / (found[:, 0, 0, 0, 0] + found[:, 0, -1, 0, 0])
    assert ratio.min() == pytest.approx(0.9 * 40 / 240, rel=0.15) and ratio.max() == pytest.approx(1.1 * 40 / 240, rel=0.15)


def test_a_crop_is_the_picture_moved_and_every_move_occurs():
    samples = grey(count=300, size=9, level=0)
    samples.images[:, :, 4, 4] = 255
    places = {tuple(np.argwhere(picture[0, :, :, 0])[0]) for picture in Augmentation(crop=1)(samples, 0).images}
    assert places == {(row, column) for row in (3, 4, 5) for column in (3, 4, 5)}


def test_a_crop_repeats_the_edge():
    samples = grey(count=50, size=8, level=7)
    assert (Augmentation(crop=3)(samples, 0).images == 7).all()


def test_the_frames_of_a_sample_change_alike():
    samples = grey(frames=2)
    samples.images[:, :, 10:20, 10:20] = 30
    for change in ({"colour": 0.3}, {"crop": 2}):
        found = Augmentation(**change)(samples, 0).images
        assert np.array_equal(found[:, 0], found[:, 1])


def test_other_words_say_the_same_command(demonstrations):
    samples = waypoint_samples(demonstrations)
    commands, polite = commands_of(demonstrations), {"please", "now", "can", "you"}
    found = [Augmentation(commands=commands)(samples, epoch).instructions for epoch in range(8)]
    for epoch in found:
        for id, sentence in zip(samples.ids, epoch):
            ways = [[w for w in words(s) if w not in polite] for s in sentences(commands[id.rpartition("/")[0]])]
            assert [w for w in words(sentence) if w not in polite] in ways
    assert all(len(set(column)) > 2 for column in zip(*found))


def test_an_episode_whose_command_is_unknown_keeps_its_sentence(demonstrations):
    samples = waypoint_samples(demonstrations)
    first = demonstrations[0].id
    commands = {id: command for id, command in commands_of(demonstrations).items() if id != first}
    found = Augmentation(commands=commands)(samples, 0)
    kept = [i for i, id in enumerate(samples.ids) if id.startswith(first + "/")]
    assert [found.instructions[i] for i in kept] == [samples.instructions[i] for i in kept]
