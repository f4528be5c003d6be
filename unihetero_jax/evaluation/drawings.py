"""Pictures that a run draws: from text by a rollout, and of given images from their own embeddings."""

import math
from collections.abc import Sequence

import jax
import numpy as np

from unihetero_jax.config import MERGED_PATCHES, Config
from unihetero_jax.data.mixture import image_spec
from unihetero_jax.data.packing import ImagePiece, PackedSample, TokenPiece
from unihetero_jax.data.records import decode_image
from unihetero_jax.data.tokenizer import Tokenizer
from unihetero_jax.data.transforms import resize_to_grid
from unihetero_jax.evaluation.diagnostics import common_grid, see_images, with_grid
from unihetero_jax.inference.draw import draw_images
from unihetero_jax.inference.generate import prompt_batch
from unihetero_jax.inference.rollout import rollout
from unihetero_jax.model.unihetero import Params
from unihetero_jax.sharding import fetch


def draw_from_texts(
    config: Config, params: Params, tokenizer: Tokenizer, texts: Sequence[str], grid: tuple[int, int], seed: int
) -> list[np.ndarray]:
    """One image, `uint8[h, w, 3]`, for each text, which stands before the image as a caption does in training.

    Equal texts give different images by the noise of the pixels (and of a flow head); a seed gives the same ones again.

    Raises:
        ValueError: a text is empty, the grid has more tokens than the run's images, or the run has no renderer.
    """
    num_tokens, most = grid[0] * grid[1], config.data.image_max_patches // MERGED_PATCHES
    if not all(texts) or not 1 <= num_tokens <= most:
        raise ValueError(
            f"--prompt {list(texts)[:1]} with --grid {grid[0]}x{grid[1]}: give words, and at most {most} visual tokens "
            "(data.image_max_patches / 4)"
        )
    prompts = [PackedSample([TokenPiece(tokenizer.encode(text)), TokenPiece([tokenizer.boi_id])]) for text in texts]
    batch = with_grid(prompt_batch(config, tokenizer, prompts), grid)
    key = jax.random.key(seed)
    embeddings = fetch(rollout(config, params, batch, num_tokens, jax.random.fold_in(key, 0)))
    return draw_images(config, params, embeddings, grid, jax.random.fold_in(key, 1))


def reconstruct(
    config: Config, params: Params, tokenizer: Tokenizer, files: Sequence[bytes], seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(the image as the model sees it, the one drawn from its true embeddings) for each image file's bytes.

    Raises:
        ValueError: the images have different grids, or the run has no renderer.
        RecordError: a file is no readable image.
    """
    seen = [resize_to_grid(decode_image(data), image_spec(config)) for data in files]
    samples = [PackedSample([TokenPiece([tokenizer.boi_id]), ImagePiece(pixels)]) for pixels in seen]
    grid = common_grid(config, samples)
    embeddings = np.asarray(see_images(config, params, tokenizer, samples).visual_embeddings)
    return list(zip(seen, draw_images(config, params, embeddings, grid, jax.random.key(seed)), strict=True))


def default_grid(config: Config) -> tuple[int, int]:
    """The largest square that the run's images may have, in visual tokens."""
    side = math.isqrt(config.data.image_max_patches // MERGED_PATCHES)
    return side, side
