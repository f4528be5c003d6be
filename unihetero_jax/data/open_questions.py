"""Questions that are answered in words: files of VQAv2, VQA-CP, OK-VQA, TextVQA, GQA and COCO captions, and tables."""

import ast
import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unihetero_jax.data.question_files import OPTION_LETTERS, YES_NO, Picture, row_pictures, tsv_rows
from unihetero_jax.data.records import RecordError


@dataclasses.dataclass(frozen=True)
class OpenQuestion:
    """One question.

    Attributes:
        place: entry or row in the file.
        index: the file's own identifier.
        question: its text; empty in a file of annotations alone, and for captions.
        answers: those of the people asked (ten in VQAv2), captions that people wrote; one where the file states a
            single truth.
        category: what results are grouped by: VQA's `answer_type`, GQA's structural type, a table's `category`.
        pictures: where the images are; empty where the file does not say.
        is_caption: the answers are captions, there is no question.
    """

    place: str
    index: str
    question: str
    answers: tuple[str, ...]
    category: str
    pictures: tuple[Picture, ...]
    is_caption: bool = False


def holds_open_questions(path: Path) -> bool:
    """Whether a file is one of these, and not one of questions with options or of yes/no (`question_files`)."""
    try:
        text = path.read_text("utf-8-sig")
        match path.suffix.lower():
            case ".tsv":
                header = set(text.partition("\n")[0].rstrip("\r").split("\t"))
                if header & set(OPTION_LETTERS):
                    return False  # told by its header alone: such tables hold pictures, and are large
                answers = {row.get("answer", "").strip().lower() for row in tsv_rows(path, text)}
                return not answers <= {*YES_NO, ""}
            case ".jsonl":
                first = json.loads(text.lstrip().partition("\n")[0])
                return isinstance(first, dict) and bool({"answer", "answers"} & set(first)) and "label" not in first
            case ".json":
                document = json.loads(text)
                if isinstance(document, dict):
                    return "questions" not in document or "annotations" in document
                return isinstance(document, list)
    except (OSError, ValueError, RecursionError):  # for the reader of closed questions to say
        return False
    return False


