r"""Writes a page about prepared folders: what was dropped, lengths, priors, what sources share, samples, a packed row.

python -m data_pipelines.report data/real/nlvr data/real/text --tokenizer=data/real/tokenizer --output=report.html \
    --min-patches=64 --max-patches=144 --row-tokens=88 --row-patches=144

Records are sampled evenly, so that memory and time stay bounded; lengths are those of all, from the index of lengths.
"""

import argparse
import collections
import functools
import hashlib
import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from data_pipelines.bias import measure_bias
from data_pipelines.entries import Encode, content_of
from data_pipelines.prepared import Folder, Stored, read_manifest, read_stored
from data_pipelines.report_page import (
    DrawnRow,
    Pictures,
    ShownPicture,
    ShownSample,
    ShownText,
    SourceReport,
    Span,
    render_page,
)
from data_pipelines.spec_flags import add_spec_flags, spec_from_flags
from unihetero_jax.data import records
from unihetero_jax.data.packing import assemble_row, sample_from_record
from unihetero_jax.data.records import ImageSegment, ImageSpec, Record, RecordError, TextSegment
from unihetero_jax.data.row_plan import plan_rows
from unihetero_jax.data.tokenizer import Tokenizer, load_tokenizer
from unihetero_jax.data.transforms import resize_to_grid
from unihetero_jax.storage import StorageError, local_copy, to_local, to_path

ROW_CANDIDATES = 32
"""Records of each source from which rows are packed, one of which is drawn."""


def report_source(
    path: Folder,
    name: str,
    tokenizer: Tokenizer,
    spec: ImageSpec,
    *,
    sample: int,
    num_shown: int,
    row_size: tuple[int, int] | None,
) -> SourceReport:
    """Measures one prepared folder.

    Args:
        path, name: the folder, and what the page calls it.
        tokenizer, spec: what the index of lengths is for, and what samples are shown with.
        sample: records looked at of each split; 0: all.
        num_shown: samples on the contact sheet.
        row_size: token positions and patches of a row, to count what fits none.

    Raises:
        ValueError: it is no prepared folder, is damaged, or has no index for tokenizer and spec.
    """  # fmt: skip
    manifest = read_manifest(path)
    index = _read_index(path, tokenizer, spec)
    kinds: collections.Counter[str] = collections.Counter()
    contents: set[bytes] = set()
    for stored in read_stored(path, "train", sample):
        kinds[stored.record.kind] += 1
        contents.add(content_of(stored.record))
    encode = functools.lru_cache(1 << 16)(tokenizer.encode)
    return SourceReport(
        name=name,
        manifest=manifest,
        token_lengths=index["num_tokens"],
        patch_lengths=index["num_patches"],
        num_too_long=None if row_size is None else int((~_fits(index, row_size)).sum()),
        kinds=kinds,
        num_copies=kinds.total() - len(contents),
        bias=measure_bias(_records(path, "train", sample)),
        pictures=measure_pictures(_records(path, "train", sample), spec),
        val_pictures=measure_pictures(_records(path, "val", sample), spec),
        samples=tuple(show_sample(s, encode, spec) for s in _first(path, num_shown)),
    )


def _records(path: Folder, split: str, sample: int) -> Iterator[Record]:
    return (stored.record for stored in read_stored(path, split, sample))


def _first(path: Folder, count: int) -> Iterator[Stored]:
    """The first training records in stored order, which is a shuffle."""
    return itertools.islice(read_stored(path, "train"), count)


def _read_index(path: Folder, tokenizer: Tokenizer, spec: ImageSpec) -> np.ndarray:
    file = path / "index" / f"{records.index_key(tokenizer.hash, spec)}.train.npy"
    try:
        with local_copy(file) as copy:
            return np.load(copy, allow_pickle=False).astype(records.INDEX_DTYPE, copy=False)
    except StorageError:
        raise
    except (OSError, ValueError, EOFError, TypeError) as error:
        raise ValueError(
            f"{path} has no readable index of lengths for this tokenizer, --patch-size, --min-patches and "
            f"--max-patches ({error}); correct these flags, or make one with python -m data_pipelines.index"
        ) from error


def _fits(index: np.ndarray, row_size: tuple[int, int]) -> np.ndarray:
    is_short = (index["num_tokens"] <= row_size[0]) & (index["num_patches"] <= row_size[1])
    return is_short & ((index["flags"] & records.FLAG_TOO_LONG) == 0)


def measure_pictures(sampled: Iterable[Record], spec: ImageSpec) -> Pictures:
    """Sizes and identities of the pictures of records; none is decoded."""
    shapes: collections.Counter[tuple[int, int]] = collections.Counter()
    digests: collections.Counter[bytes] = collections.Counter()
    num_enlarged = 0
    for record in sampled:
        for segment in record.segments:
            if isinstance(segment, ImageSegment):
                shapes[segment.height, segment.width] += 1
                digests[hashlib.blake2b(segment.data, digest_size=16).digest()] += 1
                grid_h, grid_w = records.image_grid(segment.height, segment.width, spec)
                num_enlarged += grid_h * grid_w * spec.patch_size**2 > segment.height * segment.width
    return Pictures(shapes, digests, num_enlarged)


