"""Semantic Encoder: merged visual features to the language model's input embeddings `z`."""

from flax import nnx
from jaxtyping import Array, Float

from unihetero_jax.arrays import typechecked
from unihetero_jax.config import ModelConfig
from unihetero_jax.model.layers import MLP, ParamKeys, RMSNorm


class Projector(nnx.Module):
    """`z = RMSNorm(MLP(merge(e)))`.

    The norm is our choice: it fixes the scale of z, so that a target trained by direction alone (cosine) can be turned
    back into an input, and visual inputs start at the scale of token embeddings.
    """

    def __init__(self, config: ModelConfig, keys: ParamKeys):
        merged_dim, dim = 4 * config.encoder.dim, config.decoder.dim
        output_rms = config.projector.output_rms or token_embedding_rms(config)
        self.mlp = MLP(merged_dim, config.projector.hidden_dim, dim, ("vision_embed", "embed"), keys.child("mlp"))
        self.norm = RMSNorm(dim, config.decoder.norm_eps, keys.child("norm"), gain_init=output_rms)

    @typechecked
    def __call__(self, merged: Float[Array, "*batch M"]) -> Float[Array, "*batch D"]:
        return self.norm(self.mlp(merged))

    @typechecked
    def rescale(self, direction: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Gives a vector known up to scale the length that the output norm would give it.

        The norm's output divided by its gain has RMS 1 in every case; so the scale is 1 / rms(direction / gain).
        """
        unit = direction / self.norm.gain[...].astype(direction.dtype)
        return direction / ((unit * unit).mean(axis=-1, keepdims=True) + self.norm.eps) ** 0.5


def token_embedding_rms(config: ModelConfig) -> float:
    """RMS of the token embeddings at initialisation; D^-1/2 keeps tied logits at unit variance (our choice)."""
    return config.decoder.dim**-0.5
