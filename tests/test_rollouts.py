"""Properties of running many episodes at once and of counting their success: scipy, published examples and stub policies are the judges."""

import numpy as np
import pytest
from scipy.stats import binomtest

from labkit import rollouts
from labkit.actions import action_to_bins, bins_to_action, full_waypoint, small_action
from labkit.instructions import words
from labkit.policy import Decision
from labkit.rollouts import Rollouts, blind_success, compare, rollout, wilson
from labkit.tabletop import Tabletop, Variation
from labkit.tabletop.experts import next_waypoint
from labkit.tabletop.tasks import TASKS, commands, meaning

AT_HOME = np.array([0.0, 0.30, 0.30, 0, 0, 0, 0])


class Stub:
    """A policy whose waypoint for each observation is what a function says; it remembers what it was asked."""

    def __init__(self, waypoint_for):
        self.waypoint_for, self.batches, self.instructions = waypoint_for, [], []

    def decide(self, observations):
        self.batches.append(len(observations))
        self.instructions += [o["instruction"] for o in observations]
        waypoints = np.array([self.waypoint_for(o) for o in observations])
        return Decision(action_to_bins(small_action(waypoints)), small_action(waypoints), waypoints, np.ones((len(waypoints), 4)), 0.001)


@pytest.fixture
def open_eyes(monkeypatch):
    """Lets a stub see the environment behind an observation, which no policy can."""

    class Seen(Tabletop):
        def _observe(self):
            return {**super()._observe(), "environment": self}

    monkeypatch.setattr(rollouts, "Tabletop", Seen)


def oracle(observation):
    env = observation["environment"]
    return next_waypoint(env.episode.command, env.episode.scene, env.start, env.state)


def oracle_through_tokens(observation):
    return full_waypoint(bins_to_action(action_to_bins(small_action(oracle(observation)))))


def results(successes, seeds=None, task="pick"):
    successes = np.array(successes, bool)
    count = len(successes)
    return Rollouts(task, successes, np.arange(count) if seeds is None else seeds, np.ones(count, int), np.zeros(count), np.zeros(1), 0.0)


@pytest.mark.parametrize("successes, episodes", [(0, 1), (1, 1), (0, 40), (40, 40), (3, 7), (93, 100), (150, 200), (1, 1000)])
def test_the_interval_is_scipy_s_wilson_interval(successes, episodes):
    expected = binomtest(successes, episodes).proportion_ci(0.95, method="wilson")
    assert np.allclose(wilson(successes, episodes), [expected.low, expected.high], atol=1e-7)
    of_results = results([True] * successes + [False] * (episodes - successes))
    assert np.allclose(of_results.interval, [expected.low, expected.high], atol=1e-7)
    assert np.isclose(of_results.rate, successes / episodes)


def test_no_episodes_have_no_interval():
    with pytest.raises(ValueError, match="at least one"):
        wilson(0, 0)


def paired(both, only_b, only_a, neither):
    """Two results on the same episodes with these counts."""
    a = [True] * both + [False] * only_b + [True] * only_a + [False] * neither
    b = [True] * both + [True] * only_b + [False] * only_a + [False] * neither
    return compare(results(a), results(b))


# Cavo et al. (2012) as worked out by Fagerland, Lydersen and Laake, Statistics in Medicine 33 (2014): -0.0621 (-0.1186 to -0.0046).
def test_the_paired_interval_is_newcombe_s_method_10_in_a_published_example():
    found = paired(59, 6, 16, 80)
    assert np.allclose([found.difference, found.low, found.high], [-0.0621, -0.1186, -0.0046], atol=5e-5)


def test_the_difference_of_the_published_example_and_its_exact_mcnemar_test():
    """Exact McNemar: 22 discordant pairs, 6 against 16, two-sided: 2 * P(X <= 6) = 0.0525."""
    from math import comb

    found = paired(59, 6, 16, 80)
    assert np.isclose(found.difference, (65 - 75) / 161)
    assert np.isclose(found.p, 2 * sum(comb(22, k) for k in range(7)) / 2**22)
    assert (found.only_b, found.only_a, found.episodes) == (6, 16, 161)


