"""The lab's step 6 and its troubleshooting: ways to make a policy smaller, caching, delay against precision, and four troubles with their cures."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import lru_cache, partial

import numpy as np
import torch
from torch import nn

from labkit.augmentation import Augmentation, commands_of
from labkit.experiments.lab_task_specific_vla import OURS, recorded, specialise
from labkit.experiments.measuring import counted, counted_on_layouts_of
from labkit.forgetting import start_of, trained
from labkit.instructions import Command, say
from labkit.policy import load_policy
from labkit.progressive import old_column, with_column
from labkit.rollouts import EVALUATION_SEED, lock_step
from labkit.serving.caching import CachingPolicy
from labkit.serving.delay import rollout_with_delay
from labkit.serving.monitor import Monitor, Monitored
from labkit.serving.quantisation import WAYS, answer_difference, disk_bytes, dynamic_int8, onnx_int8, static_int8, weight_bytes
from labkit.tabletop import Tabletop, Variation
from labkit.tabletop.experts import next_waypoint
from labkit.tabletop.scene import BIN_PLACES, Bin, Scene, Thing
from labkit.tabletop.tasks import commands, index_of
from labkit.task_specific_vla import WaypointPolicy, load_waypoint_policy, policy_from_clip
from labkit.waypoint_regression import WaypointSamples, fit, predict, waypoint_samples

ABOUT = ("deployment of the lab's policies. ways: the generic policy data/tiny_clip_policy and the tiny VLA made smaller in every way of "
         "labkit/serving/quantisation.py: bytes, milliseconds of a decision at batch 1 beside those of float32 in turn with it, distance of the "
         "answers, success on put and pick. caching: pictures that count as the same up to a threshold in grey levels, on independent layouts "
         "and at a station where one block lies within 3 or 6 cm of its place; sentences up to a share of other words. delay: pick from a belt, "
         "every decision late by so many seconds, float32 and ONNX int8 on the same episodes; `own`: each late by its own median. troubles: "
         "overfitting (stack, 10 demonstrations, last epoch), slow (forward), forgetting (stack, then put), data (forward, 10 demonstrations, "
         "from the towers alone), as they come (none) and with each cure; what stands after a comma is not the sheet's")
SEEDS, EPISODES, FEWER, BELT_EPISODES = range(3), 100, 50, 400
ASKED, WARM_UP = 200, 10
REDUCED = {
    "fp32": lambda policy: policy, **WAYS,
    "dynamic int8, one scale": partial(dynamic_int8, per_channel=False),
    "static int8, not calibrated": static_int8,
    "static int8": lambda policy: static_int8(policy, observations_of(recorded("put", DEMONSTRATIONS, 0)[0])),
}
IN_TORCH = tuple(way for way in REDUCED if not way.startswith("onnx"))
PICTURE_THRESHOLDS = (None, 0, 5, 10, 20, 30, 40, 60, 80, 120, 255)
SENTENCE_THRESHOLDS = (0.0, 0.2, 0.35, 0.5, 1.0)
STATION_PLACE, STATION_BINS, STATION_SHIFTS = (0.0, -0.03), ("green", "blue", "yellow"), {"3 cm": 0.03, "6 cm": 0.06}
BELTS, DELAYS = (0.02, 0.04), (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
CURES = {
    "overfitting": ("none", "regularisation", "regularisation, to its start", "smaller capacity", "more diverse data"),
    "slow": ("none", "quantisation", "smaller model", "edge runtime"),
    "forgetting": ("none", "learning-rate annealing", "regularisation", "progressive network", "progressive network, copied"),
    "data": ("none", "augmentation", "synthetic data", "transfer", "transfer, augmentation", "transfer, synthetic data"),
}
DEMONSTRATIONS, FEW = 50, 10
# Steps of 16 samples, whatever the number of samples: a cure that brings more data does not train longer.
OVERFITTING_STEPS, LITTLE_DATA_STEPS = 200, 800
# Ten times the lab sheet's weight decay, and its dropout: stronger ones lost on the data of seed 100, where the pull was chosen, too.
WEIGHT_DECAY, DROPOUT = 0.1, 0.1
PULL, ANNEALED = 1.0, {"step_size": 4, "gamma": 0.4}
# The column's part of what our settings are for a whole model.
A_COLUMN = {name: value for name, value in OURS.items() if name != "tower_rate"}
SCENES, SCENES_FROM = 200, 8_000_000


def points() -> list[dict]:
    """The parts that `ABOUT` names; three seeds for what is trained, one for what is not."""
    once = [
        *({"part": "ways", "policy": "generic", "way": way} for way in REDUCED),
        *({"part": "ways", "policy": "tiny", "way": way} for way in IN_TORCH),
        *({"part": "caching", "of": "pictures", "scenes": scenes, "threshold": threshold}
          for scenes in ("independent", *STATION_SHIFTS) for threshold in PICTURE_THRESHOLDS),
        *({"part": "caching", "of": "sentences", "scenes": "independent", "threshold": threshold} for threshold in SENTENCE_THRESHOLDS),
        *({"part": "delay", "belt": belt, "delay": delay} for belt in BELTS for delay in (*DELAYS, "own")),
    ]
    troubles = [{"part": "troubles", "trouble": trouble, "cure": cure} for trouble, cures in CURES.items() for cure in cures]
    return [{**part, "seed": 0} for part in once] + [{**part, "seed": seed} for part in troubles for seed in SEEDS]


def run(point: dict) -> dict:
    """Measure what the point says."""
    if point["part"] == "troubles":
        return {"overfitting": overfitted, "slow": slow, "forgetting": forgetful, "data": with_little_data}[point["trouble"]](point)
    return {"ways": by_way, "caching": with_cache, "delay": on_a_belt}[point["part"]](point)


def by_way(point: dict) -> dict:
    """Successes, bytes, milliseconds, and how the answers about grasps and places differ from those in float32."""
    policy = load_waypoint_policy() if point["policy"] == "generic" else load_policy("tiny", device="cpu")
    changed, asked = REDUCED[point["way"]](policy), observations_of(recorded("put", DEMONSTRATIONS, 1)[0])
    apart, weight_and_time = answer_difference(changed, policy, asked), cost(changed, policy, first_observations("put", ASKED))
    return {"success": {task: counted(changed, task, EPISODES) for task in ("put", "pick")}, "episodes": EPISODES, **weight_and_time,
            "apart_mm": {"mean": round(float(apart.millimetres.mean()), 2), "most": round(float(apart.millimetres.max()), 2)},
            "other_grips": int(apart.grips.sum()), "places": apart.places, "asked": len(asked)}


def cost(policy, reference, observations) -> dict:
    """Bytes in memory and on disk, and the milliseconds of a decision at batch 1.

    reference: asked the same in turn, so that whatever else the machine does slows both: the ratio of the two says more than either.
    """
    seconds = np.array([[one.decide([o]).seconds for one in (policy, reference)] for o in [*observations[:WARM_UP], *observations]])[WARM_UP:]
    ms, fp32_ms = (quantiles(column) for column in seconds.T)
    return {"bytes": weight_bytes(policy), "disk": disk_bytes(policy), "ms": ms, "fp32_ms": fp32_ms}


def quantiles(seconds) -> dict[str, float]:
    """(N,) seconds  ->  median and 95th percentile, in milliseconds."""
    return {name: round(1000 * float(np.quantile(seconds, q)), 2) for name, q in (("p50", 0.5), ("p95", 0.95))}


def first_observations(task: str, count: int, variation: Variation = Variation()) -> list[dict]:
    """The first observations of episodes that no success is counted on."""
    env = Tabletop(task, variation)
    return [env.reset(seed=SCENES_FROM + i)[0] for i in range(count)]


def observations_of(demonstrations) -> list[dict]:
    """What the robot saw before each decision of some demonstrations, as a policy is asked it."""
    return [{"rgb": image, "holding": int(holding), "instruction": d.instruction}
            for d in demonstrations for image, holding in zip(d.images, d.holding, strict=True)]


class Station(Tabletop):
    """A place of work: one red block near its place, the same three bins every time; only block, goal and words change with the seed."""

    def __init__(self, shift: float):
        """shift: how far the block may lie from its place along x and along y, in metres."""
        super().__init__("put")
        self.shift = shift

    def _draw_episode(self, **options):
        rng = self.np_random
        x, y = np.add(STATION_PLACE, rng.uniform(-self.shift, self.shift, 2))
        bins = tuple(Bin(colour, *place) for colour, place in zip(STATION_BINS, BIN_PLACES, strict=True))
        scene = Scene((Thing("red", "block", float(x), float(y)),), bins)
        command = Command("put", ("red", "block"), STATION_BINS[rng.integers(len(STATION_BINS))])
        return super()._draw_episode(**{"scene": scene, "command": command, **options})


def with_cache(point: dict) -> dict:
    """Successes on put, one episode after the other, and how often the cache of pictures or of sentences was asked and knew."""
    policy = CachingPolicy(load_waypoint_policy(), **{f"{point['of'][:-1]}_threshold": point["threshold"]})
    monitor, success = Monitor(window=10 * EPISODES), 0
    for seed in range(EVALUATION_SEED, EVALUATION_SEED + EPISODES):
        env = Tabletop("put") if point["scenes"] == "independent" else Station(STATION_SHIFTS[point["scenes"]])
        done, _, _ = lock_step(Monitored(policy, monitor), [env], [env.reset(seed=seed)[0]])
        success += int(done[0])
    counts, look = getattr(policy, point["of"]).counts, monitor.look()
    return {"success": success, "episodes": EPISODES, "exact": counts.exact, "similar": counts.similar, "misses": counts.misses,
            "ms": {"p50": round(1000 * look.p50, 2), "p95": round(1000 * look.p95, 2)}}


@lru_cache(maxsize=1)
def both_precisions() -> dict:
    """The generic policy in float32, and its towers in ONNX Runtime as int8."""
    policy = load_waypoint_policy()
    return {"fp32": policy, "int8": onnx_int8(policy)}


def on_a_belt(point: dict) -> dict:
    """Successes of both precisions on the same episodes, each late by the same seconds or by its own median; who alone succeeds, for McNemar."""
    policies, belt = both_precisions(), Variation(belt_speed=point["belt"], shapes=("block", "cup"))  # a ball would roll
    late = {name: point["delay"] for name in policies}
    if point["delay"] == "own":
        measured = cost(policies["int8"], policies["fp32"], first_observations("pick", ASKED, belt))
        late = {"fp32": measured["fp32_ms"]["p50"] / 1000, "int8": measured["ms"]["p50"] / 1000}
    found = {name: rollout_with_delay(policy, "pick", late[name], BELT_EPISODES, variation=belt, progress=False).success
             for name, policy in policies.items()}
    return {"success": {name: int(success.sum()) for name, success in found.items()}, "episodes": BELT_EPISODES,
            "only": {"fp32": int((found["fp32"] & ~found["int8"]).sum()), "int8": int((found["int8"] & ~found["fp32"]).sum())},
            "late_ms": {name: round(1000 * seconds, 2) for name, seconds in late.items()}}


def overfitted(point: dict) -> dict:
    """Successes on other layouts and on those of the demonstrations, and how far the answers are from the labels there and on test ones.

    The last epoch's weights, not the best one's: to keep the best is a cure of its own.
    """
    cure, seed, policy = point["cure"], point["seed"], load_waypoint_policy()
    whole = recorded("stack", DEMONSTRATIONS, seed)
    data = whole if cure == "more diverse data" else (whole[0][:FEW], *whole[1:])
    schedule = epochs_for(OVERFITTING_STEPS, len(waypoint_samples(data[0])))
    policy.model.action_head[2].p = DROPOUT if cure == "regularisation" else 0.0
    last, held = {}, pulled_to_its_start(policy.model, PULL) if cure.endswith("to its start") else nullcontext()
    with held:
        curves = specialise(policy, "frozen" if cure == "smaller capacity" else "full", data, seed, **schedule,
                            weight_decay=WEIGHT_DECAY if cure == "regularisation" else 0.0,
                            callbacks=[lambda epoch, policy, curves: last.update(weights_of(policy.model))])
    policy.model.load_state_dict(last)
    return {"success": counted(policy, "stack", EPISODES), "episodes": EPISODES,
            "seen": counted_on_layouts_of(policy, data[0]), "seen_episodes": len(data[0]),
            "off_mm": {"train": off_by(policy, data[0]), "test": off_by(policy, data[2])},
            "loss": {"train": round(curves.train[-1], 4), "validation": round(curves.validation[-1], 4),
                     "best": round(min(curves.validation), 4)},
            "trainable": curves.trainable, "seconds": round(curves.seconds, 1)}


def epochs_for(steps: int, samples: int) -> dict[str, int]:
    """How long `fit` trains for so many steps on so many samples an epoch; the rates fall once, half way."""
    epochs = max(1, round(steps / -(-samples // OURS["batch_size"])))
    return {"epochs": epochs, "step_size": max(1, epochs // 2)}


def weights_of(model) -> dict[str, torch.Tensor]:
    """A copy of everything in the state_dict."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def off_by(policy: WaypointPolicy, demonstrations) -> float:
    """Mean distance of the places the policy says from the demonstrated ones, in millimetres."""
    samples = waypoint_samples(demonstrations, policy.model.frames)
    return round(1000 * float(np.linalg.norm(predict(policy, samples)[:, :3] - samples.actions[:, :3], axis=1).mean()), 2)


