"""An emulated object store that fails as asked: gcsfs and TensorStore speak to it over HTTP as to Google's.

`gcp-storage-emulator` knows no generations, on which TensorStore builds; they are added here.
"""

import collections
import contextlib
import http.server
import logging
import os
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from etils import epath
from gcp_storage_emulator import server as emulator
from gcp_storage_emulator.exceptions import NotFound

from unihetero_jax import storage

NAME = "bucket"
FORBIDDEN, UNAVAILABLE, DAMAGED = "forbidden", "unavailable", "damaged"


class Faults:
    """What the store does wrong when the content of an object is read.

    Attributes:
        every: each so many reads one fails, the kinds taking turns; 0: none.
        kinds: `forbidden` (403, which gcsfs does not repeat), `unavailable` (503, which it does), `damaged` (a byte
            flipped on the way).
        delay_s: before each answer.
        matching: part of the names of the objects concerned; empty: all.
        everything: other requests fail likewise: listing, asking, writing, removing.
        reads: content reads so far, by object.
        failed: how many of them failed, by kind.
    """

    def __init__(self):
        self.every, self.kinds, self.delay_s, self.matching = 0, (FORBIDDEN, UNAVAILABLE, DAMAGED), 0.0, ""
        self.everything = False
        self._lock = threading.Lock()
        self.reads, self.failed, self._count = collections.Counter(), collections.Counter(), 0

    def next(self, name: str, is_read: bool) -> str:
        """What is wrong with this request; empty: nothing."""
        if is_read:
            time.sleep(self.delay_s)
        with self._lock:
            self.reads[name] += is_read
            if not self.every or self.matching not in name or not (is_read or self.everything):
                return ""
            self._count += 1
            if self._count % self.every:
                return ""
            kind = self.kinds[self._count // self.every % len(self.kinds)]
            self.failed[kind] += 1
            return kind


class Bucket:
    """The store `gs://bucket`, and what it does wrong."""

    def __init__(self):
        self.faults = Faults()
        self.root = epath.Path(f"gs://{NAME}")

    def copy_folder(self, local: Path, name: str) -> str:
        """Copies a local folder into the store; returns its path."""
        for path in sorted(path for path in local.rglob("*") if path.is_file()):
            storage.upload(path, self.root / name / path.relative_to(local).as_posix())
        return os.fspath(self.root / name)


@contextlib.contextmanager
def running_bucket() -> Iterator[Bucket]:
    """Starts the store, and points this process and those that it starts at it."""
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    bucket = Bucket()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emulator, "RequestHandler", _handler(bucket))
        patch.setattr(http.server, "HTTPServer", http.server.ThreadingHTTPServer)
        with emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket=NAME) as server:
            address = f"http://127.0.0.1:{server._api._httpd.server_address[1]}"
            for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
                patch.setenv(name, address)
            patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
            patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # it would ask Google for the kind of bucket
            yield bucket


def _handler(bucket: Bucket) -> type:
    answering = threading.Lock()  # the emulator's storage is not safe to share; waits may overlap

    class Handler(emulator.RequestHandler):
        def do_GET(self):
            read = re.search(r"/o/([^?]+)\?.*alt=media", self.path)
            name = urllib.parse.unquote(read[1]) if read else ""
            self._read_generation = self._generation(name)
            self._answer(super().do_GET, name or self.path, bool(read))

        def do_POST(self):
            query = urllib.parse.parse_qs(urllib.parse.urlparse(self.path).query)
            wanted = query.get("ifGenerationMatch", [""])[0]
            if wanted and wanted != (self._generation(query.get("name", [""])[0]) or "0"):
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                return self.send_error(412)
            self._answer(super().do_POST, self.path, is_read=False)

        def do_DELETE(self):
            self._answer(super().do_DELETE, self.path, is_read=False)

        def _answer(self, answer: Callable[[], None], name: str, is_read: bool):
            kind = bucket.faults.next(name, is_read)
            with contextlib.suppress(ConnectionError):  # the client was killed
                if kind in (FORBIDDEN, UNAVAILABLE):
                    self.rfile.read(int(self.headers.get("Content-Length", 0)))
                    return self.send_error(403 if kind == FORBIDDEN else 503)
                if kind == DAMAGED:
                    self.wfile = _Flipping(self.wfile)
                with answering:
                    answer()

        def _generation(self, name: str) -> str:
            try:
                return self.storage.get_file_obj(NAME, name)["generation"] if name else ""
            except NotFound:
                return ""

        def end_headers(self):
            if generation := getattr(self, "_read_generation", ""):
                self.send_header("x-goog-generation", generation)
            super().end_headers()

    return Handler


class _Flipping:
    """Changes the last byte of the body that is written."""

    def __init__(self, file):
        self._file = file

    def write(self, data: bytes):
        return self._file.write(data if data.startswith(b"HTTP/") else data[:-1] + bytes([data[-1] ^ 1]))

    def __getattr__(self, name):
        return getattr(self._file, name)
