"""What stands on the table: the layout of one scene, drawn from a seed, and the MuJoCo model that simulates it.

Metres, radians, seconds. x points to the robot's right, y away from the camera, z up; the table top is z = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import numpy as np

from labkit.instructions import COLOURS, NOVEL_OBJECTS, SHAPES

RGBA = {"red": (0.85, 0.12, 0.10), "green": (0.10, 0.62, 0.20), "blue": (0.10, 0.25, 0.85),
        "yellow": (0.95, 0.82, 0.10), "purple": (0.55, 0.15, 0.65)}
HALF_HEIGHT = {"block": 0.030, "ball": 0.032, "cup": 0.040}
RADIUS = {"block": 0.030, "ball": 0.032, "cup": 0.022}
BIN_HALF = 0.06
BIN_PLACES = ((-0.16, 0.175), (0.0, 0.175), (0.16, 0.175))
OBJECT_AREA = ((-0.175, 0.175), (-0.125, 0.055))
ZONE_PLACES = {"left": (-0.14, -0.195), "middle": (0.0, -0.195), "right": (0.14, -0.195)}
FORWARD_PLACE = (0.0, 0.30)
OBJECT_SPACING = 0.105
HOME = (0.0, 0.30, 0.30)
SAFE_HEIGHT = 0.22
BELT_CENTRE_Y, BELT_HALF_Y, BELT_TOP = -0.035, 0.115, 0.0005

_GEOMS = {
    "block": 'type="box" size="0.03 0.03 0.03"',
    "ball": 'type="sphere" size="0.032"',
    "cup": 'type="cylinder" size="0.022 0.04"',
}
_TABLE_RGB, _BELT_RGB, _ARM_RGB, _PAD_RGB = (0.62, 0.58, 0.52), (0.58, 0.54, 0.49), (0.35, 0.35, 0.38), (0.15, 0.15, 0.17)


@dataclass(frozen=True)
class Thing:
    """An object on the table. x, y in metres, yaw in radians."""

    colour: str
    shape: str
    x: float
    y: float
    yaw: float = 0.0

    @property
    def name(self) -> tuple[str, str]:
        return (self.colour, self.shape)


@dataclass(frozen=True)
class Bin:
    """A coloured tray with its centre at x, y (metres) and turned by yaw (radians)."""

    colour: str
    x: float
    y: float
    yaw: float = 0.0


@dataclass(frozen=True)
class Scene:
    """One layout of the table."""

    things: tuple[Thing, ...]
    bins: tuple[Bin, ...]

    @property
    def unique_colours(self) -> frozenset[str]:
        """Colours that exactly one object has, so that "the red object" is clear."""
        colours = [thing.colour for thing in self.things]
        return frozenset(c for c in colours if colours.count(c) == 1)


@dataclass(frozen=True)
class Variation:
    """Conditions in which the robot works. The default is the pretraining distribution without its small jitter.

    camera_shift: metres added to the camera's position (it keeps looking at the same point).
    light: brightness, 1 is normal, 0.2 a dim room.   light_direction: radians, turns the lamp around the table.
    objects: how many stand on the table (1 to 5).   colours, shapes: those allowed.
    novel: False leaves out NOVEL_OBJECTS, True draws the first object from them.
    places: fixed (x, y) of the objects, in order, or None for random ones.   place_shift: metres, random shift of each
    object on top of that.   bin_yaw: radians, the bins turn by up to this much.   belt_speed: m/s along +x.
    """

    camera_shift: tuple[float, float, float] = (0.0, 0.0, 0.0)
    light: float = 1.0
    light_direction: float = 0.0
    objects: int = 3
    colours: tuple[str, ...] = COLOURS
    shapes: tuple[str, ...] = SHAPES
    novel: bool = False
    places: tuple[tuple[float, float], ...] | None = None
    place_shift: float = 0.0
    bin_yaw: float = 0.0
    belt_speed: float = 0.0

    def __post_init__(self):
        if not 1 <= self.objects <= 5:
            raise ValueError(f"objects is {self.objects}; between 1 and 5 fit on the table")
        if self.places is not None and len(self.places) < self.objects:
            raise ValueError(f"places lists {len(self.places)} positions for {self.objects} objects")


def sample_scene(rng, variation: Variation = Variation(), confusable: bool | None = None) -> Scene:
    """Draw a scene. The first object is the one a task is about.

    confusable: True gives it a neighbour of the same colour or the same shape, False none; None tosses a coin.
    """
    if confusable is None:
        confusable = bool(rng.random() < 0.5)
    names = _sample_names(rng, variation, confusable)
    places = _sample_places(rng, variation)
    things = tuple(
        Thing(colour, shape, float(x), float(y), float(rng.uniform(-np.pi / 4, np.pi / 4)))
        for (colour, shape), (x, y) in zip(names, places)
    )
    colours = rng.permutation(len(COLOURS))[: len(BIN_PLACES)]
    bins = tuple(
        Bin(COLOURS[c], x, y, float(rng.uniform(-1, 1) * variation.bin_yaw)) for c, (x, y) in zip(colours, BIN_PLACES)
    )
    return Scene(things, bins)


def _sample_names(rng, variation, confusable):
    catalogue = [(c, s) for c in variation.colours for s in variation.shapes if variation.novel or (c, s) not in NOVEL_OBJECTS]
    first_from = [n for n in catalogue if n in NOVEL_OBJECTS] if variation.novel else catalogue
    first = first_from[rng.integers(len(first_from))]
    others = [n for n in catalogue if n != first]
    alike = [n for n in others if n[0] == first[0] or n[1] == first[1]]
    unlike = [n for n in others if n not in alike]
    names = [first]
    while len(names) < variation.objects:
        pool = alike if confusable and len(names) == 1 else (others if confusable else unlike)
        pool = [n for n in pool or others if n not in names] or [n for n in others if n not in names]
        if not pool:
            raise ValueError(f"{variation.objects} different objects cannot be made of {variation.colours} x {variation.shapes}")
        names.append(pool[rng.integers(len(pool))])
    return names


def _sample_places(rng, variation):
    """Positions at least OBJECT_SPACING apart; a fixed layout keeps its places and is only shifted."""
    if variation.places is not None:
        places = np.array(variation.places[: variation.objects], dtype=float)
        return places + rng.uniform(-1, 1, places.shape) * variation.place_shift
    low, high = np.array(OBJECT_AREA).T
    spacing = OBJECT_SPACING if variation.objects <= 3 else 0.085
    while True:
        places = rng.uniform(low, high, (variation.objects, 2))
        if all(np.linalg.norm(a - b) >= spacing for a, b in combinations(places, 2)):
            return places


def resting_height(shape: str, on: float = 0.0) -> float:
    """Height of the object's centre, in metres, when it rests on a surface at height `on`."""
    return HALF_HEIGHT[shape] + on


