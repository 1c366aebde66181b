"""Memory that several processes of a host map.

On the host it is a file in /dev/shm, which loses its name as soon as all processes have it open (`forget_name`): the
memory then lives as long as a process does that uses it, and nothing is left of a run, however it ends after that. A
helper process that clears up afterwards would not do: under Ray it is killed with the rank that started it.

On CUDA it is an allocation that other processes of the host open by CUDA's inter-process handles; it lives as long as
the process that made it.
"""

from __future__ import annotations

import mmap
import os
import secrets
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.multiprocessing.reductions as reductions
from torch import Tensor

NAMES = "/dev/shm/megatron_dapo_"  # then the process that made it, and a random number


class Handle(Protocol):
    """Picklable; opens the memory in another process of the host."""

    def open(self) -> Tensor:
        """[bytes] uint8."""
        ...

    def forget_name(self) -> None:
        """Nobody will open it any more."""
        ...


@dataclass(frozen=True)
class HostHandle:
    path: str
    nbytes: int

    def open(self) -> Tensor:
        """See `Handle`. Raises FileNotFoundError: the name was forgotten."""
        file = os.open(self.path, os.O_RDWR)
        try:
            return torch.frombuffer(mmap.mmap(file, self.nbytes), dtype=torch.uint8)
        finally:
            os.close(file)

    def forget_name(self) -> None:
        """See `Handle`."""
        os.unlink(self.path)


@dataclass(frozen=True)
class CudaHandle:
    rebuild: Any  # torch's own function and arguments
    arguments: tuple[Any, ...]

    def open(self) -> Tensor:
        """See `Handle`."""
        return self.rebuild(*self.arguments)

    def forget_name(self) -> None:
        """It has none."""


def make_host_memory(nbytes: int) -> tuple[Tensor, HostHandle]:
    """[nbytes] zeros that processes of this host can share. The memory is taken at once.

    Raises:
        RuntimeError: /dev/shm has no room for it.
    """
    handle = HostHandle(f"{NAMES}{os.getpid()}_{secrets.token_hex(8)}", nbytes)
    file = os.open(handle.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        os.posix_fallocate(file, 0, nbytes)
        return handle.open(), handle
    except OSError as error:
        handle.forget_name()
        raise RuntimeError(
            f"/dev/shm has no room for {nbytes:,} bytes of weights on their way to engines ({error.strerror}); lower "
            "actor_rollout_ref.rollout.weight_sync.bucket_bytes, or make it larger (docker run --shm-size)"
        ) from error
    finally:
        os.close(file)


def make_cuda_memory(nbytes: int) -> tuple[Tensor, CudaHandle]:
    """[nbytes] on the present CUDA device."""
    memory = torch.zeros(nbytes, dtype=torch.uint8, device="cuda")
    return memory, CudaHandle(*reductions.reduce_tensor(memory))
