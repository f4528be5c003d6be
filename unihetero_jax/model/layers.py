"""Building blocks: parameters by path, linear maps, norms, feed-forward parts, and the scan over stacked layers."""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from unihetero_jax.arrays import typechecked
from unihetero_jax.config import Activation, Remat
from unihetero_jax.sharding import by_device, own_part, sum_over, sum_to_parts

Module = TypeVar("Module", bound=nnx.Module)

UNROLL_UP_TO = 4
"""Stacks of at most this many layers are unrolled: a fifth faster on CPUs, and compile time only grows with depth."""


@dataclasses.dataclass(frozen=True)
class ParamKeys:
    """A random key per parameter *path*: a parameter's initial value depends on the seed and its own name alone.

    So two models that share a component start with bit-identical values in it, whatever else they contain; comparing
    objectives from the same initialisation rests on this.
    """

    key: jax.Array

    def child(self, name: str) -> "ParamKeys":
        return ParamKeys(jax.random.fold_in(self.key, zlib.crc32(name.encode())))


def parameter(
    keys: ParamKeys, name: str, shape: tuple[int, ...], init: Callable[..., jax.Array], axes: tuple[str, ...]
) -> nnx.Param:
    """A float32 parameter with its logical axes (see `sharding.LOGICAL_RULES`), one per dimension."""
    assert len(shape) == len(axes), (name, shape, axes)
    return nnx.Param(init(keys.child(name).key, shape, jnp.float32), logical_axes=axes)


def scaled_normal(fan_in: int) -> Callable[..., jax.Array]:
    """Truncated normal with standard deviation fan_in^-1/2 (LeCun et al. 1998): unit variance in, unit variance out."""
    return nnx.initializers.truncated_normal(stddev=fan_in**-0.5)


class Linear(nnx.Module):
    """`y = x W + b`. Parameters are float32 and cast to the activation's dtype at use."""

    def __init__(self, in_dim: int, out_dim: int, axes: tuple[str, str], keys: ParamKeys, use_bias: bool = False):
        self.kernel = parameter(keys, "kernel", (in_dim, out_dim), scaled_normal(in_dim), axes)
        self.bias = parameter(keys, "bias", (out_dim,), nnx.initializers.zeros, axes[1:]) if use_bias else None

    @typechecked
    def __call__(self, x: Float[Array, "*batch i"]) -> Float[Array, "*batch o"]:
        # One flat row dimension: with several, XLA's CPU backend computes the kernel's gradient far slower.
        y = (x.reshape(-1, x.shape[-1]) @ self.kernel[...].astype(x.dtype)).reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm (arXiv 1910.07467), computed in float32. `gain_init` is the RMS of its output at start."""

    def __init__(self, dim: int, eps: float, keys: ParamKeys, gain_init: float = 1.0):
        self.gain = parameter(keys, "gain", (dim,), nnx.initializers.constant(gain_init), ("replicated",))
        self.eps = eps

    @typechecked
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * scale * self.gain[...]).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm with gain and bias (arXiv 1607.06450), computed in float32."""

    def __init__(self, dim: int, eps: float, keys: ParamKeys):
        self.gain = parameter(keys, "gain", (dim,), nnx.initializers.ones, ("replicated",))
        self.bias = parameter(keys, "bias", (dim,), nnx.initializers.zeros, ("replicated",))
        self.eps = eps

    @typechecked
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        scale = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.eps)
        return (centred * scale * self.gain[...] + self.bias[...]).astype(x.dtype)


class MLP(nnx.Module):
    """Two layers with biases; tanh-approximated GELU unless said otherwise (SigLIP's choice)."""

    def __init__(
        self,
        in_dim: int,
        hidden_dim: int,
        out_dim: int,
        axes: tuple[str, str],
        keys: ParamKeys,
        activation: Activation = "gelu_tanh",
    ):
        self.activation: Activation = activation
        self.up = Linear(in_dim, hidden_dim, (axes[0], "mlp"), keys.child("up"), use_bias=True)
        self.down = Linear(hidden_dim, out_dim, ("mlp", axes[1]), keys.child("down"), use_bias=True)

    @typechecked
    def __call__(self, x: Float[Array, "*batch i"]) -> Float[Array, "*batch o"]:
        return self.down(activate(self.up(x), self.activation))


def activate(x: jax.Array, activation: Activation) -> jax.Array:
    """The activation by name; `quick_gelu` is x sigmoid(1.702 x), as OpenAI's CLIP has it."""
    match activation:
        case "gelu_tanh":
            return jax.nn.gelu(x, approximate=True)
        case "gelu":
            return jax.nn.gelu(x, approximate=False)
        case "quick_gelu":
            return x * jax.nn.sigmoid(1.702 * x)


