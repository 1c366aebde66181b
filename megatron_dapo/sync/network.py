"""Broadcasts between nodes: a process group for each sender and those that receive from it, gloo or NCCL.

They stand apart from the model's process groups: engine processes need not be in those, nor torch.distributed be set
up there at all. The members meet at a key-value store whose address the driver hands to each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from math import prod

import torch
from torch import Tensor
from torch._C._distributed_c10d import Backend, PrefixStore, ProcessGroupGloo, Store, TCPStore

from megatron_dapo.progress import PROGRESS
from megatron_dapo.sync.parts import Link, Message
from megatron_dapo.sync.slices import LocalSlices


def open_store(address: tuple[str, int], timeout: float, master: bool = False) -> TCPStore:
    """The master listens at the port (0: any that is free; `store.port` says which)."""
    return TCPStore(*address, is_master=master, timeout=timedelta(seconds=timeout), wait_for_workers=False)


class Network:
    """This process's links. Making it waits for the other members of each."""

    def __init__(self, links: Sequence[Link], process: int, store: Store, device: torch.device, timeout: float):
        self._process, self._device = process, device
        self._groups = {link: self._meet(link, store, timedelta(seconds=timeout)) for link in links}

    def run(
        self, messages: Iterable[Message], slices: LocalSlices | None, views: Mapping[str, Tensor], dtype: torch.dtype
    ) -> None:
        """Send and receive a bucket's messages; what comes goes into `views`, the node's whole tensors."""
        under_way = []
        for message in messages:
            flat = self._filled(message, slices, dtype)
            # From the group's first member, the sender. Torch's stubs leave the method out.
            work = self._groups[message.link].broadcast(flat, 0)  # type: ignore[attr-defined]
            under_way.append((message, flat, work))
        for message, flat, work in under_way:
            with PROGRESS.waiting("a bucket of weights"):
                work.wait()
            if message.link.sender != self._process:
                _unpack(message, flat, views)

    def _filled(self, message: Message, slices: LocalSlices | None, dtype: torch.dtype) -> Tensor:
        flat = torch.empty(sum(region.count for region in message.regions), dtype=dtype, device=self._device)
        if message.link.sender == self._process:
            assert slices is not None
            start = 0
            for region in message.regions:
                source = slices.view(region)
                flat[start : start + region.count].view(source.shape).copy_(source)
                start += region.count
        return flat

    def _meet(self, link: Link, store: Store, timeout: timedelta) -> Backend:
        members = [link.sender, *link.receivers]
        rank, own = members.index(self._process), PrefixStore(f"weights/{members}", store)
        if self._device.type == "cuda":
            return _nccl(own, rank, len(members), timeout)
        return ProcessGroupGloo(own, rank, len(members), timeout)


def _nccl(store: Store, rank: int, size: int, timeout: timedelta) -> Backend:
    from torch._C._distributed_c10d import ProcessGroupNCCL  # not in builds of torch without CUDA

    options = ProcessGroupNCCL.Options()
    options._timeout = timeout
    return ProcessGroupNCCL(store, rank, size, options)


def _unpack(message: Message, flat: Tensor, views: Mapping[str, Tensor]) -> None:
    start = 0
    for region in message.regions:
        whole = views[region.name]
        target = whole[region.index(whole.dim())]
        target.copy_(flat[start : start + prod(target.shape)].view(target.shape))
        start += region.count
