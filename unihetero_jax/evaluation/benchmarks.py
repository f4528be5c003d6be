"""What is scored of a benchmark file: MMBench TSV, SEED-Bench JSON and POPE JSON lines all give the same `Item`s.

A fault in a file is an error that names file, row and column; a row that is well-formed but outside what is scored here
(a video, a circular repeat where the order of the options is not shown) is counted by reason.
"""

import dataclasses
import functools
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from unihetero_jax.data.labelled_images import class_names, read_labelled_images
from unihetero_jax.data.open_questions import holds_open_questions, read_open_questions
from unihetero_jax.data.question_files import (
    OPTION_LETTERS,
    ImageStore,
    Picture,
    Question,
    StoredImage,
    read_questions,
)
from unihetero_jax.data.records import RecordError
from unihetero_jax.evaluation.circular import group_rotations

CLASS_TEMPLATE = "a photo of a {}."
"""Caption of a class (CLIP's, arXiv 2103.00020)."""
CIRCULAR, VIDEO, NO_OPTIONS = "circular_row", "video", "no_options"


@dataclasses.dataclass(frozen=True)
class Item:
    """One multiple-choice question.

    Attributes:
        index: the file's own identifier; unique within a benchmark.
        question: text of the question.
        options: answer texts, at least two, in file order.
        answer: position of the right option.
        pictures: in order; they come before the question, whose text may refer to them (`<image 1>`). Empty for a
            question without one.
        category: question type that results are grouped by.
        hint: text to be read before the question; often empty.
        references: answers of people, where the question is open; then there are no options and `answer` is -1.
        group: a second grouping, see `Question`; may be empty.
        original_index: of the item whose options this one has in another order; empty: of none.
    """

    index: str
    question: str
    options: tuple[str, ...]
    answer: int
    pictures: tuple[StoredImage, ...]
    category: str
    hint: str = ""
    references: tuple[str, ...] = ()
    group: str = ""
    original_index: str = ""

    @functools.cached_property
    def cluster(self) -> str:
        """What items share whose answers are not independent: the pictures, else the original question."""
        if not self.pictures:
            return self.original_index or self.index
        digests = b"".join(picture.digest for picture in self.pictures)
        return hashlib.blake2b(digests, digest_size=8).hexdigest()

    @property
    def images(self) -> tuple[bytes, ...]:
        """The original bytes of its pictures, read anew each time."""
        return tuple(picture.read() for picture in self.pictures)

    def option_label(self, position: int) -> str:
        """How public scorers expect an option: by its letter, but yes and no, and one of many classes, by its text."""
        is_named = self.is_yes_no or len(self.options) > len(OPTION_LETTERS)
        return self.options[position] if is_named else OPTION_LETTERS[position]

    @property
    def is_yes_no(self) -> bool:
        """Whether it offers yes and no and nothing else."""
        return sorted(option.lower() for option in self.options) == ["no", "yes"]

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
        unscored_rows: well-formed rows that are no item here, counted by reason: `circular_row` (left out where the
            prompt does not show the options, so that their order changes nothing), `video`,
            `no_options` (nothing to rank; some CCBench rows have their options in the picture).
    """

    name: str
    path: Path
    items: tuple[Item, ...]
    data_hash: str
    unscored_rows: Mapping[str, int]

    @property
    def is_open(self) -> bool:
        """Whether its questions are answered in words, without options."""
        return bool(self.items[0].references)

    @property
    def num_unscored(self) -> int:
        """Rows of the file that are no item."""
        return sum(self.unscored_rows.values())


def read_benchmark(path: str | Path, rotations: bool = False) -> Benchmark:
    """Reads a questions file (formats: see `read_questions`, `read_open_questions`) and its pictures (`ImageStore`).

    A folder of pictures by class, or a parquet file of them, is zero-shot classification: an item for each picture, the
    captions of all classes as its options, no question.

    Args:
        path: the file.
        rotations: rows that repeat another with rotated options are items too, and all of them have to be there.

    Raises:
        ValueError: the file is missing, of no known format, empty, or has a faulty row; names file, row and column.
    """
    path = Path(path)
    if path.is_dir() or path.suffix.lower() == ".parquet":
        return _read_classification(path)
    skipped: Counter[str] = Counter()
    images = ImageStore(path.parent)
    is_open = holds_open_questions(path)
    items = tuple(_open_items(path, images) if is_open else _items(path, images, skipped, rotations))
    _check_items(path, items, skipped)
    file_digest = hashlib.blake2b(path.read_bytes()).digest()
    digest = hashlib.blake2b(file_digest + images.digest(), digest_size=8).hexdigest()
    return Benchmark(path.stem, path, items, digest, dict(sorted(skipped.items())))


def _items(path: Path, images: ImageStore, skipped: Counter[str], rotations: bool) -> Iterator[Item]:
    questions = list(read_questions(path))
    if rotations and any(question.original_index for question in questions):
        group_rotations(str(path), [q for q in questions if not q.fault and q.answer is not None])
    for question in questions:
        if reason := _unscored(question, rotations):
            skipped[reason] += 1
        else:
            yield _item(path, question, images)


def _unscored(question: Question, rotations: bool) -> str:
    """Why a question is outside what is scored; empty: it is not."""
    if question.original_index and not rotations:
        return CIRCULAR
    if question.is_video:
        return VIDEO
    return "" if question.options or question.fault else NO_OPTIONS


def _read_classification(path: Path) -> Benchmark:
    names = class_names(path)
    options = tuple(CLASS_TEMPLATE.format(name.replace("_", " ")) for name in names)
    state, items = hashlib.blake2b("\0".join(options).encode(), digest_size=8), []
    for image in read_labelled_images(path):
        state.update(f"{image.index}\0{image.label}\0".encode() + image.picture.digest)
        items.append(Item(image.index, "", options, image.label, (image.picture,), names[image.label]))
    _check_items(path, tuple(items), Counter())
    return Benchmark(path.stem, path, tuple(items), state.hexdigest(), {})


def _open_items(path: Path, images: ImageStore) -> Iterator[Item]:
    for question in read_open_questions(path):
        place = f"{path}: {question.place}"
        if not question.question and not question.is_caption:
            raise ValueError(
                f"{place}: no question; put the list `questions` of the questions file beside `annotations`"
            )
        yield Item(
            index=question.index,
            question=question.question,
            options=(),
            answer=-1,
            pictures=_find_pictures(place, question.pictures, images),
            category=question.category,
            references=question.answers,
        )


def _item(path: Path, question: Question, images: ImageStore) -> Item:
    place = f"{path}: {question.place}"
    if question.fault:
        raise ValueError(f"{place}, {_detail(question.fault)}") from question.fault
    if question.answer is None:
        raise ValueError(f"{place}, column answer: empty; a TEST file has no answers and cannot be scored here")
    return Item(
        index=question.index,
        question=question.question,
        options=question.options,
        answer=question.answer,
        pictures=_find_pictures(place, question.pictures, images),
        category=question.category,
        hint=question.hint,
        group=question.group,
        original_index=question.original_index,
    )


def _find_pictures(place: str, pictures: Sequence[Picture], images: ImageStore) -> tuple[StoredImage, ...]:
    """The pictures, each read once to know it; the bytes are not kept."""
    found = []
    for picture in pictures:
        try:
            found.append(images.find(picture))
            _ = found[-1].digest
        except RecordError as error:
            raise ValueError(f"{place}, {picture.field}: {_detail(error)}") from error
    return tuple(found)


def _detail(error: RecordError) -> str:
    return str(error).removeprefix(f"{error.reason}: ")


def _check_items(path: Path, items: tuple[Item, ...], skipped: Counter[str]) -> None:
    if not items:
        raise ValueError(f"{path}: no question to score (rows outside what is scored: {dict(skipped) or 'none'})")
    repeated = [index for index, count in Counter(item.index for item in items).items() if count > 1]
    if repeated:
        raise ValueError(f"{path}: question identifiers must be unique, repeated: {', '.join(repeated[:5])}")
