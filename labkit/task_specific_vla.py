"""The lab sheet's `TaskSpecificVLA`: CLIP's two towers and a head that regresses a whole waypoint, and the policy around it.

Fitting it to demonstrations is in waypoint_regression.py, what made the shipped towers in clip_pretraining.py.
"""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import interpolate

from labkit.actions import action_to_bins, small_action
from labkit.errors import UserError
from labkit.paths import DATA
from labkit.policy import Decision

TINY_CLIP = DATA / "tiny_clip"
GENERIC = DATA / "tiny_clip_policy"
READOUTS = ("pooled", "spatial")
VARIANTS = ("frozen", "language", "last-layers", "lora", "full")
AXES = ("x", "y", "z", "roll", "pitch", "yaw", "grip")
UNITS = ("m", "m", "m", "rad", "rad", "rad", "")
# Where the tabletop's waypoints lie; the sixth number is the wrist's yaw, and a square thing looks the same every quarter turn.
_TABLETOP_LOW = (-0.25, -0.25, 0.0, -0.6, -0.6, -np.pi / 4, 0.0)
_TABLETOP_HIGH = (0.25, 0.35, 0.25, 0.6, 0.6, np.pi / 4, 1.0)
_TABLETOP_YAW, _QUARTER_TURN = 5, np.pi / 2
_CONFIG, _WEIGHTS, _FORMAT = "task_specific_vla.json", "model.safetensors", 1


class ActionNormaliser(nn.Module):
    """Puts every axis of an action on one scale, low to high on -1 to 1, so that a radian does not outweigh ten centimetres in the loss.

    An angle that comes round becomes two numbers, the cosine and the sine of where it is in its period (the sine last): 44 and -44 degrees are
    neighbours there, while their mean, 0, is as wrong as an answer can be. Its two vectors are buffers of the model: they are saved and loaded
    with the weights.
    """

    def __init__(self, low=_TABLETOP_LOW, high=_TABLETOP_HIGH, periodic: int | None = None, period: float = _QUARTER_TURN):
        """low, high: (A,) in the units of the actions; default, the tabletop's range.   periodic: which axis is an angle that comes round after
        `period` radians, or None.   Raises ValueError where high is not above low, or there is no such axis.
        """
        super().__init__()
        low, high = (torch.as_tensor(np.asarray(value, np.float64), dtype=torch.float32) for value in (low, high))
        if low.ndim != 1 or low.shape != high.shape or not bool((high > low).all()):
            raise ValueError(f"low and high are vectors of one length with high above low, not {low.tolist()} and {high.tolist()}")
        if periodic is not None and not 0 <= periodic < len(low):
            raise ValueError(f"periodic is {periodic}; an action has the axes 0 to {len(low) - 1}")
        self.register_buffer("low", low)
        self.register_buffer("high", high)
        self.periodic, self.period = periodic, float(period)

    @classmethod
    def tabletop(cls) -> "ActionNormaliser":
        """Our robot's: the wrist's yaw comes round every quarter turn."""
        return cls(periodic=_TABLETOP_YAW)

    @classmethod
    def fit(cls, actions) -> "ActionNormaliser":
        """The range of some actions (N, A), for a robot other than ours; an axis that never moves becomes one unit wide."""
        low, high = np.min(actions, axis=0).astype(np.float64), np.max(actions, axis=0).astype(np.float64)
        still = high - low < 1e-6
        return cls(np.where(still, low - 0.5, low), np.where(still, high + 0.5, high))

    @classmethod
    def standardising(cls, actions) -> "ActionNormaliser":
        """One standard deviation on either side of the mean of some actions (N, A), as -1 to 1; an axis that never moves has 1 as its deviation."""
        actions = np.asarray(actions, np.float64)
        mean, std = actions.mean(0), actions.std(0)
        std[std < 1e-12] = 1.0
        return cls(mean - std, mean + std)

    @property
    def width(self) -> int:
        """How many numbers stand for one action: A, and one more where an angle comes round."""
        return len(self.low) + (self.periodic is not None)

    def forward(self, actions):
        """(..., A) actions in metres and radians  ->  (..., width) numbers, -1 at low and 1 at high."""
        numbers = 2 * (actions - self.low) / (self.high - self.low) - 1
        if self.periodic is None:
            return numbers
        turned = 2 * np.pi / self.period * actions[..., self.periodic]
        numbers[..., self.periodic] = turned.cos()
        return torch.cat([numbers, turned.sin().unsqueeze(-1)], dim=-1)

    def inverse(self, numbers):
        """(..., width) numbers  ->  (..., A) actions in metres and radians; an angle that comes round is within half its period of 0."""
        count = len(self.low)
        actions = self.low + (numbers[..., :count] + 1) / 2 * (self.high - self.low)
        if self.periodic is not None:
            actions[..., self.periodic] = torch.atan2(numbers[..., count], numbers[..., self.periodic]) * self.period / (2 * np.pi)
        return actions


