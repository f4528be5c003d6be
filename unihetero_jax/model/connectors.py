"""Connectors: how an image's features come to the language model, as many tokens as the image has 2x2 blocks.

    mlp              each block by itself, through an MLP (LLaVA): `semantic_encoder.Projector`
    resampler        queries that read features and each other in one attention (Flamingo's perceiver, arXiv 2204.14198)
    qformer          queries that read each other, then the features (BLIP-2's query transformer, arXiv 2301.12597)
    cross_attention  the MLP; and before every layer of the language model a gated one that reads the images which are
                     complete (Flamingo). An image that is only read is no input then; one that is drawn is

Queries have a fixed order, which is that of the blocks: a query is the sum of a learned vector for its row and one for
its column, so that images of any grid have them (our choice; both papers know one number of queries). With a causal
encoder they see no later block. The width of queries is the encoder's.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from unihetero_jax.arrays import NOT_VISUAL, VisualCache, typechecked
from unihetero_jax.config import MERGED_PATCHES, DecoderConfig, ModelConfig, Remat
from unihetero_jax.model.attention import attend, decoder_mask
from unihetero_jax.model.layers import (
    MLP,
    GatedMLP,
    LayerNorm,
    Linear,
    ParamKeys,
    RMSNorm,
    parameter,
    scan_layers,
    stack_layers,
)

_QUERY_SCALE = 1.0
"""Standard deviation of fresh queries (our choice: with .02, as both papers' code has it for long pretraining, what all
of them read outweighs what tells them apart, and an image's tokens become one vector; docs/generation.md)."""


class QueryConnector(nnx.Module):
    """`resampler` or `qformer`: one query for each block of an image."""

    def __init__(self, config: ModelConfig, keys: ParamKeys):
        self.is_causal = config.encoder.attention == "causal"
        self.remat: Remat = config.encoder.remat
        width, side = config.encoder.dim, config.decoder.max_grid
        normal, axes = nnx.initializers.normal(_QUERY_SCALE), ("replicated", "vision_embed")
        self.row = parameter(keys, "row", (side, width), normal, axes)
        self.column = parameter(keys, "column", (side, width), normal, axes)
        block = _ResamplerBlock if config.projector.kind == "resampler" else _QueryBlock
        self.blocks = stack_layers(lambda k: block(config, k), config.projector.num_layers, keys.child("blocks"))
        self.out = Linear(width, config.decoder.dim, ("vision_embed", "embed"), keys.child("out"), use_bias=True)

    @typechecked
    def __call__(
        self, merged: Float[Array, "B U M"], patch_segment_ids: Int[Array, "B P"], patch_coords: Int[Array, "B P 2"]
    ) -> Float[Array, "B U D"]:
        """What the queries have read of the merged features, before the norm at the connector's output."""
        num_rows, num_tokens, _ = merged.shape
        features = merged.reshape(num_rows, num_tokens * MERGED_PATCHES, -1)
        place = patch_coords[:, ::MERGED_PATCHES] // 2
        queries = self.row[...][place[..., 0]] + self.column[...][place[..., 1]]
        mask = query_mask(patch_segment_ids, self.is_causal)
        x, _ = scan_layers(
            self.blocks, queries.astype(merged.dtype), lambda block, x, _: (block(x, features, mask), None), self.remat
        )
        return self.out(x)


@typechecked
def query_mask(patch_segment_ids: Int[Array, "B P"], is_causal: bool) -> Bool[Array, "B U P"]:
    """Which patches a query may see: those of its image; if causal, those of its own block and the ones before.

    Two images, of two blocks and of one, causal:

        query 0  x x x x . . . . . . . .
              1  x x x x x x x x . . . .
              2  . . . . . . . . x x x x
    """
    images = patch_segment_ids[:, ::MERGED_PATCHES]
    mask = (images[:, :, None] == patch_segment_ids[:, None, :]) & (images[:, :, None] > 0)
    if is_causal:
        block = jnp.arange(patch_segment_ids.shape[1]) // MERGED_PATCHES
        mask = mask & (block[None, :] <= jnp.arange(images.shape[1])[:, None])
    return mask


class _ResamplerBlock(nnx.Module):
    """`x + attention(x; features and x)`, then `x + mlp(norm(x))`: keys and values of both in one attention."""

    def __init__(self, config: ModelConfig, keys: ParamKeys):
        width, eps = config.encoder.dim, config.encoder.norm_eps
        self.feature_norm = LayerNorm(width, eps, keys.child("feature_norm"))
        self.norm = LayerNorm(width, eps, keys.child("norm"))
        self.attention = _Attention(width, config.projector.num_heads, keys.child("attention"))
        self.mlp_norm = LayerNorm(width, eps, keys.child("mlp_norm"))
        self.mlp = _mlp(config, keys)

    @typechecked
    def __call__(
        self, x: Float[Array, "B U E"], features: Float[Array, "B P E"], mask: Bool[Array, "B U P"]
    ) -> Float[Array, "B U E"]:
        normed = self.norm(x)
        read = jnp.concatenate([self.feature_norm(features), normed], axis=1)
        x = x + self.attention(normed, read, jnp.concatenate([mask, mask[:, :, ::MERGED_PATCHES]], axis=2))
        return x + self.mlp(self.mlp_norm(x))


class _QueryBlock(nnx.Module):
    """Self-attention of the queries, attention to the features, MLP; norms before each (our choice; BERT's come after).

    Every block reads the features (BLIP-2: every other one).
    """

    def __init__(self, config: ModelConfig, keys: ParamKeys):
        width, eps, num_heads = config.encoder.dim, config.encoder.norm_eps, config.projector.num_heads
        self.self_norm = LayerNorm(width, eps, keys.child("self_norm"))
        self.self_attention = _Attention(width, num_heads, keys.child("self_attention"))
        self.norm = LayerNorm(width, eps, keys.child("norm"))
        self.attention = _Attention(width, num_heads, keys.child("attention"))
        self.mlp_norm = LayerNorm(width, eps, keys.child("mlp_norm"))
        self.mlp = _mlp(config, keys)

    @typechecked
    def __call__(
        self, x: Float[Array, "B U E"], features: Float[Array, "B P E"], mask: Bool[Array, "B U P"]
    ) -> Float[Array, "B U E"]:
        normed = self.self_norm(x)
        x = x + self.self_attention(normed, normed, mask[:, :, ::MERGED_PATCHES])
        x = x + self.attention(self.norm(x), features, mask)
        return x + self.mlp(self.mlp_norm(x))


def _mlp(config: ModelConfig, keys: ParamKeys) -> MLP:
    width = config.encoder.dim
    return MLP(width, config.projector.hidden_dim, width, ("vision_embed", "vision_embed"), keys.child("mlp"))


class _Attention(nnx.Module):
    """Multi-head attention from one sequence to another, with biases."""

    def __init__(self, width: int, num_heads: int, keys: ParamKeys):
        self.num_heads = num_heads
        wide = ("vision_embed", "heads")
        self.query = Linear(width, width, wide, keys.child("query"), use_bias=True)
        self.key = Linear(width, width, wide, keys.child("key"), use_bias=True)
        self.value = Linear(width, width, wide, keys.child("value"), use_bias=True)
        self.out = Linear(width, width, ("heads", "vision_embed"), keys.child("out"), use_bias=True)

    def __call__(self, x: jax.Array, read: jax.Array, mask: jax.Array) -> jax.Array:
        query = self.query(x).reshape(*x.shape[:2], self.num_heads, -1)
        key, value = (linear(read).reshape(*read.shape[:2], self.num_heads, -1) for linear in (self.key, self.value))
        return self.out(attend(query, key, value, mask))


# ---------------------------------------------------------------- gated cross-attention


class GatedCrossAttention(nnx.Module):
    """`x + tanh(a) attention(norm(x); images)`, then `x + tanh(b) mlp(norm(x))`, before a layer of the language model.

    Both gates start at zero, so a fresh one changes nothing (arXiv 2204.14198, figure 4).
    """

    def __init__(self, config: DecoderConfig, keys: ParamKeys):
        dim = config.dim
        query_dim, key_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.norm = RMSNorm(dim, config.norm_eps, keys.child("norm"))
        self.query = Linear(dim, query_dim, ("embed", "heads"), keys.child("query"))
        self.key = Linear(dim, key_dim, ("embed", "heads"), keys.child("key"))
        self.value = Linear(dim, key_dim, ("embed", "heads"), keys.child("value"))
        self.out = Linear(query_dim, dim, ("heads", "embed"), keys.child("out"))
        self.gate = parameter(keys, "gate", (1,), nnx.initializers.zeros, ("replicated",))
        self.mlp_norm = RMSNorm(dim, config.norm_eps, keys.child("mlp_norm"))
        self.mlp = GatedMLP(dim, config.mlp_dim, keys.child("mlp"))
        self.mlp_gate = parameter(keys, "mlp_gate", (1,), nnx.initializers.zeros, ("replicated",))

    @typechecked
    def read(self, embeddings: Float[Array, "B U D"]) -> tuple[Float[Array, "B U G d"], Float[Array, "B U G d"]]:
        """Keys and values of visual embeddings; they have their place from the encoder, and none in the text."""
        heads = (*embeddings.shape[:2], -1, self.head_dim)
        return self.key(embeddings).reshape(heads), self.value(embeddings).reshape(heads)

    @typechecked
    def __call__(
        self,
        x: Float[Array, "B S D"],
        keys: Float[Array, "B K G d"],
        values: Float[Array, "B K G d"],
        mask: Bool[Array, "B S K"],
    ) -> Float[Array, "B S D"]:
        """Positions that see no image have nothing added by attention: the mean over all that `attend` gives then would
        be of other samples' images.
        """
        query = self.query(self.norm(x)).reshape(*x.shape[:2], -1, self.head_dim)
        found = self.out(attend(query, keys, values, mask)) * mask.any(axis=-1, keepdims=True)
        x = x + jnp.tanh(self.gate[...]).astype(x.dtype) * found
        return x + jnp.tanh(self.mlp_gate[...]).astype(x.dtype) * self.mlp(self.mlp_norm(x))


@typechecked
def complete_image_mask(
    segment_ids: Int[Array, "B T"], branch_ids: Int[Array, "B T"], visual_mask: Bool[Array, "B T"]
) -> Bool[Array, "B T T"]:
    """Which visual positions a position sees across: those of its sample (or its branch of it) whose image has ended.

    A sample with an image of two tokens that it is then asked about, and a drawn image (`b` is `<boi>`, `e` `<eoi>`):

                 b v v e t b v v e
        query b  . . . . . . . . .
              v  . . . . . . . . .
              v  . . . . . . . . .
              e  . x x . . . . . .
              t  . x x . . . . . .
              b  . x x . . . . . .
              v  . x x . . . . . .
              v  . x x . . . . . .
              e  . x x . . . x x .
    """
    ended = jnp.cumsum(~visual_mask, axis=1)  # visual positions of one image have the same count, later ones a higher
    has_ended = ended[:, None, :] < ended[:, :, None]
    return decoder_mask(segment_ids, branch_ids) & visual_mask[:, None, :] & has_ended


class CrossReader:
    """The gated layers over whole rows, ready for the decoder to call one before each of its layers."""

    def __init__(self, layers: GatedCrossAttention, embeddings: jax.Array, index: jax.Array, mask: jax.Array):
        """`embeddings` [B, U, D] of all visual tokens, `index` [B, T] which one stands at a position, `mask` [B, T, T]
        from `complete_image_mask`.
        """
        self._graphdef, self.layers = nnx.split(layers)
        self._embeddings, self._index, self._mask = embeddings, index[..., None, None], mask

    def __call__(self, layer: Any, x: jax.Array) -> jax.Array:
        """Applies one of `layers`, which the decoder scans beside its own."""
        gated = nnx.merge(self._graphdef, layer)
        keys, values = (jnp.take_along_axis(one, self._index, axis=1) for one in gated.read(self._embeddings))
        return gated(x, keys, values, self._mask)


class CachedCrossReader:
    """The same, position by position: what has been read is kept in a `VisualCache`, slot by slot."""

    def __init__(
        self,
        layers: GatedCrossAttention,
        embeddings: jax.Array,
        positions: jax.Array,
        visual_mask: jax.Array,
        cache: VisualCache,
    ):
        """Of new positions: their input embeddings, or of read images those of their tokens, [B, S, D]; where they
        stand, int32[B, S]; and which of them are visual, bool[B, S].
        """
        self._graphdef, self.layers = nnx.split(layers)
        self._embeddings, self._rows, self._positions = embeddings, jnp.arange(positions.shape[0])[:, None], positions
        ended = cache.ended[:, None] + jnp.cumsum(~visual_mask, axis=1, dtype=jnp.int32)
        begun = cache.begun.at[self._rows, positions].set(jnp.where(visual_mask, ended, NOT_VISUAL))
        self._mask = begun[:, None, :] < ended[:, :, None]
        self.slots = cache.keys, cache.values
        self._begun, self._ended = begun, ended

    def __call__(self, layer: Any, x: jax.Array, slots: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, Any]:
        """Applies one of `layers` with its part of `slots`; returns these with the new positions in them."""
        gated = nnx.merge(self._graphdef, layer)
        slots = jax.tree.map(
            lambda kept, new: kept.at[self._rows, self._positions].set(new), slots, gated.read(self._embeddings)
        )
        return gated(x, slots[0], slots[1], self._mask), slots

    def cache_with(self, slots: tuple[jax.Array, jax.Array], length: jax.Array) -> VisualCache:
        """The cache after the new positions, of which `length` are no padding, int32[B]."""
        ended = jnp.take_along_axis(self._ended, length[:, None] - 1, axis=1)[:, 0]
        return VisualCache(*slots, self._begun, ended)
