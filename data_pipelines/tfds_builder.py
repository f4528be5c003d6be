"""A prepared set of TensorFlow Datasets (ArrayRecord or parquet files, no TensorFlow) to records.

`parse_example` is pure; `read_tfds` walks a split. Nothing is downloaded or prepared here.

Images keep the bytes that the builder stored. Where a set holds arrays instead of encoded images, they become PNG, and
the record's `meta` says so.
"""

import dataclasses
import hashlib
import io
import numbers
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.caption_pairs import pair_record
from data_pipelines.entries import Dropped
from data_pipelines.hf_parquet import ParquetOptions
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

IMAGE_TYPES = (np.uint8, np.uint16)
"""Of images and arrays of pixels. An image feature of floats keeps their bits in four channels: no picture."""

Meta = dict[str, str | int | float]


@dataclasses.dataclass(frozen=True)
class TfdsOptions:
    """How examples become records: captions alone make a pair each, anything else independent turns about the image.

    Features are named as the builder names them; one inside another as `outer/inner`. Empty: none.

    Attributes:
        source: name stored in each record.
        image: the image: encoded, or an array of bytes.
        caption: a text, or a sequence of texts.
        label: a class or a text, the answer to one of `questions`.
        question, answer: texts, classes or whole numbers; sequences of the same length give several turns.
        questions: wordings of the question that the label answers; an image's bytes choose one.
        caption_prompt: the question that a caption answers where it is one of several turns.
    """

    source: str
    image: str = "image"
    caption: str = ""
    label: str = ""
    question: str = ""
    answer: str = ""
    questions: tuple[str, ...] = ParquetOptions.questions
    caption_prompt: str = ParquetOptions.caption_prompt

    def __post_init__(self):
        if not self.image:
            raise ValueError("an image feature is needed")
        if bool(self.question) != bool(self.answer):
            raise ValueError("a question feature needs an answer feature, and an answer feature a question")
        if not self.texts:
            raise ValueError("a caption, label or question feature is needed: the text that goes with the image")
        if self.label and not self.questions:
            raise ValueError("a label feature needs a question that the label answers")

    @property
    def texts(self) -> tuple[str, ...]:
        """Names of the features that give text."""
        return tuple(name for name in (self.caption, self.label, self.question, self.answer) if name)


def read_tfds(
    builder: str, split: str, options: TfdsOptions, data_dir: str | Path | None = None
) -> Iterator[Record | Dropped]:
    """Records of a split, in stored order.

    Args:
        builder: name of a builder (`name`, `name/config`, `name:version`) that was prepared under `data_dir`, or the
            folder that holds its `dataset_info.json`.
        split: as TensorFlow Datasets writes it, such as `train` or `train[:10%]`.
        options: which features to use, and how.
        data_dir: folder of prepared sets; None: where TensorFlow Datasets looks by itself.

    Raises:
        ValueError: the set was not prepared in a format that can be read here, is damaged, or lacks the split or a
            feature.
    """
    opened = _open(builder, data_dir)
    features = _wanted_features(opened, builder, options)
    names = {name: tuple(labels) for name in options.texts if (labels := _class_names(opened.info.features, name))}
    place = f"{opened.info.full_name}/{split}"
    for number, data in enumerate(_stored(opened, builder, split)):
        where = f"{place}[{number}]"
        example = _example(features, data, options.image, where)
        yield from [example] if isinstance(example, Dropped) else parse_example(example, options, where, names)


def parse_example(
    example: Mapping[str, Any], options: TfdsOptions, where: str, class_names: Mapping[str, Sequence[str]]
) -> list[Record | Dropped]:
    """One example to its records and what of it was dropped. `class_names` gives the text of classes, by feature."""
    try:
        data, meta = _image(_value(example, options.image))
        meta = {"id": where} | meta
        texts = {name: _texts(_value(example, name), class_names.get(name, ())) for name in options.texts}
        if options.texts == (options.caption,):
            return _pairs(data, texts[options.caption], options, meta, where)
        turns = _turns(data, texts, options)
        segments: list[Segment] = [ImageSegment(data, *records.probe_image(data))]
    except RecordError as error:
        return [Dropped(error.reason, f"{where}: {error}")]
    for branch, (question, answer) in enumerate(turns, start=1):
        segments.append(TextSegment(format_prompt(question), False, branch))
        segments.append(TextSegment(format_answer(answer), True, branch))
    return [Record(options.source, "vqa", tuple(segments), meta, where)]


