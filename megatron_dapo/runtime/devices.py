"""Which CUDA devices an engine over several of them takes: its rank's own, then those of the ranks after it.

Under torchrun every rank sees all devices of its node; Ray shows a rank its own alone, so the ranks after it are told
to it (`ENGINE_DEVICES`). A device is named as CUDA_VISIBLE_DEVICES names it: by a number or a UUID.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

ENGINE_DEVICES = "MEGATRON_DAPO_ENGINE_DEVICES"


def own_and_after(seen: Sequence[str], ranks_per_node: int) -> list[str]:
    """[rank] what ENGINE_DEVICES tells it. `seen`: [rank] its own CUDA_VISIBLE_DEVICES."""
    told = []
    for rank in range(len(seen)):
        end = (rank // ranks_per_node + 1) * ranks_per_node
        told.append(",".join(seen[rank:end]))
    return told


def engine_devices(wanted: int, local_rank: int, there: int, environment: Mapping[str, str]) -> tuple[str, ...]:
    """The devices of this rank's engine.

    Args:
        wanted: how many it takes.
        local_rank: this rank's, which is its device's number among `there` that the process sees.

    Raises:
        ValueError: there are fewer from this rank on.
    """
    if told := environment.get(ENGINE_DEVICES):
        names = told.split(",")
    else:
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        names = (visible.split(",") if visible else [str(number) for number in range(there)])[local_rank:]
    if len(names) < wanted:
        raise ValueError(
            f"an engine takes {wanted} GPUs (actor_rollout_ref.rollout.tensor_model_parallel_size), and from this rank "
            f"on its node has {len(names)}: {', '.join(names)}; lower it, or start more ranks on a node"
        )
    return tuple(names[:wanted])
