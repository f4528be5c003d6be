"""Reading a prepared folder: its manifest, and its records with their places, all or an even sample of them."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from array_record.python.array_record_data_source import ArrayRecordDataSource
from etils import epath

from unihetero_jax.data import records
from unihetero_jax.data.records import Record
from unihetero_jax.storage import StorageError, local_copy, read_bytes, to_path

Folder = Path | epath.Path
"""A folder, or a file in one: local, or in a bucket."""
MANIFEST_FIELDS: Mapping[str, type] = {
    "source": str, "licence": str, "num_records": dict, "dropped": dict, "dropped_examples": dict, "files": dict,
    "settings": dict,
}  # fmt: skip
"""What every manifest has, and its type."""
_UNREADABLE = (RuntimeError, OSError, ValueError, IndexError)
"""What the ArrayRecord reader raises for a file that is missing, no such file, or damaged."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """A record where it is stored: its number in its split, its bytes, and its place (file and number in it)."""

    number: int
    record: Record
    data: bytes
    where: str


def read_manifest(path: Folder) -> dict[str, Any]:
    """The manifest of a prepared folder.

    Raises:
        ValueError: there is none, or it is none that the writer made.
    """
    try:
        manifest = json.loads(read_bytes(to_path(path) / "manifest.json"))
    except StorageError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is missing or has no readable manifest.json ({error})") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"{path} has no readable manifest.json (it holds a {type(manifest).__name__}, no object)")
    for field, expected in MANIFEST_FIELDS.items():
        if not isinstance(manifest.get(field), expected):
            raise ValueError(f"{path} has no readable manifest.json (its {field} is {manifest.get(field)!r:.60})")
    return manifest


def shards_of(path: Folder, split: str) -> list[Folder]:
    """The record files of a split, in record order, as the manifest lists them.

    Raises:
        ValueError: the folder has no readable manifest.
    """
    return [path / name for name in sorted(read_manifest(path)["files"]) if name.startswith(f"{split}-")]


def read_stored(path: Folder, split: str, max_records: int = 0) -> Iterator[Stored]:
    """Records of a split in stored order; with `max_records`, so many of them, evenly spaced.

    The stored order is a shuffle by hash, so evenly spaced records are a fair sample, and always the same one.

    Raises:
        ValueError: the folder has no readable manifest, or a file is missing or damaged.
    """
    for _, of_shard in read_shards(path, split, max_records):
        yield from of_shard


def read_shards(path: Folder, split: str, max_records: int = 0) -> Iterator[tuple[Folder, Iterator[Stored]]]:
    """The same file by file: each record file, and its records.

    Raises:
        ValueError: as `read_stored`; damaged records when they are reached.
    """
    files = read_manifest(path)["files"]
    sizes = [(shard, files[shard.name].get("records") or count_records(shard)) for shard in shards_of(path, split)]
    total = sum(size for _, size in sizes)
    count = min(total, max_records or total)
    wanted = (i * total // count for i in range(count))
    number, first = next(wanted, total), 0
    for shard, size in sizes:
        within = []
        while number < first + size:
            within.append(number - first)
            number = next(wanted, total)
        yield shard, _read_shard(shard, within, first)
        first += size


def count_records(shard: Folder) -> int:
    """How many records a file holds.

    Raises:
        ValueError: it is missing or no ArrayRecord file.
    """
    with _opened(shard) as reader:
        return len(reader)


@contextlib.contextmanager
def _opened(shard: Folder) -> Iterator[ArrayRecordDataSource]:
    with contextlib.ExitStack() as opened:
        try:
            file = opened.enter_context(local_copy(shard))
            reader = opened.enter_context(ArrayRecordDataSource([os.fspath(file)]))
        except StorageError:
            raise
        except _UNREADABLE as error:
            raise ValueError(f"{shard} is no readable ArrayRecord file ({error}); prepare the folder again") from error
        yield reader


def _read_shard(shard: Folder, within: Sequence[int], first: int) -> Iterator[Stored]:
    """Records of a file by their numbers in it; its first one has the number `first` in the split."""
    with _opened(shard) as reader:
        for number in within:
            try:
                data = reader[number]
                record = records.deserialize(data)
            except _UNREADABLE as error:  # RecordError is a ValueError
                message = f"{shard}: record {number} cannot be read ({error}); prepare the folder again"
                raise ValueError(message) from error
            yield Stored(first + number, record, data, f"{shard.name}[{number}]")
