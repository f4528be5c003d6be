"""The stored sample: what a record is, how it is serialised, how its image bytes decode, and what it costs in a row.

Everything that a preparation on a cluster and a loader on a training host must agree on is here, and nothing else.
"""

import contextlib
import dataclasses
import hashlib
import io
import math
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import msgpack
import numpy as np
import xxhash
from PIL import Image, TiffImagePlugin

from unihetero_jax.config import Turns

RECORD_VERSION = 1
MERGE_SIZE = 2
"""A visual token stands for a block of 2x2 patches (the Semantic Encoder's merge)."""
MAX_IMAGE_PIXELS = 64_000_000
"""Larger images are refused from the header alone, before any pixel is decoded (our choice: 8,000 x 8,000)."""
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO", "PPM")
"""What may be opened. Pillow knows some forty more: rare ones whose decoders few have tested on hostile bytes, and EPS,
which runs an external program on them. MPO is what some cameras write under the name of JPEG."""
MAX_TEXT_CHARS = 1_000_000
"""Longer text in one segment is refused (our choice: tokenization stays bounded in time and memory)."""

INDEX_DTYPE = np.dtype([("num_tokens", "<u4"), ("num_patches", "<u2"), ("num_images", "u1"), ("flags", "u1")])
"""One fixed 8-byte row per record: row positions (text, visual tokens and markers), image patches, images, flags."""
FLAG_GENERATED_IMAGE = 1
"""At least one image of the record comes after text, so a visual loss on generated images applies to it."""
FLAG_TOO_LONG = 2
"""`num_tokens` or `num_patches` did not fit its field; the planner counts and drops such a record."""