def read_open_questions(path: str | Path) -> list[OpenQuestion]:
    """Open questions with their answers.

    `.json` holding an object with `annotations` (VQAv2, OK-VQA; `questions` may stand in it, too; with `images`: COCO
    captions), an object with `data` (TextVQA), a list (VQA-CP), or an object of objects (GQA); `.jsonl`
    with one such entry per line; `.tsv` with `index`, `question`, `answer`, where the answer may be a list.

    Raises:
        ValueError: the file is missing, of no known format, empty, an entry is faulty or repeated; names file, entry
            and field.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file of questions")
    text = path.read_text("utf-8-sig")
    entries = list(_table_entries(path, text) if path.suffix.lower() == ".tsv" else _json_entries(path, text))
    questions = [_question(f"{path}: {place}", entry) for place, entry in entries]
    repeated = [index for index, count in Counter(q.index for q in questions).items() if count > 1]
    if repeated:
        raise ValueError(f"{path}: question identifiers must be unique, repeated: {', '.join(repeated[:5])}")
    if not questions:
        raise ValueError(f"{path}: no questions in it")
    return questions


def _table_entries(path: Path, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    rows = tsv_rows(path, text)
    if rows and "index" not in rows[0]:
        raise ValueError(f"{path}: missing column index; found: {', '.join(rows[0])}")
    cells = {row["index"]: row.get("image", "") for row in rows}
    for number, row in enumerate(rows, start=2):
        faults: list[RecordError] = []
        pictures = row_pictures(row, cells, faults)
        if faults:
            raise ValueError(f"{path}: row {number}, {faults[0]}") from faults[0]
        answer = row.get("answer", "").strip()
        answers = _listed(answer) if answer.startswith("[") else [answer]
        yield f"row {number}", row | {
            "question_id": row["index"], "answers": [a for a in answers if a], "pictures": pictures, "answer": "",
        }  # fmt: skip


def _listed(cell: str) -> list[Any]:
    """A list written as Python has it; anything else is one answer."""
    try:
        answers = ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return [cell]
    return answers if isinstance(answers, list) else [cell]


def _json_entries(path: Path, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        if path.suffix.lower() == ".jsonl":
            document = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            document = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if isinstance(document, dict) and isinstance(document.get("images"), list):
        entries = _captioned(path, document)
    elif isinstance(document, dict) and isinstance(document.get("annotations"), list):
        texts = {str(q.get("question_id")): q for q in _objects(path, document, "questions")}
        subset = document.get("data_subtype", "")
        entries = [
            {"image": _coco_name(subset, a.get("image_id"))} | texts.get(str(a.get("question_id")), {}) | a
            for a in _objects(path, document, "annotations")
        ]
    elif isinstance(document, dict) and isinstance(document.get("data"), list):
        entries = document["data"]
    elif isinstance(document, dict):
        entries = [{"question_id": index} | (e if isinstance(e, dict) else {}) for index, e in document.items()]
    else:
        entries = document
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict):
            raise ValueError(f"{path}: entry {number}: expected an object, got {entry!r:.80}")
        yield f"entry {number}", entry


def _objects(path: Path, document: Mapping[str, Any], field: str) -> list[dict[str, Any]]:
    """A field that lists objects; a missing one is empty."""
    entries = document.get(field, [])
    if not isinstance(entries, list):
        raise ValueError(f"{path}: field {field}: a list was expected, got {entries!r:.80}")
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict):
            raise ValueError(f"{path}: field {field}, entry {number}: expected an object, got {entry!r:.80}")
    return entries


def _captioned(path: Path, document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """COCO's captions as questions, one for each picture."""
    captions: dict[str, list[str]] = {}
    for annotation in _objects(path, document, "annotations"):
        captions.setdefault(str(annotation.get("image_id")), []).append(str(annotation.get("caption", "")))
    images = {str(image.get("id")): image for image in _objects(path, document, "images")}
    for fault, indices in (
        ("pictures without a caption", [index for index in images if index not in captions]),
        ("captions of pictures that `images` does not list", [index for index in captions if index not in images]),
    ):
        if indices:
            shown = ", ".join(indices[:5])
            raise ValueError(f"{path}: {len(indices)} {fault}, such as image {shown}; take them out, or add what lacks")
    return [
        {
            "question_id": index,
            "answers": captions[index],
            "image": image.get("file_name"),
            "is_caption": True,
        }
        for index, image in images.items()
    ]


def _question(place: str, entry: Mapping[str, Any]) -> OpenQuestion:
    index = next((entry[name] for name in ("question_id", "index", "questionId") if name in entry), None)
    if index is None:
        raise ValueError(f"{place}: no question_id; found: {', '.join(entry)}")
    given = entry.get("answers") or ([entry["answer"]] if entry.get("answer") else [])
    answers = tuple(str(a["answer"] if isinstance(a, dict) and "answer" in a else a) for a in given)
    if not answers:
        raise ValueError(f"{place}: no answers (fields answers or answer); a test file cannot be scored")
    types = entry.get("types")
    category = types.get("structural") if isinstance(types, dict) else entry.get("answer_type", entry.get("category"))
    # `image` goes first: VQA's `image_id` is a number, from which the name of the file was made.
    image = next((entry[name] for name in ("image", "imageId", "image_id") if entry.get(name) not in (None, "")), None)
    named = (Picture("field image", name=str(image)),) if image is not None else ()
    return OpenQuestion(
        place, str(index), str(entry.get("question", "")), answers, str(category or "all"),
        entry.get("pictures", named), bool(entry.get("is_caption")),
    )  # fmt: skip


def _coco_name(subset: str, image_id: Any) -> str:
    """File name of a picture of COCO, which VQA's annotations state as subset and number."""
    is_coco = bool(subset) and str(image_id).isdecimal()
    return f"COCO_{subset}_{int(image_id):012d}.jpg" if is_coco else ""
