"""Pictures with a class: a folder of folders, or a parquet file of the Hugging Face hub (CIFAR-10, ImageNet)."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq

from unihetero_jax.data.question_files import IMAGE_SUFFIXES


@dataclasses.dataclass(frozen=True)
class LabelledImage:
    """One picture: its name in the set, its bytes, and the position of its class in `class_names`."""

    index: str
    data: bytes
    label: int


def class_names(path: Path) -> list[str]:
    """The classes of a set: names of the folders, or those that the parquet file's own schema lists.

    Raises:
        ValueError: there are fewer than two, or the file does not say.
    """
    names = _folder_names(path) if path.is_dir() else _schema_names(path)
    if len(names) < 2:
        raise ValueError(f"{path}: {len(names)} classes; a folder for each class, or a parquet file with class names")
    return names


def read_labelled_images(path: Path) -> Iterator[LabelledImage]:
    """The pictures of a set, in order of class and name, or of the file.

    Raises:
        ValueError: a row has no picture or no known class; names file and row.
    """
    if path.is_dir():
        for label, name in enumerate(_folder_names(path)):
            for file in sorted((path / name).iterdir()):
                if file.suffix.lower() in IMAGE_SUFFIXES:
                    yield LabelledImage(f"{name}/{file.name}", file.read_bytes(), label)
        return
    count, row = len(_schema_names(path)), 0
    image_column, label_column = _columns(path)
    for batch in pq.ParquetFile(path).iter_batches(columns=[image_column, label_column]):
        for image, label in zip(*(batch.column(i).to_pylist() for i in range(2)), strict=True):
            data = image.get("bytes") if isinstance(image, dict) else image
            if not data:
                raise ValueError(f"{path}: row {row}, column {image_column}: no picture")
            if not isinstance(label, int) or not 0 <= label < count:
                raise ValueError(f"{path}: row {row}, column {label_column}: {label!r} is none of the {count} classes")
            yield LabelledImage(str(row), data, label)
            row += 1


def _folder_names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir())


def _features(path: Path) -> dict[str, dict]:
    """Columns as the file's own metadata describe them."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file or folder of labelled pictures")
    try:
        metadata = pq.read_schema(path).metadata or {}
        return json.loads(metadata[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, OSError) as error:
        raise ValueError(f"{path}: no parquet file whose schema describes its columns ({error!r:.80})") from error


def _columns(path: Path) -> tuple[str, str]:
    kinds = {name: str(feature.get("_type")) for name, feature in _features(path).items() if isinstance(feature, dict)}
    found = [[name for name, kind in kinds.items() if kind == wanted] for wanted in ("Image", "ClassLabel")]
    for names, wanted in zip(found, ("Image", "ClassLabel"), strict=True):
        if len(names) != 1:
            raise ValueError(f"{path}: one column of type {wanted} was expected, found {', '.join(names) or 'none'}")
    return found[0][0], found[1][0]


def _schema_names(path: Path) -> list[str]:
    return list(_features(path)[_columns(path)[1]]["names"])
