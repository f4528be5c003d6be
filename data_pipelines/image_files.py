"""Image bytes by name, from a folder or an archive, as raw layouts refer to them; and names by URL.

Names come from files that others wrote, so none may lead outside the folder, and no archive member is unpacked that
claims to be larger than any image that we would decode.
"""

import csv
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.archives import DAMAGED_ZIP, LIMITS, TarEntry, archive_kind, is_safe_name, tar_index
from data_pipelines.entries import Dropped
from data_pipelines.text_files import read_json, read_lines
from unihetero_jax.data.records import RecordError

MAX_IMAGE_BYTES = LIMITS.max_member_bytes
"""Larger files are refused unread (our choice: an uncompressed image of the largest accepted size fits)."""
IMAGE_SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm",
})  # fmt: skip
"""Of files that are taken for images, in lower case. Their content decides what they are."""


class ImageFiles:
    """The images of a set. A context manager: an archive stays open in between.

    A tar is walked once for the places of its members. A compressed one is refused: to reach a member, all before it
    would be unpacked again.

    Args:
        root: a folder, or a zip or uncompressed tar file.
        field: how the user named `root`, for messages.

    Raises:
        ValueError: `root` is none of these, or a damaged tar.
    """

    def __init__(self, root: str | Path, field: str = "--images"):
        self.root = Path(root)
        self._archive: zipfile.ZipFile | None = None
        self._tar: BinaryIO | None = None
        self._index: dict[str, TarEntry] = {}
        if self.root.is_dir():
            return
        if not self.root.is_file():
            raise ValueError(f"{field}: {self.root} does not exist; give the folder or zip or tar file with the images")
        kind = archive_kind(self.root)
        if kind.startswith("tar."):
            raise ValueError(
                f"{field}: {self.root} is compressed ({kind}); unpack it to a plain tar (or a folder) first"
            )
        if kind == "tar":
            self._index = tar_index(self.root)
            self._tar = self.root.open("rb")
            return
        try:
            self._archive = zipfile.ZipFile(self.root)
        except DAMAGED_ZIP as error:
            raise ValueError(
                f"{field}: {self.root} is neither a folder nor a readable zip or tar file ({error})"
            ) from error

    def __enter__(self) -> "ImageFiles":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._archive, self._tar):
            if file is not None:
                file.close()

    def read(self, name: str) -> bytes:
        """Bytes of an image.

        Raises:
            RecordError: `unsafe_path`, `missing_image`, `unreadable_image`, `image_file_too_large`,
                `damaged_archive`, or why `archives` refuses a member of a tar.
        """
        if not is_safe_name(name):
            raise RecordError("unsafe_path", f"image {name!r} leads outside {self.root}")
        if self._tar is not None:
            return self._read_entry(self._tar, name)
        return self._read_file(name) if self._archive is None else self._read_member(self._archive, name)

    def _read_file(self, name: str) -> bytes:
        path = self.root / name
        try:
            if not path.is_file():
                raise RecordError("missing_image", f"{path} does not exist")
            if not path.resolve().is_relative_to(self.root.resolve()):
                raise RecordError("unsafe_path", f"image {name!r} is a link that leads outside {self.root}")
            _check_size(name, path.stat().st_size)
            return path.read_bytes()
        except OSError as error:  # no permission, a name longer than the file system allows, a failing disk
            raise RecordError("unreadable_image", f"{path}: {error.strerror or error}") from error

    def _read_member(self, archive: zipfile.ZipFile, name: str) -> bytes:
        try:
            member = archive.getinfo(name)
        except KeyError:
            raise RecordError("missing_image", f"{self.root} has no member {name}") from None
        _check_size(name, member.file_size)
        try:
            return archive.read(member)  # stops at file_size, whatever the compressed stream would still give
        except DAMAGED_ZIP as error:
            raise RecordError("damaged_archive", f"{self.root}, member {name}: {error}") from error

    def _read_entry(self, tar: BinaryIO, name: str) -> bytes:
        entry = self._index.get(str(PurePosixPath(name)))
        if entry is None:
            raise RecordError("missing_image", f"{self.root} has no member {name}")
        if entry.refusal:
            raise RecordError(entry.refusal, f"{self.root}, member {name}")
        try:
            tar.seek(entry.offset)
            data = tar.read(entry.size)
        except OSError as error:
            raise RecordError("damaged_archive", f"{self.root}, member {name}: {error}") from error
        if len(data) < entry.size:
            raise RecordError("damaged_archive", f"{self.root}, member {name}: the file was shortened meanwhile")
        return data


