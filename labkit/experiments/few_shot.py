"""Few-shot adaptation: how many demonstrations, in which state, from whom, under which camera and light, and from which checkpoint."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from labkit.demonstrations import samples
from labkit.experiments.measuring import counted, counted_on_layouts_of
from labkit.policy import load_policy
from labkit.preprocessing import FAULTS, as_recorded, cleaned, record_session
from labkit.recording import record
from labkit.rollouts import EVALUATION_SEED, rollout
from labkit.sft import fine_tune, lora
from labkit.sweeps import load_sweep
from labkit.tabletop import Tabletop, Variation
from labkit.tabletop.experts import OPERATORS, Operator
from labkit.tabletop.tasks import index_of

TASK, MOVED_TASK = "stack", "put"
ABOUT = ("success after fine-tuning on demonstrations that every seed records anew. demonstrations: stack by number of demonstrations and method, "
         "also by steps and on the layouts of the demonstrations themselves; checkpoints: the same from an early and a middle checkpoint; layout: "
         "twenty demonstrations of one layout or of many, objects then shifted by up to 5 cm; faults: faulty recordings, used as they are and "
         "cleaned; operators: one operator or three, with their habits and twice as large ones; camera, light: put, recorded under one condition, "
         "used under others. The learning rates are those of few_shot_rates")
SEEDS = range(3)
STEPS = (25, 50, 100, 200, 400)
EPISODES, FEWER = 100, 50
COUNTS = (5, 10, 20, 50)
MANY = 500
CHECKPOINTS = ("tiny-early", "tiny-middle", "tiny")
METHODS = ("full", "lora-8", "lora-16")
RECORDED_FROM, SESSION_FROM = 3_000_000, 4_000_000
PLACES = ((-0.12, -0.03), (0.02, 0.02), (0.13, -0.08))
SHIFTS = (0, 1, 2, 3, 5)
CAMERAS = (0, 4, 8, 12, 16)
LIGHTS = (100, 60, 40, 20, 10)
NAMES = ("ana", "ben", "chi")


def points() -> list[dict]:
    """The parts that `ABOUT` names, with three seeds each."""
    parts = [
        *({"part": "demonstrations", "method": method, "demonstrations": count} for count in COUNTS for method in METHODS),
        {"part": "demonstrations", "method": "full", "demonstrations": MANY},
        *({"part": "faults", "faults": faults, "cleaned": clean} for faults in ("all", *FAULTS) for clean in (False, True)),
        {"part": "faults", "faults": "none", "cleaned": True},
        *({"part": "checkpoints", "checkpoint": checkpoint, "method": method, "demonstrations": 50}
          for checkpoint in CHECKPOINTS[:2] for method in ("full", "lora-16")),
        *({"part": "layout", "layout": layout, "method": method} for layout in ("one", "many") for method in ("full", "lora-16")),
        *({"part": "operators", "habits": habits, "operators": who} for habits in (1, 2) for who in ("one", "three")),
        *({"part": "camera", "trained": trained} for trained in ("16 cm", "0 to 16 cm")),
        {"part": "light", "trained": "dim"},
        *({"part": "checkpoints", "checkpoint": checkpoint, "method": "full", "demonstrations": MANY} for checkpoint in CHECKPOINTS[:2]),
    ]
    untrained = [{"part": part, "trained": "pretrained", "seed": 0} for part in ("camera", "light")]
    return untrained + [{**part, "seed": seed} for part in parts for seed in SEEDS]


def run(point: dict) -> dict:
    """Fine-tune once, on data of the seed's own, and count."""
    parts = {"faults": faulty, "layout": at_one_layout, "operators": by_operators, "camera": under_cameras, "light": under_lights}
    return parts.get(point["part"], by_number)(point)


def by_number(point: dict) -> dict:
    """Successes by step on other layouts, and at the end on the layouts of the demonstrations; the loss of the last ten steps."""
    seed, count, checkpoint, learned = point["seed"], point["demonstrations"], point.get("checkpoint", "tiny"), {}
    watched = count == MANY or (count == 10 and point["method"] != "lora-8")
    steps = STEPS if watched else (100,)
    policy, data = load_policy(checkpoint, device="cpu"), recorded(TASK, count, seed)

    def measure(step, policy, history):
        if step + 1 in steps:
            learned[str(step + 1)] = counted(policy, TASK, EPISODES)

    history = learn(policy, samples(data), point["method"], seed, rate_of(point["method"], checkpoint), max(steps), [measure])
    found = {"success": learned, "episodes": EPISODES, "loss": round(float(np.mean(history.loss[-10:])), 4), "seconds": round(history.seconds, 1)}
    return found if count == MANY else {**found, "seen": counted_on_layouts_of(policy, data), "seen_episodes": count}


def faulty(point: dict) -> dict:
    """Twenty episodes recorded with faults: used as they are, or cleaned."""
    faults = {"all": FAULTS, "none": ()}.get(point["faults"], (point["faults"],))
    session = session_of(point["seed"], faults)
    data = cleaned(session) if point["cleaned"] else as_recorded(session)
    policy = load_policy("tiny", device="cpu")
    history = learn(policy, data, "lora-16", point["seed"])
    return {"success": counted(policy, TASK, EPISODES), "episodes": EPISODES, "samples": len(data), "seconds": round(history.seconds, 1),
            "loss": round(float(np.mean(history.loss[-10:])), 4)}


def session_of(seed: int, faults=FAULTS, episodes: int = 20):
    """The raw recordings that a seed of the part `faults` learns from."""
    return record_session(TASK, episodes, SESSION_FROM + 1000 * seed, faults)


