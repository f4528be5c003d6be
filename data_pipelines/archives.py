"""Files in tar and zip archives, read in order; nothing is unpacked to disk.

Archives come from others. A member whose name leads outside, that is no plain file or is too large is refused alone,
with a reason. An archive that has too many entries, unpacks to far more than its size or is damaged is refused as a
whole where that shows, after what came before it.

Tars are read here and not by `tarfile`, which takes a damaged header, or the place where a file was cut short, for the
end of the archive, and reads headers of any stated length into memory.
"""

import bz2
import dataclasses
import gzip
import lzma
import re
import stat
import struct
import typing
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import BinaryIO, Literal

from data_pipelines.entries import Dropped

ArchiveKind = Literal["tar", "tar.gz", "tar.bz2", "tar.xz", "zip", ""]

BLOCK = 512
"""Headers of a tar have this size, contents are padded to a multiple of it."""
MAX_HEADER_BYTES = 1 << 20
"""Of an extended header of a tar, which holds a long name (our choice: file systems allow 4 KiB)."""
DAMAGED_ZIP = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error,
    OSError, EOFError, RuntimeError, NotImplementedError, ValueError, OverflowError,
)  # fmt: skip
"""What `zipfile` and the decoders behind it raise for damaged, encrypted or unknown content."""

_DAMAGED_STREAM = (OSError, EOFError, zlib.error, lzma.LZMAError, MemoryError)
"""What reading a file and its unpacking raise; `MemoryError` where the header of an .xz asks for gigabytes at once."""
_MAGIC: Mapping[bytes, ArchiveKind] = {
    b"\x1f\x8b": "tar.gz", b"BZh": "tar.bz2", b"\xfd7zXZ\0": "tar.xz", b"PK\3\4": "zip", b"PK\5\6": "zip",
}  # fmt: skip
_SKIP_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class ArchiveLimits:
    """Bounds on one archive (our choice).

    Attributes:
        max_member_bytes: a larger member is refused alone. An uncompressed image of the largest accepted size fits.
        max_entries: more are refused with the archive. All of ImageNet-1k in one file has 1.4 million.
        max_ratio: unpacked bytes for each packed one. JPEG has 1, text 5; gzip can reach 1,000, and a bomb does.
        free_bytes: may be unpacked whatever the ratio is: so few do no harm.
    """

    max_member_bytes: int = 256 * 2**20
    max_entries: int = 2_000_000
    max_ratio: int = 100
    free_bytes: int = 64 * 2**20


LIMITS = ArchiveLimits()


@dataclasses.dataclass(frozen=True)
class Member:
    """A file in an archive: its name without `./`, its content, and its place for messages."""

    name: str
    data: bytes
    where: str


@dataclasses.dataclass(frozen=True, slots=True)
class TarEntry:
    """Where a member of a tar lies.

    Attributes:
        name: without `./`.
        offset: of its content in the unpacked tar, in bytes.
        size: of its content, in bytes.
        refusal: why it must not be read; empty: it may.
    """

    name: str
    offset: int
    size: int
    refusal: str = ""


def is_safe_name(name: str) -> bool:
    """Whether a name stays inside the folder or archive that it is looked up in."""
    path = PurePosixPath(name)
    return not (path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name)


