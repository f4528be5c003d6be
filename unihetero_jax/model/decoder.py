"""Shared Decoder: the causal language model over token and visual embeddings alike."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from unihetero_jax.arrays import Cache, typechecked
from unihetero_jax.config import DecoderConfig, Remat
from unihetero_jax.model.attention import RowAttention, attend, rope_frequencies, rotate
from unihetero_jax.model.connectors import CachedCrossReader, CrossReader
from unihetero_jax.model.layers import (
    GatedMLP,
    Linear,
    ParamKeys,
    RMSNorm,
    layers_between,
    lookup,
    parameter,
    scan_layers,
    stack_layers,
)
from unihetero_jax.sharding import constrain


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions; q/k norm and q/k/v bias by config (Qwen3, Qwen2)."""

    def __init__(self, config: DecoderConfig, keys: ParamKeys):
        self.config = config
        dim, head_dim = config.dim, config.head_dim
        query_dim, key_dim = config.num_heads * head_dim, config.num_kv_heads * head_dim
        self.query = Linear(dim, query_dim, ("embed", "heads"), keys.child("query"), use_bias=config.qkv_bias)
        self.key = Linear(dim, key_dim, ("embed", "heads"), keys.child("key"), use_bias=config.qkv_bias)
        self.value = Linear(dim, key_dim, ("embed", "heads"), keys.child("value"), use_bias=config.qkv_bias)
        self.out = Linear(query_dim, dim, ("heads", "embed"), keys.child("out"))
        self.query_norm = RMSNorm(head_dim, config.norm_eps, keys.child("query_norm")) if config.qk_norm else None
        self.key_norm = RMSNorm(head_dim, config.norm_eps, keys.child("key_norm")) if config.qk_norm else None

    @typechecked
    def project(
        self, x: Float[Array, "B S D"], positions: Int[Array, "B S"]
    ) -> tuple[Float[Array, "B S H d"], Float[Array, "B S G d"], Float[Array, "B S G d"]]:
        """Queries, keys and values by head, rotated to their positions."""
        heads = (*x.shape[:2], -1, self.config.head_dim)
        # Pinned before it is split into heads: else the compiler splits the weight instead, and gathers it again for
        # the backward pass, whose product has the unsplit one.
        query, key, value = (
            constrain(linear(x), "batch", "sequence", "heads").reshape(heads)
            for linear in (self.query, self.key, self.value)
        )
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        scaling = self.config.rope_scaling
        frequencies = rope_frequencies(self.config.head_dim, self.config.rope_theta, scaling)
        query, key = (rotate(x, positions, frequencies, scaling.attention_factor) for x in (query, key))
        return query, key, value


