"""Tars of samples (WebDataset) as img2dataset writes them, to records: an image and its caption.

    00000.tar               000000000.jpg, 000000000.txt, 000000000.json, 000000001.jpg, ...
    00000_stats.json        beside it, may be missing: how many samples the tar should hold

The members of a sample follow each other and share their name up to its first dot, the key; the rest, in lower case, is
the extension. Keys begin anew in each shard, so a sample is named by shard and key.

`parse_sample` is pure; `read_webdataset` walks shards. `read_samples` and what looks into a sample serve other layouts
in such tars.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.archives import read_members
from data_pipelines.caption_pairs import pair_record
from data_pipelines.entries import Dropped
from data_pipelines.image_files import IMAGE_SUFFIXES
from unihetero_jax.data.records import Record, RecordError

MAX_SAMPLE_BYTES = 512 * 2**20
"""What the members of one sample may have together (our choice: twice the largest member)."""
HASHES = ("sha256", "sha512", "md5")
"""What img2dataset may have stored."""
_OTHER_EXTENSIONS = ("txt", "json", "cls")


@dataclasses.dataclass(frozen=True)
class WebdatasetOptions:
    """How samples become records.

    Attributes:
        source: name stored in each record.
        caption_field: field of the sample's json that holds the caption; empty: the caption is its txt.
        verify_hash: whether a hash in the json must be that of the stored image. img2dataset takes it from what it has
            downloaded, and then encodes the image anew unless told otherwise: verify only images stored as they came.
    """

    source: str
    caption_field: str = ""
    verify_hash: bool = False


@dataclasses.dataclass(frozen=True)
class Sample:
    """Members that share a key.

    Attributes:
        name: shard and key, such as `00000.tar/000000003`.
        members: extension and content, in file order; images, txt, json and cls alone.
    """

    name: str
    members: tuple[tuple[str, bytes], ...]


def read_webdataset(paths: Sequence[Path], options: WebdatasetOptions) -> Iterator[Record | Dropped]:
    """Records of tars of samples, in their order.

    Raises:
        ValueError: a file is no tar, or is damaged or cut short further on.
    """
    for path in paths:
        for sample in read_samples(path):
            yield sample if isinstance(sample, Dropped) else parse_sample(sample, options)


def read_samples(path: Path) -> Iterator[Sample | Dropped]:
    """Samples of a shard, in its order; then, as dropped, whether their number is not that of its statistics.

    Members that no record takes anything from (`unused_member`) and those without key or extension (`no_key`) are
    counted, and do not stand between those of a sample.

    Raises:
        ValueError: as `read_webdataset`.
    """
    num_images = 0
    for sample in _grouped(path):
        if isinstance(sample, Sample):
            num_images += any(_is_image(extension) for extension, _ in sample.members)
        yield sample
    yield from _against_statistics(path, num_images)


def _grouped(path: Path) -> Iterator[Sample | Dropped]:
    key, members, size = "", [], 0
    for member in read_members(path):
        if isinstance(member, Dropped):
            yield member
            continue
        new_key, extension = _split(member.name)
        if not new_key:
            yield Dropped("no_key", member.where)
            continue
        if not _is_image(extension) and extension not in _OTHER_EXTENSIONS:
            yield Dropped("unused_member", member.where)
            continue
        if new_key != key:
            if members:
                yield Sample(f"{path.name}/{key}", tuple(members))
            key, members, size = new_key, [], 0
        size += len(member.data)
        if size > MAX_SAMPLE_BYTES:
            detail = f"{size} bytes with the members before it, limit {MAX_SAMPLE_BYTES}"
            yield Dropped("sample_too_large", f"{member.where}: {detail}")
        else:
            members.append((extension, member.data))
    if members:
        yield Sample(f"{path.name}/{key}", tuple(members))


def _split(name: str) -> tuple[str, str]:
    """Key and extension; both empty if there is none."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and extension else ("", "")


