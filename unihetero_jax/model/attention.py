"""Attention: who may see whom in packed rows, rotary positions, and the product itself, by one of three back ends."""

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from unihetero_jax.arrays import typechecked
from unihetero_jax.config import AttentionBackend, RopeScalingConfig, Turns
from unihetero_jax.model.splash import Order, splash_attend
from unihetero_jax.sharding import by_device, current_platform

RowAttention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""Of whole rows: query [B, T, H, d], key and value [B, T, G, d] to [B, T, H * d]; knows who may see whom."""


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
def token_mask(patch_segment_ids: Int[Array, "B P"]) -> Bool[Array, "B P U"]:
    """From patches to the visual tokens of their own segment; four adjacent patches are a token.

    An image of two tokens, one of one, and padding of one:

        tokens           1 1 2 0
        patches 0 to 7   x x . .
               8 to 11   . . x .
              12 to 15   . . . .
    """
    token_ids = patch_segment_ids[:, ::4]
    return (patch_segment_ids[:, :, None] == token_ids[:, None, :]) & (patch_segment_ids[:, :, None] > 0)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScalingConfig) -> np.ndarray:
    """Rotary frequencies, float32[head_dim / 2], in radians per position.

    Frequency i is theta^(-2i / head_dim) (arXiv 2104.09864). `linear` divides all by `factor`; `llama3` those of long
    wavelengths, with a ramp between two bounds (Llama 3.1's code); `yarn` those that turn less than `low` times within
    the original length, with a ramp over dimensions up to `high` turns (arXiv 2309.00071, equations 17 to 23).
    """
    half = head_dim // 2
    plain = theta ** (-np.arange(half, dtype=np.float64) / half)
    match scaling.kind:
        case "none":
            kept = np.ones(half)
        case "linear":
            kept = np.zeros(half)
        case "llama3":
            turns = scaling.original_positions * plain / (2 * math.pi)
            kept = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)
        case "yarn":
            first, last = (_dim_of_turns(turns, head_dim, theta, scaling) for turns in (scaling.high, scaling.low))
            if scaling.truncate:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, head_dim - 1)
            kept = 1.0 - np.clip((np.arange(half) - first) / max(last - first, 0.001), 0.0, 1.0)
    return (plain * kept + plain / scaling.factor * (1.0 - kept)).astype(np.float32)


def _dim_of_turns(turns: float, head_dim: int, theta: float, scaling: RopeScalingConfig) -> float:
    """The pair of dimensions, as a real number, that turns so often within the original length."""
    return head_dim * math.log(scaling.original_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))


@typechecked
def rotate(
    x: Float[Array, "B T H d"], positions: Int[Array, "B T"], frequencies: np.ndarray, amplitude: float = 1.0
) -> Float[Array, "B T H d"]:
    """Rotary position embedding (RoFormer, arXiv 2104.09864), first half against second half as in Llama and Qwen.

    `frequencies` from `rope_frequencies`; `amplitude` multiplies cosine and sine (yarn's attention factor).
    """
    half = x.shape[-1] // 2
    angle = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angle) * amplitude, jnp.sin(angle) * amplitude
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


def choose_backend(choice: AttentionBackend, platform: str | None) -> Literal["dense", "jax_nn", "splash"]:
    """What `auto` stands for on the devices of a mesh: splash on TPU, jax.nn on GPU, dense elsewhere.

    Without a mesh (generation, replicates) it is dense everywhere: a kernel cannot be partitioned by the compiler.
    """
    if choice != "auto":
        return choice
    match platform:
        case "tpu":
            return "splash"
        case "gpu":
            return "jax_nn"
        case _:
            return "dense"


def decoder_attention(
    choice: AttentionBackend, segment_ids: Int[Array, "B T"], branch_ids: Int[Array, "B T"]
) -> RowAttention:
    """Attention of the language model over whole rows, ready to be used by every layer.

    What can be computed once is computed here. The splash kernel compares segment ids alone: samples with several turns
    have to come with their prefix repeated (`data.turns`), which `require_segments_alone` sees to.
    """
    backend = choose_backend(choice, current_platform())
    if backend == "splash":
        return _splash(segment_ids, "causal", None, "sequence")
    return _masked(backend, decoder_mask(segment_ids, branch_ids))


def encoder_attention(
    choice: AttentionBackend, patch_segment_ids: Int[Array, "B P"], causal: bool, max_patches: int | None
) -> RowAttention:
    """Attention of the vision encoder over whole rows of patches; no image spreads over more than `max_patches`."""
    backend = choose_backend(choice, current_platform())
    if backend == "splash":
        return _splash(patch_segment_ids, "block_causal" if causal else "full", max_patches, "replicated")
    return _masked(backend, encoder_mask(patch_segment_ids, causal))


def require_segments_alone(choice: AttentionBackend, turns: Turns) -> None:
    """Raises ValueError if turns are laid out as branches for a back end that knows segments alone."""
    if choose_backend(choice, current_platform()) == "splash" and turns == "branches":
        raise ValueError(
            f"model.attention_backend {choice} is splash on these devices, which cannot mask independent turns of a "
            "sample; set data.turns=repeated_prefix, or model.attention_backend=dense or jax_nn"
        )


def _masked(backend: Literal["dense", "jax_nn"], mask: jax.Array) -> RowAttention:
    function = attend if backend == "dense" else attend_by_library
    return lambda query, key, value: function(query, key, value, mask)


def _splash(ids: jax.Array, order: Order, max_segment: int | None, query_axis: str) -> RowAttention:
    """Rows and heads are split over devices, the queries along `query_axis`; every device sees all keys of its rows."""
    platform = current_platform() or jax.default_backend()
    if platform == "gpu":
        raise ValueError("model.attention_backend=splash is a kernel for TPUs; on GPUs set auto, jax_nn or dense")
    interpret = platform != "tpu"

    def on_device(query, key, value, query_ids, key_ids, query_index):
        return (splash_attend(query, key, value, query_ids, key_ids, query_index, order, max_segment, interpret),)

    queries, keys = ("batch", query_axis, "heads", "replicated"), ("batch", "replicated", "heads", "replicated")
    in_axes = (queries, keys, keys, ("batch", query_axis), ("batch", "replicated"), (query_axis,))
    mapped = by_device(on_device, in_axes, [("batch", query_axis, "heads")])
    index = jnp.arange(ids.shape[1], dtype=jnp.int32)
    return lambda query, key, value: mapped(query, key, value, ids, ids, index)[0]


@typechecked
def attend_by_library(
    query: Float[Array, "B T H d"],
    key: Float[Array, "B K G d"],
    value: Float[Array, "B K G d"],
    mask: Bool[Array, "B T K"],
) -> Float[Array, "B T H*d"]:
    """The same function by `jax.nn.dot_product_attention`, which chooses an implementation for the device.

    The back end for GPUs. Tested on a CPU with its XLA implementation; no GPU was at hand to measure it on.
    """
    out = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None])
    return out.reshape(*query.shape[:2], -1)
