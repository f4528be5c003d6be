"""The text loss in memory that does not grow with the vocabulary, at the cost of the supervised positions alone.

Logits of the size [B, T, V] never exist, and positions without a target have none at all: of a row of questions about
images a tenth is supervised. The supervised positions are moved together and read in chunks; while a chunk's logits are
at hand its gradients are taken too, so that nothing is kept for, or computed again in, the backward pass (the idea of
Liger Kernel's fused linear cross-entropy, arXiv 2410.10989).

On a mesh every device reads its own positions against its part of the vocabulary, so the table is gathered once and its
gradient summed once, whatever the number of chunks; left to the compiler, both would happen in every chunk.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from unihetero_jax.arrays import typechecked
from unihetero_jax.sharding import by_device, max_over, own_part, sum_over, sum_to_parts

POSITIONS = ("batch", "sequence")
TABLE = ("vocab", "embed")


@typechecked
def text_nll(
    hidden: Float[Array, "B T D"],
    unembedding: Float[Array, "V D"],
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    chunk: int,
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """Negative log-likelihood of the supervised tokens, `-log p(tokens[t] | positions before t)`.

    Args:
        hidden: final hidden states; that at t - 1 predicts the token at t.
        unembedding: float32, cast to the dtype of `hidden` at use; logits are float32.
        tokens: token ids.
        mask: which tokens are targets. Position 0 has no predecessor and is none.
        chunk: supervised positions of a device whose logits exist at one time.

    Returns:
        Their sum, which is differentiable, and the value at each position, 0 where there is no target, which is not.
    """
    mask = mask.at[:, 0].set(False)
    # Each position gets the target that it predicts: two integers move, and no hidden state.
    found: Any = _nll(hidden, unembedding, jnp.roll(tokens, -1, axis=1), jnp.roll(mask, -1, axis=1), chunk)
    total, nll = found
    return total, jax.lax.stop_gradient(jnp.roll(nll, 1, axis=1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _nll(hidden, unembedding, targets, mask, chunk):
    """(sum, [B, T]) of the positions that have a target."""
    return _on_devices(hidden, unembedding, targets, mask, chunk, with_gradient=False)


def _nll_forward(hidden, unembedding, targets, mask, chunk):
    found = _on_devices(hidden, unembedding, targets, mask, chunk, with_gradient=True)
    return found[:2], found[2:]


def _nll_backward(chunk, gradients, cotangents):
    of_hidden, of_table = gradients
    return of_hidden * cotangents[0].astype(of_hidden.dtype), of_table * cotangents[0], None, None


_nll.defvjp(_nll_forward, _nll_backward)


def _on_devices(hidden, unembedding, targets, mask, chunk, with_gradient) -> Any:
    """Sum, values, and with `with_gradient` the gradients of the sum by `hidden` and `unembedding`."""
    states = (*POSITIONS, "replicated")
    results = ((), POSITIONS, states, TABLE) if with_gradient else ((), POSITIONS)
    one_device = functools.partial(_of_positions, chunk=chunk, with_gradient=with_gradient)
    split = by_device(one_device, (states, ("vocab", "replicated"), POSITIONS, POSITIONS), results)
    return split(hidden, unembedding.astype(hidden.dtype), targets, mask)


def _of_positions(hidden, table, targets, mask, chunk, with_gradient) -> Any:
    """A device's positions [b, t(, D)] against its part [v, D] of the vocabulary."""
    shape = mask.shape
    hidden, targets, mask = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), mask.reshape(-1)
    order = jnp.argsort(~mask, stable=True)
    chunk = min(chunk, order.size)
    padding = (0, -order.size % chunk)
    at, supervised = jnp.pad(order, padding), jnp.pad(mask[order], padding)
    found = _over_chunks(hidden[at], table, targets[at], supervised, chunk, with_gradient)
    total, nll, of_hidden, of_table = found
    place = jnp.argsort(order)
    values = sum_over(total, *POSITIONS), nll[place].reshape(shape)
    if not with_gradient:
        return values
    return *values, of_hidden[place].reshape(*shape, -1), sum_to_parts(of_table, POSITIONS, TABLE)


def _over_chunks(hidden, table, targets, mask, chunk, with_gradient) -> Any:
    """Arrays [M(, D)], supervised positions first, M a multiple of `chunk`; chunks without any are not visited."""

    def visit(number, carry):
        total, nll, hidden_gradient, table_gradient = carry
        start = number * chunk
        h, t, m = (jax.lax.dynamic_slice_in_dim(x, start, chunk) for x in (hidden, targets, mask))
        logits = jnp.einsum("md,vd->mv", h, table, preferred_element_type=jnp.float32)
        highest = max_over(jnp.max(logits, axis=-1, keepdims=True), "vocab")
        weights = jnp.exp(logits - highest)
        normaliser = sum_over(jnp.sum(weights, axis=-1, keepdims=True), "vocab")
        own, is_own = own_part(t, table.shape[0], "vocab")
        picked = jnp.where(is_own, jnp.take_along_axis(logits, own[:, None], axis=-1)[:, 0], 0.0)
        part = jnp.where(m, (jnp.log(normaliser) + highest)[:, 0] - sum_over(picked, "vocab"), 0.0)
        nll = jax.lax.dynamic_update_slice_in_dim(nll, part, start, axis=0)
        if with_gradient:
            # The gradient of logits is softmax - onehot(target); the second part is rows taken, and rows added.
            probabilities = jnp.where(m[:, None], weights / normaliser, 0.0).astype(h.dtype)
            h = jnp.where(m[:, None], h, 0)
            is_target = (m & is_own)[:, None]
            towards = probabilities @ table - jnp.where(is_target, table[own], 0)
            hidden_gradient = jax.lax.dynamic_update_slice_in_dim(
                hidden_gradient, sum_over(towards, "vocab"), start, axis=0
            )
            table_gradient += jnp.einsum("mv,md->vd", probabilities, h, preferred_element_type=jnp.float32)
            table_gradient = table_gradient.at[own].add(-jnp.where(is_target, h, 0).astype(jnp.float32))
        return total + jnp.sum(part), nll, hidden_gradient, table_gradient

    nothing = jnp.zeros(0)
    carry = (
        jnp.zeros((), jnp.float32),
        jnp.zeros(mask.shape, jnp.float32),
        jnp.zeros_like(hidden) if with_gradient else nothing,
        jnp.zeros(table.shape, jnp.float32) if with_gradient else nothing,
    )
    # The same number on all devices: those that share positions meet in every chunk.
    num_chunks = max_over(-(-jnp.sum(mask) // chunk), *POSITIONS)
    return jax.lax.fori_loop(0, num_chunks, visit, carry)
