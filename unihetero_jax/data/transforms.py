"""Pixels of a sample: resize to whole blocks, cut into patches, and augmentations that change no length.

Pixels stay uint8 in 0..255 from the file to the device; the model normalises them.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from unihetero_jax.data.records import MERGE_SIZE, ImageSpec, Record, TextSegment, image_grid

NLVR_SIZE = (100, 400)
"""Height and width of an NLVR image: three boxes with gaps between them."""
NLVR_BOX_LEFT = (0, 150, 300)
NLVR_BOX_SIDE = 100
BOX_NAMES = ("left", "middle", "right")
MAX_SHIFT_SHARE = 16
"""`mirror_shift` moves an image by at most 1/16 of its side: 2 pixels of CIFAR's 32 (our choice)."""

_BOX_NAME = re.compile(r"\b(left|middle|right)(?= box\b)", re.IGNORECASE)
_BARE_ANSWER = re.compile(r"\s*(left|middle|right)\s*", re.IGNORECASE)
_HORIZONTAL = re.compile(
    r"\b(left|leftmost|right|rightmost|middle|cent(er|re)|first|second|third|last|beside|between|order|sequence)\b",
    re.IGNORECASE,
)
_VERTICAL = re.compile(
    r"\b(top|topmost|bottom|base|above|below|over|under|underneath|beneath|upper|lower|up|down|upside|on|onto|atop|"
    r"tower|towers|stack|stacks|stacked|roof|floor|ground|high|higher|highest|low|lowest|vertical\w*|hang\w*)\b",
    re.IGNORECASE,
)


def resize_to_grid(image: np.ndarray | Image.Image, spec: ImageSpec) -> np.ndarray:
    """Resizes an image to `uint8[gh * patch, gw * patch, 3]`, (gh, gw) = `image_grid`, even numbers of patches.

    Bilinear with antialias, as SigLIP 2 NaFlex does (arXiv 2502.14786). An image that already fits is not touched.

    Args:
        image: `uint8[h, w, 3]`, or a Pillow image of mode RGB.
        spec: patch size and bounds of the number of patches.
    """
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    grid_h, grid_w = image_grid(image.height, image.width, spec)
    size = (grid_w * spec.patch_size, grid_h * spec.patch_size)
    return np.asarray(image if image.size == size else image.resize(size, Image.Resampling.BILINEAR))


