"""Finds evaluation sets in prepared folders, by picture and by text, and writes folders without what was found.

python -m data_pipelines.decontaminate data/nlvr data/text --against MMBench.tsv POPE.jsonl --report=found.json
python -m data_pipelines.decontaminate data/mine --against SEED.json --images=SEED.zip --write=-clean
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import itertools
import json
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.entries import Dropped, Drops, Entry
from data_pipelines.evaluation_lookup import (
    DOUBTFUL_REASONS,
    PICTURE_REASONS,
    REASONS,
    EvaluationLookup,
    Found,
    Limits,
    surest,
)
from data_pipelines.evaluation_sets import read_evaluation_set
from data_pipelines.prepared import Folder, Stored, read_manifest, read_shards, read_stored
from data_pipelines.writer import (
    SPLITS,
    About,
    check_prepared,
    finish,
    new_folder,
    require_absent,
    write_index,
    write_shard,
)
from unihetero_jax.storage import StorageError, list_folder, local_copy, to_local, to_path
from unihetero_jax.text_table import align

REMOVED = tuple(reason for reason in REASONS if reason not in DOUBTFUL_REASONS)
"""What is removed by default."""
MAX_EXAMPLES = 10
"""Kept in the report for each source, split, set and reason."""
BATCH = 256
"""Records handed to the threads at a time."""


@dataclasses.dataclass(frozen=True)
class Hit:
    """A record in which something was found: its number in its split, its place, and what."""

    number: int
    where: str
    found: tuple[Found, ...]


@dataclasses.dataclass(frozen=True)
class Scan:
    """What was found in a split: how many records were looked up, and those with a find, in stored order."""

    num_records: int
    hits: tuple[Hit, ...]


def scan(stored_records: Iterable[Stored], lookup: EvaluationLookup, num_threads: int = 1) -> Scan:
    """Looks records up. Nearly all the time goes into decoding pictures, which threads share."""
    hits, num_records, remaining = [], 0, iter(stored_records)
    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        while batch := list(itertools.islice(remaining, BATCH)):
            num_records += len(batch)
            finds = pool.map(lookup.find, [stored.record for stored in batch])
            hits += [
                Hit(stored.number, _place(stored), found)
                for stored, found in zip(batch, finds, strict=True)
                if found
            ]  # fmt: skip
    return Scan(num_records, tuple(hits))


def _place(stored: Stored) -> str:
    sample_id = stored.record.meta.get("id")
    return stored.where if sample_id is None else f"{stored.where}, id {sample_id}"


def summarize(scanned: Scan, lookup: EvaluationLookup) -> dict[str, Any]:
    """What was found in a split, set by set.

    Returns:
        records: looked up. sets: for each set of which something was found `records` by reason (a record counts once,
            by its surest), `pictures` and `texts` of the set that were found beyond doubt, and `examples` by reason.
    """
    sets = {name: _summary_of_set(name, scanned, lookup) for name in lookup.sets}
    found = {name: summary for name, summary in sets.items() if summary["records"]}
    return {"records": scanned.num_records, "sets": found}


def _summary_of_set(name: str, scanned: Scan, lookup: EvaluationLookup) -> dict[str, Any]:
    records: collections.Counter[str] = collections.Counter()
    examples: dict[str, list[str]] = {}
    pictures, texts = set[int](), set[int]()
    for hit in scanned.hits:
        own = [found for found in hit.found if lookup.targets[found.target].set_name == name]
        if not own:
            continue
        pictures |= {found.target for found in own if found.reason in PICTURE_REASONS}
        texts |= {found.target for found in own if found.reason == "text"}
        best = surest(own)
        records[best.reason] += 1
        if records[best.reason] <= MAX_EXAMPLES:
            examples.setdefault(best.reason, []).append(_explanation(hit, best, lookup))
    return {
        "records": {reason: records[reason] for reason in REASONS if records[reason]},
        "pictures": len(pictures),
        "texts": len(texts),
        "examples": examples,
    }


def _explanation(hit: Hit, found: Found, lookup: EvaluationLookup) -> str:
    bits, share = f", {found.measure:.0f} bits apart", f", {found.measure:.0%} of its n-grams"
    measure = {"near_image": bits, "near_hash": bits, "text": share}.get(found.reason, "")
    return f"{hit.where}: {found.reason} of {lookup.targets[found.target].where}{measure}"


def records_to_remove(scanned: Scan, lookup: EvaluationLookup, reasons: Collection[str]) -> dict[int, Dropped]:
    """By number in its split: records found for one of these reasons, with the surest of them."""
    removed = {}
    for hit in scanned.hits:
        if found := [found for found in hit.found if found.reason in reasons]:
            best = surest(found)
            removed[hit.number] = Dropped(f"in_evaluation_{best.reason}", _explanation(hit, best, lookup))
    return removed


def write_without(
    path: Folder, output: Folder, removed: Mapping[int, Dropped], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes a prepared folder again without some of its training records; returns the new manifest.

    They are counted with what was dropped before. What is left keeps its order, its shard and its row in every index of
    lengths. One shard is held in memory.

    Args:
        path, output: the folder, and the one to make.
        removed: training records by number, and why.
        settings: added to those of the manifest.

    Raises:
        ValueError: the folder is damaged or has no index of lengths, or the output exists (`FolderExists`).
    """
    manifest = read_manifest(path)
    (key, rows), *others = _read_indices(path).items()
    drops = Drops()
    drops.counts.update(manifest["dropped"])
    drops.examples.update(manifest["dropped_examples"])
    for dropped in removed.values():
        drops.add(dropped)
    about = About(manifest["source"], manifest["licence"], key, manifest["settings"] | dict(settings))
    with new_folder(output) as partial:
        shards = []
        for split in SPLITS:
            gone = removed.keys() if split == "train" else ()
            for shard, stored_records in read_shards(path, split):
                entries = [_entry(s, rows[split], split) for s in stored_records if s.number not in gone]
                if entries:
                    _, number, _, num_shards = shard.stem.split("-")
                    shards.append(write_shard(partial, split, int(number), int(num_shards), entries))
        for other, of_split in others:
            write_index(partial, other, "train", np.delete(of_split["train"], np.array([*removed], int)))
            write_index(partial, other, "val", of_split["val"])
        return finish(partial, shards, drops, about)