def archive_kind(path: Path) -> ArchiveKind:
    """What a file is, by its content. What is compressed is taken for a tar; empty: none of these.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(BLOCK)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if len(head) == BLOCK and (not any(head) or _has_checksum(head)):
        return "tar"
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return kind
    return "zip" if zipfile.is_zipfile(path) else ""  # a zip may have a program before it


def read_members(path: Path, limits: ArchiveLimits = LIMITS) -> Iterator[Member | Dropped]:
    """Files of a tar (plain, .gz, .bz2, .xz) or zip, in their order; directories are passed over.

    Of several members with one name the first is read. Dropped: `unsafe_path`, `invalid_name`, `link_member`,
    `special_member` (a device or FIFO), `sparse_member`, `unknown_member_kind`, `member_too_large`, `duplicate_member`,
    and of zips `encrypted_member` and `damaged_member`.

    Raises:
        ValueError: the file is no such archive, goes beyond a limit, or is damaged or cut short further on.
    """
    kind = archive_kind(path)
    if kind == "zip":
        yield from _read_zip(path, limits)
    elif kind:
        yield from _read_tar(path, kind, limits)
    else:
        raise ValueError(f"{path}: neither a tar (plain, .gz, .bz2 or .xz) nor a zip file; fetch or pack it again")


def tar_index(path: Path, limits: ArchiveLimits = LIMITS) -> dict[str, TarEntry]:
    """Members of a plain tar by name, so that they can be read in any order. A name that several have is refused.

    Raises:
        ValueError: as `read_members`.
    """
    with _Unpacked(path, "tar", limits) as stream:
        return {entry.name: entry for entry in _tar_entries(stream)}


def _refusal(name: str, size: int, names: set[str], limits: ArchiveLimits) -> str:
    """Why a plain file must not be read, after its name, which is then taken, and its size."""
    if not is_safe_name(name):
        return "unsafe_path"
    if not PurePosixPath(name).parts:
        return "invalid_name"
    if size > limits.max_member_bytes:
        return "member_too_large"
    if _normal(name) in names:
        return "duplicate_member"
    names.add(_normal(name))
    return ""


def _normal(name: str) -> str:
    return str(PurePosixPath(name))


def _where(path: Path, name: str) -> str:
    return f"{path.name}, member {name!r:.300}"  # repr: names may hold line ends and what no terminal shows


def _dropped(reason: str, where: str, size: int, limits: ArchiveLimits) -> Dropped:
    detail = f": {size} bytes, limit {limits.max_member_bytes}" if reason == "member_too_large" else ""
    return Dropped(reason, where + detail)


def _check_entries(path: Path, count: int, limits: ArchiveLimits) -> None:
    if count > limits.max_entries:
        raise ValueError(f"{path}: more than {limits.max_entries} entries; pack it as several archives")


# ---------------------------------------------------------------- tar


def _read_tar(path: Path, kind: ArchiveKind, limits: ArchiveLimits) -> Iterator[Member | Dropped]:
    with _Unpacked(path, kind, limits) as stream:
        for entry in _tar_entries(stream):
            where = _where(path, entry.name)
            if entry.refusal:
                yield _dropped(entry.refusal, where, entry.size, limits)
            else:
                yield Member(entry.name, stream.read(entry.size, f"member {entry.name!r:.300}"), where)


class _Unpacked:
    """The unpacked bytes of a tar, read in order and no further than the limits allow."""

    def __init__(self, path: Path, kind: ArchiveKind, limits: ArchiveLimits):
        self.path, self.limits, self.position = path, limits, 0
        self._packed = path.open("rb")
        self._plain_size = path.stat().st_size if kind == "tar" else None
        self._file = _unpacking(self._packed, kind)

    def __enter__(self) -> "_Unpacked":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._packed.close()

    def read(self, count: int, what: str) -> bytes:
        """Exactly `count` bytes of `what`."""
        data = self.read_some(count, what)
        if len(data) < count:
            raise self.fault(f"ends within {what}")
        return data

    def read_some(self, count: int, what: str) -> bytes:
        """As many bytes as there are, up to `count`."""
        try:
            data = self._file.read(count)
        except _DAMAGED_STREAM as error:
            raise self.fault(f"is damaged within {what} ({str(error) or type(error).__name__})") from error
        self.position += len(data)
        if self._plain_size is None:
            self._check_ratio(self._packed.tell())
        return data

    def _check_ratio(self, packed: int) -> None:
        if self.position > max(self.limits.free_bytes, self.limits.max_ratio * packed):
            raise ValueError(
                f"{self.path}: the first {packed} bytes unpack to {self.position}, more than {self.limits.max_ratio} "
                "times as many, as a bomb does; if you trust it, unpack it to a plain tar first"
            )

    def skip(self, count: int, what: str) -> None:
        """Goes over `count` bytes of `what`."""
        if self._plain_size is None:
            while count:
                count -= len(self.read(min(count, _SKIP_BYTES), what))
        elif self.position + count > self._plain_size:
            raise self.fault(f"ends within {what}")
        else:
            self.position = self._file.seek(self.position + count)

    def fault(self, what: str) -> ValueError:
        """The error to raise for damage at this place."""
        return ValueError(f"{self.path}: {what}, at byte {self.position}; fetch the file again, or leave it out")


def _unpacking(packed: BinaryIO, kind: ArchiveKind) -> BinaryIO:
    match kind:
        case "tar.gz":
            return typing.cast(BinaryIO, gzip.GzipFile(fileobj=packed, mode="rb"))
        case "tar.bz2":
            return typing.cast(BinaryIO, bz2.BZ2File(packed))
        case "tar.xz":
            return typing.cast(BinaryIO, lzma.LZMAFile(packed))
    return packed


def _tar_entries(stream: _Unpacked) -> Iterator[TarEntry]:
    """Members in order; between two, the caller may read the content of the first."""
    names: set[str] = set()
    global_fields: dict[str, str] = {}
    count = 0
    while header := _next_header(stream, global_fields):
        count += 1
        _check_entries(stream.path, count, stream.limits)
        end = stream.position + header.size + -header.size % BLOCK
        if not header.is_directory:
            refusal = header.refusal or _refusal(header.name, header.size, names, stream.limits)
            yield TarEntry(_normal(header.name), stream.position, header.size, refusal)
        stream.skip(end - stream.position, f"member {header.name!r:.300}")
    while rest := stream.read_some(_SKIP_BYTES, "what follows its end mark"):
        if rest.count(0) < len(rest):
            raise ValueError(
                f"{stream.path}: goes on after its end mark, before byte {stream.position}, as tars do that were "
                "joined by `cat`; give them one by one"
            )


_PLAIN, _DIRECTORY = (b"0", b"\0", b"7"), b"5"
_REFUSED = {
    b"1": "link_member", b"2": "link_member",
    b"3": "special_member", b"4": "special_member", b"6": "special_member", b"S": "sparse_member",
}  # fmt: skip
_WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"6")
"""Kinds, like directories, whose header no content follows, whatever size it states."""
_EXTENDED = (b"x", b"g", b"L", b"K")
"""Headers about the headers that follow: pax, of one member and of all, and GNU's long names of members and links."""


