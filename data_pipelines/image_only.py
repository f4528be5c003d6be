"""Images without text, from folders or archives, to records of one image."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from data_pipelines.archives import read_members
from data_pipelines.entries import Dropped
from data_pipelines.image_files import IMAGE_SUFFIXES, ImageFiles
from unihetero_jax.data import records
from unihetero_jax.data.records import ImageSegment, Record, RecordError


def read_image_only(paths: Sequence[Path], source: str) -> Iterator[Record | Dropped]:
    """Records of the images in folders and archives, in the order of the paths.

    Of a folder first its files by name, then its folders; links to folders are not followed. Of an archive (tar, plain
    or compressed, or zip) its members in their order. What has no suffix of an image is counted (`other_file`).

    Raises:
        ValueError: a folder cannot be listed; a file is no archive, or is damaged or cut short further on.
    """
    for path in paths:
        yield from _from_folder(path, source) if path.is_dir() else _from_archive(path, source)


def parse_image(data: bytes, source: str, where: str) -> Record | Dropped:
    """One image to a record, or why not."""
    try:
        segment = ImageSegment(data, *records.probe_image(data))
    except RecordError as error:
        return Dropped(error.reason, f"{where}: {error}")
    return Record(source, "image_only", (segment,), {"id": where}, where)


def _from_archive(path: Path, source: str) -> Iterator[Record | Dropped]:
    for member in read_members(path):
        if isinstance(member, Dropped):
            yield member
        elif not _is_image(member.name):
            yield Dropped("other_file", member.where)
        else:
            yield parse_image(member.data, source, f"{path.name}/{member.name}")


def _from_folder(root: Path, source: str) -> Iterator[Record | Dropped]:
    with ImageFiles(root) as files:
        for name, reason in _files_below(root):
            where = f"{root.absolute().name}/{name}"
            if reason:
                yield Dropped(reason, ascii(where))  # a name may hold what cannot be printed
                continue
            try:
                data = files.read(name)
            except RecordError as error:
                yield Dropped(error.reason, f"{where}: {error}")
            else:
                yield parse_image(data, source, where)


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def _files_below(root: Path) -> Iterator[tuple[str, str]]:
    """Names in `root` of what is no folder, and why it is not to be read; empty: it is."""
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(root / folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            raise ValueError(f"{root / folder}: cannot be listed: {error}") from error
        below = []
        for entry in entries:
            name = f"{folder}{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                below.append(f"{name}/")
            elif entry.is_dir():
                yield name, "link_to_folder"
            else:
                yield name, _refusal(entry)
        folders += reversed(below)


def _refusal(entry: os.DirEntry[str]) -> str:
    if not entry.is_file():
        return "missing_image" if entry.is_symlink() else "special_file"
    if any("\udc80" <= letter <= "\udcff" for letter in entry.name):  # how Python shows bytes that are no UTF-8
        return "invalid_name"
    return "" if _is_image(entry.name) else "other_file"
