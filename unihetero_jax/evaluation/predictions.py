"""Files of predictions, whoever made them, and those that other harnesses read.

Read are the tables of VLMEvalKit (`.tsv`, `.xlsx`: columns `index` and `prediction`) and JSON lists or lines with one
object per item, as SEED-Bench's leaderboard, POPE, VQA and GQA have them.
"""

import csv
import dataclasses
import io
import json
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import openpyxl
from etils import epath

from unihetero_jax.data.question_files import tsv_rows
from unihetero_jax.workdir import write_atomically

INDEX_FIELDS = ("index", "question_id", "questionId", "image_id", "id")
ANSWER_FIELD = "prediction"
TRUTH_FIELD = "gt_answer"
"""SEED-Bench's published predictions state the right answer beside each."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One line of a file: `answer` as text, or as numbers (a loss for each option); `truth` if the file states it."""

    index: str
    answer: str | list[float]
    truth: str = ""


def read_predictions(path: str | Path, fields: Sequence[str] = ()) -> list[Prediction]:
    """All predictions of a file, in its order.

    Args:
        path: the file.
        fields: of JSON objects, in which the prediction may stand beside `prediction`; the first found is taken.

    Raises:
        ValueError: the file is missing, empty, of no known format, or a line has no identifier or no prediction; names
            file, line and field.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file of predictions; give a .tsv, .xlsx, .json or .jsonl file")
    rows = list(_rows(path))
    if not rows:
        raise ValueError(f"{path}: no predictions in it")
    accepted = (ANSWER_FIELD, *(fields if path.suffix.lower() in (".json", ".jsonl") else ()))
    return [_prediction(f"{path}: {place}", row, accepted) for place, row in rows]


def by_index(path: str | Path, predictions: Sequence[Prediction]) -> dict[str, Prediction]:
    """Predictions by item.

    Raises:
        ValueError: an item has several.
    """
    repeated = [index for index, count in Counter(p.index for p in predictions).items() if count > 1]
    if repeated:
        raise ValueError(
            f"{path}: {len(repeated)} items have several predictions (of {', '.join(repeated[:5])}); keep one for each"
        )
    return {prediction.index: prediction for prediction in predictions}


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    match path.suffix.lower():
        case ".tsv":
            rows = tsv_rows(path, _text(path))
            yield from ((f"row {number}", row) for number, row in enumerate(rows, start=2))
        case ".xlsx":
            yield from _sheet_rows(path)
        case ".json" | ".jsonl":
            yield from _json_rows(path, _text(path))
        case suffix:
            raise ValueError(f"{path}: unknown format {suffix!r}; give a .tsv, .xlsx, .json or .jsonl file")


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); save the file as UTF-8") from error


def _sheet_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        sheet = openpyxl.load_workbook(path, read_only=True, data_only=True).active
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise ValueError(f"{path}: no Excel workbook ({error})") from error
    rows = sheet.iter_rows(values_only=True) if sheet else iter(())
    header = [str(cell) for cell in next(rows, ())]
    for number, cells in enumerate(rows, start=2):
        row = dict(zip(header, cells, strict=False))
        if any(cell is not None for cell in cells):
            # A sheet has no empty texts, and whole numbers may come back as decimal fractions.
            yield f"row {number}", {name: "" if cell is None else _whole(cell) for name, cell in row.items()}


def _whole(cell: Any) -> Any:
    return int(cell) if isinstance(cell, float) and cell.is_integer() else cell


def _json_rows(path: Path, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path}: not JSON ({error})") from error
        places = (f"entry {number}" for number in range(1, len(rows) + 1))
    else:
        lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        rows, places = [], (f"line {number}" for number, _ in lines)
        for number, line in lines:
            try:
                rows.append(json.loads(line))
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{path}: line {number}: not JSON ({error})") from error
    for place, row in zip(places, rows, strict=True):
        if not isinstance(row, dict):
            raise ValueError(f"{path}: {place}: expected an object, got {row!r:.80}")
        yield place, row


def _prediction(place: str, row: Mapping[str, Any], fields: Sequence[str]) -> Prediction:
    index = _first(place, row, INDEX_FIELDS, "an identifier")
    answer = _first(place, row, fields, "a prediction")
    if isinstance(answer, list):
        if not answer or not all(isinstance(loss, int | float) and not isinstance(loss, bool) for loss in answer):
            raise ValueError(f"{place}: a list of numbers, one loss for each option, was expected, got {answer!r:.80}")
        return Prediction(str(index), [float(loss) for loss in answer])
    return Prediction(str(index), "" if answer is None else str(answer), str(row.get(TRUTH_FIELD, "")))


def _first(place: str, row: Mapping[str, Any], fields: Sequence[str], what: str) -> Any:
    for field in fields:
        if field in row:
            return row[field]
    raise ValueError(f"{place}: {what} is missing (one of {', '.join(fields)}); found: {', '.join(map(str, row))}")


def write_table(path: epath.Path, rows: Sequence[Mapping[str, str]]) -> None:
    """A `.tsv` for VLMEvalKit (`PRED_FORMAT=tsv`): the benchmark's columns but the picture, and `prediction`."""
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, list(rows[0]), dialect="excel-tab", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, buffer.getvalue())


def write_leaderboard(path: epath.Path, predictions: Mapping[str, str]) -> None:
    """SEED-Bench's `results.json`: one `{"question_id", "prediction"}` per line."""
    lines = (json.dumps({"question_id": index, "prediction": letter}) for index, letter in predictions.items())
    write_atomically(path, "\n".join(lines) + "\n")
