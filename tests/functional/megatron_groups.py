"""One layout after the other in ranks that live through all of them."""

from __future__ import annotations

import torch.distributed as dist

import megatron_dapo.mcore  # noqa: F401  # the CPU device that Megatron wants at its import

# isort: split
from megatron.core import parallel_state


def forget_layout() -> None:
    """Take the process groups of a layout away, all but the world's. Collective.

    Megatron only forgets them: gloo's threads, two a group, would go on for as long as the rank lives.
    """
    dist.barrier()
    parallel_state.destroy_model_parallel()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
