"""Which sentences should a robot hear? One phrasing or many, numbers instead of words, two commands only, words of place."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import permutations, product

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from labkit.actions import bins_to_action, small_action
from labkit.batches import IGNORED
from labkit.demonstrations import Samples, samples
from labkit.experiments.measuring import counted, shipped
from labkit.instructions import COLOURS, FRAMES, SHAPE_NOUNS, SHAPES, Command, say, sentences, words
from labkit.paths import DATA
from labkit.policy import load_policy
from labkit.rollouts import EVALUATION_SEED, lock_step, rollout
from labkit.sft import fine_tune
from labkit.tabletop import Tabletop
from labkit.tabletop.experts import next_waypoint
from labkit.tabletop.tasks import is_done

ABOUT = ("new words: the embeddings of all words are drawn afresh and learned again on `pick`, from one phrasing or from many; numbers: `stack` "
         "learned with a number in place of the sentence; two commands: question 3 of the lecture, success by colour of object and container; "
         "place: the words leftmost, rightmost, nearest, farthest learned from 50 demonstrations")
SEEDS = range(3)
STEPS = (25, 50, 100)
WORD_STEPS = (100, 200, 400, 600)
EPISODES = 100
PICK_SCENES = 2000
TRIALS = 12  # a cell of the colour matrix


def points() -> list[dict]:
    """The four experiments, three seeds each."""
    return [
        *({"part": "new words", "phrasings": phrasings, "seed": seed} for phrasings in ("one", "many") for seed in SEEDS),
        *({"part": "numbers", "said": said, "seed": seed} for said in ("sentence", "number") for seed in SEEDS),
        *({"part": "two commands", "start": start, "seed": seed} for start in ("tiny", "tiny-early") for seed in SEEDS),
        *({"part": "place", "start": start, "seed": seed} for start in ("tiny", "tiny-early") for seed in SEEDS),
    ]


def prepare() -> None:
    """Make the scenes of `pick_samples` before several processes ask for them."""
    pick_scenes()


def run(point: dict) -> dict:
    """One of the four experiments, once."""
    part, seed = point["part"], point["seed"]
    if part == "new words":
        return new_words(point["phrasings"], seed)
    if part == "numbers":
        return numbers(point["said"], seed)
    if part == "two commands":
        return two_commands(load_policy(point["start"], device="cpu"), seed)
    return place(load_policy(point["start"], device="cpu"), seed)


class Through:
    """A policy that sees `see(rgb)` and hears `hear(instruction)` in place of what is there; decides as `Policy.decide` does."""

    def __init__(self, policy, see=lambda rgb: rgb, hear=lambda text: text):
        self.policy, self.see, self.hear = policy, see, hear

    def decide(self, observations):
        """observations: as for `Policy.decide`.   Returns its `Decision`."""
        seen = [{**o, "rgb": self.see(o["rgb"])} for o in observations]
        return self.policy.decide(seen, [self.hear(o["instruction"]) for o in observations])


def faded(rgb: np.ndarray, colour: float = 0.0) -> np.ndarray:
    """The picture with everything coloured mixed with grey of the same brightness.   rgb: (H, W, 3) uint8.   colour: 1 leaves it, 0 is grey."""
    grey = rgb.mean(-1, keepdims=True)
    return np.where(_coloured(rgb), grey + colour * (rgb - grey), rgb).astype(np.uint8)


def red_for_green(rgb: np.ndarray) -> np.ndarray:
    """The picture with red things green and green things red.   rgb: (H, W, 3) uint8."""
    red, green, blue = np.moveaxis(rgb.astype(int), -1, 0)
    either = (np.abs(red - green) > np.maximum(red, green) / 2) & (blue < np.maximum(red, green) / 2)
    return np.where(either[..., None], rgb[..., [1, 0, 2]], rgb)


def _coloured(rgb):
    brightest, darkest = rgb.max(-1, keepdims=True).astype(int), rgb.min(-1, keepdims=True).astype(int)
    return brightest - darkest > brightest * 0.4


def new_words(phrasings: str, seed: int) -> dict:
    """Success on `pick` by step: in the one trained phrasing, in the course's usual ones, in held-out ones."""
    policy = load_policy("tiny", device="cpu")
    redraw_words(policy, seed)
    found = {"same": {}, "usual": {}, "held_out": {}}

    def measure(step, policy, history):
        if step + 1 in WORD_STEPS:
            found["same"][str(step + 1)] = counted(Through(policy, hear=plainly), "pick", EPISODES)
            found["usual"][str(step + 1)] = counted(policy, "pick", EPISODES)
            found["held_out"][str(step + 1)] = counted(policy, "pick", EPISODES, held_out_phrasing=True)

    fine_tune(policy, pick_samples(phrasings, seed), steps=max(WORD_STEPS), learning_rate=1e-3, seed=seed, callbacks=[measure], progress=False)
    return {**found, "episodes": EPISODES}


