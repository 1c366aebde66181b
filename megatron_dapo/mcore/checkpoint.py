"""Model and optimizer to disk and back through Megatron's `dist_checkpointing`, on any layout.

Four things that Megatron-Core 0.16 does with torch's AdamW are set right here: its state has to exist before a load;
the distributed optimizer saves `step` apart but asks for it on load, and then gives all parameters one `step` tensor,
which AdamW would advance once a parameter; the other ones leave a `step` of 0 out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer

_SHARDING = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


def save(chunks: Sequence[GPTModel], optimizer: ChainedOptimizer, path: str | Path) -> None:
    """Write both into the existing, empty folder `path`. Collective."""
    _make_adam_state(optimizer)
    dist_checkpointing.save(_sharded_state(chunks, optimizer, loading=False), str(path))


def load(chunks: Sequence[GPTModel], optimizer: ChainedOptimizer, path: str | Path) -> None:
    """Read what `save` wrote, also on another layout. Collective."""
    _make_adam_state(optimizer)
    state: dict[str, Any] = dist_checkpointing.load(_sharded_state(chunks, optimizer, loading=True), str(path))  # type: ignore[assignment]
    for index, chunk in enumerate(chunks):
        chunk.load_state_dict(state[_model_key(index)])
    for part in optimizer.chained_optimizers:
        if isinstance(part, DistributedOptimizer):
            _keep_own_step(part)
        else:
            _with_step(state["optimizer"])
    with torch.no_grad():
        optimizer.load_state_dict(state["optimizer"])
    for part in optimizer.chained_optimizers:
        for values in part.optimizer.state.values():
            values["step"] = values["step"].clone()


def _sharded_state(chunks: Sequence[GPTModel], optimizer: ChainedOptimizer, loading: bool) -> dict[str, Any]:
    metadata = _SHARDING | {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    models = {_model_key(i): chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(chunks)}
    shards = models if len(chunks) > 1 else models[_model_key(0)]
    return models | {"optimizer": optimizer.sharded_state_dict(shards, is_loading=loading, metadata=metadata)}


def _model_key(index: int) -> str:
    return f"model{index}"


def _make_adam_state(optimizer: ChainedOptimizer) -> None:
    """Zero moments and step 0 wherever AdamW has not made them yet."""
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for param in group["params"]:
                state = part.optimizer.state[param]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(param.data)
                    state["exp_avg_sq"] = torch.zeros_like(param.data)
                state.setdefault("step", torch.tensor(0.0))


def _with_step(saved: dict[str, Any]) -> None:
    """Put back the step that is left out where nothing was trained yet. Under bf16 Adam's state is a level deeper."""
    saved.get("optimizer", saved)["state"].setdefault("common_step", torch.tensor(0.0))


def _keep_own_step(optimizer: DistributedOptimizer) -> None:
    """Let the optimizer load a parameter's state that comes without `step`: it has been set for all by then."""
    plain = DistributedOptimizer._set_main_param_and_optimizer_states

    def with_step(model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group, order = optimizer.model_param_group_index_map[model_param]
        own = optimizer.optimizer.state[optimizer.optimizer.param_groups[group]["params"][order]]
        plain(optimizer, model_param, {"step": own["step"], **tensors})

    optimizer._set_main_param_and_optimizer_states = with_step  # type: ignore[method-assign]