@dataclasses.dataclass(frozen=True)
class _Header:
    """A member's header, with what extended headers before it say."""

    name: str
    size: int
    is_directory: bool
    refusal: str


def _next_header(stream: _Unpacked, global_fields: dict[str, str]) -> _Header | None:
    """The next member's header; None at the end mark. Updates `global_fields` with what is said of all members."""
    fields: dict[str, str] = {}
    while True:
        block = stream.read_some(BLOCK, "a header")
        if len(block) < BLOCK:
            raise stream.fault("ends before its end mark")  # its writing was stopped, or it was cut short later
        if not any(block):
            return None
        if not _has_checksum(block):
            raise stream.fault("has a damaged header")
        kind, size = block[156:157], _number(block[124:136])
        if size is None:
            raise stream.fault(f"has a header with an impossible size ({block[124:136]!r})")
        if kind not in _EXTENDED:
            return _member_header(stream, block, size, global_fields | fields)
        content = _extended_content(stream, size)
        if kind == b"L":
            fields["path"] = _decoded(content.partition(b"\0")[0])
        elif kind != b"K":
            (fields if kind == b"x" else global_fields).update(_pax_fields(stream, content))


def _extended_content(stream: _Unpacked, size: int) -> bytes:
    if size > MAX_HEADER_BYTES:
        raise stream.fault(f"has an extended header of {size} bytes, limit {MAX_HEADER_BYTES}")
    content = stream.read(size, "an extended header")
    stream.skip(-size % BLOCK, "an extended header")
    return content


def _pax_fields(stream: _Unpacked, content: bytes) -> dict[str, str]:
    """Those of the records `length key=value` that matter here: path, size, and whether the member has holes."""
    fields: dict[str, str] = {}
    start = 0
    while start < len(content):
        space = content.find(b" ", start, start + 8)
        length = content[start : max(space, start)]
        end = start + int(length) if length.isdigit() else 0
        key, equals, value = content[space + 1 : end - 1].partition(b"=")
        if not start < space < end <= len(content) or content[end - 1] != ord("\n") or not equals:
            raise stream.fault("has a damaged extended header")
        if key in (b"path", b"size"):
            fields[key.decode()] = _decoded(value)
        elif key.startswith(b"GNU.sparse."):
            fields["sparse"] = "yes"
        start = end
    return fields


