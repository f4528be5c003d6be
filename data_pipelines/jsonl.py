"""Text sets with one document per JSON line or per row of parquet (FineWeb: `text`, `id`, `url`, ...) to records.

`parse_sample` is pure; `read_jsonl` and `read_text_parquet` stream files. A document that is too long becomes several,
as those of plain text do.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.entries import Dropped
from data_pipelines.hf_parquet import open_parquet, read_rows
from data_pipelines.plain_text import parse_document, split_documents
from data_pipelines.text_files import MAX_LINE_BYTES, read_json_lines
from unihetero_jax.data.records import Record


@dataclasses.dataclass(frozen=True)
class JsonlOptions:
    """How lines become records.

    Attributes:
        source: name stored in each record.
        max_chars: characters per record.
        text_field: the field, or column, that holds the text.
        id_field: the field, or column, that names the document; a document without it is named by its place.
        max_line_bytes: of JSONL; longer lines are dropped.
    """

    source: str
    max_chars: int
    text_field: str = "text"
    id_field: str = "id"
    max_line_bytes: int = MAX_LINE_BYTES

    def __post_init__(self):
        for name in ("max_chars", "max_line_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be positive")


def read_jsonl(paths: Sequence[Path], options: JsonlOptions) -> Iterator[Record | Dropped]:
    """Records of JSONL files (.gz and .zst are unpacked), in their order.

    Raises:
        ValueError: a file cannot be read, or is damaged further on.
    """
    for path in paths:
        for where, sample in read_json_lines(path, options.max_line_bytes):
            if isinstance(sample, Dropped):
                yield sample
            else:
                yield from parse_sample(sample, options, where)


def read_text_parquet(paths: Sequence[Path], options: JsonlOptions) -> Iterator[Record | Dropped]:
    """Records of parquet files with a column of text, in their order.

    Raises:
        ValueError: a file is no parquet file, lacks the column, or is damaged further on.
    """
    for path in paths:
        with open_parquet(path, [options.text_field]) as file:
            present = file.schema_arrow.names
            columns = dict.fromkeys(name for name in (options.text_field, options.id_field) if name in present)
            for number, row in enumerate(read_rows(file, path, list(columns))):
                yield from parse_sample(row, options, f"{path.name}[{number}]")


def parse_sample(sample: Any, options: JsonlOptions, where: str) -> Iterator[Record | Dropped]:
    """The records of one document, or why there is none. Several of one document share its id and have a `part`."""
    reason, detail = _fault(sample, options.text_field)
    if reason:
        yield Dropped(reason, f"{where}: {detail}")
        return
    identity = sample.get(options.id_field)
    meta = {"id": str(identity) if isinstance(identity, str | int) and identity != "" else where}
    documents = list(split_documents(sample[options.text_field], options.max_chars))
    for part, document in enumerate(documents, start=1):
        if len(documents) == 1:
            yield parse_document(document, options.source, where, meta)
        else:
            yield parse_document(document, options.source, f"{where}, part {part}", {**meta, "part": part})


def _fault(sample: Any, field: str) -> tuple[str, str]:
    if not isinstance(sample, Mapping):
        return "not_an_object", f"a {type(sample).__name__}"
    if field not in sample:
        return "no_text_field", f"no {field!r} among {', '.join(map(repr, sample))}"[:200]
    text = sample[field]
    if not isinstance(text, str):
        return "text_not_a_string", f"{field!r} is {text!r:.80}"
    if not text.strip():
        return "empty_text", f"{field!r} is blank"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can state
        return "invalid_text", f"{field!r}: {error}"
    return "", ""
