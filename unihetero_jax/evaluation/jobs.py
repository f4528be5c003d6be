"""Evaluation as a job that may be killed: items in virtual shards, each written when it is done, merged at the end.

A shard is a fixed range of the items, packed and computed by itself, so an answer depends neither on devices nor on
processes nor on where a job was stopped. All processes compute a shard together; what each found of it comes to
process 0, which writes. A job that is started again goes on after the shards that are there, if they were made by the
same parameters, program, prompt and data; else they are written anew.

    eval/scenes-1000.parts/00000-of-00003.jsonl   {"job": ..., ...} then one answer per line
    eval/scenes-1000.jsonl                        all of them, when all are there
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from unihetero_jax import distributed
from unihetero_jax.storage import file_exists, list_folder, read_bytes, remove_tree
from unihetero_jax.workdir import write_atomically

Answer = dict[str, Any]
"""What was found of one item; at least `index`. Whatever JSON can hold, without NaN."""
AnswerShard = Callable[[Sequence[Any]], list[Answer]]
"""From the items of a shard to their answers, in order, on every process; a collective where the model is one."""


def run_job(
    stem: epath.Path | None,
    identity: Mapping[str, Any],
    items: Sequence[Any],
    shard_items: int,
    answer: AnswerShard,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Answer]:
    """Answers for all items, in order; on process 0 alone, the others get nothing.

    Args:
        stem: path of what is written, without suffix; None keeps nothing.
        identity: everything that an answer depends on; answers of another identity are not used.
        items: of the benchmark, each with an `index`.
        shard_items: items of a shard (the last one may have fewer).
        answer: computes a shard.
        on_progress: called with (items done, items in all) after every shard.
    """
    starts = range(0, len(items), shard_items)
    digest = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=8).hexdigest()
    header = {"job": digest, "num_shards": len(starts), "num_items": len(items), "shard_items": shard_items}
    found = _read_parts(stem, header, shard_items) if stem is not None and distributed.is_lead() else {}
    done = set(json.loads(distributed.broadcast("evaluation-parts", json.dumps(sorted(found)))))
    for number, start in enumerate(starts):
        if number not in done:
            part = answer(items[start : start + shard_items])
            if distributed.is_lead():
                found[number] = part
                if stem is not None:
                    _write_part(stem, header, number, part)
        if on_progress:
            on_progress(min(start + shard_items, len(items)), len(items))
    if not distributed.is_lead():
        return []
    answers = [one for number in sorted(found) for one in found[number]]
    _check_complete(items, answers)
    if stem is not None:
        write_atomically(_merged_path(stem), "\n".join(_lines(header, answers)) + "\n")
        remove_tree(_folder(stem))
    return answers


def _folder(stem: epath.Path) -> epath.Path:
    return stem.parent / f"{stem.name}.parts"


def _merged_path(stem: epath.Path) -> epath.Path:
    return stem.parent / f"{stem.name}.jsonl"


def _part_path(stem: epath.Path, header: Mapping[str, Any], number: int) -> epath.Path:
    return _folder(stem) / f"{number:05d}-of-{header['num_shards']:05d}.jsonl"


def _lines(header: Mapping[str, Any], answers: Sequence[Answer]) -> list[str]:
    return [json.dumps(line, allow_nan=False) for line in (dict(header), *answers)]


def _write_part(stem: epath.Path, header: Mapping[str, Any], number: int, part: Sequence[Answer]) -> None:
    path, text = _part_path(stem, header, number), "\n".join(_lines(header, part)) + "\n"
    for is_last in (False, True):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_atomically(path, text)
            return
        except FileNotFoundError:  # another job on the same step has finished and cleared the folder away
            if is_last:
                raise


def _read_parts(stem: epath.Path, header: Mapping[str, Any], shard_items: int) -> dict[int, list[Answer]]:
    """The shards that are there, alone or merged, and were made by this very job."""
    merged = _read_answers(_merged_path(stem), header)
    if len(merged) == header["num_items"]:
        return {number: merged[number * shard_items :][:shard_items] for number in range(header["num_shards"])}
    names = {path.name for path in list_folder(_folder(stem))}
    paths = {number: _part_path(stem, header, number) for number in range(header["num_shards"])}
    parts = {number: _read_answers(path, header) for number, path in paths.items() if path.name in names}
    return {number: answers for number, answers in parts.items() if answers}


def _read_answers(path: epath.Path, header: Mapping[str, Any]) -> list[Answer]:
    """Nothing if the file is missing, damaged, or of another job: then it is written anew."""
    if not file_exists(path):
        return []
    try:
        first, *answers = (json.loads(line) for line in read_bytes(path).decode().splitlines())
    except ValueError:
        return []
    return answers if first == header else []


def _check_complete(items: Sequence[Any], answers: Sequence[Answer]) -> None:
    """Every item once and in order: a conservation law, whatever was killed and merged."""
    asked, answered = [item.index for item in items], [answer["index"] for answer in answers]
    assert asked == answered, f"{len(asked)} items were asked, {len(answered)} answered, or in another order"
