"""A preparation: what to read, how to check it, where to write; run in this process, in several, or on Apache Beam.

Whatever runs it, the result is the same, byte by byte: work is cut by input file, records are ordered by their content,
and shards are ranges of that order.
"""

import argparse
import concurrent.futures
import dataclasses
import itertools
import multiprocessing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.entries import Checker, Dropped, Drops, Entry, Filters, without_duplicates
from data_pipelines.layouts import LAYOUTS
from data_pipelines.prepared import Folder
from data_pipelines.writer import About, kept_entries, require_absent, write_entries
from unihetero_jax.data.records import ImageSpec
from unihetero_jax.data.tokenizer import load_tokenizer

Unit = tuple[str, tuple[Path, ...]]
"""Files that one worker reads in turn, and their split (empty: by hash)."""


@dataclasses.dataclass(frozen=True)
class Preparation:
    """Everything that a worker has to know; plain values, so it can be sent anywhere.

    Attributes:
        layout: a name of `LAYOUTS`.
        flags: that layout's flags; `val_flags` those for the files of the validation split.
        source: name stored in each record.
        files: of the training split, or of both where `val_files` is empty.
        val_files: of a validation split of its own.
        tokenizer_folder, spec: what the index of lengths is for.
        filters, val_share: as `Checker` takes them.
        keep_duplicates: keep records of equal content.
        num_shards: files per split.
        about: what the manifest says.
    """

    layout: str
    flags: Mapping[str, Any]
    val_flags: Mapping[str, Any]
    source: str
    files: tuple[Path, ...]
    val_files: tuple[Path, ...]
    tokenizer_folder: str
    spec: ImageSpec
    filters: Filters
    val_share: float
    keep_duplicates: bool
    num_shards: int
    about: About

    def units(self) -> list[Unit]:
        """Cuts the work by file, but for layouts that need all files at once."""
        units: list[Unit] = []
        for split, files in (("train" if self.val_files else "", self.files), ("val", self.val_files)):
            if files and not LAYOUTS[self.layout].reads_file_by_file:
                units.append((split, files))
            else:
                units += [(split, (file,)) for file in files]
        return units

    def read(self, unit: Unit) -> Iterator[Entry | Dropped]:
        """Entries of a unit, and what was dropped.

        Raises:
            ValueError: a file cannot be read as its layout says.
        """
        split, files = unit
        flags = self.val_flags if split == "val" else self.flags
        read = LAYOUTS[self.layout].reader(argparse.Namespace(**flags), self.source)
        checker = Checker(load_tokenizer(self.tokenizer_folder), self.spec, self.filters, self.val_share)
        yield from checker.entries(read(files), split)


def run_locally(job: Preparation, output: Folder, num_workers: int) -> dict[str, Any]:
    """Prepares in `num_workers` processes of this machine, entries held in memory; returns the manifest.

    Raises:
        ValueError: bad input, no record left, or the folder exists.
    """
    require_absent(output)
    drops = Drops()
    entries: Iterable[Entry] = kept_entries(_read_units(job, num_workers), drops)
    if not job.keep_duplicates:
        entries = without_duplicates(entries, drops)
    return write_entries(entries, drops, output, job.about, job.num_shards)


def _read_units(job: Preparation, num_workers: int) -> Iterator[Entry | Dropped]:
    units = job.units()
    if num_workers == 1 or len(units) == 1:
        yield from itertools.chain.from_iterable(job.read(unit) for unit in units)
        return
    # Not forked: the parent may have threads, of pyarrow for one, whose locks a fork would leave closed.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(num_workers, context) as pool:
        for found in pool.map(_read_whole, itertools.repeat(job), units):
            yield from found


def _read_whole(job: Preparation, unit: Unit) -> Sequence[Entry | Dropped]:
    return list(job.read(unit))
