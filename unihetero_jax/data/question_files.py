"""Question files in the formats users have them: MMBench TSV, SEED-Bench JSON and POPE JSON lines.

Every row gives a `Question`, faulty ones included, and nothing is decided here: the evaluation refuses a file with a
faulty row and counts what it does not score; a preparation that keeps evaluation pictures out of training wants every
picture, also of rows that cannot be scored.
"""

import ast
import base64
import binascii
import csv
import dataclasses
import functools
import hashlib
import io
import json
import re
import string
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from unihetero_jax.data.records import RecordError

OPTION_LETTERS = string.ascii_uppercase
YES_NO = ("yes", "no")
NLVR_LABELS = ("true", "false")
"""In the order of `YES_NO`."""
CIRCULAR_STEP = 1_000_000
"""MMBench CircularEval: row `index + k * 1,000,000` holds item `index` with its options rotated by k."""
MAX_REFERENCE_CHARS = 64
"""An MMBench `image` cell this short is the index of another row that holds the picture (VLMEvalKit's rule)."""
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
FIRST_VIDEO_TYPE, LAST_VIDEO_TYPE = 10, 12
"""SEED-Bench v1 question types 10 to 12 are about videos."""

Faults = list[RecordError]


@dataclasses.dataclass(frozen=True)
class Picture:
    """Where a picture is: in the file itself, or under a name.

    Attributes:
        field: column or field that states it.
        cell: the picture as base64; empty: look for the name.
        name: as `ImageStore` looks for it.
    """

    field: str
    cell: str = ""
    name: str = ""


@dataclasses.dataclass(frozen=True)
class Question:
    """One row of a questions file, as far as it could be read.

    Attributes:
        place: row, line or number in the file.
        index: the file's own identifier.
        question: text of the question.
        hint: text to be read before the question; often empty.
        options: answer texts in file order; empty for a question that states none.
        answer: position of the right option; None where the file states none, as those for submission do.
        open_answer: the right answer of a question without options, in a table of questions that have some (MMMU).
        category: question type that results are grouped by.
        group: a second grouping (MMBench `l2-category`, SEED-Bench v2 `level`, v1 `question_type_id`); may be empty.
        pictures: in order.
        original_index: of the row that this one repeats with its options rotated; empty: it repeats none.
        is_video: about a video, which has no picture here.
        fault: the first thing that is wrong with the row, its column or field named; `reason` is a short key.
    """

    place: str
    index: str = ""
    question: str = ""
    hint: str = ""
    options: tuple[str, ...] = ()
    answer: int | None = None
    open_answer: str = ""
    category: str = ""
    group: str = ""
    pictures: tuple[Picture, ...] = ()
    original_index: str = ""
    is_video: bool = False
    fault: RecordError | None = None


def read_questions(path: Path) -> Iterator[Question]:
    """Questions of a file, in its order; the format is told by suffix and content.

    `.tsv`: MMBench, or yes/no questions (MME) if it has no option columns. `.json` holding an object with `questions`:
    SEED-Bench v1 or v2. `.jsonl`, or `.json` with one object per line: POPE, NLVR or NLVR2.

    Raises:
        ValueError: the file is missing, no UTF-8, or of no known format.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such benchmark file; give the path of a .tsv, .json or .jsonl questions file")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); save the file as UTF-8") from error
    suffix = path.suffix.lower()
    if suffix == ".tsv":
        return _read_mmbench(path, text)
    if suffix not in (".json", ".jsonl"):
        raise ValueError(
            f"{path}: unknown benchmark format {suffix!r}; expected .tsv (MMBench), .json (SEED-Bench) or .jsonl (POPE)"
        )
    document = _whole_document(path, text) if suffix == ".json" else None
    return _read_pope(text) if document is None else _read_seed_bench(path, document)


def _whole_document(path: Path, text: str) -> Mapping[str, Any] | None:
    """The SEED-Bench object that the text is; None if it holds an object per line."""
    try:
        document = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{path}: nested too deeply for a benchmark") from error
    except json.JSONDecodeError as error:
        first_line = text.lstrip().split("\n", 1)[0]
        if _is_json_object(first_line):
            return None
        raise ValueError(f"{path}: line {error.lineno}, column {error.colno}: not JSON ({error.msg})") from error
    if isinstance(document, dict) and "questions" in document:
        return document
    raise ValueError(f"{path}: a JSON object with 'questions' (SEED-Bench) or one object per line (POPE) was expected")


def _is_json_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except json.JSONDecodeError:
        return False


def _first(faults: Faults) -> RecordError | None:
    return faults[0] if faults else None


def _text(value: Any, field: str, faults: Faults) -> str:
    text = str(value).strip()
    if not text:
        faults.append(RecordError("empty_text", f"column {field}: empty"))
    return text


# ---------------------------------------------------------------- MMBench


def _read_mmbench(path: Path, text: str) -> Iterator[Question]:
    # Cells are read as strings, never by pandas: "None", "NA" and all-digit options are answers, not missing values.
    rows = tsv_rows(path, text)
    columns = set(rows[0]) if rows else set()
    has_options = bool(columns & set(OPTION_LETTERS))
    needed = ("index", "question", *(("A", "B") if has_options else ()), "answer")
    missing = [name for name in needed if name not in columns]
    if missing:
        found = ", ".join(sorted(columns)) or "no rows"
        raise ValueError(f"{path}: missing column {', '.join(missing)}; found: {found}")
    cells = {row["index"]: row.get("image", "") for row in rows}
    for number, row in enumerate(rows, start=2):
        yield _mmbench_question(f"row {number}", row, cells, has_options)


READ_COLUMNS = frozenset({
    "index", "g_index", "question", "hint", *OPTION_LETTERS, "answer", "category", "l2-category", "split", "image",
    "image_path", "prediction",
})  # fmt: skip
KNOWN_COLUMNS = READ_COLUMNS | {"source", "comment"}
"""Of MMBench's tables, with those that say where a question is from."""


