"""The writer: records in, a prepared folder out.

    <output>/manifest.json                         written last: a folder without it is not finished
    <output>/{train,val}-00000-of-00004.array_record
    <output>/index/<key>.{train,val}.npy           one `records.INDEX_DTYPE` row per record

`write_prepared` holds one set in memory. Shards are ranges of the shuffled order, so a cluster writes the same files
with `write_shard` and `finish`, no worker holding more than a shard.
"""

import contextlib
import dataclasses
import errno
import functools
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from data_pipelines.entries import Checker, Dropped, Drops, Entry, IndexRow, Samples, index_row
from data_pipelines.prepared import Folder, read_manifest, read_stored
from unihetero_jax import __version__
from unihetero_jax.data import records
from unihetero_jax.data.records import ImageSpec, Record
from unihetero_jax.data.tokenizer import Tokenizer
from unihetero_jax.storage import (
    digest_of,
    file_exists,
    is_local,
    list_folder,
    local_copy,
    local_target,
    make_folder,
    remove_tree,
    to_path,
    write_bytes,
)

SPLITS = ("train", "val")
SHARD_RESULTS = "shard-results"
"""Folder, removed at the end, in which workers of a cluster leave what they wrote and dropped."""
_SHARD_NAME = re.compile(r"(train|val)-\d{5}-of-\d{5}\.array_record")
_LEFT_FOLDERS = ("index", SHARD_RESULTS)


class FolderExists(ValueError):
    """The folder to make is there already, from the start or because another process finished it meanwhile."""


