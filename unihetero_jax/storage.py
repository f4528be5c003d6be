"""Files that may be in a bucket: whole, listed as they are now, and tried again a bounded and counted number of times.

A path with `://` is in a bucket and goes through `etils.epath` and fsspec; any other is in a file system. fsspec's
stores and TensorStore repeat a failed request by themselves (gcsfs tries six times); what still fails comes back here.
"""

import collections
import contextlib
import errno
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
"""How often a bucket is asked for the same thing (our choice)."""
MAX_WAIT_S = 20
"""Longest time that the waits between the attempts take together: 1, 2, 4 and 8 s, and up to 1 s more each."""
DEFINITE = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError, NotImplementedError)
"""Answers of a store, not failures to answer: asking again gives the same."""
_LOCAL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_CHUNK_BYTES = 1 << 20
_PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}
_wait = tenacity.wait_exponential_jitter(initial=1, max=8, jitter=1)

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


def to_local(path: str, field: str) -> Path:
    """The path of something that must be in a file system. Raises StorageError, naming `field`, if it is not."""
    if not is_local(path):
        raise StorageError(f"{field}: {path} must be a local path")
    return Path(path)


def attempt(what: str, action: Callable[[], Result], count: Callable[[], None] = lambda: None) -> Result:
    """Does something with a bucket, up to `ATTEMPTS` times.

    Args:
        what: for the message, such as "reading gs://bucket/file".
        action: may be repeated: it leaves nothing half done.
        count: called before each repetition.

    Raises:
        StorageError: the last attempt failed, too.
        OSError: a definite answer (`DEFINITE`), or the local disk is full, at once.
    """
    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        wait=_wait,
        retry=tenacity.retry_if_exception(_may_pass),
        before_sleep=lambda _: count(),
        reraise=True,
    )
    try:
        return retrying(action)
    except Exception as error:
        if not _may_pass(error):
            raise
        raise StorageError(
            f"{what} failed {ATTEMPTS} times, at last with {type(error).__name__}: {error}; when the store answers "
            "again, run the same command to go on"
        ) from error


def _may_pass(error: BaseException) -> bool:
    """Whether another attempt may end otherwise. The stores' clients share no base class of their errors."""
    is_of_disk = isinstance(error, OSError) and error.errno in _LOCAL_DISK
    return isinstance(error, Exception) and not isinstance(error, DEFINITE) and not is_of_disk


def _done(
    path: epath.Path, what: str, action: Callable[[], Result], count: Callable[[], None] = lambda: None
) -> Result:
    """At once in a file system, by `attempt` in a bucket."""
    return action() if is_local(path) else attempt(f"{what} {path}", action, count)


def read_bytes(path: epath.Path, count: Callable[[], None] = lambda: None) -> bytes:
    """The content of a file. Raises FileNotFoundError; or StorageError, as all below (see `attempt`)."""
    return _done(path, "reading", path.read_bytes, count)


def write_bytes(path: epath.Path, data: bytes) -> None:
    """Writes a file; in a bucket at once. Its folder must exist."""
    _done(path, "writing", lambda: path.write_bytes(data))


def size_of(path: epath.Path, count: Callable[[], None] = lambda: None) -> int | None:
    """The size of a file in bytes, or None where there is none."""
    try:
        return _done(path, "asking for", path.stat, count).length
    except (FileNotFoundError, NotADirectoryError):
        return None


def file_exists(path: epath.Path) -> bool:
    """Whether there is a file. A failure to answer is none, neither yes nor no."""
    return size_of(path) is not None


def is_folder(path: epath.Path) -> bool:
    """Whether the path is a folder, as `file_exists`."""
    try:
        return _done(path, "asking for", path.stat).is_directory
    except (FileNotFoundError, NotADirectoryError):
        return False


def list_folder(path: epath.Path) -> list[epath.Path]:
    """What is in a folder, sorted; nothing if there is none: an empty folder of a bucket does not exist."""
    try:
        return _done(path, "listing", lambda: sorted(path.iterdir()))
    except FileNotFoundError:
        return []


def make_folder(path: epath.Path) -> None:
    """Makes a folder and its parents, where folders are made."""
    _done(path, "making", lambda: path.mkdir(parents=True, exist_ok=True))


def remove(path: epath.Path) -> None:
    """Removes a file, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        _done(path, "removing", path.unlink)


def remove_tree(path: epath.Path) -> None:
    """Removes a folder and what is in it, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        _done(path, "removing", path.rmtree)


def upload(local: Path, target: epath.Path) -> None:
    """Copies a local file to a bucket: as a whole, or an earlier one stays."""
    store, name = fsspec.core.url_to_fs(os.fspath(target))
    attempt(f"writing {target}", lambda: store.put_file(os.fspath(local), name))


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
