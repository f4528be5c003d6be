"""Files that may be in a bucket: whole, listed as they are now, and tried again a bounded and counted number of times.

A path with `://` is in a bucket and goes through `etils.epath` and fsspec; any other is in a file system. fsspec's
stores and TensorStore repeat a failed request by themselves (gcsfs six times); what still fails comes back here.
"""

import collections
import contextlib
import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import fsspec
import tenacity
from etils import epath
from fsspec.config import conf as fsspec_settings

ATTEMPTS = 5
"""How often a read or a write of a bucket is tried (our choice; the waits between grow to 8 s, a minute in all)."""
DEFINITE = (FileNotFoundError, PermissionError, ImportError, NotImplementedError)
"""Answers of a store, not failures to answer: asking again gives the same."""
_CHUNK_BYTES = 1 << 20
_PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}
_wait = tenacity.wait_random_exponential(multiplier=0.2, max=8)

# A listing that fsspec remembers hides what TensorStore or another host has written since.
for _protocol in ("gcs", "s3"):
    fsspec_settings.setdefault(_protocol, {})["use_listings_cache"] = False

Result = TypeVar("Result")


class StorageError(ValueError):
    """A bucket gave no answer, or a wrong one, for as often as it was asked."""


class Retries:
    """How often what was asked again, by a name of the caller's. Safe to share between threads."""

    def __init__(self) -> None:
        self._counts: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()

    def add(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1

    def take(self, name: str) -> int:
        """The count since the last call."""
        with self._lock:
            return self._counts.pop(name, 0)


def is_local(path: epath.PathLike) -> bool:
    """Whether the path is in a file system (mounted ones included) and not in a bucket such as gs://."""
    return "://" not in os.fspath(path)


def to_path(path: epath.PathLike) -> epath.Path:
    """The path to work with.

    Raises:
        StorageError: it is in a bucket whose package is not installed, or of a kind that is not known.
    """
    text = os.fspath(path)
    scheme = text.partition("://")[0]
    if is_local(text):
        return epath.Path(text)
    if scheme not in _PACKAGES:
        known = ", ".join(f"{name}://" for name in _PACKAGES)
        raise StorageError(f"{text}: {scheme}:// is no store that can be used; there are {known} and local paths")
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        raise StorageError(f"{text}: {error}; pip install {_PACKAGES[scheme]}") from error
    return epath.Path(text)


def attempt(what: str, action: Callable[[], Result], count: Callable[[], None] = lambda: None) -> Result:
    """Does something with a bucket, up to `ATTEMPTS` times.

    Args:
        what: for the message, such as "reading gs://bucket/file".
        action: may be repeated: it leaves nothing half done.
        count: called before each repetition.

    Raises:
        StorageError: the last attempt failed, too.
        OSError: a definite answer (`DEFINITE`), at once.
    """
    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        wait=_wait,
        # The stores' clients share no base class of their errors.
        retry=tenacity.retry_if_not_exception_type((*DEFINITE, AssertionError)),
        before_sleep=lambda _: count(),
        reraise=True,
    )
    try:
        return retrying(action)
    except DEFINITE:
        raise
    except Exception as error:
        raise StorageError(
            f"{what} failed {ATTEMPTS} times, at last with {type(error).__name__}: {error}; when the store answers "
            "again, run the same command to go on"
        ) from error


def read_bytes(path: epath.Path, count: Callable[[], None] = lambda: None) -> bytes:
    """The content of a file. Raises FileNotFoundError, or StorageError (see `attempt`)."""
    if is_local(path):
        return path.read_bytes()
    return attempt(f"reading {path}", path.read_bytes, count)


def write_bytes(path: epath.Path, data: bytes) -> None:
    """Writes a file; in a bucket at once. Its folder must exist. Raises StorageError (see `attempt`)."""
    if is_local(path):
        path.write_bytes(data)
    else:
        attempt(f"writing {path}", lambda: path.write_bytes(data))


def size_of(path: epath.Path, count: Callable[[], None] = lambda: None) -> int | None:
    """The size of a file in bytes, or None where there is none."""
    try:
        return path.stat().length if is_local(path) else attempt(f"asking for {path}", path.stat, count).length
    except (FileNotFoundError, NotADirectoryError):
        return None


def file_exists(path: epath.Path) -> bool:
    """Whether there is a file. Unlike fsspec's own, it never takes a failure to answer for a no."""
    return size_of(path) is not None


def list_folder(path: epath.Path) -> list[epath.Path]:
    """What is in a folder, sorted; nothing if there is none: an empty folder of a bucket does not exist."""
    try:
        return sorted(path.iterdir())
    except FileNotFoundError:
        return []


def upload(local: Path, target: epath.Path) -> None:
    """Copies a local file to a bucket. Raises StorageError (see `attempt`)."""

    def copy() -> None:
        with local.open("rb") as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, _CHUNK_BYTES)

    attempt(f"writing {target}", copy)


def download(source: epath.Path, target: Path, digest: str = "", count: Callable[[], None] = lambda: None) -> None:
    """Copies a file of a bucket to a local one, which exists only when it is whole.

    Args:
        source: the file.
        target: where it goes.
        digest: of its content (`digest_of`); empty: not compared.
        count: called before each repetition.

    Raises:
        FileNotFoundError: there is no such file.
        StorageError: it could not be read, or what was read had another digest each time.
    """
    partial = target.with_name(f"{target.name}.{threading.get_ident()}.tmp")

    def copy() -> None:
        with source.open("rb") as file, partial.open("wb") as sink:
            shutil.copyfileobj(file, sink, _CHUNK_BYTES)
        if digest and (found := digest_of(partial)) != digest:
            raise ValueError(f"its digest is {found[:16]}..., expected {digest[:16]}...")

    try:
        attempt(f"reading {source}", copy, count)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def local_copy(path: epath.PathLike) -> Iterator[Path]:
    """A local file with the content of `path`, for readers that know no buckets; the file itself if it is local."""
    path = to_path(path)
    if is_local(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="unihetero-") as folder:
        copy = Path(folder) / path.name
        download(path, copy)
        yield copy


@contextlib.contextmanager
def local_target(path: epath.PathLike) -> Iterator[Path]:
    """A local file to write that becomes `path` at the end, at once, wherever that is; nothing if writing fails."""
    path = to_path(path)
    if is_local(path):
        partial = Path(path.with_name(f".{os.getpid()}-{path.name}"))
        try:
            yield partial
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return
    with tempfile.TemporaryDirectory(prefix="unihetero-") as folder:
        yield Path(folder) / path.name
        upload(Path(folder) / path.name, path)


def digest_of(path: Path) -> str:
    """blake2b of a local file's content, as `manifest.json` of a prepared folder states it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()
