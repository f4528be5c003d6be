"""Weights of Hugging Face models, in and out: one table for each family serves both directions.

A row of a table names a parameter of ours, a tensor of theirs, and how the one lies in the other:

    decoder/blocks/attention/query/kernel [L, D, H*d]    model.layers.{}.self_attn.q_proj.weight [H*d, D]    transposed

Ours are stacked over layers and float32. They are read tensor by tensor from safetensors files, each device's part of
it alone, straight into arrays that are sharded from the beginning: beside the model itself, memory holds one tensor.
"""

import concurrent.futures
import dataclasses
import functools
import math
import mmap
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from unihetero_jax.config import DecoderConfig, EncoderConfig
from unihetero_jax.hf_config import VisionFamily
from unihetero_jax.safetensors_files import NewTensor, StoredTensor, find_tensors

_NUM_THREADS = 2 * (os.cpu_count() or 1)
"""Of reading: while some wait for the disk, others convert."""
Params = dict[str, Any]
"""As of `model.unihetero`."""
Form = Literal["same", "transposed", "convolution"]
"""How theirs lies in ours: as it is; [out, in] for [in, out]; [out, channel, y, x] for [(y, x, channel), out]."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A parameter of ours and a tensor of theirs; `{}` in `theirs` is the layer, which leads in ours.

    Attributes:
        ours: path below the parameters.
        theirs: name of the tensor, without a prefix of the file.
        form: see `Form`.
        has_vocabulary: its first dimension is the vocabulary, which may have more rows in ours.
    """

    ours: str
    theirs: str
    form: Form = "same"
    has_vocabulary: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """The rows of a family.

    Attributes:
        rows: all parameters of ours that come from theirs.
        prefixes: of theirs, one of which all tensors of a file bear; the first is written.
        left_out: beginnings of names (after the prefix) of tensors that have no place in ours, with the reason.
    """

    rows: tuple[Row, ...]
    prefixes: tuple[str, ...]
    left_out: Mapping[str, str]


def language_table(decoder: DecoderConfig) -> Table:
    """Of Qwen2, Qwen3 and Llama, whose tensors have the same names; which of them there are is the configuration's."""
    blocks, layer = "decoder/blocks", "model.layers.{}"
    rows = [
        Row("decoder/embedding", "model.embed_tokens.weight", has_vocabulary=True),
        Row("decoder/norm/gain", "model.norm.weight"),
        Row(f"{blocks}/attention_norm/gain", f"{layer}.input_layernorm.weight"),
        Row(f"{blocks}/mlp_norm/gain", f"{layer}.post_attention_layernorm.weight"),
    ]
    for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("out", "o_proj")):
        path, name = f"{blocks}/attention/{ours}", f"{layer}.self_attn.{theirs}"
        rows.append(Row(f"{path}/kernel", f"{name}.weight", "transposed"))
        if decoder.qkv_bias and ours != "out":
            rows.append(Row(f"{path}/bias", f"{name}.bias"))
    if decoder.qk_norm:
        rows.append(Row(f"{blocks}/attention/query_norm/gain", f"{layer}.self_attn.q_norm.weight"))
        rows.append(Row(f"{blocks}/attention/key_norm/gain", f"{layer}.self_attn.k_norm.weight"))
    rows += [
        Row(f"{blocks}/mlp/{ours}/kernel", f"{layer}.mlp.{ours}_proj.weight", "transposed")
        for ours in ("gate", "up", "down")
    ]
    if not decoder.tied_embeddings:
        rows.append(Row("decoder/output", "lm_head.weight", has_vocabulary=True))
    left_out = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": "computed" for i in range(decoder.num_layers)}
    if decoder.tied_embeddings:
        left_out["lm_head.weight"] = "a copy of the token table"
    return Table(tuple(rows), ("",), left_out)


