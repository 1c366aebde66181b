"""Checkpoints of a run on disk: one folder a step, published by a rename, and `latest` naming the newest whole one.

checkpoints/step_00000040/megatron/        model and optimizer, Megatron's own format
checkpoints/step_00000040/trainer.json     the driver's state: step, versions, sampler
checkpoints/step_00000040/arrays.safetensors   the arrays of that state
checkpoints/latest                         "step_00000040"
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

FORMAT = 1
_STATE, _ARRAYS, _MODEL = "trainer.json", "arrays.safetensors", "megatron"
_ARRAY = "$array"


class CheckpointStore:
    """The checkpoints of one run, under `<run directory>/checkpoints`."""

    def __init__(self, run_directory: str | Path):
        self.root = Path(run_directory) / "checkpoints"

    def save(self, step: int, state: dict[str, Any], write_model: Callable[[str], None]) -> Path:
        """Write a checkpoint and publish it. `write_model` fills the folder that it is given.

        A checkpoint of the same step is replaced. Until the rename nothing of the new one can be found.

        Raises:
            TypeError: `state` holds something else than numbers, text, None, arrays, and lists and dicts of these.
        """
        final, temporary = self.root / f"step_{step:08d}", self.root / f".step_{step:08d}.writing"
        replaced = self.root / f".step_{step:08d}.replaced"
        for leftover in (temporary, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
        (temporary / _MODEL).mkdir(parents=True)
        write_model(str(temporary / _MODEL))
        arrays: dict[str, np.ndarray] = {}
        skeleton = {"format": FORMAT, "state": _take_arrays(state, arrays)}
        save_file(arrays, temporary / _ARRAYS)
        (temporary / _STATE).write_text(json.dumps(skeleton))
        if final.exists():  # moved, not removed: that would leave nothing for as long as it takes
            os.rename(final, replaced)
        os.rename(temporary, final)
        pointer = self.root / ".latest.writing"
        pointer.write_text(final.name)
        os.replace(pointer, self.root / "latest")
        shutil.rmtree(replaced, ignore_errors=True)
        return final

    def find(self, resume_mode: str) -> Path | None:
        """The checkpoint to resume from: `auto` the latest if there is one, `disable` none, else a path."""
        if resume_mode == "disable":
            return None
        if resume_mode != "auto":
            return Path(resume_mode)
        pointer = self.root / "latest"
        return self.root / pointer.read_text().strip() if pointer.exists() else None

    def read_state(self, path: Path) -> dict[str, Any]:
        """The driver's state of the checkpoint at `path`.

        Raises:
            ValueError: it is not a whole checkpoint, or of another format.
        """
        missing = [name for name in (_STATE, _ARRAYS, _MODEL) if not (path / name).exists()]
        if missing:
            raise ValueError(
                f"{path} is no whole checkpoint: it has no {', '.join(missing)}; wanted .../step_N of a run"
            )
        try:
            skeleton = json.loads((path / _STATE).read_text())
            arrays = load_file(path / _ARRAYS)
        except (json.JSONDecodeError, SafetensorError) as error:
            raise ValueError(f"{path} is damaged: {error}; resume from an older checkpoint") from error
        if skeleton["format"] != FORMAT:
            raise ValueError(f"{path} has checkpoint format {skeleton['format']}; this version reads {FORMAT}")
        return _put_arrays(skeleton["state"], arrays)


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
