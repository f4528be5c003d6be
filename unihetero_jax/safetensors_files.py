"""Tensors of safetensors files, read and written a part at a time: memory for one tensor, not for a model.

The format (https://github.com/huggingface/safetensors): eight bytes with the header's length, a JSON header with the
dtype, shape and byte range of each tensor, the bytes. The library maps files into memory or takes all tensors of a file
at once; so it checks a file's header here (which it bounds), and bytes are read and written by their place.
"""

import dataclasses
import io
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

INDEX = "model.safetensors.index.json"
_DTYPES: Mapping[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64,
    "I32": np.int32, "U8": np.uint8,
}  # fmt: skip
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}
_CHUNK_BYTES = 1 << 20
_CACHE_LINE_BYTES = 64


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file: where its bytes are."""

    path: Path
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The tensor, or a part of it: `index` has a slice of step 1 for each of its first dimensions."""
        out = np.empty([len(range(*bounds)) for bounds in self._bounds(index)], self.dtype)
        self.read_into(out, index)
        return out

    def read_into(self, out: np.ndarray, index: tuple[slice, ...] = (), transposed: bool = False) -> None:
        """Fills an array, of any dtype, with the tensor or a part of it; of a matrix with its transpose, if asked for.

        Only the rows of the part are read, as many at a time as stay in a processor's cache while they are converted.
        """
        (first, last, _), *inner = self._bounds(index) or [(0, 1, 1)]
        columns = tuple(slice(*bounds) for bounds in inner)
        target = np.atleast_1d(out.T if transposed else out)
        step = max(_CHUNK_BYTES * (self.shape or (1,))[0] // max(self.num_bytes, 1), 1)
        # Memory is taken once: what the system clears and maps anew for each chunk takes longer than the rest.
        rows = np.empty((min(step, last - first), *self.shape[1:]), self.dtype)
        converted = _apart_in_cache(rows[(slice(None), *columns)].shape, out.dtype)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start + first * math.prod(self.shape[1:]) * self.dtype.itemsize)
            for start in range(0, last - first, step):
                count = min(step, last - first - start)
                self._fill(file, rows[:count])
                # Converted first: what is converted while it is transposed takes twice as long.
                converted[:count] = rows[(slice(count), *columns)]
                target[start : start + count] = converted[:count]

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def _bounds(self, index: tuple[slice, ...]) -> list[tuple[int, int, int]]:
        given = [part.indices(size) for part, size in zip(index, self.shape, strict=False)]
        return given + [(0, size, 1) for size in self.shape[len(given) :]]

    def _fill(self, file: io.RawIOBase, rows: np.ndarray) -> None:
        buffer, done = memoryview(rows.reshape(-1).view(np.uint8).data), 0
        while done < len(buffer):
            count = file.readinto(buffer[done:])
            if not count:
                raise ValueError(f"{self.path}: ends before its last tensor; copy the file again")
            done += count


def _apart_in_cache(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory whose rows lie no power of two apart: a column of it fits a cache, a transpose takes a third as long."""
    if len(shape) < 2:
        return np.empty(shape, dtype)
    *outer, length = shape
    return np.empty((*outer, length + _CACHE_LINE_BYTES // dtype.itemsize), dtype)[..., :length]


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of the safetensors files of a folder, by name; of pickled weights nothing is read.

    Raises:
        ValueError: there is no safetensors file, one is damaged, its index names a file or a tensor that is not there,
            or a name comes twice.
    """
    paths = _files(folder)
    found: dict[str, StoredTensor] = {}
    for path in paths:
        for tensor in _header(path):
            if tensor.name in found:
                raise ValueError(f"{path}: tensor {tensor.name} is in {found[tensor.name].path.name}, too")
            found[tensor.name] = tensor
    return found


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index}: no index of safetensors files ({error!r:.80})") from error
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise ValueError(f"{index}: names a file outside its folder: {outside[0]!r:.80}")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{index}: names files that are not there: {', '.join(missing)}")
        return [folder / name for name in names]
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        pickled = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(kind))
        hint = f"; {', '.join(pickled)} may run code when it is read: convert it to safetensors" if pickled else ""
        raise ValueError(f"{folder}: no *.safetensors file{hint}")
    return paths


def _header(path: Path) -> list[StoredTensor]:
    try:
        with safe_open(path, "numpy") as checked:  # bounds the header, and checks ranges, dtypes and sizes
            names = set(checked.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: no readable safetensors file ({error}); copy it again") from error
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    tensors = []
    for name in sorted(names):
        entry = header[name]
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{path}: tensor {name} has dtype {entry['dtype']}; there are {', '.join(_DTYPES)}")
        start = 8 + length + entry["data_offsets"][0]
        tensors.append(StoredTensor(path, name, np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"]), start))
    return tensors


@dataclasses.dataclass(frozen=True)
class NewTensor:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    path: Path, tensors: Sequence[NewTensor], values: Iterable[tuple[str, np.ndarray]], metadata: Mapping[str, str]
) -> None:
    """Writes one file; `values` may come in any order, and each is written when it comes.

    Raises:
        ValueError: what was written reads otherwise.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    places, end = {}, 0
    for tensor in tensors:
        places[tensor.name], start, end = (tensor, end), end, end + tensor.num_bytes
        header[tensor.name] = {
            "dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]
        }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        base = file.tell()
        os.truncate(path, base + end)
        for name, value in values:
            tensor, start = places.pop(name)
            assert value.shape == tensor.shape and value.dtype == tensor.dtype, name
            file.seek(base + start)
            file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    assert not places, f"not written: {', '.join(places)}"
    with safe_open(path, "numpy") as written:
        if set(written.keys()) != {tensor.name for tensor in tensors}:
            raise ValueError(f"{path}: what was written reads otherwise; is the disk sound?")


def file_name(number: int, count: int) -> str:
    """Of the file so numbered, from 1, as Hugging Face's indices have it."""
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def split_by_bytes(tensors: Sequence[NewTensor], max_bytes: int) -> list[list[NewTensor]]:
    """Tensors in order, as many to a file as fit; one that is larger than a file has its own."""
    groups, size = [[]], 0
    for tensor in tensors:
        if groups[-1] and size + tensor.num_bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.num_bytes
    return groups
