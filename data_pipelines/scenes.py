"""The scene world: rendered scenes of coloured shapes, from a seed and an index alone, with captions.

Scene i of a seed is the same on every machine and needs no other scene, so any number can be made in any order. Two
levels: *easy* (48 px, 1-4 objects on a jittered 3x3 grid) and *hard* (64 px, 1-8 objects placed freely, occlusion,
noise). Some colour-shape pairs never appear in training; the compositional split is about them.
"""

import dataclasses
import io
from collections.abc import Sequence
from typing import Literal

import numpy as np
from PIL import Image

Level = Literal["easy", "hard"]
Split = Literal["train", "val", "test", "heldout"]

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 50, 50), "green": (60, 180, 75), "blue": (60, 100, 230), "yellow": (240, 220, 60),
    "purple": (150, 60, 190), "orange": (245, 140, 40), "white": (240, 240, 240), "cyan": (70, 210, 220),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
SIZES = ("small", "large")
LOCATIONS = (
    "top left", "top middle", "top right",
    "left", "center", "right",
    "bottom left", "bottom middle", "bottom right",
)  # fmt: skip
"""No name begins another: a likelihood ranking would always put "top" before "top left"."""
HELD_OUT = frozenset({
    ("red", "circle"), ("green", "square"), ("blue", "triangle"),
    ("yellow", "diamond"), ("purple", "cross"), ("orange", "ring"),
})  # fmt: skip
"""One colour per shape that no training or ordinary test scene holds."""

BACKGROUND = (48, 48, 52)
IMAGE_SIZE: dict[Level, int] = {"easy": 48, "hard": 64}
CELL = IMAGE_SIZE["easy"] // 3
"""Side of a cell of the easy level's grid, in pixels."""
RADII = {"small": 5.0, "large": 7.2}
"""Of the easy level's objects, in pixels."""
MAX_OBJECTS: dict[Level, int] = {"easy": 4, "hard": 8}
FIRST_INDEX: dict[Split, int] = {"train": 0, "test": 1_000_000_000, "heldout": 2_000_000_000, "val": 3_000_000_000}
"""Where each split's indices begin, so that no scene of one is ever a scene of another."""
REPEATED_SHARE = 0.3
"""Chance that a further object repeats an earlier one's colour or shape: without it, counts above one are rare."""


@dataclasses.dataclass(frozen=True)
class SceneObject:
    """An object: centre (x, y) and radius in pixels; y grows downwards."""

    color: str
    shape: str
    size: str
    x: float
    y: float
    radius: float


