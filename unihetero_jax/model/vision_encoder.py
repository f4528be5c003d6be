"""Visual Encoder: a ViT over packed patches of images at native aspect ratio (SigLIP 2 NaFlex, arXiv 2502.14786).

SigLIP's fixed sizes are the case of one grid. CLIP (arXiv 2103.00020) has a class token besides: as an image is at
least one block, a row of P patches has P / 4 images at most, and so many positions follow the patches for their class
tokens.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from unihetero_jax.arrays import typechecked
from unihetero_jax.config import MERGED_PATCHES, EncoderConfig
from unihetero_jax.model.attention import RowAttention
from unihetero_jax.model.layers import MLP, LayerNorm, Linear, ParamKeys, parameter, scan_layers, stack_layers


@typechecked
def resize_weights(coord: Int[Array, "*n"], size: Int[Array, "*n"], table_size: int) -> Float[Array, "*n s"]:
    """How much each entry of a 1-D table counts for output `coord` of `size`: bilinear resizing with antialias.

    The triangle filter of `jax.image.resize(..., "linear")` and `torch.nn.functional.interpolate(antialias=True)`, for
    one output position instead of a whole axis, so images of any grid share static shapes.
    """
    scale = table_size / jnp.maximum(size, 1).astype(jnp.float32)
    centre = (coord.astype(jnp.float32) + 0.5) * scale - 0.5
    radius = jnp.maximum(scale, 1.0)
    distance = jnp.abs(jnp.arange(table_size, dtype=jnp.float32) - centre[..., None])
    weights = jnp.maximum(0.0, 1.0 - distance / radius[..., None])
    return weights / jnp.sum(weights, axis=-1, keepdims=True)


class EncoderBlock(nnx.Module):
    """Pre-norm transformer block with biases, attention within an image."""

    def __init__(self, config: EncoderConfig, keys: ParamKeys):
        dim = config.dim
        self.num_heads = config.num_heads
        self.attention_norm = LayerNorm(dim, config.norm_eps, keys.child("attention_norm"))
        self.query = Linear(dim, dim, ("vision_embed", "heads"), keys.child("query"), use_bias=True)
        self.key = Linear(dim, dim, ("vision_embed", "heads"), keys.child("key"), use_bias=True)
        self.value = Linear(dim, dim, ("vision_embed", "heads"), keys.child("value"), use_bias=True)
        self.out = Linear(dim, dim, ("heads", "vision_embed"), keys.child("out"), use_bias=True)
        self.mlp_norm = LayerNorm(dim, config.norm_eps, keys.child("mlp_norm"))
        axes = ("vision_embed", "vision_embed")
        self.mlp = MLP(dim, config.mlp_dim, dim, axes, keys.child("mlp"), config.activation)

    @typechecked
    def __call__(self, x: Float[Array, "B P E"], attention: RowAttention) -> Float[Array, "B P E"]:
        normed = self.attention_norm(x)
        heads = (*x.shape[:2], self.num_heads, -1)
        query, key, value = (linear(normed).reshape(heads) for linear in (self.query, self.key, self.value))
        x = x + self.out(attention(query, key, value))
        return x + self.mlp(self.mlp_norm(x))


class VisionEncoder(nnx.Module):
    """Patches to features; every image sees only itself."""

    def __init__(self, config: EncoderConfig, keys: ParamKeys):
        self.config = config
        patch_values = config.patch_size**2 * 3
        axes, normal = ("replicated", "vision_embed"), nnx.initializers.normal(1.0)
        self.patch = Linear(patch_values, config.dim, axes, keys.child("patch"), use_bias=config.patch_bias)
        num_positions = config.position_grid**2 + config.class_token  # that of the class token first
        self.position = parameter(keys, "position", (num_positions, config.dim), normal, axes)
        if config.class_token:
            self.class_token = parameter(keys, "class_token", (config.dim,), normal, axes[1:])
        self.pre_norm = LayerNorm(config.dim, config.norm_eps, keys.child("pre_norm")) if config.pre_norm else None
        self.blocks = stack_layers(lambda k: EncoderBlock(config, k), config.num_layers, keys.child("blocks"))
        self.norm = LayerNorm(config.dim, config.norm_eps, keys.child("norm"))

    @typechecked
    def __call__(
        self,
        patches: UInt8[Array, "B P F"],
        patch_coords: Int[Array, "B P 2"],
        patch_grid: Int[Array, "B P 2"],
        attention: RowAttention,
        dtype: jnp.dtype,
    ) -> Float[Array, "B P E"]:
        """Pixel values arrive as uint8 and are normalised here, on the device; the rest is `features`."""
        return self.features(self.embed_patches(patches, dtype), patch_coords, patch_grid, attention)

    @typechecked
    def features(
        self,
        embedded: Float[Array, "B P E"],
        patch_coords: Int[Array, "B P 2"],
        patch_grid: Int[Array, "B P 2"],
        attention: RowAttention,
    ) -> Float[Array, "B P E"]:
        """From `embed_patches`, or from what a model predicted in its place.

        `attention` from `encoder_attention`, over `with_class_tokens` of the segments where there are such tokens.
        """
        side, num_patches, dtype = self.config.position_grid, embedded.shape[1], embedded.dtype
        rows = resize_weights(patch_coords[..., 0], patch_grid[..., 0], side)
        columns = resize_weights(patch_coords[..., 1], patch_grid[..., 1], side)
        weights = (rows[..., :, None] * columns[..., None, :]).reshape(*rows.shape[:2], side * side)
        of_patches = self.position[...][int(self.config.class_token) :]
        x = embedded + weights.astype(dtype) @ of_patches.astype(dtype)
        if self.config.class_token:
            token = (self.class_token[...] + self.position[0]).astype(dtype)
            tokens = jnp.broadcast_to(token, (x.shape[0], num_patches // MERGED_PATCHES, x.shape[2]))
            x = jnp.concatenate([x, tokens], axis=1)
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        x, _ = scan_layers(self.blocks, x, lambda block, x, _: (block(x, attention), None), self.config.remat)
        return self.norm(x[:, :num_patches])

    @typechecked
    def embed_patches(self, patches: UInt8[Array, "B P F"], dtype: jnp.dtype) -> Float[Array, "B P E"]:
        """The linear map of the pixels, before positions."""
        return self.patch(self._normalised(patches).astype(dtype))

    def _normalised(self, patches: jax.Array) -> jax.Array:
        """float32[B, P, F]; the channel is the fastest index of a patch's values."""
        mean, std = (np.array(values, np.float32) for values in (self.config.pixel_mean, self.config.pixel_std))
        repeats = patches.shape[-1] // len(mean)
        return patches.astype(jnp.float32) * np.tile(1 / (255 * std), repeats) - np.tile(mean / std, repeats)

    @typechecked
    def rescale_merged(self, direction: Float[Array, "*batch M"]) -> Float[Array, "*batch M"]:
        """Gives merged features known up to scale the length that the final norm would give them.

        Without gain g and bias b the norm's output has mean square 1; so the scale c solves
        mean(((c v - b) / g)^2) = 1.
        """
        gain, bias = (jnp.tile(x[...], MERGED_PATCHES) for x in (self.norm.gain, self.norm.bias))
        v = direction.astype(jnp.float32) / gain
        offset = bias / gain
        square, product = jnp.mean(v * v, axis=-1, keepdims=True), jnp.mean(v * offset, axis=-1, keepdims=True)
        # No solution only if the bias alone is longer than 1: then the nearest point of the ray.
        root = jnp.sqrt(jnp.maximum(product**2 - square * (jnp.mean(offset * offset) - 1.0), 0.0))
        return (direction * ((product + root) / jnp.maximum(square, 1e-12))).astype(direction.dtype)


