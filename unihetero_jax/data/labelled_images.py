"""Pictures with a class: a folder of folders, or a parquet file of the Hugging Face hub (CIFAR-10, ImageNet)."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq

from unihetero_jax.data.question_files import IMAGE_SUFFIXES, StoredImage

LABEL_NAME = "label_name"
"""Column of a parquet file whose schema lists no classes."""


@dataclasses.dataclass(frozen=True)
class LabelledImage:
    """One picture: its name in the set, the picture, and the position of its class in `class_names`."""

    index: str
    picture: StoredImage
    label: int


def class_names(path: Path) -> list[str]:
    """The classes of a set: names of the folders; those that the parquet file's schema lists; or those in its column
    `label_name`, sorted.

    Raises:
        ValueError: there are fewer than two, or the file does not say.
    """
    if path.is_dir():
        names = _folder_names(path)
    else:
        _, label_column, listed = _columns(path)
        names = listed or sorted(set(pq.read_table(path, columns=[label_column]).column(0).to_pylist()))
    if len(names) < 2:
        raise ValueError(f"{path}: {len(names)} classes; a folder for each class, or a parquet file with class names")
    return names


def read_labelled_images(path: Path) -> Iterator[LabelledImage]:
    """The pictures of a set, in order of class and name, or of the file.

    Raises:
        ValueError: a row has no picture or no known class; names file and row.
    """
    names = class_names(path)
    if path.is_dir():
        for label, name in enumerate(names):
            for file in sorted((path / name).iterdir()):
                if file.suffix.lower() in IMAGE_SUFFIXES:
                    yield LabelledImage(f"{name}/{file.name}", StoredImage(file.read_bytes), label)
        return
    image_column, label_column, listed = _columns(path)
    places = {number if listed else name: number for number, name in enumerate(names)}
    row = 0
    for batch in pq.ParquetFile(path).iter_batches(columns=[image_column, label_column]):
        for image, label in zip(*(batch.column(i).to_pylist() for i in range(2)), strict=True):
            data = image.get("bytes") if isinstance(image, dict) else image
            if not data:
                raise ValueError(f"{path}: row {row}, column {image_column}: no picture")
            if label not in places:
                raise ValueError(f"{path}: row {row}, column {label_column}: {label!r} is none of {len(names)} classes")
            yield LabelledImage(str(row), StoredImage.of(data), places[label])
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


def _columns(path: Path) -> tuple[str, str, list[str]]:
    """Names of the columns of pictures and of classes, and the classes' names, if the schema lists them."""
    features = {name: feature for name, feature in _features(path).items() if isinstance(feature, dict)}
    images = [name for name, feature in features.items() if feature.get("_type") == "Image"]
    labels = [name for name, feature in features.items() if feature.get("_type") == "ClassLabel"]
    if len(images) != 1 or len(labels) > 1:
        raise ValueError(f"{path}: one column of type Image and one ClassLabel were expected, found {images}, {labels}")
    if labels:
        return images[0], labels[0], list(features[labels[0]]["names"])
    if LABEL_NAME not in pq.read_schema(path).names:
        raise ValueError(
            f"{path}: no column of type ClassLabel and none called {LABEL_NAME}: the classes have no names"
        )
    return images[0], LABEL_NAME, []
