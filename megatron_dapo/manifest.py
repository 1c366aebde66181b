"""What a checkpoint says of itself: `meta.json` (what it is) and `checksums.json` (what its files must be).

    <checkpoint>/meta.json          format, step, layout, model, versions
    <checkpoint>/checksums.json     {relative path: {"bytes": n, "sha256" or "xxh3_128": hexadecimal digits}}
    <checkpoint>/megatron/          Megatron's `torch_dist` format
    <checkpoint>/model_config/      config and tokenizer, of a converted one; a run has them once, beside checkpoints/

Nothing here loads torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from megatron_dapo.types import CheckpointError

META, CHECKSUMS, MODEL, SIDE = "meta.json", "checksums.json", "megatron", "model_config"
FORMAT = 2  # the newest format of meta.json that is read
_BACKENDS = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
_HASHES: dict[str, Callable[[], Any]] = {"xxh3_128": xxhash.xxh3_128, "sha256": hashlib.sha256}
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Stored:
    """A checkpoint on disk. `model` is the folder in Megatron's format, within `root` or the same."""

    root: Path
    model: Path


def find_checkpoint(path: Path) -> Stored:
    """The checkpoint at `path`: itself, the latest one of a run, or a bare folder in Megatron's format.

    Raises:
        CheckpointError: there is none, or `latest` names one that is not there.
    """
    for folder in (path, path / "checkpoints"):
        pointer = folder / "latest"
        if pointer.is_file():
            found = folder / pointer.read_text().strip()
            if not (found / MODEL).is_dir():
                raise CheckpointError(
                    f"{pointer} names {found.name}, which is no checkpoint; name one of {folder} yourself"
                )
            return Stored(found, found / MODEL)
    if (path / MODEL).is_dir():
        return Stored(path, path / MODEL)
    if (path / "metadata.json").is_file():
        return Stored(path, path)
    raise CheckpointError(
        f"{path} is no checkpoint: it has neither checkpoints/latest (a run), {MODEL}/ (a checkpoint of one) nor "
        "metadata.json (Megatron's dist_checkpointing)"
    )


def read_meta(root: Path) -> dict[str, Any]:
    """`meta.json` of a checkpoint; empty where there is none.

    Raises:
        CheckpointError: it cannot be read, or is of a format newer than `FORMAT`.
    """
    file = root / META
    if not file.is_file():
        return {}
    meta = _read_object(file)
    if not isinstance(meta.get("format"), int) or meta["format"] > FORMAT:
        raise CheckpointError(
            f"{file}: format is {meta.get('format')!r}, this version reads up to {FORMAT}; use a newer megatron_dapo"
        )
    return meta


def check_backend(model: Path) -> None:
    """Raises CheckpointError where Megatron's folder is of another kind or a newer version than is read here."""
    file = model / "metadata.json"
    if not file.is_file():
        raise CheckpointError(f"{model} has no metadata.json; wanted a folder that Megatron's dist_checkpointing wrote")
    found = _read_object(file)
    for field, wanted in _BACKENDS.items():
        if found.get(field) != wanted:
            raise CheckpointError(f"{file}: {field} is {found.get(field)!r}, this version reads {wanted!r}")


@dataclass(frozen=True)
class Fault:
    """What is wrong with one file of a checkpoint."""

    file: str
    what: str


def read_checksums(root: Path) -> dict[str, dict[str, Any]]:
    """`checksums.json` of a checkpoint: relative path -> bytes and checksum; empty where there is none."""
    file = root / CHECKSUMS
    if not file.is_file():
        return {}
    entries = _read_object(file)
    for name, entry in entries.items():
        known = (
            isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and any(kind in entry for kind in _HASHES)
        )
        if not known:
            raise CheckpointError(f"{file}: {name} has {entry!r}, wanted bytes and one of {', '.join(_HASHES)}")
        if not (root / name).resolve().is_relative_to(root.resolve()):
            raise CheckpointError(f"{file}: {name} is outside the checkpoint")
    return entries


def find_faults(
    root: Path, entries: dict[str, dict[str, Any]], on_bytes: Callable[[int], None] = lambda count: None
) -> Iterator[Fault]:
    """Compare the files that `entries` of `checksums.json` name with what they must be; reads all of them."""
    for name, entry in entries.items():
        file = root / name
        if not file.is_file():
            yield Fault(name, "is missing")
            continue
        if (size := file.stat().st_size) != entry["bytes"]:
            yield Fault(name, f"has {size} bytes, {entry['bytes']} were written")
            on_bytes(entry["bytes"])
            continue
        kind = next(kind for kind in _HASHES if kind in entry)
        found = digest(file, kind, on_bytes)
        if found != entry[kind]:
            yield Fault(name, f"is damaged: its {kind} is {found}, {entry[kind]} was written")


def digest(file: Path, kind: str, on_bytes: Callable[[int], None] = lambda count: None) -> str:
    """Hexadecimal digits of a file's checksum, read a block at a time."""
    found, block = _HASHES[kind](), memoryview(bytearray(_BLOCK))
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(block):
            found.update(block[:count])
            on_bytes(count)
    return found.hexdigest()


def write_manifest(root: Path, meta: dict[str, Any]) -> None:
    """Write `meta.json`, and `checksums.json` of all files that are in `root` by then."""
    (root / META).write_text(json.dumps(meta, indent=1) + "\n")
    files = sorted(file for file in root.rglob("*") if file.is_file())
    kind = next(iter(_HASHES))
    entries = {str(file.relative_to(root)): {"bytes": file.stat().st_size, kind: digest(file, kind)} for file in files}
    (root / CHECKSUMS).write_text(json.dumps(entries, indent=1) + "\n")


def _read_object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is damaged, it is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} holds {type(found).__name__}, wanted an object")
    return found