class SentenceAttention(nn.Module):
    """Reads the picture where the sentence asks: the sentence makes a few queries, and each takes a weighted mean of the patches.

    The vision tower's pooled vector is the same for every sentence; here "the red cup" may look at one place and "the green bin" at another.
    """

    def __init__(self, vision_width: int, text_width: int, queries: int = 4, heads: int = 4):
        super().__init__()
        self.queries = queries
        self.norm = nn.LayerNorm(vision_width)
        self.to_queries = nn.Linear(text_width, queries * vision_width)
        self.attention = nn.MultiheadAttention(vision_width, heads, batch_first=True)

    def forward(self, patches, sentence):
        """patches: (B, P, Dv).   sentence: (B, Dt).   Returns (B, queries * Dv), and where each query looks, (B, queries, P) summing to 1."""
        patches = self.norm(patches)
        queries = self.to_queries(sentence).unflatten(-1, (self.queries, -1))
        seen, weights = self.attention(queries, patches, patches)
        return seen.flatten(1), weights


class TaskSpecificVLA(nn.Module):
    """CLIP's vision and text towers, their pooled outputs side by side, and a small head that says the next waypoint.

    readout: "pooled", as the lab sheet has it, or "spatial", which adds a `SentenceAttention` over the patches.
    frames: 1, the picture before the decision, or 2, the one before the last decision as well (black at the start of an episode).
    The vacuum sensor is a word at the head of the sentence, `holding` or `empty`, as in the tiny VLA: any text tower can read it.
    """

    def __init__(self, vision_encoder, text_encoder, readout: str = "pooled", frames: int = 1, hidden: int = 256, dropout: float = 0.1,
                 normaliser: ActionNormaliser | None = None):
        """vision_encoder, text_encoder: `CLIPVisionModel` and `CLIPTextModel`; all widths are read from their configurations.

        Raises ValueError for an unknown readout or a number of frames other than 1 and 2.
        """
        super().__init__()
        if readout not in READOUTS:
            raise ValueError(f"readout is 'pooled' or 'spatial', not {readout!r}")
        if frames not in (1, 2):
            raise ValueError(f"frames is 1 or 2, not {frames!r}")
        self.readout, self.frames = readout, frames
        self.vision_encoder, self.text_encoder = vision_encoder, text_encoder
        self.normaliser = ActionNormaliser.tabletop() if normaliser is None else normaliser
        seen, read = vision_encoder.config.hidden_size, text_encoder.config.hidden_size
        self.sentence_attention = SentenceAttention(seen, read) if readout == "spatial" else None
        a_frame = seen * (1 + self.sentence_attention.queries) if readout == "spatial" else seen
        self.action_head = nn.Sequential(
            nn.Linear(read + frames * a_frame, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, self.normaliser.width))

    @property
    def image_size(self) -> int:
        """Pixels a side that the vision tower sees."""
        return self.vision_encoder.config.image_size

    def encode_images(self, pixel_values):
        """(B, frames, 3, H, W) or (B, 3, H, W)  ->  pooled (B, frames, Dv) and patches (B, frames, P, Dv).

        Raises ValueError for another number of frames.
        """
        if pixel_values.ndim == 4:
            pixel_values = pixel_values.unsqueeze(1)
        if pixel_values.shape[1] != self.frames:
            raise ValueError(f"the model reads {self.frames} frame(s) a decision, got {pixel_values.shape[1]}")
        return tuple(seen.unflatten(0, pixel_values.shape[:2]) for seen in self.encode_pictures(pixel_values.flatten(0, 1)))

    def encode_pictures(self, pixel_values):
        """(N, 3, H, W)  ->  the vision tower's pooled output (N, Dv) and its patches (N, P, Dv)."""
        out = self.vision_encoder(pixel_values=pixel_values)
        return out.pooler_output, out.last_hidden_state[:, 1:]

    def encode_sentences(self, input_ids, attention_mask=None):
        """(B, T) token ids  ->  (B, Dt), the text tower's output at the end of each sentence."""
        return self.text_encoder(input_ids=input_ids, attention_mask=attention_mask).pooler_output

    def predict(self, pooled, patches, sentence):
        """Encoded pictures and sentences  ->  (B, width) normalised actions, and where the sentence looks in each frame, (B, frames, queries, P).

        A model with the pooled readout looks nowhere: (B, 0).
        """
        features, looks = [sentence], []
        for frame in range(self.frames):
            features.append(pooled[:, frame])
            if self.sentence_attention is not None:
                seen, weights = self.sentence_attention(patches[:, frame], sentence)
                features.append(seen)
                looks.append(weights)
        return self.action_head(torch.cat(features, dim=1)), torch.stack(looks, 1) if looks else sentence[:, :0]

    def forward(self, pixel_values, input_ids, attention_mask=None):
        """Pictures and sentences  ->  (B, width) normalised actions; `normaliser.inverse` gives metres and radians."""
        return self.predict(*self.encode_images(pixel_values), self.encode_sentences(input_ids, attention_mask))[0]

    def towers(self) -> list[nn.Module]:
        """The two parts that come from CLIP; everything else is the head's."""
        return [self.vision_encoder, self.text_encoder]


