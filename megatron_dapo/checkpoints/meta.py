"""`meta.json`: what a checkpoint is of, so that it can be listed and refused without reading the rest.

{"format": 2, "sequence": 7, "step": 40, "saved_at": "2026-01-31T12:00:00+00:00", "layout": {"world_size": 4, ...},
 "model": {"family": "qwen2", "num_layers": 64, ...}, "training": {"params_dtype": "bfloat16", ...},
 "versions": {"torch": "2.13.0", ...}}
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_dapo import __version__
from megatron_dapo.checkpoints.errors import DamagedCheckpointError, ForeignCheckpointError
from megatron_dapo.digests import DigestingFile, FileDigest

FORMAT = 2
META = "meta.json"


@dataclass(frozen=True)
class Identity:
    """What a checkpoint must agree with to be taken up, but for the layout, which may change."""

    layout: Mapping[str, int]  # world_size, tp_size, pp_size, cp_size, dp_size
    model: Mapping[str, Any]  # its shape and vocabulary, as plain values
    training: Mapping[str, Any]  # what decides the form of the optimizer's state


@dataclass(frozen=True)
class Meta:
    format: int
    sequence: int  # of the run's checkpoints, in the order in which they were published: the highest is the newest
    step: int  # training steps done
    saved_at: str  # ISO 8601, UTC
    layout: dict[str, int]
    model: dict[str, Any]
    training: dict[str, Any]
    versions: dict[str, str]


def describe(identity: Identity, sequence: int, step: int) -> Meta:
    """The meta data of a checkpoint that is made now."""
    return Meta(
        format=FORMAT,
        sequence=sequence,
        step=step,
        saved_at=datetime.now(UTC).isoformat(timespec="seconds"),
        layout=dict(identity.layout),
        model=dict(identity.model),
        training=dict(identity.training),
        versions=_versions(),
    )


@cache
def _versions() -> dict[str, str]:
    return {
        "megatron_dapo": __version__,
        "torch": version("torch"),
        "megatron_core": version("megatron-core"),
        "python": platform.python_version(),
    }


def write_meta(folder: Path, meta: Meta) -> FileDigest:
    with DigestingFile(folder / META) as file:
        file.write((json.dumps(asdict(meta), indent=1) + "\n").encode())
    return file.digest


def read_meta(folder: Path) -> Meta:
    """
    Raises:
        DamagedCheckpointError: the file is missing, no JSON, or lacks a field.
        ForeignCheckpointError: it is of another format.
    """
    path = folder / META
    if not path.is_file():
        raise DamagedCheckpointError(f"{path} is missing, so {folder} is no whole checkpoint; name a .../step_N")
    try:
        found = json.loads(path.read_text())
        number = found["format"]
        if number == FORMAT:
            return Meta(**{field.name: found[field.name] for field in fields(Meta)})
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    remedy = "update megatron_dapo" if isinstance(number, int) and number > FORMAT else "load it with its own version"
    raise ForeignCheckpointError(f"{path}: field format is {number!r}; this version reads {FORMAT}; {remedy}")


def check_fits(folder: Path, meta: Meta, wanted: Identity) -> None:
    """
    Raises:
        ForeignCheckpointError: it is of another model, or its optimizer's state has another form. Names the field.
    """
    remedies = {
        "model": "set actor_rollout_ref.model.path to the model that the run began with",
        "training": "set actor_rollout_ref.actor.megatron back",
    }
    for section, remedy in remedies.items():
        found, own = getattr(meta, section), getattr(wanted, section)
        for name in sorted(found.keys() | own.keys()):
            if found.get(name) != own.get(name):
                raise ForeignCheckpointError(
                    f"{folder / META}: field {section}.{name} is {found.get(name)!r}, this run has {own.get(name)!r}; "
                    f"{remedy}, or start a new run with another trainer.default_local_dir"
                )
