"""Generation Head: the embedding at t + 1 from the hidden state at t, by regression or by flow matching."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from unihetero_jax.arrays import TargetStatistics, typechecked
from unihetero_jax.config import SemanticHeadConfig, head_widths
from unihetero_jax.model.layers import MLP, ParamKeys, parameter

_MIN_VARIANCE = 1e-6


class SemanticHead(nnx.Module):
    """A two-layer MLP. `target_dim` is the width of the target space: D for input embeddings, 4E for encoder output.

    A flow head reads the hidden state, the noisy embedding and tau, and predicts `eps - y_0`; its hidden layer is
    narrower by as much as its input is wider, so that heads of both kinds have equally many weights.
    """

    def __init__(self, config: SemanticHeadConfig, dim: int, target_dim: int, keys: ParamKeys):
        self.config, self.target_dim = config, target_dim
        in_dim, hidden_dim = head_widths(config, dim, target_dim)
        self.mlp = MLP(in_dim, hidden_dim, target_dim, ("embed", "embed"), keys.child("mlp"))
        if config.standardise_targets:
            constant, axes = nnx.initializers.constant, ("replicated",)
            self.target_mean = parameter(keys, "target_mean", (target_dim,), constant(0.0), axes)
            self.target_square = parameter(keys, "target_square", (target_dim,), constant(1.0), axes)

    @typechecked
    def __call__(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch Z"]:
        """The predicted target, standardised if targets are; of a regression head."""
        assert self.config.kind == "regression"
        return self.mlp(hidden)

    @typechecked
    def velocity(
        self, hidden: Float[Array, "*batch D"], noisy: Float[Array, "*batch Z"], tau: Float[Array, "*batch"]
    ) -> Float[Array, "*batch Z"]:
        """Of a flow head: `eps - y_0` where the embedding, with a share tau of noise, is `noisy`."""
        assert self.config.kind == "flow"
        parts = [hidden, noisy.astype(hidden.dtype), tau[..., None].astype(hidden.dtype)]
        return self.mlp(jnp.concatenate(parts, axis=-1))

    @typechecked
    def draw(self, hidden: Float[Array, "*batch D"], key: PRNGKeyArray) -> Float[Array, "*batch Z"]:
        """A predicted target in its own space: by regression, or drawn from noise in `flow_steps` Euler steps."""
        if self.config.kind == "regression":
            return self.destandardised(self.mlp(hidden))
        steps = self.config.flow_steps
        noise = jax.random.normal(key, (*hidden.shape[:-1], self.target_dim), jnp.float32)

        def euler(number: jax.Array, y: jax.Array) -> jax.Array:
            tau = jnp.full(hidden.shape[:-1], 1.0 - number / steps, jnp.float32)
            return y - self.velocity(hidden, y, tau).astype(jnp.float32) / steps

        return self.destandardised(jax.lax.fori_loop(0, steps, euler, noise).astype(hidden.dtype))

    @property
    def statistics(self) -> TargetStatistics | None:
        """Running mean and deviation of the targets, without gradient; None where they are not standardised."""
        if not self.config.standardise_targets:
            return None
        mean, square = (jax.lax.stop_gradient(x[...]) for x in (self.target_mean, self.target_square))
        return TargetStatistics(mean, jnp.sqrt(jnp.maximum(square - mean**2, _MIN_VARIANCE)))

    def destandardised(self, predicted: jax.Array) -> jax.Array:
        """A prediction back in the space of the targets."""
        found = self.statistics
        return predicted if found is None else (predicted * found.deviation + found.mean).astype(predicted.dtype)