def unknown_columns(path: Path) -> list[str]:
    """Columns of a table that nothing here reads and that MMBench does not have; of other files none."""
    if path.suffix.lower() != ".tsv":
        return []
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = next(csv.reader(file, dialect="excel-tab"), [])
    return [name for name in header if name not in KNOWN_COLUMNS]


def tsv_rows(path: Path, text: str) -> list[dict[str, str]]:
    """Rows of a tab-separated table with csv quoting, by column.

    Raises:
        ValueError: the text is none, or a row has more or fewer cells than the header.
    """
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


def _mmbench_question(place: str, row: Mapping[str, str], cells: Mapping[str, str], has_options: bool) -> Question:
    faults: Faults = []
    index = row["index"]
    if not index.isdecimal():
        faults.append(RecordError("bad_index", f"column index: expected a whole number, got {index!r}"))
    options, answer = YES_NO, None
    if not has_options:
        answer = _yes_no(row["answer"], "column answer", faults)
    elif options := _mmbench_options(row, faults):
        answer = _letter(row["answer"].strip(), OPTION_LETTERS[: len(options)], "column answer", faults)
    return Question(
        place,
        index=index,
        question=_text(row["question"], "question", faults),
        hint=row.get("hint", "").strip(),
        options=options,
        answer=answer,
        open_answer="" if options else row["answer"].strip(),
        category=row.get("category") or row.get("l2-category") or "all",
        group=row.get("l2-category", ""),
        pictures=row_pictures(row, cells, faults),
        original_index=_original_index(index, row.get("g_index", "")),
        fault=_first(faults),
    )


def _original_index(index: str, group_index: str) -> str:
    if group_index:  # VLMEvalKit's own column, which files of larger indices have
        return "" if group_index == index else group_index
    is_rotation = index.isdecimal() and int(index) >= CIRCULAR_STEP
    return str(int(index) % CIRCULAR_STEP) if is_rotation else ""


def _yes_no(value: Any, field: str, faults: Faults) -> int | None:
    text = str(value or "").strip().lower()
    if text and text not in YES_NO:
        faults.append(RecordError("bad_answer", f"{field}: expected yes or no, got {value!r}"))
    return YES_NO.index(text) if text in YES_NO else None


def _mmbench_options(row: Mapping[str, str], faults: Faults) -> tuple[str, ...]:
    cells = [row.get(letter, "").strip() for letter in OPTION_LETTERS]
    count = next((i for i, cell in enumerate(cells) if not cell), len(cells))
    if any(cells[count:]):
        detail = f"column {OPTION_LETTERS[count]}: empty, but a later option is not; fill options from A on"
        faults.append(RecordError("bad_options", detail))
    elif count == 1:
        detail = f"column {OPTION_LETTERS[count]}: empty; a question needs at least two options"
        faults.append(RecordError("bad_options", detail))
    return tuple(cells[:count])


def _letter(letter: str, letters: str, field: str, faults: Faults) -> int | None:
    if letter and letter in tuple(letters):
        return letters.index(letter)
    if letter:
        faults.append(RecordError("bad_answer", f"{field}: expected one of {', '.join(letters)}, got {letter!r}"))
    return None


def row_pictures(row: Mapping[str, str], cells: Mapping[str, str], faults: Faults) -> tuple[Picture, ...]:
    """Where the pictures of a table's row are; `cells` are the `image` cells of all rows by index."""
    cell, name = row.get("image", "").strip(), row.get("image_path", "").strip()
    if cell.startswith("["):
        return tuple(Picture("column image", cell=item) for item in _listed(cell, "image", faults))
    if name.startswith("["):
        return tuple(Picture("column image_path", name=item) for item in _listed(name, "image_path", faults))
    if not cell:
        return (Picture("column image_path", name=name),) if name else ()
    if len(cell) <= MAX_REFERENCE_CHARS:
        referred = cells.get(cell, "").strip()
        if len(referred) <= MAX_REFERENCE_CHARS:
            detail = f"column image: {cell!r} should be the index of a row that holds a picture, and is not"
            faults.append(RecordError("missing_image", detail))
            return ()
        cell = referred
    return (Picture("column image", cell=cell),)