def slow(point: dict) -> dict:
    """Successes on forward of a policy that was made specific to it, and what a decision costs beside the whole model's."""
    whole, data = load_waypoint_policy(), recorded("forward", DEMONSTRATIONS, point["seed"])
    if point["cure"] == "smaller model":
        policy = with_half_the_layers(whole)
        curves = specialise(policy, "full", data, point["seed"])
    else:
        curves = specialise(whole, "language", data, point["seed"])
        policy = REDUCED[{"none": "fp32", "quantisation": "dynamic int8", "edge runtime": "onnx fp32"}[point["cure"]]](whole)
    return {"success": counted(policy, "forward", EPISODES), "episodes": EPISODES, **cost(policy, whole, first_observations("forward", ASKED)),
            "seconds": round(curves.seconds, 1)}


def with_half_the_layers(policy: WaypointPolicy) -> WaypointPolicy:
    """A copy without every second layer of each tower, as DistilBERT begins (arXiv 1910.01108, section 2); it needs training to be of use."""
    copy = policy.copy()
    for tower in copy.model.towers():
        tower.encoder.layers = nn.ModuleList(tower.encoder.layers[::2])
        tower.config.num_hidden_layers = len(tower.encoder.layers)
    return copy


def forgetful(point: dict) -> dict:
    """Successes on stack, which it learns, and on put, which it knew; of two columns, put is the old one's.

    `unrouted`: put asked of the column that learned stack, as where nobody tells which task it is.
    """
    cure, seed, policy = point["cure"], point["seed"], load_waypoint_policy()
    data, constant, two = recorded("stack", DEMONSTRATIONS, seed), {"gamma": 1.0}, cure.startswith("progressive")
    if two:
        policy = with_column(policy, copied=cure.endswith("copied"), seed=seed)
        curves = fit(policy, *(waypoint_samples(part) for part in data[:2]), seed=seed, progress=False, **A_COLUMN)
    elif cure == "regularisation":
        with pulled_to_its_start(policy.model, PULL):
            curves = specialise(policy, "full", data, seed, **constant)
    else:
        curves = specialise(policy, "full", data, seed, **(ANNEALED if cure == "learning-rate annealing" else constant))
    unrouted = {"unrouted": counted(policy, "put", FEWER), "unrouted_episodes": FEWER} if two else {}
    return {"success": counted(policy, "stack", EPISODES), "episodes": EPISODES,
            "old": counted(old_column(policy) if two else policy, "put", FEWER), "old_episodes": FEWER, **unrouted,
            "trainable": curves.trainable, "total": curves.total, "seconds": round(curves.seconds, 1)}