@dataclasses.dataclass(frozen=True)
class Scene:
    """A scene; later objects lie over earlier ones."""

    level: Level
    index: int
    objects: tuple[SceneObject, ...]

    @property
    def image_size(self) -> int:
        return IMAGE_SIZE[self.level]

    def location(self, item: SceneObject) -> str:
        """The name of the ninth of the image that holds the object's centre."""
        third = self.image_size / 3
        return LOCATIONS[3 * int(item.y // third) + int(item.x // third)]


def scene_rng(seed: int, split: Split, level: Level, index: int, purpose: str) -> np.random.Generator:
    """The randomness of one scene for one purpose, independent of every other."""
    purposes = ("objects", "noise", "caption", "questions", "part")
    key = [seed, tuple(IMAGE_SIZE).index(level), FIRST_INDEX[split] + index, purposes.index(purpose)]
    return np.random.default_rng(key)


def make_scene(seed: int, split: Split, level: Level, index: int) -> Scene:
    """Draws the objects of a scene. A `heldout` scene holds at least one held-out pair, the others none."""
    rng = scene_rng(seed, split, level, index, "objects")
    num_objects = int(rng.integers(1, MAX_OBJECTS[level] + 1))
    places = _grid_places(rng, num_objects) if level == "easy" else _free_places(rng, num_objects)
    objects: list[SceneObject] = []
    for i, (x, y, size, radius) in enumerate(places):
        if split == "heldout" and i == 0:
            color, shape = sorted(HELD_OUT)[rng.integers(len(HELD_OUT))]
        else:
            color, shape = _draw_pair(rng, objects)
        objects.append(SceneObject(color, shape, size, x, y, radius))
    return Scene(level, index, tuple(objects))


def part_of(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with some of its objects, at least one and never all: what a partial caption names.

    Raises:
        ValueError: the scene has a single object.
    """
    if len(scene.objects) < 2:
        raise ValueError(f"scene {scene.index} of one object has no part; take scenes of two objects or more")
    number = int(rng.integers(1, len(scene.objects)))
    kept = sorted(rng.permutation(len(scene.objects))[:number])
    return dataclasses.replace(scene, objects=tuple(scene.objects[i] for i in kept))


def _draw_pair(rng: np.random.Generator, earlier: Sequence[SceneObject]) -> tuple[str, str]:
    while True:
        color = list(COLORS)[int(rng.integers(len(COLORS)))]
        shape = SHAPES[int(rng.integers(len(SHAPES)))]
        if earlier and rng.random() < REPEATED_SHARE:
            model = earlier[int(rng.integers(len(earlier)))]
            color, shape = (model.color, shape) if rng.random() < 0.5 else (color, model.shape)
        if (color, shape) not in HELD_OUT:
            return color, shape


def _grid_places(rng: np.random.Generator, num_objects: int) -> list[tuple[float, float, str, float]]:
    places = []
    for number in rng.permutation(9)[:num_objects]:
        size = SIZES[rng.integers(2)]
        radius = RADII[size]
        room = jitter_room(radius)
        jitter = rng.uniform(-room, room, 2)
        x, y = ((number % 3) + 0.5) * CELL + jitter[0], ((number // 3) + 0.5) * CELL + jitter[1]
        places.append((float(x), float(y), size, radius))
    return places


def jitter_room(radius: float) -> float:
    """How far an object of the easy level may stand from the middle of its cell, in pixels: it never leaves it."""
    return CELL / 2 - radius - 0.5


def _free_places(rng: np.random.Generator, num_objects: int) -> list[tuple[float, float, str, float]]:
    """Centres anywhere, at least 8 px apart: objects may occlude each other but none is hidden."""
    places: list[tuple[float, float, str, float]] = []
    while len(places) < num_objects:
        size = SIZES[rng.integers(2)]
        radius = float(rng.uniform(4, 5.5) if size == "small" else rng.uniform(7, 9))
        x, y = (float(v) for v in rng.uniform(radius + 1, IMAGE_SIZE["hard"] - radius - 1, 2))
        if all((x - px) ** 2 + (y - py) ** 2 >= 64 for px, py, _, _ in places):
            places.append((x, y, size, radius))
    return places


def render(scene: Scene, seed: int = 0, split: Split = "train") -> np.ndarray:
    """The picture, `uint8[size, size, 3]`, antialiased. The hard level's noise comes from (seed, split, index)."""
    size = scene.image_size
    canvas = np.empty((size, size, 3), np.float32)
    canvas[:] = BACKGROUND
    if scene.level == "hard":
        noise = scene_rng(seed, split, scene.level, scene.index, "noise")
        coarse = noise.normal(0, 12, (size // 4, size // 4, 1)).repeat(4, 0).repeat(4, 1)
        canvas += coarse + noise.normal(0, 6, (size, size, 1))
    for item in scene.objects:
        reach = int(np.ceil(item.radius)) + 1
        top, left = max(int(item.y) - reach, 0), max(int(item.x) - reach, 0)
        bottom, right = min(int(item.y) + reach + 1, size), min(int(item.x) + reach + 1, size)
        covered = cover(item.shape, item.radius, (item.x, item.y), (top, left, bottom, right))[..., None]
        window = canvas[top:bottom, left:right]
        window += covered * (np.asarray(COLORS[item.color], np.float32) - window)
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


def cover(shape: str, radius: float, centre: tuple[float, float], window: tuple[int, int, int, int]) -> np.ndarray:
    """How much of each pixel of the window (top, left, bottom, right) a shape at (x, y) covers, in [0, 1]."""
    top, left, bottom, right = window
    dx = np.arange(left, right, dtype=np.float32)[None, :] + 0.5 - centre[0]
    dy = np.arange(top, bottom, dtype=np.float32)[:, None] + 0.5 - centre[1]
    return np.clip(0.5 - _distance(shape, dx, dy, radius), 0, 1)


def _distance(shape: str, dx: np.ndarray, dy: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance to the outline in pixels, negative inside."""
    match shape:
        case "circle":
            return np.hypot(dx, dy) - radius
        case "ring":
            return np.abs(np.hypot(dx, dy) - 0.72 * radius) - 0.28 * radius
        case "square":
            return np.maximum(np.abs(dx), np.abs(dy)) - 0.88 * radius
        case "diamond":
            return (np.abs(dx) + np.abs(dy) - radius) * np.float32(0.5**0.5)
        case "triangle":
            sides = (2 * np.abs(dx) - (dy + radius)) * np.float32(5**-0.5)
            return np.maximum(sides, dy - 0.85 * radius)
        case "cross":
            arm = 0.34 * radius
            upright = np.maximum(np.abs(dx) - arm, np.abs(dy) - radius)
            level = np.maximum(np.abs(dy) - arm, np.abs(dx) - radius)
            return np.minimum(upright, level)
    raise ValueError(f"unknown shape {shape!r}")


def encode_png(pixels: np.ndarray) -> bytes:
    """PNG bytes, compressed lightly: scenes are made by the ten thousand."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


CAPTION_OPENINGS = ("", "", "", "there is ", "a picture of ", "this scene shows ", "I see ")
LOCATION_PHRASES = {
    "center": ("in the center", "in the middle"),
    **{name: (f"at the {name}", f"in the {name}") for name in LOCATIONS if name != "center"},
}


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A sentence as a person might write it; it names every object's colour, shape and place, and its size or not."""
    order = rng.permutation(len(scene.objects))
    with_size = rng.random() < 0.6
    parts = []
    for i in order:
        item = scene.objects[i]
        words = [item.size] if with_size else []
        words += [item.color, item.shape]
        article = "an" if words[0][0] in "aeiou" else "a"
        places = LOCATION_PHRASES[scene.location(item)]
        parts.append(f"{article} {' '.join(words)} {places[rng.integers(len(places))]}")
    joined = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return CAPTION_OPENINGS[rng.integers(len(CAPTION_OPENINGS))] + joined
