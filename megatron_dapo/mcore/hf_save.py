"""A Hugging Face checkpoint on disk: safetensors in shards with an index, config, generation config, tokenizer.

Tensors stream through: the writing rank holds one shard at a time, the others one tensor.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_dapo.progress import PROGRESS

SHARD_BYTES = 5 * 10**9
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.model",
    "chat_template*",
    "additional_chat_templates",
)
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
        copy_side_files(source, path, dtype)
        if len(set(files.values())) > 1:
            total = sum(math.prod(dims) for dims in shapes.values()) * dtype.itemsize
            index = {"metadata": {"total_size": total}, "weight_map": files}
            (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    held: dict[str, torch.Tensor] = {}
    current = None
    for name, tensor in tensors:
        if writes:
            if current is not None and files[name] != current:
                _write(held, path / current)
                held = {}
            current = files[name]
            held[name] = tensor.to("cpu", dtype).contiguous()
    if writes and current is not None:
        _write(held, path / current)


@PROGRESS.patient("a file of weights is written")
def _write(tensors: dict[str, torch.Tensor], file: Path) -> None:
    save_file(tensors, file, _FORMAT)


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


def copy_side_files(source: str | Path, path: Path, dtype: torch.dtype | None = None) -> None:
    """All of a checkpoint but its weights, byte for byte, into the existing folder `path`.

    With `dtype`, config.json names that type.

    Copied, not loaded and saved again: another version of transformers would write other keys, and lose what it does
    not know.
    """
    for pattern in SIDE_FILES:
        for file in Path(source).glob(pattern):
            if file.is_dir():
                shutil.copytree(file, path / file.name, dirs_exist_ok=True)
            else:
                shutil.copyfile(file, path / file.name)
    if dtype is None:
        return
    file = path / "config.json"
    config = json.loads(file.read_text())
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    if config.get(key) != (name := str(dtype).removeprefix("torch.")):
        file.write_text(json.dumps(config | {key: name}, indent=2) + "\n")
