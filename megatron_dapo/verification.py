"""Whether a Hugging Face checkpoint and a Megatron one are the same model: bit by bit, and on a probe prompt.

The first finds a weight that went astray; the second also a config that says something else than what was trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoTokenizer

from megatron_dapo.mcore.dist_read import DistReader
from megatron_dapo.mcore.families import ModelShape
from megatron_dapo.mcore.families.names import hf_shapes
from megatron_dapo.mcore.hf_read import HfReader
from megatron_dapo.types import CheckpointError

# Told of what goes on: (what, bytes done since the last call, bytes in all).
Progress = Callable[[str, int, int], None]

PROBE = "The sum of 12 and 30 is 42. Q: What is 7 * 8? A: Let me think step by step."
LOGIT_TOLERANCE = 1e-4  # of the largest logit; two implementations in fp32 differ by 1e-7 to 1e-5 of it


def verify(hf: Path, model: Path, shape: ModelShape, rounded_to: torch.dtype | None, progress: Progress) -> None:
    """Compare the two; `rounded_to` is the type that the Hugging Face side was rounded to, None if it was not.

    Raises:
        CheckpointError: with the first tensor, or the place of the logit, that differs.
    """
    compare_tensors(hf, model, shape, progress)
    from megatron_dapo.mcore.probe import hf_logits, megatron_logits  # imports Megatron, which costs seconds

    tokenizer = AutoTokenizer.from_pretrained(hf, local_files_only=True)
    token_ids: list[int] = tokenizer(PROBE)["input_ids"]  # type: ignore[assignment]
    compare_logits(megatron_logits(model, shape, token_ids, rounded_to), hf_logits(hf, token_ids))


def compare_tensors(hf: Path, model: Path, shape: ModelShape, progress: Progress) -> None:
    """Raises CheckpointError where a tensor is not the same to the last bit, rounded to the type that `hf` has."""
    reader, shapes = DistReader(model, shape), hf_shapes(shape)
    with HfReader(hf, shapes) as saved:
        total = sum(math.prod(dims) * saved.dtype(name).itemsize for name, dims in shapes.items())
        for name, tensor in reader.hf_tensors():
            there = saved.tensor(name)
            if not torch.equal(there.view(torch.uint8), tensor.to(there.dtype).view(torch.uint8)):  # NaN equals itself
                raise CheckpointError(f"verification failed: tensor {name} of {hf} is not the one of {model}")
            progress("comparing", there.nbytes, total)


def compare_logits(megatron: torch.Tensor, transformers: torch.Tensor) -> None:
    """[T, V] each. Raises CheckpointError with the place of the largest difference, if it is too large."""
    gap = (megatron - transformers[:, : megatron.size(1)]).abs()
    largest = transformers.abs().max().item()
    if not bool(gap.max() <= LOGIT_TOLERANCE * largest):  # so written, NaN fails too
        position, token = divmod(int(gap.nan_to_num(torch.inf).argmax()), gap.size(1))
        raise CheckpointError(
            f"verification failed: after {position + 1} of {len(gap)} probe tokens the logit of token {token} is "
            f"{megatron[position, token]:.6g} in Megatron and {transformers[position, token]:.6g} in transformers; "
            f"wanted within {LOGIT_TOLERANCE:g} of the largest, {largest:.4g}"
        )
