"""Memory in use, of this process and of its GPU."""

from __future__ import annotations

import resource
import sys

import psutil
import torch

GIB = 2**30


def memory_metrics() -> dict[str, float]:
    """`memory/...` in GiB: resident now and the most since the start; on a GPU, PyTorch's peaks since the last call."""
    peak_unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes on macOS, KiB on Linux
    metrics = {
        "memory/resident": psutil.Process().memory_info().rss / GIB,
        "memory/resident_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * peak_unit / GIB,
    }
    if torch.cuda.is_available():
        metrics["memory/gpu_allocated_peak"] = torch.cuda.max_memory_allocated() / GIB
        metrics["memory/gpu_reserved_peak"] = torch.cuda.max_memory_reserved() / GIB
        torch.cuda.reset_peak_memory_stats()
    return metrics
