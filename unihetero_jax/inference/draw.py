"""Pixels from visual embeddings: the renderer's flow, followed from noise to an image."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from unihetero_jax.arrays import Flow, typechecked
from unihetero_jax.config import MERGED_PATCHES, Config, patch_values, pixel_role
from unihetero_jax.data.records import MERGE_SIZE
from unihetero_jax.data.transforms import patchify, unpatchify
from unihetero_jax.model.unihetero import Params, build


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
    return [unpatchify(one, grid[0] * side, grid[1] * side, patch_size) for one in np.asarray(patches)]


@functools.partial(jax.jit, static_argnames="config")
@typechecked
def draw_patches(
    config: Config, params: Params, embeddings: Float[Array, "B U D"], coords: jax.Array, key: PRNGKeyArray
) -> UInt8[Array, "B P F"]:
    """The patches of one image per row, block-major; `coords` int32[P, 2] are their places.

    Guidance (arXiv 2207.12598): velocity = without + scale (with - without); a scale of 1 costs one evaluation.
    """
    drawing = config.drawing
    model = build(config.model, config.objective, params)
    num_rows, num_visual = embeddings.shape[:2]
    shape = (num_rows, num_visual * MERGED_PATCHES, patch_values(config.model.encoder))
    places = jnp.broadcast_to(coords, (num_rows, *coords.shape))
    one_image = jnp.ones(shape[:2], jnp.int32)
    given = jnp.ones((num_rows, num_visual), bool)

    def velocity(y: jax.Array, tau: jax.Array) -> jax.Array:
        flow = Flow(y, jnp.broadcast_to(tau, shape[:2]), y, given)

        def under(is_conditioned: jax.Array) -> jax.Array:
            return model.pixel_velocity(one_image, places, flow, embeddings.astype(model.dtype), is_conditioned)

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
    return jnp.round(jnp.clip((drawn + 1.0) * 127.5, 0, 255)).astype(jnp.uint8)
