"""The bare parameters of a stored step as safetensors files, for programs that know nothing of this one.

    DIR/config.json, tokenizer.json     the run's configuration, its tokenizer
    DIR/model.safetensors               if one file holds everything; else
    DIR/model-00001-of-00003.safetensors ...  and model.safetensors.index.json, which names the file of each array

The index has the form of Hugging Face's. Arrays are read and written one by one, so a machine needs memory for the
largest alone.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from unihetero_jax.checkpoint import read_arrays, read_metadata, valid_step
from unihetero_jax.data.tokenizer import FILES, load_tokenizer
from unihetero_jax.integrity import read_manifest
from unihetero_jax.safetensors_files import INDEX, NewTensor, file_name, split_by_bytes, write_tensors
from unihetero_jax.storage import list_folder, local_target, make_folder, read_bytes, to_path, write_bytes
from unihetero_jax.workdir import write_atomically, write_config

MAX_FILE_BYTES = 5 * 10**9
"""Hugging Face's own limit of many years, which every hub and file system takes."""


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array of a step, as a file gets it: its name there, where it is stored, and what becomes of it.

    Attributes:
        name: path below the parameters, as `decoder/embedding`.
        stored: path in the state, as `params/decoder/embedding`.
        stored_shape, stored_dtype: as its step has it.
        replicate: index into the leading axis, or None if it has none.
        dtype: in the file.
    """

    name: str
    stored: str
    stored_shape: tuple[int, ...]
    stored_dtype: str
    replicate: int | None
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored_shape if self.replicate is None else self.stored_shape[1:]

    def read(self, folder: epath.Path) -> np.ndarray:
        wanted = np.empty(self.stored_shape, jnp.dtype(self.stored_dtype))
        value: Any = read_arrays(folder, {self.stored: wanted})
        for part in self.stored.split("/"):
            value = value[part]
        value = value if self.replicate is None else value[self.replicate]
        return np.asarray(value, jnp.dtype(self.dtype), order="C")


def export_parameters(
    workdir: epath.PathLike,
    step: int | None,
    output: epath.PathLike,
    averaged: bool = False,
    replicate: int = 0,
    dtype: str = "",
    tokenizer: str = "",
    max_file_bytes: int = MAX_FILE_BYTES,
    report: Callable[[str], None] = print,
) -> dict[str, str]:
    """Writes a step's parameters; its digests are verified first. A single array larger than a file gets its own.

    Args:
        workdir: folder of the run.
        step: None or -1 for the newest step that verifies.
        output: folder to make, local or in a bucket.
        averaged: take the moving averages of the components that have one.
        replicate: which model of a run with several.
        dtype: of floating-point arrays, `float32` or `bfloat16`; empty: as stored.
        tokenizer: folder of the run's tokenizer; empty: where the run had it.
        max_file_bytes: upper bound on the array bytes of a file.
        report: receives messages for the user.

    Returns:
        {array: file}, as the index has it.

    Raises:
        CheckpointError: there is no valid step, or the named one is absent or damaged.
        ValueError: the output folder is not empty, the tokenizer is another, or a flag asks for what the run has not.
    """
    output = to_path(output)
    if max_file_bytes < 1:
        raise ValueError("--max-file-gb must be positive")
    if list_folder(output):
        raise ValueError(f"--output {output}: not empty; remove it, or name another folder")
    folder = valid_step(workdir, step, report)
    manifest, metadata = read_manifest(folder), read_metadata(folder)
    arrays = choose_arrays(manifest["arrays"], metadata["config"], averaged, replicate, dtype, str(folder))
    files = tokenizer_files(metadata, tokenizer)
    make_folder(output)
    write_config(output, metadata["config"])
    for name, content in files.items():
        write_bytes(output / name, content)
    header = {
        "format": "flax", "step": folder.name, "config_hash": manifest["config_hash"],
        "program_version": manifest["program_version"], "parameters": "averaged" if averaged else "online",
    }  # fmt: skip
    tensors = [NewTensor(array.name, array.shape, jnp.dtype(array.dtype)) for array in arrays]
    by_name = {array.name: array for array in arrays}

    def values(wanted: Collection[str]) -> Iterator[tuple[str, np.ndarray]]:
        return ((name, by_name[name].read(folder)) for name in wanted)

    return write_weights(output, split_by_bytes(tensors, max_file_bytes), values, header, report)


def write_weights(
    output: epath.Path,
    groups: Sequence[Sequence[NewTensor]],
    values: Callable[[Collection[str]], Iterable[tuple[str, np.ndarray]]],
    header: Mapping[str, str],
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, str]:
    """One file for each group, and an index if they are several; {tensor: file}.

    Args:
        output: folder.
        groups: the tensors of each file.
        values: gives the named tensors of a file, in any order.
        header: of each file and of the index.
        report: receives a line for each file.
    """
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        name = file_name(number, len(groups))
        wanted = [tensor.name for tensor in group]
        with local_target(output / name) as path:
            write_tensors(path, group, values(wanted), header)
        weight_map |= dict.fromkeys(wanted, name)
        report(f"{output / name}: {len(group)} arrays, {sum(tensor.num_bytes for tensor in group) / 1e6:,.1f} MB")
    if len(groups) > 1:  # last: an export without it was cut off
        total = sum(tensor.num_bytes for group in groups for tensor in group)
        index = {"metadata": {"total_size": total, **header}, "weight_map": weight_map}
        write_atomically(output / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
    return weight_map


def choose_arrays(
    stored: Mapping[str, Any], config: Mapping[str, Any], averaged: bool, replicate: int, dtype: str, where: str
) -> list[StoredArray]:
    """The parameters by name, from `params` or, where asked for and there, from `ema`."""
    num_replicates = config["train"]["num_replicates"]
    if not 0 <= replicate < num_replicates:
        raise ValueError(f"--replicate {replicate}: the run has replicates 0 to {num_replicates - 1}")
    if dtype not in ("", "float32", "bfloat16"):
        raise ValueError(f"--dtype {dtype!r}: give float32 or bfloat16, or leave it out for what is stored")
    if averaged and not any(name.startswith("ema/") for name in stored):
        raise ValueError(f"--ema: {where} has no moving averages (loss.target={config['loss']['target']})")
    chosen = []
    for name in sorted(name for name in stored if name.startswith("params/")):
        bare = name.removeprefix("params/")
        source = f"ema/{bare}" if averaged and f"ema/{bare}" in stored else name
        as_stored = stored[source]["dtype"]
        is_float = jnp.issubdtype(jnp.dtype(as_stored), jnp.floating)
        chosen.append(StoredArray(
            bare, source, tuple(stored[source]["shape"]), as_stored, None if num_replicates == 1 else replicate,
            dtype if dtype and is_float else as_stored,
        ))  # fmt: skip
    return chosen


def tokenizer_files(metadata: Mapping[str, Any], folder: str) -> dict[str, bytes]:
    """Content of the files of the tokenizer that the run was trained with."""
    folder = folder or metadata["config"]["data"]["tokenizer"]
    try:
        found = load_tokenizer(folder).hash
    except ValueError as error:
        raise ValueError(f"{error}; name the run's tokenizer by --tokenizer") from error
    expected = metadata["data"].get("tokenizer", found)
    if found != expected:
        raise ValueError(
            f"{folder} holds another tokenizer (hash {found}) than the run's ({expected}); name that one by --tokenizer"
        )
    content = {}
    for name in FILES:
        with contextlib.suppress(FileNotFoundError):
            content[name] = read_bytes(to_path(folder) / name)
    return content