def _entry(stored: Stored, rows: np.ndarray, split: str) -> Entry:
    """The stored record to be written again in its place: entries are written in the order of their numbers."""
    return Entry(stored.number, stored.data, rows[stored.number].item(), split, b"", stored.where)


def _read_indices(path: Folder) -> dict[str, dict[str, np.ndarray]]:
    """Every index of lengths of a folder, by key and split."""
    counts = read_manifest(path)["num_records"]
    names = [file.name for file in list_folder(to_path(path) / "index")]
    keys = [name.removesuffix(".train.npy") for name in names if name.endswith(".train.npy") and name[0] != "."]
    if not keys:
        raise ValueError(f"{path} has no index of lengths; make one with python -m data_pipelines.index")
    indices = {}
    for key in keys:
        for split, count in counts.items():
            file = path / "index" / f"{key}.{split}.npy"
            try:
                with local_copy(file) as copy:
                    rows = np.load(copy, allow_pickle=False)
            except StorageError:
                raise
            except (OSError, ValueError, EOFError) as error:
                raise ValueError(f"{file} is no readable index ({error}); remove it, or make it again") from error
            if len(rows) != count:
                raise ValueError(f"{file} has {len(rows)} rows for {count} records; remove it, or make it again")
            indices.setdefault(key, {})[split] = rows
    return indices


def load_evaluation(
    files: Sequence[Path], images: Path | None, limits: Limits, with_images: bool = True
) -> EvaluationLookup:
    """Reads evaluation sets, and says what of them could not be read and will not be found.

    Raises:
        ValueError: a file cannot be read as an evaluation set, or none of its items can.
    """
    lookup = EvaluationLookup(limits)
    names = [path.name for path in files]
    for path in files:
        name = path.name if names.count(path.name) == 1 else str(path)
        lookup.add(name, read_evaluation_set(path, images, with_images))
        added = lookup.sets[name]
        print(
            f"{name}: {added.num_items} items, {added.num_pictures} pictures, {added.num_texts} texts, "
            f"{added.num_templates} template texts not looked for; not read: {added.unread}",
            flush=True,
        )
    return lookup


def format_table(report: Mapping[str, Any]) -> str:
    """The report's counts, a line for each source, split and set; then an example of every kind in each source."""
    table, examples = [["source", "split", "records", "set", *REASONS, "pictures", "texts"]], {}
    for source, splits in report["sources"].items():
        for split, summary in splits.items():
            start = [source, split, f"{summary['records']:,}"]
            if not summary["sets"]:
                table.append([*start, "nothing found", *[""] * (len(REASONS) + 2)])
            for name, found in summary["sets"].items():
                given = report["evaluation_sets"][name]
                shares = [f"{found[kind]:,} of {given[kind]:,}" for kind in ("pictures", "texts")]
                table.append([*start, name, *(str(found["records"].get(reason, "")) for reason in REASONS), *shares])
                for reason, places in found["examples"].items():
                    examples.setdefault((source, reason), f"  {source}/{places[0]}")
    return "\n".join([*align(table), *(["for example", *examples.values()] if examples else [])])