# ---------------------------------------------------------------- one example


def _value(example: Mapping[str, Any], name: str) -> Any:
    value: Any = example
    for part in name.split("/"):
        value = value.get(part) if isinstance(value, Mapping) else None
    if value is None:
        raise RecordError("missing_feature", name)
    return value


def _image(value: Any) -> tuple[bytes, Meta]:
    if isinstance(value, bytes):
        return value, {}
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8 or value.ndim not in (2, 3) or not value.size:
        raise RecordError("not_an_image", f"{type(value).__name__} {getattr(value, 'shape', '')}")
    buffer = io.BytesIO()
    try:
        Image.fromarray(value[..., 0] if value.shape[2:] == (1,) else value).save(buffer, "PNG")
    except (TypeError, ValueError, OSError) as error:  # a number of channels that no image has
        raise RecordError("not_an_image", f"an array of shape {value.shape}: {error}") from error
    return buffer.getvalue(), {"encoding": "PNG of an array"}


def _texts(value: Any, names: Sequence[str]) -> list[str]:
    if isinstance(value, list | np.ndarray):
        return [text for item in value for text in _texts(item, names)]
    if isinstance(value, bytes):
        try:
            return [value.decode("utf-8").strip()]
        except UnicodeDecodeError as error:
            raise RecordError("invalid_text", str(error)) from error
    if isinstance(value, str):
        return [value.strip()]
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise RecordError("not_a_text", f"{value!r:.80}")
    number = int(value)
    if not names:
        return [str(number)]
    if not 0 <= number < len(names):  # TensorFlow Datasets stores -1 where a class is not known, as in test splits
        raise RecordError("unknown_label", f"class {number} of {len(names)}")
    return [names[number].strip()]


def _pairs(data: bytes, captions: list[str], options: TfdsOptions, meta: Meta, where: str) -> list[Record | Dropped]:
    if not captions:
        return [Dropped("empty_caption", f"{where}: no caption")]
    made: list[Record | Dropped] = []
    for caption in captions:
        try:
            made.append(pair_record(options.source, data, caption, meta, where))
        except RecordError as error:
            made.append(Dropped(error.reason, f"{where}: {error}"))
    return made


def _turns(data: bytes, texts: Mapping[str, list[str]], options: TfdsOptions) -> list[tuple[str, str]]:
    turns: list[tuple[str, str]] = []
    if options.label:
        choice = int.from_bytes(hashlib.blake2b(data, digest_size=4).digest(), "little")
        turns += [(options.questions[choice % len(options.questions)], label) for label in texts[options.label]]
    if options.question:
        questions, answers = texts[options.question], texts[options.answer]
        if len(questions) != len(answers):
            raise RecordError("answer_count", f"{len(questions)} questions, {len(answers)} answers")
        turns += zip(questions, answers, strict=True)
    if options.caption:
        turns += [(options.caption_prompt, caption) for caption in texts[options.caption]]
    if not turns:
        raise RecordError("empty_conversation", "no question")
    if not all(question and answer for question, answer in turns):
        raise RecordError("empty_answer", f"{turns!r:.80}")
    return turns


# ---------------------------------------------------------------- the set


def _tensorflow_datasets() -> Any:
    try:
        import tensorflow_datasets  # half a second, which no other command should pay
    except ImportError as error:
        raise ValueError(
            f"tensorflow_datasets cannot be imported ({error}); pip install tensorflow-datasets"
        ) from error
    return tensorflow_datasets


def _open(builder: str, data_dir: str | Path | None) -> Any:
    """The builder of a prepared set."""
    tfds = _tensorflow_datasets()
    try:
        if (Path(builder) / "dataset_info.json").is_file():
            return tfds.builder_from_directory(builder)
        opened = tfds.builder(builder, data_dir=data_dir)
        prepared = opened.is_prepared()
    except Exception as error:  # the code of any builder may have run
        raise ValueError(f"{builder}: neither a prepared folder nor a known builder: {_first_line(error)}") from error
    if not prepared:
        raise ValueError(
            f"{builder} is not prepared in {opened.data_path}; run tfds build {builder} --file_format=array_record, or "
            "name the folder of sets with data_dir"
        )
    return opened


