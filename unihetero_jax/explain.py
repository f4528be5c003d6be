"""`explain`: every parameter and the main activations on a machine: logical axes, partition, bytes on one device.

Only the shape of the mesh matters, so any machine can be asked about from any other, and nothing is compiled.
"""

import argparse
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from unihetero_jax.command_line import parse_config_flags
from unihetero_jax.config import MERGED_PATCHES, Config
from unihetero_jax.model import unihetero
from unihetero_jax.model.attention import choose_backend
from unihetero_jax.sharding import MESH_AXES, bytes_per_device, partition_spec
from unihetero_jax.step import abstract_state
from unihetero_jax.text_table import align
from unihetero_jax.topology import Topology, check_mesh, parse_topology

LARGE_BYTES = 16 * 2**20
"""An array of more bytes than this on a device that no mesh axis splits is flagged, if the mesh has several devices."""
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Entry:
    """One array: where it lies and what it costs. `flag`: replicated and large."""

    name: str
    axes: tuple[str, ...]
    spec: str
    shape: tuple[int, ...]
    dtype: str
    bytes_per_device: int
    flag: bool


def add_parser(commands: Any) -> None:
    """Adds `explain` to the command line's sub-parsers."""
    parser = commands.add_parser(
        "explain", allow_abbrev=False, help="where parameters and activations lie on a machine"
    )
    parser.add_argument("--config", required=True, help="experiments/x.py[:argument]; fields by --config.a.b=value")
    parser.add_argument("--topology", required=True, help="v5e:16x16, v5p-128, 8xH100, cpu:8, gpu, ...")
    parser.set_defaults(command=explain_command)


