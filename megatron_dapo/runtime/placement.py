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
    """Ranks on a cluster: `nodes` times as many as one node holds, with GPUs, or CPUs where there are no GPUs."""

    nodes: int
    ranks_per_node: int
    device: Literal["GPU", "CPU"]
    devices_per_rank: int = 1  # an engine over several GPUs is one rank

    @property
    def size(self) -> int:
        return self.nodes * self.ranks_per_node

    def bundles(self) -> list[dict[str, float]]:
        """What each node has to give. A bundle lies on one node, so tensor parallelism stays inside it."""
        share = {name: number * self.ranks_per_node for name, number in self.of_a_rank().items()}
        return [dict(share) for _ in range(self.nodes)]

    def of_a_rank(self) -> dict[str, float]:
        """What one rank takes."""
        cpus: dict[str, float] = {"CPU": self.devices_per_rank}
        return cpus | {"GPU": self.devices_per_rank} if self.device == "GPU" else cpus

    def environment(self, rank: int, address: str, port: int) -> dict[str, str]:
        """What torchrun would set for `rank`, of those variables that torch and Megatron read.

        The store at `address` is served already, so no rank starts it. LOCAL_RANK counts the devices that the process
        sees, and of GPUs Ray shows it its own.
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


def no_room(wanted: Sequence[Placement], nodes: Sequence[Resources], free: Resources, seconds: float) -> str:
    """The message of placements that were not satisfied together in `seconds`.

    Args:
        nodes: all that each node of the cluster has.
        free: what nobody uses now, summed over the nodes.
    """
    there = "; ".join(f"node {number}: {_words(node)}" for number, node in enumerate(nodes)) or "no node"
    return (
        f"no room for {sum(each.size for each in wanted)} ranks within {seconds:g} s. "
        f"Wanted: {' and '.join(f'{w.nodes} x ({_words(w.bundles()[0])})' for w in wanted)}, each on one node. "
        f"The cluster has {there}. Free now: {_words(free)}. "
        "Wait for other runs to end, add nodes, or lower trainer.nnodes and trainer.n_gpus_per_node (and those of "
        "actor_rollout_ref.rollout and .ref where they have actors of their own); "
        "runtime.placement_timeout says how long to wait"
    )


def _words(resources: Resources) -> str:
    return ", ".join(f"{resources.get(name, 0):g} {name}" for name in SHOWN)
