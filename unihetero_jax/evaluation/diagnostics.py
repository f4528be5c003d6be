"""Is the visual loss worth anything? Retrieval of the true image by a free rollout, beside trivial baselines.

A low visual loss proves nothing: a collapsed encoder has the lowest of all. A rollout that finds its own image among
others cannot come from a collapsed space.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from unihetero_jax.arrays import Batch, VisionOutput
from unihetero_jax.config import MERGED_PATCHES, Config
from unihetero_jax.data.mixture import image_spec, open_split
from unihetero_jax.data.packing import (
    ImagePiece,
    PackedSample,
    TokenPiece,
    assemble_row,
    sample_from_record,
    stack_rows,
)  # fmt: skip
from unihetero_jax.data.records import FLAG_GENERATED_IMAGE, MERGE_SIZE, deserialize
from unihetero_jax.data.sources import Source
from unihetero_jax.data.tokenizer import Tokenizer
from unihetero_jax.inference.generate import prompt_batch
from unihetero_jax.inference.rollout import rollout
from unihetero_jax.model.unihetero import Params, build
from unihetero_jax.sharding import fetch

MAX_FIT_IMAGES = 1024
Reader = Callable[[np.ndarray], Sequence[Mapping[str, str] | None]]
"""Names what stands at each position of a picture, attribute by attribute; None where nothing does."""


def check_candidates(config: Config, tokenizer: Tokenizer) -> None:
    """Raises ValueError unless `eval.rollout_source` has `eval.rollout_candidates` usable records."""
    source, needed = config.eval.rollout_source, config.eval.rollout_candidates
    if (found := _num_drawn_records(config, tokenizer)) < needed:
        raise ValueError(
            f"eval.rollout_source: {found} validation records of {source} ask for one image, eval.rollout_candidates "
            f"are {needed}; lower eval.rollout_candidates, or name another source (empty: no rollout)"
        )


def check_judged(config: Config, tokenizer: Tokenizer) -> None:
    """Raises ValueError unless it has twice as many: as many again to fit the map to the judge on."""
    source, needed = config.eval.rollout_source, config.eval.rollout_candidates
    if (found := _num_drawn_records(config, tokenizer)) < 2 * needed:
        raise ValueError(
            f"eval.rollout_source: {found} validation records of {source} ask for one image; to measure "
            f"eval.rollout_candidates = {needed} of them, as many others are needed to fit a map on"
        )


def _num_drawn_records(config: Config, tokenizer: Tokenizer) -> int:
    opened = open_split(config, tokenizer, config.eval.rollout_source, "val")
    found = len(drawn_records(opened))
    opened.close()
    return found


def drawn_records(source: Source) -> np.ndarray:
    """Numbers of the records that ask for exactly one image from text."""
    index = source.index
    return np.flatnonzero((index["flags"] & FLAG_GENERATED_IMAGE > 0) & (index["num_images"] == 1))


def rollout_retrieval(config: Config, params: Params, tokenizer: Tokenizer) -> dict[str, Any]:
    """Rolls images out from unseen captions and looks each up among the true ones.

    Distance: cosine of the whole image's embeddings after removing each position's mean over the candidates, so that
    what all images share cannot help.

    Args:
        config: the run's; `eval.rollout_source` and `eval.rollout_candidates` say from which captions.
        params: parameters.
        tokenizer: the run's.

    Returns:
        `source` and `data_hash` of the captions, `retrieval` (share found), `chance`, `standard_error`,
        `num_candidates`, and mean cosine distances of the free rollout, of the mean embedding and of copying the
        previous one: `free_running`, `mean_embedding`, `copy_previous`; `within_spread` of the true embeddings;
        `free_running_by_position`.

    Raises:
        ValueError: too few usable records, or images of different grids.
    """
    check_candidates(config, tokenizer)
    source = config.eval.rollout_source
    stored = stored_drawn_records(config, tokenizer, config.eval.rollout_candidates)
    samples = samples_of(config, tokenizer, stored)
    true = see_images(config, params, tokenizer, samples).visual_embeddings
    prompts = drawing_prompts(config, tokenizer, samples)
    drawn = fetch(rollout(config, params, prompts, true.shape[1], jax.random.key(0)).embeddings)
    data_hash = hash_of(stored)
    compared = _compare(drawn.astype(np.float64), np.asarray(true, np.float64))
    return {"source": source, "data_hash": data_hash, **compared}


def held_out_samples(config: Config, tokenizer: Tokenizer) -> tuple[list[PackedSample], list[PackedSample], str]:
    """Images to measure and images to fit a map on, of the validation split of `eval.rollout_source`, and the hash of
    the former.

    Raises:
        ValueError: fewer than twice `eval.rollout_candidates` records ask for one image.
    """
    check_judged(config, tokenizer)
    needed = config.eval.rollout_candidates
    stored = stored_drawn_records(config, tokenizer, needed + MAX_FIT_IMAGES)
    samples = samples_of(config, tokenizer, stored)
    return samples[:needed], samples[needed:], hash_of(stored[:needed])


def stored_drawn_records(config: Config, tokenizer: Tokenizer, most: int) -> list[bytes]:
    """The first so many validation records of `eval.rollout_source` that ask for one image, or all that there are."""
    opened = open_split(config, tokenizer, config.eval.rollout_source, "val")
    stored = [opened.read(int(record)) for record in drawn_records(opened)[:most]]
    opened.close()
    return stored


def samples_of(config: Config, tokenizer: Tokenizer, stored: Sequence[bytes]) -> list[PackedSample]:
    """Stored records as the run packs them."""
    return [sample_from_record(deserialize(data), tokenizer, image_spec(config)) for data in stored]


def hash_of(stored: Sequence[bytes]) -> str:
    """16 hex digits by which results name the records that they were made of."""
    return hashlib.blake2b(b"".join(stored), digest_size=8).hexdigest()


def drawing_prompts(config: Config, tokenizer: Tokenizer, samples: list[PackedSample]) -> Batch:
    """The samples' texts up to `<boi>`, which carries the grid of their images."""
    grid = common_grid(config, samples)
    prompts = []
    for sample in samples:
        before = list(itertools.takewhile(lambda piece: not isinstance(piece, ImagePiece), sample.pieces))
        prompts.append(PackedSample(before))
    return with_grid(prompt_batch(config, tokenizer, prompts), grid)


