"""The folder of a run: may we write there, does another run use it, and files that are either old or new, never half.

A second run in the same folder would interleave metrics and overwrite checkpoints, so a run holds `lock.json` with its
host, pid, start time and a heartbeat.
"""

import concurrent.futures
import contextlib
import fcntl
import json
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from etils import epath

from unihetero_jax.storage import (
    StorageError,
    download,
    is_local,
    make_folder,
    read_bytes,
    remove,
    to_path,
    upload,
    write_bytes,
)

LOCK_NAME = "lock.json"
HEARTBEAT_INTERVAL_S = 30.0
STALE_AFTER_S = 120.0
"""A lock whose heartbeat is older than this belongs to a run that is gone (four missed beats)."""

PUBLISH_INTERVAL_S = 30.0
"""Growing files are copied to a bucket at most so often (our choice; each time they are copied whole)."""


class WorkdirError(ValueError):
    """The folder of the run cannot be used; the message says why and what to do."""


def write_atomically(path: epath.PathLike, text: str) -> None:
    """Writes a small text file so that a reader, or a restart after a kill, sees the old content or the new one.

    Locally a temporary file is renamed over the target; in a bucket writing an object is atomic already.
    """
    path = to_path(path)
    if not is_local(path):
        write_bytes(path, text.encode())
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def prepare_workdir(workdir: epath.PathLike) -> epath.Path:
    """Makes the folder and proves by writing that it can be used, before any time goes into compiling or training.

    Raises:
        WorkdirError: if it cannot be created or written.
    """
    workdir = to_path(workdir)
    probe = workdir / f".write-test-{uuid.uuid4().hex}"
    try:
        make_folder(workdir)
        write_bytes(probe, b"probe")
        remove(probe)
    except (OSError, StorageError) as error:
        raise WorkdirError(
            f"--workdir {workdir}: cannot write there ({getattr(error, 'strerror', None) or error}); "
            "choose another folder, or change its permissions or free space"
        ) from error
    return workdir


def write_config(workdir: epath.PathLike, config: Mapping[str, Any]) -> None:
    """Writes the resolved configuration (plain values of `config.to_dict`) to `config.json`."""
    write_atomically(to_path(workdir) / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")


class GrowingFiles:
    """The files of a run that grow line by line, in a folder where they can.

    Objects of a bucket are written whole. So the files of a run in a bucket grow in a local folder, and a thread copies
    those that have changed, at most every `PUBLISH_INTERVAL_S`. Before a checkpoint the loop waits for the copies, so
    that a restart on another machine finds the lines of every step that was saved.

    Attributes:
        folder: where to append: the workdir itself, if it is in a file system.
    """

    def __init__(self, workdir: epath.PathLike, names: Iterable[str], report: Callable[[str], None] = print):
        """Fetches what a run may go on with.

        Args:
            workdir: folder of the run.
            names: of files that may be there.
            report: receives messages for the user.

        Raises:
            StorageError: a file cannot be fetched.
        """
        self._workdir = to_path(workdir)
        self.folder = self._workdir
        self._published: dict[Path, tuple[int, int]] = {}
        self._last = time.monotonic()
        self._copying: concurrent.futures.Future[None] | None = None
        if not is_local(self._workdir):
            self._report = report
            self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="publish")
            self.folder = epath.Path(tempfile.mkdtemp(prefix="unihetero-run-"))
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    download(self._workdir / name, Path(self.folder / name))

    def publish(self, wait: bool = False) -> None:
        """Copies what has changed to the bucket, if it is time to; with `wait` always, and returns when it is there.

        Raises:
            StorageError: with `wait`, if it could not be copied; without, the next call tries again.
        """
        if is_local(self._workdir):
            return
        is_running = self._copying is not None and not self._copying.done()
        if wait or (not is_running and time.monotonic() - self._last >= PUBLISH_INTERVAL_S):
            self._last = time.monotonic()
            self._copying = self._pool.submit(self._copy_changed)
            if wait:
                self._copying.result()

    def close(self) -> None:
        """Copies what is left; if that fails, says where it is."""
        if is_local(self._workdir):
            return
        try:
            self.publish(wait=True)
            self.folder.rmtree()
        except StorageError as error:  # raised here, it would hide why the run ended
            self._report(f"the last metric lines are in {self.folder} and not in {self._workdir}: {error}")
        finally:
            self._pool.shutdown()

    def _copy_changed(self) -> None:
        for path in sorted(path for path in Path(self.folder).rglob("*") if path.is_file()):
            found = path.stat()
            version = (found.st_size, found.st_mtime_ns)
            if self._published.get(path) != version:
                upload(path, self._workdir / path.relative_to(self.folder).as_posix())
                self._published[path] = version


