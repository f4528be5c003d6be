"""Pixels from a flow, followed from noise: an image from visual embeddings, or one block from a hidden state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from unihetero_jax.arrays import Flow, typechecked
from unihetero_jax.config import Config, pixel_role
from unihetero_jax.data.records import MERGE_SIZE
from unihetero_jax.data.transforms import patchify, unpatchify
from unihetero_jax.model.unihetero import Params, UniHetero, build
from unihetero_jax.patch_codec import patch_codec


def draw_images(
    config: Config, params: Params, embeddings: np.ndarray, grid: tuple[int, int], key: PRNGKeyArray
) -> list[np.ndarray]:
    """An image, `uint8[h, w, 3]`, for each row of embeddings; the same key draws the same images.

    Args:
        config: the run's; its objective has a renderer. `drawing` says how the flow is followed.
        params: parameters.
        embeddings: true or rolled out, `float[B, N, D]`, in raster order.
        grid: (height, width) in visual tokens, whose product is N.
        key: of the noise.

    Raises:
        ValueError: the objective has no renderer.
    """
    if pixel_role(config.objective) != "renderer":
        raise ValueError(f"objective={config.objective} draws no pixels from visual embeddings; unihetero does")
    patch_size = config.model.encoder.patch_size
    side = MERGE_SIZE * patch_size
    empty = np.zeros((grid[0] * side, grid[1] * side, 3), np.uint8)
    _, coords = patchify(empty, patch_size)
    patches = draw_patches(config, params, jnp.asarray(embeddings, jnp.float32), jnp.asarray(coords, jnp.int32), key)
    return images_of(config, np.asarray(patches), grid)


def images_of(config: Config, patches: np.ndarray, grid: tuple[int, int]) -> list[np.ndarray]:
    """`uint8[h, w, 3]` of each row of block-major patches; the grid is in visual tokens."""
    patch_size = config.model.encoder.patch_size
    height, width = (MERGE_SIZE * patch_size * side for side in grid)
    return [unpatchify(one, height, width, patch_size) for one in patches]


@functools.partial(jax.jit, static_argnames="config")
@typechecked
def draw_patches(
    config: Config, params: Params, embeddings: Float[Array, "B U D"], coords: jax.Array, key: PRNGKeyArray
) -> UInt8[Array, "B P F"]:
    """The patches of one image per row, block-major; `coords` int32[P, 2] are their places."""
    model = build(config.model, config.objective, params)
    return follow_flow(config, model, embeddings, jnp.broadcast_to(coords, (embeddings.shape[0], *coords.shape)), key)


def follow_flow(
    config: Config,
    model: UniHetero,
    conditions: Float[Array, "B U D"],
    places: Int[Array, "B P 2"],
    key: PRNGKeyArray,
) -> UInt8[Array, "B P F"]:
    """Patches from noise, under one condition for each four of them: of one image per row, or of one block.

    Guidance (arXiv 2207.12598): velocity = without + scale (with - without); a scale of 1 costs one evaluation.
    """
    drawing = config.drawing
    codec = patch_codec(config.model)
    shape = (*places.shape[:2], codec.num_values)
    one_image, given = jnp.ones(shape[:2], jnp.int32), jnp.ones(conditions.shape[:2], bool)

    def velocity(y: jax.Array, tau: jax.Array) -> jax.Array:
        flow = Flow(y, jnp.broadcast_to(tau, shape[:2]), y, given)

        def under(is_conditioned: jax.Array) -> jax.Array:
            return model.pixel_velocity(one_image, places, flow, conditions.astype(model.dtype), is_conditioned)

        if drawing.guidance == 1.0:
            return under(given)
        without = under(~given)
        return without + drawing.guidance * (under(given) - without)

    def step(number: jax.Array, y: jax.Array) -> jax.Array:
        tau, length = 1.0 - number / drawing.steps, 1.0 / drawing.steps
        first = velocity(y, tau)
        if drawing.sampler == "euler":
            return y - length * first
        # Heun: the mean of the slopes at both ends; at tau 0 there is none to take (as in EDM, arXiv 2206.00364).
        second = velocity(y - length * first, tau - length)
        return y - length * jnp.where(number == drawing.steps - 1, first, (first + second) / 2)

    drawn = jax.lax.fori_loop(0, drawing.steps, step, jax.random.normal(key, shape, jnp.float32))
    return codec.decode(drawn)