def with_grid(batch: Batch, grid: tuple[int, int]) -> Batch:
    """Prompts whose last position is a `<boi>` that asks for an image of this grid."""
    last = np.sum(np.asarray(batch.segment_ids) > 0, axis=1) - 1
    boi_grid: Any = np.array(batch.boi_grid)
    boi_grid[np.arange(len(last)), last] = grid
    return dataclasses.replace(batch, boi_grid=boi_grid)


def common_grid(config: Config, samples: Sequence[PackedSample]) -> tuple[int, int]:
    """(height, width) of the samples' images in visual tokens. Raises ValueError if they differ."""
    side = MERGE_SIZE * config.model.encoder.patch_size
    shapes = {_image(sample).pixels.shape[:2] for sample in samples}
    if len(shapes) > 1:
        raise ValueError(
            f"data.sources.{config.eval.rollout_source}: images of different grids "
            f"{sorted((height // side, width // side) for height, width in shapes)}; only equal ones can be compared"
        )
    height, width = shapes.pop()
    return height // side, width // side


def _image(sample: PackedSample) -> ImagePiece:
    return next(piece for piece in sample.pieces if isinstance(piece, ImagePiece))


def image_of(sample: PackedSample) -> np.ndarray:
    """The pixels of a sample's first image, `uint8[h, w, 3]`."""
    return _image(sample).pixels


def see_images(config: Config, params: Params, tokenizer: Tokenizer, samples: Sequence[PackedSample]) -> VisionOutput:
    """What the vision path makes of the samples' images, of one grid of N tokens: numpy arrays [images, N, width]."""
    return jax.tree.map(fetch, _see(config, params, boi_rows(config, tokenizer, samples)))


def boi_rows(config: Config, tokenizer: Tokenizer, samples: Sequence[PackedSample]) -> Batch:
    """A row for each sample's image, of one grid: `<boi>` and the image, N + 1 positions."""
    height, width = common_grid(config, samples)
    patch_size, num_tokens = config.model.encoder.patch_size, height * width
    rows = []
    for sample in samples:
        alone = PackedSample([TokenPiece([tokenizer.boi_id]), _image(sample)])
        rows.append(assemble_row([alone], num_tokens + 1, num_tokens * MERGED_PATCHES, patch_size, tokenizer.pad_id))
    whole: dict[str, Any] = stack_rows(rows)
    return Batch(**whole)


@functools.partial(jax.jit, static_argnames="config")
def _see(config: Config, params: Params, batch: Batch) -> VisionOutput:
    return build(config.model, config.objective, params).see(batch)


def _compare(drawn: np.ndarray, true: np.ndarray) -> dict[str, Any]:
    num_candidates = len(true)
    position_mean = true.mean(axis=0)
    similarity = _unit_rows(drawn - position_mean) @ _unit_rows(true - position_mean).T
    found = similarity.argmax(axis=1) == np.arange(num_candidates)
    share = float(found.mean())
    free_running = 1 - _cosine(drawn, true)
    units = true / np.linalg.norm(true, axis=-1, keepdims=True)
    num_tokens = true.shape[1]
    pair_cosine = (np.sum(units.sum(axis=1) ** 2, axis=-1) - num_tokens) / max(num_tokens * (num_tokens - 1), 1)
    return {
        "retrieval": share,
        "chance": 1 / num_candidates,
        "standard_error": float(np.sqrt(share * (1 - share) / num_candidates)),
        "num_candidates": num_candidates,
        "free_running": float(free_running.mean()),
        "free_running_by_position": free_running.mean(axis=0).tolist(),
        "mean_embedding": float((1 - _cosine(np.broadcast_to(position_mean.mean(axis=0), true.shape), true)).mean()),
        "copy_previous": float((1 - _cosine(true[:, :-1], true[:, 1:])).mean()) if num_tokens > 1 else 0.0,
        "within_spread": float((1 - pair_cosine).mean()),
    }


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1) / np.maximum(np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1), 1e-12)


def _unit_rows(x: np.ndarray) -> np.ndarray:
    flat = x.reshape(len(x), -1)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-12)
