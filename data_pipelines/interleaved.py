"""Documents of images and text in reading order (OBELICS, MMC4) to records.

`parse_obelics` and `parse_mmc4` are pure given a function that reads an image by name; `read_interleaved` walks files.

Texts that follow each other become one segment, so that a tokenizer sees them as they stand in a page: texts of OBELICS
with an empty line between them, sentences of MMC4 with a space. A text before an image ends with an empty line. What
separates stands at the end of the earlier text, so the text segments of a document, joined, are its text.
"""

import collections
import dataclasses
import itertools
import json
import math
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from data_pipelines.archives import LIMITS
from data_pipelines.entries import Dropped
from data_pipelines.hf_parquet import open_parquet, read_rows
from data_pipelines.image_files import DAMAGED_ZIP, ImageFiles
from data_pipelines.plain_text import split_documents
from data_pipelines.text_files import is_json_lines, read_json_lines
from unihetero_jax.data import records
from unihetero_jax.data.records import ImageSegment, Record, RecordError, TextSegment

PARAGRAPH = "\n\n"
"""Between a text and what follows it."""
SPACE = " "
"""Between two sentences of MMC4, whose line ends are not kept."""
COLUMNS = {"obelics": ("images", "texts"), "mmc4": ("text_list", "image_info")}
"""Columns that a parquet file of each layout must have."""
ID_COLUMNS = ("general_metadata", "url")

Piece = str | ImageSegment
ReadImage = Callable[[str], bytes]
_Names = tuple[str, ...]
"""What an image may be called, the likeliest first."""


@dataclasses.dataclass(frozen=True)
class InterleavedOptions:
    """How documents become records.

    Attributes:
        source: name stored in each record.
        layout: fields of a document.
        missing: what an image that is missing or damaged takes with it: itself, or its document.
        max_images, max_chars: bounds of a record; a longer document becomes several, cut between its texts and images,
            and a text that is too long itself at a paragraph, else a line, else a word. None: no bound.
        image_place: of MMC4; whether an image stands before or after the sentence it was matched with.
        min_similarity: of MMC4; images whose `matched_sim` is lower are left out. None: none is.
    """

    source: str
    layout: Literal["obelics", "mmc4"] = "obelics"
    missing: Literal["drop_image", "drop_document"] = "drop_image"
    max_images: int | None = None
    max_chars: int | None = None
    image_place: Literal["before", "after"] = "before"
    min_similarity: float | None = None

    def __post_init__(self):
        for name, value in (("max_images", self.max_images), ("max_chars", self.max_chars)):
            if value is not None and value < 1:
                raise ValueError(f"{name} {value} must be positive")
        if self.layout == "obelics" and (self.image_place != "before" or self.min_similarity is not None):
            raise ValueError("image_place and min_similarity are of MMC4: OBELICS states each image's place itself")


def read_interleaved(
    paths: Sequence[Path], images: Path, options: InterleavedOptions, image_map: Mapping[str, str] | None = None
) -> Iterator[Record | Dropped]:
    """Records of JSON Lines files (also inside a zip) or parquet files, in their order.

    An image that makes no segment is counted beside its document, also where the document is kept.

    Args:
        paths: files; the suffix tells parquet and zip from JSON Lines.
        images: folder or zip with the images.
        options: how documents become records.
        image_map: file name in `images` of each URL; what it does not hold is taken for a file name itself.

    Raises:
        ValueError: a file is not of its format, lacks a column, or is damaged further on; the images cannot be opened.
    """
    parse = {"obelics": parse_obelics, "mmc4": parse_mmc4}[options.layout]
    file_names = image_map or {}
    with ImageFiles(images) as files:
        for path in paths:
            for where, document in _documents(path, COLUMNS[options.layout]):
                if isinstance(document, Dropped):
                    yield document
                else:
                    yield from parse(document, lambda name: files.read(file_names.get(name, name)), options, where)


def parse_obelics(
    document: Any, read_image: ReadImage, options: InterleavedOptions, where: str
) -> list[Record | Dropped]:
    """One OBELICS document to its records and what of it was dropped.

    Blank texts hold nothing and leave no trace.
    """
    try:
        entries = list(_obelics_entries(document))
    except RecordError as error:
        return [Dropped(error.reason, f"{where}: {error}")]
    return _records(entries, PARAGRAPH, _obelics_id(document) or where, read_image, options, where)


def parse_mmc4(document: Any, read_image: ReadImage, options: InterleavedOptions, where: str) -> list[Record | Dropped]:
    """One MMC4 document to its records and what of it was dropped.

    An image is looked for under its `image_name`, then under its `raw_url`.
    """
    try:
        sentences, images = _mmc4_fields(document)
        kept, unlike = _by_similarity(images, options.min_similarity, where)
        entries = _interleave(sentences, kept, options.image_place)
    except RecordError as error:
        return [Dropped(error.reason, f"{where}: {error}")]
    url = document.get("url")
    identity = url if isinstance(url, str) and url else where
    return [*unlike, *_records(entries, SPACE, identity, read_image, options, where)]