@typechecked
def with_class_tokens(patch_segment_ids: Int[Array, "B P"]) -> Int[Array, "B Q"]:
    """Segments of patches and, after them, of class tokens: the i-th belongs to image i of the row, if there is one.

    patches  1 1 1 1 2 2 2 2 0 0 0 0    class tokens  1 2 0
    """
    num_patches = patch_segment_ids.shape[1]
    images = jnp.arange(1, num_patches // MERGED_PATCHES + 1, dtype=patch_segment_ids.dtype)
    is_there = images <= jnp.max(patch_segment_ids, axis=1, keepdims=True)
    return jnp.concatenate([patch_segment_ids, jnp.where(is_there, images, 0)], axis=1)


@typechecked
def patch_places(grid: Int[Array, "B 2"], num_tokens: int) -> Int[Array, "B P 2"]:
    """(y, x) of the patches of one image per row, of (height, width) visual tokens, block-major as by `patchify`."""
    block = jnp.arange(num_tokens * MERGED_PATCHES) // MERGED_PATCHES
    within = jnp.arange(num_tokens * MERGED_PATCHES) % MERGED_PATCHES
    width = jnp.maximum(grid[:, 1:], 1)
    return jnp.stack([2 * (block // width) + within // 2, 2 * (block % width) + within % 2], axis=-1)


@typechecked
def merge_patches(features: Float[Array, "B P E"]) -> Float[Array, "B U 4*E"]:
    """Patches are stored block-major, so the 2x2 merge is a reshape."""
    num_rows, num_patches, dim = features.shape
    return features.reshape(num_rows, num_patches // MERGED_PATCHES, MERGED_PATCHES * dim)
