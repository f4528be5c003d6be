"""How the next token is chosen from logits."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from unihetero_jax.arrays import typechecked


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Temperature 0 is greedy. `top_p` keeps the smallest set of tokens with that probability (arXiv 1904.09751)."""

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self):
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature {self.temperature} must be >= 0 and top_p {self.top_p} in (0, 1]")


GREEDY = Sampling()


@typechecked
def sample(logits: Float[Array, "B V"], key: PRNGKeyArray, sampling: Sampling) -> Int[Array, " B"]:
    """One token per row."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(ordered), axis=-1) - jax.nn.softmax(ordered)
        lowest_kept = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < lowest_kept, -jnp.inf, logits)
    return jax.random.categorical(key, logits).astype(jnp.int32)
