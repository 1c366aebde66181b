"""Checksums of files, taken while they are written or read.

XXH3-128: about 10 GB/s a core where SHA-256 makes 1.5, so that checking a checkpoint costs little beside reading it.
It finds damage, not malice.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash

_BLOCK = 1 << 22  # bytes: stays in the processor's cache between the read and the hash
_THREADS = 4


@dataclass(frozen=True)
class FileDigest:
    """Length in bytes and checksum (32 hexadecimal digits) of a file."""

    bytes: int
    xxh3_128: str


class DigestingFile:
    """A new file to write, front to back. Leaving the context brings it to the disk itself (fsync)."""

    def __init__(self, path: str | Path):
        self._file = open(path, "wb")  # noqa: SIM115  (closed by __exit__)
        self._hash, self._bytes = xxhash.xxh3_128(), 0

    def write(self, data: Any) -> int:
        try:
            count = self._file.write(data)
        except OSError as error:  # that of a write names no file
            raise OSError(error.errno, error.strerror, str(self._file.name)) from error
        self._hash.update(data)
        self._bytes += count
        return count

    def tell(self) -> int:
        return self._bytes

    def flush(self) -> None:
        self._file.flush()

    @property
    def digest(self) -> FileDigest:
        """Of what was written so far."""
        return FileDigest(self._bytes, self._hash.hexdigest())

    def __enter__(self) -> DigestingFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if error is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()


def digest_file(path: str | Path) -> FileDigest:
    """Of a file on disk, a block at a time."""
    found, size, block = xxhash.xxh3_128(), 0, memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            found.update(block[:count])
            size += count
    return FileDigest(size, found.hexdigest())


def digest_files(root: Path, names: Iterable[str]) -> dict[str, FileDigest | None]:
    """Of the files `names` below `root`, several at a time; None for one that is not there."""

    def one(name: str) -> FileDigest | None:
        return digest_file(root / name) if (root / name).is_file() else None

    wanted = list(names)
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(wanted, pool.map(one, wanted), strict=True))


def sync_folder(path: Path) -> None:
    """Bring a folder's entries (new, renamed and removed names) to the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
