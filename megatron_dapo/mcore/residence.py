"""What of a policy rank leaves the device while engines use it: weights, gradients, optimizer state.

A part that is away has its storages' memory given back, with the content on the host; parameters, buffers and all
views of them stay the objects that they are, and are empty to the touch until the part is back. Gradients are not
kept: they come back as zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor, UntypedStorage

from megatron_dapo.config.tree import OffloadPart

PARTS: tuple[OffloadPart, ...] = ("weights", "gradients", "optimizer")


class Residence:
    """Everything is on the device at first."""

    def __init__(self, modules: Sequence[DistributedDataParallel], optimizer: ChainedOptimizer):
        self._modules, self._optimizer = modules, optimizer
        self._away: dict[OffloadPart, list[_Away]] = {}
        self._hosts: dict[int, Tensor] = {}  # of each storage; kept, for pinned memory is slow to get

    def leave(self, parts: Iterable[OffloadPart]) -> None:
        """Give the device's memory of `parts` back, where it is there. No gradient may be waited for."""
        for part in parts:
            if part not in self._away:
                self._away[part] = [self._send_away(storage, part) for storage in self._storages(part)]

    def come_back(self, parts: Iterable[OffloadPart] = PARTS) -> None:
        """Have `parts` on the device, as they were."""
        for part in parts:
            for away in self._away.pop(part, ()):
                away.come_back()

    def _send_away(self, storage: UntypedStorage, part: OffloadPart) -> _Away:
        kept = None
        if part != "gradients":
            kept = self._hosts.get(storage._cdata)
            if kept is None or kept.numel() != storage.nbytes():
                kept = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=storage.device.type == "cuda")
                self._hosts[storage._cdata] = kept
        return _Away(storage, kept)

    def _storages(self, part: OffloadPart) -> list[UntypedStorage]:
        """Each once. In float32 the optimizer's master weights are the model's: they are weights."""
        weights = _distinct(param.data for module in self._modules for param in module.parameters())
        if part == "weights":
            return list(weights.values())
        if part == "gradients":
            buffers = [b for m in self._modules for b in _buffers(m)]
            return list(_distinct(buffer.grad_data for buffer in buffers).values())
        found = _distinct(_optimizer_tensors(self._optimizer))
        return [storage for pointer, storage in found.items() if pointer not in weights]


class _Away:
    def __init__(self, storage: UntypedStorage, kept: Tensor | None):
        self._storage, self._size, self._kept = storage, storage.nbytes(), kept
        if kept is not None:
            kept.copy_(_bytes(storage))
        storage.resize_(0)

    def come_back(self) -> None:
        self._storage.resize_(self._size)
        if self._kept is None:
            _bytes(self._storage).zero_()
        else:
            _bytes(self._storage).copy_(self._kept)


def _buffers(module: Any) -> list[Any]:
    """Megatron's gradient buffers; in nn.Module `buffers` is something else."""
    return [*module.buffers, *module.expert_parallel_buffers]


def _optimizer_tensors(optimizer: ChainedOptimizer) -> Iterable[Tensor]:
    """Master weights and moments."""
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            yield from (param.data for param in group["params"])
        for values in part.optimizer.state.values():
            yield from (value for value in values.values() if isinstance(value, Tensor) and value.dim())  # not `step`


def _distinct(tensors: Iterable[Tensor]) -> dict[int, UntypedStorage]:
    storages = (tensor.untyped_storage() for tensor in tensors)
    # On a CPU, what was read from a checkpoint may lie in memory that is not torch's to give back.
    return {storage.data_ptr(): storage for storage in storages if storage.nbytes() and storage.resizable()}


def _bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
