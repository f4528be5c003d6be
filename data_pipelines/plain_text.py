"""Plain text files to records: documents of whole paragraphs, of a bounded number of characters.

Nothing is lost: the documents of a file, joined, are the file.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from data_pipelines.entries import Dropped
from unihetero_jax.data.records import Record, TextSegment

_PARAGRAPH = re.compile(r".+?(?:\n(?:[^\S\n]*\n)+|\Z)", re.DOTALL)
"""Text up to and with the blank lines that end it."""


def read_text(paths: Sequence[Path], source: str, max_chars: int) -> Iterator[Record | Dropped]:
    """Records of text files, in their order.

    Raises:
        ValueError: a file cannot be read, or `max_chars` is not positive.
    """
    for path in paths:
        try:
            # Bytes that are no UTF-8 become lone surrogates, so that their document can be found and counted.
            text = path.read_bytes().decode("utf-8", "surrogateescape")
        except OSError as error:
            raise ValueError(f"{path}: cannot be read: {error}") from error
        for number, document in enumerate(split_documents(text, max_chars)):
            yield parse_document(document, source, f"{path.name}[{number}]")


def parse_document(
    text: str, source: str, where: str, meta: Mapping[str, str | int | float] | None = None
) -> Record | Dropped:
    """One document to a record, or why not. Without `meta` its id is its place."""
    if not text.strip():
        return Dropped("empty_text", where)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return Dropped("invalid_text", f"{where}: {error}")
    return Record(source, "text", (TextSegment(text, True),), dict(meta or {"id": where}), where)


def split_documents(text: str, max_chars: int) -> Iterator[str]:
    """Groups paragraphs into documents of at most `max_chars` characters; joined, they are the text.

    A longer paragraph is cut: after a line end, else after a space, else anywhere.

    Raises:
        ValueError: `max_chars` is not positive.
    """
    if max_chars < 1:
        raise ValueError(f"max_chars {max_chars} must be positive")
    document = ""
    for paragraph in _PARAGRAPH.findall(text):
        if document and len(document) + len(paragraph) > max_chars:
            yield document
            document = ""
        start = 0
        while len(paragraph) - start > max_chars:
            end = _cut(paragraph, start, start + max_chars)
            yield paragraph[start:end]
            start = end
        document += paragraph[start:]
    if document:
        yield document


def _cut(text: str, start: int, limit: int) -> int:
    for separator in ("\n", " "):
        at = text.rfind(separator, start, limit)
        if at >= 0:
            return at + 1
    return limit
