"""LLaVA JSON (`id`, `image`, `conversations`) and a folder or zip of images, to records.

`parse_entry` is pure given a function that reads an image by name; `read_llava` walks a file.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from data_pipelines.image_files import ImageFiles
from data_pipelines.writer import Dropped
from unihetero_jax.data import records
from unihetero_jax.data.records import ImageSegment, Record, RecordError, TextSegment, format_answer, format_prompt

PLACEHOLDER = "<image>"
Turn = tuple[str, str]
"""A question and its answer."""

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
    """Records of a LLaVA JSON file, in its order.

    Raises:
        ValueError: the file is no JSON list, or the images cannot be opened.
    """
    try:
        entries = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no readable LLaVA JSON: {error}") from error
    if not isinstance(entries, list):
        raise ValueError(f"{path}: a LLaVA file is a JSON list of conversations, this is a {type(entries).__name__}")
    with ImageFiles(images) as files:
        for number, entry in enumerate(entries):
            yield parse_entry(entry, files.read, options, f"{path.name}[{number}]")


def parse_entry(entry: Any, read_image: Callable[[str], bytes], options: LlavaOptions, where: str) -> Record | Dropped:
    """One conversation to a record, or why not.

    The image of a conversation goes before its text wherever `<image>` stands, as in LLaVA itself. Several images stay
    in their places, which only a dialogue can hold.

    A leading message from `system` goes before the first question, as a paragraph of its own: where it says how to
    answer, the answer makes no sense without it. Turns that are independent of the first do not see it.
    """
    try:
        names = _image_names(entry)
        turns = _turns(entry, len(names))
        lead = turns[0][0].split(PLACEHOLDER)
        turns = turns[options.first_turn : options.last_turn]
        if not turns:
            raise RecordError("no_turn_selected", f"turns {options.first_turn} to {options.last_turn}")
        if len(names) > 1 and (options.turns == "independent" or options.first_turn):
            raise RecordError("several_images", f"{len(names)} images need turns=dialogue from the first on")
        turns = [_reworded(turn, options) for turn in turns]
        images = [_image(read_image(name)) for name in names]
        if len(images) > 1:
            segments = _dialogue_with_images(lead, images, turns)
        else:
            segments = [*images, *(_independent(turns) if options.turns == "independent" else _dialogue(turns))]
    except RecordError as error:
        return Dropped(error.reason, f"{where}: {error}")
    meta: dict[str, str | int | float] = {"id": str(entry.get("id", where))}
    return Record(options.source, "vqa" if names else "text", tuple(segments), meta, where)


def _image_names(entry: Any) -> list[str]:
    if not isinstance(entry, dict):
        raise RecordError("not_an_object", f"a {type(entry).__name__}")
    names = entry.get("image")
    names = [] if names is None else names if isinstance(names, list) else [names]
    if not all(isinstance(name, str) and name for name in names):
        raise RecordError("bad_image_field", repr(names)[:80])
    return names


def _turns(entry: Mapping[str, Any], num_images: int) -> list[Turn]:
    messages = entry.get("conversations")
    if not isinstance(messages, list) or not messages:
        raise RecordError("empty_conversation")
    has_system = isinstance(messages[0], dict) and messages[0].get("from") == "system"
    for number, message in enumerate(messages):
        role = "system" if has_system and not number else "gpt" if (number - has_system) % 2 else "human"
        if not isinstance(message, dict) or message.get("from") != role or not isinstance(message.get("value"), str):
            raise RecordError("bad_conversation", f"message {number} must be a text from {role}: {message!r:.80}")
    if len(messages) == has_system:
        raise RecordError("empty_conversation", "a system message alone")
    if (len(messages) - has_system) % 2:
        raise RecordError("bad_conversation", "the last question has no answer")
    values = [message["value"] for message in messages]
    if has_system:
        values = [f"{values[0].strip()}\n{values[1]}".lstrip("\n"), *values[2:]]
    marks = [value.count(PLACEHOLDER) for value in values]
    if sum(marks[1:]) or marks[0] != num_images:
        detail = f"{num_images} images, {marks[0]} marks in the first message, {sum(marks[1:])} later"
        raise RecordError("image_count", detail)
    turns = list(zip(values[::2], values[1::2], strict=True))
    if not all(answer.strip() for _, answer in turns):
        raise RecordError("empty_answer")
    return turns


def _reworded(turn: Turn, options: LlavaOptions) -> Turn:
    question = _MARK_LINE.sub("", turn[0]).replace(PLACEHOLDER, "").strip()
    answer = turn[1].strip()
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


def _dialogue_with_images(
    lead: list[str], images: list[ImageSegment], turns: list[Turn]
) -> list[TextSegment | ImageSegment]:
    segments: list[TextSegment | ImageSegment] = []
    for number, text in enumerate(lead):
        segments += [images[number - 1]] if number else []
        segments += [TextSegment(text.strip())] if text.strip() else []
    return [*segments, *list(_dialogue(turns))[1:]]
