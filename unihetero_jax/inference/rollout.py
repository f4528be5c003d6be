"""Free-running rollout: from text and a grid, the visual embeddings of an image, each fed back as the next input."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from unihetero_jax.arrays import Batch, typechecked
from unihetero_jax.config import Config
from unihetero_jax.model.unihetero import Params, build


@functools.partial(jax.jit, static_argnames=("config", "num_tokens"))
@typechecked
def rollout(config: Config, params: Params, batch: Batch, num_tokens: int, key: PRNGKeyArray) -> Float[Array, "B N D"]:
    """Predicts `num_tokens` visual embeddings after prompts that end in `<boi>` with its grid.

    Args:
        config: the run's; its objective must have a visual target.
        params: parameters.
        batch: one prompt per row, padded at its end; the last real position is `<boi>`, and `boi_grid` there holds the
            (height, width) asked for, whose product is `num_tokens`.
        num_tokens: N.
        key: of the noise that a flow head draws from; a regression head has no use for it.

    Returns:
        The embeddings in the language model's input space, as they were fed back.
    """
    model = build(config.model, config.objective, params)
    hidden, cache = model.prefill(batch, batch.tokens.shape[1] + num_tokens)
    last = jnp.take_along_axis(hidden, cache.length[:, None, None] - 1, axis=1)[:, 0]

    def step(carry, number):
        last, cache = carry
        embedding = model.predict_embedding(last, jax.random.fold_in(key, number))
        return model.decode_step(embedding, cache), embedding

    _, embeddings = jax.lax.scan(step, (last, cache), jnp.arange(num_tokens))
    return embeddings.swapaxes(0, 1)
