"""Hugging Face parquet (`image: struct{bytes, path}`, or a list of them, and text, labels or conversations) to records.

`parse_row` is pure; `read_parquet` streams files batch by batch. `open_parquet` and `read_rows` serve any parquet file.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.caption_pairs import pair_record
from data_pipelines.entries import Dropped
from data_pipelines.llava import LlavaOptions, conversation_record
from unihetero_jax.data import records
from unihetero_jax.data.records import (
    ImageSegment,
    Record,
    RecordError,
    Segment,
    TextSegment,
    format_answer,
    format_prompt,
)

BATCH_ROWS = 256


@dataclasses.dataclass(frozen=True)
class ParquetOptions:
    """How rows become records.

    Attributes:
        source: name stored in each record.
        task: `qa`: the image, then independent turns (the label as an answer, the caption as a description);
            `generation`: the caption, then the image; `pair`: image and caption without a prompt, in an order that is
            chosen at load time; `conversation`: as `llava.py` makes them.
        image_column: a struct of `bytes` and `path`, or plain bytes, or a list of either. `qa` and `conversation` take
            several images; `conversation` also takes none, by row or (empty name) at all.
        caption_column, label_column: columns to use; empty: none. A label is text, or an integer whose names the
            file's `huggingface` metadata states.
        questions: wordings of the question that the label answers; an image's bytes choose one.
        caption_prompt: the question that the caption answers.
        conversation_column: a list of messages, structs of `from` and `value` or of `role` and `content`, with the mark
            `<image>` for each image.
        texts_column: the Cauldron's form, a list of structs of `user` and `assistant`, about all images.
        turns, choices: what becomes of a conversation, as in `LlavaOptions`.
    """

    source: str
    task: Literal["qa", "generation", "pair", "conversation"] = "qa"
    image_column: str = "image"
    caption_column: str = ""
    label_column: str = ""
    questions: tuple[str, ...] = ("What is the main object in this image?",)
    caption_prompt: str = "Describe this image."
    conversation_column: str = ""
    texts_column: str = ""
    turns: Literal["independent", "dialogue"] = "independent"
    choices: Literal["letter", "text"] = "letter"

    def __post_init__(self):
        if self.task == "generation" and not self.caption_column:
            raise ValueError("task generation needs a caption column: the text that the image is drawn from")
        if self.task == "pair" and not self.caption_column:
            raise ValueError("task pair needs a caption column: the text that goes with the image")
        given = [name for name in (self.conversation_column, self.texts_column) if name]
        if self.task == "conversation" and len(given) != 1:
            raise ValueError("task conversation needs a conversation column or a texts column, and not both")
        if self.task != "conversation" and given:
            raise ValueError(f"column {given[0]!r} holds conversations: task {self.task} does not use it")
        if self.task == "qa" and not (self.caption_column or self.label_column):
            raise ValueError("task qa needs a label column or a caption column: something to ask about")
        if self.label_column and not self.questions:
            raise ValueError("a label column needs a question that the label answers")

    @property
    def columns(self) -> list[str]:
        """The columns that are read."""
        names = (self.image_column, self.caption_column, self.label_column, self.conversation_column, self.texts_column)
        return [name for name in names if name]


def read_parquet(paths: Sequence[Path], options: ParquetOptions) -> Iterator[Record | Dropped]:
    """Records of parquet files, in their order.

    Raises:
        ValueError: a file is no parquet file, lacks a column, or is damaged further on.
    """
    for path in paths:
        with open_parquet(path, options.columns) as file:
            names = _label_names(file.schema_arrow.metadata, options.label_column)
            for number, row in enumerate(read_rows(file, path, options.columns)):
                yield parse_row(row, options, f"{path.name}[{number}]", names)


@contextlib.contextmanager
def open_parquet(path: Path, columns: Sequence[str]) -> Iterator[pq.ParquetFile]:
    """Opens a parquet file that must have these columns.

    Raises:
        ValueError: it is no parquet file, or lacks a column.
    """
    try:
        file = pq.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are subclasses
        raise ValueError(f"{path}: no readable parquet file: {error}") from error
    with file:
        present = file.schema_arrow.names
        if missing := [name for name in columns if name not in present]:
            raise ValueError(f"{path}: no column {missing[0]!r}; the file has {', '.join(present)}")
        yield file


def read_rows(file: pq.ParquetFile, path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows of an open parquet file, in order, these columns alone.

    Raises:
        ValueError: the file is damaged.
    """
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
        if options.task == "conversation":
            return _conversation(row, options, where)
        return _image_and_text(row, options, where, label_names)
    except RecordError as error:
        return Dropped(error.reason, f"{where}: {error}")


def _conversation(row: Mapping[str, Any], options: ParquetOptions, where: str) -> Record:
    values = _image_values(row, options)
    sample = {"conversations": row.get(options.conversation_column), "texts": row.get(options.texts_column)}
    read_images = [functools.partial(_image_bytes, value) for value in values]
    llava = LlavaOptions(options.source, options.turns, options.choices)
    return conversation_record(sample, read_images, llava, _meta(values, where), where)


def _image_and_text(row: Mapping[str, Any], options: ParquetOptions, where: str, label_names: Sequence[str]) -> Record:
    values = _image_values(row, options)
    images = [_image_bytes(value) for value in values or [None]]
    if len(images) > 1 and options.task != "qa":
        raise RecordError("several_images", f"{len(images)} images, and task {options.task} takes one")
    caption = _text(row, options.caption_column, "empty_caption")
    label = _label(row, options.label_column, label_names)
    meta = _meta(values, where)
    if options.task == "pair":
        return pair_record(options.source, images[0], caption, meta, where)
    segments: list[Segment] = [ImageSegment(data, *records.probe_image(data)) for data in images]
    if options.task == "generation":
        return Record(options.source, "image", (TextSegment(caption, True), *segments), meta, where)
    turns = []
    if label:
        choice = hashlib.blake2b(b"".join(images), digest_size=4).digest()
        turns.append((options.questions[int.from_bytes(choice, "little") % len(options.questions)], label))
    if caption:
        turns.append((options.caption_prompt, caption))
    for branch, (question, answer) in enumerate(turns, start=1):
        segments.append(TextSegment(format_prompt(question), False, branch))
        segments.append(TextSegment(format_answer(answer), True, branch))
    return Record(options.source, "vqa" if label else "caption", tuple(segments), meta, where)


def _image_values(row: Mapping[str, Any], options: ParquetOptions) -> list[Any]:
    value = row.get(options.image_column)
    return value if isinstance(value, list) else [] if value is None else [value]


def _image_bytes(value: Any) -> bytes:
    data = value.get("bytes") if isinstance(value, Mapping) else value
    if not isinstance(data, bytes):  # a path alone points into a cache of the machine that wrote the file
        raise RecordError("missing_image", f"no bytes; path {_image_path(value)!r}")
    return data


def _image_path(value: Any) -> str:
    return str(value.get("path") or "") if isinstance(value, Mapping) else ""


def _meta(images: Sequence[Any], where: str) -> dict[str, str | int | float]:
    return {"id": next(filter(None, map(_image_path, images)), where)}


def _text(row: Mapping[str, Any], column: str, reason: str) -> str:
    if not column:
        return ""
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise RecordError(reason, f"{column} is {value!r:.80}")
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
