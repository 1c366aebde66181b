"""How many ranks are wanted where, in numbers: what `ray.py` asks the scheduler for, and what it says without room.

Nothing here imports Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Resources = Mapping[str, float]
SHOWN = ("CPU", "GPU")


class PlacementError(RuntimeError):
    """The cluster had no room for the ranks in time: names what was wanted and what there is."""


@dataclass(frozen=True)
class Placement:
    """Ranks on a cluster: `nodes` times as many as one node holds, one GPU each, or one CPU where there are no GPUs."""

    nodes: int
    ranks_per_node: int
    device: Literal["GPU", "CPU"]

    @property
    def size(self) -> int:
        return self.nodes * self.ranks_per_node

    def bundles(self) -> list[dict[str, float]]:
        """What each node has to give. A bundle lies on one node, so tensor parallelism stays inside it."""
        share: dict[str, float] = {"CPU": self.ranks_per_node}
        if self.device == "GPU":
            share["GPU"] = self.ranks_per_node
        return [dict(share) for _ in range(self.nodes)]

    def environment(self, rank: int, address: str, port: int) -> dict[str, str]:
        """What torchrun would set for `rank`, of those variables that torch and Megatron read.

        The store at `address` is served already, so no rank starts it. LOCAL_RANK counts the devices that the process
        sees, and of GPUs Ray shows it one.
        """
        local_rank = 0 if self.device == "GPU" else rank % self.ranks_per_node
        return {
            "RANK": str(rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_RANK": str(local_rank),
            "LOCAL_WORLD_SIZE": str(self.ranks_per_node),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }


def no_room(wanted: Placement, nodes: Sequence[Resources], free: Resources, seconds: float) -> str:
    """The message of a placement that was not satisfied in `seconds`.

    Args:
        nodes: all that each node of the cluster has.
        free: what nobody uses now, summed over the nodes.
    """
    there = "; ".join(f"node {number}: {_words(node)}" for number, node in enumerate(nodes)) or "no node"
    return (
        f"no room for {wanted.size} ranks within {seconds:g} s. "
        f"Wanted: {wanted.nodes} x ({_words(wanted.bundles()[0])}), each on one node. "
        f"The cluster has {there}. Free now: {_words(free)}. "
        "Wait for other runs to end, add nodes, or lower trainer.nnodes and trainer.n_gpus_per_node; "
        "runtime.placement_timeout says how long to wait"
    )


def _words(resources: Resources) -> str:
    return ", ".join(f"{resources.get(name, 0):g} {name}" for name in SHOWN)