def _is_image(extension: str) -> bool:
    return f".{extension}" in IMAGE_SUFFIXES


def _against_statistics(path: Path, num_images: int) -> Iterator[Dropped]:
    file = path.with_name(path.name.partition(".tar")[0] + "_stats.json")
    if not file.is_file():
        return
    try:
        stated = json.loads(file.read_bytes())["successes"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        yield Dropped("bad_statistics", f"{file.name}: states no successes ({type(error).__name__}: {error})")
        return
    if stated != num_images:
        yield Dropped("other_sample_count", f"{path.name}: {num_images} images, but {file.name} states {stated!r:.20}")


def parse_sample(sample: Sample, options: WebdatasetOptions) -> Record | Dropped:
    """One sample to a pair, without a prompt, or why not."""
    try:
        metadata = metadata_of(sample)
        image = image_of(sample)
        if options.verify_hash:
            _check_hash(image, metadata)
        caption = _caption(sample, metadata, options.caption_field)
        return pair_record(options.source, image, caption, meta_of(sample, metadata), sample.name)
    except RecordError as error:
        return Dropped(error.reason, f"{sample.name}: {error}")


def image_of(sample: Sample) -> bytes:
    """Bytes of the image of a sample.

    Raises:
        RecordError: `no_image` or `several_images`.
    """
    images = [(extension, data) for extension, data in sample.members if _is_image(extension)]
    if len(images) != 1:
        reason = "several_images" if images else "no_image"
        raise RecordError(reason, f"members {', '.join(extension for extension, _ in sample.members)}")
    return images[0][1]


def metadata_of(sample: Sample) -> Mapping[str, Any]:
    """Fields of the json of a sample; none if it has no json.

    Raises:
        RecordError: `not_json`, `not_an_object`, `several_members`, or `download_failed` where it says so.
    """
    data = _only(sample, "json")
    if data is None:
        return {}
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RecordError("not_json", str(error)) from error
    if not isinstance(fields, dict):
        raise RecordError("not_an_object", f"the json is a {type(fields).__name__}")
    if fields.get("status", "success") != "success":
        raise RecordError("download_failed", f"status {fields['status']!r:.40}: {fields.get('error_message')!r:.80}")
    return fields


def meta_of(sample: Sample, metadata: Mapping[str, Any]) -> dict[str, str | int | float]:
    """What a record keeps: its name, the image's URL and its class (`cls`).

    Raises:
        RecordError: `invalid_text` or `several_members`.
    """
    meta: dict[str, str | int | float] = {"id": sample.name}
    if isinstance(metadata.get("url"), str):
        meta["url"] = metadata["url"]
    label = _text(sample, "cls")
    if label:
        meta["cls"] = int(label) if label.isascii() and label.isdigit() and len(label) < 10 else label
    return meta


def _caption(sample: Sample, metadata: Mapping[str, Any], field: str) -> object:
    caption = metadata.get(field) if field else _text(sample, "txt")
    if caption is None:
        raise RecordError("no_caption", f"the json has no {field}" if field else "no txt")
    return caption


def _text(sample: Sample, extension: str) -> str | None:
    data = _only(sample, extension)
    try:
        return None if data is None else data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise RecordError("invalid_text", f"{extension}: {error}") from error


def _only(sample: Sample, extension: str) -> bytes | None:
    found = [data for other, data in sample.members if other == extension]
    if len(found) > 1:
        raise RecordError("several_members", f"{len(found)} of {extension}, whose names differ in case")
    return found[0] if found else None


def _check_hash(image: bytes, metadata: Mapping[str, Any]) -> None:
    for name in HASHES:
        stated = metadata.get(name)
        if isinstance(stated, str) and hashlib.new(name, image, usedforsecurity=False).hexdigest() != stated.lower():
            raise RecordError("hash_mismatch", f"{name} of the stored bytes is not {stated!r:.140}")
