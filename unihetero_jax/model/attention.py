"""Attention: who may see whom in packed rows, rotary positions, and the product itself."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from unihetero_jax.arrays import typechecked


@typechecked
def decoder_mask(segment_ids: Int[Array, "B T"], branch_ids: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Causal attention within a sample; a turn sees the shared prefix and itself, never another turn.

    One sample with a prefix of two positions and two turns, a second sample, one position of padding:

        segment  1 1 1 1 1 2 2 0
        branch   0 0 1 1 2 0 0 0

        query 0  x . . . . . . .
              1  x x . . . . . .
              2  x x x . . . . .
              3  x x x x . . . .
              4  x x . . x . . .
              5  . . . . . x . .
              6  . . . . . x x .
              7  . . . . . . . .
    """
    same_segment = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids[:, :, None] > 0)
    branch_visible = (branch_ids[:, None, :] == 0) | (branch_ids[:, None, :] == branch_ids[:, :, None])
    causal = jnp.tril(jnp.ones((segment_ids.shape[1],) * 2, bool))
    return same_segment & branch_visible & causal


@typechecked
def encoder_mask(patch_segment_ids: Int[Array, "B P"], causal: bool) -> Bool[Array, "B P P"]:
    """Full attention within an image; with `causal`, a 2x2 block sees itself and the blocks before it.

    Two blocks of one image, causal (blocks are four adjacent patches):

        query block 0  x x x x . . . .
        query block 1  x x x x x x x x
    """
    mask = (patch_segment_ids[:, :, None] == patch_segment_ids[:, None, :]) & (patch_segment_ids[:, :, None] > 0)
    if causal:
        block = jnp.arange(patch_segment_ids.shape[1]) // 4
        mask = mask & (block[None, :] <= block[:, None])
    return mask


@typechecked
def rotate(x: Float[Array, "B T H d"], positions: Int[Array, "B T"], theta: float) -> Float[Array, "B T H d"]:
    """Rotary position embedding (RoFormer, arXiv 2104.09864), first half against second half as in Llama and Qwen."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


@typechecked
def attend(
    query: Float[Array, "B T H d"],
    key: Float[Array, "B K G d"],
    value: Float[Array, "B K G d"],
    mask: Bool[Array, "B T K"],
) -> Float[Array, "B T H*d"]:
    """Grouped-query attention (arXiv 2305.13245): H query heads share G key/value heads.

    A position that may see nothing (padding) gets finite values, so no NaN can spread from it.
    """
    out = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None])
    return out.reshape(*out.shape[:2], -1)
