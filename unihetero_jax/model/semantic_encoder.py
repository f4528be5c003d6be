"""Semantic Encoder: merged visual features to the language model's input embeddings `z`."""

from flax import nnx
from jaxtyping import Array, Float, Int

from unihetero_jax.arrays import typechecked
from unihetero_jax.config import ModelConfig, has_cross_attention, has_queries
from unihetero_jax.model.connectors import GatedCrossAttention, QueryConnector
from unihetero_jax.model.layers import MLP, ParamKeys, RMSNorm, stack_layers


class Projector(nnx.Module):
    """`z = RMSNorm(MLP(merge(e)))`, or queries in the MLP's place (`model/connectors.py`).

    Gated layers of the language model, where there are such, belong to it: they are the connector that trains when the
    language model is frozen.

    The norm is our choice: it fixes the scale of z, so that a target trained by direction alone (cosine) can be turned
    back into an input, and visual inputs start at the scale of token embeddings.
    """

    def __init__(self, config: ModelConfig, keys: ParamKeys):
        merged_dim, dim = 4 * config.encoder.dim, config.decoder.dim
        output_rms = config.projector.output_rms or token_embedding_rms(config)
        if has_queries(config):
            self.queries = QueryConnector(config, keys.child("queries"))
        else:
            self.mlp = MLP(merged_dim, config.projector.hidden_dim, dim, ("vision_embed", "embed"), keys.child("mlp"))
        self.norm = RMSNorm(dim, config.decoder.norm_eps, keys.child("norm"), gain_init=output_rms)
        self.has_queries = has_queries(config)
        self.gated = _gated_layers(config, keys.child("gated")) if has_cross_attention(config) else None

    @typechecked
    def __call__(
        self, merged: Float[Array, "B U M"], patch_segment_ids: Int[Array, "B P"], patch_coords: Int[Array, "B P 2"]
    ) -> Float[Array, "B U D"]:
        """Of whole images: their merged features, which patches are of one image, and where they lie in it."""
        if self.has_queries:
            return self.norm(self.queries(merged, patch_segment_ids, patch_coords))
        return self.of_blocks(merged)

    @typechecked
    def of_blocks(self, merged: Float[Array, "*batch M"]) -> Float[Array, "*batch D"]:
        """Of any blocks, each by itself; a connector with queries has no such thing."""
        assert not self.has_queries
        return self.norm(self.mlp(merged))

    @typechecked
    def rescale(self, direction: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Gives a vector known up to scale the length that the output norm would give it.

        The norm's output divided by its gain has RMS 1 in every case; so the scale is 1 / rms(direction / gain).
        """
        unit = direction / self.norm.gain[...].astype(direction.dtype)
        return direction / ((unit * unit).mean(axis=-1, keepdims=True) + self.norm.eps) ** 0.5


def _gated_layers(config: ModelConfig, keys: ParamKeys) -> GatedCrossAttention:
    return stack_layers(lambda k: GatedCrossAttention(config.decoder, k), config.decoder.num_layers, keys)


def token_embedding_rms(config: ModelConfig) -> float:
    """RMS of the token embeddings at initialisation; D^-1/2 keeps tied logits at unit variance (our choice)."""
    return config.decoder.dim**-0.5