def _decontaminate(flags: argparse.Namespace) -> None:
    limits = Limits(flags.distance, flags.max_difference, flags.ngram, flags.min_share, flags.max_repeats)
    flags.folders = [to_path(folder) for folder in flags.folders]
    outputs = _check(flags)
    lookup = load_evaluation(flags.against, Path(flags.images) if flags.images else None, limits, not flags.texts_only)
    settings = dataclasses.asdict(limits) | {"removed": list(flags.remove)}
    report = {"settings": settings, "evaluation_sets": _described(lookup), "sources": {}}
    removed = {}
    for path in flags.folders:
        scans = {split: scan(read_stored(path, split), lookup, flags.workers) for split in SPLITS}
        report["sources"][str(path)] = {split: summarize(scanned, lookup) for split, scanned in scans.items()}
        removed[path] = records_to_remove(scans["train"], lookup, flags.remove)
    if flags.report:
        _write(to_local(flags.report, "--report"), report)
    print(format_table(report), flush=True)
    made_with = {"decontaminated": {"against": [path.name for path in flags.against]} | settings}
    for path, output in outputs.items():
        if removed[path]:
            write_without(path, output, removed[path], made_with)
        else:
            print(f"{path}: nothing to remove, so {output} was not written", flush=True)


def _check(flags: argparse.Namespace) -> dict[Folder, Folder]:
    """Refuses what cannot end well, before the work; returns the folder to write for each, if any is wanted."""
    if flags.workers < 1:
        raise ValueError(f"--workers: {flags.workers} must be positive")
    outputs = {path: path.with_name(path.name + flags.write) for path in flags.folders} if flags.write else {}
    for output in outputs.values():
        require_absent(output)
    for path in flags.folders:
        if fault := check_prepared(path):
            raise ValueError(f"{fault}; it is no prepared folder, or its preparation did not finish: prepare it again")
    return outputs


def _described(lookup: EvaluationLookup) -> dict[str, Any]:
    return {
        name: {
            "items": given.num_items,
            "pictures": given.num_pictures,
            "texts": given.num_texts,
            "template_texts": given.num_templates,
            "not_read": dict(given.unread.counts),
        }
        for name, given in lookup.sets.items()
    }


def _write(path: Path, report: Mapping[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--report: {path} cannot be written: {error}") from error


def _parser() -> argparse.ArgumentParser:
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m data_pipelines.decontaminate", description=summary)
    parser.add_argument("folders", nargs="+", help="prepared folders, local or in a bucket")
    parser.add_argument("--against", nargs="+", type=Path, required=True, metavar="FILE",
                        help="questions files: MMBench TSV, SEED-Bench JSON, POPE JSON lines")  # fmt: skip
    parser.add_argument("--images", default="", help="folder or zip with their pictures; default: each file's folder")
    parser.add_argument("--texts-only", action="store_true", help="of sets whose pictures are not at hand")
    parser.add_argument("--distance", type=int, default=Limits.max_distance,
                        help="bits of 64 in which near pictures may differ; -1: equal pictures only")  # fmt: skip
    parser.add_argument("--max-difference", type=float, default=Limits.max_difference,
                        help="of near pictures' thumbnails, values 0 to 255")  # fmt: skip
    parser.add_argument("--ngram", type=int, default=Limits.ngram, help="words of an n-gram")
    parser.add_argument("--min-share", type=float, default=Limits.min_share, help="of a text's n-grams to be found")
    parser.add_argument("--max-repeats", type=int, default=Limits.max_repeats,
                        help="wording that more items of a set share is not looked for")  # fmt: skip
    parser.add_argument("--report", default="", help="JSON file to write")
    parser.add_argument("--write", default="", metavar="SUFFIX",
                        help="write folders again, name and SUFFIX, without the training records found")  # fmt: skip
    parser.add_argument("--remove", nargs="+", choices=REASONS, default=list(REMOVED), help="which finds to remove")
    parser.add_argument("--workers", type=int, default=1, help="threads that decode pictures")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    flags = _parser().parse_args(arguments)
    try:
        _decontaminate(flags)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
