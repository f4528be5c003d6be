"""Where arrays live: the mesh, the rules from logical to mesh axes, shardings of state and batch.

What was `pjit` is today `jax.jit` over arrays that carry shardings: parameters are born sharded, the batch is sharded
by rows, and the compiler inserts the collectives. The model only *names* its dimensions (logical axes); this table
decides what they mean on a mesh.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from unihetero_jax.arrays import Batch
from unihetero_jax.config import MeshConfig

ROWS = ("data", "fsdp")
"""Mesh axes over which the rows of a batch are split."""

LOGICAL_RULES: Mapping[str, str | tuple[str, ...] | None] = {
    "batch": ROWS,
    "sequence": "context",
    "embed": "fsdp",
    "vision_embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "layers": None,
    "replicated": None,
}
"""Logical axis -> mesh axis. FSDP splits the width of parameters, tensor parallelism their heads and hidden units."""

_mesh: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("mesh", default=None)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over the first data x fsdp x tensor x context devices, with Auto axis types.

    `jax.make_mesh` defaults to Explicit axes, under which an embedding lookup is refused; so the types are named.

    Raises:
        ValueError: if there are fewer devices than the mesh needs.
    """
    shape = (config.data, config.fsdp, config.tensor, config.context)
    names = ("data", "fsdp", "tensor", "context")
    devices = jax.devices() if devices is None else devices
    needed = int(np.prod(shape))
    if needed > len(devices):
        raise ValueError(
            f"mesh {dict(zip(names, shape, strict=True))} needs {needed} devices, this process sees {len(devices)}; "
            "lower mesh.data, mesh.fsdp or mesh.tensor"
        )
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names), devices=devices[:needed])


def partition_spec(logical_axes: tuple[str, ...]) -> PartitionSpec:
    """The mesh axes of an array whose dimensions have these logical names.

    A mesh axis is used once: of two dimensions that map to the same one, the first gets it.
    """
    used: set[str] = set()
    entries = []
    for name in logical_axes:
        target = LOGICAL_RULES[name]
        axes = (target,) if isinstance(target, str) else (target or ())
        free = tuple(axis for axis in axes if axis not in used)
        used.update(free)
        entries.append(free[0] if len(free) == 1 else (free or None))
    return PartitionSpec(*entries)


def shardings_for(logical_axes: Any, mesh: Mesh, replicates: bool = False) -> Any:
    """Named shardings for a tree whose leaves are tuples of logical axis names.

    With `replicates`, every array has a leading replicate axis; that axis is split over `data` and nothing else is.
    """

    def sharding(axes: tuple[str, ...]) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec("data") if replicates else partition_spec(axes))

    return jax.tree.map(sharding, logical_axes, is_leaf=lambda x: isinstance(x, tuple))


def batch_sharding(mesh: Mesh, replicates: bool = False) -> NamedSharding:
    """Rows over data and fsdp; with replicates every model sees the whole batch."""
    return NamedSharding(mesh, PartitionSpec() if replicates else PartitionSpec(ROWS))


def local_rows(mesh: Mesh, num_rows: int, replicates: bool = False) -> list[int]:
    """The rows of a global batch that this process's devices hold; these and no others it has to load."""
    index_map = batch_sharding(mesh, replicates).addressable_devices_indices_map((num_rows,))
    rows: set[int] = set()
    for index in index_map.values():
        rows.update(range(*(index[0] if index else slice(None)).indices(num_rows)))
    return sorted(rows)


def to_global(arrays: Mapping[str, np.ndarray], mesh: Mesh, replicates: bool = False) -> Batch:
    """Turns this process's rows into one global batch on the mesh."""
    sharding = batch_sharding(mesh, replicates)
    return Batch(**{name: jax.make_array_from_process_local_data(sharding, value) for name, value in arrays.items()})


@contextlib.contextmanager
def activation_mesh(mesh: Mesh | None) -> Iterator[None]:
    """While a step is traced inside, `constrain` pins activations to this mesh; outside it does nothing."""
    token = _mesh.set(mesh)
    try:
        yield
    finally:
        _mesh.reset(token)


def constrain(x: jax.Array, *logical_axes: str) -> jax.Array:
    """Pins an activation's layout by logical axis names, where a mesh is in force."""
    mesh = _mesh.get()
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, partition_spec(logical_axes)))


def current_platform() -> str | None:
    """Platform of the devices that the step is compiled for (`cpu`, `gpu`, `tpu`); None where no mesh is in force.

    Not `jax.default_backend()`: a step may be compiled on one machine for the devices of another.
    """
    mesh = _mesh.get()
    return None if mesh is None else mesh.devices.flat[0].platform


def map_over_devices(
    function: Callable[..., jax.Array], in_axes: Sequence[tuple[str, ...]], out_axes: tuple[str, ...]
) -> Callable[..., jax.Array]:
    """Lets every device apply `function` to its own part of the arrays, where a mesh is in force.

    For what the compiler cannot partition, such as a kernel. A dimension is split by its logical axis; what is not
    split is gathered first, and its gradient is summed over the devices that shared it.

    Args:
        function: of arrays; must not depend on what is on other devices.
        in_axes: logical axis names of each argument's dimensions.
        out_axes: those of the result.
    """
    mesh = _mesh.get()
    if mesh is None:
        return function
    in_specs, out_specs = tuple(map(partition_spec, in_axes)), partition_spec(out_axes)
    # A kernel's results carry no record of the axes over which they vary, so that cannot be checked.
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
