"""Properties of the caches around a policy: what a hit answers, what is counted, what makes room. The plain policy is the judge."""

from collections import OrderedDict

import numpy as np
import pytest

from labkit.errors import UserError
from labkit.rollouts import rollout
from labkit.serving.caching import (
    CachingPolicy,
    FeatureCache,
    picture_distance,
    picture_sketch,
    sentence_distance,
    sentence_sketch,
)
from labkit.task_specific_vla import policy_from_clip


@pytest.fixture(params=[("pooled", 1), ("spatial", 1), ("spatial", 2)], ids=lambda p: f"{p[0]}-{p[1]}")
def policy(request, clip_folder):
    return policy_from_clip(clip_folder, readout=request.param[0], frames=request.param[1])


@pytest.fixture
def one_frame(clip_folder):
    return policy_from_clip(clip_folder, readout="spatial")


class Towers:
    """Counts how often each tower is asked."""

    def __init__(self, model):
        self.asked = {"vision": 0, "text": 0}
        model.vision_encoder.register_forward_hook(lambda *_: self._count("vision"))
        model.text_encoder.register_forward_hook(lambda *_: self._count("text"))

    def _count(self, name):
        self.asked[name] += 1


def test_a_hit_is_to_the_bit_what_a_miss_was_and_asks_no_tower(policy, observations):
    cached = CachingPolicy(policy)
    towers = Towers(policy.model)
    first = [cached.decide([o]).waypoints for o in observations]
    asked = dict(towers.asked)
    again = [cached.decide([o]).waypoints for o in observations]
    assert all(np.array_equal(a, b) for a, b in zip(first, again)) and towers.asked == asked
    # Six pictures and, with two frames, the black one before the first decision.
    assert asked == {"vision": 6 + (policy.model.frames == 2), "text": 6}


def test_with_one_frame_it_is_the_plain_policy_to_the_bit(one_frame, observations):
    cached = CachingPolicy(one_frame)
    for o in observations * 2:
        assert np.array_equal(cached.decide([o]).waypoints, one_frame.decide([o]).waypoints)
    assert (cached.pictures.counts.exact, cached.pictures.counts.misses) == (6, 6)


def test_in_a_batch_it_is_the_plain_policy_up_to_the_order_of_sums(policy, observations):
    seen = [{**o, "previous_rgb": before["rgb"]} for o, before in zip(observations, observations[1:])] + observations[-1:]
    assert np.allclose(CachingPolicy(policy).decide(seen).waypoints, policy.decide(seen).waypoints, atol=1e-6)


def test_what_a_batch_puts_into_the_cache_is_what_single_questions_put_there(policy, observations):
    together, alone = CachingPolicy(policy), CachingPolicy(policy)
    together.decide(observations)
    for o in observations:
        assert np.array_equal(together.decide([o]).waypoints, alone.decide([o]).waypoints)
    assert together.pictures.counts.exact >= len(observations)


def test_one_pixel_or_the_vacuum_sensor_makes_another_question(one_frame, observations):
    cached, first = CachingPolicy(one_frame), observations[0]
    cached.decide([first])
    other = first["rgb"].copy()
    other[20, 20, 1] ^= 1
    for question in ({**first, "rgb": other}, {**first, "holding": 1 - int(first["holding"])}):
        assert np.array_equal(cached.decide([question]).waypoints, one_frame.decide([question]).waypoints)
    assert cached.pictures.counts.misses == 2 and cached.sentences.counts.misses == 2


def test_two_frames_see_each_picture_twice_and_encode_it_once(clip_folder, observations):
    cached = CachingPolicy(policy_from_clip(clip_folder, frames=2))
    for before, o in zip([None, *observations], observations):
        cached.decide([o if before is None else {**o, "previous_rgb": before["rgb"]}])
    # Six pictures and the black one before them; all but the last are asked for again.
    assert (cached.pictures.counts.misses, cached.pictures.counts.exact) == (7, 5)


def test_pictures_with_the_same_bytes_and_other_sides_differ(one_frame):
    cached = CachingPolicy(one_frame)
    tall = np.random.default_rng(0).integers(0, 256, (40, 20, 3), np.uint8)
    asked = [{"rgb": picture, "instruction": "pick up the red block", "holding": 0} for picture in (tall, tall.reshape(20, 40, 3))]
    for o in asked:
        assert np.array_equal(cached.decide([o]).waypoints, one_frame.decide([o]).waypoints)
    assert cached.pictures.counts.misses == 2


def test_after_clear_new_weights_answer(one_frame, observations):
    cached = CachingPolicy(one_frame)
    before = cached.decide(observations[:1]).waypoints
    one_frame.model.vision_encoder.post_layernorm.weight.data.mul_(1.5)
    assert np.array_equal(cached.decide(observations[:1]).waypoints, before)
    cached.clear()
    after = cached.decide(observations[:1]).waypoints
    assert np.array_equal(after, one_frame.decide(observations[:1]).waypoints) and not np.array_equal(after, before)


def test_it_drives_the_robot_as_the_plain_policy_does(one_frame):
    plain, cached = (rollout(p, "pick", episodes=3, seed=11, batch=1, progress=False) for p in (one_frame, CachingPolicy(one_frame)))
    assert np.array_equal(plain.success, cached.success) and np.array_equal(plain.position_error, cached.position_error)


def test_another_kind_of_policy_is_refused(tiny_policy):
    with pytest.raises(UserError, match="WaypointPolicy"):
        CachingPolicy(tiny_policy)