def redraw_words(policy, seed: int) -> None:
    """Give every word a random embedding, as long as the old ones; tokens of actions, image and sensor keep theirs."""
    vocabulary = policy.processor.tokenizer.get_vocab()
    ids = [i for word, i in vocabulary.items() if not word.startswith("<") and word not in ("empty", "holding")]
    weight = policy.model.get_input_embeddings().weight
    with torch.no_grad():
        weight[ids] = torch.randn(len(ids), weight.shape[1], generator=torch.Generator().manual_seed(seed)) * weight[ids].std()


def plainly(sentence: str) -> str:
    """A sentence about picking, as "pick up the COLOUR SHAPE"."""
    shape_of = {noun: shape for shape, nouns in SHAPE_NOUNS.items() for noun in nouns}
    said = words(sentence)
    colour = next(word for word in said if word in COLOURS)
    return f"pick up the {colour} {next((shape_of[word] for word in said if word in shape_of), 'object')}"


def pick_samples(phrasings: str, seed: int) -> Samples:
    """What an expert does first in 2,000 scenes for each of the three objects, said plainly ("one") or in many ways ("many")."""
    from labkit.pretrain import command_catalogue

    images, rows = pick_scenes()
    catalogue = command_catalogue()
    rows = np.array([row for row in rows if row[1] == 0 and catalogue[row[2]].task == "pick"])
    rng = np.random.default_rng([seed, 23])

    def said(row):
        unique = frozenset(colour for i, colour in enumerate(COLOURS) if row[3] >> i & 1)
        return plainly(sentences(catalogue[row[2]])[0]) if phrasings == "one" else say(catalogue[row[2]], rng, unique_colours=unique)

    return Samples([said(row) for row in rows], images[rows[:, 0]], np.zeros(len(rows), bool), bins_to_action(rows[:, 4:]))


def pick_scenes():
    """Images and rows of 2,000 scenes labelled as in pretraining: its data, not its loop; made once, then read."""
    from labkit.pretrain import Recipe, labelled_scenes

    return labelled_scenes(Recipe(scenes=PICK_SCENES, seed=1), DATA / ".cache" / "pretrain")


def numbers(said: str, seed: int) -> dict:
    """Success on `stack` by step, told in sentences or by number; apart, on commands that were among the demonstrations and on others."""
    demonstrations = shipped("stack")
    number = task_numbers()
    found = samples(demonstrations)
    if said == "number":
        spoken = [number[d.instruction] for d in demonstrations for _ in range(len(d))]
        found = replace(found, instructions=spoken)
    known = {number[d.instruction] for d in demonstrations}
    policy, learned, seen, unseen = load_policy("tiny", device="cpu"), {}, {}, {}
    was_known = np.array([number[_instruction("stack", i)] in known for i in range(EPISODES)])

    def measure(step, policy, history):
        if step + 1 in STEPS:
            listener = Through(policy, hear=number.__getitem__) if said == "number" else policy
            success = rollout(listener, "stack", EPISODES, progress=False).success
            learned[str(step + 1)] = int(success.sum())
            seen[str(step + 1)], unseen[str(step + 1)] = int(success[was_known].sum()), int(success[~was_known].sum())

    fine_tune(policy, found, steps=max(STEPS), seed=seed, callbacks=[measure], progress=False)
    return {"success": learned, "episodes": EPISODES, "seen": seen, "seen_episodes": int(was_known.sum()),
            "unseen": unseen, "unseen_episodes": int((~was_known).sum())}


def _instruction(task, episode):
    return Tabletop(task).reset(seed=EVALUATION_SEED + episode)[0]["instruction"]


def task_numbers() -> dict[str, str]:
    """Every sentence that commands `stack` -> the number of its command, in words the robot can read: "task 3 7"."""
    things = list(product(COLOURS, SHAPES))
    commands = [Command("stack", a, b) for a, b in permutations(things, 2) if b[1] == "block"]
    unique = frozenset(COLOURS)
    found = {}
    for i, command in enumerate(commands):
        for sentence in sentences(command, False, unique) + sentences(command, True, unique):
            for frame in FRAMES.trained + FRAMES.held_out:
                found.setdefault(frame.format(s=sentence), f"task {i // 10} {i % 10}")
    return found


def two_commands(policy, seed: int) -> dict:
    """Question 3 as written: success of "move the A object to the B container" by colour, before and after training two commands."""
    before = colour_matrix(policy)
    fine_tune(policy, two_command_samples(seed), steps=100, seed=seed, progress=False)
    return {"before": before, "after": colour_matrix(policy), "trials": TRIALS}


def two_command_samples(seed: int) -> Samples:
    """25 demonstrations each of "pick up the red object" and "place the blue object in the green container"."""
    return demonstrated([("pick", "red", ""), ("put", "blue", "green")], 25, 5_000_000 + 1000 * seed,
                        lambda task: "pick up the red object" if task == "pick" else "place the blue object in the green container")


