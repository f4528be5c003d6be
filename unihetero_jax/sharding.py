"""Where arrays live: the mesh, the rules from logical to mesh axes, shardings of state and batch.

What was `pjit` is today `jax.jit` over arrays that carry shardings: parameters are born sharded, the batch is sharded
by rows, and the compiler inserts the collectives. The model only *names* its dimensions (logical axes); this table
decides what they mean on a mesh.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from unihetero_jax.arrays import Batch
from unihetero_jax.config import MeshConfig

MESH_AXES = ("data", "fsdp", "tensor", "context")
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
"""Logical axis -> mesh axis. FSDP splits the width of parameters, tensor parallelism their heads and hidden units,
context parallelism the positions of the language model's rows; the encoder's patches are repeated over `context`."""

IN_PIECES_ABOVE = 2**28
"""Bytes of a sum over devices that is made at once; see `_scatter_sum`."""

_mesh: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("mesh", default=None)
_by_hand: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("by_hand", default=None)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over the first data x fsdp x tensor x context devices, with Auto axis types.

    Under Explicit axes, which jax makes by default, an embedding lookup is refused; so the types are named. With
    several slices, `data` is the axis that crosses them: only gradients travel over the data-centre network.

    Raises:
        ValueError: if there are fewer devices than the mesh needs, or other slices than it names.
    """
    shape = (config.data, config.fsdp, config.tensor, config.context)
    devices = jax.devices() if devices is None else devices
    needed = int(np.prod(shape))
    if needed > len(devices):
        raise ValueError(
            f"mesh {dict(zip(MESH_AXES, shape, strict=True))} needs {needed} devices, this process sees "
            f"{len(devices)}; lower mesh.data, mesh.fsdp, mesh.tensor or mesh.context"
        )
    if needed < len(devices) and len({device.process_index for device in devices}) > 1:
        raise ValueError(
            f"mesh {dict(zip(MESH_AXES, shape, strict=True))} uses {needed} of {len(devices)} devices; a run of "
            "several processes uses all of them"
        )
    types = (AxisType.Auto,) * len(MESH_AXES)
    if config.num_slices == 1:
        # Not `jax.make_mesh`: it lets one mesh axis cover part of a physical one on v5e only.
        grid = mesh_utils.create_device_mesh(shape, devices[:needed], allow_split_physical_axes=True)
        return Mesh(grid, MESH_AXES, axis_types=types)
    return Mesh(_grid_of_slices(shape, config.num_slices, devices[:needed]), MESH_AXES, axis_types=types)


