"""Prepares everything for `make real`: NLVR, CIFAR-10 and plain text, one tokenizer, and their benchmarks.

python -m data_pipelines.real --data=../shared/data --output=data/real

Finished parts are skipped, so the command can be repeated; a part that was stopped midway is made again.
"""

import argparse
import csv
import dataclasses
import hashlib
import os
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from data_pipelines.entries import Dropped, Samples, texts_of
from data_pipelines.hf_parquet import ParquetOptions, read_parquet
from data_pipelines.image_files import DAMAGED_ZIP
from data_pipelines.llava import LlavaOptions, read_llava
from data_pipelines.plain_text import read_text
from data_pipelines.writer import check_prepared, write_prepared
from unihetero_jax.data.question_files import MAX_REFERENCE_CHARS
from unihetero_jax.data.records import ImageSegment, ImageSpec, Record, TextSegment
from unihetero_jax.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

VERSION = 1
VOCAB_SIZE = 2048
"""Enough that every word of the questions and answers is one token; the output layer of a small model stays cheap."""
SPEC = ImageSpec(patch_size=8, min_patches=64, max_patches=144)
"""CIFAR-10 (32 x 32) becomes 64 x 64, 16 visual tokens; NLVR (400 x 100) becomes 192 x 48, 36 visual tokens."""
TEXT_CHARS = 150
"""Characters per text document: it fits the 88 tokens of a row of `experiments/real_small.py`."""
STATED = "Is the following statement true or false?"
STATED_IN_BENCHMARK = "Is the following statement about the image true?"
TSV = "evalmini/MMBench_DEVMINI.tsv"
BENCHMARKS = {
    "cifar10": ("cifar10", ("object_recognition",)),
    "nlvr": ("nlvr", ("attribute", "spatial_relation", "counting", "object_localization")),
}
"""Name of each benchmark written: the rows' source and categories."""
LICENCES = {"nlvr": "CC-BY-4.0", "cifar10": "none stated", "text": "public domain"}
NEEDED = (
    "nlvr/llava_train.json", "nlvr/images_train.zip", "nlvr/llava_val.json", "nlvr/images_val.zip",
    "cifar10/train-*.parquet", "cifar10/val-*.parquet",
    "text/tinyshakespeare_train.txt", "text/tinyshakespeare_val.txt",
    TSV, "evalmini/images_DEVMINI.zip",
)  # fmt: skip


def _nlvr(data: Path, split: str, options: LlavaOptions) -> Samples:
    return read_llava(data / f"nlvr/llava_{split}.json", data / f"nlvr/images_{split}.zip", options)


def _questions(data: Path, split: str) -> Samples:
    return _nlvr(data, split, LlavaOptions("nlvr", choices="text", first_turn=1))


def _statements(data: Path, split: str) -> Samples:
    replacements = {STATED: STATED_IN_BENCHMARK}
    return _nlvr(data, split, LlavaOptions("nlvr_statements", last_turn=1, replacements=replacements))


def _nlvr_images(data: Path, split: str) -> Samples:
    """A true sentence is a correct caption of its image; a false one is not, and is left out."""
    for sample in _nlvr(data, split, LlavaOptions("nlvr_generation", last_turn=1, replacements={STATED: ""})):
        if isinstance(sample, Dropped):
            yield sample
            continue
        image, statement, truth = sample.segments
        assert isinstance(statement, TextSegment) and isinstance(truth, TextSegment)
        if truth.text.strip() == "true":
            segments = (TextSegment(statement.text.strip(), True), image)
            yield dataclasses.replace(sample, kind="image", segments=segments)
        else:
            yield Dropped("false_statement", sample.where)


def _photos(data: Path, split: str) -> Samples:
    options = ParquetOptions("cifar10", "qa", caption_column="caption", label_column="label_name")
    return read_parquet(sorted(data.glob(f"cifar10/{split}-*.parquet")), options)


def _photo_images(data: Path, split: str) -> Samples:
    options = ParquetOptions("cifar10_generation", "generation", caption_column="caption")
    return read_parquet(sorted(data.glob(f"cifar10/{split}-*.parquet")), options)


def _text(data: Path, split: str) -> Samples:
    return read_text([data / f"text/tinyshakespeare_{split}.txt"], "text", TEXT_CHARS)


PARTS: Mapping[str, tuple[str, Callable[[Path, str], Samples]]] = {
    "nlvr": ("nlvr", _questions),
    "nlvr_statements": ("nlvr", _statements),
    "nlvr_generation": ("nlvr", _nlvr_images),
    "cifar10": ("cifar10", _photos),
    "cifar10_generation": ("cifar10", _photo_images),
    "text": ("text", _text),
}
"""Name of each prepared folder: the raw folder it comes from, and its reader."""


def evaluation_images(data: Path) -> set[bytes]:
    """Digests of the bytes of every benchmark picture.

    Raises:
        ValueError: the archive is damaged; without it no one could say which pictures must not be trained on.
    """
    path = data / "evalmini/images_DEVMINI.zip"
    try:
        with zipfile.ZipFile(path) as archive:
            return {_digest(archive.read(name)) for name in archive.namelist() if not name.endswith("/")}
    except DAMAGED_ZIP as error:
        raise ValueError(f"{path}: no readable zip file ({error}); fetch it again") from error