def set_trainable(model: TaskSpecificVLA, variant: str, rank: int = 8, seed: int = 0) -> None:
    """Choose what fine-tuning may change; the head always trains.

    variant: "frozen" (the head only), "language" (the text tower as well), "last-layers" (the last two layers of each tower as well), "lora"
    (peft's LoRA of `rank` on the towers' attention), "full".   Raises ValueError for another one, or where LoRA is there already.
    """
    if variant not in VARIANTS:
        raise ValueError(f"the variants are {', '.join(VARIANTS)}, not {variant!r}")
    if _adapted(model):
        raise ValueError("the towers have LoRA already: take `policy.copy()` before you choose a variant")
    model.requires_grad_(True)
    for tower in model.towers():
        tower.requires_grad_(variant == "full")
        if variant == "last-layers":
            tower.encoder.layers[-2:].requires_grad_(True)
    if variant == "language":
        model.text_encoder.requires_grad_(True)
    if variant == "lora":
        _add_lora(model, rank, seed)


def _add_lora(model, rank, seed):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.vision_encoder, model.text_encoder = (get_peft_model(tower, config) for tower in model.towers())


def _adapted(model):
    return any(hasattr(tower, "merge_and_unload") for tower in model.towers())


def merged(model: TaskSpecificVLA) -> TaskSpecificVLA:
    """A copy whose LoRA updates are added to the weights they belong to: a plain model again."""
    model = copy.deepcopy(model)
    if _adapted(model):
        model.vision_encoder, model.text_encoder = (tower.merge_and_unload() for tower in model.towers())
    return model


def parameter_groups(model: TaskSpecificVLA, head_rate: float, tower_rate: float) -> list[dict]:
    """What an optimiser takes: the head's parameters at one learning rate, those of the towers that may train at another.

    A parameter that is frozen is in no group: one that is handed to the optimiser all the same never moves, and nothing says so.
    """
    in_towers = {id(p) for tower in model.towers() for p in tower.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"name": "head", "params": [p for p in trained if id(p) not in in_towers], "lr": head_rate},
              {"name": "towers", "params": [p for p in trained if id(p) in in_towers], "lr": tower_rate}]
    return [group for group in groups if group["params"]]


