"""The text loss in memory that does not grow with the vocabulary, at the cost of the supervised positions alone.

Logits of the size [B, T, V] never exist, and positions without a target have none at all: of a row of questions about
images a tenth is supervised. The supervised positions are moved together and read in chunks; while a chunk's logits are
at hand its gradients are taken too, so that nothing is kept for, or computed again in, the backward pass (the idea of
Liger Kernel's fused linear cross-entropy, arXiv 2410.10989).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from unihetero_jax.arrays import typechecked


@typechecked
def text_nll(
    hidden: Float[Array, "B T D"],
    unembedding: Float[Array, "V D"],
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    chunk: int,
    num_row_shards: int = 1,
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """Negative log-likelihood of the supervised tokens, `-log p(tokens[t] | positions before t)`.

    Args:
        hidden: final hidden states; that at t - 1 predicts the token at t.
        unembedding: float32, cast to the dtype of `hidden` at use; logits are float32.
        tokens: token ids.
        mask: which tokens are targets. Position 0 has no predecessor and is none.
        chunk: supervised positions, per shard of rows, whose logits exist at one time.
        num_row_shards: parts into which the rows are split over devices; positions are moved within a part only.

    Returns:
        Their sum, which is differentiable, and the value at each position, 0 where there is no target, which is not.
    """
    num_rows, length, _ = hidden.shape
    mask = mask.at[:, 0].set(False)

    def by_shard(x: jax.Array) -> jax.Array:
        return x.reshape(num_row_shards, num_rows // num_row_shards * length, *x.shape[2:])

    order = jnp.argsort(~by_shard(mask), axis=1, stable=True)
    num_positions = order.shape[1]
    chunk = min(chunk, num_positions)
    padding = ((0, 0), (0, -num_positions % chunk))
    at = jnp.pad(order, padding)
    supervised = jnp.pad(jnp.take_along_axis(by_shard(mask), order, axis=1), padding)
    targets = jnp.take_along_axis(by_shard(tokens), at, axis=1)
    predictors = jnp.take_along_axis(by_shard(hidden), jnp.maximum(at - 1, 0)[..., None], axis=1)
    found: Any = _nll(predictors, unembedding, targets, supervised, chunk)
    total, nll = found
    place = jnp.argsort(order, axis=1)
    return total, jax.lax.stop_gradient(jnp.take_along_axis(nll, place, axis=1)).reshape(num_rows, length)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _nll(hidden, unembedding, targets, mask, chunk):
    """Arrays [R, M(, D)], supervised positions first, M a multiple of `chunk`: (sum, [R, M])."""
    return _over_chunks(hidden, unembedding, targets, mask, chunk, with_gradient=False)[:2]


def _nll_forward(hidden, unembedding, targets, mask, chunk):
    found = _over_chunks(hidden, unembedding, targets, mask, chunk, with_gradient=True)
    return found[:2], found[2:]


def _nll_backward(chunk, gradients, cotangents):
    of_hidden, of_table = gradients
    return of_hidden * cotangents[0].astype(of_hidden.dtype), of_table * cotangents[0], None, None


_nll.defvjp(_nll_forward, _nll_backward)


def _over_chunks(hidden, unembedding, targets, mask, chunk, with_gradient) -> Any:
    """Sum, values, and with `with_gradient` the gradients of the sum; chunks without a target are not visited."""
    table = unembedding.astype(hidden.dtype)

    def visit(number, carry):
        total, nll, hidden_gradient, table_gradient = carry
        start = number * chunk
        h, t, m = (jax.lax.dynamic_slice_in_dim(x, start, chunk, axis=1) for x in (hidden, targets, mask))
        logits = jnp.einsum("rmd,vd->rmv", h, table, preferred_element_type=jnp.float32)
        log_normaliser = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, t[..., None], axis=-1)[..., 0]
        part = jnp.where(m, log_normaliser - picked, 0.0)
        nll = jax.lax.dynamic_update_slice_in_dim(nll, part, start, axis=1)
        if with_gradient:
            # The gradient of logits is softmax - onehot(target); the second part is rows taken, and rows added.
            probabilities = jnp.where(m[..., None], jnp.exp(logits - log_normaliser[..., None]), 0.0).astype(h.dtype)
            h = jnp.where(m[..., None], h, 0)
            towards = jnp.einsum("rmv,vd->rmd", probabilities, table) - jnp.where(m[..., None], table[t], 0)
            hidden_gradient = jax.lax.dynamic_update_slice_in_dim(hidden_gradient, towards, start, axis=1)
            table_gradient += jnp.einsum("rmv,rmd->vd", probabilities, h, preferred_element_type=jnp.float32)
            table_gradient = table_gradient.at[t].add(-h.astype(jnp.float32))
        return total + jnp.sum(part), nll, hidden_gradient, table_gradient

    nothing = jnp.zeros(0)
    carry = (
        jnp.zeros((), jnp.float32),
        jnp.zeros(mask.shape, jnp.float32),
        jnp.zeros_like(hidden) if with_gradient else nothing,
        jnp.zeros(unembedding.shape, jnp.float32) if with_gradient else nothing,
    )
    num_chunks = -(-jnp.max(jnp.sum(mask, axis=1)) // chunk)
    return jax.lax.fori_loop(0, num_chunks, visit, carry)
