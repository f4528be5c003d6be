"""A prepared folder, opened for reading: checked against its manifest, records by number, lengths as an array."""

import bisect
import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from unihetero_jax.data.records import INDEX_DTYPE, RECORD_VERSION, ImageSpec, RecordError, Turns
from unihetero_jax.data.shards import Shard, ShardReaders
from unihetero_jax.storage import StorageError, is_local, read_bytes, size_of, to_path

_ASKING_THREADS = 32
"""Files whose sizes are asked for at one time: an answer of a bucket takes long, and a source may have thousands."""


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of a prepared folder.

    Attributes:
        name: of the source in the mixture.
        field: how the user named its folder, for messages.
        index: lengths of its records (`records.INDEX_DTYPE`), memory-mapped.
        shards: its record files, in record order.
        ends: number of records up to and including each file.
        digest: of the content of all record files of the folder, as its manifest states it.
        readers: what opens the files; safe to share between threads.
        verify_digests: compare each local file's content with its digest at its first touch; else sizes alone.
    """

    name: str
    field: str
    index: np.ndarray
    shards: tuple[Shard, ...]
    ends: tuple[int, ...]
    digest: str
    readers: ShardReaders
    verify_digests: bool

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    @property
    def paths(self) -> tuple[str, ...]:
        """Its record files."""
        return tuple(shard.path for shard in self.shards)

    def read(self, record: int) -> bytes:
        """The stored bytes of a record.

        Raises:
            RecordError: `unreadable_record` if its block of the file is damaged.
            ShardError: its file as a whole is not the one that was prepared, or cannot be had.
        """
        file, within = self._place(record)
        reader = self.readers.open(self.shards[file], self.verify_digests)
        try:
            return reader[within]
        except (RuntimeError, OSError, ValueError, IndexError) as error:  # what the reader raises for damaged blocks
            raise RecordError("unreadable_record", str(error)) from error

    def first(self, number: int) -> "Source":
        """The source of its first so many records.

        Raises:
            ValueError: it has fewer.
        """
        if number > len(self):
            raise ValueError(
                f"{self.field.removesuffix('path')}max_records {number}: there are {len(self)} training records; lower "
                "it, or set it to 0 for all"
            )
        return dataclasses.replace(self, index=self.index[:number], ends=tuple(min(end, number) for end in self.ends))

    @property
    def is_in_bucket(self) -> bool:
        """Whether its files have to be copied before they are read."""
        return bool(self.shards) and not is_local(self.shards[0].path)

    def prefetch(self, records: np.ndarray) -> None:
        """Begins to copy the files of a bucket that hold these records."""
        for file in np.unique(np.searchsorted(self.ends, records, side="right")).tolist():
            self.readers.prefetch(self.shards[file])

    def take_retries(self) -> int:
        """Reads of a bucket that had to be repeated, since the last call."""
        return self.readers.retries.take(self.field)

    def locate(self, record: int) -> str:
        """File and number of a record within it, for messages."""
        file, within = self._place(record)
        return f"{self.shards[file].path}: record {within}"

    def close(self) -> None:
        """Closes the files."""
        for shard in self.shards:
            self.readers.close(shard)

    def _place(self, record: int) -> tuple[int, int]:
        file = bisect.bisect_right(self.ends, record)
        return file, record - (self.ends[file - 1] if file else 0)


def open_source(
    name: str,
    path: str,
    split: str,
    key: str,
    tokenizer_folder: str,
    spec: ImageSpec,
    readers: ShardReaders,
    verify_digests: bool = False,
    turns: Turns = "branches",
) -> Source:
    """Opens a split ("train" or "val") of a prepared folder, after checking that it is whole.

    Args:
        name: of the source, for messages.
        path: the prepared folder, local or in a bucket.
        split: `train` or `val`.
        key: `records.index_key` of the tokenizer, image spec and layout of turns in use.
        tokenizer_folder, spec: that tokenizer's folder and that image spec, for the message that names the remedy.
        readers: what opens the record files.
        verify_digests: also compare every file's content with its digest, when it is read first.
        turns: the layout of turns in use, for that message.

    Raises:
        ValueError: the folder, its manifest, a shard file or the index is missing, cannot be had or does not fit; or
            the split is empty (training only: an empty validation split is a source without records).
    """
    field = f"data.sources.{name}.path"
    try:
        folder = to_path(path)
        manifest = _read_manifest(field, folder, readers)
        count, files = _declared(field, folder, manifest, split)
        if count == 0 and split == "train":
            raise ValueError(
                f"{field}: {folder} holds no training record (manifest.json says num_records.train = 0); "
                "check what the preparation dropped, or remove the source"
            )
        shards = tuple(
            Shard(field, os.fspath(folder / file), entry["bytes"], entry["digest"]) for file, entry in files.items()
        )
        _check_sizes(shards, readers)
        ends = _ends(shards, files.values(), readers)
        if (ends[-1] if ends else 0) != count:
            raise ValueError(
                f"{field}: the {split} files of {folder} hold {ends[-1] if ends else 0} records, manifest.json "
                f"says {count}; prepare the folder again"
            )
        remedy = _index_command(folder, tokenizer_folder, spec, turns)
        index = _read_index(field, folder, split, key, count, remedy, readers)
    except StorageError as error:
        raise ValueError(f"{field}: {error}") from error
    return Source(name, field, index, shards, ends, _digest(manifest), readers, verify_digests)


def _read_manifest(field: str, folder: epath.Path, readers: ShardReaders) -> dict[str, Any]:
    path = folder / "manifest.json"
    if is_local(folder) and not folder.is_dir():
        raise ValueError(
            f"{field}: folder {folder} does not exist; prepare it with data_pipelines, or correct the path"
        )
    try:
        content = read_bytes(path, lambda: readers.retries.add(field))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ValueError(
            f"{field}: {path} does not exist: {folder} is no prepared folder or its preparation was cut "
            "off; prepare it with data_pipelines"
        ) from error
    try:
        manifest = json.loads(content)
        version = manifest["record_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{field}: {path} cannot be read ({error!r}); prepare the folder again") from error
    if version != RECORD_VERSION:
        raise ValueError(
            f"{field}: {path} has record_version {version!r}, this program reads {RECORD_VERSION}; prepare "
            "the folder again"
        )
    return manifest


def _declared(field: str, folder: epath.Path, manifest: dict[str, Any], split: str) -> tuple[int, dict[str, Any]]:
    """How many records a split has, and what the manifest says of each of its files, in record order."""
    try:
        files = {
            file: {**entry, "bytes": int(entry["bytes"]), "digest": str(entry["digest"])}
            for file, entry in sorted(manifest["files"].items())
            if file.startswith(f"{split}-") and file.endswith(".array_record")
        }
        return int(manifest["num_records"].get(split, 0)), files
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{field}: {folder / 'manifest.json'} lacks num_records or files ({error!r}); prepare the folder again"
        ) from error


def _digest(manifest: dict[str, Any]) -> str:
    files = {
        name: {"bytes": entry["bytes"], "digest": entry["digest"]}
        for name, entry in manifest["files"].items()
        if name.endswith(".array_record")
    }
    return hashlib.blake2b(json.dumps(files, sort_keys=True).encode(), digest_size=8).hexdigest()


def _check_sizes(shards: Sequence[Shard], readers: ShardReaders) -> None:
    def size(shard: Shard) -> int | None:
        return size_of(to_path(shard.path), lambda: readers.retries.add(shard.field))

    with concurrent.futures.ThreadPoolExecutor(_ASKING_THREADS) as pool:
        sizes = list(pool.map(size, shards))
    for shard, found in zip(shards, sizes, strict=True):
        place = f"{shard.field}: {shard.path}"
        if found is None:
            raise ValueError(f"{place} is missing, though manifest.json lists it; copy or prepare the folder again")
        if found != shard.num_bytes:
            raise ValueError(
                f"{place} has {found} bytes, manifest.json says {shard.num_bytes}; copy or prepare it again"
            )


def _ends(shards: Sequence[Shard], entries: Iterable[Mapping[str, Any]], readers: ShardReaders) -> tuple[int, ...]:
    """Number of records up to and including each file; a manifest of version 0.1.0 makes it open them all."""
    counts = (
        int(entry["records"]) if "records" in entry else len(readers.open(shard, verify=False))
        for shard, entry in zip(shards, entries, strict=True)
    )
    return tuple(itertools.accumulate(counts))


def _index_command(folder: epath.Path, tokenizer_folder: str, spec: ImageSpec, turns: Turns) -> str:
    """What makes the index that is missing: the spec's flags have defaults, which would give another index."""
    flags = [
        f"--tokenizer={tokenizer_folder}", f"--patch-size={spec.patch_size}", f"--min-patches={spec.min_patches}",
        f"--max-patches={spec.max_patches}", *([] if turns == "branches" else [f"--turns={turns}"]),
    ]  # fmt: skip
    return "run: " + shlex.join(["python", "-m", "data_pipelines.index", os.fspath(folder), *flags])


def _read_index(
    field: str, folder: epath.Path, split: str, key: str, count: int, remedy: str, readers: ShardReaders
) -> np.ndarray:
    if count == 0:
        return np.zeros(0, INDEX_DTYPE)
    path = folder / "index" / f"{key}.{split}.npy"
    try:
        index = np.load(readers.stage_for_good(os.fspath(path), field), mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise ValueError(
            f"{field}: no index of lengths for this tokenizer, model.encoder.patch_size, "
            f"data.image_{{min,max}}_patches and data.turns ({path} does not exist); {remedy}"
        ) from error
    except StorageError:
        raise
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{field}: {path} is not a readable index ({error}); {remedy}") from error
    if index.dtype != INDEX_DTYPE or index.shape != (count,):
        raise ValueError(
            f"{field}: {path} has {index.dtype} {index.shape}, expected {INDEX_DTYPE} ({count},); {remedy}"
        )
    return index