def vision_table(encoder: EncoderConfig, family: VisionFamily) -> Table:
    """Of SigLIP, SigLIP 2 (NaFlex) and CLIP."""
    blocks, layer, embeddings = "encoder/blocks", "encoder.layers.{}", "embeddings"
    patch_form: Form = "transposed" if family == "siglip2" else "convolution"
    rows = [
        Row("encoder/patch/kernel", f"{embeddings}.patch_embedding.weight", patch_form),
        Row("encoder/position", f"{embeddings}.position_embedding.weight"),
    ]
    if encoder.patch_bias:
        rows.append(Row("encoder/patch/bias", f"{embeddings}.patch_embedding.bias"))
    if encoder.class_token:
        rows.append(Row("encoder/class_token", f"{embeddings}.class_embedding"))
    linears = {"query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj",
               "out": "self_attn.out_proj", "mlp/up": "mlp.fc1", "mlp/down": "mlp.fc2"}  # fmt: skip
    for ours, theirs in linears.items():
        rows.append(Row(f"{blocks}/{ours}/kernel", f"{layer}.{theirs}.weight", "transposed"))
        rows.append(Row(f"{blocks}/{ours}/bias", f"{layer}.{theirs}.bias"))
    norms = {f"{blocks}/attention_norm": f"{layer}.layer_norm1", f"{blocks}/mlp_norm": f"{layer}.layer_norm2",
             "encoder/norm": "post_layernorm"}  # fmt: skip
    if encoder.pre_norm:
        norms["encoder/pre_norm"] = "pre_layrnorm"  # so spelt in the files
    for ours, theirs in norms.items():
        rows += [Row(f"{ours}/gain", f"{theirs}.weight"), Row(f"{ours}/bias", f"{theirs}.bias")]
    left_out = {"head.": "attention pooling, which no visual token passes", f"{embeddings}.position_ids": "computed"}
    return Table(tuple(rows), ("vision_model.", ""), left_out)


# ---------------------------------------------------------------- in


@dataclasses.dataclass(frozen=True)
class Source:
    """A folder with weights whose tensors were compared with a table: all are there, in their shapes.

    Attributes:
        tensors: by the name in the table.
        left_out: names of tensors that have no place in ours, those of another tower among them.
    """

    folder: Path
    table: Table
    tensors: Mapping[str, StoredTensor]
    left_out: tuple[str, ...]


