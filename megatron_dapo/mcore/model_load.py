"""The model's part of a checkpoint into Megatron's model, on any layout: of a run, or as the conversion writes it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.models.gpt import GPTModel

from megatron_dapo.mcore.dist_load import load_sharded
from megatron_dapo.mcore.dist_read import check_model
from megatron_dapo.mcore.families import ModelShape
from megatron_dapo.mcore.safe_load import refuse_foreign_pickles
from megatron_dapo.types import CheckpointError


def load_model(chunks: Sequence[GPTModel], shape: ModelShape, folder: str | Path) -> None:
    """Fill this rank's parameters from the `torch_dist` checkpoint in `folder`. Collective.

    Extra states (Transformer Engine's fp8 scales) are left as they are.

    Raises:
        CheckpointError: it is of another model, or holds pickles that are refused.
    """
    metadata = refuse_foreign_pickles(folder)
    check_model(Path(folder), metadata, shape)
    wanted = {str(i): _tensors_only(chunk.sharded_state_dict()) for i, chunk in enumerate(chunks)}
    state = load_sharded(wanted, folder, metadata)
    for i, chunk in enumerate(chunks):
        missing, unexpected = chunk.load_state_dict(state[str(i)], strict=False)
        lost = [name for name in missing if not name.endswith("_extra_state")] + list(unexpected)
        if tied := [name for name in lost if name == "output_layer.weight" and shape.tied]:
            lost = [name for name in lost if name not in tied]  # the embedding, which has been loaded
        if lost:
            raise CheckpointError(f"{folder} and the model do not agree about {', '.join(lost)}")


def _tensors_only(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if not isinstance(value, ShardedObject)}