def colour_scenes(task: str, colour: str, container: str, sentence: str, count: int, seed: int):
    """Yield `count` environments, each with its first observation, in which exactly one object has the colour and one bin the container's."""
    while count:
        env = Tabletop(task)
        env.reset(seed=seed)
        scene = env.episode.scene
        thing = next((t for t in scene.things if t.name[0] == colour and colour in scene.unique_colours), None)
        if thing is not None and (task == "pick" or container in [tray.colour for tray in scene.bins]):
            command = Command(task, thing.name, container)
            observation, _ = env.reset(seed=seed, options={"scene": scene, "command": command, "instruction": sentence})
            count -= 1
            yield env, observation
        seed += 1


def demonstrated(kinds, count: int, seed: int, sentence) -> Samples:
    """What the noise-free expert does in `count` episodes of each (task, object colour, container colour)."""
    rows = []
    for task, colour, container in kinds:
        for env, observation in colour_scenes(task, colour, container, sentence(task), count, seed):
            over = False
            while not over:
                waypoint = next_waypoint(env.episode.command, env.episode.scene, env.start, env.state)
                rows.append((observation["instruction"], observation["rgb"], bool(observation["holding"]), small_action(waypoint)))
                observation, _, terminated, truncated, _ = env.step(waypoint)
                over = terminated or truncated
    said, images, holding, actions = zip(*rows)
    return Samples(list(said), np.stack(images), np.array(holding), np.stack(actions))


def colour_matrix(policy) -> list[list[int]]:
    """Successes of "move the A object to the B container": row A, column B, in the order of COLOURS, of TRIALS each."""
    _, done, _ = try_colours(policy, "move the {a} object to the {b} container", TRIALS)
    return np.reshape(done, (len(COLOURS), len(COLOURS), TRIALS)).sum(-1).tolist()


def try_colours(policy, sentence: str, trials: int):
    """Run `put` for every colour of object {a} and of container {b} in `sentence`, `trials` episodes each.

    Returns the (object colour, container colour) asked for, success as a list of bool, and how often each `outcome` was seen.
    """
    asked = [pair for pair in product(COLOURS, COLOURS) for _ in range(trials)]
    episodes = [episode for a, b in product(COLOURS, COLOURS)
                for episode in colour_scenes("put", a, b, sentence.format(a=a, b=b), trials, 6_000_000)]
    environments, observations = zip(*episodes)
    success, _, _ = lock_step(policy, environments, observations)
    return asked, success.tolist(), dict(Counter(outcome(env) for env in environments).most_common())


def outcome(env) -> str:
    """What became of a `put`, in words: which of object and container was right at the end."""
    wanted, scene = env.episode.command, env.episode.scene
    placed = [(thing.name, tray.colour) for thing in scene.things for tray in scene.bins
              if is_done(Command("put", thing.name, tray.colour), scene, env.start, env.state)]
    if (wanted.object, wanted.destination) in placed:
        return "done"
    if not placed:
        return "nothing in a container"
    name, colour = placed[0]
    return {(True, False): "wrong container", (False, True): "wrong object"}.get(
        (name == wanted.object, colour == wanted.destination), "both wrong")


def expert_action(env) -> np.ndarray:
    """(4,) the noise-free expert's next waypoint in a reset environment: x, y, z in metres, grip."""
    return small_action(next_waypoint(env.episode.command, env.episode.scene, env.start, env.state))


def log_likelihood(logits, labels) -> torch.Tensor:
    """(B,) log-likelihood of each row's supervised tokens, in nats.   logits: (B, T, V).   labels: (B, T), -100 where not supervised."""
    return -cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none").sum(1)


def success_matrix(objects, containers, done, colours) -> np.ndarray:
    """(C, C) share of successes: row, colour of the object, column, colour of the container; nan where nothing was tried."""
    tried = [[[d for a, b, d in zip(objects, containers, done) if (a, b) == (row, column)] for column in colours] for row in colours]
    return np.array([[np.mean(cell) if cell else np.nan for cell in row] for row in tried])


def attention_share(attention, positions, image, target) -> torch.Tensor:
    """Of the attention from `positions` to the image, the share on the target.   attention: (H, T, T).   image, target: (T,) bool."""
    onto_image = attention[:, positions] * image
    return ((onto_image * target).sum(-1) / onto_image.sum(-1)).mean()


def place(policy, seed: int) -> dict:
    """Success on `spatial` before and after 25, 50 and 100 steps on its 50 demonstrations."""
    learned = {"0": counted(policy, "spatial", EPISODES)}

    def measure(step, policy, history):
        if step + 1 in STEPS:
            learned[str(step + 1)] = counted(policy, "spatial", EPISODES)

    fine_tune(policy, samples(shipped("spatial")), steps=max(STEPS), seed=seed, callbacks=[measure], progress=False)
    return {"success": learned, "episodes": EPISODES}
