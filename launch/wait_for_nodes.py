"""Wait until all nodes of a job are part of its Ray cluster: wait_for_nodes.py ADDRESS SECONDS NAME...

Prints how many are wanted and how many are present whenever that changes, and what they have. Exit code 1 if they are
not all there in time: it names those that are missing.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray

BETWEEN_LOOKS = 1.0  # seconds
Nodes = Mapping[str, Mapping[str, Any]]  # name -> resources, of those that are present


def main(address: str, seconds: float, wanted: Sequence[str]) -> int:
    deadline = time.monotonic() + seconds
    connect(address, deadline)
    if await_nodes(wanted, present_nodes, deadline):
        return 0
    print(f"not all nodes came within {seconds:g} s: see their logs", file=sys.stderr)
    return 1


def connect(address: str, deadline: float) -> None:
    """The head may listen before its node takes drivers. Raises what Ray does when it does not until `deadline`."""
    while True:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            return
        except (ConnectionError, RuntimeError):
            if time.monotonic() > deadline:
                raise
            time.sleep(BETWEEN_LOOKS)


def await_nodes(wanted: Sequence[str], look: Callable[[], Nodes], deadline: float) -> bool:
    """Whether all nodes of `wanted` came until `deadline`."""
    said = ""
    while True:
        nodes = look()
        if (line := report(wanted, nodes)) != said:
            print(said := line, flush=True)
        if nodes.keys() >= set(wanted):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(BETWEEN_LOOKS)


def present_nodes() -> Nodes:
    return {node["NodeName"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


def report(wanted: Sequence[str], nodes: Nodes) -> str:
    present = [name for name in wanted if name in nodes]
    total = {kind: sum(nodes[name].get(kind, 0) for name in present) for kind in ("CPU", "GPU")}
    missing = " ".join(name for name in wanted if name not in nodes)
    return f"nodes wanted: {len(wanted)}, present: {len(present)} ({total['CPU']:g} CPU, {total['GPU']:g} GPU)" + (
        f"; missing: {missing}" if missing else ""
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], float(sys.argv[2]), sys.argv[3:]))
