"""Megatron's DDP and optimizer around the model, its learning-rate schedule, and one update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.transformer.module import Float16Module

from megatron_dapo.config.tree import MegatronConfig, OptimConfig
from megatron_dapo.mcore.model import DTYPES
from megatron_dapo.progress import PROGRESS


def wrap_for_training(chunks: Sequence[GPTModel], config: MegatronConfig) -> list[DistributedDataParallel]:
    """Megatron's data parallelism around each chunk. Gradients are summed in fp32 buffers (`main_grad`)."""
    transformer = chunks[0].config
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=config.use_distributed_optimizer,
        overlap_grad_reduce=config.overlap_grad_reduce,
        overlap_param_gather=config.overlap_param_gather,
        grad_reduce_in_fp32=True,
    )
    wrapped = [
        DistributedDataParallel(transformer, ddp_config, module, disable_bucketing=index > 0)
        for index, module in enumerate(wrap_precision(chunks))
    ]
    transformer.finalize_model_grads_func = finalize_model_grads
    if config.overlap_grad_reduce:
        transformer.no_sync_func = _one_or_all([module.no_sync for module in wrapped])
    if config.overlap_param_gather:
        transformer.param_sync_func = _one_or_all([module.start_param_sync for module in wrapped])
    return wrapped


def wrap_precision(chunks: Sequence[GPTModel]) -> list[torch.nn.Module]:
    """Megatron's casts between float32 and bfloat16 around each chunk, where it computes in bfloat16."""
    return [Float16Module(chunk.config, chunk) if chunk.config.bf16 else chunk for chunk in chunks]


def build_optimizer(
    modules: Sequence[DistributedDataParallel], config: OptimConfig, megatron: MegatronConfig, grad_clip: float
) -> ChainedOptimizer:
    dtype = DTYPES[megatron.params_dtype]
    settings = OptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        adam_eps=config.eps,
        clip_grad=grad_clip,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_distributed_optimizer=megatron.use_distributed_optimizer,
        overlap_param_gather=megatron.overlap_param_gather,
        optimizer_cpu_offload=megatron.optimizer_cpu_offload and torch.cuda.is_available(),
        optimizer_offload_fraction=1.0 if megatron.optimizer_cpu_offload else 0.0,
    )
    # Without overrides every parameter decays, as in the recipe; None is Megatron's default: norms and biases do not.
    overrides = {} if config.weight_decay_all else None
    optimizer = cast(ChainedOptimizer, get_megatron_optimizer(settings, list(modules), config_overrides=overrides))
    for group in optimizer.param_groups:  # Megatron leaves this to its own scheduler, which is not used here
        group["weight_decay"] = config.weight_decay * group["wd_mult"]
    return optimizer


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """The rate of training step `step`, counted from 0: linear warmup over `lr_warmup_steps`, then the decay.

    The warmup's first step has lr / lr_warmup_steps, or 0 with `lr_warmup_from_zero` (the recipe).
    """
    warmup = config.lr_warmup_steps
    if step < warmup:
        return config.lr * (step if config.lr_warmup_from_zero else step + 1) / warmup
    if config.lr_decay_style == "constant":
        return config.lr
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    share = 1.0 - progress if config.lr_decay_style == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.min_lr + (config.lr - config.min_lr) * share


@dataclass(frozen=True)
class UpdateOutcome:
    applied: bool
    grad_norm: float  # before clipping, over the whole model


def apply_update(optimizer: ChainedOptimizer, lr: float, loss: float) -> UpdateOutcome:
    """Clip and step, unless the loss or the gradient norm is not finite on any rank: then nothing changes.

    The optimizer's own `step` in its parts, so that the norm is looked at before Adam's moments could take in a NaN.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    PROGRESS.step("the gradients' norm")
    found_inf = optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    if found_inf or not _finite_everywhere(loss, grad_norm):
        return UpdateOutcome(False, grad_norm)
    for part in optimizer.chained_optimizers:
        if part.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(list(part.get_parameters()), part.config.clip_grad, grad_norm)
    PROGRESS.step("the optimizer's step")
    optimizer.step_with_ready_grads()
    return UpdateOutcome(True, grad_norm)


def gather_parameters(modules: Sequence[DistributedDataParallel], config: MegatronConfig) -> None:
    """After an update, wait for every rank's slice of the new weights, where their gather overlaps the next forward."""
    if config.overlap_param_gather:
        for module in modules:
            module.start_param_sync(force_sync=True)


def zero_gradients(modules: Sequence[DistributedDataParallel], optimizer: ChainedOptimizer) -> None:
    for module in modules:
        module.zero_grad_buffer()
    optimizer.zero_grad()


def _finite_everywhere(*values: float) -> bool:
    bad = torch.tensor(float(not all(math.isfinite(value) for value in values)))
    if torch.cuda.is_available():
        bad = bad.cuda()
    dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    return bad.item() == 0.0


def _one_or_all(functions: list[Any]) -> Any:
    """Megatron wants the function itself for one chunk, a list for interleaved ones."""
    return functions[0] if len(functions) == 1 else functions
