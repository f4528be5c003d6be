"""COCO captions (a JSON file with `images` and `annotations`, and a folder or zip of images) to records.

`parse_pairs`, `parse_together` and `parse_captions` are pure given a function that reads an image by name; `read_coco`
walks a file. Each annotation comes out once: in a record, or dropped.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from data_pipelines.caption_pairs import pair_record
from data_pipelines.entries import Dropped
from data_pipelines.image_files import ImageFiles
from data_pipelines.text_files import read_json
from unihetero_jax.data import records
from unihetero_jax.data.records import Record, RecordError, Segment, TextSegment, format_answer, format_prompt

Samples = list[Record | Dropped]


@dataclasses.dataclass(frozen=True)
class CocoOptions:
    """How images and captions become records.

    Attributes:
        source: name stored in each record.
        captions: `separate`: a pair of each caption and its image, without a prompt, in an order that is chosen at load
            time; `together`: an image and independent turns, one for each of its captions; `text`: captions alone.
        prompt: of each turn of `together`. It cannot be empty: a turn's first word would have nothing before it in its
            own turn to be predicted from.
        image_prefix: stands before each `file_name`, such as `train2017/` for the archives that COCO gives out.
    """

    source: str
    captions: Literal["separate", "together", "text"] = "separate"
    prompt: str = "Describe this image."
    image_prefix: str = ""

    def __post_init__(self):
        if self.captions == "together" and not self.prompt.strip():
            raise ValueError("captions that stand together need a prompt, which each of them answers")


@dataclasses.dataclass(frozen=True)
class AnnotatedImage:
    """An entry of `images`, what the entries of `annotations` say of it, and the place of each in the file."""

    entry: Mapping[str, Any]
    annotations: Sequence[tuple[Mapping[str, Any], str]]
    where: str


def read_coco(path: Path, images: Path | None, options: CocoOptions) -> Iterator[Record | Dropped]:
    """Records of a COCO captions file (.gz is unpacked), in the order of its images, then of their captions.

    Args:
        path: the JSON file.
        images: the images' folder or zip; None for `captions="text"`, which reads none.
        options: how images and captions become records.

    Raises:
        ValueError: the file holds no COCO captions, or the images cannot be opened.
    """
    if options.captions == "text":
        yield from _parsed(path, functools.partial(parse_captions, options=options))
        return
    if images is None:
        raise ValueError(f"--images: captions={options.captions} needs the folder or zip file with the images")
    parse = parse_together if options.captions == "together" else parse_pairs
    with ImageFiles(images) as files:
        read_image = functools.lru_cache(maxsize=1)(files.read)  # the captions of an image follow each other
        yield from _parsed(path, functools.partial(parse, read_image=read_image, options=options))


def _parsed(path: Path, parse: Callable[[AnnotatedImage], Samples]) -> Iterator[Record | Dropped]:
    for image in _annotated_images(path):
        if isinstance(image, Dropped):
            yield image
        else:
            yield from parse(image)


def _annotated_images(path: Path) -> Iterator[AnnotatedImage | Dropped]:
    """Brings each image's annotations together, and drops what has no counterpart."""
    entries, annotations = _load(path)
    of_image: dict[int | str, list[tuple[Mapping[str, Any], str]]] = {}
    for number, annotation in enumerate(annotations):
        where = f"{path.name}, annotations[{number}]"
        if isinstance(annotation, Mapping) and isinstance(annotation.get("image_id"), int | str):
            of_image.setdefault(annotation["image_id"], []).append((annotation, where))
        else:
            yield Dropped("bad_annotation", f"{where}: no object with an image_id: {annotation!r:.80}")
    seen: set[int | str] = set()
    for number, entry in enumerate(entries):
        where = f"{path.name}, images[{number}]"
        if not isinstance(entry, Mapping) or not isinstance(entry.get("id"), int | str):
            yield Dropped("bad_image_entry", f"{where}: no object with an id: {entry!r:.80}")
            continue
        identity = entry["id"]
        if identity in seen:
            yield Dropped("duplicate_image_id", f"{where}: an earlier image has id {identity!r} too")
        elif identity not in of_image:
            yield Dropped("no_caption", f"{where}: no annotation has image_id {identity!r}")
        else:
            yield AnnotatedImage(entry, of_image[identity], where)
        seen.add(identity)
    for identity in [each for each in of_image if each not in seen]:
        for _, where in of_image[identity]:
            yield Dropped("no_image_entry", f"{where}: no image has id {identity!r}")