class WaypointPolicy:
    """A `TaskSpecificVLA` with its processor: asked with `decide`, it drives the robot like any policy of the course."""

    def __init__(self, model: TaskSpecificVLA, processor, name: str = "task-specific"):
        self.model, self.processor, self.name = model, processor, name

    def words(self, instructions, holding) -> dict[str, torch.Tensor]:
        """B sentences and B sensor values  ->  input_ids and attention_mask (B, T), padded on the right."""
        said = [f"{'holding' if held else 'empty'} {text}" for text, held in zip(instructions, holding, strict=True)]
        longest = self.model.text_encoder.config.max_position_embeddings
        found = self.processor.tokenizer(said, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    def pixels(self, images) -> torch.Tensor:
        """(..., H, W, 3) uint8  ->  (..., 3, S, S) float32, resized to the tower's size and normalised by the processor's mean and deviation.

        A picture that is not square is squeezed, not cropped: nothing of the table is lost.
        """
        config, size = self.processor.image_processor, self.model.image_size
        images = torch.as_tensor(np.ascontiguousarray(images)).movedim(-1, -3).float() / 255
        if images.shape[-2:] != (size, size):
            flat = interpolate(images.flatten(0, -4), (size, size), mode="bicubic", antialias=True).clamp(0, 1)
            images = flat.unflatten(0, images.shape[:-3])
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (config.image_mean, config.image_std))
        return (images - mean) / std

    def act(self, observation: dict, instruction: str | None = None) -> np.ndarray:
        """One observation of the tabletop  ->  (7,) waypoint for `env.step`.   instruction: default, the observation's own."""
        return self.decide([observation], None if instruction is None else [instruction]).waypoints[0]

    @torch.no_grad()
    def decide(self, observations, instructions=None) -> Decision:
        """B observations (and B instructions, default the observations' own)  ->  Decision, in one forward pass.

        `probabilities` are NaN: a regression has none. With two frames, an observation's `previous_rgb` is the picture before the last
        decision; without one, this is the first.
        """
        begun = time.perf_counter()
        instructions = [o["instruction"] for o in observations] if instructions is None else list(instructions)
        images = np.stack([frames_of(o["rgb"], o.get("previous_rgb"), self.model.frames) for o in observations])
        waypoints = self.predict(instructions, images, [bool(o["holding"]) for o in observations])
        actions = small_action(waypoints)
        return Decision(action_to_bins(actions), actions, waypoints, np.full(actions.shape, np.nan), time.perf_counter() - begun)

    @torch.no_grad()
    def predict(self, instructions, images, holding) -> np.ndarray:
        """B sentences, (B, frames, H, W, 3) uint8 pictures and B sensor values  ->  (B, A) actions in metres and radians."""
        self.model.eval()
        numbers = self.model(self.pixels(images), **self.words(instructions, holding))
        return self.model.normaliser.inverse(numbers).double().numpy()

    def copy(self) -> "WaypointPolicy":
        """An independent policy with the same weights, for example to fine-tune while the original stays as it is."""
        return WaypointPolicy(copy.deepcopy(self.model), self.processor, self.name)

    def save(self, folder, dtype=torch.float32) -> None:
        """Write configuration (json), weights (safetensors, LoRA merged) and processor to `folder`.   dtype: of the weights on disk."""
        from safetensors.torch import save_file

        folder, model = Path(folder), merged(self.model)
        folder.mkdir(parents=True, exist_ok=True)
        about = {"format": _FORMAT, "readout": model.readout, "frames": model.frames, "hidden": model.action_head[0].out_features,
                 "dropout": model.action_head[2].p, "actions": len(model.normaliser.low),
                 "periodic": model.normaliser.periodic, "period": model.normaliser.period,
                 "vision": model.vision_encoder.config.to_diff_dict(), "text": model.text_encoder.config.to_diff_dict()}
        # The range of the actions stays exact: only weights are rounded.
        kept = {name: value if name.startswith("normaliser.") else value.to(dtype) for name, value in model.state_dict().items()}
        save_file({name: value.contiguous() for name, value in kept.items()}, folder / _WEIGHTS)
        (folder / _CONFIG).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        self.processor.save_pretrained(folder)


