"""What measures speed: every figure is a ratio against a peer in the same run, on the same machine. Nothing here is a test."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial

import numpy as np

_STEPS, _BATCH = 40, 16
_RENDERER = """
import sys, time, mujoco
from labkit.tabletop import Tabletop
env = Tabletop("put"); env.reset(seed=0)
renderer = mujoco.Renderer(env.model, {size}, {size})
def shoot():
    renderer.disable_depth_rendering(); renderer.update_scene(env.data); renderer.render()
    renderer.enable_depth_rendering(); renderer.update_scene(env.data); renderer.render()
shoot(); begun = time.perf_counter()
for _ in range(100): shoot()
print(100 / (time.perf_counter() - begun))
"""


@dataclass(frozen=True)
class Measurement:
    """ours and peer in `unit`, more is better; peer is nan where there is none here, and `note` says why."""

    name: str
    ours: float
    peer: float
    unit: str
    note: str

    @property
    def ratio(self) -> float:
        """How many times ours the peer's."""
        return self.ours / self.peer


def camera(frames: int = 500) -> Measurement:
    """RGB-D frames a second of the ray camera against `mujoco.Renderer` (OpenGL), both 48 x 48, one thread."""
    from labkit.tabletop import Tabletop
    from labkit.tabletop.camera import OBSERVATION_SIZE

    env = Tabletop("put")
    env.reset(seed=0)
    env.photograph(env.camera)
    begun = time.perf_counter()
    for _ in range(frames):
        env.photograph(env.camera)
    ours = frames / (time.perf_counter() - begun)
    for backend in ("egl", "osmesa", ""):
        # OpenGL can take the whole process down, so it is tried in another one.
        environment = {**os.environ, **({"MUJOCO_GL": backend} if backend else {})}
        ran = subprocess.run([sys.executable, "-c", _RENDERER.format(size=OBSERVATION_SIZE)], capture_output=True, text=True, env=environment)
        if ran.returncode == 0:
            return Measurement("camera", ours, float(ran.stdout.split()[-1]), "RGB-D frames/s", f"peer: mujoco.Renderer, {backend or 'default'}")
    return Measurement("camera", ours, float("nan"), "RGB-D frames/s", "mujoco.Renderer does not work on this machine")


def _samples(count=64):
    from labkit.actions import small_action
    from labkit.demonstrations import Samples
    from labkit.tabletop import Tabletop
    from labkit.tabletop.experts import next_waypoint

    rows = []
    for seed in range(count):
        env = Tabletop("put")
        observation, _ = env.reset(seed=seed)
        rows.append((observation["instruction"], observation["rgb"], bool(observation["holding"]),
                     small_action(next_waypoint(env.episode.command, env.episode.scene, env.start, env.state))))
    instructions, images, holding, actions = zip(*rows)
    return Samples(list(instructions), np.stack(images), np.array(holding), np.stack(actions))


def fine_tuning() -> Measurement:
    """Optimiser steps a second of `fine_tune` against `transformers.Trainer`: same model, samples, masking, dtype, threads, batch."""
    from labkit.policy import load_policy
    from labkit.sft import fine_tune

    samples, policy = _samples(), load_policy("tiny")
    fine_tune(policy.copy(), samples, steps=3, progress=False)
    rates = {"ours": [], "peer": []}
    for _ in range(3):
        rates["ours"].append(_STEPS / fine_tune(policy.copy(), samples, steps=_STEPS, batch_size=_BATCH, progress=False).seconds)
        rates["peer"].append(_trainer_rate(policy.copy(), samples))
    return Measurement("fine_tune", np.median(rates["ours"]), np.median(rates["peer"]), "steps/s",
                       f"peer: transformers.Trainer; batch {_BATCH}, median of 3 runs in turn")


def _trainer_rate(policy, samples):
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    from labkit.sft import tokenize

    data = tokenize(policy, samples)
    rows = [{name: value[i] for name, value in data.items()} for i in range(len(samples))]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=_BATCH, max_steps=_STEPS, learning_rate=5e-4, lr_scheduler_type="constant", weight_decay=0.0,
            max_grad_norm=1.0, optim="adamw_torch_fused", report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
            use_cpu=policy.model.device.type == "cpu", dataloader_pin_memory=False, seed=0,
        )
        trainer = Trainer(policy.model, arguments, train_dataset=rows)
        trainer.remove_callback(PrinterCallback)
        begun = time.perf_counter()
        trainer.train()
        return _STEPS / (time.perf_counter() - begun)