def _listed(cell: str, column: str, faults: Faults) -> list[str]:
    try:
        items = ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        items = None
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        faults.append(RecordError("missing_image", f"column {column}: no list of pictures: {cell:.40}"))
        return []
    return items


# ---------------------------------------------------------------- SEED-Bench


def _read_seed_bench(path: Path, document: Mapping[str, Any]) -> Iterator[Question]:
    types = document.get("question_type")
    names = {str(number): name for name, number in types.items()} if isinstance(types, dict) else {}
    questions = document["questions"]
    if not isinstance(questions, list):
        raise ValueError(f"{path}: 'questions' must be a list")
    for number, question in enumerate(questions, start=1):
        place = f"question {number}"
        if isinstance(question, dict):
            yield _seed_question(place, question, names)
        else:
            yield Question(place, fault=RecordError("not_an_object", f"expected an object, got {question!r:.80}"))


def _seed_question(place: str, row: Mapping[str, Any], names: Mapping[str, str]) -> Question:
    faults: Faults = []
    kind = _field(row, "question_type_id", faults)
    data_type = str(row.get("data_type", "image"))
    is_video = "video" in data_type.lower()
    if "level" not in row:  # version 2 numbers its types anew
        is_video |= isinstance(kind, int) and FIRST_VIDEO_TYPE <= kind <= LAST_VIDEO_TYPE
    data_id = _field(row, "data_id", faults)
    answer = _letter(str(row.get("answer") or ""), "ABCD", "field answer", faults)
    options = tuple(_text(_field(row, f"choice_{name}", faults), f"choice_{name}", faults) for name in "abcd")
    data_ids = data_id if isinstance(data_id, list) else [data_id]
    return Question(
        place,
        index=str(_field(row, "question_id", faults)),
        question=_text(_field(row, "question", faults), "question", faults),
        options=options,
        answer=answer,
        category=names.get(str(kind), f"type {kind}"),
        group=str(row.get("level", kind)),
        pictures=tuple(Picture("field data_id", name=str(name)) for name in data_ids) if not is_video else (),
        is_video=is_video,
        fault=_first(faults),
    )


def _field(row: Mapping[str, Any], name: str, faults: Faults) -> Any:
    if name not in row:
        faults.append(RecordError("missing_field", f"missing field {name}; found: {', '.join(row)}"))
    return row.get(name, "")


# ---------------------------------------------------------------- POPE


def _read_pope(text: str) -> Iterator[Question]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            column = f"column {error.colno}: " if isinstance(error, json.JSONDecodeError) else ""
            yield Question(place, fault=RecordError("not_json", f"{column}not JSON ({getattr(error, 'msg', error)})"))
            continue
        if isinstance(row, dict):
            yield (_nlvr_question if "sentence" in row else _pope_question)(place, row)
        else:
            yield Question(place, fault=RecordError("not_an_object", f"expected an object, got {row!r:.80}"))


def _pope_question(place: str, row: Mapping[str, Any]) -> Question:
    faults: Faults = []
    answer = _yes_no(row.get("label"), "field label", faults)
    name = str(_field(row, "image", faults))
    return Question(
        place,
        index=str(_field(row, "question_id", faults)),
        question=_text(_field(row, "text", faults), "text", faults),
        options=YES_NO,
        answer=answer,
        category=str(row.get("category") or "yes_no"),
        pictures=(Picture("field image", name=name),),
        fault=_first(faults),
    )


def _nlvr_question(place: str, row: Mapping[str, Any]) -> Question:
    """A statement about a picture (NLVR, of its six permutations the first) or about two (NLVR2)."""
    faults: Faults = []
    label = str(row.get("label") or "").strip().lower()
    if label and label not in NLVR_LABELS:
        faults.append(RecordError("bad_answer", f"field label: expected true or false, got {row['label']!r}"))
    identifier = str(_field(row, "identifier", faults))
    if "directory" in row:
        names = [f"{row['directory']}/{row.get('split', 'dev')}-{identifier}-0.png"]
    else:
        names = [f"{identifier.rpartition('-')[0]}-img{number}.png" for number in range(2)]
    statement = _text(row["sentence"], "sentence", faults)
    return Question(
        place,
        index=identifier,
        question=f"Is the following statement about the image{'s' * (len(names) > 1)} true? {statement}",
        options=YES_NO,
        answer=NLVR_LABELS.index(label) if label in NLVR_LABELS else None,
        category=f"{len(names)} pictures" if len(names) > 1 else "one picture",
        pictures=tuple(Picture("field identifier", name=name) for name in names),
        fault=_first(faults),
    )


