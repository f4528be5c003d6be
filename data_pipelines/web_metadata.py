"""Sets that are published as tables of URLs (LAION, COYO, DataComp), with the tars that img2dataset fetched for them.

The table (parquet) has the caption, the licence and scores of each image; the tar has the image, and in its json what a
row is found by: `url`, or DataComp's `uid`. Column names are found whatever their case, since LAION's vary.

`parse_pair` is pure; `read_web_metadata` joins. Each sample of the tars comes out once, as a record or dropped, and so
does each row without a sample.
"""

import bisect
import dataclasses
import hashlib
import math
import operator
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from data_pipelines.caption_pairs import pair_record
from data_pipelines.entries import Dropped
from data_pipelines.hf_parquet import open_parquet
from data_pipelines.webdataset import Sample, image_of, meta_of, metadata_of, read_samples
from unihetero_jax.data.records import Record, RecordError

MAX_TABLE_BYTES = 4 * 2**30
"""Of the rows held for the join (our choice: some 30 million rows of LAION, at about 130 bytes each)."""
SCORES = (
    "similarity", "punsafe", "pwatermark", "aesthetic", "aesthetic_score",  # LAION
    "clip_similarity_vitb32", "clip_similarity_vitl14", "nsfw_score_opennsfw2", "nsfw_score_gantman",
    "watermark_score", "aesthetic_score_laion_v2",  # COYO
    "clip_b32_similarity_score", "clip_l14_similarity_score",  # DataComp
)  # fmt: skip
"""Columns of numbers that records keep where the table has them."""
LABELS = ("license", "nsfw")
"""Columns of text that records keep where the table has them."""
KEY_DTYPE = np.dtype("u8,u8")
"""What rows are found by: the halves of a uid, as DataComp's subsets store it, or of a URL's digest of 128 bits."""

Key = tuple[int, int]
_BATCH_ROWS = 1 << 16
_SUBSET_BLOCK = 1 << 20
_COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "==": operator.eq}
_FILTER = re.compile(r"([A-Za-z_]\w*)\s*(>=|<=|==|>|<)\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)", re.ASCII)


@dataclasses.dataclass(frozen=True)
class RowFilter:
    """A condition on a column of numbers, such as `similarity>=0.3`; the column's name in lower case."""

    column: str
    comparison: str
    bound: float


@dataclasses.dataclass(frozen=True)
class WebMetadataOptions:
    """How rows and samples become records.

    Attributes:
        source: name stored in each record.
        join: what a row is found by. `auto`: `uid` if the first table has that column, else `url`.
        caption_column: of the table.
        filters: conditions that a row must meet.
    """

    source: str
    join: Literal["auto", "url", "uid"] = "auto"
    caption_column: str = "text"
    filters: tuple[RowFilter, ...] = ()

    def __post_init__(self):
        if unfit := [each.column for each in self.filters if each.column in ("key", "caption")]:
            raise ValueError(f"filter on {unfit[0]!r}: filters are on columns of numbers")


def parse_filter(text: str) -> RowFilter:
    """A filter from its text: a column, one of >= <= > < ==, and a number.

    Raises:
        ValueError: it is none.
    """
    match = _FILTER.fullmatch(text.strip())
    if match is None or not math.isfinite(float(match[3])):
        raise ValueError(f"filter {text!r} must be a column, one of >= <= > < == and a number, like similarity>=0.3")
    return RowFilter(match[1].lower(), match[2], float(match[3]))


def read_web_metadata(
    paths: Sequence[Path], metadata: Sequence[Path], options: WebMetadataOptions, subset: Path | None = None
) -> Iterator[Record | Dropped]:
    """Records of tars of samples whose captions are in tables: samples in their order, then rows without a sample.

    Args:
        paths: tars.
        metadata: parquet files; what is needed of them is held in memory, up to `MAX_TABLE_BYTES`.
        options: how rows and samples become records.
        subset: an .npy file of DataComp: the uids to keep.

    Raises:
        ValueError: a file is not of its format, lacks a column, or is damaged further on; the tables are too large.
    """
    rows = read_metadata(metadata, options)
    if subset is not None and rows.join != "uid":
        raise ValueError(f"{subset}: a subset is of uids, and the metadata has URLs alone")
    chosen = None if subset is None else read_subset(subset)
    for path in paths:
        for sample in read_samples(path):
            yield sample if isinstance(sample, Dropped) else _joined(sample, rows, chosen, options)
    yield from rows.without_sample()


def _joined(sample: Sample, rows: "Rows", chosen: np.ndarray | None, options: WebMetadataOptions) -> Record | Dropped:
    try:
        metadata = metadata_of(sample)
        key = make_key(rows.join, metadata.get(rows.join))
        if key is None:
            raise RecordError(f"no_{rows.join}", f"the json has {metadata.get(rows.join)!r:.80}")
        row = rows.take(key, metadata.get("caption"))
        if row is None:
            raise RecordError("no_row", f"no row has {rows.join} {metadata[rows.join]!r:.200}")
        if chosen is not None and not len(_places(chosen, key)):
            raise RecordError("not_in_subset", f"uid {metadata['uid']!r}")
    except RecordError as error:
        return Dropped(error.reason, f"{sample.name}: {error}")
    return parse_pair(sample, metadata, row, options)


