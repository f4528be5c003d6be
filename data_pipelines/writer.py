"""The in-process writer: records in, a prepared folder out.

    <output>/manifest.json                         written last: a folder without it is not finished
    <output>/{train,val}-00000-of-00004.array_record
    <output>/index/<key>.{train,val}.npy           one `records.INDEX_DTYPE` row per record

Holds one set in memory, so it suits sets of up to some gigabytes on one machine.
"""

import collections
import contextlib
import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from unihetero_jax.data import records
from unihetero_jax.data.records import ImageSegment, ImageSpec, Record, RecordError, TextSegment
from unihetero_jax.data.tokenizer import Tokenizer

SPLITS = ("train", "val")
MAX_EXAMPLES = 3
"""Examples kept per reason for dropping, to find the samples again."""


Encode = Callable[[str], Sequence[int]]
IndexRow = tuple[int, int, int, int]
_Entry = tuple[int, bytes, IndexRow]


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A raw sample that made no record: why (a short stable key that is counted), and where it stands."""

    reason: str
    where: str


class _Drops:
    """Counts by reason, with some examples of each."""

    def __init__(self):
        self.counts: collections.Counter[str] = collections.Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, dropped: Dropped) -> None:
        self.counts[dropped.reason] += 1
        examples = self.examples.setdefault(dropped.reason, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(dropped.where)

    def __str__(self) -> str:
        parts = [f"{count} {reason} (e.g. {self.examples[reason][0]})" for reason, count in sorted(self.counts.items())]
        return ", ".join(parts) or "none"


class FolderExists(ValueError):
    """The folder to make is there already, from the start or because another process finished it meanwhile."""


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Gives a folder to write into that becomes `output` at the end, at once: a folder that exists is complete.

    What a killed preparation left under another name is removed first.

    Raises:
        FolderExists: `output` exists; what was written is discarded.
    """
    if output.exists():
        raise FolderExists(f"{output} exists; remove it, or name another folder")
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
    samples: Iterable[Record | Dropped],
    output: Path,
    *,
    source: str,
    tokenizer: Tokenizer,
    spec: ImageSpec,
    licence: str,
    val_share: float = 0.0,
    val_samples: Iterable[Record | Dropped] = (),
    num_shards: int = 4,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Validates, splits, shuffles and writes records, then their index, then the manifest; returns the manifest.

    Order and split follow from each record's content hash alone, so two runs give the same files.

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
    if not 0 <= val_share <= 1:
        raise ValueError(f"--val-share: {val_share} must lie in [0, 1]")
    if output.exists():  # before the work, not after it
        raise FolderExists(f"{output} exists; remove it, or name another folder")
    drops = _Drops()
    by_split: dict[str, list[_Entry]] = {name: [] for name in SPLITS}
    # A set asks the same questions again and again: their lengths are looked up, not computed.
    encode = functools.lru_cache(maxsize=1 << 16)(tokenizer.encode)
    for data, row in _kept(samples, encode, spec, drops):
        is_val = records.content_hash(data) % 2**32 < val_share * 2**32
        by_split["val" if is_val else "train"].append((_shuffle_key(data), data, row))
    for data, row in _kept(val_samples, encode, spec, drops):
        by_split["val"].append((_shuffle_key(data), data, row))
    if not any(by_split.values()):
        raise ValueError(f"{source}: no record was left of {sum(drops.counts.values())} samples; dropped: {drops}")
    with new_folder(output) as partial:
        (partial / "index").mkdir()
        key = records.index_key(tokenizer.hash, spec)
        for name, entries in by_split.items():
            entries.sort(key=lambda entry: entry[:2])
            _write_shards(partial, name, [data for _, data, _ in entries], num_shards)
            np.save(partial / "index" / f"{key}.{name}.npy", _index_rows([row for _, _, row in entries]))
        manifest = {
            "record_version": records.RECORD_VERSION,
            "source": source,
            "licence": licence,
            "num_records": {name: len(entries) for name, entries in by_split.items()},
            "dropped": dict(sorted(drops.counts.items())),
            "dropped_examples": drops.examples,
            "files": {path.name: _describe(path) for path in sorted(partial.glob("*.array_record"))},
            "settings": dict(settings or {}),
        }
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    counts = ", ".join(f"{count} {name}" for name, count in manifest["num_records"].items())
    print(f"{source}: {counts}; dropped: {drops}", flush=True)
    return manifest


def check_prepared(path: Path, settings: Mapping[str, Any] | None = None) -> str:
    """Why a prepared folder cannot be used as it is: missing, made with other settings, damaged. Empty: it can."""
    try:
        manifest = _read_manifest(path)
    except ValueError as error:
        return str(error)
    if settings is not None and manifest["settings"] != dict(settings):
        return f"{path} was made from other data or with other settings"
    for name, expected in manifest["files"].items():
        if not (path / name).is_file() or _describe(path / name) != expected:
            return f"{path / name} is missing or damaged"
    return ""


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a prepared folder.

    Raises:
        ValueError: there is none, or it is none that the writer made.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is missing or has no readable manifest.json ({error})") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"{path} has no readable manifest.json (it holds a {type(manifest).__name__}, no object)")
    for field in ("files", "settings"):
        if not isinstance(manifest.get(field), dict):
            raise ValueError(f"{path} has no readable manifest.json (its {field} is {manifest.get(field)!r:.60})")
    return manifest


