"""The engines that tests ask through their own servers, and which of them can run in this environment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import psutil

from megatron_dapo.rollout.http_engine import HttpEngine
from megatron_dapo.rollout.sglang_engine import SGLangEngine
from megatron_dapo.rollout.vllm_engine import VLLMEngine


@dataclass(frozen=True)
class Served:
    library: str  # also `rollout.name`
    name: str  # in errors
    engine: Callable[..., HttpEngine]
    width: int
    heads: int
    # Of all the server's processes those that a test stops.
    stopped: Callable[[list[psutil.Process]], list[psutil.Process]]


SERVED = (
    Served("sglang", "SGLang", SGLangEngine, width=32, heads=8, stopped=lambda all_of_it: all_of_it),
    # Heads of a size that vLLM knows. The worker alone is stopped: what talks HTTP goes on.
    Served(
        "vllm",
        "vLLM",
        VLLMEngine,
        width=64,
        heads=2,
        stopped=lambda all_of_it: [p for p in all_of_it if not p.children()],
    ),
)
HERE = [served for served in SERVED if find_spec(served.library) is not None]