def parse_pair(
    sample: Sample, metadata: Mapping[str, Any], row: Mapping[str, Any], options: WebMetadataOptions
) -> Record | Dropped:
    """One sample, the fields of its json and its row to a pair, without a prompt, or why not."""
    try:
        for each in options.filters:
            _check(each, row.get(each.column))
        kept = {name: row.get(name) for name in (*SCORES, *LABELS)}
        meta = meta_of(sample, metadata) | {
            "licence" if name == "license" else name: value for name, value in kept.items() if _is_stated(value)
        }
        if isinstance(metadata.get("uid"), str):
            meta["uid"] = metadata["uid"]
        return pair_record(options.source, image_of(sample), row.get("caption"), meta, sample.name)
    except RecordError as error:
        return Dropped(error.reason, f"{sample.name}: {error}")


def _check(condition: RowFilter, value: Any) -> None:
    if not _is_stated(value):
        raise RecordError(f"no_{condition.column}", "the row has no value to filter by")
    if not _COMPARISONS[condition.comparison](value, condition.bound):
        detail = f"{value} is not {condition.comparison} {condition.bound}"
        raise RecordError(f"filtered_{condition.column}", detail)


def _is_stated(value: Any) -> typing.TypeGuard[str | float]:
    return value is not None and value != "" and not (isinstance(value, float) and math.isnan(value))


# ---------------------------------------------------------------- rows