def _member_header(stream: _Unpacked, block: bytes, size: int, fields: Mapping[str, str]) -> _Header:
    kind, name = block[156:157], fields.get("path", _decoded(_short_name(block)))
    if "size" in fields:
        if not re.fullmatch(r"[0-9]{1,19}", fields["size"]):
            raise stream.fault(f"has a header with an impossible size ({fields['size']!r:.40})")
        size = int(fields["size"])
    is_directory = kind == _DIRECTORY or (kind == b"\0" and name.endswith("/"))  # the latter before 1988
    if is_directory or kind in _WITHOUT_CONTENT:
        size = 0
    refusal = "" if kind in _PLAIN or is_directory else _REFUSED.get(kind, "unknown_member_kind")
    if "sparse" in fields:
        refusal = "sparse_member"
    if not refusal and not name.isascii() and re.search("[\udc80-\udcff]", name):
        refusal = "invalid_name"
    return _Header(name, size, is_directory, refusal)


def _short_name(block: bytes) -> bytes:
    name, prefix = block[:100].partition(b"\0")[0], block[345:500].partition(b"\0")[0]
    is_posix = block[257:263] == b"ustar\0"  # GNU's own form keeps other things there
    return prefix + b"/" + name if is_posix and prefix else name


def _decoded(name: bytes) -> str:
    """What is no UTF-8 becomes lone surrogates, by which it is recognised later."""
    return name.decode("utf-8", "surrogateescape")


def _number(field: bytes) -> int | None:
    """A number of a header: octal, or binary after a byte 0x80 (0xff: negative, which nothing here may be)."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip()
    return int(digits or b"0", 8) if re.fullmatch(rb"[0-7]*", digits) else None


def _has_checksum(block: bytes) -> bool:
    stated = _number(block[148:156])
    counted = block[:148] + b" " * 8 + block[156:]
    unsigned = sum(counted)
    return stated in (unsigned, unsigned - 256 * sum(byte > 127 for byte in counted))  # old programs added signed bytes


# ---------------------------------------------------------------- zip


def _read_zip(path: Path, limits: ArchiveLimits) -> Iterator[Member | Dropped]:
    try:
        archive = zipfile.ZipFile(path)
    except DAMAGED_ZIP as error:
        raise ValueError(f"{path}: no readable zip file ({error}); fetch it again") from error
    names: set[str] = set()
    with archive:
        entries = archive.infolist()
        _check_zip(path, entries, limits)
        for entry in entries:
            name = entry.orig_filename  # `filename` ends before a NUL
            if name.endswith("/"):
                continue
            where = _where(path, name)
            if refusal := _zip_refusal(entry) or _refusal(name, entry.file_size, names, limits):
                yield _dropped(refusal, where, entry.file_size, limits)
                continue
            try:
                data = archive.read(entry)  # stops at `file_size`, whatever the compressed stream would still give
            except DAMAGED_ZIP as error:
                yield Dropped("damaged_member", f"{where}: {error}")
            else:
                yield Member(_normal(name), data, where)


def _check_zip(path: Path, entries: Sequence[zipfile.ZipInfo], limits: ArchiveLimits) -> None:
    _check_entries(path, len(entries), limits)
    packed, unpacked = path.stat().st_size, sum(entry.file_size for entry in entries)
    if unpacked > max(limits.free_bytes, limits.max_ratio * packed):
        raise ValueError(
            f"{path}: its {packed} bytes unpack to {unpacked}, more than {limits.max_ratio} times as many, as a bomb "
            "does; if you trust it, unpack it and give the folder"
        )
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        if entry.header_offset < end:
            raise ValueError(f"{path}: members overlap at byte {entry.header_offset}, as in a bomb; pack it again")
        end = entry.header_offset + entry.compress_size


def _zip_refusal(entry: zipfile.ZipInfo) -> str:
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind == stat.S_IFLNK:
        return "link_member"
    if kind not in (0, stat.S_IFREG):  # 0: not stated, as on systems other than Unix
        return "special_member"
    return "encrypted_member" if entry.flag_bits & 1 else ""
