"""Conversations about images, as LLaVA and the sets that follow it store them, to records.

An entry has `id`, `image` (or `images`) and `conversations` of `from` and `value` (or `messages` of `role` and
`content`); in the Cauldron's form it has `images` and `texts` of `user` and `assistant`. A file holds a JSON list, or
an entry per line (.jsonl); either may be compressed. The images lie in a folder or zip.

`parse_entry` is pure given a function that reads an image by name; `read_llava` walks a file. `conversation_record`
is shared with parquet files that hold such conversations.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from data_pipelines.entries import Dropped
from data_pipelines.image_files import ImageFiles
from data_pipelines.text_files import is_json_lines, read_json, read_json_lines
from unihetero_jax.data import records
from unihetero_jax.data.records import (
    ImageSegment,
    Record,
    RecordError,
    Segment,
    TextSegment,
    format_answer,
    format_prompt,
)

PLACEHOLDER = "<image>"
Turn = tuple[str, str]
"""A question and its answer."""

_ROLES = {"system": "system", "human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}
_MARK_LINE = re.compile(rf"^{PLACEHOLDER}\n", re.MULTILINE)
_OPTION = re.compile(r"^([A-Z])[.)] ?(.*)$")
_INSTRUCTION = re.compile(r"^answer with the option's letter", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class LlavaOptions:
    """How conversations become records.

    Attributes:
        source: name stored in each record.
        turns: `independent`: every turn sees the image and no other turn; `dialogue`: each sees those before it.
        choices: what a multiple-choice turn becomes. `letter`: as it stands. `text`: the question without its options,
            answered by the option's text, which is what scoring by option likelihood asks of a model.
        first_turn, last_turn: which turns to keep, as a Python slice (`last_turn` None: to the end).
        replacements: texts replaced in questions, to give a set the wording that its benchmark has.
    """

    source: str
    turns: Literal["independent", "dialogue"] = "independent"
    choices: Literal["letter", "text"] = "letter"
    first_turn: int = 0
    last_turn: int | None = None
    replacements: Mapping[str, str] = dataclasses.field(default_factory=dict)


def read_llava(path: Path, images: Path, options: LlavaOptions) -> Iterator[Record | Dropped]:
    """Records of a file of conversations, in its order.

    Raises:
        ValueError: the file is neither a JSON list nor JSONL, or the images cannot be opened.
    """
    with ImageFiles(images) as files:
        for where, entry in _entries(path):
            yield entry if isinstance(entry, Dropped) else parse_entry(entry, files.read, options, where)


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    if is_json_lines(path):
        yield from read_json_lines(path)
        return
    entries = read_json(path, "LLaVA JSON")
    if not isinstance(entries, list):
        raise ValueError(f"{path}: a LLaVA file is a JSON list of conversations, this is a {type(entries).__name__}")
    yield from ((f"{path.name}[{number}]", entry) for number, entry in enumerate(entries))


def parse_entry(entry: Any, read_image: Callable[[str], bytes], options: LlavaOptions, where: str) -> Record | Dropped:
    """One conversation to a record, or why not."""
    try:
        names = _image_names(entry)
        meta: dict[str, str | int | float] = {"id": str(entry.get("id", where))}
        read = [functools.partial(read_image, name) for name in names]
        return conversation_record(entry, read, options, meta, where)
    except RecordError as error:
        return Dropped(error.reason, f"{where}: {error}")


def _image_names(entry: Any) -> list[str]:
    if not isinstance(entry, dict):
        raise RecordError("not_an_object", f"a {type(entry).__name__}")
    names = entry.get("image")
    names = entry.get("images") if names is None else names
    names = [] if names is None else names if isinstance(names, list) else [names]
    if not all(isinstance(name, str) and name for name in names):
        raise RecordError("bad_image_field", repr(names)[:80])
    return names


def conversation_record(
    sample: Mapping[str, Any],
    read_images: Sequence[Callable[[], bytes]],
    options: LlavaOptions,
    meta: dict[str, str | int | float],
    where: str,
) -> Record:
    """One conversation to a record.

    The image of a conversation goes before its text wherever `<image>` stands in the first question, as in LLaVA
    itself, and so do all images of the Cauldron's form, which has no marks. Several images, and an image whose mark
    comes later, stay in their places, which only a dialogue can hold.

    A leading message from `system` goes before the first question, as a paragraph of its own: where it says how to
    answer, the answer makes no sense without it. Turns that are independent of the first do not see it.

    Args:
        sample: with `conversations`, `messages` or `texts`.
        read_images: give the bytes of each image, in the order of the marks; called only for what the record needs.
        options: which turns to keep, and how.
        meta: as stored in the record.
        where: file and place in it.

    Raises:
        RecordError: why there is no record of it.
    """
    segments = tuple(_segments(sample, read_images, options))
    has_image = any(isinstance(segment, ImageSegment) for segment in segments)
    return Record(options.source, "vqa" if has_image else "text", segments, meta, where)


def _segments(
    sample: Mapping[str, Any], read_images: Sequence[Callable[[], bytes]], options: LlavaOptions
) -> Sequence[Segment]:
    num_images = len(read_images)
    turns = _turns(sample, num_images)
    in_places = _has_images_in_places(turns, num_images)
    turns = turns[options.first_turn : options.last_turn]
    if not turns:
        raise RecordError("no_turn_selected", f"turns {options.first_turn} to {options.last_turn}")
    if in_places and (options.turns == "independent" or options.first_turn):
        reason = "several_images" if num_images > 1 else "image_count"
        raise RecordError(reason, f"{num_images} images in their places need turns=dialogue from the first on")
    if in_places:
        turns = [_reworded_with_marks(turn, options) for turn in turns]
        count = sum(question.count(PLACEHOLDER) for question, _ in turns)
        return list(_dialogue_with_images([_image(read()) for read in read_images[:count]], turns))
    turns = [_reworded((_without_marks(question), answer), options) for question, answer in turns]
    images = [_image(read()) for read in read_images]
    return [*images, *(_independent(turns) if options.turns == "independent" else _dialogue(turns))]


def _turns(sample: Mapping[str, Any], num_images: int) -> list[Turn]:
    """Questions, with the marks of their images, and answers."""
    messages = sample.get("conversations")
    messages = sample.get("messages") if messages is None else messages
    has_marks = messages is not None or sample.get("texts") is None
    turns = _turns_of_messages(messages) if has_marks else _turns_of_texts(sample["texts"])
    in_questions, in_answers = (sum(turn[part].count(PLACEHOLDER) for turn in turns) for part in (0, 1))
    expected = num_images if has_marks else 0
    if in_answers or in_questions != expected:
        detail = f"{num_images} images, {in_questions} marks in questions, {in_answers} in answers"
        raise RecordError("image_count", detail)
    if not all(answer.strip() for _, answer in turns):
        raise RecordError("empty_answer")
    return turns


def _turns_of_messages(messages: Any) -> list[Turn]:
    if not isinstance(messages, list) or not messages:
        raise RecordError("empty_conversation")
    roles, values = zip(*map(_role_and_value, messages), strict=True)
    has_system = roles[0] == "system"
    for number, (role, value) in enumerate(zip(roles, values, strict=True)):
        expected = "system" if has_system and not number else "gpt" if (number - has_system) % 2 else "human"
        if role != expected or not isinstance(value, str):
            detail = f"message {number} must be a text from {expected}: {messages[number]!r:.80}"
            raise RecordError("bad_conversation", detail)
    if len(messages) == has_system:
        raise RecordError("empty_conversation", "a system message alone")
    if (len(messages) - has_system) % 2:
        raise RecordError("bad_conversation", "the last question has no answer")
    if has_system:
        values = (f"{values[0].strip()}\n{values[1]}".lstrip("\n"), *values[2:])
    return list(zip(values[::2], values[1::2], strict=True))


def _role_and_value(message: Any) -> tuple[str | None, Any]:
    if not isinstance(message, Mapping):
        return None, None
    role = message.get("from", message.get("role"))
    return _ROLES.get(role) if isinstance(role, str) else None, message.get("value", message.get("content"))


def _turns_of_texts(texts: Any) -> list[Turn]:
    if not isinstance(texts, list) or not texts:
        raise RecordError("empty_conversation")
    turns = []
    for number, text in enumerate(texts):
        turn = (text.get("user"), text.get("assistant")) if isinstance(text, Mapping) else (None, None)
        if not all(isinstance(part, str) for part in turn):
            raise RecordError("bad_conversation", f"text {number} must have a user's and an assistant's: {text!r:.80}")
        turns.append(turn)
    return turns


def _has_images_in_places(turns: list[Turn], num_images: int) -> bool:
    marks = [question.count(PLACEHOLDER) for question, _ in turns]
    return sum(marks) > 0 and (num_images > 1 or not marks[0])


def _without_marks(question: str) -> str:
    return _MARK_LINE.sub("", question).replace(PLACEHOLDER, "")


def _reworded_with_marks(turn: Turn, options: LlavaOptions) -> Turn:
    reworded = _reworded(turn, options)
    if reworded[0].count(PLACEHOLDER) != turn[0].count(PLACEHOLDER) or PLACEHOLDER in reworded[1]:
        raise RecordError("image_count", "the question, reworded, has lost or won an image: one in an option?")
    return reworded


def _reworded(turn: Turn, options: LlavaOptions) -> Turn:
    question, answer = (part.strip() for part in turn)
    for old, new in options.replacements.items():
        question = question.replace(old, new)
    if options.choices == "letter":
        return question, answer
    lines = question.split("\n")
    found = {number: match for number, line in enumerate(lines) if (match := _OPTION.match(line))}
    texts = {match[1]: match[2].strip() for match in found.values()}
    if len(found) < 2:
        return question, answer
    letter = answer.rstrip(".)")
    if letter not in texts or len(texts) != len(found):
        raise RecordError("answer_not_an_option", f"{answer!r} of {sorted(texts)}")
    kept = [line for number, line in enumerate(lines) if number not in found and not _INSTRUCTION.match(line)]
    if not texts[letter]:
        raise RecordError("empty_answer", f"option {letter} has no text")
    return "\n".join(kept), texts[letter]


def _image(data: bytes) -> ImageSegment:
    return ImageSegment(data, *records.probe_image(data))


def _independent(turns: list[Turn]) -> Iterator[TextSegment]:
    for branch, (question, answer) in enumerate(turns, start=1):
        yield TextSegment(format_prompt(question), False, branch)
        yield TextSegment(format_answer(answer), True, branch)


def _dialogue(turns: list[Turn]) -> Iterator[TextSegment]:
    for number, (question, answer) in enumerate(turns):
        yield TextSegment(("\n" if number else "") + format_prompt(question), False)
        yield TextSegment(format_answer(answer), True)


def _dialogue_with_images(images: list[ImageSegment], turns: list[Turn]) -> Iterator[Segment]:
    next_image = iter(images)
    for number, (question, answer) in enumerate(turns):
        for place, text in enumerate(question.split(PLACEHOLDER)):
            if place:
                yield next(next_image)
            start = "\n" if number and not place else ""  # between an answer and the next question, as in `_dialogue`
            if start or text.strip():
                yield TextSegment(start + format_prompt(text))
        yield TextSegment(format_answer(answer), True)
