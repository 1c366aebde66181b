"""Rectangles of Hugging Face tensors as views of this rank's own parameters: nothing is gathered or copied."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dapo.mcore.families.names import Shard, hf_shapes, pieces
from megatron_dapo.mcore.weights import local_parameters
from megatron_dapo.sync.regions import Region, region_of
from megatron_dapo.workers.policy import PolicyWorker


@dataclass(frozen=True)
class _Held:
    region: Region
    param: torch.nn.Parameter
    local: tuple[slice, ...]


class LocalSlices:
    """Of a policy rank. Views are made when asked for: optimizers and offloading may move a parameter's data."""

    def __init__(self, worker: PolicyWorker):
        shapes, layout = hf_shapes(worker.shape), worker.layout
        self._residence = worker.residence
        self._held: dict[str, list[_Held]] = defaultdict(list)
        self._found: dict[Region, tuple[_Held, tuple[slice, ...]]] = {}
        for name, param in local_parameters(worker.chunks):
            for piece in pieces(name, Shard(worker.shape, layout.tp_rank, layout.tp_size)):
                region = region_of(piece.hf_name, piece.hf_rows, piece.hf_cols, shapes[piece.hf_name])
                self._held[piece.hf_name].append(_Held(region, param, piece.local_index(param.dim())))

    def view(self, region: Region) -> Tensor:
        """Of the region's own shape; one-dimensional for a one-dimensional tensor.

        Raises:
            LookupError: this rank does not hold all of it.
        """
        self._residence.come_back(("weights",))
        held, index = self._where(region)
        return held.param.data[held.local][index]

    def _where(self, region: Region) -> tuple[_Held, tuple[slice, ...]]:
        """What of this rank has the region in it, and where. The same in every push, so it is looked for once."""
        if region not in self._found:
            self._found[region] = self._look_for(region)
        return self._found[region]

    def _look_for(self, region: Region) -> tuple[_Held, tuple[slice, ...]]:
        for held in self._held.get(region.name, ()):
            if held.region.contains(region):
                return held, region.index(held.param.dim(), held.region)
        raise LookupError(f"this rank does not hold rows {region.rows}, columns {region.cols} of {region.name!r}")