# ---------------------------------------------------------------- fields of a document


def _obelics_entries(document: Any) -> Iterator[str | _Names]:
    if not isinstance(document, Mapping):
        raise RecordError("not_an_object", f"a {type(document).__name__}")
    images, texts = document.get("images"), document.get("texts")
    if not isinstance(images, list) or not isinstance(texts, list) or len(images) != len(texts):
        raise RecordError("bad_document", "images and texts must be lists of one length")
    for place, (image, text) in enumerate(zip(images, texts, strict=True)):
        if (image is None) == (text is None):
            raise RecordError("bad_document", f"place {place} must hold an image or a text, and not both")
        value = text if image is None else image
        if not isinstance(value, str) or (image is not None and not image):
            raise RecordError("bad_document", f"place {place} holds {value!r:.80}")
        yield (image,) if image is not None else text


def _obelics_id(document: Mapping[str, Any]) -> str:
    try:
        url = json.loads(document["general_metadata"])["url"]
    except (KeyError, TypeError, ValueError, RecursionError):  # documents without it are as good to train on
        return ""
    return url if isinstance(url, str) else ""


@dataclasses.dataclass(frozen=True)
class _Mmc4Image:
    names: _Names
    sentence: int
    similarity: int | float | None


def _mmc4_fields(document: Any) -> tuple[list[str], list[_Mmc4Image]]:
    if not isinstance(document, Mapping):
        raise RecordError("not_an_object", f"a {type(document).__name__}")
    sentences, infos = document.get("text_list"), document.get("image_info")
    if not isinstance(sentences, list) or not all(isinstance(sentence, str) for sentence in sentences):
        raise RecordError("bad_document", "text_list must be a list of texts")
    if not isinstance(infos, list):
        raise RecordError("bad_document", "image_info must be a list")
    return sentences, [_mmc4_image(info, number, len(sentences)) for number, info in enumerate(infos)]


def _mmc4_image(info: Any, number: int, num_sentences: int) -> _Mmc4Image:
    if not isinstance(info, Mapping):
        raise RecordError("bad_image_info", f"image {number} is no object: {info!r:.80}")
    found = (info.get(field) for field in ("image_name", "raw_url"))
    names = tuple(name for name in found if isinstance(name, str) and name)
    if not names:
        raise RecordError("bad_image_info", f"image {number} has neither image_name nor raw_url")
    sentence, similarity = info.get("matched_text_index"), info.get("matched_sim")
    if type(sentence) is not int or not 0 <= sentence < num_sentences:
        raise RecordError("bad_image_info", f"image {number}: matched_text_index {sentence!r} of {num_sentences} texts")
    return _Mmc4Image(names, sentence, similarity if type(similarity) in (int, float) else None)


def _by_similarity(
    images: list[_Mmc4Image], minimum: float | None, where: str
) -> tuple[list[_Mmc4Image], list[Dropped]]:
    if minimum is None:
        return images, []
    kept: list[_Mmc4Image] = []
    unlike: list[Dropped] = []
    for number, image in enumerate(images):
        if image.similarity is None:
            raise RecordError("bad_image_info", f"image {number} has no matched_sim")
        if image.similarity >= minimum:
            kept.append(image)
        else:
            unlike.append(Dropped("low_similarity", f"{where}, image {image.names[0]}: {image.similarity}"))
    return kept, unlike


def _interleave(
    sentences: list[str], images: list[_Mmc4Image], place: Literal["before", "after"]
) -> list[str | _Names]:
    matched: collections.defaultdict[int, list[_Names]] = collections.defaultdict(list)
    for image in images:
        matched[image.sentence].append(image.names)
    entries: list[str | _Names] = []
    for number, sentence in enumerate(sentences):
        entries += [*matched[number], sentence] if place == "before" else [sentence, *matched[number]]
    return entries


# ---------------------------------------------------------------- pieces of a document to records


def _records(
    entries: list[str | _Names],
    between_texts: str,
    identity: str,
    read_image: ReadImage,
    options: InterleavedOptions,
    where: str,
) -> list[Record | Dropped]:
    pieces, missing = _with_images(entries, read_image, where)
    if missing and options.missing == "drop_document":
        return [*missing, Dropped("incomplete_document", f"{where}: lacks {len(missing)} images")]
    parts = list(_split(_separated(pieces, between_texts), options))
    if not parts:
        return [*missing, Dropped("empty_document", where)]
    made: list[Record] = []
    for number, part in enumerate(parts):
        place = f"{where} part {number}" if len(parts) > 1 else where
        meta: dict[str, str | int | float] = {"id": identity, "part": number}
        made.append(Record(options.source, "interleaved", tuple(_segments(part)), meta, place))
    return [*missing, *made]


