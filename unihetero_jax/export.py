"""The bare parameters of a stored step as safetensors files, for programs that know nothing of this one.

    DIR/config.json, tokenizer.json     the run's configuration, its tokenizer
    DIR/model.safetensors               if one file holds everything; else
    DIR/model-00001-of-00003.safetensors ...  and model.safetensors.index.json, which names the file of each array

The index has the form of Hugging Face's. Arrays are read one by one, so a machine needs memory for the largest alone:
the format (https://github.com/huggingface/safetensors: the header's length, a JSON header, the bytes in its order) is
written here, as the library takes the arrays of a file at once. What was written is opened with that library.
"""

import contextlib
import dataclasses
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors import safe_open

from unihetero_jax.checkpoint import CheckpointError, read_arrays, read_metadata, valid_step
from unihetero_jax.data.tokenizer import FILES, load_tokenizer
from unihetero_jax.integrity import read_manifest
from unihetero_jax.storage import list_folder, local_target, make_folder, read_bytes, to_path, write_bytes
from unihetero_jax.workdir import write_atomically, write_config

INDEX = "model.safetensors.index.json"
MAX_FILE_BYTES = 5 * 10**9
"""Hugging Face's own limit of many years, which every hub and file system takes."""
_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int32": "I32"}


@dataclasses.dataclass(frozen=True)
class _Array:
    """An array of a file: its name there, where it is stored, and what becomes of it.

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

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * jnp.dtype(self.dtype).itemsize

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
    arrays = _choose(manifest["arrays"], metadata["config"], averaged, replicate, dtype, str(folder))
    tokenizer_files = _tokenizer_files(metadata, tokenizer)
    make_folder(output)
    write_config(output, metadata["config"])
    for name, content in tokenizer_files.items():
        write_bytes(output / name, content)
    header = {
        "format": "flax", "step": folder.name, "config_hash": manifest["config_hash"],
        "program_version": manifest["program_version"], "parameters": "averaged" if averaged else "online",
    }  # fmt: skip
    groups = _split(arrays, max_file_bytes)
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        name = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        with local_target(output / name) as path:
            _write_file(path, folder, group, header)
        weight_map |= {array.name: name for array in group}
        report(f"{output / name}: {len(group)} arrays, {sum(array.num_bytes for array in group) / 1e6:,.1f} MB")
    if len(groups) > 1:  # last: an export without it was cut off
        total = sum(array.num_bytes for array in arrays)
        index = {"metadata": {"total_size": total, **header}, "weight_map": weight_map}
        write_atomically(output / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
    return weight_map


def _choose(
    stored: Mapping[str, Any], config: Mapping[str, Any], averaged: bool, replicate: int, dtype: str, where: str
) -> list[_Array]:
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
        chosen.append(_Array(
            bare, source, tuple(stored[source]["shape"]), as_stored, None if num_replicates == 1 else replicate,
            dtype if dtype and is_float else as_stored,
        ))  # fmt: skip
    return chosen


def _tokenizer_files(metadata: Mapping[str, Any], folder: str) -> dict[str, bytes]:
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


def _split(arrays: Sequence[_Array], max_bytes: int) -> list[list[_Array]]:
    """Arrays in order, as many to a file as fit."""
    groups, size = [[]], 0
    for array in arrays:
        if groups[-1] and size + array.num_bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(array)
        size += array.num_bytes
    return groups


def _write_file(path: Path, folder: epath.Path, arrays: Sequence[_Array], metadata: Mapping[str, str]) -> None:
    """Writes one file, an array at a time, and opens it with the format's own library."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for array in arrays:
        start, end = end, end + array.num_bytes
        header[array.name] = {
            "dtype": _CODES[array.dtype], "shape": list(array.shape), "data_offsets": [start, end]
        }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in arrays:
            value = array.read(folder)
            assert value.shape == array.shape and value.nbytes == array.num_bytes, array.name
            file.write(value.reshape(-1).view(np.uint8).data)
    with safe_open(path, "numpy") as written:
        if set(written.keys()) != {array.name for array in arrays}:
            raise CheckpointError(f"{path}: what was written reads otherwise; is the disk sound?")
