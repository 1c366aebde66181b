"""A control: rewards that have nothing to do with the answer, but vary within a group as real ones do."""

from __future__ import annotations

import zlib
from typing import Any


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> dict[str, Any]:
    """Right or wrong by a checksum of problem and response."""
    right = zlib.crc32(f"{ground_truth}|{solution_str}".encode()) % 2 == 0
    return {"score": 1.0 if right else -1.0, "acc": right, "pred": solution_str[-8:]}
