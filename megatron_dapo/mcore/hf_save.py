"""A Hugging Face checkpoint on disk: safetensors in shards with an index, config, generation config, tokenizer.

Tensors stream through: the writing rank holds one shard at a time, the others one tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

SHARD_BYTES = 5 * 10**9
_FORMAT = {"format": "pt"}


def save_hf(
    tensors: Iterator[tuple[str, torch.Tensor]],
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    source: str,
    path: Path,
    writes: bool,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `tensors` (in the order of `shapes`) to `path`; the rest is copied from the checkpoint at `source`.

    Collective, because `tensors` is: every rank calls it and consumes all tensors; the one with `writes` writes.
    Weights that lie at `path` already are removed first: other shards or an index would be read with the new ones.
    """
    files = _assign(shapes, dtype.itemsize, shard_bytes)
    if writes:
        path.mkdir(parents=True, exist_ok=True)
        for old in path.glob("model*.safetensors*"):
            old.unlink()
        _write_side_files(source, path, dtype)
        if len(set(files.values())) > 1:
            total = sum(math.prod(dims) for dims in shapes.values()) * dtype.itemsize
            index = {"metadata": {"total_size": total}, "weight_map": files}
            (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    held: dict[str, torch.Tensor] = {}
    current = None
    for name, tensor in tensors:
        if writes:
            if current is not None and files[name] != current:
                save_file(held, path / current, _FORMAT)
                held = {}
            current = files[name]
            held[name] = tensor.to("cpu", dtype).contiguous()
    if writes and current is not None:
        save_file(held, path / current, _FORMAT)


def _assign(shapes: dict[str, tuple[int, ...]], element_size: int, shard_bytes: int) -> dict[str, str]:
    """tensor name -> the file it goes to, in order, each of at most `shard_bytes` unless one tensor is larger."""
    shard_of, number, filled = {}, 0, 0
    for name, dims in shapes.items():
        size = math.prod(dims) * element_size
        if filled and filled + size > shard_bytes:
            number, filled = number + 1, 0
        shard_of[name] = number
        filled += size
    if number == 0:
        return dict.fromkeys(shapes, "model.safetensors")
    return {name: f"model-{shard + 1:05d}-of-{number + 1:05d}.safetensors" for name, shard in shard_of.items()}


def _write_side_files(source: str, path: Path, dtype: torch.dtype) -> None:
    config = AutoConfig.from_pretrained(source)
    config.dtype = dtype
    config.save_pretrained(path)
    AutoTokenizer.from_pretrained(source).save_pretrained(path)
    if (Path(source) / "generation_config.json").exists():
        GenerationConfig.from_pretrained(source).save_pretrained(path)
