"""Raw recordings, their faults and their cleaning; clicks that become demonstrations; and what the few-shot experiment does and stores."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr

from labkit import preprocessing
from labkit.demonstrations import samples
from labkit.experiments import few_shot, few_shot_rates
from labkit.preprocessing import FAULTS, cleaned, pair_decisions, record_session, with_fault
from labkit.recording import record
from labkit.rollouts import EVALUATION_SEED
from labkit.sweeps import STORED, load_sweep
from labkit.tabletop import Tabletop
from labkit.tabletop.tasks import index_of
from labkit.teleoperation import Teleoperator

SEED, EPISODES = 7_000_000, 4
stored_rates = pytest.mark.skipif(not (STORED / "few_shot_rates.json").exists(), reason="the sweep was not run")
stored_sweep = pytest.mark.skipif(not (STORED / "few_shot.json").exists(), reason="the sweep was not run")


@pytest.fixture(scope="module")
def flawless():
    return record_session("stack", EPISODES, SEED)


@pytest.fixture(scope="module")
def faulty():
    return record_session("stack", EPISODES, SEED, FAULTS)


@pytest.fixture(scope="module")
def demonstrations():
    """The same episodes by the recorder of lesson-ready demonstrations, which knows nothing of clocks."""
    return samples(record("stack", episodes=EPISODES, seed=SEED, shares=(1, 0, 0), keep_failures=False))


def assert_same_lessons(found, wanted):
    assert found.instructions == wanted.instructions and np.array_equal(found.holding, wanted.holding)
    # While the operator thinks, the arm and what it holds settle by a hair: 2 mm is a bin, and a pixel here and there changes.
    assert np.abs(found.actions - wanted.actions).max() < 0.003
    assert (found.images != wanted.images).any(-1).mean() < 0.01


def test_a_flawless_recording_gives_the_demonstrations_of_the_recorder(flawless, demonstrations):
    assert_same_lessons(cleaned(flawless), demonstrations)
    assert_same_lessons(preprocessing.as_recorded(flawless), demonstrations)


def test_cleaning_brings_back_the_demonstrations_from_every_fault_at_once(faulty, demonstrations):
    found = cleaned(faulty)
    assert len(demonstrations) - 2 <= len(found) <= len(demonstrations)
    raw = preprocessing.as_recorded(faulty)
    assert len(raw) > 2 * len(found) and sorted(set(found.instructions)) == sorted(set(demonstrations.instructions))


@pytest.mark.parametrize("fault", FAULTS)
def test_cleaning_brings_back_the_demonstrations_from_each_fault(fault, demonstrations):
    found = cleaned(record_session("stack", EPISODES, SEED, (fault,)))
    assert len(found) == len(demonstrations)
    assert found.instructions == demonstrations.instructions and np.array_equal(found.holding, demonstrations.holding)
    assert (found.images != demonstrations.images).any(-1).mean() < 0.02


def test_a_session_has_the_successes_asked_for_and_half_as_many_failures_where_they_are_wanted(flawless, faulty):
    assert [one.success for one in flawless] == [True] * EPISODES
    assert [one.success for one in faulty] == [True] * EPISODES + [False] * (EPISODES // 2)
    assert len({one.seed for one in faulty}) == len(faulty)
    with pytest.raises(ValueError, match="unknown fault 'rust'; the faults are late stamps"):
        record_session("stack", 1, SEED, ("rust",))


def test_a_session_is_the_same_from_the_same_seed(faulty):
    again = record_session("stack", EPISODES, SEED, FAULTS)
    for one, other in zip(faulty, again, strict=True):
        assert all(np.array_equal(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))


def test_a_fault_of_the_logs_changes_what_it_says_and_nothing_else(flawless):
    one, rng = flawless[0], np.random.default_rng(0)
    late = with_fault(one, "late stamps", rng)
    delay = late.pose_times - one.pose_times
    assert np.allclose(delay, delay[0]) and 0.4 <= delay[0] <= 1.2 and np.allclose(late.command_times - one.command_times, delay[0])
    assert late.frames is one.frames and late.frame_times is one.frame_times
    dropped = with_fault(one, "dropped frames", rng)
    kept = np.searchsorted(one.frame_times, dropped.frame_times)
    assert 1 < len(kept) < len(one.frames) and kept[0] == 0 and (np.diff(kept) > 0).all()
    assert np.array_equal(one.frames[kept], dropped.frames) and dropped.pose_times is one.pose_times


@pytest.mark.parametrize("faults", [("late stamps",), ("late stamps", "dropped frames"), FAULTS])
def test_the_delay_is_found_within_two_frames(faults):
    for one in record_session("stack", 6, SEED + 50, faults):
        assert abs(preprocessing.seconds_late(one) - one.pose_times[0]) <= 2 * preprocessing.FRAME_SECONDS


def test_correlations_are_scipy_s_and_a_constant_record_has_none():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(2, 25))
    found = preprocessing.lag_correlations(a, b, 6)
    assert np.allclose(found, [pearsonr(a[: 25 - lag], b[lag:]).statistic for lag in range(7)])
    assert np.array_equal(preprocessing.lag_correlations(a, np.ones(25), 3), np.zeros(4))


def test_no_pair_is_later_stale_idle_or_of_a_failed_episode():
    rng = np.random.default_rng(5)
    for _ in range(50):
        commands, frames = np.sort(rng.uniform(0, 10, 12)), np.sort(rng.uniform(0, 10, 15))
        moves, switches = rng.uniform(0, 0.03, 12), rng.random(12) < 0.3
        pairs = pair_decisions(True, commands, moves, switches, frames, 0.6, 0.01)
        for command, frame in pairs:
            assert 0 <= commands[command] - frames[frame] <= 0.6 and not ((frames > frames[frame]) & (frames <= commands[command])).any()
            assert moves[command] >= 0.01 or switches[command]
        left_out = set(range(12)) - {command for command, _ in pairs}
        for command in left_out:
            before = frames[frames <= commands[command]]
            assert not len(before) or commands[command] - before[-1] > 0.6 or (moves[command] < 0.01 and not switches[command])
        assert pair_decisions(False, commands, moves, switches, frames, 0.6, 0.01) == []


def test_a_session_in_which_everything_failed_is_refused(faulty):
    with pytest.raises(ValueError, match="no decision is left"):
        cleaned([one for one in faulty if not one.success])


def centre(operator, name):
    env = operator._env
    return env.state.positions[index_of(env.episode.scene, name)][:2]


@pytest.mark.parametrize("seed", range(3))
def test_two_clicks_near_the_things_meant_make_a_successful_demonstration(seed):
    operator = Teleoperator("stack", seed)
    command = operator._env.episode.command
    for name in (command.object, command.destination):
        operator.click(*centre(operator, name) + 0.012)
    found = operator.demonstration()
    assert operator.over and found.success and len(found) == 2 and found.operator == "person"
    assert np.abs(found.actions - np.stack(operator.clicks)).max() < 1e-5
    with pytest.raises(RuntimeError, match="this episode is over"):
        operator.click(0.0, 0.0)


def test_where_nobody_finishes_a_scripted_operator_records_the_episode():
    operator = Teleoperator("stack", 3)
    operator.click(0.2, -0.14)
    found, other = operator.demonstration(), Teleoperator("stack", 3).demonstration("ana")
    assert found.success and found.operator == "expert" and other.operator == "ana" and found.instruction == operator.instruction


def test_the_widget_s_map_can_be_clicked_and_says_when_the_episode_is_over():
    operator = Teleoperator("stack", 0)
    told, below = operator.widget().children
    buttons = below.children[0].children
    assert {b.description for b in buttons} >= {"#"} and all(b.tooltip for b in buttons)
    for _ in range(3):
        buttons[0].click()
    assert len(operator.clicks) == 3 and operator.over and "not done" in told.value and all(b.disabled for b in buttons)


def test_fewer_demonstrations_of_a_seed_are_the_first_ones_of_more():
    few, more = few_shot.recorded("stack", 2, 5), few_shot.recorded("stack", 4, 5)
    assert [d.id for d in few] == [d.id for d in more[:2]] and all(np.array_equal(a.images, b.images) for a, b in zip(few, more))


def test_the_demonstrations_of_different_seeds_and_of_the_evaluation_never_meet():
    recorded = [set(range(first + 1000 * seed, first + 1000 * (seed + 1)))
                for first in (few_shot.RECORDED_FROM, few_shot.SESSION_FROM) for seed in (*few_shot.SEEDS, *few_shot_rates.SEEDS)]
    watched = [set(range(first, first + few_shot.EPISODES)) for first in (EVALUATION_SEED, few_shot_rates.EPISODE_SEED)]
    everything = recorded + watched
    assert len(set.union(*everything)) == sum(map(len, everything))
    assert not set(few_shot.SEEDS) & set(few_shot_rates.SEEDS)


def test_habits_move_the_grasp_and_nothing_else():
    one, twice = few_shot.with_habits("ben", 1), few_shot.with_habits("ben", 2)
    assert one == few_shot.OPERATORS["ben"]
    assert [f.name for f in fields(one) if getattr(one, f.name) != getattr(twice, f.name)] == ["grasp_offset"]
    assert twice.grasp_offset == tuple(2 * x for x in one.grasp_offset)


class Aside:
    """Grasps 9 mm to the right and 3 mm behind the object, but another object every fifth time."""

    def __init__(self):
        self.seed = EVALUATION_SEED

    def act(self, observation):
        env = Tabletop("stack")
        env.reset(seed=self.seed)
        x, y = env.state.positions[index_of(env.episode.scene, env.episode.command.object)][:2]
        self.seed += 1
        return np.array([x + 0.009, y + 0.003, 0, 0, 0, 0, 1]) if self.seed % 5 else np.array([x + 0.1, y, 0, 0, 0, 0, 1])


def test_the_grasp_s_offset_is_measured_from_the_object_that_is_meant():
    assert few_shot.grasp_offset(Aside(), episodes=10) == pytest.approx([9.0, 3.0], abs=0.01)


def test_every_part_has_every_seed_and_no_point_comes_twice():
    points = few_shot.points()
    assert len({str(sorted(p.items())) for p in points}) == len(points)
    settings = {}
    for p in points:
        settings.setdefault(str(sorted((k, v) for k, v in p.items() if k != "seed")), []).append(p["seed"])
    assert {tuple(seeds) for name, seeds in settings.items() if "pretrained" not in name} == {tuple(few_shot.SEEDS)}


@stored_rates
def test_the_learning_rates_are_the_best_of_the_validation_points():
    points = load_sweep("few_shot_rates").points
    for checkpoint, method in {(p["checkpoint"], p["method"]) for p in points}:
        tried = {}
        for p in points:
            if (p["checkpoint"], p["method"]) == (checkpoint, method):
                tried.setdefault(p["learning_rate"], []).append(p["success"])
        chosen = few_shot.rate_of(method, checkpoint)
        assert all(np.mean(found) < np.mean(tried[chosen]) or (np.mean(found) == np.mean(tried[chosen]) and rate >= chosen)
                   for rate, found in tried.items()), (checkpoint, method, tried)
    with pytest.raises(KeyError):
        few_shot.rate_of("prayer")


@stored_sweep
@pytest.mark.parametrize("part", ["camera", "light"])
def test_a_stored_point_can_be_computed_again(part):
    """The untrained ones: they cost seconds. Another processor may round otherwise, so that an episode may end otherwise."""
    [stored] = load_sweep("few_shot").where(part=part, trained="pretrained")
    torch.set_num_threads(1)
    found = few_shot.run({"part": part, "trained": "pretrained", "seed": 0})
    assert found["episodes"] == stored["episodes"]
    assert all(abs(found["success"][x] - stored["success"][x]) <= 1 for x in stored["success"])
