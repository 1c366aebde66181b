"""Which checkpoint a run takes up: `auto` the newest whole one, `disable` none, else the one at a path."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dapo.checkpoints.checksums import check_digests, check_sizes, read_checksums
from megatron_dapo.checkpoints.errors import DamagedCheckpointError
from megatron_dapo.checkpoints.meta import Identity, Meta, check_fits, read_meta
from megatron_dapo.checkpoints.state_file import read_state
from megatron_dapo.checkpoints.store import CheckpointStore
from megatron_dapo.digests import FileDigest

# (folder, names of files below it) -> their checksums
Digester = Callable[[str, Sequence[str]], Mapping[str, FileDigest | None]]


@dataclass(frozen=True)
class Found:
    """A checkpoint whose every byte was checked, and its driver's state."""

    path: Path
    meta: Meta
    state: dict[str, Any]


def find(
    resume_mode: str,
    stores: Sequence[CheckpointStore],
    wanted: Identity,
    digest: Digester,
    report: Callable[[str], None],
) -> Found | None:
    """The checkpoint to go on from; None for a fresh run. With `auto`, damaged ones are passed over with a report.

    Raises:
        DamagedCheckpointError: the one at a path is damaged, or with `auto` all that there are.
        ForeignCheckpointError: it is of another model or format.
    """
    if resume_mode == "disable":
        return None
    if resume_mode != "auto":
        return verified(Path(resume_mode), wanted, digest)
    entries = [entry for store in stores for entry in store.entries()]
    # First those whose meta data cannot be read: they might be the newest, so that much has to be said.
    for entry in sorted(entries, key=lambda e: (bool(e.problem), e.sequence, e.step), reverse=True):
        try:
            return verified(entry.path, wanted, digest)
        except DamagedCheckpointError as error:
            report(f"passing over {entry.path}: {error}")
    if entries:
        raise DamagedCheckpointError(
            f"none of the {len(entries)} checkpoints under {stores[0].root} is whole; the reasons stand above. "
            "Start anew with trainer.resume_mode=disable, or name a good one there"
        )
    return None


def verified(path: Path, wanted: Identity, digest: Digester) -> Found:
    """The checkpoint at `path`, once its every byte was read. Errors as for `find`."""
    meta = read_meta(path)
    check_fits(path, meta, wanted)
    check_sizes(path)
    check_digests(path, digest(str(path), sorted(read_checksums(path))))
    return Found(path, meta, read_state(path))