class RecordError(ValueError):
    """A sample cannot be stored or read. `reason` is a short stable key that counters use."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class TextSegment:
    """A run of text. Branch 0 is the prefix shared by all turns; branch k >= 1 is the k-th independent turn."""

    text: str
    loss: bool = False
    branch: int = 0


@dataclasses.dataclass(frozen=True)
class ImageSegment:
    """An image as its original bytes, with the size that its header states after EXIF rotation. Always in branch 0."""

    data: bytes
    height: int
    width: int


Segment = TextSegment | ImageSegment


@dataclasses.dataclass(frozen=True)
class Record:
    """One stored sample.

    Attributes:
        source: name of the set it came from.
        kind: caption, image (text to image), image_only, vqa, text or interleaved; for counting, not for behaviour.
        segments: in reading order; branch 0 first, then branches 1, 2, ... contiguously.
        meta: small strings and numbers worth keeping (id, path, licence).
        where: raw file and place in it, for the message of a preparation that must drop the record. Not stored, so it
            has no part in what a record is.
    """

    source: str
    kind: str
    segments: tuple[Segment, ...]
    meta: dict[str, str | int | float] = dataclasses.field(default_factory=dict)
    where: str = dataclasses.field(default="", compare=False)

    def __post_init__(self):
        branches = [s.branch for s in self.segments if isinstance(s, TextSegment)]
        if branches != sorted(branches):
            raise RecordError("branch_order", f"segments must be ordered by branch, got {branches}")
        images_after_branch = [
            i
            for i, s in enumerate(self.segments)
            if isinstance(s, ImageSegment) and any(isinstance(p, TextSegment) and p.branch for p in self.segments[:i])
        ]
        if images_after_branch:
            raise RecordError("image_in_branch", f"segments {images_after_branch}: images belong to the shared prefix")


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """How images become patches. Part of the index's identity: another spec needs another index.

    Attributes:
        patch_size: side of a patch in pixels.
        min_patches, max_patches: bounds on patches per image; images are scaled (keeping aspect ratio) to lie within.
    """

    patch_size: int
    min_patches: int
    max_patches: int


def serialize(record: Record) -> bytes:
    """Encodes a record as msgpack (versioned; never pickle)."""
    segments = [
        {"t": s.text, "l": s.loss, "b": s.branch}
        if isinstance(s, TextSegment)
        else {"i": s.data, "h": s.height, "w": s.width}
        for s in record.segments
    ]
    body = {
        "v": RECORD_VERSION,
        "source": record.source,
        "kind": record.kind,
        "segments": segments,
        "meta": record.meta,
    }
    return typing.cast(bytes, msgpack.packb(body, use_bin_type=True))


def deserialize(data: bytes) -> Record:
    """Decodes a record.

    Raises:
        RecordError: `not_a_record` if the bytes are not ours, `record_version` if written by a newer version.
    """
    try:
        body = msgpack.unpackb(data, raw=False)
        version = body["v"]
    except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
        raise RecordError("not_a_record", str(error)) from error
    if version != RECORD_VERSION:
        raise RecordError("record_version", f"record has version {version}, this program reads {RECORD_VERSION}")
    try:
        segments = tuple(
            ImageSegment(s["i"], s["h"], s["w"]) if "i" in s else TextSegment(s["t"], s["l"], s["b"])
            for s in body["segments"]
        )
        return Record(body["source"], body["kind"], segments, dict(body["meta"]))
    except (ValueError, TypeError, KeyError) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError("not_a_record", f"{type(error).__name__}: {error}") from error


def content_hash(data: bytes) -> int:
    """64-bit identity of serialised bytes, for row hashes (XXH3: no attack is to be feared). Equal on every machine."""
    return xxhash.xxh3_64_intdigest(data)


def probe_image(data: bytes) -> tuple[int, int]:
    """Reads (height, width) as the image will stand after EXIF rotation; `decode_image` gives exactly this size.

    The header suffices, except for a PNG without EXIF before its pixels: it is decoded to look for EXIF behind them.

    Raises:
        RecordError: `empty_image`, `not_an_image`, `image_too_large`, or `truncated_image` (also: its EXIF is damaged).
    """
    with _open_image(data) as image, _decoding():
        rotated = _orientation(image) in _QUARTER_TURNS
        if isinstance(image, TiffImagePlugin.TiffImageFile):  # its size has the tag's rotation, though not that of XMP
            rotated ^= image.tag_v2.get(_ORIENTATION_TAG) in _QUARTER_TURNS
        return (image.width, image.height) if rotated else (image.height, image.width)


def decode_image(data: bytes) -> np.ndarray:
    """Decodes image bytes to `uint8[height, width, 3]`; see `decode_to_pillow`."""
    return np.asarray(decode_to_pillow(data))


def decode_to_pillow(data: bytes) -> Image.Image:
    """Decodes image bytes to a Pillow image of mode RGB, which can be resized without another copy of its pixels.

    The result is defined for every mode: EXIF rotation is applied; the first frame of an animation is taken; alpha and
    transparent colours are composed on white; CMYK and greyscale are converted. Greyscale of 16 bits is scaled to 8;
    integers of 32 bits are taken for 16-bit values in a wide file and clipped to them; floats are scaled so that the
    largest finite value is white, and what is negative or no number is black.

    Raises:
        RecordError: `empty_image`, `not_an_image`, `image_too_large`, or `truncated_image` (never a half-grey image).
    """
    with _open_image(data) as image, _decoding():
        orientation = _orientation(image)
        image.load()
        # Not ImageOps.exif_transpose: it writes the EXIF anew, which fails for odd values. A TIFF turns itself in load.
        if orientation in _TRANSPOSITIONS and not isinstance(image, TiffImagePlugin.TiffImageFile):
            return _to_rgb(image.transpose(_TRANSPOSITIONS[orientation]))
        return _to_rgb(image)


_ORIENTATION_TAG = 0x0112
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each EXIF orientation; any other value means upright."""
_QUARTER_TURNS = (5, 6, 7, 8)