@lru_cache(maxsize=64)
def compiled(shapes: tuple[str, ...]):
    """The MuJoCo model for objects of these shapes, shared by every scene that has them: nobody may change it.

    Colours are not in it (the camera paints them), and the bins are mocap bodies, so a layout is data, not model.
    """
    import mujoco

    return mujoco.MjModel.from_xml_string(mjcf(shapes))


def mjcf(shapes: tuple[str, ...]) -> str:
    """The model as MJCF text: table, belt, three bins, the gripper with its wrist and vacuum pad, one free body an object."""
    walls = "".join(
        f'<geom type="box" pos="{x} {y} 0.012" size="{sx} {sy} 0.012"/>'
        for x, y, sx, sy in ((-0.057, 0, 0.003, 0.06), (0.057, 0, 0.003, 0.06), (0, -0.057, 0.054, 0.003), (0, 0.057, 0.054, 0.003))
    )
    bins = "".join(
        f'<body name="bin{i}" mocap="true" pos="{x} {y} 0"><geom type="box" pos="0 0 0.002" size="0.06 0.06 0.002"/>{walls}</body>'
        for i, (x, y) in enumerate(BIN_PLACES)
    )
    objects = "".join(
        f'<body name="object{i}" pos="{0.1 * i} 0 {HALF_HEIGHT[s]}"><freejoint/><geom name="object{i}" {_GEOMS[s]} mass="0.05" '
        f'condim="6" friction="0.9 0.01 0.003"/></body>'
        for i, s in enumerate(shapes)
    )
    return f"""<mujoco model="tabletop">
  <option timestep="0.005" integrator="implicitfast"/>
  <visual><global offwidth="512" offheight="512"/></visual>
  <worldbody>
    <light pos="0 -0.3 1.2" dir="0 0.2 -1"/>
    <geom name="table" type="box" pos="0 0.035 -0.02" size="0.25 0.305 0.02" friction="0.9 0.01 0.003"/>
    <body name="belt" pos="0 {BELT_CENTRE_Y} 0">
      <joint name="belt" type="slide" axis="1 0 0"/>
      <geom name="belt" type="box" pos="0 0 {BELT_TOP - 0.01}" size="0.75 {BELT_HALF_Y} 0.01" mass="200" friction="0.9 0.01 0.003"/>
    </body>
    {bins}
    <body name="gripper" gravcomp="1">
      <joint name="x" type="slide" axis="1 0 0"/><joint name="y" type="slide" axis="0 1 0"/><joint name="z" type="slide" axis="0 0 1"/>
      <geom name="arm" type="capsule" fromto="0 0 0.06 0 0 0.34" size="0.014" mass="0.5" contype="0" conaffinity="0"/>
      <body name="wrist" gravcomp="1">
        <joint name="yaw" type="hinge" armature="0.01" axis="0 0 1"/>
        <joint name="pitch" type="hinge" armature="0.01" axis="0 1 0"/>
        <joint name="roll" type="hinge" armature="0.01" axis="1 0 0"/>
        <geom name="stem" type="cylinder" pos="0 0 0.03" size="0.008 0.025" mass="0.1" contype="0" conaffinity="0"/>
        <body name="pad" gravcomp="1">
          <geom name="pad" type="box" pos="0 0 0.005" size="0.012 0.012 0.005" mass="0.05" condim="6" friction="1.2 0.05 0.01"/>
        </body>
      </body>
    </body>
    {objects}
  </worldbody>
  <contact><exclude body1="world" body2="belt"/></contact>
  <actuator>
    <position name="x" joint="x" kp="400" dampratio="1"/>
    <position name="y" joint="y" kp="400" dampratio="1"/>
    <position name="z" joint="z" kp="400" dampratio="1"/>
    <position name="roll" joint="roll" kp="40" dampratio="1"/>
    <position name="pitch" joint="pitch" kp="40" dampratio="1"/>
    <position name="yaw" joint="yaw" kp="40" dampratio="1"/>
    <adhesion name="vacuum" body="pad" ctrlrange="0 1" gain="12"/>
    <velocity name="belt" joint="belt" kv="2000"/>
  </actuator>
</mujoco>"""


def paint(model, scene: Scene) -> np.ndarray:
    """(geoms, 3) float32 colour of every geom of `model` for this scene; row -1 (no hit) is the room behind."""
    rgb = np.empty((model.ngeom + 1, 3), np.float32)
    rgb[:] = _ARM_RGB
    rgb[-1] = (0.30, 0.32, 0.36)
    for name, colour in (("table", _TABLE_RGB), ("belt", _BELT_RGB), ("pad", _PAD_RGB)):
        rgb[model.geom(name).id] = colour
    for i, tray in enumerate(scene.bins):
        first = model.body(f"bin{i}").geomadr[0]
        rgb[first : first + 5] = np.array(RGBA[tray.colour]) * 0.85 + 0.15
    for i, thing in enumerate(scene.things):
        rgb[model.geom(f"object{i}").id] = RGBA[thing.colour]
    return rgb
