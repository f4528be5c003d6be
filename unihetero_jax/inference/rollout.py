"""Free-running rollout: from text and a grid, the visual embeddings of an image, each fed back as the next input.

What the model predicts decides how it is fed back. A prediction in input space is an input; one in encoder space goes
through the Semantic Encoder. A patch embedding, or a block of pixels that a pixel objective drew, is first put on a
canvas with those before it, and the vision path reads what is there: with a bidirectional encoder an earlier block is
then read without the later ones, as it had to be when it was fed (our choice: each is read once, when it is drawn).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from unihetero_jax.arrays import Batch, Cache, Hidden, VisionOutput, pytree_dataclass, typechecked
from unihetero_jax.config import MERGED_PATCHES, Config, pixel_role, visual_target
from unihetero_jax.inference.draw import follow_flow
from unihetero_jax.model.unihetero import Params, UniHetero, build
from unihetero_jax.model.vision_encoder import patch_places


@pytree_dataclass
class Rollout:
    """What was predicted.

    Attributes:
        embeddings: in the language model's input space.
        patches: the pixels that a pixel objective drew, block-major; None of the others.
    """

    embeddings: Float[Array, "B N D"]
    patches: UInt8[Array, "B P F"] | None


@functools.partial(jax.jit, static_argnames=("config", "num_tokens"))
@typechecked
def rollout(
    config: Config,
    params: Params,
    batch: Batch,
    num_tokens: int,
    key: PRNGKeyArray,
    true: VisionOutput | None = None,
    num_given: Int[Array, ""] | int = 0,
) -> Rollout:
    """Predicts `num_tokens` visual embeddings after prompts that end in `<boi>` with its grid.

    Args:
        config: the run's; its objective must predict something that can be fed back (`config.rolls_out`).
        params: parameters.
        batch: one prompt per row, padded at its end; the last real position is `<boi>`, and `boi_grid` there holds the
            (height, width) asked for, whose product is `num_tokens`.
        num_tokens: N.
        key: of the noise that a flow draws from; a regression head has no use for it.
        true: what the vision path makes of the true images, [B, N, ...], of which the first `num_given` are fed instead
            of the predictions: with all of them this is teacher forcing.
        num_given: how many; one program serves all numbers.
    """
    model = build(config.model, config.objective, params)
    last, cache = model.prefill(batch, batch.tokens.shape[1] + num_tokens)
    return roll_on(config, model, last, cache, asked_grid(batch), num_tokens, key, true, num_given)[0]


def asked_grid(batch: Batch) -> Int[Array, "B 2"]:
    """The grid at the `<boi>` that ends each prompt."""
    last = jnp.sum(batch.segment_ids > 0, axis=1, dtype=jnp.int32) - 1
    return jnp.take_along_axis(batch.boi_grid, last[:, None, None], axis=1)[:, 0]


def roll_on(
    config: Config,
    model: UniHetero,
    last: Hidden,
    cache: Cache,
    grid: Int[Array, "B 2"],
    num_tokens: int,
    key: PRNGKeyArray,
    true: VisionOutput | None = None,
    num_given: Int[Array, ""] | int = 0,
) -> tuple[Rollout, Hidden, Cache]:
    """The rollout from a hidden state: predictions, and the hidden state and the cache after them."""
    canvas = _Canvas.empty(config, model, grid, num_tokens) if _is_reread(config) else None

    def step(carry, number):
        last, cache, canvas = carry
        own_key = jax.random.fold_in(key, number)
        if canvas is None:
            predicted = model.predict_embedding(last.visual, own_key)
            pixels = None
        else:
            block, pixels = _predicted_block(config, model, last.visual, canvas, number, own_key)
            canvas = canvas.with_block(number, block)
            predicted = model.read_blocks(canvas.blocks, canvas.grid, number + 1)[:, number]
        fed = predicted
        if true is not None:
            is_given = number < num_given
            fed = jnp.where(is_given, true.visual_embeddings[:, number].astype(fed.dtype), fed)
            if canvas is not None:
                kept = jnp.where(is_given, true.patch_embeddings[:, number], canvas.blocks[:, number])
                canvas = canvas.with_block(number, kept)
        last, cache = model.decode_step(fed, cache, is_visual=True)
        return (last, cache, canvas), (predicted, pixels)

    (last, cache, _), (predicted, pixels) = jax.lax.scan(step, (last, cache, canvas), jnp.arange(num_tokens))
    if pixels is not None:
        pixels = pixels.swapaxes(0, 1).reshape(grid.shape[0], num_tokens * MERGED_PATCHES, -1)
    return Rollout(predicted.swapaxes(0, 1), pixels), last, cache


class _Canvas(NamedTuple):
    """The blocks of an image so far, by their patch embeddings, [B, N, 4 E]."""

    blocks: jax.Array
    grid: jax.Array

    @classmethod
    def empty(cls, config: Config, model: UniHetero, grid: jax.Array, num_tokens: int) -> "_Canvas":
        width = MERGED_PATCHES * config.model.encoder.dim
        return cls(jnp.zeros((grid.shape[0], num_tokens, width), model.dtype), grid)

    def with_block(self, number: jax.Array, block: jax.Array) -> "_Canvas":
        return _Canvas(self.blocks.at[:, number].set(block.astype(self.blocks.dtype)), self.grid)


def _is_reread(config: Config) -> bool:
    return visual_target(config.objective) == "patch" or pixel_role(config.objective) in ("through", "detached")


def _predicted_block(
    config: Config, model: UniHetero, last: jax.Array, canvas: _Canvas, number: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """The next block's patch embeddings, [B, 4 E], and its pixels where it was drawn, uint8[B, 4, F]."""
    if visual_target(config.objective) == "patch":
        return model.semantic_head.draw(last, key), None
    places = patch_places(canvas.grid, canvas.blocks.shape[1]).reshape(*canvas.blocks.shape[:2], MERGED_PATCHES, 2)
    pixels = follow_flow(config, model, last[:, None], places[:, number], key)
    return model.encoder.embed_patches(pixels, model.dtype).reshape(last.shape[0], -1), pixels
