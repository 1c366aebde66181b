"""Model and optimizer to disk and back through Megatron's `dist_checkpointing`, on any layout.

Four things that Megatron-Core 0.16 does with torch's AdamW are set right here: its state has to exist before a load;
the distributed optimizer saves `step` apart but asks for it on load, and then gives all parameters one `step` tensor,
which AdamW would advance once a parameter; the other ones leave a `step` of 0 out.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch.distributed.checkpoint.storage import WriteResult

from megatron_dapo.mcore.dist_load import load_sharded
from megatron_dapo.mcore.safe_load import read_metadata
from megatron_dapo.mcore.save_plan import Planning, SavePlanned
from megatron_dapo.mcore.shard_write import PendingWrite, ShardFiles, WriteFailure, Written

_SHARDING = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


class Save:
    """A save under way: `start_save` plans it, `outcome` says how this rank's part went, `finish` ends it.

    No rank waits for another after the planning, and a failed write raises nowhere (see `shard_write.py`).
    """

    def __init__(self, plan: SavePlanned, files: ShardFiles, background: bool):
        self._plan, self._write = plan, PendingWrite(files, background)

    def outcome(self, wait: bool) -> Written | WriteFailure | None:
        """This rank's part; None while it is being written."""
        return self._write.outcome(wait)

    def abandon(self) -> None:
        self._write.abandon()

    def finish(self, results: Sequence[Sequence[WriteResult]]) -> WriteFailure | None:
        """On rank 0, when all parts are there: write which tensor lies where. `results` are those of each rank."""
        try:
            self._plan.finish(results)
        except OSError as error:
            return WriteFailure(f"{error.strerror or error} ({error.filename or self._plan.path})")
        return None


def start_save(
    chunks: Sequence[GPTModel], optimizer: ChainedOptimizer, planning: Planning, path: str | Path, background: bool
) -> Save:
    """Begin to write both into the existing, empty folder `path`. Collective; writes nothing before it returns
    but, without `background`, this rank's own files. `planning` is the same for all saves of these two."""
    _make_adam_state(optimizer)
    state = _sharded_state(chunks, optimizer, loading=False)
    sharded, common = save_preprocess(state, validate_access_integrity=False)  # `planning` validates
    plan = planning.plan(sharded, common, Path(path))
    files = ShardFiles(plan.buckets, (Path(path) / "common.pt", common) if dist.get_rank() == 0 else None)
    return Save(plan, files, background)


def load(chunks: Sequence[GPTModel], optimizer: ChainedOptimizer, path: str | Path) -> None:
    """Read what was saved, also on another layout. Collective."""
    _make_adam_state(optimizer)
    state = load_sharded(_sharded_state(chunks, optimizer, loading=True), path, read_metadata(Path(path)))
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
    with _without_copies(optimizer):
        return models | {"optimizer": optimizer.sharded_state_dict(shards, is_loading=loading, metadata=metadata)}


@contextmanager
def _without_copies(optimizer: ChainedOptimizer) -> Iterator[None]:
    """Where no data parallelism splits the optimizer's state, hand out the state itself.

    Megatron would gather it over a group of one, in four copies; that was most of a save's pause. It also runs the
    garbage collector, which here finds all objects there were before exempt: nothing is lost, since it runs by itself.
    """
    alone = [p for p in optimizer.chained_optimizers if isinstance(p, DistributedOptimizer) and _is_alone(p)]
    for part in alone:
        part.get_parameter_state_dp_zero = partial(_own_state, part)  # type: ignore[method-assign]
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        for part in alone:
            del part.get_parameter_state_dp_zero


def _is_alone(part: DistributedOptimizer) -> bool:
    return part.data_parallel_group.size() == 1


def _own_state(part: DistributedOptimizer, **_: Any) -> dict[Any, Any]:
    """What `DistributedOptimizer.get_parameter_state_dp_zero` gives, without copying."""
    state: dict[Any, Any] = {"buckets_coalesced": True}
    for index, buffer in enumerate(part.buffers):
        starts = {start: param for param, (start, _, _) in buffer.param_index_map.items()}
        by_start = {start: part._get_main_param_and_optimizer_states(param) for start, param in starts.items()}
        (dtype,) = part.gbuf_ranges[index]
        state[index] = {
            dtype: {
                name: _Slices({start: tensors[name].detach().view(-1) for start, tensors in by_start.items()})
                for name in ("param", "exp_avg", "exp_avg_sq")
            }
        }
    return state


class _Slices:
    """Answers for a flat buffer, of which only the slices of whole parameters are asked for."""

    def __init__(self, by_start: dict[int, torch.Tensor]):
        self._by_start = by_start

    def __getitem__(self, where: slice) -> torch.Tensor:
        return self._by_start[where.start]


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
    """Let the optimizer load a parameter's state that comes without `step`, which has been set for all by then, and
    leave in place what was read into place."""
    plain = DistributedOptimizer._set_main_param_and_optimizer_states

    def with_step(model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group, order = optimizer.model_param_group_index_map[model_param]
        main = optimizer.optimizer.param_groups[group]["params"][order]
        own = optimizer.optimizer.state[main]
        places = {"param": main} | own
        if all(tensor.data_ptr() == places[name].data_ptr() for name, tensor in tensors.items()):
            return
        plain(optimizer, model_param, {"step": own["step"], **tensors})

    optimizer._set_main_param_and_optimizer_states = with_step  # type: ignore[method-assign]
