"""What one rank of a run holds, from the model class itself and Megatron's own buffers, without their memory.

The model and Megatron's DDP are built on the meta device, over a process group of the planned size that exists in name
alone: a rank of 128 takes about a second. Nothing may be computed with what is built. Left out: activations.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_dapo.config.tree import MegatronConfig
from megatron_dapo.mcore.families import ModelShape
from megatron_dapo.mcore.model import build_model
from megatron_dapo.mcore.optimizer import wrap_for_training
from megatron_dapo.mcore.parallel import check_divides, shutdown

_MOMENTS = 2  # Adam's, float32 each


@dataclass(frozen=True)
class Footprint:
    """Bytes on one rank, but for `elements`: its parameters, each counted once."""

    elements: int
    parameters: int  # with the padding of Megatron's buffers
    gradients: int  # main_grad
    master: int  # float32 weights; 0 where the model's are float32 themselves
    moments: int
    largest: int  # the largest single parameter


def footprint(shape: ModelShape, config: MegatronConfig, world_size: int, rank: int) -> Footprint:
    """Of rank `rank` of `world_size`. No process group may be there; none is left behind.

    Raises:
        ConfigError: a layout that the model or the world cannot be split into.
    """
    with _fake_ranks(config, world_size, rank), torch.device("meta"), _OnMeta():
        chunks = build_model(shape, config)
        modules = wrap_for_training(chunks, config)
        parameters = list({id(p): p for chunk in chunks for p in chunk.parameters()}.values())
        shard = _optimizer_elements(modules, config)
        mixed = config.params_dtype != "float32"
        return Footprint(
            elements=sum(p.numel() for p in parameters),
            parameters=_storage_bytes(p.data for p in parameters),
            gradients=_storage_bytes(buffer.grad_data for buffer in _buffers(modules)),
            master=4 * shard if mixed else 0,
            moments=4 * _MOMENTS * shard,
            largest=max(p.numel() * p.element_size() for p in parameters),
        )


def stage_rank(config: MegatronConfig, world_size: int, stage: int) -> int:
    """The first rank of pipeline stage `stage`: Megatron's order of ranks has the stages outermost."""
    return stage * (world_size // config.pipeline_model_parallel_size)


@contextmanager
def _fake_ranks(config: MegatronConfig, world_size: int, rank: int) -> Iterator[None]:
    """Process groups as rank `rank` sees them; a collective of theirs returns at once and moves nothing."""
    check_divides(config, world_size)
    hook = sys.excepthook  # a process group puts its own in front, which names a rank that there is not
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tensor_model_parallel_size,
            pipeline_model_parallel_size=config.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=config.virtual_pipeline_model_parallel_size,
            context_parallel_size=config.context_parallel_size,
            create_gloo_process_groups=False,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(0)
        yield
    finally:
        shutdown()
        sys.excepthook = hook


class _OnMeta(TorchFunctionMode):
    """What names a real device is made on the meta device instead."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "meta")).partition(":")[0] != "meta":
            kwargs["device"] = "meta"
        if func is torch.Tensor.to and isinstance(args[1] if len(args) > 1 else None, int | str | torch.device):
            args = (args[0], "meta", *args[2:])
        return func(*args, **kwargs)


def _optimizer_elements(modules: Sequence[DistributedDataParallel], config: MegatronConfig) -> int:
    """Elements of which this rank has Adam's moments: with the distributed optimizer, its range of each bucket."""
    if not config.use_distributed_optimizer:
        return sum(p.numel() for module in modules for p in module.parameters())
    ranges = [DistributedOptimizer._build_gbuf_range_map(buffer) for buffer in _buffers(modules)]
    return sum(
        found["param"].size
        for buffer in ranges
        for buckets in buffer.values()
        for bucket in buckets
        for found in bucket["param_map"].values()
    )


def _buffers(modules: Sequence[DistributedDataParallel]) -> list[Any]:
    return [buffer for module in modules for buffer in module.buffers]  # type: ignore[union-attr]


def _storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Each storage once; on the meta device all have the same address, so their objects tell them apart."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
