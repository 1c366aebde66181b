"""The ranks: process groups of Megatron's model parallelism, and where this rank stands in them."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from megatron_dapo.config.tree import ConfigError, MegatronConfig


@dataclass(frozen=True)
class RankLayout:
    """Where one rank stands. Ranks that differ in the data-parallel rank alone hold the same slice of the model."""

    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    cp_rank: int
    cp_size: int
    dp_rank: int
    dp_size: int

    @property
    def reports(self) -> bool:
        """True on the one rank of a data-parallel replica that speaks for it: its last pipeline stage."""
        return self.pp_rank == self.pp_size - 1 and self.tp_rank == 0 and self.cp_rank == 0


def initialize(config: MegatronConfig, seed: int, timeout: timedelta = timedelta(minutes=30)) -> RankLayout:
    """Make Megatron's process groups over all ranks of the job and seed its random streams.

    A process that torchrun did not start becomes a world of one. May be called again with another layout after
    `parallel_state.destroy_model_parallel()`.

    Raises:
        ConfigError: the world size is not divisible by tensor x pipeline x context.
    """
    if not dist.is_initialized():
        _start_process_group(timeout)
    check_divides(config, dist.get_world_size())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline_model_parallel_size,
        context_parallel_size=config.context_parallel_size,
    )
    random.seed(f"{seed} {dist.get_rank()}")
    np.random.seed([seed, dist.get_rank()])
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return current_layout()


def shutdown() -> None:
    """Undo `initialize`, if it was called. Collective.

    A process that is alone can then start another run. Under torchrun it cannot: the store that it shares with the
    others still names the ranks of the first.
    """
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def check_divides(config: MegatronConfig, world_size: int) -> None:
    tp, pp, cp = (
        config.tensor_model_parallel_size,
        config.pipeline_model_parallel_size,
        config.context_parallel_size,
    )
    model = tp * pp * cp
    if world_size % model:
        below, above = world_size // model * model, (world_size // model + 1) * model
        fits = f"{below} or {above}" if below else str(above)
        raise ConfigError(
            f"world size {world_size} is not divisible by tensor {tp} x pipeline {pp} x context {cp} = {model}; "
            f"start {fits} processes, or change actor_rollout_ref.actor.megatron"
        )


def current_layout() -> RankLayout:
    return RankLayout(
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=parallel_state.get_context_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
    )


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _start_process_group(timeout: timedelta) -> None:
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" in os.environ:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend, timeout=timeout)
        return
    # A store of its own: no port that another run of this host could want.
    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
