"""Checkpoints of other people without the pickles of other people.

A `torch_dist` checkpoint holds pickles in three places. `.metadata` is read by torch with a plain `pickle.load`, and
each entry of bytes (Transformer Engine's extra states) with `torch.load(weights_only=False)`: either runs whatever
code the file asks for. `common.pt` and the tensors themselves are read with `weights_only=True`.

`refuse_foreign_pickles` reads the first two with unpicklers that know the classes of the format and no others, so a
file that passes asks for nothing else when torch or Megatron reads it afterwards. It guards what is in the files when
it is called: whoever can exchange them between the check and the load is not held off.
"""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from megatron_dapo.types import CheckpointError

_DTYPES = frozenset(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))
_METADATA_GLOBALS: dict[str, frozenset[str]] = {
    "torch.distributed.checkpoint.metadata": frozenset(
        {
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        }
    ),
    "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo", "_StoragePrefix"}),
    "torch.distributed.checkpoint.planner": frozenset(
        {"BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"}
    ),
    "torch": frozenset({"Size"}) | _DTYPES,
    "torch.serialization": frozenset({"_get_layout"}),
    "collections": frozenset({"OrderedDict"}),
    "pathlib": frozenset({"Path", "PosixPath", "PurePosixPath"}),
}
_TENSOR_GLOBALS: dict[str, frozenset[str]] = {
    "torch._utils": frozenset({"_rebuild_tensor_v2"}),
    "torch": _DTYPES | {"Size"},
    "collections": frozenset({"OrderedDict"}),
    "_io": frozenset({"BytesIO"}),
}
_UNSAFE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def read_metadata(folder: Path) -> Metadata:
    """`.metadata` of the `torch_dist` checkpoint in `folder`.

    Raises:
        CheckpointError: it is missing or damaged, or asks for a class that the format does not have.
    """
    file = folder / ".metadata"
    try:
        content = file.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} has no .metadata; wanted a folder that Megatron's dist_checkpointing wrote"
        ) from error
    found = _unpickled(content, _METADATA_GLOBALS, str(file))
    if not isinstance(found, Metadata) or found.storage_data is None:
        raise CheckpointError(f"{file} holds {type(found).__name__}, wanted the metadata of a torch_dist checkpoint")
    return found


def refuse_foreign_pickles(folder: str | Path) -> Metadata:
    """Look through every pickle that loading the checkpoint in `folder` would execute; returns its metadata.

    Cheap: tensors are not read. To be called before `dist_checkpointing.load`, on one rank or on all.

    Raises:
        CheckpointError: with the file, the entry and what it asked for.
    """
    folder = Path(folder)
    if os.environ.get(_UNSAFE):
        raise CheckpointError(f"{_UNSAFE} is set, with which torch would run any code in {folder}; unset it")
    metadata = read_metadata(folder)
    common = folder / "common.pt"
    if common.exists():
        _weights_only(common, f"{common}")
    for relative in {info.relative_path for info in metadata.storage_data.values()}:
        _check_inside(folder, folder / relative)
    for index, info in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            file = folder / info.relative_path
            where = f"{file}: entry {index.fqn!r}"
            content = _slice(file, info.offset, info.length, where)
            _weights_only(io.BytesIO(content), where)
            _torch_load_with(content, _TENSOR_GLOBALS, where)
    return metadata


def _check_inside(folder: Path, file: Path) -> None:
    if not file.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(f"{folder / '.metadata'} names {file}, which is outside the checkpoint")


def _slice(file: Path, offset: int, length: int, where: str) -> bytes:
    if not file.exists():
        raise CheckpointError(f"{where} is not there: {file.name} is missing")
    with file.open("rb") as stream:
        stream.seek(offset)
        content = stream.read(length)
    if len(content) < length:
        raise CheckpointError(f"{where} ends after {len(content)} of {length} bytes: the file is cut off")
    return content


def _weights_only(source: Path | io.BytesIO, where: str) -> Any:
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{where} cannot be read without running code from it: {_first_line(error)}") from error


class _Unpickler(pickle.Unpickler):
    """Finds the classes of `allowed` (module -> names) alone."""

    allowed: ClassVar[dict[str, frozenset[str]]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if name not in self.allowed.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which such a file has no use for")
        return super().find_class(module, name)


def _restricted(allowed: dict[str, frozenset[str]]) -> type[_Unpickler]:
    return type("Restricted", (_Unpickler,), {"allowed": allowed})


def _unpickled(content: bytes, allowed: dict[str, frozenset[str]], where: str) -> Any:
    try:
        return _restricted(allowed)(io.BytesIO(content)).load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise CheckpointError(f"{where} is refused: {_first_line(error)}") from error


def _torch_load_with(content: bytes, allowed: dict[str, frozenset[str]], where: str) -> None:
    """Torch's own way of loading, with an unpickler that knows `allowed` alone."""
    unpickler = _restricted(allowed)
    module = SimpleNamespace(
        __name__="restricted", Unpickler=unpickler, load=lambda file, **options: unpickler(file, **options).load()
    )
    try:
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=False, pickle_module=module)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{where} is refused: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0] or repr(error)
