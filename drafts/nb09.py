import sys; sys.path.insert(0,"/tmp/p/d")
from nblib import Lesson
L=Lesson()
L.md("title", r"""
# 9 · Lab: a policy for one task, from your own demonstrations

**The lab sheet's code stops at its first batch. Mended so far that it runs, it goes wrong in silence: its layers never move, its loss counts centimetres and radians alike, its best weights are thrown away. Mended altogether, it learns a task within seconds, and you learn why its loss cannot tell you that.**

Lecture: lab sheet, *Exercise 2*, steps 1 to 5 · week 12

Measured: not yet
""")
L.md("abilities", r"""
## What you will be able to do

- record, check, look at and exchange a dataset of your own: manipulation, navigation, assembly (*step 1*)
- choose an architecture by what a task needs to see and to remember (*step 2*)
- choose which parameters train, each at its own rate (*Exercise 1*), and write the test that notices when they do not (*Exercise 2*)
- put metres, radians and a gripper on one scale (*Exercise 3*)
- stop in time, and keep the right weights (*Exercise 4*)
- compare a generic policy with a task-specific one on the same episodes, and say what an action error is worth (*signature figure*, *control*)

You need notebooks 0 and 1, and LoRA (notebook 4).
""")
L.code("setup", r"""
import tempfile
from pathlib import Path
import numpy as np, torch
from labkit import DATA, UserError, Variation, check, claims_table, compare, film
from labkit import load_sweep, plots, receipt, rollout, set_up, trusted, wilson

device, sweep = set_up(seed=0), load_sweep("lab_task_specific_vla")
""")
L.md("cold-open", r"""
## What the sheet asks for, and what you have

| the sheet | here | why that is fair |
| --- | --- | --- |
| a robot platform with a camera | the tabletop of notebook 0: physics by MuJoCo, RGB-D pictures | success is counted in closed loop, hundreds of times, on the same episodes for everybody |
| an RTX 3080, 50 GB of disk | two cores, a few megabytes | a CLIP of a million parameters shows the effects of this lab; the same class takes `openai/clip-vit-base-patch32` by name |
| a pretrained VLA | towers of ours, trained by contrast on pictures of the table and their captions (`data/tiny_clip`) | reproducible: `python3 -m labkit.clip_pretraining` |
| the generic VLA of Lab Exercise 1 | the same towers and a head, fitted to pick, put, move and beside (`data/tiny_clip_policy`) | `python3 -m labkit.clip_policy_pretraining` |
| labelled data of your task | you record it below | the operators are scripted, and one of them fails often |

The sheet's action has six numbers, and no gripper. A robot that never lets go moves nothing, so ours has seven. Its data hold an *action sequence*, and its model answers with one vector; ours answers with one **waypoint**, where the tool should be at the end of a motion, in metres and radians, with the vacuum on or off, and the arm's controller makes the sequence.

Now the sheet's recipe as it is meant: pretrained towers, a fresh head on their pooled outputs, the last two layers of each tower free, mean squared error, twenty epochs with exactly its numbers. The data: fifty demonstrations of `put`.
""")
L.code("cold-open", r"""
from labkit.demonstrations import read
from labkit.experiments.lab_task_specific_vla import SHEET
from labkit.task_specific_vla import load_waypoint_policy, policy_from_clip, set_trainable
from labkit.waypoint_regression import fit, waypoint_samples

print(SHEET)
shown = {split: waypoint_samples(read(DATA / "demonstrations" / "put_held_out", split))
         for split in ("train", "validation", "test")}
sheet = policy_from_clip()  # or: policy_from_clip("openai/clip-vit-base-patch32")
set_trainable(sheet.model, "last-layers")
curves = fit(sheet, shown["train"], shown["validation"], **SHEET)
print(curves)
""")
L.code("cold-open", r"""
film(sheet, task="put_held_out", seed=3).animation()
""")
L.md("cold-open", r"""
The loss fell, on validation data, too. And the robot closes its vacuum on nothing, three times at the same place. Here is what the *generic* policy makes of the same scene. It began with the same towers:
""")
L.code("cold-open", r"""
generic = load_waypoint_policy()
film(generic, task="put_held_out", seed=3).animation()
""")
L.md("predict", r"""
## Predict: how far do fifty demonstrations go?

The generic policy can pick, put, move and place beside. It has never been asked to move something **forward**. **Before you run the next cell**, commit: of 100 episodes of `forward`, how many succeed with the generic policy, how many after a few seconds of fine-tuning on fifty demonstrations, and how many of the *old* `put` episodes are left then?
""")
L.code("predict", r"""
my_guess = {"forward, generic": 50, "forward, fine-tuned": 50, "put, fine-tuned": 50}  # <- in percent
""")
L.md("idea", r"""
## Step 1: a dataset of your own

The sheet names three kinds of tasks and one folder layout. An operator drives, the recorder keeps at every decision the picture, the depth, the joints, the vacuum sensor and the waypoint, and says at the end whether the episode succeeded. We let two operators take turns, one of them clumsy: his failures are kept, marked, and left out of training.

- **manipulation**: `align` (a block into a turned bin, square with its walls: the wrist's yaw counts) and `put`
- **navigation**: `navigate`, a path over two or three landmarks; a wrong leg fails the episode
- **assembly**: `assemble`, a sentence with two steps over three objects
""")
L.code("bridge", r"""
from labkit.demonstrations import write
from labkit.recording import record
from labkit.tabletop.experts import EXPERT, Operator
from tqdm.auto import tqdm

KINDS = {"manipulation": ["align", "put"], "navigation": ["navigate"], "assembly": ["assemble"]}
folder, clumsy = Path(tempfile.mkdtemp()), Operator("clumsy", noise=0.03)
for kind, tasks in KINDS.items():
    made = record(tasks, [EXPERT, clumsy], episodes=10, seed=4_000, variation=Variation(bin_yaw=0.5))
    write(folder / kind, tqdm(made, desc=kind, leave=False), command="notebook 9")
""")
L.code("bridge", r"""
from labkit.dataset_check import summary, validate

for kind in KINDS:
    problems, counts = validate(folder / kind), summary(folder / kind)["counts"]
    print(f"{kind:13s} {len(problems)} problems; episodes that succeed:",
          ", ".join(f"{split} {part['successes']} of {part['episodes']}" for split, part in counts.items()))
print(*sorted(str(p.relative_to(folder)) for p in (folder / "assembly" / "test").rglob("*"))[:5],
      sep="\n")
""")
L.md("bridge", r"""
A report is worth something if it finds what is wrong. Spoil three things, as a slipped hand would, and look:
""")
L.code("bridge", r"""
import json, shutil

spoiled = folder / "manipulation" / "train" / "actions.json"
entries = json.loads(spoiled.read_text())
entries[0]["decisions"][0]["action"].pop()  # the gripper is lost
entries[1]["decisions"][0]["action"][0] = 35.0  # centimetres
(folder / "manipulation" / "train" / entries[2]["decisions"][0]["rgb"]).unlink()
spoiled.write_text(json.dumps(entries))
print(*validate(folder / "manipulation"), sep="\n")

made = record(KINDS["manipulation"], [EXPERT, clumsy], episodes=10, seed=4_000,
              variation=Variation(bin_yaw=0.5))
shutil.rmtree(folder / "manipulation")
about = write(folder / "manipulation", made, command="notebook 9")
""")
L.md("bridge", r"""
**Look at your samples.** Each row is one decision as the model may see it: the picture before the last decision (black at the start), the picture, and its depth.
""")
L.code("bridge", r"""
import matplotlib.pyplot as plt

figure, panels = plt.subplots(3, 3, figsize=(7.5, 8.2), layout="constrained")
for row, kind in zip(panels, KINDS):
    one = next(d for d in read(folder / kind) if d.success and len(d) > 1)
    depth = f"depth, {one.depth[1].min():.2f} to {one.depth[1].max():.2f} m"
    for panel, picture, label in zip(row, (one.images[0], one.images[1], one.depth[1]),
                                     ("before", "at decision 2", depth)):
        panel.imshow(picture, cmap="gray")
        panel.set(xticks=[], yticks=[])
        panel.set_xlabel(label, fontsize=10)
    row[1].set_title(one.instruction, fontsize=10).set_in_layout(False)
plots.show(figure, alt="Three tasks: the picture before, the picture, and the depth.")
""")
L.md("bridge", r"""
Depth is in the data because the sheet asks for it. Its model has no input for it, and neither has ours: a column that nobody reads is worth noticing before it is recorded a thousand times.

Compare the first two columns of the middle row: nothing has changed. On a path the robot moves and the table does not; we come back to that in step 2.

**Other people's data.** LeRobot's format, version 3, is what most laboratories exchange. Out and in again, without loss; a stranger's set is read the same way and trains offline in the same loop:
""")
L.code("bridge", r"""
from labkit import lerobot
from labkit.waypoint_regression import action_accuracy

mine = read(folder / "manipulation", failures=True)
lerobot.export(folder / "lerobot", mine)
print(*sorted(str(p.relative_to(folder)) for p in (folder / "lerobot").rglob("*.*")), sep="\n")
back = lerobot.demonstrations(folder / "lerobot")
print("every picture and action is back:", all(
    np.array_equal(a.images, b.images) and np.array_equal(a.actions, b.actions)
    for a, b in zip(sorted(mine, key=lambda d: d.id), sorted(back, key=lambda d: d.id))))
""")
L.code("bridge", r"""
from labkit.task_specific_vla import ActionNormaliser

stranger = lerobot.read(folder / "lerobot")  # as somebody without our robot sees it
theirs = {split: waypoint_samples(stranger.split(split)) for split in ("train", "validation", "test")}
offline = policy_from_clip(normaliser=ActionNormaliser.fit(theirs["train"].actions))
set_trainable(offline.model, "frozen")
print(stranger)
print(fit(offline, theirs["train"], theirs["validation"], epochs=5, progress=False))
errors = action_accuracy(offline, theirs["test"])
print("error on its test split:",
      ", ".join(f"{axis} {found['error']:.3f} {found['unit']}" for axis, found in errors.items()))
""")
L.md("bridge", r"""
**More from the same recording.** *Augmentation* changes what surrounds the action and leaves the action alone: colours, a shift of the picture, noise, other words for the same command. *Synthetic data* makes new scenes with new labels, which a simulator can do and a laboratory cannot. What either buys is measured at the end.
""")
L.code("bridge", r"""
from labkit.augmentation import Augmentation, commands_of

samples = waypoint_samples(mine)
kinds = {"as recorded": Augmentation(), "colour": Augmentation(colour=0.5),
         "crop": Augmentation(crop=3), "noise": Augmentation(noise=15),
         "words": Augmentation(commands=commands_of(mine))}
figure, panels = plt.subplots(1, 5, figsize=(12, 3.4), layout="constrained")
for panel, (name, change) in zip(panels, kinds.items()):
    changed = change(samples, epoch=1)
    panel.imshow(changed.images[0, 0])
    panel.set_axis_off()
    panel.set_title(name, fontsize=12)
plots.show(figure, alt="One picture, augmented in five ways.", says=(
    f"In the last one only the words differ: {samples.instructions[0]!r} -> {changed.instructions[0]!r}."))
""")
L.md("idea", r"""
## Step 2: which architecture?

| your task | what it must know | what has that | here |
| --- | --- | --- | --- |
| manipulation: many objects, many words | what a word looks like, and where that is | OpenVLA, RT-2: a large vision-language model with action tokens | towers that know the words; a readout that looks where the sentence points |
| navigation | places, and how far one has come | spatial features, and memory: past frames, a map | two frames |
| several steps | what is done already | memory, unless the picture shows it | after a step of an assembly the table looks different |

Two choices, measured (the stored experiment, made by `python3 -m labkit sweep lab_task_specific_vla`). **What is read from the picture?** The sheet concatenates two pooled vectors: one vector for the whole table, the same for every sentence. Our *spatial* readout lets the sentence ask its questions of the patches; a small extra loss (*pointing*) tells the first question where to look, which is where the waypoint leads. **Does the past help?** Paths, with the present picture alone or with the one before.
""")
L.code("idea", r"""
readouts = {label: sweep.success("success.pick", part="readout", readout=readout, pointing=pointing)
            for label, readout, pointing in (("pooled", "pooled", 0.0), ("spatial", "spatial", 0.0),
                                             ("spatial and pointing", "spatial", 0.1))}
print("pick after 1,200 steps of pretraining:", plots.in_words(readouts))
bars = {f"{legs} legs, {frames} frame{'s' * (frames > 1)}":
        sweep.success(f"success.{legs}", of=f"of.{legs}", part="frames", legs=legs, frames=frames)
        for legs, frames in ((2, 1), (2, 2), (3, 2))}
plots.show(plots.success_bars(bars, "navigate: the present picture, or the one before, too"),
           alt="Bars of success on paths.", says=plots.in_words(bars))
""")
L.md("idea", r"""
The readout by itself changes nothing in so few steps. Told where to look, it learns; a pooled vector has no places to be told about. What is supervised mattered more here than what is built, and the building made the supervision possible.

With one frame a path is not hard but **impossible**: before the first leg and before the second the picture and the sentence are the same, the right answers differ, and a regression that must answer both goes in between. A second frame tells *first* from *later*. It cannot tell the second leg from the third, because those two look alike again: memory must be as long as what it has to remember. (Large models have it as longer windows, or as a state.)

## Steps 2 to 4: the published model, debugged

Here is the sheet's model in our words. It meets a real CLIP, ViT-B/32, built from its configuration without weights:
""")
L.code("idea", r"""
from transformers import CLIPConfig, CLIPModel


class Published(torch.nn.Module):
    def __init__(self, clip, width=512):
        super().__init__()
        self.vision, self.text = clip.vision_model, clip.text_model
        self.head = torch.nn.Sequential(torch.nn.Linear(width, 256), torch.nn.ReLU(),
                                        torch.nn.Dropout(0.1), torch.nn.Linear(256, 6))
        for tower in (self.vision, self.text):
            tower.requires_grad_(False)  # "freeze pre-trained components initially"

    def forward(self, pixel_values, input_ids):
        pooled = (self.vision(pixel_values=pixel_values).pooler_output,
                  self.text(input_ids=input_ids).pooler_output)
        return self.head(torch.cat(pooled, dim=1))
""")
L.code("idea", r"""
with torch.device("meta"):  # shapes without numbers: nothing is downloaded, nothing computed
    clip = CLIPModel(CLIPConfig())
    images, sentence = torch.empty(1, 3, 224, 224), torch.ones(1, 8, dtype=torch.long)
    for width in (512, clip.config.vision_config.hidden_size + clip.config.text_config.hidden_size):
        try:
            print(f"head of width {width}: answers of shape", *Published(clip, width)(images, sentence).shape)
        except RuntimeError as error:
            print(f"head of width {width}: RuntimeError, {error}")
""")
L.md("idea", r"""
That was a kind fault: it raises. The pooled outputs are as wide as the towers inside, not as the space in which CLIP compares them; read widths from the configuration. The sheet's loader is kind, too (it names lists and two functions that nobody defines, and a validation loader that is never made). The next five say nothing.

| fault | what you would see | where you mend it |
| --- | --- | --- |
| all layers are frozen, then two are handed to the optimiser | nothing | Exercises 1 and 2 |
| metres, radians and more in one mean squared error | a loss that falls | Exercise 3 |
| the best weights are saved and never loaded | nothing | Exercise 4 |
| evaluation averages the loss; no robot moves | a small number | the signature figure |
| quantised without calibration (step 6) | the same place in every picture | notebook 10 |

Symptom: train one step at the sheet's rates, and look at the layers that should learn.
""")
L.code("idea", r"""
towers = CLIPModel.from_pretrained(DATA / "tiny_clip", dtype=torch.float32)
model = Published(towers, width=2 * towers.config.vision_config.hidden_size)
last_two = [p for tower in (model.vision, model.text)
            for p in tower.encoder.layers[-2:].parameters()]
published = torch.optim.AdamW([{"params": model.head.parameters(), "lr": 1e-4},
                               {"params": last_two, "lr": 5e-6}], weight_decay=0.01)


def one_step(model, optimiser):
    '''Copies of all parameters, before and after a step.'''
    torch.manual_seed(0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    words = sheet.words(shown["train"].instructions[:16], [False] * 16)["input_ids"]
    answers = model(sheet.pixels(shown["train"].images[:16, 0]), words)
    optimiser.zero_grad()
    (answers - torch.as_tensor(shown["train"].actions[:16, :6]).float()).square().mean().backward()
    optimiser.step()
    return before, {name: p.detach().clone() for name, p in model.named_parameters()}
""")
L.code("idea", r"""
before, after = one_step(model, published)
for name in ("head.3.weight", "vision.encoder.layers.3.mlp.fc1.weight"):
    print(f"{name}: changed by {(after[name] - before[name]).abs().max():.1e} at most")
""")
L.md("idea", r"""
The optimiser was given those layers, at a rate of their own. They have no gradient, so it passes over them without a word.
""")
L.md("exercise", r"""
**Exercise 1 · 10 minutes · medium · 4 points** Say which parameters train, and at which rate.

The head at one rate, the last layers of each tower at another, nothing else. You get the names, as `model.named_parameters()` has them: `head.0.weight`, `vision.encoder.layers.11.mlp.fc1.weight`, ... Another version of transformers puts another word before `layers`, and the two towers need not be equally deep: read what you need from the names.
""")
L.exercise("lab-rates", r'''
import re


def learning_rates(names, head_rate, tower_rate, last):
    """Which parameters of two towers and a head train, and how fast.

    names: of all parameters; the head's begin with `head.`, layer n of a tower has `layers.n.` in its name.
    last: how many layers of each tower train, counted from its end.
    Returns {name: learning rate}, without the parameters that do not train.
    """
    ### BEGIN SOLUTION
    layer = {name: re.match(r"(.*layers)\.(\d+)\.", name) for name in names}
    count = {}
    for found in filter(None, layer.values()):
        count[found[1]] = max(count.get(found[1], 0), int(found[2]) + 1)
    rates = {name: head_rate for name in names if name.startswith("head.")}
    for name, found in layer.items():
        if found and int(found[2]) >= count[found[1]] - last:
            rates[name] = tower_rate
    return rates
    ### END SOLUTION
''')
L.check("lab-rates", 4, "check(learning_rates)")
L.md("hints", r"""
<details><summary>Hint 1: the number in a name</summary>

`found = re.match(r"(.*layers)\.(\d+)\.", name)` gives `found[1]`, which tower, and `found[2]`, which layer, as text. Turn it into an `int`: as text, "9" comes after "11".
</details>
<details><summary>Hint 2: how deep is each tower?</summary>

A first loop finds the largest number for each `found[1]`. A second one keeps those with `int(found[2]) >= count - last`.
</details>
""")
L.md("idea", r"""
**A test that would have caught it.** Training code is tested like any other: do one step, then ask which parameters stood still that were meant to move, and which moved that were meant to stay. Not "nearly": a step at a rate like the sheet's is small, and a tolerance would take it for nothing.
""")
L.md("exercise", r"""
**Exercise 2 · 8 minutes · medium · 4 points** Find what a training step did wrong.
""")
L.exercise("lab-moved", r'''
def moved_wrongly(before, after, trained):
    """What a training step did that it should not have done.

    before, after: {name: tensor} of all parameters.   trained: names of those that are meant to train.
    Returns {"still": names in `trained` that are the same as before, "moved": names of others that are not}.
    """
    ### BEGIN SOLUTION
    same = [name for name in before if torch.equal(before[name], after[name])]
    return {"still": [name for name in trained if name in same],
            "moved": [name for name in before if name not in same and name not in trained]}
    ### END SOLUTION
''')
L.check("lab-moved", 4, "check(moved_wrongly)")
L.md("hints", r"""
<details><summary>Hint</summary>

`torch.equal(a, b)` is True where all values are the same. Two list comprehensions over names are all you need.
</details>
""")
L.md("bridge", r"""
Your rates and your test, on the published optimiser and on the mended one:
""")
L.code("bridge", r"""
from labkit.waypoint_regression import step_faults


def by_modules(names, head_rate, tower_rate, last):
    '''The same from the modules themselves.'''
    rates = {f"head.{name}": head_rate for name, _ in model.head.named_parameters()}
    for prefix, tower in (("vision", model.vision), ("text", model.text)):
        for layer in list(tower.encoder.layers)[-last:]:
            held = {id(p) for p in layer.parameters()}
            rates |= {f"{prefix}.{name}": tower_rate for name, p in tower.named_parameters()
                      if id(p) in held}
    return rates


rates_of = trusted(learning_rates, otherwise=by_modules)
test = trusted(moved_wrongly, otherwise=step_faults)
""")
L.code("bridge", r"""
rates = rates_of([name for name, _ in model.named_parameters()], 1e-4, 5e-6, 2)
found = test(before, after, list(rates))
print(f"published: {len(found['still'])} of {len(rates)} parameters stood still, "
      f"{len(found['moved'])} moved that should not")
for name, parameter in model.named_parameters():
    parameter.requires_grad_(name in rates)
mended = torch.optim.AdamW([{"params": p, "lr": rates[name]}
                            for name, p in model.named_parameters() if name in rates], weight_decay=0.01)
found = test(*one_step(model, mended), list(rates))
print(f"mended:    {len(found['still'])} stood still, {len(found['moved'])} moved that should not")
""")
L.md("predict", r"""
**And does it matter?** The mended layers move at 5e-6. Commit: twenty epochs at the sheet's rates on `forward`, once with 5e-6 for the towers and once with 0. By how many points of success do the two differ?
""")
L.code("predict", r"""
my_guess_points = 30  # <- points of success
""")
L.code("bridge", r"""
by_rate = {rate: sweep.success("success", part="recipe", task="forward", source="generic", tower_rate=rate)
           for rate in (5e-6, 0.0)}
moved = sweep.values("towers_moved", part="recipe", task="forward", source="generic", tower_rate=5e-6)
from_towers = sweep.success("success", part="recipe", source="towers")
print(f"towers at 5e-6: {by_rate[5e-6]}; they moved by {100 * moved.mean():.3f} % of their norm")
print(f"towers at 0:    {by_rate[0.0]}   (you said: {my_guess_points} points apart)")
print(f"put, from towers that were never a policy: {from_towers}")
""")
L.md("idea", r"""
## Metres, radians, and a gripper

The sheet's loss is one mean of squares over positions and angles as they come:

$$L = \frac16\sum_{i=1}^{6} (\hat a_i - a_i)^2$$

A metre and a radian count the same there. So does a centimetre of error and a hundredth of a radian, of which one drops the block beside the bin and the other nobody sees. **Normalise**: $\tilde a_i = (a_i - \mu_i) / \sigma_i$, with $\mu_i, \sigma_i$ over the training actions, one for each of the seven numbers. A number that never changes has $\sigma_i = 0$; put 1 in its place.
""")
L.md("exercise", r"""
**Exercise 3 · 6 minutes · easy · 3 points** Find the scale of each number of an action.
""")
L.exercise("lab-scale", r'''
def action_scale(actions):
    """Mean and standard deviation of each number of an action.

    actions: (N, 7) float.
    Returns {"mean": (7,), "std": (7,)}; the std divides by N, and 1 stands where it would be 0.
    """
    ### BEGIN SOLUTION
    std = actions.std(dim=0, correction=0)
    return {"mean": actions.mean(dim=0), "std": torch.where(std == 0, 1.0, std)}
    ### END SOLUTION
''')
L.check("lab-scale", 3, "check(action_scale)")
L.md("hints", r"""
<details><summary>Hint</summary>

`actions.std(dim=0, correction=0)` divides by N. `torch.where(std == 0, 1.0, std)` puts 1 where nothing varies.
</details>
""")
L.md("bridge", r"""
Which number does each loss listen to? What each contributes if the model answers the mean for everything, on the demonstrations of `align`:
""")
L.code("bridge", tags=("nbval-check-output",), text=r"""
from labkit.task_specific_vla import AXES


def by_the_normaliser(actions):
    fitted = ActionNormaliser.standardising(actions)
    return {"mean": (fitted.low + fitted.high) / 2, "std": (fitted.high - fitted.low) / 2}


scale_of = trusted(action_scale, otherwise=by_the_normaliser)
align = waypoint_samples(read(DATA / "demonstrations" / "align", "train"))
actions = torch.as_tensor(align.actions)
scale = scale_of(actions)
for label, numbers in (("raw", actions), ("normalised", (actions - scale["mean"]) / scale["std"])):
    spread = (numbers - numbers.mean(0)).square().mean(0)
    share = spread / spread.sum()
    positions = share[:3].sum() if label == "raw" else positions
    print(f"{label:10s}", ", ".join(f"{axis} {100 * part:.1f} %" for axis, part in zip(AXES, share)))
""")
L.md("bridge", r"""
Nearly all of the raw loss is gripper and yaw. The three numbers on which everything depends, x, y and z, share what is left.

One angle needs more than a scale. A square block looks the same every quarter turn, so 44 degrees and -44 degrees are nearly the same grip, while their mean, 0, is the worst answer there is. Give the model $\cos 4\psi$ and $\sin 4\psi$ in place of $\psi$, and neighbours are neighbours. Measured, with 400 demonstrations of `align`:
""")
L.code("bridge", r"""
for yaw in ("range", "circle"):
    where = dict(part="amount", task="align", demonstrations=400, yaw=yaw)
    block, bins = (np.degrees(sweep.values(f"turn.{part}", **where)).mean() for part in ("grasp", "place"))
    print(f"{yaw:7s} yaw error: block {block:4.1f} degrees, bin {bins:4.1f} degrees; "
          f"align {sweep.success('success', **where)}")
print(f"always 0: block {np.degrees(np.pi / 8):.1f} degrees, bin {np.degrees(0.25):.1f} degrees")
""")
L.md("bridge", r"""
The turn of the **bin** is learned, in either form: it stays within thirty degrees of straight, far from the seam. The turn of the **block** runs over the whole quarter, seam and all, and it is learned in neither: the block is eight pixels wide in this camera, and its turn is a matter of one pixel at its corners. The seam is a real fault, and it was not the one that stopped us. No loss repairs what the picture does not show; a camera closer to the block would.
""")
L.md("idea", r"""
## Stop in time, and keep the best

After each epoch the loss on validation data says whether training still helps. The sheet saves the weights with the lowest one and returns the last ones. Two epochs matter: the **best**, whose weights are to be loaded again, and the **last**, after `patience` epochs in a row without a new lowest.
""")
L.md("exercise", r"""
**Exercise 4 · 8 minutes · medium · 3 points** Follow the validation loss.
""")
L.exercise("lab-best", r'''
def best_and_last(losses, patience):
    """Which epoch's weights to keep, and after which epoch to stop.

    losses: validation loss of each epoch that there could be; a NaN is never the lowest.   patience: >= 1.
    Returns [best, last], counted from 0; of two equal losses the earlier is better.
    """
    ### BEGIN SOLUTION
    best, lowest = 0, float("inf")
    for epoch, loss in enumerate(losses):
        if loss < lowest:
            best, lowest = epoch, loss
        if epoch - best == patience:
            break
    return [best, epoch]
    ### END SOLUTION
''')
L.check("lab-best", 3, "check(best_and_last)")
L.md("hints", r"""
<details><summary>Hint</summary>

Keep two variables, `best` and `lowest`. A comparison with NaN is always False, which is what you want here. Stop as soon as `epoch - best == patience`.
</details>
""")
L.md("bridge", r"""
Now the real run: LoRA in both towers of the *generic* policy, fifty demonstrations of `forward`, every epoch kept. At epoch 6 the power fails. The same call goes on where it was:
""")
L.code("bridge", r"""
from labkit.experiments.lab_task_specific_vla import LORA_RATE, OURS
from labkit.task_specific_vla import merged

forward = {split: waypoint_samples(read(DATA / "demonstrations" / "forward", split))
           for split in ("train", "validation", "test")}
settings = OURS | {"tower_rate": LORA_RATE, "patience": 8}


def power_cut(epoch, policy, curves):
    if epoch == 5:
        raise KeyboardInterrupt


specialist = generic.copy()
set_trainable(specialist.model, "lora")
try:
    fit(specialist, forward["train"], forward["validation"], folder / "run", callbacks=[power_cut], **settings)
except KeyboardInterrupt:
    print("kept:", *sorted(path.name for path in (folder / "run").iterdir()))
""")
L.code("bridge", r"""
specialist = generic.copy()
set_trainable(specialist.model, "lora")
curves = fit(specialist, forward["train"], forward["validation"], folder / "run", **settings)
specialist.model = merged(specialist.model)  # LoRA's products are added to the weights: as fast as before
print(curves)
print("learning rates, first and last epoch:", curves.rates[0], curves.rates[-1])
""")
L.code("bridge", r"""
from labkit.waypoint_regression import epochs_of

best, last = trusted(best_and_last, otherwise=epochs_of)(curves.validation, settings["patience"])
figure, axes = plt.subplots()
for label, values in (("training", curves.train), ("validation", curves.validation)):
    axes.plot(range(len(values)), values, label=label)
axes.plot(best, curves.validation[best], "*", markersize=20, color="black", label="kept")
axes.set(xlabel="epoch", xticks=range(0, len(curves.train), 2), yscale="log",
         ylabel="loss (mean absolute, normalised)", title="forward, LoRA")
axes.legend(frameon=False)
plots.show(figure, alt="Training and validation loss by epoch.", says=(
    f"Best epoch {best} with {curves.validation[best]:.4f}, last epoch {last} with "
    f"{curves.validation[last]:.4f}; training went from {curves.train[0]:.4f} to {curves.train[-1]:.4f}."))
""")
L.md("bridge", r"""
What if a number in the data is none? A run that goes on with NaN has lost everything it learned. Ours stops and says where:
""")
L.code("bridge", r"""
def dropped_out(samples, epoch):
    samples = samples.rows(range(40))
    if epoch == 2:
        samples.actions[7, 2] = np.nan  # a sensor's drop-out, late in the run
    return samples


try:
    fit(generic.copy(), forward["train"], forward["validation"], folder / "spoiled",
        augment=dropped_out, progress=False)
except UserError as error:
    print(error)
""")
L.md("figure", r"""
## Step 5: generic against task-specific, on the robot

The same hundred episodes for both. Your prediction first:
""")
L.code("figure", r"""
results = {f"{task}, {name}": rollout(policy, task) for task in ("forward", "put")
           for name, policy in (("generic", generic), ("fine-tuned", specialist))}
for label, found in results.items():
    guess = f"   (you said {my_guess[label]} %)" if label in my_guess else ""
    print(f"{label:20s} {found}{guess}")
print("fine-tuned minus generic, forward:", compare(*list(results.values())[:2]))
for name, policy in (("generic", generic), ("fine-tuned", specialist)):
    took = np.percentile(results[f"forward, {name}"].milliseconds, [50, 95])
    print(f"response time, {name}: p50 {took[0]:.1f} ms, p95 {took[1]:.1f} ms")
""")
L.md("figure", r"""
**Action accuracy**, as the sheet asks for it: the mean error of each number on the test demonstrations, in its own unit.
""")
L.code("figure", r"""
errors = {name: action_accuracy(policy, forward["test"])
          for name, policy in (("generic", generic), ("fine-tuned", specialist))}
for axis, found in errors["generic"].items():
    scale_by, unit = {"m": (100, "cm"), "rad": (180 / np.pi, "degrees")}.get(found["unit"], (100, "% wrong"))
    print(f"{axis:5s}", "   ".join(f"{name} {scale_by * e[axis]['error']:5.2f} {unit}"
                                   for name, e in errors.items()))
""")
L.md("figure", r"""
**What to train?** The head alone, the head and the text tower, the last two layers of each tower, LoRA in both, everything; each on fifty demonstrations, recorded anew for each of three seeds. Beside them the tiny VLA of the other notebooks, which says its action in tokens, on the same demonstrations and the same episodes:
""")
L.code("figure", r"""
from labkit.experiments.lab_task_specific_vla import TASKS, VARIANTS

rows = {v: dict(part="variants", variant=v) for v in ("none", *VARIANTS)}
rows |= {"tokens, none": dict(part="tokens", method="none"),
         "tokens, LoRA": dict(part="tokens", method="lora-16")}
table = {row: {task: sweep.success("success", task=task, **where) for task in TASKS}
         for row, where in rows.items()}
old = {row: sweep.success("old", of="old_episodes", task="forward", **where) for row, where in rows.items()}
grid = np.array([[table[row][task].rate for task in TASKS] + [old[row].rate] for row in rows])
figure = plots.heatmaps({"success (% of 100 episodes, three seeds)": grid}, list(rows),
                        [*TASKS, "put after forward"], "what trains", "")
figure.set_size_inches(8.5, 5.6)
plots.show(figure, alt="A grid of success by what trains and task.", says=plots.in_words(
    {f"{row}, {task}": table[row][task] for row in ("none", "lora", "full", "tokens, LoRA") for task in TASKS}))
""")
L.md("figure", r"""
Fifty demonstrations are few for a million numbers. On `stack` **training everything is the worst choice, and the head alone as good as any**; on `forward` it pays to let the text tower learn, too. On `put_held_out`, which the generic policy could do before, every kind of fine-tuning costs something. The last column is the price: what was learned for `forward` erased `put`, whatever part of this policy was trained. Notebook 7 knows how to keep it, notebook 8 how to switch it off.

The tiny VLA, with tokens, learns the same tasks better from the same demonstrations. That is a comparison of two *policies*, not of two losses: its towers were pretrained together, and for longer. What it does show is that a small regression head is no shortcut around a good pretrained policy.

**How robust is it?** Seven conditions, each of which differs from the demonstrations' in one thing:
""")
L.code("figure", r"""
from labkit.robustness import CONDITIONS, under

both = {f"{kind}, {task}": ("success" if task == "forward" else "old", policy)
        for task in ("forward", "put") for kind, policy in (("generic", "generic"), ("fine-tuned", "none"))}
print(f"{'success (%), 50 episodes':52s}" + "  ".join(both))
for name, condition in CONDITIONS.items():
    rates = [100 * sweep.success(f"{kind}.{name}", part="robustness", policy=policy).rate
             for kind, policy in both.values()]
    print(f"{name:12s} {condition.about:40s}"
          + "  ".join(f"{rate:{len(label)}.0f}" for label, rate in zip(both, rates)))
""")
L.code("figure", r"""
who = {"generic, put": ("old", "generic"), "fine-tuned, forward": ("success", "none"),
       "augmented, forward": ("success", "all")}
lines = {label: {c: sweep.success(f"{kind}.{c}", part="robustness", policy=policy) for c in CONDITIONS}
         for label, (kind, policy) in who.items()}
live = under(specialist, "forward", "phrasing", episodes=50)
figure = plots.success_points(lines, "one condition at a time",
                              live={"fine-tuned, forward": ("phrasing", live.rate)})
shown_ones = {f"{label}, {c}": line[c] for label, line in lines.items()
              for c in ("as trained", "camera", "light")}
plots.show(figure, alt="Points of success by condition.",
           says=f"{plots.in_words(shown_ones)} The star is your robot: {live}.")
""")
L.code("figure", r"""
from labkit.experiments.lab_task_specific_vla import AUGMENTATIONS

grid = np.array([[sweep.success(f"success.{c}", part="robustness", policy=a).rate for c in CONDITIONS]
                 for a in AUGMENTATIONS])
figure = plots.heatmaps({"forward: success (%) by augmentation": grid}, list(AUGMENTATIONS), list(CONDITIONS),
                        "augmentation", "condition")
figure.set_size_inches(8.5, 5)
where = dict(part="amount", yaw="circle")
amounts = {f"{task}, {n} demonstrations": sweep.success("success", task=task, demonstrations=n, **where)
           for task in ("align", "assemble") for n in (50, 400)}
plots.show(figure, alt="A grid of success by augmentation and condition.", says=(
    "More scenes in place of more looks: " + plots.in_words(amounts)))
""")
L.md("figure", r"""
Read the grid by columns. Colours seem to help in the dark, and noise against noise; three seeds cannot be sure. **Crops hurt nearly everywhere**, as trained, too. In image classification a shifted cat is a cat. Here the action is a place in metres, and a picture that is shifted under the same action says: *the camera has moved, and you need not know*. Augmentation is a claim about the world, and this one is false. More scenes, with labels that are true, help where there is much to tell apart (`assemble`), and not where the picture does not show what matters (`align`).

**Another domain.** The robot's camera is moved by 16 cm, or the room is dark. Two remedies: fifty demonstrations from there, or the fifty from home, augmented by what seems to fit (crops for the camera, colours for the dark); or both:
""")
L.code("figure", r"""
methods = ("none", "augmentation", "target", "both")
series = {domain: {m: sweep.success("success", part="domain", domain=domain, method=m) for m in methods}
          for domain in ("camera", "dim")}
plots.show(plots.success_points(series, "put, in the other domain"), alt="Points of success by method.",
           says=plots.in_words({f"{d}, {m}": series[d][m] for d in series for m in methods}))
""")
L.md("figure", r"""
Demonstrations from the new place do what no augmentation of the old ones does, and crops on top of them undo part of it: a shifted picture is not what a moved camera sees, where near things move further than far ones. In the dark, colours on top of the demonstrations may help a little; the interval says how little we know.
""")
L.md("claims", r"""
## The sheet's words and your numbers
""")
L.code("claims", r"""
from itertools import combinations


def centimetres(point):
    return 100 * np.mean([point["error"][axis] for axis in "xyz"])


def same_test(a, b):
    return (a["task"], a["seed"]) == (b["task"], b["seed"])


pairs = [sorted(two, key=centimetres) for two in combinations(sweep.where(part="variants"), 2)
         if same_test(*two)]
reversed_pairs = sum(a["success"] < b["success"] for a, b in pairs)
""")
L.code("claims", r"""
claims_table({
    "sheet-specialise": f"forward: {table['none']['forward']}, with LoRA {table['lora']['forward']}; "
                        f"put, which it could do before: {old['none']}, then {old['lora']}",
    "sheet-readout": "pick: " + ", ".join(f"{label} {found}" for label, found in readouts.items()),
    "sheet-memory": "; ".join(f"{label}: {found}" for label, found in bars.items()),
    "sheet-rates": f"5e-6 moves the towers by {100 * moved.mean():.2f} % of their norm: {by_rate[5e-6]} "
                   f"with it, {by_rate[0.0]} without",
    "sheet-loss": f"of its size, x, y and z together are {100 * positions:.1f} %",
    "sheet-evaluation": f"a lower error, and less success: {reversed_pairs} of {len(pairs)} pairs of policies",
    "sheet-little-data": "; ".join(f"{label}: {found}" for label, found in amounts.items()),
})
""")
L.md("play", r"""
## Play: your robot under your conditions

This is the policy you trained. Choose what differs, and how it is asked.
""")
L.code("play", r"""
import ipywidgets
from IPython.display import display


def deploy(who, task, table, camera, light):
    policy = {"generic": generic, "fine-tuned": specialist}[who]
    where = Variation(camera_shift=(camera / 100, 0.0, 0.0), light=light)
    filmed = film(policy, task, seed=table, variation=where)
    display(filmed.animation())
    print(filmed.describe())
""")
L.code("play", r"""
ipywidgets.interactive(
    deploy, who=["fine-tuned", "generic"], task=["forward", "put", "stack"],
    table=ipywidgets.IntSlider(1, 0, 99, continuous_update=False),
    camera=ipywidgets.IntSlider(0, -16, 16, continuous_update=False),
    light=ipywidgets.FloatSlider(1.0, min=0.1, max=1.2, step=0.1, continuous_update=False))
""")
L.md("static-twin", r"""
Without widgets: the same function, called by hand. Change the five arguments.
""")
L.code("static-twin", r"""
deploy("fine-tuned", "forward", table=1, camera=8, light=0.6)
""")
L.md("control", r"""
## What would fool us

**An error that falls.** The sheet ends with an average loss on test data. **What would refute us** when we say that a robot must move: over all the policies of the stored experiment, on one task, the one with the lower action error has the higher success, always.
""")
L.code("control", r"""
figure, panels = plt.subplots(1, 3, figsize=(11, 3.8), sharey=True, layout="constrained")
said = {}
for panel, task in zip(panels, TASKS):
    points = sweep.where(part="variants", task=task)
    for colour, marker, variant in zip(plots.COLOURS, plots.MARKERS, ("none", *VARIANTS)):
        ours = [p for p in points if p["variant"] == variant]
        panel.plot([centimetres(p) for p in ours], [p["success"] for p in ours], marker, color=colour,
                   linestyle="none", label={"none": "generic"}.get(variant, variant))
    panel.set(title=task, xlabel="error on test data, x y z (cm)", xlim=(0, None))
    here = [(a, b) for a, b in pairs if a["task"] == task]
    wrong = sum(a["success"] < b["success"] for a, b in here)
    said[task] = f"of {len(here)} pairs on the same test data, in {wrong} the lower error succeeds less"
panels[0].set_ylabel("success (% of 100 episodes)")
panels[2].legend(frameon=False, fontsize=10)
plots.show(figure, alt="Success against action error, one point a policy.", says=plots.in_words(said))
""")
L.code("control", r"""
lost = [(b["success"] - a["success"], n) for n, (a, b) in enumerate(pairs) if a["task"] == "stack"]
for one in pairs[max(lost)[1]]:
    low, high = wilson(one["success"], one["episodes"])
    print(f"stack, seed {one['seed']}, {one['variant']:5s}: error {centimetres(one):.2f} cm ("
          + ", ".join(f"{axis} {100 * one['error'][axis]:.1f}" for axis in "xyz")
          + f"), success {one['success']} % ({100 * low:.0f} to {100 * high:.0f} %)")
""")
L.md("control", r"""
The pair in the last two lines was picked because it is the most striking of its task; the counts under the figure were not picked. Between a policy that cannot do a task and one that can, the error tells the difference. Between two that can, which is the comparison that a report is about, it is a poor judge: an average over decisions does not know which centimetre misses the block, and whether two small errors fall into one episode or into two.
""")
L.md("control", r"""
**A robot that does not listen.** If it moved the right thing forward because there is always one thing to move, another instruction would not matter:
""")
L.code("control", r"""
deaf = rollout(specialist, "forward", episodes=50, instruction="another")
print(f"told to move another object, it still does what was first asked: {deaf}")
""")
L.md("question", r"""
## Question (in your own words, about 150 words)

A colleague fine-tunes a VLA on her own robot: two hundred demonstrations, of which every tenth is kept for testing. Her report says: "Test loss 0.0008, down from 0.03 with the generic model; fine-tuning works." Name three things that could be wrong although the number is right, and for each the measurement that would show it. Support two of them with results of this notebook. Then say what she should report instead, in one table.

<details><summary>How the answer is marked (5 points)</summary>

- 1: the loss is not success: a pair of policies in this notebook whose order in action error is not that in success; says in which axis or at which decision the error matters
- 1: what the loss weighs: units (share of the gripper and of angles in a raw mean of squares), an angle that comes round
- 1: what trains at all: a test of one step, or the towers' movement at a rate like 5e-6; or the best weights that were never loaded
- 1: what the number leaves out: old tasks after fine-tuning, conditions that differ, phrasings; each with a count and an interval from this notebook
- 1: the table: success of both policies on the same episodes with intervals, by condition, old tasks beside the new one, error by axis with units, response time p50 and p95
</details>
""")
L.answer("lab-question", 5, r"""
### BEGIN SOLUTION
The loss is an average over decisions on the recorded states; the robot is a chain of them, and one wrong waypoint ends it. In our stored runs the policy with the lower action error is not always the one that succeeds: the generic policy has the smaller error in some axis and never does what "forward" means. Second, the number depends on units: in a raw mean of squares the gripper and the yaw outweigh all three positions, so it can fall while the tool is a hand's breadth beside the block, and an angle that comes round is averaged into the worst answer; show the error by axis, in metres and degrees. Third, it does not say what trained: compare parameters before and after a step; at 5e-6 the towers move by a fraction of a percent, and with a rate of 0 we got the same success. Nor does it say what was lost: after fine-tuning on one task most episodes of the old one failed. She should report success of the generic and the fine-tuned policy on the same hundred episodes with intervals, on the new task and on the old ones, as trained and under a moved camera, little light and other words, the error of each axis with its unit, and the response time at the median and at 95 %.
### END SOLUTION
""")
L.md("recap", r"""
## Recap

A dataset is checked before it is used. An architecture is chosen by what the task must see and remember. Training code needs a test that something moved, a scale for every number, and its best weights back. A generic policy that knows the words learns a neighbouring task from fifty demonstrations in seconds, and pays with its old ones; the remedies are those of notebooks 7 and 8. A pair of towers that was never a policy learns nothing from so few. And only a robot that moves tells you so.

Lab sheet: *Exercise 2*, steps 1 to 5. **Next:** notebook 10, the same policy on a server, in time, under watch.
""")
L.md("receipt", r"""
## Receipt

Save the notebook first (Ctrl+S). The last cell runs your set-up cell and your exercise cells in a fresh process, exactly as the grader does, and says what it found.
""")
L.code("receipt", r"""
receipt("09_lab_task_specific_vla.ipynb")
""")
out=sys.argv[1] if len(sys.argv)>1 else "/tmp/p/w7/notebooks/09_lab_task_specific_vla.ipynb"
for c in L.n.cells:
    if c.cell_type=="code":
        for l in c.source.split("\n"):
            if len(l)>112: print("LONG",len(l),l)
        if len(c.source.split("\n"))>19: print("CELL",len(c.source.split("\n")),c.source[:60])
L.write(out)