def open_source(folder: Path, table: Table, abstract: Params) -> Source:
    """Finds every tensor of a table.

    Args:
        folder: with `*.safetensors`.
        table: of the model's family and configuration.
        abstract: shapes of our parameters (`jax.ShapeDtypeStruct` leaves), by component.

    Raises:
        ValueError: tensors are missing, left over, or of another shape: all of them are listed.
    """
    stored = find_tensors(folder)
    prefix = next((p for p in table.prefixes if any(name.startswith(f"{p}{_first(table)}") for name in stored)), "")
    own = {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
    wanted = {
        name: shape for row in table.rows for name, shape in _their_shapes(row, leaf_of(abstract, row.ours).shape)
    }
    vocabulary = {row.theirs for row in table.rows if row.has_vocabulary}
    left_out = [name for name in own if name.startswith(tuple(table.left_out)) and name not in wanted]
    faults = [f"missing: {name} {list(shape)}" for name, shape in wanted.items() if name not in own]
    faults += [f"surplus: {name} {list(own[name].shape)}" for name in sorted(own.keys() - wanted.keys() - {*left_out})]
    for name, shape in wanted.items():
        found = own[name].shape if name in own else shape
        fits = found[1:] == shape[1:] and found[0] <= shape[0] if name in vocabulary and found else found == shape
        if not fits:
            faults.append(f"misshapen: {name} {list(found)}, expected {list(shape)}")
    if faults:
        raise ValueError(f"{folder}: its tensors do not fit its config.json:\n  " + "\n  ".join(faults))
    elsewhere = [name for name in stored if not name.startswith(prefix)]
    return Source(folder, table, {name: own[name] for name in wanted}, tuple(sorted(left_out + elsewhere)))


def load_parameters(source: Source, target: Params, new_tokens: range = range(0)) -> Params:
    """The parameters of a source, as float32, in the shapes and shardings of `target`.

    Args:
        source: from `open_source`.
        target: `jax.ShapeDtypeStruct` leaves with shardings (None: on the default device), by component; what the table
            does not name is left out of the result.
        new_tokens: ids that the source's tokenizer does not know. Their rows of the vocabulary, and those that the
            file does not have, get the mean of the rows before `new_tokens`; spare rows after them stay as they are.
    """
    loaded: Params = {}
    with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
        for row in source.table.rows:
            set_leaf(loaded, row.ours, _load(source, row, leaf_of(target, row.ours), new_tokens, pool))
    return loaded


def _load(source: Source, row: Row, leaf: Any, new_tokens: range, pool: concurrent.futures.Executor) -> jax.Array:
    if row.has_vocabulary:
        return _place(leaf.shape, leaf.sharding, _with_new_rows(source.tensors[row.theirs], new_tokens, pool))
    if "{}" not in row.theirs:
        return _place(leaf.shape, leaf.sharding, _filler(source.tensors[row.theirs], row.form))
    layers = [_filler(source.tensors[row.theirs.format(layer)], row.form) for layer in range(leaf.shape[0])]
    if _is_on_hosts(leaf.sharding):
        return _place(leaf.shape, leaf.sharding, _stacked(layers, pool))
    return _load_layers(leaf, layers)


Index = tuple[slice, ...]
"""A part of a parameter of ours: a slice with bounds for each dimension."""
Filler = Callable[[np.ndarray, Index], None]
"""Fills float32 memory with the part of a parameter that an index names."""


def _place(shape: Sequence[int], sharding: Any, fill: Filler) -> jax.Array:
    """An array whose parts are read by the processes that hold them."""

    def read(index: Index | None) -> np.ndarray:
        given = index or ()
        bounds = [part.indices(size)[:2] for part, size in zip(given, shape, strict=False)]
        bounds += [(0, size) for size in shape[len(given) :]]
        out = _host_memory([last - first for first, last in bounds])
        fill(out, tuple(slice(*one) for one in bounds))
        return out

    return (
        jax.device_put(read(None)) if sharding is None else jax.make_array_from_callback(tuple(shape), sharding, read)
    )


def _host_memory(shape: Sequence[int]) -> np.ndarray:
    """Float32 memory that jax takes over on a CPU without a copy: it begins at a page.

    In huge pages, which are mapped in a fifth of the time; private, as shared memory, Python's default, takes longer.
    """
    count = math.prod(shape)
    memory = mmap.mmap(-1, max(4 * count, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # of Linux
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.float32, count).reshape(shape)


def _is_on_hosts(sharding: Any) -> bool:
    """Whether the devices' memory is the host's: then a whole stack is read where it stays."""
    devices = sharding.device_set if sharding is not None else jax.devices()[:1]
    return all(device.platform == "cpu" for device in devices)


def _stacked(layers: Sequence[Filler], pool: concurrent.futures.Executor) -> Filler:
    """Fills a stacked parameter, several layers at the same time."""

    def fill(out: np.ndarray, index: Index) -> None:
        chosen = layers[index[0]]
        list(pool.map(lambda number: chosen[number](out[number], index[1:]), range(len(chosen))))

    return fill


def _load_layers(leaf: Any, layers: Sequence[Filler]) -> jax.Array:
    """A stacked parameter on accelerators, filled layer by layer in place: the host holds one layer's tensor."""
    sharding = leaf.sharding
    of_layer = None
    if sharding is not None:
        of_layer = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[1:]))
    stack = jax.jit(lambda: jnp.zeros(leaf.shape, jnp.float32), out_shardings=sharding)()
    for layer, fill in enumerate(layers):
        stack = _put_layer(stack, _place(leaf.shape[1:], of_layer, fill), layer)
    return stack


@functools.partial(jax.jit, donate_argnums=0)
def _put_layer(stack: jax.Array, value: jax.Array, layer: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, value, layer, 0)


def _filler(tensor: StoredTensor, form: Form) -> Filler:
    """Fills a parameter, or one layer of it, from its tensor."""

    def fill(out: np.ndarray, index: Index) -> None:
        match form:
            case "same":
                tensor.read_into(out, index)
            case "transposed":
                tensor.read_into(out, index[::-1], transposed=True)
            case "convolution":
                out[...] = to_patch_kernel(tensor.read())[index]

    return fill