def explain_command(flags: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Prints the tables."""
    config = parse_config_flags(flags.config, overrides)
    print(format_entries(config, parse_topology(flags.topology)))


def abstract_mesh(config: Config, topology: Topology) -> AbstractMesh:
    """The configuration's mesh, without devices.

    Raises:
        ValueError: if it has another number of devices than the machine.
    """
    check_mesh(config, topology)
    mesh = config.mesh
    shape = (mesh.data, mesh.fsdp, mesh.tensor, mesh.context)
    return AbstractMesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def parameter_entries(config: Config, mesh: AbstractMesh) -> list[Entry]:
    """Every parameter."""
    params = abstract_state(config, mesh).params  # pyright: ignore[reportArgumentType] - shardings need a shape alone
    axes = unihetero.logical_axes(config.model, config.objective)
    names = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [
        _entry(jax.tree_util.keystr(path, simple=True, separator="."), logical, leaf.shape, leaf.dtype, mesh)
        for (path, leaf), logical in zip(leaves, names, strict=True)
    ]


def activation_entries(config: Config, mesh: AbstractMesh, platform: str) -> list[Entry]:
    """The main activations of a microbatch, as the step lays them out; B rows.

    What the layers keep for the backward pass is one input each under remat `full`; without it every line of a layer
    is kept, times the number of layers.
    """
    model, data = config.model, config.data
    encoder, decoder = model.encoder, model.decoder
    rows = config.train.global_batch_rows // config.train.accumulation_steps
    tokens, patches = data.row_tokens, data.row_patches
    visual = patches // MERGED_PATCHES
    width = model.compute_dtype
    positions, of_rows = ("batch", "sequence"), ("batch", "replicated")
    # The text loss reads a chunk of each device's positions at a time.
    devices = mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["context"]
    chunk = min(config.loss.text_chunk, rows * tokens // devices)
    wanted: list[tuple[str, tuple[str, ...], tuple[int, ...], str]] = [
        ("patches", (*of_rows, "replicated"), (rows, patches, encoder.patch_size**2 * 3), "uint8"),
        ("encoder: inputs of the layers", ("layers", *of_rows, "replicated"),
         (encoder.num_layers, rows, patches, encoder.dim), width),
        ("encoder: hidden units of a layer", (*of_rows, "mlp"), (rows, patches, encoder.mlp_dim), width),
        ("merged features", (*of_rows, "replicated"), (rows, visual, MERGED_PATCHES * encoder.dim), width),
        ("visual embeddings", (*of_rows, "replicated"), (rows, visual, decoder.dim), width),
        ("input embeddings", (*positions, "replicated"), (rows, tokens, decoder.dim), width),
        ("decoder: inputs of the layers", ("layers", *positions, "replicated"),
         (decoder.num_layers, rows, tokens, decoder.dim), width),
        ("decoder: queries of a layer", (*positions, "heads", "replicated"),
         (rows, tokens, decoder.num_heads, decoder.head_dim), width),
        ("decoder: hidden units of a layer", (*positions, "mlp"), (rows, tokens, decoder.mlp_dim), width),
        ("text loss: table", ("vocab", "replicated"), (decoder.vocab_size, decoder.dim), width),
        ("text loss: gradient of the table", ("vocab", "replicated"), (decoder.vocab_size, decoder.dim), "float32"),
    ]  # fmt: skip
    if choose_backend(model.attention_backend, platform) != "splash":
        wanted += [
            ("decoder: attention mask", (*positions, "replicated"), (rows, tokens, tokens), "bool"),
            ("encoder: attention mask", (*of_rows, "replicated"), (rows, patches, patches), "bool"),
        ]
    entries = [_entry(name, axes, shape, jnp.dtype(dtype), mesh) for name, axes, shape, dtype in wanted]
    logits = _entry("text loss: logits of a chunk", ("replicated", "vocab"), (chunk, decoder.vocab_size),
                    jnp.dtype("float32"), mesh)  # fmt: skip
    # A device has chunks of its own: they are split with the positions, whatever the mesh.
    return [*entries, dataclasses.replace(logits, axes=("own positions", "vocab"), flag=False)]


def _entry(name: str, axes: tuple[str, ...], shape: tuple[int, ...], dtype: jnp.dtype, mesh: AbstractMesh) -> Entry:
    spec = partition_spec(axes)
    size = math.prod(NamedSharding(mesh, spec).shard_shape(shape)) * dtype.itemsize
    used = [axis for entry in spec for axis in ((entry,) if isinstance(entry, str) else entry or ())]
    is_split = any(mesh.shape[axis] > 1 for axis in used)
    shown = ", ".join("-" if e is None else e if isinstance(e, str) else "+".join(e) for e in spec)
    return Entry(name, axes, shown, shape, str(dtype), size, mesh.size > 1 and not is_split and size > LARGE_BYTES)


def format_entries(config: Config, topology: Topology) -> str:
    """The tables of a configuration on a machine."""
    mesh = abstract_mesh(config, topology)
    platform = topology.platform
    state: Any = abstract_state(config, mesh)  # pyright: ignore[reportArgumentType]
    parameters, activations = parameter_entries(config, mesh), activation_entries(config, mesh, platform)
    shown = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    lines = [f"{topology.name}: {shown}", "", *_table("parameters", parameters), ""]
    totals = {"parameters": state.params, "moving average": state.ema, "optimizer": state.opt_state}
    for name, tree in totals.items():
        leaves = jax.tree.leaves(tree)
        whole = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
        here = bytes_per_device(tree)
        lines.append(f"{name:<16}{whole / MIB:14,.1f} MiB in all {here / MIB:12,.2f} MiB a device")
    rows = config.train.global_batch_rows // config.train.accumulation_steps
    lines += ["", *_table(f"activations of {rows} rows", activations), ""]
    flagged = [entry.name for entry in (*parameters, *activations) if entry.flag]
    limit = f"over {LARGE_BYTES // MIB} MiB on a device and split by no mesh axis"
    lines.append(f"replicated and large ({limit}): {', '.join(flagged) or 'none'}")
    return "\n".join(lines)


def _table(title: str, entries: Sequence[Entry]) -> list[str]:
    rows = [(title, "logical axes", "partition", "shape", "dtype", "MiB a device")]
    for entry in entries:
        shape = " x ".join(map(str, entry.shape))
        size = f"{entry.bytes_per_device / MIB:,.2f}" + (" REPLICATED" if entry.flag else "")
        rows.append((entry.name, " ".join(entry.axes), entry.spec, shape, entry.dtype, size))
    return align(rows)
