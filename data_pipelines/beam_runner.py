"""Runs a preparation on Apache Beam: DirectRunner on this machine, or a cluster by the runner's own flags.

    read files -> check -> keep one of each content -> group by shard -> write each shard -> index and manifest

No worker holds more than one shard, so `--num-shards` bounds memory. The folder must be one that all workers and this
process reach. A worker that is tried again writes the same bytes under the same name, and the folder gets its own name,
or in a bucket its manifest, only when everything is there.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from etils import epath

from data_pipelines.entries import MAX_EXAMPLES, Dropped, Drops, Entry, best_of
from data_pipelines.preparation import Preparation, Unit
from data_pipelines.prepared import Folder
from data_pipelines.writer import (
    SHARD_RESULTS,
    SPLITS,
    Shard,
    finish,
    new_folder,
    require_absent,
    shard_of,
    write_shard,
)
from unihetero_jax.storage import list_folder, make_folder, read_bytes, remove_tree, to_path, write_bytes


def run_on_beam(job: Preparation, output: Folder, runner: str, runner_flags: Sequence[str] = ()) -> dict[str, Any]:
    """Prepares on a Beam runner; returns the manifest. Same files as `preparation.run_locally`.

    Raises:
        ValueError: Apache Beam is not installed, bad input, no record left, or the folder exists.
    """
    try:
        import apache_beam as beam  # an extra: it needs older versions of other packages
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise ValueError(f"--runner={runner} needs Apache Beam ({error}): pip install -e '.[beam]'") from error
    require_absent(output)
    with new_folder(output) as folder:
        results = to_path(folder) / SHARD_RESULTS
        make_folder(results)
        options = PipelineOptions([f"--runner={runner}", *runner_flags])
        with beam.Pipeline(options=options) as pipeline:
            found = (
                pipeline
                | "files" >> beam.Create(list(enumerate(job.units())))
                | "spread" >> beam.Reshuffle()
                | "read and check" >> beam.FlatMap(_read, job)
            )
            dropped, entries = found | "dropped or kept" >> beam.Partition(_kind, 2)
            if not job.keep_duplicates:
                grouped = (
                    entries
                    | "by content" >> beam.Map(lambda entry: (entry.content, entry))
                    | "same content" >> beam.GroupByKey()
                    | "keep one" >> beam.FlatMap(_keep_one)
                )
                copies, entries = grouped | "copies or kept" >> beam.Partition(_kind, 2)
                dropped = (dropped, copies) | beam.Flatten()
            _ = (
                entries
                | "by shard" >> beam.Map(lambda entry: ((entry.split, shard_of(entry, job.num_shards)), entry))
                | "same shard" >> beam.GroupByKey()
                | "write" >> beam.Map(_write, str(folder), job.num_shards)
            )
            _ = (
                dropped
                | "by reason" >> beam.Map(lambda item: (item.reason, item.where))
                | "same reason" >> beam.GroupByKey()
                | "count" >> beam.Map(_count, str(folder))
            )
        shards, drops = list(_shards(results)), _drops(results)
        remove_tree(results)
        return finish(folder, shards, drops, job.about)


def _read(numbered: tuple[int, Unit], job: Preparation) -> Iterator[Entry | Dropped]:
    yield from job.read(numbered[1])


def _kind(item: Entry | Dropped, num_partitions: int) -> int:
    del num_partitions
    return int(isinstance(item, Entry))


def _keep_one(group: tuple[bytes, Iterable[Entry]]) -> Iterator[Entry | Dropped]:
    kept, copies = best_of(group[1])
    yield kept
    yield from copies


def _write(group: tuple[tuple[str, int], Iterable[Entry]], folder: str, num_shards: int) -> None:
    (split, number), entries = group
    shard = write_shard(to_path(folder), split, number, num_shards, entries)
    _leave(folder, f"{split}-{number:05d}", dataclasses.asdict(shard))


def _count(group: tuple[str, Iterable[str]], folder: str) -> None:
    reason, places = group
    ordered = sorted(places)
    _leave(folder, f"dropped-{reason}", {"reason": reason, "count": len(ordered), "examples": ordered[:MAX_EXAMPLES]})


def _leave(folder: str, name: str, result: dict[str, Any]) -> None:
    write_bytes(to_path(folder) / SHARD_RESULTS / f"{name}.json", json.dumps(result).encode())


def _shards(results: epath.Path) -> Iterator[Shard]:
    for found in _left(results, SPLITS):
        rows: Any = tuple(tuple(row) for row in found["rows"])
        yield Shard(**found | {"rows": rows})


def _drops(results: epath.Path) -> Drops:
    drops = Drops()
    for found in _left(results, ("dropped",)):
        for number, where in enumerate(found["examples"]):
            drops.add(Dropped(found["reason"], where), 1 if number else found["count"] - len(found["examples"]) + 1)
    return drops


def _left(results: epath.Path, kinds: Sequence[str]) -> Iterator[dict[str, Any]]:
    for path in list_folder(results):
        if path.name.partition("-")[0] in kinds:
            yield json.loads(read_bytes(path))