@pytest.mark.parametrize("counts", [(50, 8, 3, 39), (0, 10, 0, 90), (90, 0, 0, 10), (0, 0, 0, 20), (20, 0, 0, 0), (0, 20, 0, 0)])
def test_a_comparison_turned_around_is_its_mirror_image_and_holds_the_difference(counts):
    both, only_b, only_a, neither = counts
    forward, backward = paired(*counts), paired(both, only_a, only_b, neither)
    assert np.isclose(forward.difference, (only_b - only_a) / sum(counts))
    assert np.allclose([forward.low, forward.high, forward.p], [-backward.high, -backward.low, backward.p])
    assert -1 <= forward.low <= forward.difference <= forward.high <= 1


def test_pairing_narrows_the_interval_of_policies_that_fail_together():
    """Without pairing, Newcombe's interval for independent proportions is the one with correlation zero."""
    together = paired(45, 5, 0, 50)
    (l1, u1), (l2, u2) = wilson(50, 100), wilson(45, 100)
    unpaired = np.hypot(0.50 - l1, u2 - 0.45) + np.hypot(u1 - 0.50, 0.45 - l2)
    assert together.high - together.low < 0.6 * unpaired


def test_the_paired_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    truth, covered = np.array([0.55, 0.12, 0.05, 0.28]), 0
    for both, only_b, only_a, neither in rng.multinomial(100, truth, size=1000):
        found = paired(both, only_b, only_a, neither)
        covered += found.low <= 0.07 <= found.high
    assert 0.925 < covered / 1000 < 0.985


def test_only_the_same_episodes_can_be_compared():
    with pytest.raises(ValueError, match="same episodes"):
        compare(results([True, False]), results([True, False], seeds=np.array([5, 6])))
    with pytest.raises(ValueError, match="same episodes"):
        compare(results([True, False]), results([True, False], task="put"))


@pytest.mark.parametrize("task", TASKS)
def test_an_oracle_solves_nearly_everything(task, open_eyes):
    found = rollout(Stub(oracle), task, episodes=12, progress=False)
    assert found.rate >= 11 / 12
    assert np.nanmax(found.position_error) < 1e-9, "the first waypoint is the expert's own"
    assert (found.decisions <= TASKS[task].decisions).all()


def test_an_oracle_that_must_speak_in_tokens_still_solves_what_needs_no_wrist(open_eyes):
    for task in ("pick", "put", "move", "beside", "stack", "forward", "spatial"):
        assert rollout(Stub(oracle_through_tokens), task, episodes=15, seed=50, progress=False).rate >= 14 / 15, task


@pytest.mark.parametrize("task", TASKS)
def test_a_policy_that_stays_at_home_solves_nothing(task):
    found = rollout(Stub(lambda o: AT_HOME), task, episodes=6, progress=False)
    assert found.rate == 0
    assert (found.decisions == (1 if task == "navigate" else TASKS[task].decisions)).all()


def test_the_same_seeds_give_the_same_result_and_other_seeds_other_episodes(tiny_policy):
    first, again, other = (rollout(tiny_policy, "put", episodes=10, seed=seed, progress=False) for seed in (7, 7, 17))
    for name in ("success", "seeds", "decisions", "position_error"):
        assert np.array_equal(getattr(first, name), getattr(again, name)), name
    assert not np.array_equal(first.position_error, other.position_error)


def test_batching_changes_no_episode(tiny_policy, open_eyes):

    def right_on_the_left(observation):
        too_high = 0.03 * (observation["environment"].episode.scene.things[0].x > 0)
        return oracle(observation) + [0, 0, too_high, 0, 0, 0, 0]

    for policy in (tiny_policy, Stub(right_on_the_left)):
        found = [rollout(policy, "pick", episodes=9, seed=3, batch=batch, progress=False) for batch in (1, 4, 100)]
        for one in found[1:]:
            assert np.array_equal(found[0].success, one.success) and np.array_equal(found[0].decisions, one.decisions)
            assert np.allclose(found[0].position_error, one.position_error, atol=1e-12)
            assert np.array_equal(found[0].seeds, one.seeds)


def test_episodes_run_in_lock_step_and_leave_the_batch_when_done(open_eyes):
    """All ten decide together; two decisions solve `put`, so the third forward pass is never needed."""
    policy = Stub(oracle)
    found = rollout(policy, "put", episodes=10, seed=11, progress=False)
    assert found.rate == 1
    assert policy.batches[:2] == [10, 10] and set(policy.batches[2:]) == {1}, "after the rollout, single calls are timed"
    assert len(found.milliseconds) == len(policy.batches) - 2 == 10
    assert np.allclose(found.milliseconds, 1.0)


