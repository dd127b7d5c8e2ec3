"""The language of the course: the vocabulary, what a command means, and the sentences that say it.

A `Command` is the meaning (which task, which object, where to); a sentence is one of many ways to say it.
Nothing in this file knows about images, physics or models.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product

COLOURS = ("red", "green", "blue", "yellow", "purple")
SHAPES = ("block", "ball", "cup")
ZONES = ("left", "middle", "right")
EXTREMES = ("leftmost", "rightmost", "nearest", "farthest")

# Pretraining never shows these two objects, so that "a novel object" means something in the retention lessons.
NOVEL_OBJECTS = (("purple", "cup"), ("yellow", "ball"))

SHAPE_NOUNS = {"block": ("block", "cube"), "ball": ("ball", "sphere"), "cup": ("cup", "mug")}
BIN_NOUNS = ("bin", "container", "tray")
SENSOR_WORDS = ("empty", "holding")


@dataclass(frozen=True)
class Command:
    """What the robot is asked to do, without the words.

    task: name of a task.   object: (colour, shape) of the thing that moves.
    destination: a bin's colour, a zone, a reference object's (colour, shape), or "" where the task has none.
    steps: the commands of a multi-step task, in order; the legs of a path are `go` commands.
    """

    task: str
    object: tuple[str, str] = ("", "")
    destination: str | tuple[str, str] = ""
    steps: tuple["Command", ...] = ()


@dataclass(frozen=True)
class Phrasings:
    """Sentence patterns of one task: those pretraining uses, and those kept for testing semantic invariance."""

    trained: tuple[str, ...]
    held_out: tuple[str, ...]


# {o} the object, {d} the destination. "{at} " is replaced by the preposition that fits the zone.
PHRASINGS = {
    "pick": Phrasings(
        ("pick up {o}", "grasp {o}", "take {o}", "lift {o}", "grab {o}", "pick {o} up"),
        ("lift {o} up", "take {o} up", "get hold of {o}", "grab {o} and lift it"),
    ),
    "put": Phrasings(
        ("put {o} in {d}", "place {o} in {d}", "drop {o} into {d}", "move {o} to {d}",
         "take {o} and put it in {d}", "pick up {o} and place it in {d}"),
        ("place {o} into {d}", "drop {o} in {d}", "grab {o} and put it in {d}", "lift {o} and drop it into {d}"),
    ),
    "move": Phrasings(
        ("move {o} to the {d}", "bring {o} to the {d}", "shift {o} to the {d} side", "put {o} {at} the {d}",
         "place {o} {at} the {d} side", "slide {o} to the {d}"),
        ("shift {o} to the {d}", "move {o} to the {d} side", "place {o} {at} the {d}", "take {o} and move it to the {d}"),
    ),
    "beside": Phrasings(
        ("place {o} beside {d}", "put {o} next to {d}", "put {o} beside {d}", "set {o} beside {d}",
         "move {o} next to {d}", "bring {o} next to {d}"),
        ("place {o} next to {d}", "set {o} next to {d}", "bring {o} beside {d}", "take {o} and put it next to {d}"),
    ),
    "stack": Phrasings(
        ("stack {o} on {d}", "put {o} on top of {d}", "place {o} on {d}", "set {o} on top of {d}"),
        ("stack {o} on top of {d}", "put {o} on {d}"),
    ),
    "forward": Phrasings(
        ("move {o} forward", "push {o} forward", "bring {o} forward", "slide {o} forward"),
        ("shift {o} forward", "take {o} and move it forward"),
    ),
    "spatial": Phrasings(
        ("pick up the {d} object", "grasp the {d} object", "take the {d} object"),
        ("lift the {d} object", "grab the {d} object"),
    ),
    "align": Phrasings(
        ("align {o} with {d}", "put {o} in {d} and align it", "turn {o} to align it with {d}"),
        ("place {o} in {d} and align it",),
    ),
    "go": Phrasings(("go to {d}", "move to {d}", "drive to {d}"), ("move over to {d}",)),
}
FRAMES = Phrasings(("{s}", "{s}", "please {s}", "now {s}", "can you {s}", "{s} please"), ("could you {s}", "now {s} please"))
LINKS = Phrasings(("{a} then {b}", "first {a} then {b}", "{a} and then {b}"), ("{a} after that {b}",))

# Words that no pattern above uses yet but a later lesson, the lab sheet or a curious student will.
# A language model cannot learn a word that is not in its tokenizer, so they are reserved before the vocabulary is frozen.
RESERVED_WORDS = """
a an are as at away back backward behind below between beneath both bottom by careful carefully centre center closest collect
corner could do does done don't down each edge end every far fast finally fold follow for from front gently give gripper hand here
high hover how i is it its keep last leave line locate look low many me my near next no not of off one only onto open
or other out over pass path pause position press pull put reach release remove return robot rotate route same second
side slow slowly sort stop straight swap that their them there these third this those three through tidy to together touch toward
towards turn two under until up upright us via wait want was we what when where which while who will with without would yes you your
navigate assemble deliver hold empty fill pour push separate insert inspect find point show start task begin finish home
above across along around against beyond inside outside clockwise counterclockwise degrees twist tilt flip
avoid danger dangerous safe safely unsafe human person obstacle forbidden allowed limit workspace
cloth fabric towel napkin paper box bowl plate bottle cylinder cone ring lid handle tool screw part piece item thing objects
blocks balls cups bins containers cubes spheres mugs trays table belt camera light floor wall door shelf drawer station dock
orange white black grey gray pink brown cyan dark bright small large big little tall short round square soft hard heavy
zero four five six seven eight nine ten 0 1 2 3 4 5 6 7 8 9 colour color shape left right middle if then else and but because so
all any some none more less most least very again already also always never ok okay thanks hello answer question action instruction
demonstration policy model sees see did can cannot carry bring fetch lower raise close closed ready pretrained
""".split()


def noun_phrases(thing: tuple[str, str], unique_colour: bool = False) -> list[str]:
    """Ways to name an object: every synonym of its shape, and "the red object" where the colour alone decides."""
    colour, shape = thing
    names = [f"the {colour} {noun}" for noun in SHAPE_NOUNS[shape]]
    return names + ([f"the {colour} object"] if unique_colour else [])


def destination_phrases(command: Command) -> list[str]:
    """Ways to name where a command leads to; a single empty string where it leads nowhere."""
    if isinstance(command.destination, tuple):
        return noun_phrases(command.destination)
    if command.task in ("put", "align") or (command.task == "go" and command.destination in COLOURS):
        return [f"the {command.destination} {noun}" for noun in BIN_NOUNS]
    if command.task == "go":
        return [f"the {command.destination}"]
    return [command.destination]


def sentences(command: Command, held_out: bool = False, unique_colours: frozenset[str] = frozenset()) -> list[str]:
    """Every sentence that says `command`, without the polite frames, in a fixed order.

    held_out: the phrasings never used in pretraining.   unique_colours: colours that only one object of the scene has.
    Raises ValueError for a task that has no phrasings.
    """
    if command.steps:
        return _linked_sentences(command, held_out, unique_colours)
    if command.task not in PHRASINGS:
        raise ValueError(f"no phrasings for the task {command.task!r}; tasks with phrasings: {', '.join(PHRASINGS)}")
    patterns = PHRASINGS[command.task].held_out if held_out else PHRASINGS[command.task].trained
    objects = noun_phrases(command.object, command.object[0] in unique_colours) if command.object[0] else [""]
    at = "in" if command.destination == "middle" else "on"
    return [pattern.format(o=o, d=d, at=at) for pattern, o, d in product(patterns, objects, destination_phrases(command))]


def _linked_sentences(command: Command, held_out: bool, unique_colours: frozenset[str]) -> list[str]:
    links = LINKS.held_out if held_out else LINKS.trained
    texts = [""]
    for index, step in enumerate(command.steps):
        said = sentences(step, held_out, unique_colours)[:6]
        texts = said if index == 0 else [
            (links[0] if index > 1 else link).format(a=text, b=more)
            for text in texts[:3] for more in said[:4] for link in links
        ]
    return texts


def say(command: Command, rng, held_out: bool = False, unique_colours: frozenset[str] = frozenset()) -> str:
    """One sentence for `command`, drawn with the numpy Generator `rng`, in a polite frame now and then."""
    frames = FRAMES.held_out if held_out else FRAMES.trained
    options = sentences(command, held_out, unique_colours)
    sentence = options[rng.integers(len(options))]
    return frames[rng.integers(len(frames))].format(s=sentence)


def words(text: str) -> list[str]:
    """Lower-case words of a sentence, without punctuation: what the tokenizer sees."""
    return re.sub(r"[^a-z0-9'<>_ ]+", " ", text.lower()).split()


def vocabulary() -> list[str]:
    """Every word of the course, sorted: all that the phrasings can produce, and the reserved ones."""
    patterns = [p for group in (*PHRASINGS.values(), FRAMES, LINKS) for p in group.trained + group.held_out]
    nouns = [noun for group in SHAPE_NOUNS.values() for noun in group]
    listed = [*patterns, *COLOURS, *SHAPES, *ZONES, *EXTREMES, *nouns, *BIN_NOUNS, *SENSOR_WORDS, *RESERVED_WORDS, "object"]
    return sorted({word for text in listed for word in words(re.sub(r"{\w+}", " ", text))})


def unknown_words(text: str) -> list[str]:
    """The words of `text` that are outside the vocabulary, in order: name them to the person who typed them."""
    known = set(vocabulary())
    return [word for word in words(text) if word not in known]
