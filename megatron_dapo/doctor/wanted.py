"""What a configuration wants of the machine; without one, what any run on this machine would."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_dapo.config.tree import RunConfig

# AdamW in mixed precision: weights and master weights, two moments (docs/checkpoints.md); bytes a parameter.
CHECKPOINT_BYTES = 14
STORED_BYTES = 2  # a parameter in the Hugging Face checkpoint; those in float32 only make the estimate too high


@dataclass(frozen=True)
class Wanted:
    engine: str | None  # a server that must start; None: not known
    ray: bool
    ray_address: str | None
    nodes: int
    gpus_per_node: int | None  # None: not known
    output: Path  # a run's folder
    checkpoint_bytes: int  # of one checkpoint; 0: not known
    checkpoints: int  # that lie there at once
    bucket_bytes: int  # of shared memory, on each rank


UNKNOWN = Wanted(
    engine=None,
    ray=False,
    ray_address=None,
    nodes=1,
    gpus_per_node=None,
    output=Path("."),
    checkpoint_bytes=0,
    checkpoints=0,
    bucket_bytes=0,
)


def wanted_by(config: RunConfig, ray_address: str | None) -> Wanted:
    """
    Args:
        ray_address: of the environment, which the configuration's goes before.
    """
    trainer, rollout = config.trainer, config.actor_rollout_ref.rollout
    stored = sum(path.stat().st_size for path in Path(config.actor_rollout_ref.model.path).glob("*.safetensors"))
    return Wanted(
        engine=None if rollout.name == "torch" else rollout.name,
        ray=config.runtime.name == "ray",
        ray_address=config.runtime.address or ray_address,
        nodes=trainer.nnodes or 1,
        gpus_per_node=trainer.n_gpus_per_node,
        output=Path(trainer.default_local_dir),
        checkpoint_bytes=stored // STORED_BYTES * CHECKPOINT_BYTES,
        checkpoints=(trainer.save_total_limit or 1) + 1,
        bucket_bytes=rollout.weight_sync.bucket_bytes if rollout.name != "torch" else 0,
    )