# ---------------------------------------------------------------- pictures


class StoredImage:
    """A picture that is read each time its bytes are asked for: a large set of them takes no memory.

    Two are equal if their bytes are.

    Args:
        load: gives the bytes; may raise what `ImageStore.find` names.
    """

    def __init__(self, load: Callable[[], bytes]):
        self._load = load

    @classmethod
    def of(cls, data: bytes) -> "StoredImage":
        """A picture that is in memory anyway."""
        return cls(lambda: data)

    def read(self) -> bytes:
        """The bytes of its file."""
        return self._load()

    @functools.cached_property
    def digest(self) -> bytes:
        """16 bytes that tell it from other pictures; reads it once."""
        return hashlib.blake2b(self.read(), digest_size=16).digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StoredImage) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


class ImageStore:
    """The pictures of a questions file.

    Looked through, in this order: a folder, folders `images*` in it, zips `images*.zip` in it, any other zip in it. A
    name may lack its extension (SEED-Bench's `data_id`); in a zip it may lack the leading folders as long as only one
    picture answers to it.

    Args:
        root: the folder, or a zip to look through alone.
    """

    def __init__(self, root: Path):
        self._folders = [root, *sorted(p for p in root.glob("images*") if p.is_dir())] if root.is_dir() else []
        preferred = sorted(root.glob("images*.zip")) if root.is_dir() else [root]
        self._zip_paths = [*preferred, *sorted(p for p in root.glob("*.zip") if p not in preferred)]
        self._archives: list[_Archive] | None = None
        self._found: dict[Picture, StoredImage] = {}

    def find(self, picture: Picture) -> StoredImage:
        """A picture; asked for twice, it is one object.

        Raises, as does reading it:
            RecordError: `missing_image`, `ambiguous_image`, `unreadable_image`, `damaged_archive` or `not_base64`.
            ValueError: an archive that has to be looked through is none.
        """
        key = dataclasses.replace(picture, field="")
        if key not in self._found:
            load = functools.partial(_decoded, picture.cell) if picture.cell else self._named(picture.name)
            self._found[key] = StoredImage(load)
        return self._found[key]

    def digest(self) -> bytes:
        """Identity of every picture found by name (those in the questions file are covered by that file's own hash)."""
        total = hashlib.blake2b()
        for name, image in sorted((key.name, image) for key, image in self._found.items() if not key.cell):
            total.update(name.encode() + b"\0" + image.digest)
        return total.digest()

    def _named(self, name: str) -> Callable[[], bytes]:
        """What reads the picture that answers to a name."""
        for folder in self._folders:
            for candidate in (name, *(name + suffix for suffix in IMAGE_SUFFIXES)):
                path = folder / candidate
                try:
                    if path.resolve().is_relative_to(folder.resolve()) and path.is_file():
                        return functools.partial(_read_file, path)
                except (OSError, ValueError) as error:  # a name too long or with a null character
                    raise _unreadable(name, error) from error
        if self._archives is None:
            self._archives = [_open_archive(path) for path in self._zip_paths]
        for archive in self._archives:
            members = archive.members(name)
            if len(members) > 1:
                listed = ", ".join(sorted(members))
                raise RecordError(
                    "ambiguous_image", f"picture {name!r} is ambiguous in {archive.file.filename}: {listed}"
                )
            for member in members:
                return functools.partial(archive.read, member)
        looked = ", ".join(str(p) for p in (*self._folders, *self._zip_paths))
        detail = f"picture {name!r} not found; looked in {looked}. Put images/ or images.zip beside the file"
        raise RecordError("missing_image", detail)


def _decoded(cell: str) -> bytes:
    try:
        return base64.b64decode(re.sub(r"\s+", "", cell), validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: a character beyond ASCII
        raise RecordError("not_base64", f"not base64 ({error})") from error


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path.name, error) from error


def _unreadable(name: str, error: Exception) -> RecordError:
    return RecordError("unreadable_image", f"picture {name!r:.80} cannot be read: {error}")


def _open_archive(path: Path) -> "_Archive":
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
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

    def read(self, member: str) -> bytes:
        """The bytes of one picture."""
        try:
            return self.file.read(member)
        except (zipfile.BadZipFile, zlib.error, OSError, RuntimeError) as error:
            detail = f"picture {member!r} cannot be read from {self.file.filename}: {error}"
            raise RecordError("damaged_archive", detail) from error

    def members(self, name: str) -> set[str]:
        """Pictures that answer to `name`; its path in the zip goes before its file name alone."""
        return self.by_path.get(name) or self.by_file.get(name) or set()
