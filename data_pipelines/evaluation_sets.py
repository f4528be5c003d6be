"""Pictures and texts of evaluation sets (MMBench TSV, SEED-Bench JSON, POPE JSON lines), as inputs of a preparation.

What is evaluated on must not be trained on, so a preparation has to see every picture: also of rows without an answer,
which cannot be scored here, and of questions about several pictures.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from data_pipelines.entries import Dropped
from unihetero_jax.data import records
from unihetero_jax.data.question_files import ImageStore, Question, read_questions
from unihetero_jax.data.records import RecordError


@dataclasses.dataclass(frozen=True)
class EvaluationItem:
    """One question and one picture of it.

    Attributes:
        id: the file's own identifier.
        question: text of the question.
        options: answer texts in file order; empty where the picture holds them.
        answer: text of the right option; empty where the file states none, as those for submission do.
        category: question type.
        image: the picture's original bytes; None for a question without one, or where pictures were not asked for.
        where: file and place in it.
        hint: text to be read before the question; often empty.
    """

    id: str
    question: str
    options: tuple[str, ...]
    answer: str
    category: str
    image: bytes | None
    where: str
    hint: str = ""


def read_evaluation_set(
    path: str | Path, images: str | Path | None = None, with_images: bool = True
) -> Iterator[EvaluationItem | Dropped]:
    """Items of a questions file, in its order.

    A question with several pictures gives an item for each, all with its id. A row that repeats another one with its
    options rotated is dropped (`circular_row`): its picture is that of the other row, and its text would count twice.

    Args:
        path: the questions file; for its formats see `question_files.read_questions`.
        images: folder or zip with the pictures that are not in the file; None: the file's folder and the zips in it.
        with_images: whether to read the pictures. Without them, a set whose pictures are not at hand gives its texts.

    Raises:
        ValueError: the file is missing or of no known format, or an archive of pictures is none.
    """
    path = Path(path)
    root = path.parent if images is None else Path(images)
    if not root.exists():
        raise ValueError(f"{root} does not exist; give the folder or zip file with the pictures of {path.name}")
    questions = list(read_questions(path))
    indices = {question.index for question in questions}
    store = ImageStore(root) if with_images else None
    for question in questions:
        where = f"{path.name}, {question.place}"
        if question.original_index and question.original_index in indices:
            yield Dropped("circular_row", where)
        else:
            yield from _items(question, store, where)


def _items(question: Question, store: ImageStore | None, where: str) -> Iterator[EvaluationItem | Dropped]:
    if question.is_video:
        yield Dropped("video", where)
        return
    if question.fault:
        yield Dropped(question.fault.reason, f"{where}: {question.fault}")
        return
    if store is None or not question.pictures:
        yield _item(question, None, where)
        return
    for picture in question.pictures:
        try:
            image = store.find(picture).read()
            records.probe_image(image)
        except RecordError as error:
            yield Dropped(error.reason, f"{where}, {picture.field}: {error}")
        else:
            yield _item(question, image, where)


def _item(question: Question, image: bytes | None, where: str) -> EvaluationItem:
    return EvaluationItem(
        id=question.index,
        question=question.question,
        options=question.options,
        answer="" if question.answer is None else question.options[question.answer],
        category=question.category,
        image=image,
        where=where,
        hint=question.hint,
    )