@contextlib.contextmanager
def new_folder(output: Folder) -> Iterator[Folder]:
    """Gives a folder to write into that becomes `output` at the end, at once: a folder that exists is complete.

    What a killed preparation left under another name is removed first. In a bucket nothing can be renamed: what is
    written is in its place already, and the manifest, which comes last, makes a prepared folder of it.

    Raises:
        FolderExists: `output` exists; what was written is discarded.
    """
    require_absent(output)
    if not is_local(output):
        _clear_leftovers(to_path(output))
        yield output
        return
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    for left in output.parent.glob(f"{output.name}.partial-*"):
        if not _runs(left.name.rpartition("-")[2]):
            shutil.rmtree(left, ignore_errors=True)
    partial = output.with_name(f"{output.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        _put_in_place(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _clear_leftovers(output: epath.Path) -> None:
    """Removes what a killed preparation left in a bucket, and nothing else.

    Raises:
        FolderExists: there is something that no preparation writes.
    """
    for path in (found := list_folder(output)):
        if not (_SHARD_NAME.fullmatch(path.name) or path.name in _LEFT_FOLDERS):
            raise FolderExists(f"{output} holds {path.name}, which no preparation wrote; name another folder")
    if found:
        remove_tree(output)


def _put_in_place(partial: Path, output: Path) -> None:
    try:
        os.replace(partial, output)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        message = f"{output} was made by another process meanwhile; use it, or name another folder"
        raise FolderExists(message) from error


def _runs(pid: str) -> bool:
    """Whether a process of this machine has the id; folders of other machines' processes may be taken for dead."""
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        return True
    except (ValueError, OSError):
        return False
    return True


def write_prepared(
    samples: Samples,
    output: Folder,
    *,
    source: str,
    tokenizer: Tokenizer,
    spec: ImageSpec,
    licence: str,
    val_share: float = 0.0,
    val_samples: Samples = (),
    num_shards: int = 4,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Checks, splits, shuffles and writes records, then their index, then the manifest; returns the manifest.

    Order and split follow from each record's content alone, so two runs give the same files.

    Args:
        samples: from a parse function; what it dropped is counted with what fails validation here.
        output: folder to make.
        source: name stored in the manifest.
        tokenizer, spec: what the index of lengths is for.
        licence: of the data, kept in the manifest.
        val_share: share of `samples` that goes to the validation split, by hash.
        val_samples: all for the validation split, of a set that brings its own; dropped ones are counted likewise.
        num_shards: files per split.
        settings: kept in the manifest, to see later how the folder was made.

    Raises:
        ValueError: no record was left, the folder exists (`FolderExists`), or `val_share` is no share.
    """
    require_absent(output)  # before the work, not after it
    checker, drops = Checker(tokenizer, spec, val_share=val_share), Drops()
    found = itertools.chain(checker.entries(samples), checker.entries(val_samples, "val"))
    about = About(source, licence, records.index_key(tokenizer.hash, spec), dict(settings or {}))
    return write_entries(list(kept_entries(found, drops)), drops, output, about, num_shards)


def kept_entries(found: Iterable[Entry | Dropped], drops: Drops) -> Iterator[Entry]:
    """The entries among what was found; the rest is counted."""
    for item in found:
        if isinstance(item, Dropped):
            drops.add(item)
        else:
            yield item


@dataclasses.dataclass(frozen=True)
class About:
    """What a manifest says besides counts and files: source, licence, key of its index, how the folder was made."""

    source: str
    licence: str
    index_key: str
    settings: Mapping[str, Any]


def write_entries(
    entries: Iterable[Entry], drops: Drops, output: Folder, about: About, num_shards: int
) -> dict[str, Any]:
    """Writes a prepared folder from entries held in memory; returns its manifest.

    Raises:
        ValueError: there is no entry, or the folder exists (`FolderExists`).
    """
    shards: dict[tuple[str, int], list[Entry]] = {}
    for entry in entries:
        shards.setdefault((entry.split, shard_of(entry, num_shards)), []).append(entry)
    with new_folder(output) as partial:
        written = [write_shard(partial, *place, num_shards, members) for place, members in sorted(shards.items())]
        return finish(partial, written, drops, about)


def require_absent(output: Folder) -> None:
    """Raises FolderExists if there is a folder of this name already; in a bucket: a prepared one."""
    if output.exists() if is_local(output) else file_exists(to_path(output) / "manifest.json"):
        raise FolderExists(f"{output} exists; remove it, or name another folder")


def require_writable(output: Folder) -> None:
    """Raises ValueError, before the work, if a local folder cannot be made here."""
    if not is_local(output):
        return
    try:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=Path(output).parent):
            pass
    except OSError as error:
        raise ValueError(f"--output: {output} cannot be written ({error.strerror or error}); name another") from error


def shard_of(entry: Entry, num_shards: int) -> int:
    """The shard that holds an entry: equal ranges of the shuffled order, so that no one has to see all entries."""
    return entry.order * num_shards >> 64


@dataclasses.dataclass(frozen=True)
class Shard:
    """A shard that was written: its split, number, file, rows of the index in file order, size and digest."""

    split: str
    number: int
    file: str
    rows: tuple[IndexRow, ...]
    description: Mapping[str, Any]


def write_shard(folder: Folder, split: str, number: int, num_shards: int, entries: Iterable[Entry]) -> Shard:
    """Writes the entries of one shard in their order."""
    name = f"{split}-{number:05d}-of-{num_shards:05d}.array_record"
    ordered = sorted(entries)
    with local_target(folder / name) as path:
        writer = ArrayRecordWriter(os.fspath(path), "group_size:1")
        for entry in ordered:
            writer.write(entry.data)
        writer.close()
        description = {"records": len(ordered), **_describe(path)}
    return Shard(split, number, name, tuple(entry.row for entry in ordered), description)


def finish(folder: Folder, shards: Iterable[Shard], drops: Drops, about: About) -> dict[str, Any]:
    """Writes index and manifest beside the shards of a folder; returns the manifest.

    Raises:
        ValueError: there is no record at all.
    """
    ordered = sorted(shards, key=lambda shard: (shard.split, shard.number))
    if not ordered:
        dropped = sum(drops.counts.values())
        raise ValueError(f"{about.source}: no record was left of {dropped} samples; dropped: {drops}")
    num_records = {}
    for split in SPLITS:
        rows = [row for shard in ordered if shard.split == split for row in shard.rows]
        num_records[split] = len(rows)
        write_index(folder, about.index_key, split, rows)
    manifest = {
        "record_version": records.RECORD_VERSION,
        "program_version": __version__,
        "source": about.source,
        "licence": about.licence,
        "num_records": num_records,
        "dropped": dict(sorted(drops.counts.items())),
        "dropped_examples": dict(sorted(drops.examples.items())),
        "files": {shard.file: dict(shard.description) for shard in ordered},
        "settings": dict(about.settings),
    }
    write_bytes(to_path(folder) / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())
    counts = ", ".join(f"{count} {name}" for name, count in num_records.items())
    print(f"{about.source}: {counts}; dropped: {drops}", flush=True)
    return manifest


def check_prepared(path: Folder, settings: Mapping[str, Any] | None = None) -> str:
    """Why a prepared folder cannot be used as it is: missing, made with other settings, damaged. Empty: it can."""
    try:
        manifest = read_manifest(path)
    except ValueError as error:
        return str(error)
    if settings is not None and manifest["settings"] != dict(settings):
        return f"{path} was made from other data or with other settings"
    for name, expected in manifest["files"].items():
        if not _is_whole(path / name, expected):
            return f"{path / name} is missing or damaged"
    return ""


def _is_whole(path: Folder, expected: Mapping[str, Any]) -> bool:
    if not file_exists(to_path(path)):
        return False
    with local_copy(path) as copy:
        return _describe(copy).items() <= expected.items()


def build_index(path: Folder, tokenizer: Tokenizer, spec: ImageSpec, turns: records.Turns = "branches") -> str:
    """Adds the index of lengths for another tokenizer, image spec or layout of turns; returns its key.

    Raises:
        ValueError: the folder is not a prepared one, or is damaged.
    """
    if fault := check_prepared(path):
        raise ValueError(f"{fault}; it is no prepared folder, or its preparation did not finish: prepare it again")
    key = records.index_key(tokenizer.hash, spec, turns)
    encode = functools.lru_cache(maxsize=1 << 16)(tokenizer.encode)
    for split in SPLITS:
        rows = [index_row(stored.record, encode, spec, turns) for stored in read_stored(path, split)]
        write_index(path, key, split, rows)
    return key


def read_records(path: Folder, split: str) -> list[Record]:
    """All records of a split, in stored order.

    Raises:
        ValueError: the folder has no readable manifest, or a file is missing or damaged.
    """
    return [stored.record for stored in read_stored(path, split)]


def write_index(folder: Folder, key: str, split: str, rows: Sequence[IndexRow] | np.ndarray) -> None:
    """Writes the index of lengths of a split; any earlier one is replaced at once."""
    make_folder(to_path(folder) / "index")
    with local_target(folder / "index" / f"{key}.{split}.npy") as path:
        np.save(path, np.array(rows, records.INDEX_DTYPE))


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "digest": digest_of(path)}