def show_sample(stored: Stored, encode: Encode, spec: ImageSpec) -> ShownSample:
    """A stored record as the page shows it: its pictures resized as the loader does."""
    parts: list[ShownText | ShownPicture] = []
    for segment in stored.record.segments:
        if isinstance(segment, TextSegment):
            parts.append(ShownText(segment.text, segment.loss, segment.branch))
            continue
        size = segment.height, segment.width
        try:
            pixels = resize_to_grid(records.decode_image(segment.data), spec)
            parts.append(ShownPicture(pixels, size, spec.patch_size))
        except RecordError as error:
            parts.append(ShownPicture(None, size, spec.patch_size, str(error)))
    num_tokens, num_patches = records.record_cost(stored.record, encode, spec)
    return ShownSample(stored.where, stored.record.kind, num_tokens, num_patches, tuple(parts))


def draw_row(
    candidates: Sequence[tuple[str, Stored]], tokenizer: Tokenizer, spec: ImageSpec, row_tokens: int, row_patches: int
) -> DrawnRow | None:
    """Packs (source, record) into rows as the loader does, and draws the one with most sources; None: none fits."""
    costs = [records.record_cost(stored.record, tokenizer.encode, spec) for _, stored in candidates]
    fitting = [i for i, cost in enumerate(costs) if cost[0] <= row_tokens and cost[1] <= row_patches]
    if not fitting:
        return None
    rows = plan_rows(np.array([costs[i] for i in fitting]), row_tokens, row_patches)
    chosen = max(rows, key=lambda members: (len({candidates[fitting[m]][0] for m in members}), len(members)))
    members = [candidates[fitting[member]] for member in chosen]
    samples = [sample_from_record(stored.record, tokenizer, spec) for _, stored in members]
    arrays = assemble_row(samples, row_tokens, row_patches, spec.patch_size, tokenizer.pad_id)
    used = int((arrays["patch_segment_ids"] > 0).sum())
    places = tuple((source, stored.where) for source, stored in members)
    return DrawnRow(tuple(spans_of(arrays)), places, used, row_patches)


def spans_of(row: dict[str, np.ndarray]) -> list[Span]:
    """Neighbouring positions of one kind and sample, from the arrays of a packed row."""
    visual = np.where(row["visual_loss_mask"], "visual_supervised", "visual")
    text = np.where(row["text_loss_mask"], "supervised", "context")
    kinds = np.where(row["segment_ids"] == 0, "padding", np.where(row["visual_mask"], visual, text)).tolist()
    spans, start = [], 0
    for (kind, sample), group in itertools.groupby(zip(kinds, row["segment_ids"].tolist(), strict=True)):
        length = len(list(group))
        spans.append(Span(kind, start, length, sample))
        start += length
    return spans


def _report(flags: argparse.Namespace) -> None:
    if flags.sample < 0 or flags.shown < 0:
        raise ValueError(f"--sample {flags.sample}, --shown {flags.shown}: neither can be negative")
    if (flags.row_tokens > 0) != (flags.row_patches > 0):
        raise ValueError(
            "--row-tokens and --row-patches: give both, as data.row_tokens and data.row_patches, or neither"
        )
    tokenizer, spec = load_tokenizer(flags.tokenizer), spec_from_flags(flags)
    folders = [to_path(folder) for folder in flags.folders]
    short = [path.name for path in folders]
    names = [path.name if short.count(path.name) == 1 else str(path) for path in folders]
    row_size = (flags.row_tokens, flags.row_patches) if flags.row_tokens > 0 else None
    sources = [
        report_source(path, name, tokenizer, spec, sample=flags.sample, num_shown=flags.shown, row_size=row_size)
        for path, name in zip(folders, names, strict=True)
    ]
    facts = {
        "tokenizer": f"{flags.tokenizer} ({tokenizer.vocab_size:,} tokens)",
        "pictures": f"patches of {spec.patch_size} pixels, {spec.min_patches} to {spec.max_patches} a picture",
        "sample": f"{flags.sample:,} records of each split" if flags.sample else "all records",
    }
    row = None
    if row_size is not None:
        facts["row"] = f"{flags.row_tokens:,} token positions, {flags.row_patches:,} patches"
        candidates = [
            (name, stored) for path, name in zip(folders, names, strict=True) for stored in _first(path, ROW_CANDIDATES)
        ]
        row = draw_row(candidates, tokenizer, spec, *row_size)
    _write(to_local(flags.output, "--output"), render_page(sources, facts, row))
    print(f"{flags.output}: {', '.join(names)}", flush=True)


def _write(path: Path, page: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise ValueError(f"--output: {path} cannot be written: {error}") from error


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m data_pipelines.report", description=summary)
    parser.add_argument("folders", nargs="+", help="prepared folders, local or in a bucket")
    parser.add_argument("--tokenizer", required=True, help="folder with a tokenizer.json")
    parser.add_argument("--output", required=True, help="HTML file to write")
    parser.add_argument("--sample", type=int, default=20_000, help="records of each split to look at; 0: all")
    parser.add_argument("--shown", type=int, default=6, help="samples of each source to show")
    parser.add_argument("--row-tokens", type=int, default=0, help="data.row_tokens, to draw a packed row")
    parser.add_argument("--row-patches", type=int, default=0, help="data.row_patches")
    add_spec_flags(parser)
    flags = parser.parse_args(arguments)
    try:
        _report(flags)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