# Pillow warns of sizes between our limit, which refuses them anyway, and twice its own, where it raises. Muted once at
# import: `warnings.catch_warnings` around each image would change the whole process's filters from many threads.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def _open_image(data: bytes) -> Image.Image:
    if not data:
        raise RecordError("empty_image", "0 bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # a warning where warnings raise
        raise RecordError("image_too_large", str(error)) from error
    except Exception as error:  # decoders fail on hostile bytes in ways that no list of exceptions keeps up with
        raise RecordError("not_an_image", f"{error} (first bytes {data[:8]!r})") from error
    if image.width * image.height > MAX_IMAGE_PIXELS:
        size = f"{image.width} x {image.height} pixels, limit {MAX_IMAGE_PIXELS}"
        image.close()
        raise RecordError("image_too_large", size)
    return image


@contextlib.contextmanager
def _decoding() -> Iterator[None]:
    """Whatever goes wrong with an image that was opened: its bytes are at fault, and the sample can be left out."""
    try:
        yield
    except Exception as error:
        raise RecordError("truncated_image", f"{type(error).__name__}: {error}") from error


def _orientation(image: Image.Image) -> int:
    return image.getexif().get(_ORIENTATION_TAG, 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = Image.fromarray(_to_eight_bits(image))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(background, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_eight_bits(image: Image.Image) -> np.ndarray:
    values = np.asarray(image, np.float64)
    white = 65535.0
    if image.mode == "F":
        white = max(values.max(initial=0, where=np.isfinite(values)), 1e-9)
        values = np.nan_to_num(values, nan=0, posinf=white, neginf=0)
    transparent = image.info.get("transparency")  # of 16-bit greyscale: one value; composed on white like any other
    if isinstance(transparent, int):
        values = np.where(values == transparent, white, values)
    return np.clip(values / white * 255 + 0.5, 0, 255).astype(np.uint8)


def image_grid(height: int, width: int, spec: ImageSpec) -> tuple[int, int]:
    """The (height, width) in patches that an image is resized to: whole 2x2 blocks within the spec's bounds.

    Keeps the aspect ratio as far as whole blocks allow (SigLIP 2 NaFlex, arXiv 2502.14786). At least one block a side.
    """
    block = MERGE_SIZE * spec.patch_size
    max_blocks = spec.max_patches // MERGE_SIZE**2
    min_blocks = spec.min_patches / MERGE_SIZE**2
    blocks_h, blocks_w = height / block, width / block
    area = blocks_h * blocks_w
    scale = math.sqrt(min(max(area, min_blocks), max_blocks) / area)
    grid_h = min(max(1, round(blocks_h * scale)), max_blocks)
    grid_w = min(max(1, round(blocks_w * scale)), max_blocks)
    while grid_h * grid_w > max_blocks:  # rounding went over: shrink the side whose aspect error grows least
        shrink_h = grid_w == 1 or (grid_h > 1 and grid_h / blocks_h >= grid_w / blocks_w)
        grid_h, grid_w = (grid_h - 1, grid_w) if shrink_h else (grid_h, grid_w - 1)
    return grid_h * MERGE_SIZE, grid_w * MERGE_SIZE


def image_tokens(height: int, width: int, spec: ImageSpec) -> int:
    """Visual tokens of an image: one per 2x2 block of its patches."""
    grid_h, grid_w = image_grid(height, width, spec)
    return grid_h * grid_w // MERGE_SIZE**2


def record_cost(
    record: Record, encode: Callable[[str], Sequence[int]], spec: ImageSpec, turns: Turns = "branches"
) -> tuple[int, int]:
    """What a record takes of a row: (token positions, image patches). Planner and reader both call this.

    Text takes its tokens; an image takes `<boi>`, one position per visual token, `<eoi>`; an end-of-sample token closes
    the sample, or each of its branches when it has independent turns. With `repeated_prefix` every branch after the
    first takes the positions of the prefix once more; its images are stored and encoded once all the same.
    """
    prefix_tokens = branch_tokens = num_patches = 0
    for segment in record.segments:
        if isinstance(segment, ImageSegment):
            num_visual = image_tokens(segment.height, segment.width, spec)
            prefix_tokens += num_visual + 2
            num_patches += num_visual * MERGE_SIZE**2
        elif segment.branch:
            branch_tokens += len(encode(segment.text))
        else:
            prefix_tokens += len(encode(segment.text))
    num_branches = max(len({s.branch for s in record.segments if isinstance(s, TextSegment) and s.branch}), 1)
    num_prefixes = num_branches if turns == "repeated_prefix" else 1
    return num_prefixes * prefix_tokens + branch_tokens + num_branches, num_patches


def index_key(tokenizer_hash: str, spec: ImageSpec, turns: Turns = "branches") -> str:
    """Names the index of lengths for a tokenizer, an image spec and a layout of turns: it is valid for exactly these.

    That of branches has the name that it had before there was another layout.
    """
    text = f"{RECORD_VERSION}|{tokenizer_hash}|{spec.patch_size}|{spec.min_patches}|{spec.max_patches}"
    if turns != "branches":
        text += f"|{turns}"
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def format_prompt(question: str) -> str:
    """The one prompt template: the question itself. Training data, benchmarks and `generate` all use it."""
    return question.strip()


def format_answer(answer: str) -> str:
    """The answer as it follows a prompt; the leading space keeps byte-level BPE tokens whole words."""
    return " " + answer.strip()


PROMPT_TEMPLATE = "{question}| {answer}"
"""Written into result files; `|` is where the supervised text begins."""

ImageOrder = Literal["image_first", "text_first"]
"""The two orders of an image-text pair: read the image, or generate it."""