def _load(path: Path) -> tuple[list[Any], list[Any]]:
    content = read_json(path, "COCO captions JSON")
    fields = content if isinstance(content, Mapping) else {}
    entries, annotations = fields.get("images"), fields.get("annotations")
    if not isinstance(entries, list) or not isinstance(annotations, list):
        raise ValueError(f"{path}: a COCO captions file is a JSON object with the lists images and annotations")
    if annotations and not any(isinstance(each, Mapping) and "caption" in each for each in annotations):
        raise ValueError(f"{path}: no annotation has a caption; give a captions_*.json, no instances or keypoints")
    return entries, annotations


def parse_pairs(image: AnnotatedImage, read_image: Callable[[str], bytes], options: CocoOptions) -> Samples:
    """One record of an image and each of its captions, or why not."""
    return [_pair(image.entry, *annotation, read_image, options) for annotation in image.annotations]


def _pair(
    entry: Mapping[str, Any],
    annotation: Mapping[str, Any],
    where: str,
    read_image: Callable[[str], bytes],
    options: CocoOptions,
) -> Record | Dropped:
    try:
        name = entry.get("file_name")
        if not isinstance(name, str) or not name:
            raise RecordError("bad_image_entry", f"file_name of image {entry['id']!r} is {name!r}")
        data = read_image(options.image_prefix + name)
        _check_size(entry, *records.probe_image(data))
        return pair_record(options.source, data, annotation.get("caption"), _meta(entry, annotation, where), where)
    except RecordError as error:
        return Dropped(error.reason, f"{where}: {error}")


def _check_size(entry: Mapping[str, Any], height: int, width: int) -> None:
    stated = (entry.get("height"), entry.get("width"))
    # Either way round: a size may have been stated of the pixels as they are stored, before EXIF turns them.
    if stated not in ((None, None), (height, width), (width, height)):
        detail = f"{entry['file_name']!r} is {height} x {width} (height x width), stated as {stated[0]} x {stated[1]}"
        raise RecordError("size_mismatch", f"{detail}: another file under this name?")


def _meta(entry: Mapping[str, Any], annotation: Mapping[str, Any], where: str) -> dict[str, str | int | float]:
    """Ids, and what the licence asks to be kept: its number in the file's list and the photo's page."""
    stated = {"image_id": entry["id"], "license": entry.get("license"), "flickr_url": entry.get("flickr_url")}
    kept = {name: str(value) for name, value in stated.items() if isinstance(value, int | str)}
    return {"id": str(annotation.get("id", where)), **kept}


def parse_together(image: AnnotatedImage, read_image: Callable[[str], bytes], options: CocoOptions) -> Samples:
    """One record of an image and all its captions, as independent turns; captions that do not fit are dropped alone."""
    samples = parse_pairs(image, read_image, options)
    pairs = [sample for sample in samples if isinstance(sample, Record)]
    dropped = [sample for sample in samples if isinstance(sample, Dropped)]
    if not pairs:
        return [*dropped]
    segments: list[Segment] = [pairs[0].segments[0]]
    for branch, pair in enumerate(pairs, start=1):
        caption = pair.segments[1]
        assert isinstance(caption, TextSegment)
        segments.append(TextSegment(format_prompt(options.prompt), False, branch))
        segments.append(TextSegment(format_answer(caption.text), True, branch))
    meta = pairs[0].meta | {"id": str(image.entry["id"])}
    return [Record(options.source, "caption", tuple(segments), meta, image.where), *dropped]


def parse_captions(image: AnnotatedImage, options: CocoOptions) -> Samples:
    """One record of text for each caption of an image, or why not."""
    return [_text(image.entry, *annotation, options) for annotation in image.annotations]


def _text(
    entry: Mapping[str, Any], annotation: Mapping[str, Any], where: str, options: CocoOptions
) -> Record | Dropped:
    caption = annotation.get("caption")
    if not isinstance(caption, str) or not caption.strip():
        return Dropped("empty_caption", f"{where}: caption is {caption!r:.80}")
    segments = (TextSegment(caption.strip(), True),)
    return Record(options.source, "text", segments, _meta(entry, annotation, where), where)