def test_position_error_is_the_distance_in_the_table_s_plane_to_the_expert_s_first_waypoint(open_eyes):
    found = rollout(Stub(lambda o: oracle(o) + [0.003, 0.004, 0.05, 0, 0, 0, 0]), "pick", episodes=4, progress=False)
    assert np.allclose(found.position_error, 0.005)


def test_the_policy_hears_its_own_instruction(open_eyes):
    policy = Stub(lambda o: AT_HOME if o["instruction"] == o["environment"].episode.instruction else 1 / 0)
    rollout(policy, "put", episodes=5, progress=False)


@pytest.mark.parametrize("task", [task for task in TASKS if task not in ("navigate", "assemble")])
def test_another_instruction_is_valid_in_the_scene_and_about_another_object(task, open_eyes):
    heard = []

    def listen(observation):
        env = observation["environment"]
        heard.append((env.episode, observation["instruction"]))
        return AT_HOME

    rollout(Stub(listen), task, episodes=12, instruction="another", progress=False)
    same_task = 0
    for episode, text in heard:
        meant = meaning(text, episode.scene)
        assert meant is not None and meant.object != episode.command.object
        assert words(text) != words(episode.instruction)
        same_task += meant in commands(task, episode.scene)
    assert same_task > 0


def test_another_instruction_stays_the_same_through_an_episode(open_eyes):
    heard = {}

    def listen(observation):
        heard.setdefault(id(observation["environment"]), set()).add(observation["instruction"])
        return AT_HOME

    rollout(Stub(listen), "put", episodes=5, instruction="another", progress=False)
    assert all(len(texts) == 1 for texts in list(heard.values())[:5])


def test_held_out_phrasings_reach_the_policy():
    policies = [Stub(lambda o: AT_HOME) for _ in range(2)]
    for policy, held_out in zip(policies, (False, True)):
        rollout(policy, "pick", episodes=15, held_out_phrasing=held_out, progress=False)
    trained, held_out = (set(policy.instructions) for policy in policies)
    assert trained and held_out and not trained & held_out


def test_a_variation_reaches_the_environment(open_eyes):
    def listen(observation):
        seen.add(observation["environment"].episode.variation)
        return AT_HOME

    seen, dim = set(), Variation(light=0.4)
    rollout(Stub(listen), "pick", episodes=2, variation=dim, progress=False)
    assert seen == {dim}


@pytest.mark.parametrize("task, instruction, message", [("juggle", "own", "unknown task"), ("pick", "loud", "another")])
def test_unknown_tasks_and_instructions_are_named(task, instruction, message):
    with pytest.raises(ValueError, match=message):
        rollout(Stub(lambda o: AT_HOME), task, instruction=instruction, episodes=1, progress=False)


def test_who_ignores_the_instruction_succeeds_as_often_as_chance_allows():
    """Three objects: a blind pick is right one time in three, a blind put or move one in nine or less."""
    for task, chance in (("pick", 1 / 3), ("move", 1 / 9)):
        found = blind_success(task, episodes=150)
        expected = binomtest(int(found.success.sum()), 150, chance)
        assert expected.pvalue > 0.001, (task, found.rate)


def test_results_say_their_number_of_episodes_and_their_interval():
    text = str(results([True] * 93 + [False] * 7))
    assert "93 %" in text and "100 episodes" in text and "86 to 97 %" in text
    text = str(paired(45, 5, 0, 50))
    assert "+5 points" in text and "100 shared episodes" in text


@pytest.mark.parametrize("task, least", [("pick", 0.75), ("put", 0.75), ("move", 0.75), ("beside", 0.6)])
def test_the_shipped_policy_does_what_it_was_pretrained_for(shipped_policy, task, least):
    """A net for a broken checkpoint or simulator; the success itself stands with its interval in the model card."""
    assert rollout(shipped_policy, task, episodes=60, seed=2_000_000, progress=False).rate >= least


def test_the_shipped_policy_listens(shipped_policy):
    """Given another instruction it does something else, so it succeeds no more often than chance."""
    assert rollout(shipped_policy, "pick", episodes=60, instruction="another", progress=False).interval[0] < 1 / 3
    assert rollout(shipped_policy, "put", episodes=60, instruction="another", progress=False).rate < 0.2
