"""Mistakes of the kind that the layout matrix exists to catch, planted into the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from megatron_dapo.mcore import optimizer as mcore_optimizer
from megatron_dapo.types import MicroBatch, PlannedMicroBatch
from megatron_dapo.workers import policy

# isort: split
# Megatron needs the CPU device that importing megatron_dapo.mcore installs.
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads


def weights_off_by_one(micro_batch: MicroBatch | PlannedMicroBatch) -> MicroBatch:
    terms = micro_batch.terms
    return MicroBatch(micro_batch.sequences, replace(terms, weight=np.roll(terms.weight, 1)))


def old_logp_off_by_one(micro_batch: MicroBatch | PlannedMicroBatch) -> MicroBatch:
    terms = micro_batch.terms
    assert terms.old_logp is not None
    return MicroBatch(micro_batch.sequences, replace(terms, old_logp=np.roll(terms.old_logp, 1)))


DATA_FAULTS = {
    "weights off by one sequence": weights_off_by_one,
    "old log-probs off by one token": old_logp_off_by_one,
}


@contextmanager
def planted(fault: str | None) -> Iterator[None]:
    """The fault is there for as long as the context is; faults of the data are the caller's."""
    if fault not in _FAULTS:
        yield
        return
    module, name, faulty = _FAULTS[fault]
    sound = getattr(module, name)
    setattr(module, name, faulty)
    try:
        yield
    finally:
        setattr(module, name, sound)


def _finalize_without(part: str) -> Callable[..., None]:
    def finalize(*args: Any, **kwargs: Any) -> None:
        namespace = finalize_model_grads.__globals__
        kept = namespace[part]
        namespace[part] = lambda *a, **k: None
        try:
            finalize_model_grads(*args, **kwargs)
        finally:
            namespace[part] = kept

    return finalize


def _finalize_divided(model: Any, *args: Any, **kwargs: Any) -> None:
    finalize_model_grads(model, *args, **kwargs)
    for chunk in model:
        chunk.scale_gradients(1.0 / parallel_state.get_context_parallel_world_size())


def _finalize_first_chunk(model: Any, *args: Any, **kwargs: Any) -> None:
    finalize_model_grads(model[:1], *args, **kwargs)


def _load_swapped(chunks: Any, *args: Any) -> None:
    for chunk, number in zip(chunks, reversed(range(len(chunks))), strict=True):
        for layer, other in zip(chunk.decoder.layers, chunks[number].decoder.layers, strict=True):
            layer.fault_number = other.layer_number
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            layer.layer_number = layer.fault_number
    _load_hf(chunks, *args)


_load_hf = policy.load_hf
_FAULTS: dict[str | None, tuple[Any, str, Callable[..., Any]]] = {
    "missing sequence-parallel reduction": (
        mcore_optimizer,
        "finalize_model_grads",
        _finalize_without("_allreduce_non_tensor_model_parallel_grads"),
    ),
    "unsynchronised tied embedding": (
        mcore_optimizer,
        "finalize_model_grads",
        _finalize_without("_allreduce_word_embedding_grads"),
    ),
    "extra division by context-parallel size": (mcore_optimizer, "finalize_model_grads", _finalize_divided),
    "gradients of the first chunk alone reduced": (mcore_optimizer, "finalize_model_grads", _finalize_first_chunk),
    "interleaved chunks in the wrong order": (policy, "load_hf", _load_swapped),
    "weights not gathered": (policy, "gather_parameters", lambda *unused: None),
}
