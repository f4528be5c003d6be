"""Attention of packed rows on a TPU: jax's splash kernel, which skips what a row's segments leave empty.

The kernel walks over blocks of keys and is told by small arrays which of them to visit. jax fills those from a static
mask; here they come from the segment ids of the very rows (our choice: a static mask knows nothing of where samples
end, and rows are mostly off-diagonal zeros). A block of queries visits a block of keys only if their ranges of segment
ids overlap and, in causal attention, the keys do not all come later. What is not visited is neither computed nor copied
from memory. The arrays of shape [T, T] that a dense mask needs exist nowhere; within a block, ids and positions are
compared in registers.

The rows of a device lie one after another in one long row, so one call of the kernel does them all and a batch needs no
loop. Keys of a group are not repeated for its queries.

Verified in interpret mode on a CPU against the dense function, forward and gradient, and compiled ahead of time for TPU
v5e, v5p and v6e; never executed on a TPU.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jaxtyping import Array, Bool, Float, Int

from unihetero_jax.arrays import typechecked
from unihetero_jax.config import MERGED_PATCHES

Order = Literal["causal", "block_causal", "full"]
"""Of positions within a segment: none later, no later block of merged patches, or all see all."""

LANES = 128
BLOCKS = (512, 256, LANES)
"""Sides of a kernel block."""
MIN_BLOCKS = 8
"""Of a row, where its length allows (our choice, unmeasured: larger blocks keep the matrix unit busier but skip less).
"""


def _not_later(query_index, key_index):
    return query_index >= key_index


def _block_not_later(query_index, key_index):
    return query_index // MERGED_PATCHES >= key_index // MERGED_PATCHES


RULES: dict[Order, Callable | None] = {"causal": _not_later, "block_causal": _block_not_later, "full": None}
"""Evaluated inside the kernel on positions of the long row; rows start at multiples of 128, so blocks keep together."""


@typechecked
def active_blocks(
    query_ids: Int[Array, "B T"], key_ids: Int[Array, "B K"], query_index: Int[Array, " T"], order: Order, block: int
) -> Bool[Array, "B q k"]:
    """Which blocks of keys a block of queries has to visit; all lengths are multiples of `block`.

    By the lowest and highest segment id of each block: exact for ids that ascend along a row, as they do, and never too
    few for any others. Padding is id 0 and calls for nothing; but every block of queries visits the keys at its own
    positions, so that no query is left without any key and no softmax without a sum.

        segment  1 1 1 1 | 1 2 2 2 | 2 2 3 3 | 0 0 0 0        block 4, causal

        queries 0-3    x . . .
                4-7    x x . .
                8-11   . x x .
                12-15  . . . x
    """
    starts = jnp.arange(0, key_ids.shape[1], block)
    first, last = query_index[::block], query_index[block - 1 :: block]
    (query_low, query_high), (key_low, key_high) = _id_range(query_ids, block), _id_range(key_ids, block)
    overlap = (query_low[:, :, None] <= key_high[:, None]) & (key_low[:, None] <= query_high[:, :, None])
    if order != "full":
        overlap &= starts <= last[:, None]
    return overlap | ((starts <= last[:, None]) & (first[:, None] < starts + block))


def _id_range(ids: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    by_block = ids.reshape(ids.shape[0], -1, block)
    lowest = jnp.min(jnp.where(by_block > 0, by_block, jnp.iinfo(ids.dtype).max), axis=-1)
    return lowest, jnp.max(by_block, axis=-1)


@typechecked
def visiting_order(active: Bool[Array, "B n m"], width: int) -> tuple[Int[Array, "1 B*n w"], Int[Array, "1 B*n w"]]:
    """The active blocks of each line first, in order, as numbers in the long row; and which of `width` steps are real.

    The steps after the last real one name its block again: the kernel copies a block only when its number changes.
    """
    num_blocks, steps = active.shape[2], jnp.arange(width)
    so_far = jnp.cumsum(active, axis=-1, dtype=jnp.int32)
    count = so_far[..., -1:]
    # The place of the k-th active block (from 0) is the number of places up to which k or fewer have been seen.
    wanted = jnp.minimum(steps, jnp.maximum(count - 1, 0))
    chosen = jnp.sum(so_far[:, :, None] <= wanted[..., None], axis=-1, dtype=jnp.int32)
    chosen = jnp.minimum(chosen, num_blocks - 1)  # only where none is active
    offset = jnp.arange(active.shape[0], dtype=jnp.int32)[:, None, None] * num_blocks
    is_active = (steps < count).astype(jnp.int32)
    return (chosen + offset).reshape(1, -1, width), is_active.reshape(1, -1, width)


def block_side(num_queries: int, num_keys: int, max_segment: int | None) -> int:
    """The largest side that divides both lengths, padded to 128, and is small enough for blocks to be skipped."""
    limit = max(min(num_keys // MIN_BLOCKS, max_segment or num_keys), LANES)
    padded = [-(-length // LANES) * LANES for length in (num_queries, num_keys)]
    return next(block for block in BLOCKS if block <= limit and all(length % block == 0 for length in padded))


def num_steps(num_blocks: int, block: int, order: Order, max_segment: int | None) -> int:
    """Blocks that a block may have to visit at most, when no segment is longer than `max_segment` positions."""
    if max_segment is None:
        return num_blocks
    reach = -(-(max_segment - 1) // block)
    return min(num_blocks, 1 + reach * (2 if order == "full" else 1))


@typechecked
def splash_attend(
    query: Float[Array, "B T H d"],
    key: Float[Array, "B K G d"],
    value: Float[Array, "B K G d"],
    query_ids: Int[Array, "B T"],
    key_ids: Int[Array, "B K"],
    query_index: Int[Array, " T"],
    order: Order,
    max_segment: int | None,
    interpret: bool,
) -> Float[Array, "B T H*d"]:
    """Grouped-query attention within segments; a position of padding gets finite values, and no position sees it.

    Lengths are padded to the kernel's blocks here. Any head width compiles: the kernel pads narrow ones in registers.

    Args:
        query: all positions of the rows, or a device's share of them.
        key, value: all positions of the rows.
        query_ids, key_ids: segment of each position; 0 is padding.
        query_index: place of each query among the keys of its row, consecutive.
        order: of positions within a segment.
        max_segment: no segment is longer; bounds the kernel's steps, which cost time even where they are skipped. Only
            where the queries are all positions. None: no bound.
        interpret: run the kernel step by step in plain jax, for tests on other platforms.
    """
    num_rows, length, num_heads, head_dim = query.shape
    block = block_side(length, key.shape[1], max_segment)
    assert max_segment is None or length == key.shape[1], "a bound on segments needs whole rows of queries"
    query_ids, key_ids = _pad(query_ids, block), _pad(key_ids, block)
    query_index = query_index[0] + jnp.arange(query_ids.shape[1], dtype=query_index.dtype)
    active = active_blocks(query_ids, key_ids, query_index, order, block)
    key_steps = num_steps(active.shape[2], block, order, max_segment)
    query_steps = num_steps(active.shape[1], block, order, max_segment)
    key_blocks = visiting_order(active, key_steps)
    query_blocks = (x.swapaxes(1, 2) for x in visiting_order(active.swapaxes(1, 2), query_steps))
    in_long_row = None
    if RULES[order] is not None:
        row_starts = jnp.arange(num_rows, dtype=query_index.dtype)[:, None] * key_ids.shape[1]
        in_long_row = (row_starts + query_index).reshape(-1)
    by_query, by_key = (
        MaskInfo(visited, None, is_active, None, in_long_row)  # pyright: ignore[reportArgumentType] - it takes tracers
        for visited, is_active in (key_blocks, query_blocks)
    )
    # Segments of different rows get different ids, and padding that of its row.
    stride = jnp.arange(num_rows, dtype=key_ids.dtype)[:, None] * (key_ids.shape[1] + 1)
    segment_ids = kernel.SegmentIds((query_ids + stride).reshape(-1), (key_ids + stride).reshape(-1))
    attention = kernel.SplashAttentionKernel(
        by_query, by_query, by_key,
        block_sizes=kernel.BlockSizes(
            block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
        ),
        is_mqa=False, save_residuals=False, mask_value=kernel.DEFAULT_MASK_VALUE, attn_logits_soft_cap=None,
        residual_checkpoint_name=None, mask_function=RULES[order], interpret=interpret,
    )  # fmt: skip
    out = attention(*(_long_row(x, block) for x in (query * head_dim**-0.5, key, value)), segment_ids)
    assert isinstance(out, jax.Array)
    out = out.reshape(num_heads, num_rows, -1, head_dim)[:, :, :length]
    return out.transpose(1, 2, 0, 3).reshape(num_rows, length, -1)


def _pad(x: jax.Array, block: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)) + ((0, 0),) * (x.ndim - 2))


def _long_row(x: jax.Array, block: int) -> jax.Array:
    """[B, T, H, d] to [H, B * T padded, d]."""
    return _pad(x, block).transpose(2, 0, 1, 3).reshape(x.shape[2], -1, x.shape[3])
