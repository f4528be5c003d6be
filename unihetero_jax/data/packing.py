"""How samples become a row of arrays, in the layout drawn in `arrays.Batch`.

Nothing here reads files, and a row is a pure function of its samples. Which samples share a row says `row_plan`.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash
from PIL import Image

from unihetero_jax.data import transforms
from unihetero_jax.data.records import (
    MAX_TEXT_CHARS,
    MERGE_SIZE,
    ImageSegment,
    ImageSpec,
    Record,
    RecordError,
    Turns,
    content_hash,
    decode_to_pillow,
    serialize,
)
from unihetero_jax.data.roles import Role, in_order, is_pair
from unihetero_jax.data.tokenizer import Tokenizer

BLOCK = MERGE_SIZE**2
"""Patches per visual token."""
POSITION_FIELDS = (
    "tokens", "positions", "segment_ids", "branch_ids", "source_ids", "visual_index", "text_loss_mask", "visual_mask",
    "visual_loss_mask", "boi_grid",
)  # fmt: skip
"""Fields of a row that have a value for every token position."""


@dataclasses.dataclass(frozen=True)
class TokenPiece:
    """Consecutive token ids. `loss`: supervised or not, for all or one by one. Branch 0 is the shared prefix."""

    ids: Sequence[int]
    loss: Sequence[bool] | bool = False
    branch: int = 0


@dataclasses.dataclass(frozen=True)
class ImagePiece:
    """An image of whole blocks, `uint8[h, w, 3]`; stands in branch 0 right after its `<boi>`.

    `loss`: its tokens may carry the visual loss.
    """

    pixels: np.ndarray
    loss: bool = False


Piece = TokenPiece | ImagePiece


@dataclasses.dataclass(frozen=True)
class PackedSample:
    """A sample as token ids and pixels, ready for a row.

    Attributes:
        pieces: in order; branch 0 first, then each further branch contiguously.
        source_id: index of its source.
        identity: 64-bit content hash of the stored record.
        left_out: parts of the augmentation that were not applied, by name; `order` where an order was asked of a record
            that is no pair.
    """

    pieces: Sequence[Piece]
    source_id: int = 0
    identity: int = 0
    left_out: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Hole:
    """Padding in the place of a sample that could not be read, of the size that was planned for it."""

    num_tokens: int
    num_patches: int
    num_images: int


NUM_MARKERS = 2
"""`<boi>` and `<eoi>` around an image."""


def image_pieces(
    pixels: np.ndarray, tokenizer: Tokenizer, text_loss: bool = False, visual_loss: bool = False
) -> list[Piece]:
    """An image between its markers `<boi>` and `<eoi>`, which are targets with `text_loss`."""
    return [
        TokenPiece([tokenizer.boi_id], text_loss),
        ImagePiece(pixels, visual_loss),
        TokenPiece([tokenizer.eoi_id], text_loss),
    ]


def sample_from_record(
    record: Record,
    tokenizer: Tokenizer,
    spec: ImageSpec,
    source_id: int = 0,
    augment_rng: np.random.Generator | None = None,
    augment: str = "none",
    identity: int | None = None,
    role: Role = Role(),  # noqa: B008 - frozen
) -> PackedSample:
    """Decodes, augments and tokenizes a record.

    `<boi>` and `<eoi>` are targets of an image that comes after text: it is drawn, and these say where. A sample ends
    with `<eos>`, or each of its branches does. That token is a target if what stands before it is: a supervised text,
    or an image that comes after text.

    Args:
        record: the stored sample.
        tokenizer: of the text.
        spec: patch size and bounds of an image's patches.
        source_id: index of the source, kept for every position.
        augment_rng, augment: the augmentation of the source and its randomness.
        identity: content hash of the stored bytes, computed when not given.
        role: order of a pair, and which segments carry a loss.

    Raises:
        RecordError: an image does not decode or has another size than recorded, or a text is too long.
    """
    identity = content_hash(serialize(record)) if identity is None else identity
    images: Sequence[np.ndarray | Image.Image]
    images = [_decoded(segment) for segment in record.segments if isinstance(segment, ImageSegment)]
    left_out: list[str] = []
    if augment_rng is not None:
        arrays = [np.asarray(image) for image in images]
        record, images, left_out = transforms.augment_sample(augment, record, arrays, augment_rng, tokenizer.encode)
    if role.order in ("image_first", "text_first") and not is_pair(record):
        left_out.append("order")
    record, next_image, text_loss = in_order(record, role.order), iter(images), role.text_loss == "stored"
    pieces: list[Piece] = []
    branch, closes_with_loss, any_text = 0, False, False
    for segment in record.segments:
        if isinstance(segment, ImageSegment):
            visual_loss = role.visual_loss == "all" or (role.visual_loss == "generated" and any_text)
            closes_with_loss = any_text and text_loss
            pixels = transforms.resize_to_grid(next(next_image), spec)
            pieces += image_pieces(pixels, tokenizer, closes_with_loss, visual_loss)
            continue
        if segment.branch != branch and branch:
            pieces.append(TokenPiece([tokenizer.eos_id], closes_with_loss, branch))
        if len(segment.text) > MAX_TEXT_CHARS:
            raise RecordError("text_too_long", f"{len(segment.text)} characters, limit {MAX_TEXT_CHARS}")
        branch, closes_with_loss = segment.branch, segment.loss and text_loss
        ids = tokenizer.encode(segment.text)
        any_text = any_text or bool(ids)
        pieces.append(TokenPiece(ids, closes_with_loss, branch))
    pieces.append(TokenPiece([tokenizer.eos_id], closes_with_loss, branch))
    return PackedSample(pieces, source_id, identity, tuple(left_out))


def _decoded(segment: ImageSegment) -> Image.Image:
    image = decode_to_pillow(segment.data)
    if (image.height, image.width) != (segment.height, segment.width):
        raise RecordError(
            "size_mismatch",
            f"image decodes to {image.height} x {image.width}, the record states {segment.height} x {segment.width}",
        )
    return image


def sample_cost(sample: PackedSample, patch_size: int, turns: Turns = "branches") -> tuple[int, int]:
    """What a sample takes of a row: (token positions, image patches); equal to `records.record_cost` of its record."""
    num_tokens, num_patches = collections.Counter({0: 0}), 0
    for piece in sample.pieces:
        if isinstance(piece, TokenPiece):
            num_tokens[piece.branch] += len(piece.ids)
        else:
            patches = (piece.pixels.shape[0] // patch_size) * (piece.pixels.shape[1] // patch_size)
            num_tokens[0], num_patches = num_tokens[0] + patches // BLOCK, num_patches + patches
    num_branches = sum(1 for branch, count in num_tokens.items() if branch and count)
    repeats = max(num_branches - 1, 0) if turns == "repeated_prefix" else 0
    return num_tokens.total() + repeats * num_tokens[0], num_patches


def assemble_row(
    samples: Sequence[PackedSample | Hole],
    row_tokens: int,
    row_patches: int,
    patch_size: int,
    pad_id: int,
    turns: Turns = "branches",
) -> dict[str, np.ndarray]:
    """Lays samples out in a row of their own: the fields of `arrays.Batch` without the leading axis; see `fill_row`."""
    row = row_of(empty_rows(1, row_tokens, row_patches, patch_size, pad_id), 0)
    fill_row(row, samples, patch_size, turns)
    return row


def fill_row(
    row: dict[str, np.ndarray], samples: Sequence[PackedSample | Hole], patch_size: int, turns: Turns = "branches"
) -> None:
    """Lays samples out in an empty row, such as one of `empty_rows`, in the order given.

    The first token of a sample, and the first token of a branch that follows another branch, is no target whatever its
    piece says: the position before it is not in its context, so nothing could predict it. With `repeated_prefix` it
    would be, but is no target either, so that both layouts have the same loss.

    Raises:
        ValueError: the samples take more than the row has, or an image is not whole blocks right after a token.
    """
    row_tokens, row_patches = len(row["tokens"]), len(row["patches"])
    token = patch = image = segment = 0
    identities = []
    for number, sample in enumerate(samples, start=1):
        segment += 1
        if isinstance(sample, Hole):
            token, patch, image = token + sample.num_tokens, patch + sample.num_patches, image + sample.num_images
            identities.append(0)
            continue
        needed = sample_cost(sample, patch_size, turns)
        if token + needed[0] > row_tokens or patch + needed[1] > row_patches:
            raise ValueError(
                f"sample {number} of a row takes {needed[0]} tokens and {needed[1]} patches, "
                f"{row_tokens - token} and {row_patches - patch} are free"
            )
        end = token + sample_cost(sample, patch_size)[0]
        row["segment_ids"][token:end] = segment
        row["source_ids"][token:end] = sample.source_id
        patch, image = _place_pieces(row, sample.pieces, token, patch, image, patch_size)
        identities.append(sample.identity)
        if turns == "repeated_prefix":
            segment += _repeat_prefix(row, token, end)
        token += needed[0]
    row["row_hash"][:] = _row_hash(identities, row)


def _place_pieces(
    row: dict[str, np.ndarray],
    pieces: Sequence[Piece],
    start: int,
    patch: int,
    image: int,
    patch_size: int,
) -> tuple[int, int]:
    token, branch, prefix, position = start, 0, 0, 0
    for piece in pieces:
        if isinstance(piece, ImagePiece):
            if token == start or branch:
                raise ValueError("an image must follow its <boi> token, in the prefix that all branches share")
            count = piece.pixels.size // (patch_size * patch_size * 3)
            merged = count // BLOCK
            _, coords = transforms.patchify(piece.pixels, patch_size, row["patches"][patch : patch + count])
            grid = coords[-1] + 1  # the last patch is the bottom right one
            image += 1
            row["boi_grid"][token - 1] = grid // MERGE_SIZE
            row["patch_coords"][patch : patch + count] = coords
            row["patch_grid"][patch : patch + count] = grid
            row["patch_segment_ids"][patch : patch + count] = image
            row["visual_mask"][token : token + merged] = True
            row["visual_index"][token : token + merged] = np.arange(patch // BLOCK, patch // BLOCK + merged)
            row["visual_loss_mask"][token : token + merged] = piece.loss
            patch, length = patch + count, merged
        else:
            length = len(piece.ids)
            if not length:
                continue
            row["tokens"][token : token + length] = piece.ids
            row["text_loss_mask"][token : token + length] = piece.loss
            if piece.branch != branch:
                after_branch = branch != 0
                prefix = prefix if after_branch else token - start
                branch, position = piece.branch, prefix
                row["text_loss_mask"][token] &= not after_branch
            row["branch_ids"][token : token + length] = branch
        row["positions"][token : token + length] = np.arange(position, position + length)
        token, position = token + length, position + length
    row["text_loss_mask"][start : start + 1] = False
    return patch, image


def _repeat_prefix(row: dict[str, np.ndarray], start: int, end: int) -> int:
    """Gives each branch after the first its own copy of the prefix, as a segment of its own; returns how many.

        branches    boi  v0  eoi  q1  a1  q2  a2            segment  1 1 1 1 1 1 1
        repeated    boi  v0  eoi  q1  a1  boi v0 eoi q2 a2  segment  1 1 1 1 1 2 2 2 2 2

    A copy's visual positions name the same visual tokens; nothing in it is a target.
    """
    branch_ids = row["branch_ids"][start:end]
    prefix = np.flatnonzero(branch_ids == 0)
    branches = [np.flatnonzero(branch_ids == branch) for branch in np.unique(branch_ids[branch_ids > 0])]
    if len(branches) < 2:
        return 0
    taken = np.concatenate([np.concatenate([prefix, branch]) for branch in branches])
    copy = np.repeat(np.arange(len(branches)), [len(prefix) + len(branch) for branch in branches])
    laid_out = slice(start, start + len(taken))
    for name in POSITION_FIELDS:
        row[name][laid_out] = row[name][start + taken]
    row["segment_ids"][laid_out] += copy.astype(np.int32)
    is_repeat = (copy > 0) & (row["branch_ids"][laid_out] == 0)
    for name in ("text_loss_mask", "visual_loss_mask"):
        row[name][laid_out] &= ~is_repeat
    return len(branches) - 1


def empty_rows(num_rows: int, row_tokens: int, row_patches: int, patch_size: int, pad_id: int) -> dict[str, np.ndarray]:
    """Rows of padding only, with the leading axis `B`; their `row_hash` is zero."""
    integers = ("positions", "segment_ids", "branch_ids", "source_ids", "visual_index")
    masks = ("text_loss_mask", "visual_mask", "visual_loss_mask")
    return {
        "tokens": np.full((num_rows, row_tokens), pad_id, np.int32),
        **{name: np.zeros((num_rows, row_tokens), np.int32) for name in integers},
        **{name: np.zeros((num_rows, row_tokens), bool) for name in masks},
        "boi_grid": np.zeros((num_rows, row_tokens, 2), np.int32),
        "patches": np.zeros((num_rows, row_patches, patch_size * patch_size * 3), np.uint8),
        "patch_segment_ids": np.zeros((num_rows, row_patches), np.int32),
        "patch_coords": np.zeros((num_rows, row_patches, 2), np.int32),
        "patch_grid": np.zeros((num_rows, row_patches, 2), np.int32),
        "row_hash": np.zeros((num_rows, 2), np.uint32),
    }


def row_of(rows: dict[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
    """A view of one row."""
    return {name: array[number] for name, array in rows.items()}


def _row_hash(identities: Sequence[int], row: dict[str, np.ndarray]) -> np.ndarray:
    """64 bits over who is in the row and what the model will see of it (so augmentation and tokenizer count too)."""
    digest = xxhash.xxh3_64(np.asarray(identities, np.uint64).tobytes())
    for name in ("tokens", "segment_ids", "positions", "text_loss_mask", "visual_loss_mask", "patches"):
        digest.update(np.ascontiguousarray(row[name]).data)
    return np.frombuffer(digest.digest(), ">u4").astype(np.uint32)


def stack_rows(rows: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Rows to arrays with the leading axis `B`."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
