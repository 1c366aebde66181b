"""Small whole checkpoints, without a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_dapo.checkpoints.checksums import write_checksums
from megatron_dapo.checkpoints.meta import Identity, describe, write_meta
from megatron_dapo.checkpoints.state_file import write_state
from megatron_dapo.checkpoints.store import CheckpointStore

IDENTITY = Identity(
    layout={"world_size": 1, "tp_size": 1},
    model={"family": "qwen2", "vocab_size": 90},
    training={"params_dtype": "float32"},
)
Publish = Callable[..., Path]


def draft_of(store: CheckpointStore, step: int, weights: bytes = b"weights", sequence: int = 1) -> Path:
    draft = store.begin(step)
    (draft / "megatron" / "__0_0.distcp").write_bytes(weights)
    known = write_state(draft, {"step": step})
    known["meta.json"] = write_meta(draft, describe(IDENTITY, sequence, step))
    write_checksums(draft, known)
    return draft
