"""Reads benchmark files in the formats users have them: MMBench TSV, SEED-Bench JSON and POPE JSON lines.

Every reader gives the same `Item`s. A fault in a file is an error that names file, row and column; a row that is
well-formed but outside what is scored here (a circular repeat, a video, several pictures) is counted by reason.
"""

import base64
import binascii
import csv
import dataclasses
import hashlib
import io
import json
import re
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

OPTION_LETTERS = "ABCDEFGH"
CIRCULAR_STEP = 1_000_000
"""MMBench CircularEval: row `index + k * 1,000,000` holds item `index` with its options rotated by k."""
MAX_REFERENCE_CHARS = 64
"""An MMBench `image` cell this short is the index of another row that holds the picture (VLMEvalKit's rule)."""
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
FIRST_VIDEO_TYPE, LAST_VIDEO_TYPE = 10, 12
"""SEED-Bench v1 question types 10 to 12 are about videos."""

CIRCULAR, VIDEO, SEVERAL_IMAGES, NO_OPTIONS = "circular_row", "video", "several_images", "no_options"


@dataclasses.dataclass(frozen=True)
class Item:
    """One multiple-choice question.

    Attributes:
        index: the file's own identifier; unique within a benchmark.
        question: text of the question.
        options: answer texts, at least two, in file order.
        answer: position of the right option.
        image: the picture's original bytes; None for a question without one.
        category: question type that results are grouped by.
        hint: text to be read before the question; often empty.
    """

    index: str
    question: str
    options: tuple[str, ...]
    answer: int
    image: bytes | None
    category: str
    hint: str = ""

    @property
    def answer_text(self) -> str:
        """Text of the right option."""
        return self.options[self.answer]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """The questions of one file.

    Attributes:
        name: file name without its suffix.
        path: where it was read.
        items: the questions to score, in file order.
        data_hash: 16 hex digits over the questions file and every picture that was read from beside it.
        unscored_rows: well-formed rows that are no item here, counted by reason: `circular_row` (circular scoring is
            not part of this version, so a circular file is scored on its unrotated rows), `video`, `several_images`,
            `no_options` (nothing to rank; some CCBench rows have their options in the picture).
    """

    name: str
    path: Path
    items: tuple[Item, ...]
    data_hash: str
    unscored_rows: Mapping[str, int]

    @property
    def num_unscored(self) -> int:
        """Rows of the file that are no item."""
        return sum(self.unscored_rows.values())


