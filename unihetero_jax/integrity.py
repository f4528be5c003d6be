"""Proof that a folder holds what was written: a manifest with a digest of every file, which is covered itself.

Storage flips, truncates and loses bytes, and array formats restore such files without an error. A manifest that is
written last also says that the folder is complete.

The digests guard against faults, not against forgery: XXH3 with 128 bits misses a fault with a chance of 2^-128, like a
cryptographic hash, and is several times as fast (`benchmarks/checkpoint.py`). Manifests without the name of their hash
are older and have blake2b.
"""

import concurrent.futures
import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import xxhash
from etils import epath

from unihetero_jax.storage import StorageError, attempt, is_folder, is_local, list_folder, read_bytes, size_of
from unihetero_jax.workdir import write_atomically

Item = TypeVar("Item")
MANIFEST = "manifest.json"
FILE_HASH = "xxh3_128"
_HASHES = {"blake2b": lambda: hashlib.blake2b(digest_size=16), FILE_HASH: xxhash.xxh3_128}
_HASH_CHUNK_BYTES = 1 << 20


def write_manifest(folder: epath.Path, content: Mapping[str, Any]) -> None:
    """Writes the manifest as one atomic act. `content["files"]` comes from `digest_files`; the rest is the caller's."""
    write_atomically(folder / MANIFEST, _manifest_text({"hash": FILE_HASH, **content}))


def _manifest_text(content: Mapping[str, Any]) -> str:
    body = json.dumps(content, indent=1, sort_keys=True)
    return json.dumps({"content": json.loads(body), "digest": _digest(body.encode())}, indent=1, sort_keys=True) + "\n"


def read_manifest(folder: epath.Path) -> dict[str, Any]:
    """Reads a manifest and proves it whole: written again from what was understood, it must give the same bytes.

    Raises:
        ValueError: if it does not.
    """
    data = read_bytes(folder / MANIFEST)
    try:
        content = json.loads(data)["content"]
        if _manifest_text(content).encode() == data:
            return content
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError):
        pass
    raise ValueError(f"file {MANIFEST}: content does not match its own digest")


def verify(folder: epath.Path, share: tuple[int, int] = (0, 1), digests: bool = True) -> str | None:
    """What is wrong with the folder, naming a file, or None. Reads every byte of the files listed.

    Args:
        folder: with a manifest.
        share: (which, of how many): only so much of the files, where several processes divide the work.
        digests: False to compare the sizes of the files alone, and read none.

    Raises:
        StorageError: it is in a bucket that does not answer.
    """
    try:
        manifest = read_manifest(folder)
        recorded = dict(share_of(sorted(manifest["files"].items()), share))
        sizes = {name: size_of(folder / name) for name in recorded}
        for name, size in sizes.items():
            if size is None:
                return f"file {name} is missing"
            if size != recorded[name]["bytes"]:
                return f"file {name} has {size} bytes, {recorded[name]['bytes']} were written"
        if not digests:
            return None
        hash_name = manifest.get("hash", "blake2b")
        if hash_name not in _HASHES:
            return f"file {MANIFEST}: digests by {hash_name}, which this version does not know"
        present = digest_files(folder, min(8, os.cpu_count() or 1), recorded, hash_name=hash_name)
    except StorageError:  # no answer says nothing of what is there
        raise
    except (OSError, ValueError) as error:
        return str(error)
    for name, entry in recorded.items():
        if present[name] != entry:
            return f"file {name} does not match its digest"
    return None


def share_of(items: Sequence[Item], share: tuple[int, int]) -> Sequence[Item]:
    """Every n-th item, beginning with one's own number."""
    number, count = share
    return items[number::count]


def digest_files(
    folder: epath.Path,
    num_threads: int,
    names: Iterable[str] | None = None,
    ignored: Collection[str] = (),
    hash_name: str = FILE_HASH,
) -> dict[str, dict[str, Any]]:
    """{relative path: {"bytes", "digest"}} of the named files, or of all but the manifest and `ignored` names."""
    names = list_files(folder, ignored) if names is None else list(names)
    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        return dict(zip(names, pool.map(lambda name: _digest_file(folder / name, hash_name), names), strict=True))


def list_files(folder: epath.Path, ignored: Collection[str] = ()) -> list[str]:
    """Relative paths of all files but the manifest and `ignored` names."""
    return sorted(_walk(folder, {MANIFEST, *ignored}))


def _walk(folder: epath.Path, ignored: Collection[str], prefix: str = "") -> list[str]:
    # epath refuses recursive patterns.
    found = []
    for path in list_folder(folder):
        if is_folder(path):
            found += _walk(path, ignored, f"{prefix}{path.name}/")
        elif path.name not in ignored:
            found.append(f"{prefix}{path.name}")
    return found


def _digest_file(path: epath.Path, hash_name: str) -> dict[str, Any]:
    if is_local(path):
        return _read_and_digest(path, hash_name)
    return attempt(f"reading {path}", lambda: _read_and_digest(path, hash_name))


def _read_and_digest(path: epath.Path, hash_name: str) -> dict[str, Any]:
    state, size = _HASHES[hash_name](), 0
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            state.update(chunk)
            size += len(chunk)
    return {"bytes": size, "digest": state.hexdigest()}


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