def make_key(join: str, value: object) -> Key | None:
    """What a row is found by; None: the value is no uid or URL."""
    if not isinstance(value, str) or not value:
        return None
    if join == "url":
        value = hashlib.blake2b(value.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return (int(value[:16], 16), int(value[16:], 16)) if re.fullmatch("[0-9a-fA-F]{32}", value) else None


_File = tuple[str, int]
"""A file's name and the number of its first row."""


class Rows:
    """Rows of tables, found by key, with a mark at those that were asked for.

    Attributes:
        join: the column that the keys come from.
    """

    def __init__(self, join: str, columns: pa.Table, keys: np.ndarray, numbers: np.ndarray, files: list[_File]):
        """`numbers` are the rows that `keys` are of."""
        self.join = join
        self._columns = columns
        order = np.lexsort((keys["f1"], keys["f0"]))
        self._keys, self._numbers = keys[order], numbers[order]
        self._files = files
        self._taken = np.zeros(columns.num_rows, bool)

    def take(self, key: Key, caption: object) -> dict[str, Any] | None:
        """The row with a key, which is then marked: of several the one with this caption, else the first."""
        numbers = [int(self._numbers[place]) for place in _places(self._keys, key)]
        if not numbers:
            return None
        rows = [self._columns.slice(number, 1).to_pylist()[0] for number in numbers]
        chosen = next((place for place, row in enumerate(rows) if row["caption"] == caption), 0)
        self._taken[numbers[chosen]] = True
        return rows[chosen]

    def without_sample(self) -> Iterator[Dropped]:
        """What was never asked for, and (`row_without_key`) what never could be."""
        has_key = np.zeros(len(self._taken), bool)
        has_key[self._numbers] = True
        names, starts = zip(*self._files, strict=True)
        for number in np.flatnonzero(~self._taken):
            file = bisect.bisect_right(starts, number) - 1
            reason = "row_without_sample" if has_key[number] else "row_without_key"
            yield Dropped(reason, f"{names[file]}[{number - starts[file]}]")


def _places(keys: np.ndarray, key: Key) -> range:
    """Where a key stands in sorted keys."""
    start = bisect.bisect_left(keys, key, key=operator.methodcaller("item"))
    stop = bisect.bisect_right(keys, key, lo=start, key=operator.methodcaller("item"))
    return range(start, stop)


def read_metadata(paths: Sequence[Path], options: WebMetadataOptions) -> Rows:
    """The rows of tables: keys, captions, and what records keep or filters ask for.

    Raises:
        ValueError: a file is no parquet file, lacks a column or is damaged, or the rows are too large.
    """
    join, columns = _needed_columns(paths, options)
    kinds = _kinds(columns, options)
    batches: list[pa.RecordBatch] = []
    keys: list[np.ndarray] = [np.zeros(0, KEY_DTYPE)]
    numbers: list[np.ndarray] = [np.zeros(0, np.int64)]
    files: list[_File] = []
    num_rows = size = 0
    for path, own_names in zip(paths, columns, strict=True):
        files.append((path.name, num_rows))
        for values, batch in _batches(path, own_names, kinds):
            made = [make_key(join, value) for value in values]
            keys.append(np.array([key for key in made if key is not None], KEY_DTYPE))
            numbers.append(num_rows + np.flatnonzero([key is not None for key in made]))
            batches.append(batch)
            num_rows += batch.num_rows
            size += batch.nbytes + keys[-1].nbytes + numbers[-1].nbytes
            if size > MAX_TABLE_BYTES:
                raise ValueError(
                    f"{path}: the {num_rows} rows so far take more than {MAX_TABLE_BYTES} bytes; convert the set in "
                    "parts, each with the metadata files that its tars were fetched from"
                )
    table = pa.Table.from_batches(batches, pa.schema(list(kinds.items())))
    return Rows(join, table, np.concatenate(keys), np.concatenate(numbers), files)


_OwnNames = dict[str, str | None]
"""Under which name a file has the key, the caption and each other column; None: it has none."""


def _needed_columns(paths: Sequence[Path], options: WebMetadataOptions) -> tuple[str, list[_OwnNames]]:
    """What rows are found by, and the columns to read of each file."""
    present: list[list[str]] = []
    for path in paths:
        with open_parquet(path, []) as file:
            present.append(file.schema_arrow.names)
    if not present:
        raise ValueError("--metadata: give the parquet files of the set")
    join = options.join
    if join == "auto":
        join = "uid" if _own_name(present[0], "uid", paths[0]) else "url"
    required = {"key": join, "caption": options.caption_column}
    required |= {each.column: each.column for each in options.filters}
    columns = []
    for path, names in zip(paths, present, strict=True):
        found = {name: _own_name(names, wanted, path) for name, wanted in required.items()}
        if missing := [required[name] for name, own_name in found.items() if own_name is None]:
            raise ValueError(f"{path}: no column {missing[0]!r}; the file has {', '.join(names)}")
        columns.append({name: _own_name(names, name, path) for name in (*SCORES, *LABELS)} | found)
    return join, columns


def _kinds(columns: Sequence[_OwnNames], options: WebMetadataOptions) -> dict[str, pa.DataType]:
    """The columns to hold, of those that a file has, and their types: the same for all files, so that rows fit."""
    held = {name: None for of_file in columns for name, own_name in of_file.items() if own_name and name != "key"}
    texts = {"caption", *LABELS} - {each.column for each in options.filters}
    return {name: pa.string() if name in texts else pa.float64() for name in held}


def _own_name(names: Sequence[str], wanted: str, path: Path) -> str | None:
    if wanted in names:
        return wanted
    alike = [name for name in names if name.lower() == wanted.lower()]
    if len(alike) > 1:
        raise ValueError(f"{path}: columns {' and '.join(alike)} differ in case alone; which is {wanted!r}?")
    return alike[0] if alike else None


def _batches(
    path: Path, own_names: _OwnNames, kinds: Mapping[str, pa.DataType]
) -> Iterator[tuple[list[Any], pa.RecordBatch]]:
    """The values of the key, and the other columns under our names, some rows at a time."""
    to_read = dict.fromkeys(own_name for own_name in own_names.values() if own_name is not None)
    number = 0
    try:
        with open_parquet(path, []) as file:
            for batch in file.iter_batches(_BATCH_ROWS, columns=list(to_read)):
                batch.validate(full=True)  # text that is no UTF-8 would come to light row by row
                held = {name: _column(batch, own_names[name], kind, path) for name, kind in kinds.items()}
                yield batch.column(own_names["key"]).to_pylist(), pa.RecordBatch.from_pydict(held)
                number += batch.num_rows
    except (OSError, pa.ArrowException) as error:
        detail = " ".join(str(error).split())
        raise ValueError(f"{path}: damaged after row {number}: {detail}; fetch the file again") from error


def _column(batch: pa.RecordBatch, own_name: str | None, kind: pa.DataType, path: Path) -> pa.Array:
    if own_name is None:
        return pa.nulls(batch.num_rows, kind)
    values = batch.column(own_name)
    try:
        if pa.types.is_float32(values.type):
            values = values.cast(pa.string())  # the shortest decimal: as a float32, .1 would be more than .1
        return values.cast(kind)
    except pa.ArrowException as error:
        raise ValueError(f"{path}: column {own_name!r} ({values.type}) cannot be read as {kind}: {error}") from error


# ---------------------------------------------------------------- subsets


def read_subset(path: Path) -> np.ndarray:
    """The sorted uids of a subset of DataComp, as halves; left on disk.

    Raises:
        ValueError: the file is no .npy of `u8,u8`, or is not sorted.
    """
    try:
        uids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: no readable .npy file: {error}") from error
    if not isinstance(uids, np.ndarray) or uids.dtype != KEY_DTYPE or uids.ndim != 1:
        kind = f"{uids.dtype} {uids.shape}" if isinstance(uids, np.ndarray) else "an .npz"
        raise ValueError(f"{path}: a subset is one list of u8,u8 (the halves of each uid) in an .npy, this is {kind}")
    for start in range(0, len(uids), _SUBSET_BLOCK):
        block = uids[start : start + _SUBSET_BLOCK + 1]
        high, low = block["f0"], block["f1"]
        if np.any((high[1:] < high[:-1]) | ((high[1:] == high[:-1]) & (low[1:] < low[:-1]))):
            raise ValueError(f"{path}: the uids are not sorted; sort them with numpy's sort() and save them again")
    return uids