class GatedMLP(nnx.Module):
    """`down(silu(gate(x)) * up(x))` without biases (SwiGLU, arXiv 2002.05202), as in Llama and Qwen."""

    def __init__(self, dim: int, hidden_dim: int, keys: ParamKeys):
        self.gate = Linear(dim, hidden_dim, ("embed", "mlp"), keys.child("gate"))
        self.up = Linear(dim, hidden_dim, ("embed", "mlp"), keys.child("up"))
        self.down = Linear(hidden_dim, dim, ("mlp", "embed"), keys.child("down"))

    @typechecked
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def lookup(table: jax.Array, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows `[B, S, D]` of a table `float32[V, D]` of logical axes vocab and embed, in `dtype`.

    On a mesh every device gathers the table's width once and looks up its own positions; a compiler that has to bring a
    row split by width and a batch split by rows together copies everything to every device instead.
    """
    rows = (*_POSITIONS, "replicated")
    return by_device(_own_rows, (("vocab", "replicated"), _POSITIONS), (rows,))(table.astype(dtype), ids)[0]


_POSITIONS = ("batch", "sequence")


def _own_rows(table: jax.Array, ids: jax.Array) -> tuple[jax.Array]:
    place, is_own = own_part(ids, table.shape[0], "vocab")
    return (sum_over(jnp.where(is_own[..., None], table[place], 0), "vocab"),)


def _lookup_forward(table: jax.Array, ids: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, Any]:
    return lookup(table, ids, dtype), (table, ids)


def _lookup_backward(dtype: jnp.dtype, residuals: Any, gradient: jax.Array) -> tuple[jax.Array, None]:
    table, ids = residuals

    def add(like: jax.Array, ids: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
        place, is_own = own_part(ids, like.shape[0], "vocab")
        rows = jnp.where(is_own[..., None], gradient, 0).astype(jnp.float32)
        total = jnp.zeros((like.shape[0], rows.shape[-1]), jnp.float32).at[place].add(rows)
        return (sum_to_parts(total, _POSITIONS, ("vocab", "embed")),)

    in_axes = (("vocab", "embed"), _POSITIONS, (*_POSITIONS, "replicated"))
    return by_device(add, in_axes, (("vocab", "embed"),))(table, ids, gradient)[0], None


lookup.defvjp(_lookup_forward, _lookup_backward)


def stack_layers(make: Callable[[ParamKeys], Module], num_layers: int, keys: ParamKeys, first: int = 0) -> Module:
    """One module whose parameters have a leading layer axis; each layer has its own keys, from `first` on."""
    layer_keys = jnp.stack([keys.child(str(i)).key for i in range(first, num_layers)])
    return nnx.vmap(lambda key: make(ParamKeys(key)))(layer_keys)


def layers_between(blocks: Module, start: int, stop: int) -> Module:
    """Some of stacked layers; all of them are `blocks` itself."""
    graphdef, state = nnx.split(blocks)
    if stop - start == jax.tree.leaves(state)[0].shape[0]:
        return blocks
    return nnx.merge(graphdef, jax.tree.map(lambda x: x[start:stop], state))


def scan_layers(blocks: nnx.Module, carry: Any, call: Callable[..., Any], remat: Remat, per_layer: Any = None) -> Any:
    """Applies stacked layers in order, compiled once: `carry, out = call(layer, carry, per_layer[i])`.

    Args:
        blocks: from `stack_layers`.
        carry: what flows through the layers.
        call: applies one layer.
        remat: what the backward pass recomputes: `none`, everything but matrix products (`dots`), or all (`full`).
        per_layer: arrays with a leading layer axis (a cache), or None.

    Returns:
        The final carry and the stacked `out`.
    """
    graphdef, state = nnx.split(blocks)

    def body(carry, scanned):
        layer_state, layer_input = scanned
        return call(nnx.merge(graphdef, layer_state), carry, layer_input)

    num_layers = jax.tree.leaves(state)[0].shape[0]
    unroll = num_layers if num_layers <= UNROLL_UP_TO else 1
    return jax.lax.scan(_rematerialised(body, remat), carry, (state, per_layer), unroll=unroll)


def _rematerialised(body: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    match remat:
        case "none":
            return body
        case "dots":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            return jax.checkpoint(body, policy=policy, prevent_cse=False)
        case "full":
            return jax.checkpoint(body, prevent_cse=False)
