"""A rank's part of a checkpoint onto the disk: here, or in a forked process while training goes on.

The fork sees the tensors as they were at that moment (on a GPU they are copied to the host first), so training may
change them at once. Failures come back as values, never as exceptions: an exception on one rank would leave the
others waiting in a collective, and the run could not even save its state elsewhere.

What is left out: what goes into the files, which is Megatron's affair (`checkpoint.py`).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import SerializationFormat, _StorageWriterTransforms, _write_item
from torch.distributed.checkpoint.storage import WriteResult

from megatron_dapo.digests import DigestingFile, FileDigest

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Written:
    """What one rank has written: where each tensor lies, and the checksums of its files by name."""

    results: tuple[WriteResult, ...]
    digests: Mapping[str, FileDigest]


@dataclass(frozen=True)
class WriteFailure:
    reason: str


@dataclass(frozen=True)
class ShardFiles:
    """A rank's files still to be written.

    `buckets` are Megatron's, one a file: (path, name, (bytes items, tensor items)). `common` is what belongs to no
    rank; rank 0 alone has it, and its path.
    """

    buckets: Sequence[Any]
    common: tuple[Path, dict[str, Any]] | None

    def write(self) -> Written:
        """Raises OSError, for one when the disk is full."""
        results: list[WriteResult] = []
        digests: dict[str, FileDigest] = {}
        with ThreadPoolExecutor(max(1, len(self.buckets))) as pool:
            for name, found, digest in pool.map(_write_bucket, self.buckets):
                results += found
                digests[name] = digest
        if self.common is not None:
            path, values = self.common
            with DigestingFile(path) as file:
                torch.save(values, file)  # type: ignore[arg-type]  (all that torch.save calls is `write`)
            digests[path.name] = file.digest
        return Written(tuple(results), digests)


class PendingWrite:
    """A write under way or done. With `background` it runs in a process of its own, which dies with this one."""

    def __init__(self, files: ShardFiles, background: bool):
        self._outcome: Written | WriteFailure | None = None
        self._asked = threading.Lock()  # where a run stalls, it is asked from a thread beside the main one
        if not background:
            self._outcome = _outcome(files.write)
            return
        self._receiver, sender = multiprocessing.Pipe(duplex=False)
        self.pid = _fork(files, sender)
        sender.close()  # so that the child's death ends the pipe

    def outcome(self, wait: bool) -> Written | WriteFailure | None:
        """None while the write goes on. From any thread."""
        with self._asked:
            if self._outcome is None and (wait or self._receiver.poll()):
                try:
                    self._outcome = self._receiver.recv()
                    self._join()
                except EOFError:
                    self._outcome = WriteFailure(_ending(self._join()))
            return self._outcome

    def abandon(self) -> None:
        """End the write, whatever it has done."""
        if self._outcome is None:
            os.kill(self.pid, signal.SIGKILL)
            self._join()
            self._outcome = WriteFailure("abandoned")

    def _join(self) -> int:
        """The exit code, negative if a signal ended it."""
        self._receiver.close()
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)


def _fork(files: ShardFiles, sender: Connection) -> int:
    """The id of a process that writes `files` and sends the outcome.

    Not `multiprocessing.Process`: its child first runs what others have asked for after a fork, and whoever holds a
    proxy of a `multiprocessing.Manager`, as Megatron's own saves do, makes every child wait for an answer from there.
    """
    parent = os.getpid()
    if pid := os.fork():
        return pid
    try:
        _write_apart(files, sender, parent)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _write_bucket(bucket: Any) -> tuple[str, list[WriteResult], FileDigest]:
    path, name, (byte_items, tensor_items) = bucket
    transforms, how = _StorageWriterTransforms(), SerializationFormat.TORCH_SAVE
    with DigestingFile(path) as file:
        results = [
            _write_item(transforms, _Unclosed(file), data, item, name, how)  # type: ignore[arg-type]
            for item, data in [*byte_items, *((item, _compact(tensor)) for item, tensor in tensor_items)]
        ]
    return name, results, file.digest


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """Without the rest of the buffer that it is a part of, which torch would save with it."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


class _Unclosed:
    """The file, for a writer that closes what it is given after each item."""

    def __init__(self, file: DigestingFile):
        self.write, self.tell, self.flush = file.write, file.tell, file.flush

    def close(self) -> None:
        pass


def _write_apart(files: ShardFiles, sender: Connection, parent: int) -> None:
    """The forked process. Signals are its parent's to act on; its parent's end is its own."""
    gc.disable()  # what a finalizer does is the parent's to do
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Torch makes its thread pool anew at the first use after a fork, and two threads at once fail at that: "Invalid
    # thread pool!". So it is used here, before there are any.
    torch.set_num_threads(1)
    if os.getppid() == parent:
        sender.send(_outcome(files.write))
        os._exit(0)


def _outcome(write: Callable[[], Written]) -> Written | WriteFailure:
    try:
        return write()
    except Exception as error:
        cause = _disk_error(error)
        return WriteFailure(traceback.format_exc() if cause is None else f"{cause.strerror} ({cause.filename})")


def _disk_error(error: BaseException | None) -> OSError | None:
    """The OSError behind `error`: torch.save answers a full disk with an error of its own."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _ending(exitcode: int) -> str:
    how = f"exit code {exitcode}"
    if exitcode < 0:
        with contextlib.suppress(ValueError):
            how = signal.Signals(-exitcode).name
    return f"the writing process ended by {how}; see the kernel's log if memory ran out"