def _with_new_rows(tensor: StoredTensor, new_tokens: range, pool: concurrent.futures.Executor) -> Filler:
    """Fills a vocabulary's table, some rows of which are new."""
    num_known = min(new_tokens.start, tensor.shape[0]) if new_tokens else tensor.shape[0]

    def fill(out: np.ndarray, index: Index) -> None:
        first, last, columns = index[0].start, index[0].stop, index[1]
        num_stored = max(min(last, tensor.shape[0]) - first, 0)
        step = max(num_stored // _NUM_THREADS, 1024)

        def read(start: int) -> None:
            end = min(start + step, num_stored)
            tensor.read_into(out[start:end], (slice(first + start, first + end), columns))

        list(pool.map(read, range(0, num_stored, step)))
        rows = np.arange(first, last)
        is_new = (rows >= tensor.shape[0]) | np.isin(rows, new_tokens)
        if is_new.any():
            out[is_new] = _mean_row(tensor, num_known)[columns]

    return fill


@functools.lru_cache(maxsize=8)
def _mean_row(tensor: StoredTensor, num_rows: int) -> np.ndarray:
    step = max((1 << 24) // tensor.shape[1], 1)
    total = np.zeros(tensor.shape[1], np.float64)
    for start in range(0, num_rows, step):
        total += tensor.read((slice(start, min(start + step, num_rows)),)).astype(np.float64).sum(axis=0)
    return (total / num_rows).astype(np.float32)


# ---------------------------------------------------------------- out


def their_tensors(table: Table, abstract: Params, dtype: np.dtype, vocabulary: int = 0) -> list[NewTensor]:
    """What `their_values` gives, before any of it is read; `vocabulary` rows of it, all if 0."""
    tensors = []
    for row in table.rows:
        for name, shape in _their_shapes(row, leaf_of(abstract, row.ours).shape):
            rows = (vocabulary, *shape[1:]) if row.has_vocabulary and vocabulary else shape
            tensors.append(NewTensor(table.prefixes[0] + name, rows, dtype))
    return tensors


def their_values(
    table: Table,
    read: Callable[[str], np.ndarray],
    abstract: Params,
    dtype: np.dtype,
    wanted: Collection[str],
    vocabulary: int = 0,
) -> Iterator[tuple[str, np.ndarray]]:
    """The wanted tensors of theirs by name; `read` gives a parameter of ours by path, and is asked once for each."""
    for row in table.rows:
        names = [table.prefixes[0] + name for name, _ in _their_shapes(row, leaf_of(abstract, row.ours).shape)]
        if not any(name in wanted for name in names):
            continue
        value = read(row.ours)
        if row.has_vocabulary and vocabulary:
            value = value[:vocabulary]
        for name, one in zip(names, value if "{}" in row.theirs else [value], strict=True):
            if name in wanted:
                yield name, _to_theirs(one, row.form).astype(dtype)


def _to_theirs(value: np.ndarray, form: Form) -> np.ndarray:
    match form:
        case "same":
            return value
        case "transposed":
            return value.T
        case "convolution":
            side = round((value.shape[0] / 3) ** 0.5)
            return value.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


def to_patch_kernel(convolution: np.ndarray) -> np.ndarray:
    """[out, channel, y, x] as the map of a patch's values in (y, x, channel) order."""
    return convolution.transpose(2, 3, 1, 0).reshape(-1, convolution.shape[0])


# ---------------------------------------------------------------- shared


def _their_shapes(row: Row, shape: Sequence[int]) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors that make up a parameter of ours."""
    num_layers, one = (shape[0], shape[1:]) if "{}" in row.theirs else (1, tuple(shape))
    match row.form:
        case "same":
            theirs = tuple(one)
        case "transposed":
            theirs = (one[1], one[0])
        case "convolution":
            side = round((one[0] / 3) ** 0.5)
            theirs = (one[1], 3, side, side)
    return [(row.theirs.format(layer), theirs) for layer in range(num_layers)]


def _first(table: Table) -> str:
    return table.rows[0].theirs.partition(".{}")[0]


def leaf_of(tree: Params, path: str) -> Any:
    """The leaf at a path such as `decoder/norm/gain`."""
    for name in path.split("/"):
        tree = tree[name]
    return tree


def set_leaf(tree: Params, path: str, value: Any) -> None:
    """Puts a leaf at a path; makes the branches to it."""
    *parents, last = path.split("/")
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[last] = value
