"""How much autograd keeps, now and at most: by saved-tensor hooks, each storage once, parameters left out."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable

import torch


class SavedMemory(torch.autograd.graph.saved_tensors_hooks):
    """A context. Storages of `ignored` are not counted; `peak` is in bytes."""

    def __init__(self, ignored: Iterable[torch.Tensor]):
        self._ignored = {tensor.untyped_storage().data_ptr() for tensor in ignored}
        self._holders: Counter[int] = Counter()  # of each storage, by its address
        self.now = self.peak = 0
        super().__init__(self._pack, lambda held: held.tensor)

    def __enter__(self) -> SavedMemory:  # type: ignore[override]  # torch's returns nothing
        super().__enter__()
        return self

    def _pack(self, tensor: torch.Tensor) -> _Held:
        held, storage = _Held(tensor), tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address not in self._ignored:
            if not self._holders[address]:
                self.now += size
                self.peak = max(self.peak, self.now)
            self._holders[address] += 1
            weakref.finalize(held, self._gone, address, size)
        return held

    def _gone(self, address: int, size: int) -> None:
        self._holders[address] -= 1
        if not self._holders[address]:
            self.now -= size


class _Held:
    """What autograd keeps in a tensor's place, until its node has run."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor
