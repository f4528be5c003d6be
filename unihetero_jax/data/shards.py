"""Record files, opened when the first record of each is read: compared with their digests, staged if in a bucket.

ArrayRecord reads local files only. A file of a bucket is copied whole into a local folder of bounded size, where what
was used least recently makes room. The folder is this process's own and goes with it.
"""

import atexit
import collections
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain

from unihetero_jax.storage import Retries, StorageError, digest_of, download, is_local, to_path

MAX_OPEN = 512
"""Files that are open at one time (our choice: half of the usual limit of a process)."""
_STAGING_THREADS = 4
_PREFIX = "unihetero-shards-"


class ShardError(ValueError):
    """A shard file as a whole is not what its manifest says, or cannot be had: no fault of a record; the run stops."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """A record file as its manifest describes it.

    Attributes:
        field: how the user named its source, for messages.
        path: local, or in a bucket.
        num_bytes: its size.
        digest: of its content.
    """

    field: str
    path: str
    num_bytes: int
    digest: str


class ShardReaders:
    """The record files that are open now, and the local copies of those in a bucket. Safe to share between threads.

    Attributes:
        retries: reads of buckets that had to be repeated, by `Shard.field`.
    """

    def __init__(self, folder: str, max_bytes: int):
        """The copies are in a new folder inside `folder` and take at most `max_bytes`."""
        self.retries = Retries()
        self._parent, self._max_bytes = Path(folder), max_bytes
        self._room = threading.Condition()  # guards everything below
        self._folder: Path | None = None
        self._busy: dict[str, threading.Lock] = {}
        self._verified: set[str] = set()
        self._readers: collections.OrderedDict[str, Any] = collections.OrderedDict()
        self._staged: collections.OrderedDict[str, int] = collections.OrderedDict()
        self._pinned: collections.Counter[str] = collections.Counter()
        self._ahead: dict[str, tuple[concurrent.futures.Future[None], int]] = {}
        self._staging = concurrent.futures.ThreadPoolExecutor(_STAGING_THREADS, thread_name_prefix="stage")

    def open(self, shard: Shard, verify: bool) -> Any:
        """A file's reader, which gives a record's bytes by `[number]`; it may be used while the file is closed here.

        Args:
            shard: the file.
            verify: compare a local file with its digest when it is opened first; a copy always is.

        Raises:
            ShardError: the file is missing, cannot be had, or has another content.
        """
        with self._room:
            reader = self._readers.get(shard.path)
            if reader is not None and (not verify or not is_local(shard.path) or shard.path in self._verified):
                self._readers.move_to_end(shard.path)
                if shard.path in self._staged:
                    self._staged.move_to_end(shard.path)
                return reader
        with self._local_file(shard, verify) as path:
            reader = _open(shard, path)
            with self._room:
                reader = self._readers.setdefault(shard.path, reader)
                if len(self._readers) > MAX_OPEN:
                    self._readers.popitem(last=False)  # it closes when no thread reads from it any more
        return reader

    def prefetch(self, shard: Shard) -> None:
        """Begins to copy a file of a bucket that will be read soon, if there is room for it beside the others ahead.

        If that fails, `open` says so.
        """
        with self._room:
            if is_local(shard.path) or shard.path in self._staged or shard.path in self._ahead:
                return
            if sum(num_bytes for _, num_bytes in self._ahead.values()) + shard.num_bytes <= self._max_bytes // 2:
                self._ahead[shard.path] = (self._staging.submit(self._prefetch, shard), shard.num_bytes)

    def close(self, shard: Shard) -> None:
        """Closes a file, and does not copy it any more; a copy stays until its room is needed."""
        with self._room:
            self._readers.pop(shard.path, None)
            future, _ = self._ahead.get(shard.path, (None, 0))
            if future is not None and future.cancel():
                del self._ahead[shard.path]

    def stage_for_good(self, path: str, field: str) -> Path:
        """A local file, or a copy apart from the bounded ones of a file that is needed all the time, such as an index.

        Raises:
            FileNotFoundError: there is no such file.
            StorageError: it cannot be read.
        """
        if is_local(path):
            return Path(path)
        target = self._copy_of(path)
        with self._lock_of(path):
            if not target.exists():
                download(to_path(path), target, count=lambda: self.retries.add(field))
        return target

    @contextlib.contextmanager
    def _local_file(self, shard: Shard, verify: bool) -> Iterator[Path]:
        """The file, or a copy of it that stays in place meanwhile."""
        if is_local(shard.path):
            with self._lock_of(shard.path):
                if verify and shard.path not in self._verified:
                    _verify(shard)
                    self._verified.add(shard.path)
            yield Path(shard.path)
            return
        with self._room:
            self._pinned[shard.path] += 1
        try:
            yield self._stage(shard)
        finally:
            with self._room:
                self._pinned[shard.path] -= 1
                self._room.notify_all()

    def _stage(self, shard: Shard) -> Path:
        target = self._copy_of(shard.path)
        with self._lock_of(shard.path):
            with self._room:
                if shard.path in self._staged and target.exists():  # who cleans temporary folders may have taken it
                    self._staged.move_to_end(shard.path)
                    return target
                self._staged.pop(shard.path, None)
                self._make_room(shard)
            try:
                download(to_path(shard.path), target, shard.digest, lambda: self.retries.add(shard.field))
            except BaseException as error:
                with self._room:
                    del self._staged[shard.path]
                    self._room.notify_all()
                if isinstance(error, OSError | StorageError):
                    raise ShardError(f"{shard.field}: {error}") from error
                raise
        return target

    def _prefetch(self, shard: Shard) -> None:
        try:
            with contextlib.suppress(ShardError), self._local_file(shard, verify=True):
                pass
        finally:
            with self._room:
                self._ahead.pop(shard.path, None)

    def _make_room(self, shard: Shard) -> None:
        """Takes a place among the copies; those used least recently go, and it waits for those being opened."""
        if shard.num_bytes > self._max_bytes:
            raise ShardError(
                f"{shard.field}: {shard.path} has {shard.num_bytes} bytes, more than the {self._max_bytes} of "
                "data.cache_gib; raise it, or prepare the folder with more shards (--num-shards)"
            )
        while sum(self._staged.values()) + shard.num_bytes > self._max_bytes:
            oldest = next((path for path in self._staged if not self._pinned[path]), None)
            if oldest is None:
                self._room.wait()
            else:
                del self._staged[oldest]
                self._readers.pop(oldest, None)
                self._copy_of(oldest).unlink(missing_ok=True)
        self._staged[shard.path] = shard.num_bytes

    def _lock_of(self, path: str) -> threading.Lock:
        with self._room:
            return self._busy.setdefault(path, threading.Lock())

    def _copy_of(self, path: str) -> Path:
        with self._room:
            if self._folder is None:
                self._folder = _make_folder(self._parent)
        return self._folder / hashlib.blake2b(path.encode(), digest_size=16).hexdigest()


@functools.cache
def shared_readers(folder: str, max_bytes: int) -> ShardReaders:
    """The readers of this process for a folder of copies (empty: the system's temporary one) and their bound."""
    return ShardReaders(folder or tempfile.gettempdir(), max_bytes)


def _open(shard: Shard, path: Path) -> Any:
    try:
        reader = grain.sources.ArrayRecordDataSource([os.fspath(path)])
    except (RuntimeError, OSError, ValueError) as error:
        raise ShardError(
            f"{shard.field}: {shard.path} is not a readable ArrayRecord file ({error}); copy or prepare it again"
        ) from error
    # It opens the file at its first record only, when a copy may have had to make room already.
    with contextlib.suppress(RuntimeError, OSError, ValueError, IndexError):
        _ = reader[0]
    return reader


def _verify(shard: Shard) -> None:
    try:
        found = digest_of(Path(shard.path))
    except OSError as error:
        raise ShardError(f"{shard.field}: {shard.path} cannot be read ({error}); copy or prepare it again") from error
    if found != shard.digest:
        raise ShardError(
            f"{shard.field}: the content of {shard.path} is not the one that manifest.json describes (digest "
            f"{found[:16]}..., expected {shard.digest[:16]}...); copy or prepare it again"
        )


def _make_folder(parent: Path) -> Path:
    """A folder that is removed when this process ends; those of processes that were killed are removed now.

    A live process holds a lock on its folder, which also tells processes of other containers of this machine.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), open(left / "lock") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
    hidden = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=parent))
    lock = open(hidden / "lock", "w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    folder = hidden.rename(parent / hidden.name[1:])  # only a folder that is locked already can be found
    atexit.register(_remove_folder, folder, lock)
    return folder


def _remove_folder(folder: Path, lock: Any) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.close()
