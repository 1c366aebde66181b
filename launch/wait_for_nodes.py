"""Wait until all nodes of a job are part of its Ray cluster: wait_for_nodes.py ADDRESS SECONDS NAME...

Prints how many are wanted and how many are present whenever that changes, and at the end what they have. Exit code 1
if they are not all there in time: it names those that are missing.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray

BETWEEN_LOOKS = 1.0  # seconds


def main(address: str, seconds: float, wanted: Sequence[str]) -> int:
    deadline = time.monotonic() + seconds
    connect(address, deadline)
    said = ""
    while True:
        nodes = {node["NodeName"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        if (line := report(wanted, nodes)) != said:
            print(said := line, flush=True)
        if nodes.keys() >= set(wanted):
            return 0
        if time.monotonic() > deadline:
            print(f"not all nodes came within {seconds:g} s: see their logs", file=sys.stderr)
            return 1
        time.sleep(BETWEEN_LOOKS)


def connect(address: str, deadline: float) -> None:
    """The head may listen before its node takes drivers."""
    while True:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            return
        except (ConnectionError, RuntimeError):
            if time.monotonic() > deadline:
                raise
            time.sleep(BETWEEN_LOOKS)


def report(wanted: Sequence[str], nodes: Mapping[str, Mapping[str, Any]]) -> str:
    """
    Args:
        nodes: name -> resources, of those that are present.
    """
    present = [name for name in wanted if name in nodes]
    total = {kind: sum(nodes[name].get(kind, 0) for name in present) for kind in ("CPU", "GPU")}
    missing = " ".join(name for name in wanted if name not in nodes)
    return f"nodes wanted: {len(wanted)}, present: {len(present)} ({total['CPU']:g} CPU, {total['GPU']:g} GPU)" + (
        f"; missing: {missing}" if missing else ""
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], float(sys.argv[2]), sys.argv[3:]))