def frames_of(image, previous, frames: int) -> np.ndarray:
    """(frames, H, W, 3): the picture, and with two frames the one before it.   previous: None at the start of an episode: black.

    A second copy of the first picture would look like a robot that has waited: on this table, nothing else tells the first decision from
    a later one, since the arm is back home before every picture.
    """
    if frames == 1:
        return np.asarray(image)[None]
    return np.stack([image, np.zeros_like(image) if previous is None else previous])


def policy_from_clip(clip: str | Path = TINY_CLIP, seed: int = 0, **options) -> WaypointPolicy:
    """A policy with CLIP's towers and an untrained head.

    clip: a folder written by `CLIPModel.save_pretrained`, or a name on the hub such as "openai/clip-vit-base-patch32".
    seed: of the head's weights.   options: `readout`, `frames`, `hidden`, `dropout` and `normaliser` of `TaskSpecificVLA`.
    Raises UserError where there is no such model.
    """
    from transformers import CLIPModel, CLIPProcessor

    try:
        whole = CLIPModel.from_pretrained(str(clip), dtype=torch.float32)
        processor = CLIPProcessor.from_pretrained(str(clip))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{clip} cannot be loaded as a CLIP model: give a folder that holds one or a hub id; {reason}") from error
    return policy_from_towers(whole.vision_model, whole.text_model, processor, name=Path(clip).name, seed=seed, **options)


def policy_from_towers(vision_encoder, text_encoder, processor, name: str = "task-specific", seed: int = 0, **options) -> WaypointPolicy:
    """A policy with these towers and an untrained head, the same weights for the same seed; see `policy_from_clip`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TaskSpecificVLA(vision_encoder, text_encoder, **options)
    return WaypointPolicy(model.eval(), processor, name)


def load_waypoint_policy(folder: str | Path = GENERIC) -> WaypointPolicy:
    """Read what `WaypointPolicy.save` wrote.   Raises UserError, in one sentence, for a missing file or weights that do not fit."""
    from safetensors.torch import load_file
    from transformers import CLIPProcessor, CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

    folder = Path(folder)
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing: a folder of a task-specific VLA is written by `policy.save`")
    try:
        about = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        normaliser = ActionNormaliser(np.full(about["actions"], -1.0), np.full(about["actions"], 1.0), about["periodic"], about["period"])
        towers = CLIPVisionModel(CLIPVisionConfig(**about["vision"])), CLIPTextModel(CLIPTextConfig(**about["text"]))
        model = TaskSpecificVLA(*towers, about["readout"], about["frames"], about["hidden"], about["dropout"], normaliser)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / _CONFIG} does not describe a task-specific VLA ({error!r}): save the policy again") from error
    try:
        model.load_state_dict(load_file(folder / _WEIGHTS))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder / _WEIGHTS} does not fit {_CONFIG} beside it: save the policy again; {reason}") from error
    return WaypointPolicy(model.eval(), CLIPProcessor.from_pretrained(str(folder)), folder.name)


def with_two_frames(policy: WaypointPolicy) -> WaypointPolicy:
    """A copy that reads two frames and says the same as before: what the head makes of the second frame starts at zero.

    Raises ValueError for a policy that reads two already.
    """
    old = policy.model
    if old.frames != 1:
        raise ValueError("the policy reads two frames already")
    old = merged(old)
    first = old.action_head[0]
    new = TaskSpecificVLA(old.vision_encoder, old.text_encoder, old.readout, 2, first.out_features, old.action_head[2].p, old.normaliser)
    state = old.state_dict()
    added = new.action_head[0].in_features - first.in_features
    state["action_head.0.weight"] = torch.cat([first.weight.detach(), torch.zeros(first.out_features, added)], dim=1)
    new.load_state_dict(state)
    return WaypointPolicy(new.eval(), policy.processor, policy.name)