def patchify(pixels: np.ndarray, patch_size: int, out: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Cuts an image into patches, block-major: the four patches of a 2x2 block adjacent, blocks in raster order.

    An image of 2 x 4 patches, numbered in the order of the result:

        0 1 | 4 5
        2 3 | 6 7

    so the merge of 2x2 patches into a visual token is a reshape.

    Args:
        pixels: `uint8[h, w, 3]`, both sides multiples of `2 * patch_size`.
        patch_size: side of a patch in pixels.
        out: where the patches go, `uint8[n, patch_size * patch_size * 3]` and contiguous; a new array when not given.

    Returns:
        `uint8[n, patch_size * patch_size * 3]`, values of a patch in (y, x, channel) order, and `int32[n, 2]`, the
        (y, x) of each patch in patches.
    """
    height, width = pixels.shape[0] // patch_size, pixels.shape[1] // patch_size
    blocks = pixels.reshape(
        height // MERGE_SIZE, MERGE_SIZE, patch_size, width // MERGE_SIZE, MERGE_SIZE, patch_size, 3
    )
    blocks = blocks.transpose(0, 3, 1, 4, 2, 5, 6)
    patches = np.empty((height * width, patch_size * patch_size * 3), np.uint8) if out is None else out
    patches.reshape(blocks.shape)[:] = blocks
    y, x = np.divmod(np.arange(height * width, dtype=np.int32), width)
    coords = np.stack([y, x], axis=-1).reshape(height // MERGE_SIZE, MERGE_SIZE, width // MERGE_SIZE, MERGE_SIZE, 2)
    return patches, coords.transpose(0, 2, 1, 3, 4).reshape(height * width, 2)


def unpatchify(patches: np.ndarray, height: int, width: int, patch_size: int) -> np.ndarray:
    """The image, `uint8[height, width, 3]`, that `patchify` cut into these patches."""
    blocks = patches.reshape(
        height // (MERGE_SIZE * patch_size), width // (MERGE_SIZE * patch_size), MERGE_SIZE, MERGE_SIZE, patch_size,
        patch_size, 3,
    )  # fmt: skip
    return blocks.transpose(0, 2, 4, 1, 3, 5, 6).reshape(height, width, 3)


def augment_sample(
    name: str,
    record: Record,
    images: Sequence[np.ndarray],
    rng: np.random.Generator,
    encode: Callable[[str], Sequence[int]],
) -> tuple[Record, list[np.ndarray], list[str]]:
    """Applies the augmentation of a source to a record and its decoded images.

    No augmentation changes the size of an image or the token count of a text: the pack plan was made from lengths.

    Returns:
        The record, its images, and the names of parts that were left out because they would have changed a length or
        the truth of a text (for counters).
    """
    match name:
        case "none":
            return record, list(images), []
        case "mirror_shift":
            return record, [mirror_shift(image, rng) for image in images], []
        case "nlvr":
            return nlvr(record, images, rng, encode)
    raise ValueError(f"augment {name!r} is none of 'none', 'mirror_shift', 'nlvr'")


def mirror_shift(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirrors horizontally with probability 1/2 and moves by up to 1/16 of the side, edge pixels repeated."""
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    height, width = pixels.shape[:2]
    reach_y, reach_x = height // MAX_SHIFT_SHARE, width // MAX_SHIFT_SHARE
    y, x = int(rng.integers(2 * reach_y + 1)), int(rng.integers(2 * reach_x + 1))
    padded = np.pad(pixels, ((reach_y, reach_y), (reach_x, reach_x), (0, 0)), mode="edge")
    return padded[y : y + height, x : x + width]


def nlvr(
    record: Record, images: Sequence[np.ndarray], rng: np.random.Generator, encode: Callable[[str], Sequence[int]]
) -> tuple[Record, list[np.ndarray], list[str]]:
    """NLVR: permutes the three boxes, mirrors each box, flips the image vertically; the texts stay true.

    With boxes (left, middle, right) = (A, B, C) permuted to (C, A, B), "left box" in any text becomes "middle box". A
    part is left out where a text speaks of directions in another way than "left box" or the bare answer "left"
    (human sentences do: "a tower with a black base"), or where the renamed text has another number of tokens.
    """
    if len(images) != 1 or images[0].shape[:2] != NLVR_SIZE:
        return record, list(images), ["nlvr_image_size"]
    # All random numbers are drawn first: what is left out for one record moves no draw of the others.
    permutation = rng.permutation(3)
    mirrored, flipped = rng.random(3) < 0.5, rng.random() < 0.5
    texts = [s.text for s in record.segments if isinstance(s, TextSegment)]
    left_out = []
    if any(_other_direction(text) for text in texts):
        left_out.append("nlvr_direction_word")
        permutation, mirrored = np.arange(3), np.zeros(3, bool)
    if flipped and any(_VERTICAL.search(text) for text in texts):
        left_out.append("nlvr_vertical_word")
        flipped = False
    renamed = _rename_boxes(record, permutation)
    if not _same_lengths(record, renamed, encode):
        left_out.append("nlvr_token_count")
        permutation, renamed = np.arange(3), record
    pixels = images[0].copy()
    for place, origin in enumerate(permutation):  # place p shows what stood at permutation[p]
        left = NLVR_BOX_LEFT[origin]
        box = images[0][:, left : left + NLVR_BOX_SIDE]
        pixels[:, NLVR_BOX_LEFT[place] : NLVR_BOX_LEFT[place] + NLVR_BOX_SIDE] = (
            box[:, ::-1] if mirrored[place] else box
        )
    return renamed, [pixels[::-1] if flipped else pixels], left_out


def _other_direction(text: str) -> bool:
    """Whether a text names a direction in a way that renaming boxes cannot follow."""
    return _BARE_ANSWER.fullmatch(text) is None and _HORIZONTAL.search(_BOX_NAME.sub("", text)) is not None


def _rename_boxes(record: Record, permutation: np.ndarray) -> Record:
    new_name = {BOX_NAMES[origin]: BOX_NAMES[place] for place, origin in enumerate(permutation)}

    def rename(match: re.Match[str]) -> str:
        name = new_name[match.group(1).lower()]
        return match.group(0).replace(match.group(1), name.capitalize() if match.group(1)[0].isupper() else name)

    def renamed_text(text: str) -> str:
        pattern = _BARE_ANSWER if _BARE_ANSWER.fullmatch(text) else _BOX_NAME
        return pattern.sub(rename, text)

    segments = tuple(
        dataclasses.replace(s, text=renamed_text(s.text)) if isinstance(s, TextSegment) else s for s in record.segments
    )
    return dataclasses.replace(record, segments=segments)


def _same_lengths(old: Record, new: Record, encode: Callable[[str], Sequence[int]]) -> bool:
    return all(
        a.text == b.text or len(encode(a.text)) == len(encode(b.text))
        for a, b in zip(old.segments, new.segments, strict=True)
        if isinstance(a, TextSegment) and isinstance(b, TextSegment)
    )
