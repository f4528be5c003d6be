"""Hugging Face parquet (`image: struct{bytes, path}` and columns of text or labels) to records.

`parse_row` is pure; `read_parquet` streams files batch by batch.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.writer import Dropped
from unihetero_jax.data import records
from unihetero_jax.data.records import ImageSegment, Record, RecordError, TextSegment, format_answer, format_prompt

BATCH_ROWS = 256


@dataclasses.dataclass(frozen=True)
class ParquetOptions:
    """How rows become records.

    Attributes:
        source: name stored in each record.
        task: `qa`: the image, then independent turns (the label as an answer, the caption as a description);
            `generation`: the caption, then the image.
        image_column: a struct of `bytes` and `path`, or plain bytes.
        caption_column, label_column: columns to use; empty: none. A label is text, or an integer whose names the
            file's `huggingface` metadata states.
        questions: wordings of the question that the label answers; an image's bytes choose one.
        caption_prompt: the question that the caption answers.
    """

    source: str
    task: Literal["qa", "generation"] = "qa"
    image_column: str = "image"
    caption_column: str = ""
    label_column: str = ""
    questions: tuple[str, ...] = ("What is the main object in this image?",)
    caption_prompt: str = "Describe this image."

    def __post_init__(self):
        if self.task == "generation" and not self.caption_column:
            raise ValueError("task generation needs a caption column: the text that the image is drawn from")
        if self.task == "qa" and not (self.caption_column or self.label_column):
            raise ValueError("task qa needs a label column or a caption column: something to ask about")
        if self.label_column and not self.questions:
            raise ValueError("a label column needs a question that the label answers")


def read_parquet(paths: Sequence[Path], options: ParquetOptions) -> Iterator[Record | Dropped]:
    """Records of parquet files, in their order.

    Raises:
        ValueError: a file is no parquet file, lacks a column, or is damaged further on.
    """
    wanted = [name for name in (options.image_column, options.caption_column, options.label_column) if name]
    for path in paths:
        try:
            file = pq.ParquetFile(path)
        except (OSError, ValueError) as error:  # pyarrow's own errors are subclasses
            raise ValueError(f"{path}: no readable parquet file: {error}") from error
        with file:
            columns = file.schema_arrow.names
            if missing := [name for name in wanted if name not in columns]:
                raise ValueError(f"{path}: no column {missing[0]!r}; the file has {', '.join(columns)}")
            names = _label_names(file.schema_arrow.metadata, options.label_column)
            for number, row in enumerate(_rows(file, path, wanted)):
                yield parse_row(row, options, f"{path.name}[{number}]", names)


def _rows(file: pq.ParquetFile, path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    number = 0
    try:
        for batch in file.iter_batches(BATCH_ROWS, columns=list(columns)):
            rows = batch.to_pylist()
            yield from rows
            number += len(rows)
    except (OSError, ValueError, pa.ArrowException) as error:  # a page that cannot be unpacked, text that is no UTF-8
        detail = " ".join(str(error).split())  # pyarrow's messages have several lines
        raise ValueError(f"{path}: damaged after row {number}: {detail}; fetch the file again") from error


def parse_row(
    row: Mapping[str, Any], options: ParquetOptions, where: str, label_names: Sequence[str] = ()
) -> Record | Dropped:
    """One row to a record, or why not. `label_names` gives the text of integer labels."""
    try:
        data, path = _image_bytes(row.get(options.image_column))
        caption = _text(row, options.caption_column, "empty_caption")
        label = _label(row, options.label_column, label_names)
        image = ImageSegment(data, *records.probe_image(data))
    except RecordError as error:
        return Dropped(error.reason, f"{where}: {error}")
    meta: dict[str, str | int | float] = {"id": path or where}
    if options.task == "generation":
        return Record(options.source, "image", (TextSegment(caption, True), image), meta, where)
    turns = []
    if label:
        choice = hashlib.blake2b(data, digest_size=4).digest()
        turns.append((options.questions[int.from_bytes(choice, "little") % len(options.questions)], label))
    if caption:
        turns.append((options.caption_prompt, caption))
    segments: list[TextSegment | ImageSegment] = [image]
    for branch, (question, answer) in enumerate(turns, start=1):
        segments.append(TextSegment(format_prompt(question), False, branch))
        segments.append(TextSegment(format_answer(answer), True, branch))
    return Record(options.source, "vqa" if label else "caption", tuple(segments), meta, where)


def _image_bytes(value: Any) -> tuple[bytes, str]:
    if isinstance(value, Mapping):
        data, path = value.get("bytes"), value.get("path") or ""
    else:
        data, path = value, ""
    if not isinstance(data, bytes):  # a path alone points into a cache of the machine that wrote the file
        raise RecordError("missing_image", f"no bytes; path {path!r}")
    return data, str(path)


def _text(row: Mapping[str, Any], column: str, reason: str) -> str:
    if not column:
        return ""
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise RecordError(reason, f"{column} is {value!r}")
    return value.strip()


def _label(row: Mapping[str, Any], column: str, names: Sequence[str]) -> str:
    number = row.get(column)
    if isinstance(number, int):
        if not 0 <= number < len(names):
            raise RecordError("unknown_label", f"{column} is {number}, the file names {len(names)} labels")
        return names[number].strip()
    return _text(row, column, "empty_label")


def _label_names(metadata: Mapping[bytes, bytes] | None, column: str) -> Sequence[str]:
    """Names of a `ClassLabel` column as the `datasets` library stores them; empty if the file states none."""
    try:
        feature = json.loads((metadata or {})[b"huggingface"])["info"]["features"][column]
        return tuple(str(name) for name in feature["names"])
    except (KeyError, ValueError, TypeError):
        return ()