def at_one_layout(point: dict) -> dict:
    """Twenty demonstrations of one layout or of many; successes where each object is shifted by up to so many centimetres, and anywhere."""
    policy = load_policy("tiny", device="cpu")
    variation = Variation(places=PLACES) if point["layout"] == "one" else Variation()
    learn(policy, samples(recorded(TASK, 20, point["seed"], variation=variation)), point["method"], point["seed"])
    there = {str(cm): rollout(policy, TASK, FEWER, variation=Variation(places=PLACES, place_shift=cm / 100), progress=False) for cm in SHIFTS}
    return {"shifted": {cm: int(found.success.sum()) for cm, found in there.items()}, "shifted_episodes": FEWER,
            "error_mm": {cm: round(1000 * float(np.median(found.position_error)), 1) for cm, found in there.items()},
            "anywhere": counted(policy, TASK, EPISODES), "episodes": EPISODES}


def by_operators(point: dict) -> dict:
    """Twelve demonstrations of one operator (another one for each seed) or four of each of three, and where the policy grasps."""
    seed = point["seed"]
    chosen = NAMES if point["operators"] == "three" else (NAMES[seed],)
    who = tuple(with_habits(name, point["habits"]) for name in chosen)
    policy, data = load_policy("tiny", device="cpu"), recorded(TASK, 12, seed, operators=who)
    learn(policy, samples(data), "lora-16", seed)
    return {"success": counted(policy, TASK, EPISODES), "episodes": EPISODES, "seen": counted_on_layouts_of(policy, data), "seen_episodes": len(data),
            "grasp_mm": grasp_offset(policy), "taught_mm": [round(1000 * float(x), 2) for x in np.mean([one.grasp_offset for one in who], axis=0)]}


def with_habits(name: str, size: float) -> Operator:
    """An operator whose grasp lies `size` times as far from the object's centre, with everything else as it is."""
    one = OPERATORS[name]
    x, y = one.grasp_offset
    return Operator(one.name, one.approach, one.grasp_yaw, (size * x, size * y), one.place_offset, one.speed, one.noise)


def grasp_offset(policy, episodes: int = EPISODES) -> list[float]:
    """Mean of the first waypoint's distance from the centre of the object it should take, x and y in millimetres.

    Waypoints further than 5 cm from it are left out: they mean another object.
    """
    found = []
    for seed in range(EVALUATION_SEED, EVALUATION_SEED + episodes):
        env = Tabletop(TASK)
        observation, _ = env.reset(seed=seed)
        centre = env.state.positions[index_of(env.episode.scene, env.episode.command.object)]
        found.append(policy.act(observation)[:2] - centre[:2])
    near = [offset for offset in found if np.hypot(*offset) < 0.05]
    return [round(1000 * float(x), 2) for x in np.mean(near, axis=0)]


def under_cameras(point: dict) -> dict:
    """Fifty demonstrations of an old task at one pose of the camera, or ten at each of five; successes by the pose it is used at."""
    poses = {"pretrained": (), "16 cm": (16,), "0 to 16 cm": CAMERAS}[point["trained"]]
    policy = adapted(point, [moved(cm) for cm in poses])
    return {"success": {str(cm): counted(policy, MOVED_TASK, FEWER, variation=moved(cm)) for cm in CAMERAS}, "episodes": FEWER}


def under_lights(point: dict) -> dict:
    """Fifty demonstrations of an old task at 20 % of the light; successes by the light it is used in, in percent."""
    policy = adapted(point, [Variation(light=0.2)] if point["trained"] == "dim" else [])
    return {"success": {str(light): counted(policy, MOVED_TASK, FEWER, variation=Variation(light=light / 100)) for light in LIGHTS},
            "episodes": FEWER}


def moved(cm: float) -> Variation:
    """The camera stands this far to the side and looks at the same point."""
    return Variation(camera_shift=(cm / 100, 0.0, 0.0))


def adapted(point: dict, conditions: list[Variation]):
    """A policy fine-tuned on fifty demonstrations of the old task in all, in equal parts from the conditions; untouched where there are none."""
    policy = load_policy("tiny", device="cpu")
    if conditions:
        data = [d for i, one in enumerate(conditions)
                for d in recorded(MOVED_TASK, 50 // len(conditions), point["seed"] + 10 * i, variation=one)]
        learn(policy, samples(data), "lora-16", point["seed"])
    return policy


@lru_cache(maxsize=4)
def recorded(task: str, count: int, seed: int, operators=("expert",), variation: Variation = Variation()):
    """The first `count` successful demonstrations from the simulator's seeds that belong to `seed`, in a list."""
    who = [OPERATORS[one] if isinstance(one, str) else one for one in operators]
    return list(record(task, who, episodes=count, seed=RECORDED_FROM + 1000 * seed, variation=variation, shares=(1, 0, 0), keep_failures=False))


def learn(policy, data, method: str, seed: int, learning_rate: float | None = None, steps: int = 100, callbacks=(), progress: bool = False):
    """Fine-tune `policy` in place by a method of METHODS, with the best rate of few_shot_rates unless another is given.   Returns the history."""
    config = None if method == "full" else lora(int(method.removeprefix("lora-")))
    return fine_tune(policy, data, steps=steps, learning_rate=learning_rate or rate_of(method), peft_config=config, seed=seed,
                     callbacks=callbacks, progress=progress)


def rate_of(method: str, checkpoint: str = "tiny") -> float:
    """The learning rate that validation chose: most successes in the stored sweep few_shot_rates, of equals the smallest.

    Raises UserError where that was never run, KeyError for a method or checkpoint that it does not have.
    """
    stored = load_sweep("few_shot_rates")
    where = {"checkpoint": checkpoint, "method": method}
    rates = sorted({point["learning_rate"] for point in stored.where(**where)})
    return max(rates, key=lambda rate: stored.values("success", learning_rate=rate, **where).mean())
