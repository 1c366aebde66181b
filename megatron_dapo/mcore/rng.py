"""The state of every random stream of this process: Python's, numpy's, torch's, CUDA's and Megatron's tracker.

As plain numbers and arrays, so that a checkpoint holds no pickle. What is left out: processes that score rewards, and
the sampling of responses, whose seeds are a function of (run seed, draw, sample).
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel


def rng_state() -> dict[str, Any]:
    """Numbers, text, lists, None and numpy arrays."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tracker = _tracker().get_states()
    return {
        "python": {"version": version, "words": np.array(words, np.uint32), "gauss": gauss},
        "numpy": {
            "kind": kind,
            "keys": np.asarray(keys, np.uint32).copy(),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state().numpy().copy(),
        "cuda": torch.cuda.get_rng_state().numpy().copy() if torch.cuda.is_available() else None,
        "tracker": {name: state.cpu().numpy().copy() for name, state in tracker.items()},
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Go on drawing where `rng_state` was taken."""
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(int(word) for word in python["words"]), python["gauss"]))
    np.random.set_state((numpy["kind"], numpy["keys"], numpy["position"], numpy["has_gauss"], numpy["cached"]))
    torch.set_rng_state(_tensor(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(state["cuda"]))
    tracker = _tracker()
    tracker.set_states({name: _tensor(values) for name, values in state["tracker"].items()})


def _tracker() -> Any:
    """Megatron's named streams of this rank: some differ between tensor-parallel ranks, some do not."""
    return tensor_parallel.get_cuda_rng_tracker()


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(values, np.uint8))
