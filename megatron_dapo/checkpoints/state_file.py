"""The driver's state on disk: `trainer.json`, and the arrays of it in `arrays.safetensors`. No pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from megatron_dapo.checkpoints.errors import DamagedCheckpointError
from megatron_dapo.digests import DigestingFile, FileDigest

STATE, ARRAYS = "trainer.json", "arrays.safetensors"
_ARRAY = "$array"


def write_state(folder: Path, state: dict[str, Any]) -> dict[str, FileDigest]:
    """Write `state` into `folder`; returns the checksums of its files.

    Raises:
        TypeError: `state` holds something else than numbers, text, None, arrays, and lists and dicts of these.
    """
    arrays: dict[str, np.ndarray] = {}
    skeleton = json.dumps(_take_arrays(state, arrays))
    digests = {}
    for name, content in ((STATE, skeleton.encode()), (ARRAYS, save(arrays))):
        with DigestingFile(folder / name) as file:
            file.write(content)
        digests[name] = file.digest
    return digests


def read_state(folder: Path) -> dict[str, Any]:
    """What `write_state` wrote into `folder`.

    Raises:
        DamagedCheckpointError: a file is missing or cannot be read.
    """
    for name in (STATE, ARRAYS):
        if not (folder / name).exists():
            raise DamagedCheckpointError(f"{folder / name} is missing; resume from an older checkpoint")
    try:
        skeleton = json.loads((folder / STATE).read_text())
        arrays = load_file(folder / ARRAYS)
    except (json.JSONDecodeError, SafetensorError) as error:
        raise DamagedCheckpointError(f"{folder} is damaged: {error}; resume from an older checkpoint") from error
    return _put_arrays(skeleton, arrays)


def _take_arrays(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """`value` with every numpy array moved into `arrays` and a mark left in its place."""
    if isinstance(value, np.ndarray):
        name = f"{len(arrays):08d}"
        arrays[name] = value.copy(order="C")
        return {_ARRAY: name}
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"the state has a dict with the key {key!r}, which JSON would turn into text; use text")
        return {key: _take_arrays(item, arrays) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_take_arrays(item, arrays) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def _put_arrays(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_ARRAY}:
            return arrays[value[_ARRAY]]
        return {key: _put_arrays(item, arrays) for key, item in value.items()}
    if isinstance(value, list):
        return [_put_arrays(item, arrays) for item in value]
    return value
