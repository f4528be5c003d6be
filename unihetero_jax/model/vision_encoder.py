"""Visual Encoder: a ViT over packed patches of images at native aspect ratio (SigLIP 2 NaFlex, arXiv 2502.14786)."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from unihetero_jax.arrays import typechecked
from unihetero_jax.config import MERGED_PATCHES, EncoderConfig
from unihetero_jax.model.attention import RowAttention
from unihetero_jax.model.layers import MLP, LayerNorm, Linear, ParamKeys, parameter, scan_layers, stack_layers

NORM_EPS = 1e-6


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
        self.attention_norm = LayerNorm(dim, NORM_EPS, keys.child("attention_norm"))
        self.query = Linear(dim, dim, ("vision_embed", "heads"), keys.child("query"), use_bias=True)
        self.key = Linear(dim, dim, ("vision_embed", "heads"), keys.child("key"), use_bias=True)
        self.value = Linear(dim, dim, ("vision_embed", "heads"), keys.child("value"), use_bias=True)
        self.out = Linear(dim, dim, ("heads", "vision_embed"), keys.child("out"), use_bias=True)
        self.mlp_norm = LayerNorm(dim, NORM_EPS, keys.child("mlp_norm"))
        self.mlp = MLP(dim, config.mlp_dim, dim, ("vision_embed", "vision_embed"), keys.child("mlp"))

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
        self.patch = Linear(
            patch_values, config.dim, ("replicated", "vision_embed"), keys.child("patch"), use_bias=True
        )
        self.position = parameter(
            keys,
            "position",
            (config.position_grid**2, config.dim),
            nnx.initializers.normal(1.0),
            ("replicated", "vision_embed"),
        )
        self.blocks = stack_layers(lambda k: EncoderBlock(config, k), config.num_layers, keys.child("blocks"))
        self.norm = LayerNorm(config.dim, NORM_EPS, keys.child("norm"))

    @typechecked
    def __call__(
        self,
        patches: UInt8[Array, "B P F"],
        patch_coords: Int[Array, "B P 2"],
        patch_grid: Int[Array, "B P 2"],
        attention: RowAttention,
        dtype: jnp.dtype,
    ) -> Float[Array, "B P E"]:
        """Pixel values arrive as uint8 and are scaled to [-1, 1] here, on the device.

        `attention` from `encoder_attention`.
        """
        side = self.config.position_grid
        pixels = patches.astype(dtype) / 127.5 - 1.0
        rows = resize_weights(patch_coords[..., 0], patch_grid[..., 0], side)
        columns = resize_weights(patch_coords[..., 1], patch_grid[..., 1], side)
        weights = (rows[..., :, None] * columns[..., None, :]).reshape(*rows.shape[:2], side * side)
        x = self.patch(pixels) + weights.astype(dtype) @ self.position[...].astype(dtype)
        x, _ = scan_layers(self.blocks, x, lambda block, x, _: (block(x, attention), None), self.config.remat)
        return self.norm(x)

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
def merge_patches(features: Float[Array, "B P E"]) -> Float[Array, "B U 4*E"]:
    """Patches are stored block-major, so the 2x2 merge is a reshape."""
    num_rows, num_patches, dim = features.shape
    return features.reshape(num_rows, num_patches // MERGED_PATCHES, MERGED_PATCHES * dim)
