"""Memory that several processes of a host map: torch's own shared storages, named so that any process can open them.

On the host they are of torch's `file_system` kind: a file in /dev/shm. An engine's process maps the very same memory
when it is handed a view (`torch.multiprocessing` pickles the file's name), so nothing is copied on the way. For each
process that makes such storages torch keeps a helper process, `torch_shm_manager`, which unlinks them when those who
use them have ended, however they ended: a killed run leaves no file behind, so none has to be cleaned by a later one.

On CUDA they are allocations that other processes of the host open by CUDA's inter-process handles; they live as long
as the process that made them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.multiprocessing.reductions as reductions
from torch import Tensor


class Handle(Protocol):
    """Picklable; opens the memory in another process of the host."""

    def open(self) -> Tensor:
        """[bytes] uint8."""
        ...


@dataclass(frozen=True)
class HostHandle:
    manager: bytes
    name: bytes
    nbytes: int

    def open(self) -> Tensor:
        storage = torch.UntypedStorage._new_shared_filename_cpu(self.manager, self.name, self.nbytes)
        return torch.empty(0, dtype=torch.uint8).set_(storage)


@dataclass(frozen=True)
class CudaHandle:
    rebuild: Any  # torch's own function and arguments
    arguments: tuple[Any, ...]

    def open(self) -> Tensor:
        return self.rebuild(*self.arguments)


def make_host_memory(nbytes: int) -> tuple[Tensor, HostHandle]:
    """[nbytes] zeros that processes of this host can share. The memory is taken at once.

    Raises:
        RuntimeError: torch's, where /dev/shm has no room for it or cannot be used.
    """
    storage = torch.UntypedStorage._new_using_filename_cpu(nbytes)
    manager, name, size = storage._share_filename_cpu_()
    return torch.empty(0, dtype=torch.uint8).set_(storage), HostHandle(manager, name, size)


def make_cuda_memory(nbytes: int) -> tuple[Tensor, CudaHandle]:
    """[nbytes] on the present CUDA device."""
    memory = torch.zeros(nbytes, dtype=torch.uint8, device="cuda")
    return memory, CudaHandle(*reductions.reduce_tensor(memory))
