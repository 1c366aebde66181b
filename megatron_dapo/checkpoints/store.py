"""Checkpoints on disk: one folder a step, published by a rename, and `latest` naming the newest whole one.

checkpoints/step_00000040/meta.json            what it is of (`meta.py`)
checkpoints/step_00000040/trainer.json         the driver's state, its arrays in arrays.safetensors (`state_file.py`)
checkpoints/step_00000040/megatron/            model and optimizer, Megatron's own format
checkpoints/step_00000040/checksums.json       of all of these, written last (`checksums.py`)
checkpoints/latest                             "step_00000040"
checkpoints/.step_00000040.*                   not published yet, or on its way out: never a checkpoint

What is left out: what is written when (`saver.py`), and which one is taken up (`resume.py`).
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from megatron_dapo.checkpoints.checksums import check_sizes
from megatron_dapo.checkpoints.errors import DamagedCheckpointError, ForeignCheckpointError
from megatron_dapo.checkpoints.meta import read_meta
from megatron_dapo.digests import DigestingFile, sync_folder

MODEL = "megatron"
_STEP = re.compile(r"step_(\d{8,})")
_WRITING, _REPLACED, _DELETING = "writing", "replaced", "deleting"


@dataclass(frozen=True)
class Entry:
    """A published checkpoint. `problem` is empty, or says why its meta data cannot be read; `sequence` is then -1."""

    path: Path
    step: int
    sequence: int
    problem: str


class CheckpointStore:
    """The checkpoints under `<directory>/checkpoints`. One process writes there at a time."""

    def __init__(self, directory: str | Path):
        self.root = Path(directory) / "checkpoints"

    def entries(self) -> list[Entry]:
        """All that are published, the newest first."""
        if not self.root.is_dir():
            return []
        found = [_entry(path, int(match[1])) for path in self.root.iterdir() if (match := _STEP.fullmatch(path.name))]
        return sorted(found, key=lambda entry: (entry.sequence, entry.step), reverse=True)

    def recover(self) -> None:
        """Clear away what a killed process left: drafts, half-deleted folders, and a replacement stopped half way."""
        for path in sorted(self.root.glob(".step_*")) if self.root.is_dir() else []:
            final = self.root / path.name[1:].split(".")[0]
            if path.name.endswith(_REPLACED) and not final.exists():
                os.rename(path, final)
            else:
                shutil.rmtree(path, ignore_errors=True)

    def begin(self, step: int) -> Path:
        """A new folder for the checkpoint of `step`, with an empty `megatron/`. Nobody takes it for a checkpoint.

        Its name is new each time: a rank of a killed run that still writes does so into a folder of its own.
        """
        draft = self.root / f".{_name(step)}.{secrets.token_hex(4)}.{_WRITING}"
        (draft / MODEL).mkdir(parents=True)
        return draft

    def publish(self, draft: Path, step: int) -> Path:
        """Make the whole `draft` the newest checkpoint; one of the same step is replaced."""
        final, replaced = self.root / _name(step), self.root / f".{_name(step)}.{_REPLACED}"
        sync_folder(draft / MODEL)
        sync_folder(draft)
        if final.exists():  # `recover` puts it back if the next line is never reached
            os.rename(final, replaced)
        os.rename(draft, final)
        sync_folder(self.root)
        self._point_to(final.name)
        shutil.rmtree(replaced, ignore_errors=True)
        return final

    def prune(self, limit: int) -> list[Path]:
        """Delete all but the newest `limit` checkpoints whose files are all there; returns what was deleted.

        Damaged ones do not count, and go when enough good ones are newer.
        """
        good, deleted = 0, []
        for entry in self.entries():
            if good >= limit:
                leaving = self.root / f".{entry.path.name}.{_DELETING}"
                os.rename(entry.path, leaving)  # half a folder under its old name would look like a checkpoint
                shutil.rmtree(leaving)
                deleted.append(entry.path)
            elif _looks_whole(entry):
                good += 1
        return deleted

    def _point_to(self, name: str) -> None:
        beside = self.root / ".latest.writing"
        with DigestingFile(beside) as file:
            file.write(name.encode())
        os.replace(beside, self.root / "latest")
        sync_folder(self.root)


def next_sequence(*stores: CheckpointStore) -> int:
    """Above all that are there."""
    return 1 + max((entry.sequence for store in stores for entry in store.entries()), default=0)


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _entry(path: Path, step: int) -> Entry:
    try:
        return Entry(path, step, read_meta(path).sequence, "")
    except (DamagedCheckpointError, ForeignCheckpointError) as error:
        return Entry(path, step, -1, str(error))


def _looks_whole(entry: Entry) -> bool:
    if entry.problem:
        return False
    try:
        check_sizes(entry.path)
    except DamagedCheckpointError:
        return False
    return True
