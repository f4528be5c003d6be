"""Image bytes by name, from a folder or a zip archive, as raw layouts refer to them.

Names come from files that others wrote, so none may lead outside the folder, and no archive member is unpacked that
claims to be larger than any image that we would decode.
"""

import lzma
import struct
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from types import TracebackType

from unihetero_jax.data.records import RecordError

MAX_IMAGE_BYTES = 256 * 2**20
"""Larger files are refused unread (our choice: an uncompressed image of the largest accepted size fits)."""
DAMAGED_ZIP = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error,
    OSError, EOFError, RuntimeError, NotImplementedError, ValueError,
)  # fmt: skip
"""What `zipfile` and the decoders behind it raise for damaged, encrypted or unknown content."""


class ImageFiles:
    """The images of a set. A context manager: an archive stays open in between.

    Args:
        root: a folder, or a zip file.
        field: how the user named `root`, for messages.

    Raises:
        ValueError: `root` is neither.
    """

    def __init__(self, root: str | Path, field: str = "--images"):
        self.root = Path(root)
        self._archive: zipfile.ZipFile | None = None
        if self.root.is_dir():
            return
        if not self.root.is_file():
            raise ValueError(f"{field}: {self.root} does not exist; give the folder or zip file with the images")
        try:
            self._archive = zipfile.ZipFile(self.root)
        except DAMAGED_ZIP as error:
            raise ValueError(f"{field}: {self.root} is neither a folder nor a readable zip file ({error})") from error

    def __enter__(self) -> "ImageFiles":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._archive is not None:
            self._archive.close()

    def read(self, name: str) -> bytes:
        """Bytes of an image.

        Raises:
            RecordError: `unsafe_path`, `missing_image`, `unreadable_image`, `image_file_too_large` or
                `damaged_archive`.
        """
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
            raise RecordError("unsafe_path", f"image {name!r} leads outside {self.root}")
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


def _check_size(name: str, size: int) -> None:
    if size > MAX_IMAGE_BYTES:
        raise RecordError("image_file_too_large", f"{name} has {size} bytes, limit {MAX_IMAGE_BYTES}")