def build_index(path: Path, tokenizer: Tokenizer, spec: ImageSpec) -> str:
    """Adds the index of lengths for another tokenizer or image spec to a prepared folder; returns its key.

    Raises:
        ValueError: the folder is not a prepared one, or is damaged.
    """
    if fault := check_prepared(path):
        raise ValueError(f"{fault}; it is no prepared folder, or its preparation did not finish: prepare it again")
    files = _read_manifest(path)["files"]
    key = records.index_key(tokenizer.hash, spec)
    (path / "index").mkdir(exist_ok=True)
    encode = functools.lru_cache(maxsize=1 << 16)(tokenizer.encode)
    for split in SPLITS:
        shards = [os.fspath(path / name) for name in sorted(files) if name.startswith(f"{split}-")]
        rows = [_index_row(records.deserialize(data), encode, spec) for data in _read_all(shards)]
        partial = path / "index" / f".{key}.{split}.{os.getpid()}.npy"
        np.save(partial, _index_rows(rows))
        os.replace(partial, path / "index" / f"{key}.{split}.npy")
    return key


def read_records(path: Path, split: str) -> list[Record]:
    """All records of a split, in stored order.

    Raises:
        ValueError: the folder has no readable manifest.
    """
    files = _read_manifest(path)["files"]
    shards = [os.fspath(path / name) for name in sorted(files) if name.startswith(f"{split}-")]
    return [records.deserialize(data) for data in _read_all(shards)]


def _read_all(shards: Sequence[str]) -> Iterable[bytes]:
    for shard in shards:
        with ArrayRecordDataSource([shard]) as reader:
            for number in range(len(reader)):
                yield reader[number]


def _kept(
    samples: Iterable[Record | Dropped], encode: Encode, spec: ImageSpec, drops: _Drops
) -> Iterator[tuple[bytes, IndexRow]]:
    """Bytes and index row of each record that can be stored; the others are counted."""
    for number, sample in enumerate(samples):
        kept = sample if isinstance(sample, Dropped) else _checked(sample, encode, spec, number)
        if isinstance(kept, Dropped):
            drops.add(kept)
        else:
            yield kept


def _checked(record: Record, encode: Encode, spec: ImageSpec, number: int) -> tuple[bytes, IndexRow] | Dropped:
    """The record's bytes and index row, or why it cannot be stored. Every image is decoded whole once, here."""
    names = dict.fromkeys(name for name in (record.where, str(record.meta.get("id", ""))) if name)
    where = ", id ".join(names) or f"{record.source}, sample {number}"
    try:
        if not record.segments:
            raise RecordError("empty_record", "no segment")
        for segment in record.segments:
            if isinstance(segment, ImageSegment):
                shape = records.decode_image(segment.data).shape
                if shape[:2] != (segment.height, segment.width):
                    raise RecordError("size_mismatch", f"{shape[:2]} against {(segment.height, segment.width)}")
            elif len(segment.text) > records.MAX_TEXT_CHARS:
                raise RecordError("text_too_long", f"{len(segment.text)} characters, limit {records.MAX_TEXT_CHARS}")
        return records.serialize(record), _index_row(record, encode, spec)
    except RecordError as error:
        return Dropped(error.reason, f"{where}: {error}")
    except UnicodeEncodeError as error:
        return Dropped("invalid_text", f"{where}: {error}")


def _index_row(record: Record, encode: Encode, spec: ImageSpec) -> IndexRow:
    num_tokens, num_patches = records.record_cost(record, encode, spec)
    num_images = sum(isinstance(segment, ImageSegment) for segment in record.segments)
    flags = records.FLAG_GENERATED_IMAGE if _generates(record) else 0
    if num_tokens >= 2**32 or num_patches >= 2**16 or num_images >= 2**8:
        flags |= records.FLAG_TOO_LONG
    return min(num_tokens, 2**32 - 1), min(num_patches, 2**16 - 1), min(num_images, 2**8 - 1), flags


def _generates(record: Record) -> bool:
    seen_text = False
    for segment in record.segments:
        if isinstance(segment, ImageSegment) and seen_text:
            return True
        seen_text |= isinstance(segment, TextSegment) and bool(segment.text)
    return False


def _index_rows(rows: Sequence[IndexRow]) -> np.ndarray:
    return np.array(rows, records.INDEX_DTYPE) if rows else np.zeros(0, records.INDEX_DTYPE)


def _shuffle_key(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, person=b"shuffle").digest(), "little")


def _write_shards(folder: Path, split: str, entries: Sequence[bytes], num_shards: int) -> None:
    if not entries:
        return
    num_shards = min(num_shards, len(entries))
    bounds = np.linspace(0, len(entries), num_shards + 1).astype(int)
    for shard, (start, stop) in enumerate(itertools.pairwise(bounds)):
        path = folder / f"{split}-{shard:05d}-of-{num_shards:05d}.array_record"
        writer = ArrayRecordWriter(os.fspath(path), "group_size:1")
        for data in entries[start:stop]:
            writer.write(data)
        writer.close()


def _describe(path: Path) -> dict[str, Any]:
    digest = hashlib.blake2b()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "digest": digest.hexdigest()}
