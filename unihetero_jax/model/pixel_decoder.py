"""Pixel decoder: a flow-matching transformer that draws patches, given one condition for each visual token.

    y_tau = (1 - tau) y_0 + tau eps        velocity  eps - y_0  (rectified flow, arXiv 2209.03003)

What the network gives is the clean patch, and the velocity follows from it, `(y_tau - y_0) / tau` (arXiv 2511.13720): a
patch of 8 x 8 pixels has 192 values, whose noise does not pass through a narrower network, and whose image does.

A visual token's condition reaches the patches in one of two ways. By adaptive norms (DiT, arXiv 2212.09748) it shifts,
scales and gates its own four patches. By cross-attention every patch reads the tokens of its group, after the patches
have read each other, and the norms follow the time alone. Attention stays within the groups that the caller names: the
patches of an image, or those of one block.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from unihetero_jax.arrays import typechecked
from unihetero_jax.config import MERGED_PATCHES, MIN_TAU, PixelDecoderConfig
from unihetero_jax.model.attention import RowAttention, attend, token_mask
from unihetero_jax.model.layers import MLP, Linear, ParamKeys, parameter, scan_layers, stack_layers

_EPS = 1e-6
_WAVE_LENGTHS = (1.0, 10_000.0)
_TIME_SCALE = 1000.0
"""tau in [0, 1] spreads over as many steps as diffusion models number them."""


class PixelDecoder(nnx.Module):
    """Patches of so many values each (`patch_codec`), of images of any grid."""

    def __init__(self, config: PixelDecoderConfig, num_values: int, condition_dim: int, keys: ParamKeys):
        self.config = config
        dim, axes = config.dim, ("replicated", "vision_embed")
        self.patch = Linear(num_values, dim, axes, keys.child("patch"), use_bias=True)
        self.condition = Linear(condition_dim, dim, ("embed", "vision_embed"), keys.child("condition"), use_bias=True)
        self.no_condition = parameter(keys, "no_condition", (dim,), nnx.initializers.normal(0.02), axes[1:])
        self.time = MLP(dim, dim, dim, ("vision_embed", "vision_embed"), keys.child("time"))
        self.blocks = stack_layers(lambda k: _Block(config, k), config.num_layers, keys.child("blocks"))
        self.modulation = _zero_linear(dim, 2 * dim, axes, keys.child("modulation"))
        self.out = _zero_linear(dim, num_values, ("vision_embed", "replicated"), keys.child("out"))

    @typechecked
    def __call__(
        self,
        noisy: Float[Array, "B P Y"],
        tau: Float[Array, "B P"],
        condition: Float[Array, "B U C"],
        is_conditioned: Bool[Array, "B U"],
        patch_coords: Int[Array, "B P 2"],
        groups: Int[Array, "B P"],
        attention: RowAttention,
    ) -> Float[Array, "B P Y"]:
        """The velocity `eps - y_0` at every patch, float32.

        Args:
            noisy: y_tau.
            tau: share of noise of each patch, in [0, 1], equal for those of a visual token; below `MIN_TAU` it counts
                as that.
            condition: of each visual token; of any scale, it is normalised here.
            is_conditioned: where it is false, the learned "no condition" stands instead.
            patch_coords: (y, x) in the image.
            groups: of patches that are drawn together and whose tokens they may read; 0 is padding.
            attention: of the patches of a group to each other.
        """
        dim = self.config.dim
        given = jnp.where(
            is_conditioned[..., None],
            self.condition(_normalised(condition)),
            self.no_condition[...].astype(noisy.dtype),
        )
        waves = _waves(tau[:, ::MERGED_PATCHES] * _TIME_SCALE, dim).astype(noisy.dtype)
        control, place = self.time(waves), _places(patch_coords, dim).astype(noisy.dtype)
        tokens = None
        if self.config.conditioning == "adaptive_norm":
            control = control + given
        else:
            centres = patch_coords.reshape(*given.shape[:2], MERGED_PATCHES, 2).mean(axis=2)
            token_place = _places(centres, dim).astype(noisy.dtype)
            tokens = _Tokens(given, given + token_place, place, token_mask(groups))
        control = jax.nn.silu(control)
        x = self.patch(noisy) + place
        x, _ = scan_layers(self.blocks, x, lambda block, x, _: (block(x, control, attention, tokens), None), "none")
        shift, scale = _of_patches(self.modulation(control), 2)
        clean = self.out(_modulated(x, shift, scale)).astype(jnp.float32)
        return (noisy.astype(jnp.float32) - clean) / jnp.maximum(tau, MIN_TAU)[..., None]


class _Tokens(NamedTuple):
    """What cross-attention reads, the same in every block.

    Attributes:
        given: each token's condition, [B, U, o].
        placed: the same with the place of the token's centre added, [B, U, o].
        place: that of each patch, [B, P, o].
        mask: which tokens a patch may read, bool[B, P, U].
    """

    given: jax.Array
    placed: jax.Array
    place: jax.Array
    mask: jax.Array


class _CrossAttention(nnx.Module):
    """Patches read visual tokens. Queries and keys have places, values none (as DETR, arXiv 2005.12872).

    What it adds starts at zero (as PixArt, arXiv 2310.00426). Dense on every device: there are a quarter as many keys
    as patches.
    """

    def __init__(self, config: PixelDecoderConfig, keys: ParamKeys):
        dim, wide = config.dim, ("vision_embed", "heads")
        self.num_heads = config.num_heads
        self.query = Linear(dim, dim, wide, keys.child("query"), use_bias=True)
        self.key = Linear(dim, dim, wide, keys.child("key"), use_bias=True)
        self.value = Linear(dim, dim, wide, keys.child("value"), use_bias=True)
        self.out = _zero_linear(dim, dim, ("heads", "vision_embed"), keys.child("out"))

    def __call__(self, x: jax.Array, tokens: _Tokens) -> jax.Array:
        parts = (self.query(x + tokens.place), self.key(tokens.placed), self.value(tokens.given))
        query, key, value = (part.reshape(*part.shape[:2], self.num_heads, -1) for part in parts)
        return self.out(attend(query, key, value, tokens.mask))


class _Block(nnx.Module):
    """DiT's block: norms without parameters of their own, shifted, scaled and gated by the control; between attention
    and MLP, if conditions come so, attention to the visual tokens.
    """

    def __init__(self, config: PixelDecoderConfig, keys: ParamKeys):
        dim, wide = config.dim, ("vision_embed", "heads")
        self.num_heads = config.num_heads
        self.modulation = _zero_linear(dim, 6 * dim, ("replicated", "vision_embed"), keys.child("modulation"))
        self.query = Linear(dim, dim, wide, keys.child("query"), use_bias=True)
        self.key = Linear(dim, dim, wide, keys.child("key"), use_bias=True)
        self.value = Linear(dim, dim, wide, keys.child("value"), use_bias=True)
        self.attention_out = Linear(dim, dim, ("heads", "vision_embed"), keys.child("attention_out"), use_bias=True)
        self.mlp = MLP(dim, config.mlp_dim, dim, ("vision_embed", "vision_embed"), keys.child("mlp"))
        reads = config.conditioning == "cross_attention"
        self.cross_attention = _CrossAttention(config, keys.child("cross_attention")) if reads else None

    @typechecked
    def __call__(
        self, x: Float[Array, "B P o"], control: Float[Array, "B U o"], attention: RowAttention, tokens: _Tokens | None
    ) -> Float[Array, "B P o"]:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = _of_patches(self.modulation(control), 6)
        normed = _modulated(x, shift, scale)
        heads = (*x.shape[:2], self.num_heads, -1)
        query, key, value = (linear(normed).reshape(heads) for linear in (self.query, self.key, self.value))
        x = x + gate * self.attention_out(attention(query, key, value))
        if self.cross_attention is not None:
            assert tokens is not None
            x = x + self.cross_attention(_normalised(x), tokens)
        return x + mlp_gate * self.mlp(_modulated(x, mlp_shift, mlp_scale))


def _zero_linear(in_dim: int, out_dim: int, axes: tuple[str, str], keys: ParamKeys) -> Linear:
    """A linear map that starts at zero: a fresh block is the identity (adaLN-Zero), a fresh decoder draws grey."""
    linear = Linear(in_dim, out_dim, axes, keys, use_bias=True)
    linear.kernel = nnx.Param(jnp.zeros((in_dim, out_dim), jnp.float32), logical_axes=axes)
    return linear


def _of_patches(by_token: jax.Array, num_parts: int) -> list[jax.Array]:
    """Parts of what every visual token says, given to each of its patches: computed once for four."""
    return jnp.split(jnp.repeat(by_token, MERGED_PATCHES, axis=1), num_parts, axis=-1)


def _normalised(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt((centred * centred).mean(axis=-1, keepdims=True) + _EPS)).astype(x.dtype)


def _modulated(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    return _normalised(x) * (1 + scale) + shift


def _places(coords: jax.Array, dim: int) -> jax.Array:
    """Waves of y and of x, float32[..., dim]."""
    return jnp.concatenate([_waves(coords[..., i], dim // 2) for i in (0, 1)], axis=-1)


def _waves(values: jax.Array, dim: int) -> jax.Array:
    """Sines and cosines of wave lengths from 2 pi to 20,000 pi, float32[..., dim] (arXiv 1706.03762)."""
    lengths = jnp.geomspace(*_WAVE_LENGTHS, dim // 2, dtype=jnp.float32)
    angles = values[..., None].astype(jnp.float32) / lengths
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
