"""Tables of captions and image URLs (CC3M: caption, tab, URL; CC12M: URL, tab, caption) to records.

The images must have been fetched: an image map says under which name each URL's image lies in the folder or zip.
`parse_row` is pure given a function that reads an image by URL; `read_caption_tsv` walks files. Quotes are literal.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from data_pipelines.caption_pairs import pair_record
from data_pipelines.entries import Dropped
from data_pipelines.image_files import ImageFiles
from data_pipelines.text_files import read_lines
from unihetero_jax.data.records import Record, RecordError

FIRST_ROWS = 20
"""Rows that are looked at to see whether the columns are in the order stated."""
_URL = re.compile(r"https?://\S+", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class CaptionTsvOptions:
    """How rows become records.

    Attributes:
        source: name stored in each record.
        columns: what the columns hold, from the left: `caption` and `url` in the file's order.
    """

    source: str
    columns: tuple[str, str] = ("caption", "url")

    def __post_init__(self):
        if sorted(self.columns) != ["caption", "url"]:
            raise ValueError(f"--columns: {', '.join(self.columns)} must be caption and url, in the file's order")


def read_caption_tsv(
    paths: Sequence[Path], images: Path, image_map: Mapping[str, str], options: CaptionTsvOptions
) -> Iterator[Record | Dropped]:
    """Records of tables, in their order.

    Args:
        paths: tables without a header line (one that has one loses that line alone); .gz and .zst are unpacked.
        images: folder or zip with the images.
        image_map: the name in `images` of each URL.
        options: how rows become records.

    Raises:
        ValueError: a table cannot be read or has its columns in another order, or the images cannot be opened.
    """
    with ImageFiles(images) as files:

        def read_image(url: str) -> bytes:
            if url not in image_map:
                raise RecordError("not_in_image_map", f"no image is known of {url!r:.200}")
            return files.read(image_map[url])

        for path in paths:
            yield from (
                row if isinstance(row, Dropped) else parse_row(row, read_image, options, where)
                for where, row in _rows(path, options)
            )


def _rows(path: Path, options: CaptionTsvOptions) -> Iterator[tuple[str, list[str] | Dropped]]:
    rows = ((where, _fields(line, where)) for where, line in read_lines(path))
    first = list(itertools.islice(rows, FIRST_ROWS))
    _check_columns(path, [row for _, row in first if not isinstance(row, Dropped)], options)
    return itertools.chain(first, rows)


def _fields(line: bytes | Dropped, where: str) -> list[str] | Dropped:
    if isinstance(line, Dropped):
        return line
    try:
        return line.decode("utf-8").split("\t")
    except UnicodeDecodeError as error:
        return Dropped("invalid_text", f"{where}: {error}")


def _check_columns(path: Path, rows: Sequence[Sequence[str]], options: CaptionTsvOptions) -> None:
    place = options.columns.index("url")
    num_urls = sum(len(row) == 2 and bool(_URL.fullmatch(row[place].strip())) for row in rows)
    if rows and 2 * num_urls < len(rows):
        raise ValueError(
            f"{path}: of the first {len(rows)} rows, {num_urls} are a caption and a URL in the order of --columns "
            f"{','.join(options.columns)}; give that of the file: caption,url (CC3M) or url,caption (CC12M)"
        )


def parse_row(
    row: Sequence[str], read_image: Callable[[str], bytes], options: CaptionTsvOptions, where: str
) -> Record | Dropped:
    """One row to a pair, without a prompt, or why not. `read_image` gives the image of a URL."""
    try:
        if len(row) != len(options.columns):
            raise RecordError("bad_row", f"{len(row)} columns, not {len(options.columns)}: {list(row)!r:.80}")
        values = dict(zip(options.columns, (value.strip() for value in row), strict=True))
        if not _URL.fullmatch(values["url"]):
            raise RecordError("bad_url", f"{values['url']!r:.80} is no URL")
        meta: dict[str, str | int | float] = {"id": where, "url": values["url"]}
        return pair_record(options.source, read_image(values["url"]), values["caption"], meta, where)
    except RecordError as error:
        return Dropped(error.reason, f"{where}: {error}")