@contextmanager
def pulled_to_its_start(model, strength: float):
    """While it lasts, every gradient of the model has that of strength / 2 * sum of (theta - theta_0)^2 added: `forgetting.l2_penalty` for `fit`.

    As a hook on each parameter, since `fit` takes no penalty.
    """
    start = start_of(model)
    hooks = [p.register_hook(lambda gradient, p=p, name=name: gradient + strength * (p.detach() - start[name]))
             for name, p in trained(model).items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def with_little_data(point: dict) -> dict:
    """Successes on forward after ten demonstrations, and how far the answers are from the labels of test ones."""
    seed, cures = point["seed"], point["cure"].split(", ")
    policy = load_waypoint_policy() if "transfer" in cures else policy_from_clip(seed=seed, readout="spatial")
    whole = recorded("forward", DEMONSTRATIONS, seed)
    data = (whole[0][:FEW], *whole[1:])
    samples, more = waypoint_samples(data[0]), more_of(data[0], cures[-1], seed)
    count = len(samples if more is None else more(samples, 0))
    curves = specialise(policy, "full", data, seed, more, **epochs_for(LITTLE_DATA_STEPS, count))
    return {"success": counted(policy, "forward", EPISODES), "episodes": EPISODES, "off_mm": off_by(policy, data[2]),
            "samples": count, "seconds": round(curves.seconds, 1)}


def more_of(demonstrations, cure: str, seed: int):
    """What an epoch trains on, for `fit(augment=...)`: augmented demonstrations, or them and synthetic samples; None for another cure."""
    if cure == "augmentation":
        return Augmentation(colour=0.3, commands=commands_of(demonstrations), seed=seed)
    if cure == "synthetic data":
        added = synthetic_moves("forward", SCENES, SCENES_FROM + 1_000_000 + 10_000 * seed)
        return lambda samples, epoch: together(samples, added)
    return None


def together(a: WaypointSamples, b: WaypointSamples) -> WaypointSamples:
    """The samples of both, one after the other."""
    return WaypointSamples(a.ids + b.ids, a.instructions + b.instructions, *(np.concatenate([getattr(one, name) for one in (a, b)])
                                                                             for name in ("images", "holding", "actions")))


def synthetic_moves(task: str, scenes: int, seed: int) -> WaypointSamples:
    """Pictures of tables on which nobody moved anything, labelled for every command of `task`: the grasp, and what follows with the object held.

    Of each of `scenes` scenes, from the simulator's seeds `seed`, `seed` + 1, ...; the second picture has the object put under the gripper by
    hand, as the pretraining's scenes have (pretrain.py).   task: of one object that is grasped and then placed.
    """
    env, rows = Tabletop(task), []
    for one in range(seed, seed + scenes):
        observation, _ = env.reset(seed=one)
        scene, rng = env.episode.scene, np.random.default_rng([one, 23])
        for command in commands(task, scene):
            said, index = say(command, rng, unique_colours=scene.unique_colours), index_of(scene, command.object)
            rows.append((f"synthetic-{one}-{index}/0", said, observation["rgb"], False, next_waypoint(command, scene, env.start, env.start)))
            with env.held_up(index):
                picture, held = env.photograph(env.camera)[0], replace(env.state, held=index)
            rows.append((f"synthetic-{one}-{index}/1", said, picture, True, next_waypoint(command, scene, env.start, held)))
    ids, said, images, holding, waypoints = zip(*rows, strict=True)
    return WaypointSamples(list(ids), list(said), np.stack(images)[:, None], np.array(holding), np.stack(waypoints))
