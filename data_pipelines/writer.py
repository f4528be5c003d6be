"""The in-process writer: records in, a prepared folder out.

    <output>/manifest.json                         written last: a folder without it is not finished
    <output>/{train,val}-00000-of-00004.array_record
    <output>/index/<key>.{train,val}.npy           one `records.INDEX_DTYPE` row per record

Holds one set in memory, so it suits sets of up to some gigabytes on one machine.
"""

import collections
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
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


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A raw sample that made no record: why (a short stable key that is counted), and where it stands."""

    reason: str
    where: str


def write_prepared(
    samples: Iterable[Record | Dropped],
    output: Path,
    *,
    source: str,
    tokenizer: Tokenizer,
    spec: ImageSpec,
    licence: str,
    val_share: float = 0.0,
    split: str = "",
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
        val_share: share of records that go to the validation split, by hash.
        split: `train` or `val` to put all records there (a set that brings its own split), else empty.
        num_shards: files per split.
        settings: kept in the manifest, to see later how the folder was made.

    Raises:
        ValueError: no record was left, or the folder exists.
    """
    if output.exists():
        raise ValueError(f"{output} exists; remove it, or name another folder")
    dropped: collections.Counter[str] = collections.Counter()
    examples: dict[str, list[str]] = {}
    by_split: dict[str, list[tuple[int, bytes, tuple]]] = {name: [] for name in SPLITS}
    for number, sample in enumerate(samples):
        kept = sample if isinstance(sample, Dropped) else _checked(sample, tokenizer, spec, number)
        if isinstance(kept, Dropped):
            dropped[kept.reason] += 1
            examples.setdefault(kept.reason, [])
            if len(examples[kept.reason]) < MAX_EXAMPLES:
                examples[kept.reason].append(kept.where)
            continue
        data, row = kept
        by_hash = "val" if records.content_hash(data) % 2**32 < val_share * 2**32 else "train"
        by_split[split or by_hash].append((_shuffle_key(data), data, row))
    if not any(by_split.values()):
        raise ValueError(f"{source}: no record was left of {sum(dropped.values())} samples; dropped: {dict(dropped)}, "
                         f"for example {examples}")
    partial = output.with_name(f"{output.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "index").mkdir(parents=True)
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
        "dropped": dict(sorted(dropped.items())),
        "dropped_examples": examples,
        "files": {path.name: _describe(path) for path in sorted(partial.glob("*.array_record"))},
        "settings": dict(settings or {}),
    }
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    os.replace(partial, output)
    counts = ", ".join(f"{count} {name}" for name, count in manifest["num_records"].items())
    lost = ", ".join(f"{count} {reason} (e.g. {examples[reason][0]})" for reason, count in manifest["dropped"].items())
    print(f"{output}: {counts}; dropped: {lost or 'none'}", flush=True)
    return manifest


def build_index(path: Path, tokenizer: Tokenizer, spec: ImageSpec) -> str:
    """Adds the index of lengths for another tokenizer or image spec to a prepared folder; returns its key.

    Raises:
        ValueError: the folder is not a prepared one.
    """
    manifest_path = path / "manifest.json"
    if not manifest_path.exists():
        raise ValueError(f"{path}: no manifest.json; this is no prepared folder, or its preparation did not finish")
    files = json.loads(manifest_path.read_text())["files"]
    key = records.index_key(tokenizer.hash, spec)
    for split in SPLITS:
        shards = [os.fspath(path / name) for name in sorted(files) if name.startswith(f"{split}-")]
        rows = [_index_row(records.deserialize(data), tokenizer, spec) for data in _read_all(shards)]
        partial = path / "index" / f".{key}.{split}.{os.getpid()}.npy"
        np.save(partial, _index_rows(rows))
        os.replace(partial, path / "index" / f"{key}.{split}.npy")
    return key


def read_records(path: Path, split: str) -> list[Record]:
    """All records of a split, in stored order."""
    files = json.loads((path / "manifest.json").read_text())["files"]
    shards = [os.fspath(path / name) for name in sorted(files) if name.startswith(f"{split}-")]
    return [records.deserialize(data) for data in _read_all(shards)]


def _read_all(shards: Sequence[str]) -> Iterable[bytes]:
    for shard in shards:
        with ArrayRecordDataSource([shard]) as reader:
            for number in range(len(reader)):
                yield reader[number]


def _checked(record: Record, tokenizer: Tokenizer, spec: ImageSpec, number: int) -> tuple[bytes, tuple] | Dropped:
    """The record's bytes and index row, or why it cannot be stored. Every image is decoded whole once, here."""
    where = str(record.meta.get("id", f"sample {number}"))
    try:
        for segment in record.segments:
            if isinstance(segment, ImageSegment):
                shape = records.decode_image(segment.data).shape
                if shape[:2] != (segment.height, segment.width):
                    raise RecordError("size_mismatch", f"{shape[:2]} against {(segment.height, segment.width)}")
            elif len(segment.text) > records.MAX_TEXT_CHARS:
                raise RecordError("text_too_long", f"{len(segment.text)} characters, limit {records.MAX_TEXT_CHARS}")
        if not record.segments:
            raise RecordError("empty_record")
        return records.serialize(record), _index_row(record, tokenizer, spec)
    except RecordError as error:
        return Dropped(error.reason, f"{where}: {error}")
    except UnicodeEncodeError as error:
        return Dropped("invalid_text", f"{where}: {error}")


def _index_row(record: Record, tokenizer: Tokenizer, spec: ImageSpec) -> tuple[int, int, int, int]:
    num_tokens, num_patches = records.record_cost(record, tokenizer.encode, spec)
    num_images = sum(isinstance(segment, ImageSegment) for segment in record.segments)
    flags = records.FLAG_GENERATED_IMAGE if _generates(record) else 0
    if num_tokens >= 2**32 or num_patches >= 2**16 or num_images >= 2**8:
        return 2**32 - 1, 2**16 - 1, min(num_images, 2**8 - 1), flags | records.FLAG_TOO_LONG
    return num_tokens, num_patches, num_images, flags


def _generates(record: Record) -> bool:
    seen_text = False
    for segment in record.segments:
        if isinstance(segment, ImageSegment) and seen_text:
            return True
        seen_text |= isinstance(segment, TextSegment) and bool(segment.text)
    return False


def _index_rows(rows: Sequence[tuple]) -> np.ndarray:
    return np.array(rows, records.INDEX_DTYPE) if rows else np.zeros(0, records.INDEX_DTYPE)


def _shuffle_key(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, person=b"shuffle").digest(), "little")


def _write_shards(folder: Path, split: str, entries: Sequence[bytes], num_shards: int) -> None:
    if not entries:
        return
    num_shards = min(num_shards, len(entries))
    bounds = np.linspace(0, len(entries), num_shards + 1).astype(int)
    for shard, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
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