def read_benchmark(path: str | Path) -> Benchmark:
    """Reads a questions file; the format is told by suffix and content.

    `.tsv`: MMBench. `.json` holding an object with `questions`: SEED-Bench v1. `.jsonl`, or `.json` with one object
    per line: POPE. Pictures that are not in the file itself are looked for beside it (see `ImageStore`).

    Raises:
        ValueError: the file is missing, of no known format, empty, or has a faulty row; names file, row and column.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such benchmark file; give the path of a .tsv, .json or .jsonl questions file")
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); save the file as UTF-8") from error
    skipped: Counter[str] = Counter()
    with ImageStore(path.parent) as images:
        items = tuple(_read_items(path, text, images, skipped))
        image_digest = images.digest()
    _check_items(path, items, skipped)
    digest = hashlib.blake2b(hashlib.blake2b(raw).digest() + image_digest, digest_size=8).hexdigest()
    return Benchmark(path.stem, path, items, digest, dict(sorted(skipped.items())))


def _read_items(path: Path, text: str, images: "ImageStore", skipped: Counter[str]) -> Iterator[Item]:
    suffix = path.suffix.lower()
    if suffix == ".tsv":
        return _read_mmbench(path, text, images, skipped)
    if suffix not in (".json", ".jsonl"):
        raise ValueError(
            f"{path}: unknown benchmark format {suffix!r}; expected .tsv (MMBench), .json (SEED-Bench) or .jsonl (POPE)"
        )
    if suffix == ".json":
        try:
            document = json.loads(text)
        except json.JSONDecodeError as error:
            first_line = text.lstrip().split("\n", 1)[0]
            if not _is_json_object(first_line):
                raise ValueError(
                    f"{path}: line {error.lineno}, column {error.colno}: not JSON ({error.msg})"
                ) from error
        else:
            if isinstance(document, dict) and "questions" in document:
                return _read_seed_bench(path, document, images, skipped)
            raise ValueError(
                f"{path}: a JSON object with 'questions' (SEED-Bench) or one object per line (POPE) was expected"
            )
    return _read_pope(path, text, images)


def _is_json_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except json.JSONDecodeError:
        return False


def _check_items(path: Path, items: tuple[Item, ...], skipped: Counter[str]) -> None:
    if not items:
        raise ValueError(f"{path}: no question to score (rows outside what is scored: {dict(skipped) or 'none'})")
    repeated = [index for index, count in Counter(item.index for item in items).items() if count > 1]
    if repeated:
        raise ValueError(f"{path}: question identifiers must be unique, repeated: {', '.join(repeated[:5])}")


# ---------------------------------------------------------------- MMBench


def _read_mmbench(path: Path, text: str, images: "ImageStore", skipped: Counter[str]) -> Iterator[Item]:
    # Cells are read as strings, never by pandas: "None", "NA" and all-digit options are answers, not missing values.
    rows = _tsv_rows(path, text)
    columns = set(rows[0]) if rows else set()
    _require_columns(path, columns, ("index", "question", "A", "B", "answer"))
    picture_cells = {row["index"]: row.get("image", "") for row in rows}
    for number, row in enumerate(rows, start=2):
        place = f"{path}: row {number}"
        index = row["index"]
        if not index.isdecimal():
            raise ValueError(f"{place}, column index: expected a whole number, got {index!r}")
        if int(index) >= CIRCULAR_STEP:
            skipped[CIRCULAR] += 1
            continue
        if _is_list(row.get("image", "")) or _is_list(row.get("image_path", "")):
            skipped[SEVERAL_IMAGES] += 1
            continue
        options = _mmbench_options(place, row)
        if not options:
            skipped[NO_OPTIONS] += 1
            continue
        letter = row["answer"].strip()
        if letter not in OPTION_LETTERS[: len(options)] or len(letter) != 1:
            remedy = "; a TEST file has no answers and cannot be scored here" if not letter else ""
            letters = ", ".join(OPTION_LETTERS[: len(options)])
            raise ValueError(f"{place}, column answer: expected one of {letters}, got {letter!r}{remedy}")
        yield Item(
            index=index,
            question=_required_text(place, "question", row["question"]),
            options=options,
            answer=OPTION_LETTERS.index(letter),
            image=_mmbench_image(place, row, picture_cells, images),
            category=row.get("category") or row.get("l2-category") or "all",
            hint=row.get("hint", "").strip(),
        )


def _tsv_rows(path: Path, text: str) -> list[dict[str, str]]:
    previous_limit = csv.field_size_limit(max(len(text), 1))  # a cell may hold a whole picture
    try:
        reader = csv.reader(io.StringIO(text, newline=""), dialect="excel-tab", strict=True)
        header = next(reader, [])
        rows = []
        for number, cells in enumerate(reader, start=2):
            if not cells:
                continue
            if len(cells) != len(header):
                raise ValueError(
                    f"{path}: row {number} (line {reader.line_num}) has {len(cells)} cells, the header {len(header)}"
                )
            rows.append(dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise ValueError(f"{path}: not a tab-separated table with csv quoting: {error}") from error
    finally:
        csv.field_size_limit(previous_limit)
    return rows


def _require_columns(path: Path, columns: set[str], needed: tuple[str, ...]) -> None:
    missing = [name for name in needed if name not in columns]
    if missing:
        raise ValueError(
            f"{path}: missing column {', '.join(missing)}; found: {', '.join(sorted(columns)) or 'no rows'}"
        )


def _mmbench_options(place: str, row: Mapping[str, str]) -> tuple[str, ...]:
    cells = [row.get(letter, "").strip() for letter in OPTION_LETTERS]
    count = next((i for i, cell in enumerate(cells) if not cell), len(cells))
    if any(cells[count:]):
        raise ValueError(
            f"{place}, column {OPTION_LETTERS[count]}: empty, but a later option is not; fill options from A on"
        )
    if count == 1:
        raise ValueError(f"{place}, column {OPTION_LETTERS[count]}: empty; a question needs at least two options")
    return tuple(cells[:count])


def _mmbench_image(place: str, row: Mapping[str, str], cells: Mapping[str, str], images: "ImageStore") -> bytes | None:
    cell = row.get("image", "").strip()
    if not cell:
        name = row.get("image_path", "").strip()
        return images.read(name, f"{place}, column image_path") if name else None
    if len(cell) <= MAX_REFERENCE_CHARS:
        referred = cells.get(cell, "").strip()
        if len(referred) <= MAX_REFERENCE_CHARS:
            raise ValueError(
                f"{place}, column image: {cell!r} should be the index of a row that holds a picture, and is not"
            )
        cell = referred
    return images.decoded(cell, f"{place}, column image")


def _is_list(cell: str) -> bool:
    return cell.lstrip().startswith("[")


# ---------------------------------------------------------------- SEED-Bench


def _read_seed_bench(
    path: Path, document: Mapping[str, Any], images: "ImageStore", skipped: Counter[str]
) -> Iterator[Item]:
    names = {number: name for name, number in document.get("question_type", {}).items()}
    questions = document["questions"]
    if not isinstance(questions, list):
        raise ValueError(f"{path}: 'questions' must be a list")
    for number, question in enumerate(questions, start=1):
        place = f"{path}: question {number}"
        if not isinstance(question, dict):
            raise ValueError(f"{place}: expected an object, got {question!r:.80}")
        kind = _field(place, question, "question_type_id")
        if question.get("data_type", "image") == "video" or (
            isinstance(kind, int) and FIRST_VIDEO_TYPE <= kind <= LAST_VIDEO_TYPE
        ):
            skipped[VIDEO] += 1
            continue
        data_id = _field(place, question, "data_id")
        if isinstance(data_id, list):
            skipped[SEVERAL_IMAGES] += 1
            continue
        letter = str(_field(place, question, "answer"))
        if letter not in tuple("ABCD"):
            raise ValueError(f"{place}, field answer: expected A, B, C or D, got {letter!r}")
        fields = [f"choice_{name}" for name in "abcd"]
        options = tuple(_required_text(place, name, _field(place, question, name)) for name in fields)
        yield Item(
            index=str(_field(place, question, "question_id")),
            question=_required_text(place, "question", _field(place, question, "question")),
            options=options,
            answer="ABCD".index(letter),
            image=images.read(str(data_id), f"{place}, field data_id"),
            category=names.get(kind, f"type {kind}"),
        )


# ---------------------------------------------------------------- POPE


def _read_pope(path: Path, text: str, images: "ImageStore") -> Iterator[Item]:
    options = ("yes", "no")
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}: line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}, column {error.colno}: not JSON ({error.msg})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{place}: expected an object, got {row!r:.80}")
        label = str(_field(place, row, "label")).strip().lower()
        if label not in options:
            raise ValueError(f"{place}, field label: expected yes or no, got {row['label']!r}")
        yield Item(
            index=str(_field(place, row, "question_id")),
            question=_required_text(place, "text", _field(place, row, "text")),
            options=options,
            answer=options.index(label),
            image=images.read(str(_field(place, row, "image")), f"{place}, field image"),
            category=str(row.get("category") or "yes_no"),
        )


def _field(place: str, row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        raise ValueError(f"{place}: missing field {name}; found: {', '.join(row)}")
    return row[name]


def _required_text(place: str, name: str, value: Any) -> str:
    text = str(value).strip()
    if not text:
        raise ValueError(f"{place}, column {name}: empty")
    return text


# ---------------------------------------------------------------- pictures


class ImageStore:
    """Finds pictures by name in the folders and zips beside a questions file; each is held once, however often asked.

    Looked through, in this order: the questions file's folder, folders `images*` beside it, zips `images*.zip` beside
    it, any other zip beside it. A name may lack its extension (SEED-Bench's `data_id`); in a zip it may lack the
    leading folders as long as only one picture answers to it.
    """

    def __init__(self, folder: Path):
        self._folders = [folder, *sorted(p for p in folder.glob("images*") if p.is_dir())]
        preferred = sorted(folder.glob("images*.zip"))
        self._zip_paths = [*preferred, *sorted(p for p in folder.glob("*.zip") if p not in preferred)]
        self._archives: list[_Archive] | None = None
        self._by_name: dict[str, bytes] = {}
        self._by_cell: dict[str, bytes] = {}

    def __enter__(self) -> "ImageStore":
        return self

    def __exit__(self, *exc_info: object) -> None:
        for archive in self._archives or ():
            archive.file.close()

    def read(self, name: str, place: str) -> bytes:
        """The bytes of the picture called `name`.

        Raises:
            ValueError: there is none, or several answer to the name; names `place` and where it was looked for.
        """
        if name not in self._by_name:
            self._by_name[name] = self._find(name, place)
        return self._by_name[name]

    def decoded(self, cell: str, place: str) -> bytes:
        """The bytes of a picture given as base64; equal cells share one object."""
        key = hashlib.blake2b(cell.encode()).hexdigest()
        if key not in self._by_cell:
            try:
                self._by_cell[key] = base64.b64decode(re.sub(r"\s+", "", cell), validate=True)
            except binascii.Error as error:
                raise ValueError(f"{place}: not base64 ({error})") from error
        return self._by_cell[key]

    def digest(self) -> bytes:
        """Identity of every picture read by name (those in the questions file are covered by that file's own hash)."""
        total = hashlib.blake2b()
        for name in sorted(self._by_name):
            total.update(name.encode() + b"\0" + hashlib.blake2b(self._by_name[name]).digest())
        return total.digest()

    def _find(self, name: str, place: str) -> bytes:
        for folder in self._folders:
            for candidate in (name, *(name + suffix for suffix in IMAGE_SUFFIXES)):
                path = folder / candidate
                if path.resolve().is_relative_to(folder.resolve()) and path.is_file():
                    return path.read_bytes()
        if self._archives is None:
            self._archives = [_open_archive(path) for path in self._zip_paths]
        for archive in self._archives:
            members = archive.members(name)
            if len(members) > 1:
                raise ValueError(
                    f"{place}: picture {name!r} is ambiguous in {archive.file.filename}: {', '.join(sorted(members))}"
                )
            for member in members:
                try:
                    return archive.file.read(member)
                except (zipfile.BadZipFile, zlib.error, OSError, RuntimeError) as error:
                    raise ValueError(
                        f"{place}: picture {member!r} cannot be read from {archive.file.filename}: {error}"
                    ) from error
        looked = ", ".join(str(p) for p in (*self._folders, *self._zip_paths))
        raise ValueError(
            f"{place}: picture {name!r} not found; looked in {looked}. Put images/ or images.zip beside the file"
        )


def _open_archive(path: Path) -> "_Archive":
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: not a readable zip ({error})") from error
    by_path: defaultdict[str, set[str]] = defaultdict(set)
    by_file: defaultdict[str, set[str]] = defaultdict(set)
    for member in archive.namelist():
        if not member.lower().endswith(IMAGE_SUFFIXES):
            continue
        file_name = member.rsplit("/", 1)[-1]
        for names, key in ((by_path, member), (by_file, file_name)):
            names[key].add(member)
            names[key.rsplit(".", 1)[0]].add(member)
    return _Archive(archive, dict(by_path), dict(by_file))


@dataclasses.dataclass(frozen=True)
class _Archive:
    """An open zip and its pictures, by path and by file name, each with and without extension."""

    file: zipfile.ZipFile
    by_path: Mapping[str, set[str]]
    by_file: Mapping[str, set[str]]

    def members(self, name: str) -> set[str]:
        """Pictures that answer to `name`; its path in the zip goes before its file name alone."""
        return self.by_path.get(name) or self.by_file.get(name) or set()
