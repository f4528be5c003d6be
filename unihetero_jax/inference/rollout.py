"""Free-running rollout: from text and a grid, the visual embeddings of an image, each fed back as the next input."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from unihetero_jax.arrays import Batch, Cache, typechecked
from unihetero_jax.config import Config
from unihetero_jax.model.unihetero import Params, UniHetero, build


@functools.partial(jax.jit, static_argnames=("config", "num_tokens"))
@typechecked
def rollout(
    config: Config,
    params: Params,
    batch: Batch,
    num_tokens: int,
    key: PRNGKeyArray,
    true: Float[Array, "B N D"] | None = None,
    num_given: Int[Array, ""] | int = 0,
) -> Float[Array, "B N D"]:
    """Predicts `num_tokens` visual embeddings after prompts that end in `<boi>` with its grid.

    Args:
        config: the run's; its objective must predict something that can be fed back (input or encoder space).
        params: parameters.
        batch: one prompt per row, padded at its end; the last real position is `<boi>`, and `boi_grid` there holds the
            (height, width) asked for, whose product is `num_tokens`.
        num_tokens: N.
        key: of the noise that a flow head draws from; a regression head has no use for it.
        true: the true embeddings, of which the first `num_given` are fed instead of the predictions: with all of them
            this is teacher forcing.
        num_given: how many; one program serves all numbers.

    Returns:
        The predicted embeddings in the language model's input space.
    """
    model = build(config.model, config.objective, params)
    last, cache = prefilled(model, batch, num_tokens)
    return roll_on(model, last, cache, num_tokens, key, true, num_given)[0]


def prefilled(model: UniHetero, batch: Batch, num_new: int) -> tuple[Float[Array, "B D"], Cache]:
    """Reads prompts; the hidden state at each one's end, and a cache with room for so many positions more."""
    hidden, cache = model.prefill(batch, batch.tokens.shape[1] + num_new)
    return jnp.take_along_axis(hidden, cache.length[:, None, None] - 1, axis=1)[:, 0], cache


def roll_on(
    model: UniHetero,
    last: Float[Array, "B D"],
    cache: Cache,
    num_tokens: int,
    key: PRNGKeyArray,
    true: Float[Array, "B N D"] | None = None,
    num_given: Int[Array, ""] | int = 0,
) -> tuple[Float[Array, "B N D"], Float[Array, "B D"], Cache]:
    """The rollout from a hidden state: predictions, and the hidden state and the cache after them."""

    def step(carry, scanned):
        last, cache = carry
        number, given = scanned
        predicted = model.predict_embedding(last, jax.random.fold_in(key, number))
        fed = predicted if given is None else jnp.where(number < num_given, given.astype(predicted.dtype), predicted)
        return model.decode_step(fed, cache), predicted

    by_position = None if true is None else true[:, :num_tokens].swapaxes(0, 1)
    (last, cache), predicted = jax.lax.scan(step, (last, cache), (jnp.arange(num_tokens), by_position))
    return predicted.swapaxes(0, 1), last, cache