class RunLock:
    """The right to write to a workdir, as a context manager. In a run of many processes only process 0 takes it.

    `lock.json` holds host, process namespace, pid, the process's start time in clock ticks since boot (a pid alone may
    be reused), when the run began, and a heartbeat that a daemon thread refreshes. The lock is stale, and taken over,
    when its process is dead on this host or its heartbeat is over two minutes old. Locally the check and the write
    happen under an advisory file lock, so of two runs that start together exactly one wins. A bucket has no such lock:
    there the file is read back after writing, and the last writer wins.

    A run that was suspended for longer than the limit may lose its lock; `check` then raises.

    Args:
        workdir: folder of the run.
        heartbeat_interval_s: seconds between two heartbeats.
        patience_s: a lock of another host is waited for so long: if its heartbeat stops, it is taken over, so that a
            run whose host was lost can be started again at once elsewhere.
        report: receives messages for the user.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        heartbeat_interval_s: float = HEARTBEAT_INTERVAL_S,
        patience_s: float = 0.0,
        report: Callable[[str], None] = print,
    ):
        self._patience_s, self._report = patience_s, report
        self._path = to_path(workdir) / LOCK_NAME
        self._interval_s = heartbeat_interval_s
        self._record = {
            "host": socket.gethostname(),
            "namespace": _process_namespace(),
            "pid": os.getpid(),
            "process_start": _process_start(os.getpid()),
            "started": time.time(),
            "heartbeat": time.time(),
            "token": uuid.uuid4().hex,
        }
        self._stop = threading.Event()
        self._fault: str | None = None
        self._thread: threading.Thread | None = None

    def acquire(self) -> Self:
        """Takes the lock and starts its heartbeat.

        Raises:
            WorkdirError: naming the holder, if another live run has it.
        """
        self._wait_for_the_lost()
        with _guard(self._path):
            holder = _read_lock(self._path)
            if holder is not None and not _is_stale(holder):
                raise WorkdirError(_refusal(self._path, holder))
            self._record["heartbeat"] = time.time()
            if holder is None and is_local(self._path):
                self._create()
            else:
                write_atomically(self._path, json.dumps(self._record))
        if not is_local(self._path) and self._owner_token() != self._record["token"]:
            raise WorkdirError(f"{self._path}: another run took the lock at the same moment; stop one of the two")
        self._thread = threading.Thread(target=self._beat, name="run-lock-heartbeat", daemon=True)
        self._thread.start()
        return self

    def _wait_for_the_lost(self) -> None:
        """Returns when it is known whether a holder elsewhere is alive: its heartbeat moved, or it is stale."""
        first, end = _read_lock(self._path), time.monotonic() + self._patience_s
        if first is None or _is_here(first) or _is_stale(first) or not self._patience_s:
            return
        host = first.get("host", "unknown")
        self._report(f"{self._path}: held by host {host}; waiting up to {self._patience_s:.0f} s for its heartbeat")
        while (holder := _read_lock(self._path)) is not None and holder.get("heartbeat") == first.get("heartbeat"):
            if _is_stale(holder) or time.monotonic() > end:
                return
            time.sleep(min(1.0, self._patience_s / 10))

    def check(self) -> None:
        """Raises WorkdirError if the lock was lost or its heartbeat cannot be written; cheap, meant for every step."""
        if self._fault is not None:
            raise WorkdirError(self._fault)

    def release(self) -> None:
        """Stops the heartbeat and removes the lock if it is still ours."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        with _guard(self._path):
            if self._owner_token() == self._record["token"]:
                remove(self._path)

    def __enter__(self) -> Self:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _create(self) -> None:
        # O_EXCL guards against a file system that ignores flock between hosts.
        try:
            descriptor = os.open(os.fspath(self._path), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            raise WorkdirError(
                f"{self._path}: another run took the lock at the same moment; stop one of the two"
            ) from None
        with os.fdopen(descriptor, "w") as file:
            file.write(json.dumps(self._record))

    def _owner_token(self) -> str | None:
        holder = _read_lock(self._path)
        return None if holder is None else holder.get("token")

    def _beat(self) -> None:
        while not self._stop.wait(self._interval_s):
            try:
                with _guard(self._path):
                    if self._owner_token() != self._record["token"]:
                        self._fault = f"{self._path}: this run's lock was taken over or removed; two runs must not mix"
                        return
                    self._record["heartbeat"] = time.time()
                    write_atomically(self._path, json.dumps(self._record))
            except (OSError, StorageError) as error:
                # One failed beat is no reason to stop; the limit is the point at which others may take over.
                if time.time() - self._record["heartbeat"] > STALE_AFTER_S:
                    self._fault = (
                        f"{self._path}: the heartbeat could not be written for {STALE_AFTER_S:.0f} s ({error})"
                    )
                    return


@contextlib.contextmanager
def _guard(path: epath.Path) -> Iterator[None]:
    """Serialises check-and-write of a local lock file between processes; freed by the kernel when one dies."""
    if not is_local(path):
        yield
        return
    with open(f"{os.fspath(path)}.guard", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read_lock(path: epath.Path) -> dict[str, Any] | None:
    try:
        text = read_bytes(path)
    except FileNotFoundError:
        return None
    try:
        record = json.loads(text)
    except ValueError:
        record = None
    if isinstance(record, dict):
        return record
    # Torn by a kill while it was created: the time of the file stands for the heartbeat.
    return {"heartbeat": path.stat().mtime}


def _is_stale(holder: Mapping[str, Any]) -> bool:
    if time.time() - float(holder.get("heartbeat", 0.0)) > STALE_AFTER_S:
        return True
    if not _is_here(holder):
        return False  # its pid says nothing here
    pid = holder.get("pid")
    if not isinstance(pid, int):
        return False
    start = _process_start(pid)
    return start is None or ("process_start" in holder and start != holder["process_start"])


def _is_here(holder: Mapping[str, Any]) -> bool:
    """Whether the holder's pid names a process of this machine."""
    namespace = _process_namespace()
    return holder.get("host") == socket.gethostname() and holder.get("namespace", namespace) == namespace


def _refusal(path: epath.Path, holder: Mapping[str, Any]) -> str:
    started = time.strftime(
        "%Y-%m-%d %H:%M:%S", time.localtime(float(holder.get("started", holder.get("heartbeat", 0.0))))
    )
    age = time.time() - float(holder.get("heartbeat", 0.0))
    return (
        f"--workdir {path.parent}: in use by another run (host {holder.get('host', 'unknown')}, "
        f"pid {holder.get('pid', 'unknown')}, "
        f"started {started}, last heartbeat {age:.0f} s ago); stop it, or choose another --workdir. "
        f"A lock without a heartbeat for {STALE_AFTER_S:.0f} s is taken over by itself ({path})"
    )


def _process_namespace() -> str:
    """Identifies the boot and pid namespace: only inside one of them does a pid name a process."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return "unknown"


def _process_start(pid: int) -> int | None:
    """Start of a live process in clock ticks since boot; 0 where the system does not tell; None if it is dead."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        # Field 3 is the state, field 22 the start; a zombie has ended and holds nothing.
        return None if fields[0] in "ZX" else int(fields[19])
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return 0
    return 0
