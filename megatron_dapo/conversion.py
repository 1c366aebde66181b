"""Hugging Face checkpoints into Megatron's format and back, in one process, a few tensors in memory at a time.

The Megatron side is what a run's checkpoints hold (`torch_dist`), so any tensor, pipeline and data-parallel layout
reads it. Nothing is seen at the output's path before all of it is written, and with `verify` proven: it is made
beside it and renamed at the end, or removed.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from megatron_dapo import __version__
from megatron_dapo.manifest import (
    FORMAT,
    MODEL,
    SIDE,
    Stored,
    check_backend,
    find_faults,
    read_checksums,
    read_meta,
    write_manifest,
)
from megatron_dapo.mcore.dist_read import DistReader
from megatron_dapo.mcore.dist_write import write_model
from megatron_dapo.mcore.families import ModelShape, shape_of
from megatron_dapo.mcore.families.names import hf_shapes
from megatron_dapo.mcore.hf_read import HfReader
from megatron_dapo.mcore.hf_save import SHARD_BYTES, copy_side_files, save_hf
from megatron_dapo.types import CheckpointError
from megatron_dapo.verification import Progress, verify

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Conversion:
    """How to convert. `shard_bytes`: the most that one file holds, unless a single tensor is larger."""

    shard_bytes: int = SHARD_BYTES
    verify: bool = False
    progress: Progress = lambda what, count, total: None


def hf_to_megatron(source: Path, out: Path, how: Conversion) -> None:
    """Write the Hugging Face checkpoint in `source` as a Megatron checkpoint to `out`, each tensor in its own type.

    `out` also gets config and tokenizer (`model_config/`), so that it converts back without `source`, and `meta.json`
    and checksums.

    Raises:
        CheckpointError: a file or tensor that is missing, damaged or of another model; a result that is not the same.
        ConfigError: a model that is not supported.
    """
    with _publishing(out) as folder:
        shape = _model_of(source)
        with HfReader(source, hf_shapes(shape)) as hf:
            if strangers := hf.without_use():
                raise CheckpointError(
                    f"{source} holds {', '.join(strangers[:3])}, which the model of its config.json does not have; "
                    "the two do not belong together"
                )
            sizes = {name: math.prod(dims) * hf.dtype(name).itemsize for name, dims in hf_shapes(shape).items()}
            total, dtype = sum(sizes.values()), hf.dtype(next(iter(sizes)))
            _check_space(out, total)
            (folder / MODEL).mkdir()
            (folder / SIDE).mkdir()
            write_model(hf, shape, folder / MODEL, how.shard_bytes, lambda count: how.progress("writing", count, total))
        copy_side_files(source, folder / SIDE)
        write_manifest(folder, _meta(shape, dtype))
        if how.verify:
            verify(source, folder / MODEL, shape, None, how.progress)


def megatron_to_hf(
    stored: Stored, out: Path, how: Conversion, model: Path | None = None, dtype: torch.dtype | None = None
) -> None:
    """Write the model of a Megatron checkpoint, of a run or converted, as a Hugging Face checkpoint to `out`.

    Config and tokenizer come from `model`; None: from the checkpoint itself. `dtype` None: as it is stored.

    Raises:
        CheckpointError: a file that is missing or not what its checksum says, a checkpoint of another model than
            the config's, a newer format; a result that is not the same.
        ConfigError: a model that is not supported.
    """
    with _publishing(out) as folder:
        read_meta(stored.root)  # refuses a newer format
        check_backend(stored.model)
        side = model or _side_files(stored.root)
        shape = _model_of(side)
        _check_files(stored, how.progress)
        reader, shapes = DistReader(stored.model, shape), hf_shapes(shape)
        dtype = dtype or _only(reader.dtypes(), stored.model)
        total = sum(math.prod(dims) for dims in shapes.values()) * dtype.itemsize
        _check_space(out, total)
        tensors = _counted(reader.hf_tensors(), dtype, total, how.progress)
        save_hf(tensors, shapes, dtype, str(side), folder, writes=True, shard_bytes=how.shard_bytes)
        if how.verify:
            verify(folder, stored.model, shape, dtype, how.progress)


def _counted(
    tensors: Iterator[tuple[str, torch.Tensor]], dtype: torch.dtype, total: int, progress: Progress
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors:
        yield name, tensor
        progress("writing", tensor.numel() * dtype.itemsize, total)


def _model_of(folder: Path) -> ModelShape:
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json; wanted the folder of a Hugging Face checkpoint")
    return shape_of(AutoConfig.from_pretrained(folder, local_files_only=True))


def _side_files(root: Path) -> Path:
    """The folder with config and tokenizer: of the checkpoint, or of the run whose `checkpoints/` it is in."""
    folders = (root / SIDE, root.absolute().parent.parent / SIDE)
    for folder in folders:
        if (folder / "config.json").is_file():
            return folder
    raise CheckpointError(
        f"there is no config.json in {' or '.join(map(str, folders))}; "
        "name the Hugging Face checkpoint that the model is of: --model FOLDER"
    )


def _check_files(stored: Stored, progress: Progress) -> None:
    prefix = "" if stored.model == stored.root else f"{stored.model.name}/"
    entries = {name: entry for name, entry in read_checksums(stored.root).items() if name.startswith(prefix)}
    total = sum(entry.bytes for entry in entries.values())
    for fault in find_faults(stored.root, entries, lambda count: progress("checking", count, total)):
        raise CheckpointError(f"{stored.root / fault.file} {fault.what}; use an older checkpoint, or copy it again")


def _only(dtypes: set[torch.dtype], folder: Path) -> torch.dtype:
    if len(dtypes) > 1:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise CheckpointError(f"{folder} holds tensors of {names}; say which is wanted: --dtype")
    return next(iter(dtypes))


@contextmanager
def _publishing(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name if all goes well, and is removed if not.

    Raises:
        CheckpointError: there is something at `out` already.
    """
    if out.exists():
        raise CheckpointError(f"{out} is there already; name another output, or remove it")
    folder = out.parent / f".{out.name}.writing"
    shutil.rmtree(folder, ignore_errors=True)  # of a conversion that was killed
    folder.mkdir(parents=True)
    try:
        yield folder
        os.rename(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_space(out: Path, wanted: int) -> None:
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise CheckpointError(f"{out} needs {wanted / 1e9:.1f} GB, {folder} has {free / 1e9:.1f} GB free")


def _meta(shape: ModelShape, dtype: torch.dtype) -> dict[str, Any]:
    """In the form of a run's, so that whoever resumes from it is told which field does not fit."""
    return {
        "format": FORMAT,
        "sequence": 0,
        "step": 0,
        "saved_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "layout": {"world_size": 1, "tp_size": 1, "pp_size": 1, "cp_size": 1, "dp_size": 1},
        "model": {
            "family": shape.family.name,
            "num_layers": shape.num_layers,
            "hidden_size": shape.hidden_size,
            "vocab_size": shape.vocab_size,
            "tied": shape.tied,
            "dtype": str(dtype).removeprefix("torch."),
            "parameters": sum(math.prod(dims) for dims in hf_shapes(shape).values()),
        },
        "training": {"optimizer": "none: converted, the model alone"},
        "versions": {"megatron_dapo": __version__, "torch": torch.__version__},
    }
