"""Pictures that a run draws: from text by a rollout, and of given images from their own embeddings.

By its pixel decoder, or, for any run that can be rolled out, from blocks of true images (`BlockBank`): that needs no
training, and shows what the embeddings say without what a decoder adds or loses.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from unihetero_jax.config import MERGED_PATCHES, Config
from unihetero_jax.data.mixture import image_spec
from unihetero_jax.data.packing import ImagePiece, PackedSample, TokenPiece
from unihetero_jax.data.records import decode_image
from unihetero_jax.data.tokenizer import Tokenizer
from unihetero_jax.data.transforms import resize_to_grid
from unihetero_jax.evaluation.diagnostics import common_grid, see_images, with_grid
from unihetero_jax.inference.draw import draw_images, images_of
from unihetero_jax.inference.generate import prompt_batch
from unihetero_jax.inference.rollout import Rollout, rollout
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
    key = jax.random.key(seed)
    rolled = roll_out_texts(config, params, tokenizer, texts, grid, jax.random.fold_in(key, 0))
    return pictures_of(config, params, rolled, grid, jax.random.fold_in(key, 1))


def pictures_of(
    config: Config, params: Params, rolled: Rollout, grid: tuple[int, int], key: PRNGKeyArray
) -> list[np.ndarray]:
    """The images of a rollout: as a pixel objective drew them block by block, or by the renderer.

    Raises:
        ValueError: the run has neither.
    """
    if rolled.patches is None:
        return draw_images(config, params, np.asarray(rolled.embeddings), grid, key)
    return images_of(config, np.asarray(rolled.patches), grid)


def roll_out_texts(
    config: Config,
    params: Params,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    grid: tuple[int, int],
    key: PRNGKeyArray,
) -> Rollout:
    """What is predicted after each text, in numpy arrays.

    Raises:
        ValueError: a text is empty, or the grid has more tokens than the run's images.
    """
    num_tokens, most = grid[0] * grid[1], config.data.image_max_patches // MERGED_PATCHES
    if not all(texts) or not 1 <= num_tokens <= most:
        raise ValueError(
            f"--prompt {list(texts)[:1]} with --grid {grid[0]}x{grid[1]}: give words, and at most {most} visual tokens "
            "(data.image_max_patches / 4)"
        )
    prompts = [PackedSample([TokenPiece(tokenizer.encode(text)), TokenPiece([tokenizer.boi_id])]) for text in texts]
    batch = with_grid(prompt_batch(config, tokenizer, prompts), grid)
    return jax.tree.map(fetch, rollout(config, params, batch, num_tokens, key))


def reconstruct(
    config: Config, params: Params, tokenizer: Tokenizer, files: Sequence[bytes], seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(the image as the model sees it, the one drawn from its true embeddings) for each image file's bytes.

    Raises:
        ValueError: the images have different grids, or the run has no renderer.
        RecordError: a file is no readable image.
    """
    seen, embeddings, grid = seen_images(config, params, tokenizer, files)
    return list(zip(seen, draw_images(config, params, embeddings, grid, jax.random.key(seed)), strict=True))


def seen_images(
    config: Config, params: Params, tokenizer: Tokenizer, files: Sequence[bytes]
) -> tuple[list[np.ndarray], np.ndarray, tuple[int, int]]:
    """Image files as the model sees them, their embeddings float[images, N, D], and their grid in visual tokens.

    Raises:
        ValueError: the images have different grids.
        RecordError: a file is no readable image.
    """
    seen = [resize_to_grid(decode_image(data), image_spec(config)) for data in files]
    samples = [PackedSample([TokenPiece([tokenizer.boi_id]), ImagePiece(pixels)]) for pixels in seen]
    embeddings = np.asarray(see_images(config, params, tokenizer, samples).visual_embeddings)
    return seen, embeddings, common_grid(config, samples)


@dataclasses.dataclass(frozen=True)
class BlockBank:
    """True images cut into visual tokens: an embedding is drawn as the block whose own embedding is nearest to it.

    Attributes:
        embeddings: unit vectors, float32[images, N, D].
        blocks: their pixels, uint8[images, N, side, side, 3].
        grid: (height, width) in visual tokens.
    """

    embeddings: np.ndarray
    blocks: np.ndarray
    grid: tuple[int, int]

    @classmethod
    def of(cls, pictures: Sequence[np.ndarray], embeddings: np.ndarray, grid: tuple[int, int]) -> "BlockBank":
        """From images of one grid, `uint8[h, w, 3]`, and their embeddings, `float[images, N, D]`."""
        pixels, (height, width) = np.stack(pictures), grid
        side = pixels.shape[1] // height
        blocks = pixels.reshape(len(pixels), height, side, width, side, 3).swapaxes(2, 3)
        return cls(_unit(embeddings), blocks.reshape(len(pixels), height * width, side, side, 3), grid)

    def draw(self, embeddings: np.ndarray) -> list[np.ndarray]:
        """An image for each row of embeddings [rows, N, D]; blocks come from the same place of some image."""
        nearest = np.einsum("rnd,ind->rni", _unit(embeddings), self.embeddings).argmax(axis=-1)
        chosen = self.blocks[nearest, np.arange(nearest.shape[1])]
        return [self._joined(one) for one in chosen]

    def _joined(self, blocks: np.ndarray) -> np.ndarray:
        height, width, side = *self.grid, blocks.shape[1]
        return blocks.reshape(height, width, side, side, 3).swapaxes(1, 2).reshape(height * side, width * side, 3)


def block_bank(config: Config, params: Params, tokenizer: Tokenizer, files: Sequence[bytes]) -> BlockBank:
    """The blocks of image files of one grid, with the run's embeddings of them.

    Raises:
        ValueError: the images have different grids.
        RecordError: a file is no readable image.
    """
    return BlockBank.of(*seen_images(config, params, tokenizer, files))


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def default_grid(config: Config) -> tuple[int, int]:
    """The largest square that the run's images may have, in visual tokens."""
    side = math.isqrt(config.data.image_max_patches // MERGED_PATCHES)
    return side, side