def evaluation(episodes: int = 100) -> Measurement:
    """Episodes a second in lock step against one after the other, the same episodes."""
    from labkit.policy import load_policy
    from labkit.rollouts import rollout

    policy = load_policy("tiny")
    rollout(policy, "put", 4, progress=False)
    together = rollout(policy, "put", episodes, progress=False)
    alone = rollout(policy, "put", episodes, batch=1, progress=False)
    same = int((together.success == alone.success).sum())
    return Measurement("evaluation", episodes / together.seconds, episodes / alone.seconds, "episodes/s",
                       f"{episodes} episodes in {together.seconds:.1f} s; peer: one by one; {same} of {episodes} end alike")


def matrix_peak() -> Measurement:
    """Floating-point operations a second that training reaches, against a large matrix product on the same threads."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from labkit.policy import load_policy
    from labkit.sft import batch_loss, fine_tune, tokenize

    samples, policy = _samples(_BATCH), load_policy("tiny")
    counter = FlopCounterMode(display=False)
    with counter:
        batch_loss(policy.model.train(), tokenize(policy, samples)).backward()
    policy.model.zero_grad()
    history = fine_tune(policy, samples, steps=_STEPS, batch_size=_BATCH, progress=False)
    a = torch.randn(1024, 1024)
    a @ a
    begun = time.perf_counter()
    for _ in range(20):
        a @ a
    peak = 20 * 2 * 1024**3 / (time.perf_counter() - begun)
    ours = counter.get_total_flops() * _STEPS / history.seconds
    return Measurement("matrix peak", ours / 1e9, peak / 1e9, "GFLOP/s", f"peer: a 1024 x 1024 fp32 product, {torch.get_num_threads()} thread(s)")


def reading() -> Measurement:
    """RGB-D samples a second out of a LeRobot dataset on disk, against the lab sheet's folder with the same demonstrations."""
    from labkit import lerobot
    from labkit.demonstrations import read
    from labkit.paths import DATA

    source, rates = DATA / "demonstrations" / "replay", {"ours": [], "peer": []}
    with tempfile.TemporaryDirectory() as folder:
        demonstrations = read(source)
        lerobot.export(f"{folder}/replay", demonstrations)
        count = sum(map(len, demonstrations))
        for _ in range(5):
            for name, act in (("ours", lambda: lerobot.demonstrations(f"{folder}/replay")), ("peer", lambda: read(source))):
                begun = time.perf_counter()
                act()
                rates[name].append(count / (time.perf_counter() - begun))
    return Measurement("reading", np.median(rates["ours"]), np.median(rates["peer"]), "samples/s",
                       f"a LeRobot dataset of {count} samples; peer: the lab sheet's folder; median of 5 runs in turn")


def serving(name: str = "tiny", requests: int = 400) -> Measurement:
    """Decisions a second of one robot at the 95th percentile, through a policy server in a process of its own against the policy called directly.

    name: as of `serve --policy`.   Both are asked about the same pictures, in turn by blocks of ten.
    """
    from labkit.serving.client import PolicyClient
    from labkit.serving.core import policy_named
    from labkit.tabletop import Tabletop

    env, policy = Tabletop("pick"), policy_named(name)
    seen = [env.reset(seed=seed)[0] for seed in range(10)]
    command = [sys.executable, "-m", "labkit", "serve", "--policy", name, "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        client = PolicyClient(server.stdout.readline().split()[3].removesuffix("/act;"))
        seconds = {"ours": [], "peer": []}
        for _ in range(1 + requests // len(seen)):
            for who, asked in (("ours", client), ("peer", policy)):
                seconds[who] += [asked.decide([observation]).seconds for observation in seen]
    finally:
        server.terminate()
        server.communicate()
    ours, peer = (np.percentile(seconds[who][len(seen):], 95) for who in ("ours", "peer"))
    return Measurement("serving" if name == "tiny" else f"serving_{name}", 1 / ours, 1 / peer, "decisions/s",
                       f"p95 {1000 * ours:.1f} ms by HTTP, the policy {1000 * peer:.1f} ms: {ours / peer:.2f} times; {requests} of each, in turn")


BENCHMARKS = {"camera": camera, "fine_tune": fine_tuning, "evaluation": evaluation, "matrix_peak": matrix_peak, "reading": reading,
              "serving": serving, "serving_generic": partial(serving, "generic")}