def _check_size(name: str, size: int) -> None:
    if size > MAX_IMAGE_BYTES:
        raise RecordError("image_file_too_large", f"{name} has {size} bytes, limit {MAX_IMAGE_BYTES}")


def read_image_map(path: Path) -> dict[str, str]:
    """The name of each URL's image in the folder or archive of images. Held in memory: some 200 bytes for each.

    A file is, after its suffix:
    - .json: an object of URLs and names;
    - .parquet: columns `url` and `file`; or `url` and `key`, as img2dataset writes it beside its folder `00000/` with
      output format files, so that the name is `00000/KEY.jpg` (rows whose `status` is not `success` have no image);
    - .csv: a URL and a name on each line, which may be quoted;
    - anything else: a URL, a tab and a name on each line.
    A first line that begins with `url` is a header. A folder stands for the parquet files in it, sorted. Of several
    names for one URL the last counts.

    Raises:
        ValueError: the file cannot be read, or something in it is no URL with a name.
    """
    if path.is_dir():
        files = sorted(path.glob("*.parquet"))
        if not files:
            raise ValueError(f"{path}: an image map is a file, or a folder with the parquet files of img2dataset")
        return {url: name for file in files for url, name in _parquet_names(file)}
    if not path.is_file():
        raise ValueError(f"{path}: no readable image map: it does not exist")
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in (".gz", ".zst")]
    match suffixes[-1] if suffixes else "":
        case ".json":
            return _json_names(path)
        case ".parquet":
            return dict(_parquet_names(path))
        case suffix:
            return dict(_line_names(path, is_csv=suffix == ".csv"))


def _json_names(path: Path) -> dict[str, str]:
    names = read_json(path, "image map")
    if not isinstance(names, dict) or not all(isinstance(name, str) and name for name in names.values()):
        raise ValueError(f"{path}: an image map is a JSON object of URLs and the names of their images")
    return names


def _line_names(path: Path, is_csv: bool) -> Iterator[tuple[str, str]]:
    separator = "comma" if is_csv else "tab"
    for number, (_, line) in enumerate(read_lines(path), start=1):
        fields = [] if isinstance(line, Dropped) else _fields(line, is_csv)
        if fields == [""] or (number == 1 and fields and fields[0].lower() == "url"):
            continue
        if len(fields) != 2 or not all(fields):
            raise ValueError(f"{path}: line {number} must be a URL, a {separator} and a file name: {line!r:.80}")
        yield fields[0], fields[1]


def _fields(line: bytes, is_csv: bool) -> list[str]:
    try:
        text = line.decode("utf-8-sig")
        return next(csv.reader([text]), [""]) if is_csv else text.split("\t")
    except (UnicodeDecodeError, csv.Error):
        return []


def _parquet_names(path: Path) -> Iterator[tuple[str, str]]:
    try:
        with pq.ParquetFile(path) as file:
            present = file.schema_arrow.names
            column = "file" if "file" in present else "key"
            if not {"url", column} <= set(present):
                raise ValueError(f"an image map has the columns url and file (or key), this has {', '.join(present)}")
            columns = ["url", column] + (["status"] if column == "key" and "status" in present else [])
            for batch in file.iter_batches(columns=columns):
                yield from (_parquet_name(row, path) for row in batch.to_pylist() if _has_image(row))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ValueError(f"{path}: no readable image map: {' '.join(str(error).split())}") from error


def _has_image(row: dict[str, object]) -> bool:
    return row.get("status", "success") == "success" and row["url"] is not None


def _parquet_name(row: dict[str, object], path: Path) -> tuple[str, str]:
    url, name = row["url"], row.get("file", row.get("key"))
    if not isinstance(url, str) or not isinstance(name, str) or not name:
        raise ValueError(f"the row of url {url!r:.80} names no file: {name!r:.80}")
    return url, name if "file" in row else f"{path.stem}/{name}.jpg"
