"""Watching the robot: an episode as film strip and animation, what the policy sees and says, and the widget to talk to it."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from html import escape

import numpy as np

from labkit.actions import BINS, NAMES, bins_to_action
from labkit.instructions import sentences, unknown_words
from labkit.plots import AltImage
from labkit.tabletop import Tabletop, Variation
from labkit.tabletop.tasks import PRETRAINING_TASKS, commands, meaning

UNITS = ("x (m), left to right", "y (m), near to far", "z (m), height", "grip (1: vacuum on)")
_SECONDS_A_FRAME = 0.1


@dataclass
class Film:
    """One filmed episode.

    instruction: what the policy was told.   task: what is counted.   frames: (256, 256, 3) uint8 each, 10 a simulated second.
    said: one `Decision` each time the policy was asked.
    success: whether the episode's task was done; None where the instruction is not one of the scene's own.
    """

    instruction: str
    task: str
    frames: list = field(default_factory=list)
    said: list = field(default_factory=list)
    success: bool | None = None

    @property
    def outcome(self) -> str:
        """`done`, `not done`, or `not counted`, in words."""
        return {True: "done", False: "not done", None: "not counted"}[self.success]

    def describe(self) -> str:
        """The whole film in one sentence, for those who do not see it."""
        moves = "; ".join(f"waypoint {i} at x {w[0]:+.2f} m, y {w[1]:+.2f} m, height {w[2]:.2f} m, vacuum {'on' if w[6] > 0.5 else 'off'}"
                          for i, w in enumerate((said.waypoints[0] for said in self.said), 1))
        return f"The robot is told '{self.instruction}': {moves}. Result: {self.outcome}."

    def tokens(self) -> list[str]:
        """One line a decision: the four action tokens and the waypoint they mean."""
        lines = []
        for decision in self.said:
            tokens = " ".join(f"<a{b}>" for b in decision.bins[0])
            x, y, z, grip = decision.actions[0]
            lines.append(f"{tokens} means x {x:+.3f} m, y {y:+.3f} m, z {z:.3f} m, vacuum {'on' if grip > 0.5 else 'off'}")
        return lines

    def animation(self, width: int = 384) -> AltImage:
        """The film as an animated picture that plays in any browser, without a widget."""
        from PIL import Image

        pictures = [Image.fromarray(frame).quantize(48, method=Image.Quantize.FASTOCTREE) for frame in self.frames]
        data = io.BytesIO()
        times = [int(1000 * _SECONDS_A_FRAME)] * (len(pictures) - 1) + [1500]
        pictures[0].save(data, format="GIF", save_all=True, append_images=pictures[1:], duration=times, loop=0, optimize=True)
        return AltImage(data.getvalue(), "gif", self.describe(), width)

    def filmstrip(self, columns: int = 6):
        """A matplotlib figure: evenly spaced moments of the film, with their simulated time."""
        import matplotlib.pyplot as plt

        chosen = np.unique(np.linspace(0, len(self.frames) - 1, columns).round().astype(int))
        figure, panels = plt.subplots(1, columns, figsize=(2.2 * columns, 2.6), layout="constrained")
        for panel in panels:
            panel.axis("off")
        for panel, index in zip(panels, chosen):
            panel.imshow(self.frames[index])
            panel.set_title(f"{index * _SECONDS_A_FRAME:.1f} s", fontsize=11)
        figure.suptitle(f"\u201c{self.instruction}\u201d: {self.outcome}", fontsize=13)
        return figure


def film(policy, task: str = "pick", seed: int = 0, instruction: str | None = None, variation: Variation = Variation(),
         delay: float = 0.0) -> Film:
    """Film one episode of `policy`.

    instruction: replaces the episode's own sentence. If it says, in any of our phrasings, something that can be done in this scene,
    then that is what success counts; otherwise the robot is filmed and nothing is counted.
    delay: seconds of the simulated world between each picture and the motion that answers it.
    """
    from labkit.serving.delay import DelayedTabletop

    env = DelayedTabletop(task, variation, delay=delay)
    observation, _ = env.reset(seed=seed)
    counted = True
    if instruction is not None:
        scene, command = env.episode.scene, meaning(instruction, env.episode.scene)
        counted = command is not None
        command = command or env.episode.command
        observation, _ = env.reset(seed=seed, options={"scene": scene, "command": command, "task": command.task, "instruction": instruction})
    result = Film(env.episode.instruction, env.episode.task, success=False if counted else None)
    _shoot_episode(policy, env, observation, result)
    return result


def _shoot_episode(policy, env, observation, result):
    ticks = [0]

    def shoot():
        if ticks[0] % 2 == 0:
            result.frames.append(env.render())
        ticks[0] += 1

    env.arm.on_control_step = shoot
    shoot()
    over = False
    while not over:
        decision = policy.decide([observation])
        result.said.append(decision)
        before = observation["rgb"]
        observation, _, terminated, truncated, info = env.step(decision.waypoints[0])
        observation["previous_rgb"] = before
        over = terminated or truncated
        if result.success is not None:
            result.success = info["success"]


def probabilities(policy, observation: dict, instruction: str | None = None) -> np.ndarray:
    """(4, 256) probability of every bin for the next action, each token given the greedy ones before it."""
    import torch

    from labkit.batches import with_action

    said = policy.decide([observation], None if instruction is None else [instruction])
    prompt = policy.prompts([instruction or observation["instruction"]], [observation["rgb"]], [bool(observation["holding"])])
    batch = with_action(prompt, policy.action_ids, said.actions)
    batch.pop("labels")
    with torch.no_grad():
        logits = policy.model(**{name: policy.to_model(value) for name, value in batch.items()}).logits[0, -len(NAMES) - 1 : -1]
    return logits[:, policy.action_ids].float().softmax(-1).cpu().numpy()


def bin_values() -> np.ndarray:
    """(4, 256) what every bin of x, y, z (metres) and grip means."""
    return np.stack([bins_to_action(np.full((BINS, len(NAMES)), np.arange(BINS)[:, None]))[:, i] for i in range(len(NAMES))])


def explain_unknown(text: str) -> str:
    """A sentence that names the words the robot does not know, or an empty string."""
    unknown = unknown_words(text)
    if not unknown:
        return ""
    named = ", ".join(f"\u201c{word}\u201d" for word in dict.fromkeys(unknown))
    return f"The robot does not know {named}: each becomes the same token, <unk>, and tells it nothing."


def suggestions(episode) -> list[str]:
    """One plain sentence for every command the scene allows, for a menu."""
    return [sentences(command)[0] for task in PRETRAINING_TASKS for command in commands(task, episode.scene)]


def talk_to_robot(policy, seed: int = 0):
    """A widget: choose a scene, type or pick an instruction, press the button, watch. Returns the ipywidgets box.

    Without widgets use `film(policy, seed=..., instruction="...").animation()`, which does the same.
    """
    import ipywidgets as widgets

    wide = widgets.Layout(width="34em")
    scene = widgets.IntSlider(value=seed, min=0, max=99, description="scene", continuous_update=False, layout=wide)
    text = widgets.Text(description="say", layout=wide)
    menu = widgets.Dropdown(options=[""], description="or choose", layout=wide)
    button = widgets.Button(description="Do it", button_style="primary", icon="play")
    note, screen = widgets.HTML(), widgets.HTML()

    def look(_=None):
        env = Tabletop("pick")
        env.reset(seed=scene.value)
        menu.options = suggestions(env.episode)
        text.value = menu.options[0]
        screen.value = AltImage(_png(env.render()), "png", "The table before the robot moves.", 384)._repr_html_()
        note.value = ""

    def choose(change):
        text.value = change["new"] or text.value

    def act(_=None):
        button.disabled = True
        try:
            filmed = film(policy, seed=scene.value, instruction=text.value)
            note.value = "<br>".join(filter(None, [explain_unknown(text.value), *map(escape, filmed.tokens()), f"Result: {filmed.outcome}."]))
            screen.value = filmed.animation()._repr_html_()
        finally:
            button.disabled = False

    scene.observe(look, "value")
    menu.observe(choose, "value")
    button.on_click(act)
    look()
    return widgets.VBox([scene, text, menu, button, note, screen])


def _png(array):
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(array).save(data, format="PNG")
    return data.getvalue()
