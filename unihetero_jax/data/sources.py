"""A prepared folder, opened for reading: checked against its manifest, records by number, lengths as an array."""

import bisect
import dataclasses
import hashlib
import itertools
import json
import os
import shlex
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grain
import numpy as np

from unihetero_jax.data.records import INDEX_DTYPE, RECORD_VERSION, ImageSpec, RecordError


class ShardError(ValueError):
    """A whole shard file is not what its manifest says: no fault of a record, so the run must not go on."""


class ShardCheck:
    """Compares every shard file with its digest when the first record of it is read. Safe to share between threads."""

    def __init__(self, field: str, digests: Mapping[str, str]):
        """`digests` by path; `field` is how the user named the source."""
        self._field, self._digests = field, dict(digests)
        self._locks = {path: threading.Lock() for path in digests}
        self._passed: set[str] = set()

    def require(self, path: str) -> None:
        """Raises ShardError if the file's content is not the one that was prepared."""
        if path in self._passed:
            return
        with self._locks[path]:
            if path not in self._passed:
                with open(path, "rb") as file:
                    found = hashlib.file_digest(file, "blake2b").hexdigest()
                if found != self._digests[path]:
                    raise ShardError(
                        f"{self._field}: the content of {path} is not the one that manifest.json describes (digest "
                        f"{found[:16]}..., expected {self._digests[path][:16]}...); copy or prepare it again"
                    )
                self._passed.add(path)


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of a prepared folder.

    Attributes:
        name: of the source in the mixture.
        index: lengths of its records (`records.INDEX_DTYPE`), memory-mapped.
        paths: its shard files, in record order.
        readers: one reader per file; safe to share between threads.
        ends: number of records up to and including each file.
        digest: of the content of all record files of the folder, as its manifest states it.
        check: of the content of each file at its first touch; None: their sizes alone were checked.
    """

    name: str
    index: np.ndarray
    paths: tuple[str, ...]
    readers: tuple[Any, ...]
    ends: tuple[int, ...]
    digest: str
    check: ShardCheck | None = None

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def read(self, record: int) -> bytes:
        """The stored bytes of a record.

        Raises:
            RecordError: `unreadable_record` if its block of the file is damaged.
            ShardError: its file as a whole is not the one that was prepared.
        """
        file, within = self._place(record)
        if self.check is not None:
            self.check.require(self.paths[file])
        try:
            return self.readers[file][within]
        except (RuntimeError, OSError, ValueError, IndexError) as error:  # what the reader raises for damaged blocks
            raise RecordError("unreadable_record", str(error)) from error

    def locate(self, record: int) -> str:
        """File and number of a record within it, for messages."""
        file, within = self._place(record)
        return f"{self.paths[file]}: record {within}"

    def close(self) -> None:
        """Closes the files."""
        for reader in self.readers:
            reader.__exit__(None, None, None)

    def _place(self, record: int) -> tuple[int, int]:
        file = bisect.bisect_right(self.ends, record)
        return file, record - (self.ends[file - 1] if file else 0)


def open_source(
    name: str, path: str, split: str, key: str, tokenizer_folder: str, spec: ImageSpec, verify_digests: bool = False
) -> Source:
    """Opens a split ("train" or "val") of a prepared folder, after checking that it is whole.

    Args:
        name: of the source, for messages.
        path: the prepared folder.
        split: `train` or `val`.
        key: `records.index_key` of the tokenizer and image spec in use.
        tokenizer_folder, spec: that tokenizer's folder and that image spec, for the message that names the remedy.
        verify_digests: also compare every file's content with its digest, when it is read first.

    Raises:
        ValueError: the folder, its manifest, a shard file or the index is missing or does not fit; or the split is
            empty (training only: an empty validation split is a source without records).
    """
    field, folder = f"data.sources.{name}.path", Path(path)
    manifest = _read_manifest(field, folder)
    count, sizes = _declared(field, folder, manifest, split)
    if count == 0 and split == "train":
        raise ValueError(
            f"{field}: {folder} holds no training record (manifest.json says num_records.train = 0); "
            "check what the preparation dropped, or remove the source"
        )
    for file, size in sizes.items():
        _check_size(field, folder / file, size)
    digests = {os.fspath(folder / file): manifest["files"][file]["digest"] for file in sizes}
    paths = tuple(os.fspath(folder / file) for file in sizes)
    readers = tuple(_open_reader(field, file) for file in paths)
    ends = tuple(itertools.accumulate(len(reader) for reader in readers))
    if (ends[-1] if ends else 0) != count:
        raise ValueError(
            f"{field}: the {split} files of {folder} hold {ends[-1] if ends else 0} records, manifest.json "
            f"says {count}; prepare the folder again"
        )
    remedy = _index_command(folder, tokenizer_folder, spec)
    index = _read_index(field, folder, split, key, count, remedy)
    check = ShardCheck(field, digests) if verify_digests else None
    return Source(name, index, paths, readers, ends, _digest(manifest), check)


def _read_manifest(field: str, folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ValueError(
            f"{field}: folder {folder} does not exist; prepare it with data_pipelines, or correct the path"
        )
    path = folder / "manifest.json"
    if not path.is_file():
        raise ValueError(
            f"{field}: {path} does not exist: {folder} is no prepared folder or its preparation was cut "
            "off; prepare it with data_pipelines"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["record_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{field}: {path} cannot be read ({error!r}); prepare the folder again") from error
    if version != RECORD_VERSION:
        raise ValueError(
            f"{field}: {path} has record_version {version!r}, this program reads {RECORD_VERSION}; prepare "
            "the folder again"
        )
    return manifest


def _declared(field: str, folder: Path, manifest: dict[str, Any], split: str) -> tuple[int, dict[str, int]]:
    """How many records a split has and how large each of its files is, in record order, as the manifest says."""
    try:
        files = {
            file: int(entry["bytes"])
            for file, entry in sorted(manifest["files"].items())
            if file.startswith(f"{split}-") and file.endswith(".array_record")
        }
        return int(manifest["num_records"].get(split, 0)), files
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{field}: {folder / 'manifest.json'} lacks num_records or files ({error!r}); prepare the folder again"
        ) from error


def _digest(manifest: dict[str, Any]) -> str:
    files = {name: entry for name, entry in manifest["files"].items() if name.endswith(".array_record")}
    return hashlib.blake2b(json.dumps(files, sort_keys=True).encode(), digest_size=8).hexdigest()


def _check_size(field: str, path: Path, expected: int) -> None:
    if not path.is_file():
        raise ValueError(f"{field}: {path} is missing, though manifest.json lists it; copy or prepare the folder again")
    if (size := path.stat().st_size) != expected:
        raise ValueError(f"{field}: {path} has {size} bytes, manifest.json says {expected}; copy or prepare it again")


def _open_reader(field: str, path: str) -> Any:
    try:
        return grain.sources.ArrayRecordDataSource([path])
    except (RuntimeError, OSError, ValueError) as error:
        raise ValueError(
            f"{field}: {path} is not a readable ArrayRecord file ({error}); copy or prepare it again"
        ) from error


def _index_command(folder: Path, tokenizer_folder: str, spec: ImageSpec) -> str:
    """What makes the index that is missing: the spec's flags have defaults, which would give another index."""
    flags = [
        f"--tokenizer={tokenizer_folder}", f"--patch-size={spec.patch_size}", f"--min-patches={spec.min_patches}",
        f"--max-patches={spec.max_patches}",
    ]  # fmt: skip
    return "run: " + shlex.join(["python", "-m", "data_pipelines.index", os.fspath(folder), *flags])


def _read_index(field: str, folder: Path, split: str, key: str, count: int, remedy: str) -> np.ndarray:
    if count == 0:
        return np.zeros(0, INDEX_DTYPE)
    path = folder / "index" / f"{key}.{split}.npy"
    if not path.is_file():
        raise ValueError(
            f"{field}: no index of lengths for this tokenizer, model.encoder.patch_size and "
            f"data.image_{{min,max}}_patches ({path} does not exist); {remedy}"
        )
    try:
        index = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{field}: {path} is not a readable index ({error}); {remedy}") from error
    if index.dtype != INDEX_DTYPE or index.shape != (count,):
        raise ValueError(
            f"{field}: {path} has {index.dtype} {index.shape}, expected {INDEX_DTYPE} ({count},); {remedy}"
        )
    return index