def without_images(samples: Samples, digests: set[bytes]) -> Iterator[Record | Dropped]:
    """Drops, and lets count, records that hold one of these pictures: no benchmark picture may be trained on."""
    for sample in samples:
        if isinstance(sample, Record) and any(
            isinstance(segment, ImageSegment) and _digest(segment.data) in digests for segment in sample.segments
        ):
            yield Dropped("in_evaluation", sample.where)
        else:
            yield sample


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def write_benchmark(table: Path, output: Path, source: str, categories: Iterable[str]) -> int:
    """Writes the rows of an MMBench TSV that come from a source and have one of the categories; returns how many.

    A picture that its row took from a row left out here is written into the first row that needs it.

    Raises:
        ValueError: no row is left, or a row's picture is missing.
    """
    csv.field_size_limit(2**30)
    with table.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, delimiter="\t")
        rows, columns = list(reader), list(reader.fieldnames or ())
    if missing := {"index", "category", "image", "source"} - set(columns):
        raise ValueError(f"{table}: no column {sorted(missing)[0]!r}")
    images = {row["index"]: row["image"] for row in rows}
    wanted = set(categories)
    kept = [row for row in rows if row["source"] == source and row["category"] in wanted]
    if not kept:
        raise ValueError(f"{table}: no row with source {source} and category {', '.join(sorted(wanted))}")
    first_row: dict[str, str] = {}
    for row in kept:
        holder = row["image"] if len(row["image"]) <= MAX_REFERENCE_CHARS else row["index"]
        if len(images.get(holder, "")) <= MAX_REFERENCE_CHARS:
            raise ValueError(f"{table}: row {row['index']}: its picture should be in row {holder!r}, which has none")
        row["image"] = first_row.get(holder) or images[holder]
        first_row.setdefault(holder, row["index"])
    partial = output.with_name(f".{output.name}.{os.getpid()}")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
    os.replace(partial, output)
    return len(kept)


def prepare(data: Path, output: Path) -> None:
    """Makes what is not there yet of the tokenizer, the prepared folders and the benchmarks.

    Raises:
        ValueError: the raw data are missing, or `output` was prepared from other data or in another way.
    """
    check_raw_data(data)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(data, output / "tokenizer")
    in_evaluation = evaluation_images(data)
    for name, (folder, read) in PARTS.items():
        settings = {
            "version": VERSION, "tokenizer": tokenizer.hash,
            "patches": [SPEC.patch_size, SPEC.min_patches, SPEC.max_patches], "raw": _raw_sizes(data, folder),
        } | ({"text_chars": TEXT_CHARS} if name == "text" else {})  # fmt: skip
        folder_fault = check_prepared(output / name, settings)
        if not folder_fault:
            print(f"{output / name}: finished earlier", flush=True)
            continue
        if (output / name).exists():
            raise ValueError(f"{folder_fault}; remove {output / name} to prepare it anew")
        train = without_images(read(data, "train"), in_evaluation)
        write_prepared(train, output / name, source=name, tokenizer=tokenizer, spec=SPEC, licence=LICENCES[folder],
                       val_samples=read(data, "val"), settings=settings)  # fmt: skip
    (output / "benchmarks").mkdir(exist_ok=True)
    for name, (source, categories) in BENCHMARKS.items():
        path = output / "benchmarks" / f"{name}.tsv"
        print(f"{path}: {write_benchmark(data / TSV, path, source, categories)} questions", flush=True)


def check_raw_data(data: Path) -> None:
    """Raises ValueError, naming the first thing that is missing, unless all raw files are there."""
    for pattern in NEEDED:
        if not any(data.glob(pattern)):
            sets = "nlvr, cifar10, text and evalmini"
            raise ValueError(f"--data: {data} holds no {pattern}; give the folder with the raw sets {sets}")


def _tokenizer(data: Path, folder: Path) -> Tokenizer:
    if not (folder / "tokenizer.json").exists():
        texts = (text for _, read in PARTS.values() for text in texts_of(read(data, "train")))
        train_tokenizer(texts, VOCAB_SIZE, folder)
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > VOCAB_SIZE:
        size = tokenizer.vocab_size
        raise ValueError(f"{folder} has {size} tokens, more than {VOCAB_SIZE}; remove the folder to train it anew")
    return tokenizer


def _raw_sizes(data: Path, folder: str) -> dict[str, int]:
    files = (path for pattern in NEEDED if pattern.startswith(f"{folder}/") for path in data.glob(pattern))
    return {path.name: path.stat().st_size for path in sorted(files)}


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data_pipelines.real", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", default="../shared/data", help="folder with the raw sets")
    parser.add_argument("--output", default="data/real", help="folder to prepare")
    flags = parser.parse_args(arguments)
    try:
        prepare(Path(flags.data), Path(flags.output))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