def test_a_cache_keeps_what_a_least_recently_used_list_keeps():
    """Against a model in plain Python, over a thousand random questions."""
    cache, model, rng = FeatureCache(5), OrderedDict(), np.random.default_rng(7)
    hits = 0
    for key in rng.integers(0, 9, 1000).tolist():
        made = []
        assert cache.get(key, None, lambda key=key, made=made: made.append(key) or 10 * key) == 10 * key
        assert made == ([] if key in model else [key])
        hits += key in model
        model[key] = True
        model.move_to_end(key)
        if len(model) > 5:
            model.popitem(last=False)
        assert len(cache) == len(model)
    assert (cache.counts.exact, cache.counts.misses) == (hits, 1000 - hits) and cache.counts.evicted == 1000 - hits - 5
    assert cache.counts.hit_rate == hits / 1000


def test_a_picture_that_was_driven_out_is_encoded_again(one_frame, observations):
    cached = CachingPolicy(one_frame, pictures=2)
    for o in observations[:3] + observations[:1]:
        assert np.array_equal(cached.decide([o]).waypoints, one_frame.decide([o]).waypoints)
    assert (cached.pictures.counts.misses, cached.pictures.counts.evicted, len(cached.pictures)) == (4, 2, 2)


def test_an_encoder_that_raises_leaves_the_cache_as_it_was():
    cache = FeatureCache(1)
    cache.get("kept", None, lambda: 1)
    with pytest.raises(ZeroDivisionError):
        cache.get("new", None, lambda: 1 / 0)
    assert cache.get("kept", None, lambda: 2) == 1 and len(cache) == 1


@pytest.mark.parametrize("options", [{"capacity": 0}, {"capacity": 1, "threshold": -1.0, "distance": max}, {"capacity": 1, "threshold": 1.0}])
def test_impossible_caches_are_refused(options):
    with pytest.raises(ValueError, match="capacity"):
        FeatureCache(**options)


def test_a_noisy_picture_is_answered_with_what_was_encoded_and_is_a_stale_answer(one_frame, observations):
    noise = np.random.default_rng(0).integers(-4, 5, observations[0]["rgb"].shape)
    noisy = {**observations[0], "rgb": np.clip(observations[0]["rgb"].astype(int) + noise, 0, 255).astype(np.uint8)}
    cached = CachingPolicy(one_frame, picture_threshold=5.0)
    first, second = (cached.decide([o]).waypoints for o in (observations[0], noisy))
    assert np.array_equal(first, second) and not np.array_equal(second, one_frame.decide([noisy]).waypoints)
    assert (cached.pictures.counts.exact, cached.pictures.counts.similar, cached.pictures.counts.misses) == (0, 1, 1)


def test_the_larger_the_threshold_the_more_hits(one_frame):
    from labkit.tabletop import Tabletop, Variation

    env = Tabletop("pick", Variation(belt_speed=0.02))
    frames = [env.reset(seed=4)[0], *(env.wait(0.1) for _ in range(15))]
    rates = []
    for threshold in (None, 0.0, 10.0, 40.0, 255.0):
        cached = CachingPolicy(one_frame, picture_threshold=threshold)
        for o in frames:
            cached.decide([o])
        rates.append(cached.pictures.counts.hit_rate)
    assert rates == sorted(rates) and rates[0] == 0 and rates[-1] == 15 / 16


def test_small_steps_do_not_lead_far():
    cache = FeatureCache(10, 1.0, lambda sketch, sketches: np.abs(np.array(sketches) - sketch))
    answers = [cache.get(step, lambda step=step: float(step), lambda step=step: step) for step in range(7)]
    assert max(abs(step - answer) for step, answer in enumerate(answers)) <= 1 and cache.counts.similar == 3


def test_the_nearest_of_several_answers():
    cache = FeatureCache(10, 10.0, lambda sketch, sketches: np.abs(np.array(sketches) - sketch))
    for place in (0.0, 50.0, 19.0):
        cache.get(place, lambda place=place: place, lambda place=place: place)
    assert cache.get("between", lambda: 12.0, lambda: None) == 19.0


def test_the_distance_of_pictures_is_the_largest_change_of_a_fields_mean():
    grey = np.full((48, 48, 3), 100, np.uint8)
    moved = grey.copy()
    moved[8:12, 20:24, 2] = 180  # one field of 4 x 4 pixels, and one colour of it
    apart = grey.copy()
    apart[8:10, 20:24] = 180     # half a field
    found = picture_distance(picture_sketch(grey), [picture_sketch(p) for p in (grey, moved, apart)])
    assert np.allclose(found, [0, 80, 40])


def test_the_distance_of_sentences_is_jaccards_and_never_crosses_the_sensor():
    said = (False, sentence_sketch("Pick up the RED block!"))
    others = ["pick up the red block", "pick up the blue block", "move a ball"]
    assert np.allclose(sentence_distance(said, [(False, sentence_sketch(text)) for text in others]), [0, 2 / 6, 1])
    assert np.isinf(sentence_distance(said, [(True, said[1])])).all()


def test_capitals_and_punctuation_are_forgiven_at_threshold_zero_and_a_colour_is_not(one_frame, observations):
    cached = CachingPolicy(one_frame, sentence_threshold=0.0)
    first = cached.act(observations[0], "pick up the red block")
    assert np.array_equal(cached.act(observations[0], "Pick up the red block."), first)
    assert np.array_equal(cached.act(observations[0], "pick up the blue block"), one_frame.act(observations[0], "pick up the blue block"))
    assert (cached.sentences.counts.similar, cached.sentences.counts.misses) == (1, 2)
    careless = CachingPolicy(one_frame, sentence_threshold=0.4)
    assert np.array_equal(careless.act(observations[0], "pick up the red block"), careless.act(observations[0], "pick up the blue block"))
