"""A Hugging Face checkpoint's safetensors: all tensors in turn, or slices of named ones.

Knows neither Megatron nor ranks. Every error names the file and the tensor.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_dapo.mcore.families.names import Piece
from megatron_dapo.types import CheckpointError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_OPEN_FILES = 2
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # by the names of safetensors


def read_hf(path: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every tensor in the safetensors of `path`, one at a time.

    Raises:
        CheckpointError: a missing or broken file.
    """
    by_file: dict[Path, list[str]] = defaultdict(list)
    for name, file in _tensor_files(Path(path)).items():
        by_file[file].append(name)
    for file, names in by_file.items():
        with _opened(file) as handle:
            for name in names:
                yield name, handle.get_tensor(name)


@dataclass
class HfReader:
    """Slices of named tensors out of one safetensors file or several.

    At most `_OPEN_FILES` of them are open at once: an open one is mapped into memory, and its pages count as used.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]

    def __enter__(self) -> HfReader:
        self._open: dict[Path, Any] = {}  # the one used last stands last
        self._file_of = _tensor_files(self.path)
        for name, wanted in self.shapes.items():
            self._check(name, wanted)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._open.values():
            handle.__exit__(None, None, None)

    def read(self, piece: Piece, dims: int) -> torch.Tensor:
        return self._handle(piece.hf_name).get_slice(piece.hf_name)[piece.hf_index(dims)]

    def without_use(self) -> list[str]:
        """Tensors of the checkpoint that the model does not have: its config.json is of another model.

        A tied head that is stored all the same, and rotary tables (computed here), are no such ones.
        """
        known = {*self.shapes, "lm_head.weight"}
        return [name for name in self._file_of if name not in known and not name.endswith("rotary_emb.inv_freq")]

    def tensor(self, name: str) -> torch.Tensor:
        return self._handle(name).get_tensor(name)

    def dtype(self, name: str) -> torch.dtype:
        found = self._handle(name).get_slice(name).get_dtype()
        if found not in DTYPES:
            raise CheckpointError(
                f"{self._file_of[name]}: tensor {name!r} is of type {found}; wanted one of {', '.join(DTYPES)}"
            )
        return DTYPES[found]

    def _check(self, name: str, wanted: tuple[int, ...]) -> None:
        if name not in self._file_of:
            raise CheckpointError(f"{self.path} has no tensor {name!r} (wanted shape {list(wanted)})")
        found = tuple(self._handle(name).get_slice(name).get_shape())
        if found != wanted:
            raise CheckpointError(
                f"{self._file_of[name]}: tensor {name!r} has shape {list(found)}, its config.json wants {list(wanted)}"
            )

    def _handle(self, name: str) -> Any:
        file = self._file_of[name]
        handle = self._open.pop(file, None) or _opened(file)
        if len(self._open) >= _OPEN_FILES:
            self._open.pop(next(iter(self._open))).__exit__(None, None, None)
        self._open[file] = handle
        return handle


def _tensor_files(path: Path) -> dict[str, Path]:
    """tensor name -> the file it is in."""
    index, single = path / _INDEX, path / _SINGLE
    if not index.exists():
        if not single.exists():
            raise CheckpointError(f"{path} has neither {_SINGLE} nor {_INDEX}; wanted a Hugging Face checkpoint")
        return dict.fromkeys(_tensor_names(single), single)
    file_of = {name: path / file for name, file in _weight_map(index).items()}
    held = {}
    for file in sorted(set(file_of.values())):
        if not file.exists():
            raise CheckpointError(f"{index} names {file.name}, which is not there; fetch the checkpoint again")
        held[file] = set(_tensor_names(file))
    for name, file in file_of.items():
        if name not in held[file]:
            raise CheckpointError(f"{file} has no tensor {name!r}, which {_INDEX} says is in it")
    return file_of


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return json.loads(index.read_text())["weight_map"]
    except (json.JSONDecodeError, KeyError) as error:
        raise CheckpointError(f"{index} is no index of safetensors, it should hold weight_map: {error!r}") from error


def _tensor_names(file: Path) -> list[str]:
    with _opened(file) as handle:
        return list(handle.keys())


def _opened(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="pt")
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} ({file.stat().st_size} bytes) cannot be read as safetensors: {error}; fetch the checkpoint again"
        ) from error
