"""What a rank of the policy does: log-probs, updates, weights out; and the frozen reference on the same ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.storage import WriteResult
from transformers import AutoConfig

from megatron_dapo.config.tree import MegatronConfig, OffloadPart, OptimConfig
from megatron_dapo.mcore import checkpoint
from megatron_dapo.mcore.dist_read import check_model
from megatron_dapo.mcore.families import shape_of
from megatron_dapo.mcore.families.names import hf_shapes
from megatron_dapo.mcore.fused_loss import Objective
from megatron_dapo.mcore.hf_save import save_hf
from megatron_dapo.mcore.model import DTYPES, build_model
from megatron_dapo.mcore.optimizer import (
    apply_update,
    build_optimizer,
    gather_parameters,
    wrap_for_training,
    zero_gradients,
)
from megatron_dapo.mcore.parallel import RankLayout, initialize
from megatron_dapo.mcore.residence import Residence
from megatron_dapo.mcore.rng import rng_state, set_rng_state
from megatron_dapo.mcore.safe_load import refuse_foreign_pickles
from megatron_dapo.mcore.save_plan import Planning
from megatron_dapo.mcore.schedule import Model, TokenStats, forward_backward, log_probs
from megatron_dapo.mcore.shard_write import WriteFailure, Written
from megatron_dapo.mcore.weights import export_hf, load_hf
from megatron_dapo.progress import PROGRESS
from megatron_dapo.types import MicroBatch, PlannedMicroBatch, SequenceBatch


@dataclass(frozen=True)
class PolicySettings:
    """All that a policy rank needs to know."""

    model_path: str
    packed: bool
    megatron: MegatronConfig
    optim: OptimConfig
    grad_clip: float
    objective: Objective
    seed: int
    with_reference: bool  # keep the first weights, frozen, for a KL term


@dataclass(frozen=True)
class UpdateShard:
    """One data-parallel rank's share of a step: micro-batches of each mini-batch, in order."""

    mini_batches: tuple[tuple[MicroBatch | PlannedMicroBatch, ...], ...]
    lr: float
    report_first: bool = False  # the log-probs that the first mini-batch's tokens have in its own pass


@dataclass(frozen=True)
class UpdateStats:
    """One optimizer update. `sums` (mcore.fused_loss.SUMS) are this data-parallel replica's: add them up.

    `tokens`: of each of the replica's micro-batches, where they were asked for.
    """

    applied: bool
    grad_norm: float
    lr: float
    sums: dict[str, float]
    tokens: tuple[TokenStats, ...] = ()


@dataclass(frozen=True)
class SaveOrder:
    """Where to, an existing and empty folder; and whether the caller goes on while it is written."""

    path: str
    background: bool


class PolicyWorker:
    """Megatron's model, optimizer and schedule on one rank."""

    def __init__(self, settings: PolicySettings):
        self.settings = settings
        self.layout = initialize(settings.megatron, settings.seed)
        self.shape = shape_of(AutoConfig.from_pretrained(settings.model_path))
        self.chunks = build_model(self.shape, settings.megatron)
        load_hf(self.chunks, self.shape, settings.model_path)
        self.modules = wrap_for_training(self.chunks, settings.megatron)
        self.optimizer = build_optimizer(self.modules, settings.optim, settings.megatron, settings.grad_clip)
        self.model = Model(self.modules, settings.objective, settings.packed, self.chunks[0].config)
        self.residence = Residence(self.modules, self.optimizer)
        self._planning = Planning()
        self._save: checkpoint.Save | None = None
        self._reference = _copy_of(self.chunks) if settings.with_reference else []

    def rank_layout(self, _: None) -> RankLayout:
        return self.layout

    def log_probs(self, micro_batches: tuple[SequenceBatch, ...]) -> list[TokenStats]:
        """Log-probs of each micro-batch under the present weights; empty on ranks that do not report."""
        self.residence.come_back(("weights",))
        found = log_probs(self.model, micro_batches).tokens
        return found if self.layout.reports else []

    def reference_log_probs(self, micro_batches: tuple[SequenceBatch, ...]) -> list[TokenStats]:
        """The same under the weights that training began with."""
        self.residence.come_back(("weights",))
        self._swap_reference()
        try:
            return self.log_probs(micro_batches)
        finally:
            self._swap_reference()

    def update(self, shard: UpdateShard) -> Iterator[UpdateStats]:
        """One optimizer update a mini-batch; nothing is yielded on ranks that do not report."""
        self.residence.come_back()
        for number, micro_batches in enumerate(shard.mini_batches):
            zero_gradients(self.modules, self.optimizer)
            result = forward_backward(self.model, micro_batches)
            outcome = apply_update(self.optimizer, shard.lr, result.sums["loss"])
            if self.layout.reports:
                tokens = tuple(result.tokens) if shard.report_first and number == 0 else ()
                yield UpdateStats(outcome.applied, outcome.grad_norm, shard.lr, result.sums, tokens)
        gather_parameters(self.modules, self.settings.megatron)

    def export(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight under its Hugging Face name; collective over tensor and pipeline parallelism."""
        self.residence.come_back(("weights",))
        return export_hf(self.chunks, self.shape)

    def leave_device(self, parts: tuple[OffloadPart, ...]) -> None:
        """Give the device's memory of `parts` back. What needs one of them brings it back by itself."""
        self.residence.leave(parts)

    def start_save(self, order: SaveOrder) -> None:
        """Begin to write model and optimizer."""
        self.residence.come_back()
        background = order.background
        with nullcontext() if background else PROGRESS.patient("a checkpoint is written"):
            self._save = checkpoint.start_save(self.chunks, self.optimizer, self._planning, order.path, background)

    @PROGRESS.patient("a checkpoint is written")
    def save_outcome(self, wait: bool) -> Written | WriteFailure | None:
        """This rank's part of the save; None while it is being written."""
        return None if self._save is None else self._save.outcome(wait)

    @PROGRESS.patient("a checkpoint is written")
    def finish_save(self, results: Sequence[Sequence[WriteResult]] | None) -> WriteFailure | None:
        """The end of a save: on rank 0 with the results of all ranks, else with None. Without results on rank 0 the
        save is given up."""
        save, self._save = self._save, None
        if save is None:
            return None
        if results is None:
            save.abandon()
            return None
        return save.finish(results)

    @PROGRESS.patient("a checkpoint is read")
    def load(self, path: str) -> None:
        """What was saved, on any layout."""
        check_model(Path(path), refuse_foreign_pickles(path), self.shape)
        self.residence.come_back()
        checkpoint.load(self.chunks, self.optimizer, path)

    def rng_state(self, _: None) -> dict[str, Any]:
        return rng_state()

    def set_rng_state(self, state: dict[str, Any]) -> None:
        set_rng_state(state)

    def save_hf(self, path: str) -> None:
        """The present weights as a Hugging Face checkpoint, written by rank 0."""
        dtype = DTYPES[self.settings.megatron.params_dtype]
        first = dist.get_rank() == 0
        save_hf(self.export(), hf_shapes(self.shape), dtype, self.settings.model_path, Path(path), writes=first)

    def _swap_reference(self) -> None:
        for param, kept in zip(_parameters(self.chunks), self._reference, strict=True):
            present = param.data.clone()
            param.data.copy_(kept)
            kept.copy_(present)


def _parameters(chunks: Any) -> list[torch.nn.Parameter]:
    return [param for chunk in chunks for param in chunk.parameters()]


def _copy_of(chunks: Any) -> list[torch.Tensor]:
    return [param.data.to("cpu", copy=True) for param in _parameters(chunks)]
