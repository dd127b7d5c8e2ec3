"""Three adapters on one backbone in closed loop: every suite under every adapter, under all of them together, and an instruction that fits two.

Which adapter a router chooses for an episode follows from its first observation alone, and what would have come of it is stored here for every
adapter and every episode: so every router, threshold and fallback can be counted afterwards without running the robot again.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from labkit.demonstrations import samples
from labkit.experiments.measuring import counted, shipped
from labkit.instructions import Command, noun_phrases
from labkit.policy import Policy, load_policy
from labkit.rollouts import EVALUATION_SEED, rollout
from labkit.routing import OFF, EnsemblePolicy, RoutedPolicy, with_adapters
from labkit.sft import fine_tune, lora
from labkit.tabletop import Tabletop, Variation
from labkit.tabletop.tasks import PRETRAINING_TASKS, is_done

# Adapter -> the demonstrations that it learns from. None can be called "forward": see `with_adapters`.
ADAPTERS = {"stack": "stack", "ahead": "forward", "dim": "dim"}
# What each suite asks the robot to do, and where; the first three are what the adapters of these names learn.
SUITES = {"stack": ("stack", Variation()), "ahead": ("forward", Variation()), "dim": ("put", Variation(light=0.2)),
          **{task: (task, Variation()) for task in PRETRAINING_TASKS}}
ABOUT = ("success, episode by episode, in phrasings that no adapter was trained on: three LoRA adapters (stack, move ahead, put in a dim room), the "
         "backbone alone and the average of all four's logits, on what they learned and on the four old tasks; an instruction that fits two "
         "adapters (move the ball forward on top of the block); other numbers of steps and another learning rate on other episodes")
SEEDS = range(3)
EPISODES = {suite: 100 if suite in ADAPTERS else 50 for suite in SUITES}
AMBIGUOUS_EPISODES = 100
PAIR = ("stack", "ahead")
ENSEMBLE = "ensemble"
RECIPE = {"rank": 16, "targets": "attention", "steps": 50, "learning_rate": 5e-3}
# Other recipes, on episodes and with a training seed of their own: 100 steps do somewhat better, 50 are what a lesson has time for.
VALIDATION_SEED = 2_000_000
CANDIDATES = ({**RECIPE, "steps": 25}, RECIPE, {**RECIPE, "steps": 100}, {**RECIPE, "learning_rate": 2e-3})


def points() -> list[dict]:
    """The backbone alone, then three adapters with every seed, then other recipes."""
    validation = [{"part": "validation", "suite": suite, **recipe, "seed": 100} for recipe in CANDIDATES for suite in ADAPTERS]
    return [{"part": "backbone"}, *({"part": "adapters", "seed": seed} for seed in SEEDS), *validation]


def run(point: dict) -> dict:
    """Outcomes as strings of 0 and 1, one character an episode, and their counts."""
    base = load_policy("tiny", device="cpu")
    if point["part"] == "validation":
        task, variation = SUITES[point["suite"]]
        policy = trained(base, point["suite"], point["seed"], point)
        return {"success": counted(policy, task, 50, seed=VALIDATION_SEED, variation=variation), "episodes": 50}
    if point["part"] == "backbone":
        return {"outcomes": {suite: outcomes(base, suite) for suite in SUITES}, "ambiguous": what_came_of_both(base),
                "ambiguous_episodes": AMBIGUOUS_EPISODES}
    with tempfile.TemporaryDirectory() as folder:
        shared = three_adapters(base, point["seed"], Path(folder))
    speakers = {name: RoutedPolicy(shared, lambda seen, name=name: [name] * len(seen)) for name in ADAPTERS}
    everybody = speakers | {ENSEMBLE: EnsemblePolicy(shared, (OFF, *ADAPTERS))}
    found = {suite: {name: outcomes(speaker, suite) for name, speaker in everybody.items()} for suite in SUITES}
    of_two = {name: speakers[name] for name in PAIR} | {ENSEMBLE: EnsemblePolicy(shared, PAIR)}
    return {
        "outcomes": found, "success": {suite: {name: row.count("1") for name, row in rows.items()} for suite, rows in found.items()},
        "episodes": EPISODES, "ambiguous": {name: what_came_of_both(speaker) for name, speaker in of_two.items()},
        "ambiguous_episodes": AMBIGUOUS_EPISODES,
    }


def trained(base: Policy, name: str, seed: int, recipe: dict = RECIPE) -> Policy:
    """A copy of `base` with one adapter, trained on its 50 demonstrations."""
    policy = base.copy()
    fine_tune(policy, samples(shipped(ADAPTERS[name])), steps=recipe["steps"], learning_rate=recipe["learning_rate"],
              peft_config=lora(recipe["rank"], targets=recipe["targets"]), seed=seed, progress=False)
    return policy


def three_adapters(base: Policy, seed: int, folder: Path) -> Policy:
    """One backbone with the three adapters, trained and written to `folder`."""
    for name in ADAPTERS:
        trained(base, name, seed).save(folder / name)
    return with_adapters(base, {name: folder / name for name in ADAPTERS})


def outcomes(policy, suite: str) -> str:
    """One character an episode, 1 for success, in phrasings kept for tests."""
    task, variation = SUITES[suite]
    found = rollout(policy, task, EPISODES[suite], variation=variation, held_out_phrasing=True, progress=False)
    return "".join("1" if done else "0" for done in found.success)


def first_observations(suite: str, episodes: int | None = None, seed: int = EVALUATION_SEED, held_out_phrasing: bool = True) -> list[dict]:
    """What the robot sees and is told at the start of an episode; by default, of those that `outcomes` counts."""
    task, variation = SUITES[suite]
    count = EPISODES[suite] if episodes is None else episodes
    return [Tabletop(task, variation, held_out_phrasing).reset(seed=seed + i)[0] for i in range(count)]


def ambiguous_episodes(episodes: int = AMBIGUOUS_EPISODES, seed: int = EVALUATION_SEED):
    """Reset `stack` environments and first observations whose instruction fits both adapters of PAIR."""
    environments = [Tabletop("stack") for _ in range(episodes)]
    observations = [env.reset(seed=seed + i)[0] for i, env in enumerate(environments)]
    return environments, [{**seen, "instruction": _fits_both(env.episode.command)} for env, seen in zip(environments, observations)]


def _fits_both(command):
    return f"move {noun_phrases(command.object)[0]} forward on top of {noun_phrases(command.destination)[0]}"


def what_came_of_both(policy, episodes: int = AMBIGUOUS_EPISODES) -> dict:
    """Episodes that ended with the object stacked, and with it ahead; one that has done either is over.   A robot has three decisions."""
    environments, observations = ambiguous_episodes(episodes)
    told, count, running = [o["instruction"] for o in observations], {name: 0 for name in PAIR}, list(range(episodes))
    while running:
        waypoints = policy.decide([{**observations[i], "instruction": told[i]} for i in running]).waypoints
        left = []
        for i, waypoint in zip(running, waypoints):
            env = environments[i]
            observations[i], _, terminated, truncated, _ = env.step(waypoint)
            stack = env.episode.command
            done = {"stack": stack, "ahead": Command("forward", stack.object)}
            did = next((name for name, command in done.items() if is_done(command, env.episode.scene, env.start, env.state)), None)
            if did:
                count[did] += 1
            elif not (terminated or truncated):
                left.append(i)
        running = left
    return count