def _grid_of_slices(shape: tuple[int, ...], num_slices: int, devices: Sequence[Any]) -> np.ndarray:
    """Devices of a mesh whose first axis runs over the slices, and then within each."""
    within = (shape[0] // num_slices, *shape[1:])
    found = {getattr(device, "slice_index", None) for device in devices}
    if len(found) == num_slices:
        between = (num_slices, *(1 for _ in shape[1:]))
        return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
    if devices[0].platform == "tpu":
        raise ValueError(f"mesh.num_slices {num_slices}: the devices are of {len(found)} slices; set it to that")
    # Only TPUs say what slice they are in; elsewhere the order of the devices is that of the hosts.
    parts = np.array(devices, dtype=object).reshape(num_slices, -1)
    return np.concatenate([mesh_utils.create_device_mesh(within, list(part)) for part in parts])


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


def bytes_per_device(tree: Any) -> int:
    """Of arrays given by shape, dtype and sharding."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


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


class Vote:
    """The highest of a number that each process gives, the same for all: how they agree to stop after the same step.

    It is a step behind, so that no device is waited for; a run of one process hears itself at once.
    """

    def __init__(self, mesh: Mesh):
        self._sharding = NamedSharding(mesh, PartitionSpec(MESH_AXES))
        self._highest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._pending: jax.Array | None = None
        self._is_alone = jax.process_count() == 1

    def highest(self, own: int) -> int:
        """Gives this process's number; to be called by all of them equally often."""
        if self._is_alone:
            return own
        previous = self._pending
        votes = np.full(self._sharding.mesh.size, own, np.int32)
        given = jax.make_array_from_callback(votes.shape, self._sharding, lambda index: votes[index])
        self._pending = self._highest(given)
        return 0 if previous is None else int(previous)


def fetch(x: jax.Array) -> np.ndarray:
    """The whole of an array on the host of every process, whatever parts of it their devices hold."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


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


def by_device(
    function: Callable[..., Any], in_axes: Sequence[tuple[str, ...]], out_axes: Sequence[tuple[str, ...]]
) -> Callable[..., Any]:
    """`function` of the part of each argument that a device holds, under the mesh in force; without one, of the whole.

    Where the compiler would choose badly, this fixes what is computed where and what travels. Within `function`,
    `sum_over` and its relatives combine the parts.

    Args:
        function: arrays in, tuple of arrays out.
        in_axes: logical axes of each argument; one that a device needs whole is `replicated` there.
        out_axes: those of each result. A result is the same on the devices along mesh axes that it does not name.
    """
    mesh = _mesh.get()
    if mesh is None or mesh.size == 1:
        return function

    def on_one(*parts: jax.Array) -> Any:
        token = _by_hand.set(mesh)
        try:
            return function(*parts)
        finally:
            _by_hand.reset(token)

    specs = [tuple(partition_spec(axes) for axes in group) for group in (in_axes, out_axes)]
    return jax.shard_map(on_one, mesh=mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False)


def sum_over(x: jax.Array, *logical_axes: str) -> jax.Array:
    """Within `by_device`: the sum over the devices that these axes are split over."""
    axes = _mesh_axes(logical_axes)
    return jax.lax.psum(x, axes) if axes else x


def max_over(x: jax.Array, *logical_axes: str) -> jax.Array:
    """Within `by_device`: the maximum over the devices that these axes are split over."""
    axes = _mesh_axes(logical_axes)
    return jax.lax.pmax(x, axes) if axes else x


def own_part(index: jax.Array, num_own: int, logical_axis: str) -> tuple[jax.Array, jax.Array]:
    """Within `by_device`: where global indices lie in the device's part of an axis.

    Args:
        index: indices along the whole axis.
        num_own: length of the device's part.
        logical_axis: the axis.

    Returns:
        Indices into the part, 0 for those that lie elsewhere; and which do not.
    """
    axes = _mesh_axes((logical_axis,))
    place = index - (jax.lax.axis_index(axes) * num_own if axes else 0)
    is_own = (place >= 0) & (place < num_own)
    return jnp.where(is_own, place, 0), is_own


def sum_to_parts(x: jax.Array, over: Sequence[str], axes: tuple[str, ...]) -> jax.Array:
    """Within `by_device`: the sum over the devices along `over`, of which each keeps the part that `axes` give it.

    Args:
        x: a whole array but for dimensions that are split along other mesh axes than those of `over`.
        over: logical axes.
        axes: logical axes of x.
    """
    spec = partition_spec(axes)
    dims = {name: [i for i, entry in enumerate(spec) if name in ((entry,) if isinstance(entry, str) else entry or ())]
            for name in _mesh_axes(over)}  # fmt: skip
    for name, split in sorted(dims.items(), key=lambda item: not item[1]):  # first those that leave less to be summed
        if split:
            x = _scatter_sum(x, name, split[0])
        else:
            x = jax.lax.psum(x, name)
    return x


def _scatter_sum(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """The sum over the devices along a mesh axis, of which each keeps its part of dimension `dim`.

    The parts are laid one after another before they are sent: of others XLA's TPU compiler sums the whole array. That
    is a copy, so a large array (a token table's gradient) goes in pieces of its first dimension.
    """
    if dim == 0:
        return jax.lax.psum_scatter(x, axis, scatter_dimension=0, tiled=True)
    num_devices = jax.lax.axis_size(axis)

    def of_piece(piece: jax.Array) -> jax.Array:
        parts = piece.reshape(*piece.shape[:dim], num_devices, -1, *piece.shape[dim + 1 :])
        return jax.lax.psum_scatter(jnp.moveaxis(parts, dim, 0), axis)

    is_large = x.nbytes > IN_PIECES_ABOVE
    num_pieces = next(n for n in (16, 8, 4, 2, 1) if x.shape[0] % (8 * n) == 0 or n == 1) if is_large else 1
    if num_pieces == 1:
        return of_piece(x)
    pieces = jax.lax.map(of_piece, x.reshape(num_pieces, -1, *x.shape[1:]))
    return pieces.reshape(x.shape[0], *pieces.shape[2:])


def _mesh_axes(logical_axes: Sequence[str]) -> tuple[str, ...]:
    """Mesh axes that these logical axes are split over, where arrays are handled by the device's part."""
    if _by_hand.get() is None:
        return ()
    targets = [LOGICAL_RULES[name] or () for name in logical_axes]
    return tuple(axis for target in targets for axis in ((target,) if isinstance(target, str) else target))


def current_platform() -> str | None:
    """Platform of the devices that the step is compiled for (`cpu`, `gpu`, `tpu`); None where no mesh is in force.

    Not `jax.default_backend()`: a step may be compiled on one machine for the devices of another.
    """
    mesh = _mesh.get()
    return None if mesh is None else mesh.devices.flat[0].platform
