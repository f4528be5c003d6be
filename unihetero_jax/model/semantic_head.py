"""Generation Head: the embedding at t + 1 from the hidden state at t."""

from flax import nnx
from jaxtyping import Array, Float

from unihetero_jax.arrays import typechecked
from unihetero_jax.model.layers import MLP, ParamKeys


class SemanticHead(nnx.Module):
    """A two-layer MLP. `target_dim` is the width of the target space: D for input embeddings, 4E for encoder output."""

    def __init__(self, dim: int, hidden_dim: int, target_dim: int, keys: ParamKeys):
        self.mlp = MLP(dim, hidden_dim, target_dim, ("embed", "embed"), keys.child("mlp"))

    @typechecked
    def __call__(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch Z"]:
        return self.mlp(hidden)
