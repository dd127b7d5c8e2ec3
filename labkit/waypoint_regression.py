"""Fine-tuning by regression: samples with whole waypoints, and the loop that fits a task-specific VLA to them and can go on after a kill."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import l1_loss, mse_loss

from labkit.demonstrations import Demonstration
from labkit.errors import UserError
from labkit.tabletop.camera import OBSERVATION_SIZE, pixels_of
from labkit.task_specific_vla import AXES, UNITS, WaypointPolicy, frames_of, parameter_groups

LOSSES = {"mse": mse_loss, "l1": l1_loss}
HIGHEST_TOP = 0.09  # metres: the top of a cup that stands in a bin
BEST, STATE = "best.safetensors", "state.pt"


@dataclass
class WaypointSamples:
    """What regression learns from, one row a decision.

    ids: N names, "EPISODE/DECISION".   instructions: N sentences.   images: (N, frames, H, W, 3) uint8, the current picture first.
    holding: (N,) bool.   actions: (N, A) in metres and radians; on the tabletop x, y, z, roll, pitch, yaw, grip.
    """

    ids: list[str]
    instructions: list[str]
    images: np.ndarray
    holding: np.ndarray
    actions: np.ndarray

    def __len__(self):
        return len(self.ids)

    def rows(self, chosen) -> "WaypointSamples":
        """Some of them, by row number."""
        return WaypointSamples([self.ids[i] for i in chosen], [self.instructions[i] for i in chosen], self.images[chosen],
                               self.holding[chosen], self.actions[chosen])


def waypoint_samples(demonstrations: Iterable[Demonstration], frames: int = 1, failures: bool = False) -> WaypointSamples:
    """The decisions of the successful demonstrations (of all with `failures`), in their order.

    Raises ValueError where nothing is left.
    """
    kept = [d for d in demonstrations if d.success or failures]
    if not kept:
        raise ValueError("there is no successful demonstration to learn from")
    return WaypointSamples(
        [f"{d.id}/{k}" for d in kept for k in range(len(d))],
        [d.instruction for d in kept for _ in range(len(d))],
        np.stack([frames_of(d.images[k], d.images[k - 1] if k else None, frames) for d in kept for k in range(len(d))]),
        np.concatenate([d.holding for d in kept]),
        np.concatenate([d.actions for d in kept]),
    )


@dataclass
class Curves:
    """How a run went.   train, validation: mean loss of each epoch, on normalised actions.   rates: learning rate of each group in each epoch.

    best_epoch: whose weights the policy has at the end, counted from 0.   seconds: of training, over all calls that went on with the run.
    stopped_early: whether `patience` ended it.
    """

    train: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    rates: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = -1
    seconds: float = 0.0
    stopped_early: bool = False
    trainable: int = 0
    total: int = 0

    def add(self, train: float, validation: float) -> bool:
        """One more epoch; True where its validation loss is the lowest so far."""
        self.train.append(train)
        self.validation.append(validation)
        is_best = self.best_epoch < 0 or validation < self.validation[self.best_epoch]
        if is_best:
            self.best_epoch = len(self.validation) - 1
        return is_best

    def is_stale(self, patience: int | None) -> bool:
        """Whether the last `patience` epochs brought no lower validation loss."""
        return patience is not None and len(self.train) - 1 - self.best_epoch >= patience

    def __str__(self):
        if not self.train:
            return "no epochs"
        ended = ", stopped early" if self.stopped_early else ""
        return (f"{len(self.train)} epochs in {self.seconds:.1f} s{ended}, loss {self.train[0]:.4f} to {self.train[-1]:.4f}, best validation "
                f"{self.validation[self.best_epoch]:.4f} in epoch {self.best_epoch}, {self.trainable:,} of {self.total:,} parameters trained")


def epochs_of(losses: Iterable[float], patience: int) -> list[int]:
    """[best, last]: whose weights `fit` would load again, and after which epoch it would stop, at these validation losses."""
    curves = Curves()
    for value in losses:
        if not curves.is_stale(patience):
            curves.add(value, value)
    return [curves.best_epoch, len(curves.validation) - 1]


def step_faults(before: dict, after: dict, trained) -> dict[str, list[str]]:
    """What a training step did that it should not have done.

    before, after: name -> tensor.   trained: names that are meant to move.   Returns {"still": names of these that did not, "moved": names of
    others that did}.
    """
    changed = {name for name, value in before.items() if (value != after[name]).any()}
    return {"still": [name for name in trained if name not in changed], "moved": sorted(changed.difference(trained), key=list(before).index)}


def patch_of(waypoints, patch: int):
    """(N,) index of the patch in which the robot's camera sees where each waypoint leads to.

    waypoints: (N, >= 3) x, y, z in metres; one that hovers is about what lies under it.   patch: pixels a side.
    """
    across = OBSERVATION_SIZE // patch
    points = np.array(waypoints, np.float64)[:, :3]
    points[:, 2] = np.minimum(points[:, 2], HIGHEST_TOP)
    column, row = np.clip(pixels_of(points) // patch, 0, across - 1).astype(int).T
    return row * across + column


def pointing_loss(looks, waypoints, patch: int):
    """How far the first query is from looking at the place the waypoint leads to: mean negative log of its attention there.

    Regression alone begins with a look everywhere at once and is slow to leave it; the label itself says where to look.
    looks: (N, frames, queries, P), see `TaskSpecificVLA.predict`.   waypoints: (N, >= 3) metres.   Returns a scalar in nats.
    """
    wanted = torch.as_tensor(patch_of(waypoints, patch)).unsqueeze(1)
    return -(looks[:, 0, 0].gather(1, wanted) + 1e-6).log().mean()


class Features:
    """What a vision tower that does not train makes of some pictures: each distinct one is encoded once, however often it is used."""

    @torch.no_grad()
    def __init__(self, policy: WaypointPolicy, images: np.ndarray, batch_size: int = 64):
        """images: (N, frames, H, W, 3) uint8."""
        numbers = {}
        self.numbers = torch.tensor([[numbers.setdefault(picture.tobytes(), len(numbers)) for picture in frames] for frames in images])
        distinct, shape = list(numbers), images.shape[2:]
        policy.model.eval()
        parts = []
        for first in range(0, len(distinct), batch_size):
            pictures = np.stack([np.frombuffer(one, np.uint8).reshape(shape) for one in distinct[first : first + batch_size]])
            parts.append(policy.model.encode_pictures(policy.pixels(pictures)))
        self.pooled, self.patches = (torch.cat(kind) for kind in zip(*parts))

    def of(self, rows):
        """rows: B row numbers  ->  pooled (B, frames, Dv) and patches (B, frames, P, Dv), as `TaskSpecificVLA.encode_images` gives them."""
        chosen = self.numbers[rows]
        return self.pooled[chosen], self.patches[chosen]


def fit(policy: WaypointPolicy, train: WaypointSamples, validation: WaypointSamples, folder=None, epochs: int = 20, batch_size: int = 16,
        head_rate: float = 1e-3, tower_rate: float = 3e-4, weight_decay: float = 0.01, step_size: int = 10, gamma: float = 0.9,
        patience: int | None = None, loss: str = "mse", pointing: float = 0.0, clip: float = 1.0, seed: int = 0,
        augment: Callable[[WaypointSamples, int], WaypointSamples] | None = None, callbacks=(), progress: bool = True) -> Curves:
    """Fit `policy.model` in place by AdamW; at the end it has the weights of the epoch with the lowest validation loss.

    What may change is chosen before, with `set_trainable`; `head_rate` and `tower_rate` are the learning rates of the two groups, multiplied
    by `gamma` every `step_size` epochs (StepLR).   loss: "mse" or "l1", on normalised actions.   clip: largest gradient norm.
    pointing: weight of `pointing_loss`, for the spatial readout on pictures of our camera; the curves are without it.
    patience: epochs without a lower validation loss after which it stops; None, never.
    augment: called as augment(train, epoch), gives what this epoch trains on.   Without one, a vision tower that does not train sees each
    picture once and for all (`Features`).
    callbacks: called as callback(epoch, policy, curves) after every epoch.
    folder: keeps the best weights and, after every epoch, all that is needed to go on: the same call goes on where a killed one was, and ends
    with the same weights, bit for bit. Everything random in an epoch comes from the seed and the epoch's number. Default: a temporary folder.

    Raises ValueError for no samples, an unknown loss or nothing to train, and UserError for a folder of another run and where the loss or a
    gradient is no finite number: it names step, samples and last good checkpoint, whose weights the policy then has.
    """
    settings = {"batch_size": batch_size, "head_rate": head_rate, "tower_rate": tower_rate, "weight_decay": weight_decay,
                "step_size": step_size, "gamma": gamma, "loss": loss, "pointing": pointing, "clip": clip, "seed": seed}
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(folder) as place:
        run = _Run(policy, train, validation, settings, augment, Path(place), kept=folder is not None)
        return run.finish(epochs, patience, callbacks, progress)


class _Run:
    """One run of `fit`: what it trains, and where it stands."""

    def __init__(self, policy, train, validation, settings, augment, folder, kept):
        if not len(train) or not len(validation):
            raise ValueError(f"there are {len(train)} samples to train on and {len(validation)} to validate on: both are needed")
        if settings["loss"] not in LOSSES:
            raise ValueError(f"loss is 'mse' or 'l1', not {settings['loss']!r}")
        self.policy, self.model, self.train, self.validation, self.folder, self.kept = policy, policy.model, train, validation, folder, kept
        self.settings, self.augment, self.loss = settings, augment, LOSSES[settings["loss"]]
        groups = parameter_groups(self.model, settings["head_rate"], settings["tower_rate"])
        self.trained = [p for group in groups for p in group["params"]]
        if not self.trained:
            raise ValueError("no parameter of the model requires a gradient")
        self.optimiser = torch.optim.AdamW(groups, weight_decay=settings["weight_decay"], fused=True)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimiser, settings["step_size"], settings["gamma"])
        self.curves = Curves(trainable=sum(p.numel() for p in self.trained), total=sum(p.numel() for p in self.model.parameters()))
        self.digest = _digest(settings, train, validation, self.model)
        folder.mkdir(parents=True, exist_ok=True)
        self._resume()
        sees_the_same = augment is None and not any(p.requires_grad for p in self.model.vision_encoder.parameters())
        self.features = Features(policy, train.images) if sees_the_same else None

    def finish(self, epochs, patience, callbacks, progress):
        from tqdm.auto import tqdm

        first = len(self.curves.train)
        batches = -(-len(self.train) // self.settings["batch_size"])
        with tqdm(total=epochs * batches, initial=first * batches, desc="fitting", unit="step", disable=not progress, leave=False) as bar:
            for epoch in range(first, epochs):
                if self.curves.is_stale(patience):
                    break
                begun = time.perf_counter()
                self._one_epoch(epoch, bar)
                self.curves.seconds += time.perf_counter() - begun
                self._save_state()
                bar.set_postfix(train=f"{self.curves.train[-1]:.4f}", validation=f"{self.curves.validation[-1]:.4f}")
                for callback in callbacks:
                    callback(epoch, self.policy, self.curves)
        self.curves.stopped_early = self.curves.is_stale(patience)
        if self.curves.best_epoch >= 0:
            self._load_best()
        self.model.eval()
        return self.curves

    def _one_epoch(self, epoch, bar):
        samples = self.train if self.augment is None else self.augment(self.train, epoch)
        words = self.policy.words(samples.instructions, samples.holding)
        targets = self.model.normaliser(torch.as_tensor(samples.actions, dtype=torch.float32))
        self.curves.rates.append({group["name"]: group["lr"] for group in self.optimiser.param_groups})
        total = 0.0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.SeedSequence([self.settings["seed"], epoch]).generate_state(1)[0]))
            self.model.train()
            for number, rows in enumerate(torch.randperm(len(samples)).split(self.settings["batch_size"])):
                predicted, looks = self.model.predict(*self._seen(samples, rows), self.model.encode_sentences(**_trimmed(words, rows)))
                value = self.loss(predicted, targets[rows])
                norm = self._gradient(value, looks, samples.actions[rows.numpy()]) if torch.isfinite(value) else value.detach()
                if not torch.isfinite(norm):
                    self._stop_at_nan(epoch, number, len(samples), [samples.ids[i] for i in rows], float(value.detach()), float(norm))
                self.optimiser.step()
                total += float(value.detach()) * len(rows)
                bar.update()
        self.scheduler.step()
        if self.curves.add(total / len(samples), self._validation_loss()):
            self._save_best()

    def _seen(self, samples, rows):
        if self.features is not None:
            return self.features.of(rows)
        return self.model.encode_images(self.policy.pixels(samples.images[rows.numpy()]))

    def _gradient(self, value, looks, waypoints):
        """Leaves the clipped gradient with the parameters and returns its norm before clipping."""
        weight = self.settings["pointing"]
        if weight and self.model.readout == "spatial":
            value = value + weight * pointing_loss(looks, waypoints, self.model.vision_encoder.config.patch_size)
        self.optimiser.zero_grad(set_to_none=True)
        value.backward()
        return torch.nn.utils.clip_grad_norm_(self.trained, self.settings["clip"])

    def _validation_loss(self):
        predicted = predict(self.policy, self.validation)
        normaliser = self.model.normaliser
        numbers = (normaliser(torch.as_tensor(actions, dtype=torch.float32)) for actions in (predicted, self.validation.actions))
        value = float(self.loss(*numbers))
        # A NaN among the labels would make every comparison with the best false, without a word.
        if not np.isfinite(value):
            bad = [i for i, row in zip(self.validation.ids, self.validation.actions) if not np.isfinite(row).all()]
            where = f"the actions of {', '.join(bad)} are no finite numbers" if bad else "the model's answers are no finite numbers"
            raise UserError(f"the validation loss is {value}: {where}; mend these samples or lower the learning rates")
        return value

    def _stop_at_nan(self, epoch, number, count, ids, value, norm):
        step = epoch * -(-count // self.settings["batch_size"]) + number
        good = self.curves.best_epoch
        if good < 0:
            checkpoint = "there is no good checkpoint yet"
        else:
            self._load_best()
            where = self.folder / BEST if self.kept else "what the policy holds"
            checkpoint = f"the last good checkpoint is {where}, of epoch {good}"
        raise UserError(f"training stopped at step {step} (epoch {epoch}): the loss is {value:.4g} and its gradient's norm {norm:.4g}; the batch "
                        f"held {', '.join(ids)}; {checkpoint}; look at these samples, or lower the learning rates")

    def _save_best(self):
        from safetensors.torch import save_file

        partial = self.folder / (BEST + ".tmp")
        save_file({name: value.contiguous() for name, value in self.model.state_dict().items()}, partial)
        os.replace(partial, self.folder / BEST)

    def _load_best(self):
        from safetensors.torch import load_file

        self.model.load_state_dict(load_file(self.folder / BEST))

    def _save_state(self):
        state = {"run": self.digest, "settings": self.settings, "model": self.model.state_dict(), "optimiser": self.optimiser.state_dict(),
                 "scheduler": self.scheduler.state_dict(), "curves": json.dumps(asdict(self.curves))}
        partial = self.folder / (STATE + ".tmp")
        torch.save(state, partial)
        os.replace(partial, self.folder / STATE)

    def _resume(self):
        path = self.folder / STATE
        if not path.is_file():
            return
        state = torch.load(path, weights_only=True)
        if state["run"] != self.digest:
            raise UserError(f"{path} belongs to another run, with other samples, settings or weights to begin with: choose another folder, or "
                            f"remove this one to begin afresh")
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.curves = Curves(**json.loads(state["curves"]))


def _digest(settings, train, validation, model):
    """One hash over settings, samples, the weights to begin with and what may train: all that a call must share with the run it goes on with."""
    found = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for samples in (train, validation):
        found.update("\n".join(samples.ids + samples.instructions).encode())
        for array in (samples.images, samples.holding, samples.actions):
            found.update(np.ascontiguousarray(array).tobytes())
    for name, value in model.state_dict().items():
        found.update(name.encode() + value.detach().contiguous().numpy().tobytes())
    found.update("".join(name for name, p in model.named_parameters() if p.requires_grad).encode())
    return found.hexdigest()


def _trimmed(words, rows):
    """The rows of a batch of sentences, without the columns that are padding in every one of them."""
    longest = int(words["attention_mask"][rows].sum(1).max())
    return {name: value[rows, :longest] for name, value in words.items()}


def predict(policy: WaypointPolicy, samples: WaypointSamples, batch_size: int = 64) -> np.ndarray:
    """(N, A) actions in metres and radians that the policy gives for the samples' pictures and sentences."""
    parts = [samples.rows(range(first, min(first + batch_size, len(samples)))) for first in range(0, len(samples), batch_size)]
    return np.concatenate([policy.predict(part.instructions, part.images, part.holding) for part in parts])


def action_accuracy(policy: WaypointPolicy, samples: WaypointSamples) -> dict[str, dict]:
    """Mean absolute error of each axis: {"x": {"error": ..., "unit": "m"}, ...}; the axes of another robot are named by their number.

    An angle that comes round is never further off than half its period. The grip's is the share of decisions on the wrong side of one half.
    """
    predicted, normaliser = predict(policy, samples), policy.model.normaliser
    errors = np.abs(predicted - samples.actions)
    if normaliser.periodic is not None:
        turned = errors[:, normaliser.periodic] % normaliser.period
        errors[:, normaliser.periodic] = np.minimum(turned, normaliser.period - turned)
    errors = errors.mean(0)
    if len(errors) != len(AXES):
        return {str(i): {"error": float(value), "unit": ""} for i, value in enumerate(errors)}
    errors[-1] = ((predicted[:, -1] > 0.5) != (samples.actions[:, -1] > 0.5)).mean()
    return {name: {"error": float(value), "unit": unit} for name, value, unit in zip(AXES, errors, UNITS)}