def _with_images(entries: list[str | _Names], read_image: ReadImage, where: str) -> tuple[list[Piece], list[Dropped]]:
    """Texts that are not blank and images that can be decoded, in order; the other images, as dropped."""
    pieces: list[Piece] = []
    missing: list[Dropped] = []
    for entry in entries:
        if isinstance(entry, str):
            pieces += [entry.strip()] if entry.strip() else []
            continue
        try:
            pieces.append(_image(entry, read_image))
        except RecordError as error:
            missing.append(Dropped(error.reason, f"{where}, image {entry[0]}: {error}"))
    return pieces, missing


def _image(names: _Names, read_image: ReadImage) -> ImageSegment:
    for name in names[:-1]:
        try:
            return _decoded(read_image(name))
        except RecordError as error:
            if error.reason != "missing_image":
                raise
    return _decoded(read_image(names[-1]))


def _decoded(data: bytes) -> ImageSegment:
    # Decoded whole, not probed: an image that is damaged behind its header would take its record with it in the writer,
    # whatever `missing` says.
    height, width, _ = records.decode_image(data).shape
    return ImageSegment(data, height, width)


def _separated(pieces: list[Piece], between_texts: str) -> Iterator[Piece]:
    for number, piece in enumerate(pieces):
        if isinstance(piece, ImageSegment) or number + 1 == len(pieces):
            yield piece
        else:
            yield piece + (between_texts if isinstance(pieces[number + 1], str) else PARAGRAPH)


def _split(pieces: Iterable[Piece], options: InterleavedOptions) -> Iterator[list[Piece]]:
    """Consecutive parts within the bounds; joined, they are the pieces.

    An image that stands before its text moves on with it: at the end of a record it would explain nothing.
    """
    max_images, max_chars = options.max_images or math.inf, options.max_chars or math.inf
    part: list[Piece] = []
    num_images = num_chars = 0
    for piece in _bounded(pieces, options.max_chars):
        images, chars = (0, len(piece)) if isinstance(piece, str) else (1, 0)
        if part and (num_images + images > max_images or num_chars + chars > max_chars):
            num_moved = _trailing_images(part) if options.image_place == "before" else 0
            if num_moved == len(part) or num_moved + images > max_images:
                num_moved = 0
            keep = len(part) - num_moved
            yield part[:keep]
            part, num_images, num_chars = part[keep:], num_moved, 0
        part.append(piece)
        num_images += images
        num_chars += chars
    if part:
        yield part


def _bounded(pieces: Iterable[Piece], max_chars: int | None) -> Iterator[Piece]:
    for piece in pieces:
        if isinstance(piece, ImageSegment) or max_chars is None:
            yield piece
        else:
            yield from split_documents(piece, max_chars)


def _trailing_images(part: list[Piece]) -> int:
    count = 0
    while count < len(part) and isinstance(part[-1 - count], ImageSegment):
        count += 1
    return count


def _segments(part: list[Piece]) -> Iterator[TextSegment | ImageSegment]:
    for is_text, pieces in itertools.groupby(part, lambda piece: isinstance(piece, str)):
        if is_text:
            yield TextSegment("".join(piece for piece in pieces if isinstance(piece, str)), True)
        else:
            yield from (piece for piece in pieces if isinstance(piece, ImageSegment))


# ---------------------------------------------------------------- files


def _documents(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Place and content of each document; a line that is no JSON is `Dropped`."""
    if path.suffix == ".parquet":
        yield from _parquet_documents(path, columns)
    elif path.suffix == ".zip":
        yield from _zipped_documents(path)
    else:
        yield from read_json_lines(path)


def _parquet_documents(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, Any]]:
    with open_parquet(path, columns) as file:
        present = file.schema_arrow.names
        wanted = [*columns, *(name for name in ID_COLUMNS if name in present)]
        for number, row in enumerate(read_rows(file, path, wanted)):
            yield f"{path.name}[{number}]", row


def _zipped_documents(path: Path) -> Iterator[tuple[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:  # a member is unpacked whole: damage shows before its first line
        for member in _unpacked(path, Path(folder)):
            for where, document in read_json_lines(member):
                yield f"{path.name}/{where}", document


def _unpacked(path: Path, folder: Path) -> Iterator[Path]:
    """The JSON Lines members of a zip in the order of their names, one at a time."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(name for name in archive.namelist() if is_json_lines(Path(name)))
            if len(archive.namelist()) > LIMITS.max_entries:
                raise ValueError(f"{path}: has more than {LIMITS.max_entries} members; split it")
            left = max(LIMITS.free_bytes, LIMITS.max_ratio * path.stat().st_size)
            for name in names:
                unpacked = folder / Path(name).name
                with archive.open(name) as member, unpacked.open("wb") as file:
                    while block := member.read(1 << 20):
                        left -= len(block)
                        if left < 0:
                            raise ValueError(f"{path}: unpacks to more than {LIMITS.max_ratio} times its size; refused")
                        file.write(block)
                yield unpacked
                unpacked.unlink()
    except DAMAGED_ZIP as error:
        raise ValueError(f"{path}: no readable zip file: {error}; fetch it again") from error
    if not names:
        raise ValueError(f"{path}: holds no .jsonl file; name the zip of the documents here, that of the images apart")
