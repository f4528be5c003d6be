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
    """Grouped-query attention (arXiv 2305.13245): H query heads share G key/value heads. Softmax in float32.

    The softmax is normalised after the product with the values (as in FlashAttention, arXiv 2205.14135): its sum
    divides [T, d] values instead of [T, K] weights, and its backward pass reduces over no weights. The heads of a group
    are folded into the rows of one matrix product. `benchmarks/attention.py` measures it against
    `jax.nn.dot_product_attention`.

    A position that may see nothing (padding) gets finite values, so no NaN can spread from it.
    """
    num_rows, length, num_heads, head_dim = query.shape
    num_keys, num_groups = key.shape[1:3]
    folded = (num_rows, num_groups, num_heads // num_groups * length, head_dim)
    query = query.reshape(num_rows, length, num_groups, -1, head_dim).transpose(0, 2, 3, 1, 4).reshape(folded)
    logits = jnp.matmul(query * head_dim**-0.5, key.transpose(0, 2, 3, 1), preferred_element_type=jnp.float32)
    by_head = logits.reshape(num_rows, num_groups, -1, length, num_keys)
    masked = jnp.where(mask[:, None, None], by_head, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(masked - jax.lax.stop_gradient(jnp.max(masked, axis=-1, keepdims=True)))
    folded_weights = weights.astype(value.dtype).reshape(num_rows, num_groups, -1, num_keys)
    summed = jnp.matmul(folded_weights, value.transpose(0, 2, 1, 3), preferred_element_type=jnp.float32)
    out = summed.reshape(num_rows, num_groups, -1, length, head_dim) / jnp.sum(weights, axis=-1)[..., None]
    return out.astype(value.dtype).transpose(0, 3, 1, 2, 4).reshape(num_rows, length, -1)
