"""Reads a picture of the easy scene world back into its objects, and scores what was read against what was asked for.

Every cell of the 3x3 grid holds one object or none, so a cell is compared with all that it could show: each colour,
shape, size and place within the cell, and nothing at all. What fits best, by squared distance, was drawn. No training,
and no error on true scenes; a picture that a model drew is read as the scene nearest to it, cell by cell.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from data_pipelines.scenes import (
    BACKGROUND,
    CELL,
    COLORS,
    IMAGE_SIZE,
    LOCATIONS,
    RADII,
    SHAPES,
    Scene,
    cover,
    jitter_room,
)

PLACES_PER_PIXEL = 2
"""Of the grid of centres tried: the jitter is known to a quarter of a pixel, which is less than shapes differ by."""


@dataclasses.dataclass(frozen=True)
class SeenObject:
    """What stands in one cell."""

    color: str
    shape: str
    size: str


Reading = Mapping[str, SeenObject]
"""Objects by location; a cell in which nothing stands has none."""


def read_scene(picture: np.ndarray) -> Reading:
    """The objects of a picture of the easy level, `uint8[48, 48, 3]`.

    Raises:
        ValueError: the picture has another size: the hard level's objects stand freely and hide each other.
    """
    side = IMAGE_SIZE["easy"]
    if picture.shape != (side, side, 3):
        raise ValueError(f"the reader of scenes reads the easy level, {side} x {side} pixels, not {picture.shape}")
    seen = {}
    for number, location in enumerate(LOCATIONS):
        top, left = (number // 3) * CELL, (number % 3) * CELL
        found = _read_cell(picture[top : top + CELL, left : left + CELL])
        if found is not None:
            seen[location] = found
    return seen


def read_cells(picture: np.ndarray) -> list[Mapping[str, str] | None]:
    """What stands in each of the nine cells, in raster order, attribute by attribute; as `read_scene`."""
    seen = read_scene(picture)
    return [dataclasses.asdict(seen[name]) if name in seen else None for name in LOCATIONS]


def _read_cell(pixels: np.ndarray) -> SeenObject | None:
    """With d the cell less the background, c a template's cover and k a colour less the background:
    |d - c k|^2 = |d|^2 - 2 (c . d) . k + |c|^2 |k|^2, and nothing at all has |d|^2.
    """
    kinds, covers = _templates()
    difference = pixels.reshape(-1, 3).astype(np.float64) - BACKGROUND
    colors = np.array(list(COLORS.values()), np.float64) - BACKGROUND
    gain = -2 * (covers @ difference) @ colors.T + (covers**2).sum(axis=1)[:, None] * (colors**2).sum(axis=1)
    best, color = np.unravel_index(int(gain.argmin()), gain.shape)
    if gain[best, color] >= 0:
        return None
    shape, size = kinds[best]
    return SeenObject(list(COLORS)[color], shape, size)


@functools.cache
def _templates() -> tuple[list[tuple[str, str]], np.ndarray]:
    """(shape, size) of each template, and how much it covers of each pixel of a cell, [templates, CELL^2]."""
    kinds, covers = [], []
    for size, radius in RADII.items():
        room = jitter_room(radius)
        steps = np.linspace(-room, room, max(round(2 * room * PLACES_PER_PIXEL), 1) + 1)
        for shape in SHAPES:
            for y in steps:
                for x in steps:
                    centre = (CELL / 2 + float(x), CELL / 2 + float(y))
                    kinds.append((shape, size))
                    covers.append(cover(shape, radius, centre, (0, 0, CELL, CELL)).reshape(-1))
    return kinds, np.stack(covers).astype(np.float64)


ATTRIBUTES = ("object", "color", "shape", "size")


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """How much of what was asked for was drawn.

    Attributes:
        shares: of the objects asked for, by attribute: `object`, something stands at its place; `color`, `shape`,
            `size`, and that it has; `size` over those whose size was asked for. `scene`, of the scenes: all objects
            stand where they should with their colour and shape, and no other. `count`, of the scenes: so many objects.
        num_objects, num_sized: how many were asked for, and of how many the size.
        num_scenes: how many pictures.
        extra_per_scene: objects where none was asked for.
    """

    shares: Mapping[str, float]
    num_objects: int
    num_sized: int
    num_scenes: int
    extra_per_scene: float


def fidelity(scenes: Sequence[Scene], readings: Sequence[Reading], sizes_asked: Sequence[bool]) -> Fidelity:
    """Scores readings of pictures against the scenes asked for, of equal number; of some, sizes were not named."""
    right = dict.fromkeys((*ATTRIBUTES, "scene", "count"), 0)
    num_objects = num_sized = extra = 0
    for scene, seen, is_sized in zip(scenes, readings, sizes_asked, strict=True):
        wanted = {scene.location(item): item for item in scene.objects}
        matched = 0
        for location, item in wanted.items():
            drawn = seen.get(location)
            num_objects += 1
            num_sized += is_sized
            if drawn is None:
                continue
            right["object"] += 1
            right["color"] += drawn.color == item.color
            right["shape"] += drawn.shape == item.shape
            right["size"] += is_sized and drawn.size == item.size
            matched += (drawn.color, drawn.shape) == (item.color, item.shape)
        extra += len(seen.keys() - wanted.keys())
        right["count"] += len(seen) == len(wanted)
        right["scene"] += matched == len(seen) == len(wanted)
    of = dict.fromkeys(right, num_objects) | {"size": num_sized, "scene": len(scenes), "count": len(scenes)}
    shares = {name: right[name] / max(of[name], 1) for name in right}
    return Fidelity(shares, num_objects, num_sized, len(scenes), extra / max(len(scenes), 1))