def _wanted_features(opened: Any, builder: str, options: TfdsOptions) -> Any:
    """The features that the options name and no other: what else an example holds is never decoded."""
    tfds = _tensorflow_datasets()
    features = opened.info.features
    found = {name: _feature(features, name) for name in (options.image, *options.texts)}
    if missing := [name for name, feature in found.items() if feature is None]:
        raise ValueError(f"{builder}: no feature {missing[0]!r}; the set has {', '.join(sorted(features))}")
    image = found[options.image]
    if not isinstance(image, tfds.features.Image | tfds.features.Tensor) or image.np_dtype not in IMAGE_TYPES:
        raise ValueError(f"{builder}: feature {options.image!r} is no single image but a {type(image).__name__}")
    if options.label and not isinstance(_item(found[options.label]), tfds.features.ClassLabel | tfds.features.Text):
        raise ValueError(f"{builder}: feature {options.label!r} is neither a class with a name nor a text")
    names = dict.fromkeys(name.partition("/")[0] for name in found)
    return tfds.features.FeaturesDict({name: features[name] for name in names})


def _feature(features: Any, name: str) -> Any:
    """The feature that is called `outer/inner`, None if there is none; inside a sequence, a sequence of it."""
    tfds = _tensorflow_datasets()
    feature, in_sequence = features, False
    for part in name.split("/"):
        in_sequence |= isinstance(feature, tfds.features.Sequence)
        feature = _item(feature)
        if not isinstance(feature, tfds.features.FeaturesDict) or part not in feature:
            return None
        feature = feature[part]
    return tfds.features.Sequence(feature) if in_sequence else feature


def _item(feature: Any) -> Any:
    """What a sequence, also one of sequences, is made of; any other feature itself."""
    while isinstance(feature, _tensorflow_datasets().features.Sequence):
        feature = feature.feature
    return feature


def _class_names(features: Any, name: str) -> Sequence[str]:
    feature = _item(_feature(features, name))
    return feature.names if isinstance(feature, _tensorflow_datasets().features.ClassLabel) else ()


def _stored(opened: Any, builder: str, split: str) -> Iterator[bytes]:
    """The serialised examples of a split."""
    tfds = _tensorflow_datasets()
    try:
        source = opened.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        num_examples = opened.info.splits[split].num_examples
    except NotImplementedError as error:
        form = getattr(opened.info.file_format, "value", "another format")
        raise ValueError(
            f"{builder} is stored as {form}, which only TensorFlow reads; prepare it with --file_format=array_record"
        ) from error
    except Exception as error:
        raise ValueError(f"{builder}: split {split!r} cannot be read: {_first_line(error)}") from error
    if len(source) != num_examples:  # of a part of a split, the reader of parquet gives the whole
        raise ValueError(f"{builder}: split {split!r} has {num_examples} examples, {len(source)} would be read; use "
                         "whole splits, or a set prepared with --file_format=array_record")  # fmt: skip
    for number in range(num_examples):
        try:
            data = bytes(source[number])
        except Exception as error:  # array_record and pyarrow raise errors of many kinds
            raise ValueError(f"{builder}: {split}[{number}] cannot be read: {_first_line(error)}") from error
        if not data:  # what array_record gives of a file that was cut short
            raise ValueError(f"{builder}: {split}[{number}] is empty: a file is damaged; prepare the set again")
        yield data


def _example(features: Any, data: bytes, image: str, where: str) -> Mapping[str, Any] | Dropped:
    tfds = _tensorflow_datasets()
    decoders: Any = tfds.decode.SkipDecoding()  # keeps the bytes of an image; of an array, its values
    for part in reversed(image.split("/")):
        decoders = {part: decoders}
    try:
        return features.deserialize_example_np(data, decoders=decoders)
    except ImportError as error:
        raise ValueError(f"{where}: the features cannot be decoded without TensorFlow: {_first_line(error)}") from error
    except Exception as error:  # protobuf's own error, and what follows from fields that are not there
        return Dropped("not_an_example", f"{where}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n", 1)[0]
