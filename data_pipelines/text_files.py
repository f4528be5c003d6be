"""Text files as raw layouts bring them, plain or compressed (.gz, .zst): lines of bounded length, and JSON.

Others wrote these files, so a line is never read beyond a bound, and whatever is wrong with one costs that line alone.
"""

import gzip
import io
import json
import typing
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from data_pipelines.entries import Dropped

MAX_LINE_BYTES = 16 * 2**20
"""Longer lines are dropped (our choice: 16 times the longest text that a record may hold)."""
_UNREADABLE = (OSError, EOFError, zlib.error)
"""What reading a file, `gzip` and pyarrow's zstd raise: no such file, damaged or cut short."""
_NO_JSON = (ValueError, RecursionError)
"""What `json.loads` raises: no JSON or no UTF-8, brackets nested deeper than the interpreter's stack."""


def open_file(path: Path) -> BinaryIO:
    """Opens a file for reading bytes, unpacked if its name ends in .gz or .zst.

    Raises:
        OSError: it cannot be opened.
    """
    if path.suffix.lower() == ".gz":
        return typing.cast(BinaryIO, gzip.open(path, "rb"))
    if path.suffix.lower() == ".zst":
        stream = pa.input_stream(str(path), compression="zstd")
        return typing.cast(BinaryIO, io.BufferedReader(typing.cast(io.RawIOBase, stream)))
    return path.open("rb")


def read_lines(path: Path, max_bytes: int = MAX_LINE_BYTES) -> Iterator[tuple[str, bytes | Dropped]]:
    """Place (file and line number, from 1) and content of each line, without its line end.

    A line of more than `max_bytes` is dropped; no more than that is held at a time.

    Raises:
        ValueError: the file cannot be read, or is damaged further on.
    """
    number = 0
    try:
        with open_file(path) as file:
            while line := file.readline(max_bytes + 1):
                number += 1
                where = f"{path.name}, line {number}"
                if len(line) > max_bytes and not line.endswith(b"\n"):
                    _skip_line(file)
                    yield where, Dropped("line_too_long", f"{where}: more than {max_bytes} bytes")
                else:
                    yield where, line.rstrip(b"\r\n")
    except _UNREADABLE as error:
        damage = f"damaged after line {number}: {error}; fetch the file again"
        raise ValueError(f"{path}: {damage if number else f'cannot be read: {error}'}") from error


def _skip_line(file: BinaryIO) -> None:
    while (piece := file.readline(1 << 20)) and not piece.endswith(b"\n"):
        pass


def is_json_lines(path: Path) -> bool:
    """Whether a file's name says that it holds one JSON value per line."""
    return bool({".jsonl", ".ndjson"} & {suffix.lower() for suffix in path.suffixes})


def read_json_lines(path: Path, max_bytes: int = MAX_LINE_BYTES) -> Iterator[tuple[str, Any]]:
    """Place and value of each line of a JSONL file; the value is a `Dropped` where the line holds no JSON.

    Raises:
        ValueError: as `read_lines`.
    """
    for where, line in read_lines(path, max_bytes):
        if isinstance(line, Dropped):
            yield where, line
        elif not line.strip():
            yield where, Dropped("empty_line", where)
        else:
            try:
                yield where, json.loads(line)
            except _NO_JSON as error:
                yield where, Dropped("not_json", f"{where}: {error}")


def read_json(path: Path, content: str) -> Any:
    """The value of a JSON file. `content` says what it should be, for messages.

    Raises:
        ValueError: it cannot be read, or is no JSON.
    """
    try:
        with open_file(path) as file:
            return json.loads(file.read())
    except (*_UNREADABLE, *_NO_JSON) as error:
        one_per_line = isinstance(error, json.JSONDecodeError) and error.msg == "Extra data"
        remedy = "; if it holds one value per line, name it .jsonl" if one_per_line else ""
        raise ValueError(f"{path}: no readable {content}: {error}{remedy}") from error