class DecoderBlock(nnx.Module):
    """Pre-norm block: `x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, config: DecoderConfig, keys: ParamKeys):
        self.attention_norm = RMSNorm(config.dim, config.norm_eps, keys.child("attention_norm"))
        self.attention = Attention(config, keys.child("attention"))
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps, keys.child("mlp_norm"))
        self.mlp = GatedMLP(config.dim, config.mlp_dim, keys.child("mlp"))

    @typechecked
    def __call__(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], attention: RowAttention
    ) -> Float[Array, "B T D"]:
        """Whole rows."""
        query, key, value = self.attention.project(self.attention_norm(x), positions)
        x = x + self.attention.out(attention(query, key, value))
        return x + self.mlp(self.mlp_norm(x))

    @typechecked
    def cached(
        self,
        x: Float[Array, "B S D"],
        positions: Int[Array, "B S"],
        mask: Bool[Array, "B S K"],
        slots: tuple[Float[Array, "B K G d"], Float[Array, "B K G d"]],
    ) -> tuple[Float[Array, "B S D"], tuple[Float[Array, "B K G d"], Float[Array, "B K G d"]]]:
        """New positions against the cache; position p is written to slot p."""
        query, key, value = self.attention.project(self.attention_norm(x), positions)
        rows = jnp.arange(x.shape[0])[:, None]
        keys, values = slots[0].at[rows, positions].set(key), slots[1].at[rows, positions].set(value)
        x = x + self.attention.out(attend(query, keys, values, mask))
        return x + self.mlp(self.mlp_norm(x)), (keys, values)


class Decoder(nnx.Module):
    """Token and grid embeddings, stacked blocks, final norm; the unembedding is the token table or its own."""

    def __init__(self, config: DecoderConfig, embedding_rms: float, keys: ParamKeys):
        self.config = config
        normal = nnx.initializers.normal(embedding_rms)
        table, grid = (config.vocab_size, config.dim), (config.max_grid + 1, config.dim)
        self.embedding = parameter(keys, "embedding", table, normal, ("vocab", "embed"))
        # Small, and looked up by row: split by width, every lookup would be brought together by a collective.
        self.grid_height = parameter(keys, "grid_height", grid, normal, ("replicated", "replicated"))
        self.grid_width = parameter(keys, "grid_width", grid, normal, ("replicated", "replicated"))
        self.blocks = stack_layers(lambda k: DecoderBlock(config, k), config.num_layers, keys.child("blocks"))
        self.norm = RMSNorm(config.dim, config.norm_eps, keys.child("norm"))
        if not config.tied_embeddings:
            self.output = parameter(keys, "output", table, normal, ("vocab", "embed"))

    @property
    def unembedding(self) -> jax.Array:
        """float32[V, D]."""
        return self.embedding[...] if self.config.tied_embeddings else self.output[...]

    @typechecked
    def embed(
        self, tokens: Int[Array, "B S"], boi_grid: Int[Array, "B S 2"], dtype: jnp.dtype
    ) -> Float[Array, "B S D"]:
        """Token embeddings; `<boi>` also carries its image's grid, which is known before any visual target."""
        grid = self.grid_height[...][boi_grid[..., 0]] + self.grid_width[...][boi_grid[..., 1]]
        is_boi = (boi_grid[..., :1] > 0).astype(grid.dtype)
        return (lookup(self.embedding[...], tokens, dtype) + grid * is_boi).astype(dtype)

    @typechecked
    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        attention: RowAttention,
        cross: CrossReader | None = None,
    ) -> Float[Array, "B T D"]:
        """Whole rows; `attention` from `decoder_attention`. `cross` looks at images before every layer."""
        return self.norm(_run(self.blocks, x, positions, attention, self.config.remat, cross))

    def below(self, x: jax.Array, split: int, positions: jax.Array, attention: RowAttention) -> jax.Array:
        """The layers before `split`."""
        return _run(layers_between(self.blocks, 0, split), x, positions, attention, self.config.remat)

    def above(self, x: jax.Array, split: int, positions: jax.Array, attention: RowAttention) -> jax.Array:
        """The layers from `split` on and the final norm."""
        upper = layers_between(self.blocks, split, self.config.num_layers)
        return self.norm(_run(upper, x, positions, attention, self.config.remat))

    @typechecked
    def by_layer(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], attention: RowAttention
    ) -> Float[Array, "L B T D"]:
        """What each layer leaves behind, before the final norm."""

        def call(block: DecoderBlock, x: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            x = block(x, positions, attention)
            return x, x

        return scan_layers(self.blocks, x, call, "none")[1]

    @typechecked
    def cached(
        self,
        x: Float[Array, "B S D"],
        positions: Int[Array, "B S"],
        mask: Bool[Array, "B S K"],
        cache: Cache,
        cross: CachedCrossReader | None = None,
    ) -> tuple[Float[Array, "B S D"], tuple[Float[Array, "L B K G d"], Float[Array, "L B K G d"]], Any]:
        """Reads `S` new positions; returns the hidden states, the keys and values with theirs, and those of `cross`."""
        slots, seen = (cache.keys, cache.values), None
        if cross is None:
            x, slots = _run_cached(self.blocks, x, positions, mask, slots)
        else:

            def call(block: DecoderBlock, x: jax.Array, per_layer: Any) -> tuple[jax.Array, Any]:
                own, gated, seen = per_layer
                x, seen = cross(gated, x, seen)
                x, own = block.cached(x, positions, mask, own)
                return x, (own, seen)

            per_layer = slots, cross.layers, cross.slots
            x, (slots, seen) = scan_layers(self.blocks, x, call, "none", per_layer)
        return self.norm(x), slots, seen

    @typechecked
    def cached_with_branch(
        self,
        branch: "VisualBranch",
        x: Float[Array, "B S D"],
        positions: Int[Array, "B S"],
        mask: Bool[Array, "B S K"],
        cache: Cache,
    ) -> tuple[Float[Array, "B S D"], Float[Array, "B S D"], tuple[jax.Array, jax.Array]]:
        """The same, and what the branch makes of it; its layers' keys and values follow the decoder's in the cache."""
        num_layers, split = self.config.num_layers, branch.split
        slots = (cache.keys, cache.values)
        lower, upper, own = (
            jax.tree.map(lambda x: x[part], slots)  # noqa: B023
            for part in (slice(split), slice(split, num_layers), slice(num_layers, None))
        )
        x, lower = _run_cached(layers_between(self.blocks, 0, split), x, positions, mask, lower)
        text, upper = _run_cached(layers_between(self.blocks, split, num_layers), x, positions, mask, upper)
        visual, own = _run_cached(branch.blocks, x, positions, mask, own)
        joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), lower, upper, own)
        return self.norm(text), branch.norm(visual), joined


class VisualBranch(nnx.Module):
    """The decoder's layers from `split` on and its final norm once more, which start as they do."""

    def __init__(self, config: DecoderConfig, split: int, keys: ParamKeys):
        """`keys` are the decoder's own."""
        self.config, self.split = config, split
        self.blocks = stack_layers(lambda k: DecoderBlock(config, k), config.num_layers, keys.child("blocks"), split)
        self.norm = RMSNorm(config.dim, config.norm_eps, keys.child("norm"))

    @typechecked
    def __call__(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], attention: RowAttention
    ) -> Float[Array, "B T D"]:
        """Whole rows, from what the shared layers leave behind."""
        return self.norm(_run(self.blocks, x, positions, attention, self.config.remat))


def _run(
    blocks: nnx.Module,
    x: jax.Array,
    positions: jax.Array,
    attention: RowAttention,
    remat: Remat,
    cross: CrossReader | None = None,
) -> jax.Array:
    def call(block: DecoderBlock, x: jax.Array, gated: Any) -> tuple[jax.Array, None]:
        x = x if cross is None else cross(gated, x)
        return block(x, positions, attention), None

    return scan_layers(blocks, x, call, remat, None if cross is None else cross.layers)[0]


def _run_cached(blocks: nnx.Module, x: jax.Array, positions: jax.Array, mask: jax.Array, slots: Any) -> tuple[Any, Any]:
    return scan_layers(
        blocks, x, lambda block, x, slots: block.cached(x, positions, mask, slots), "none", per_layer=slots
    )
