"""What a checkpoint says of itself: `meta.json` (what it is) and `checksums.json` (what its files must be).

    <checkpoint>/meta.json          format, step, layout, model, versions
    <checkpoint>/checksums.json     {relative path: {"bytes": n, "xxh3_128": hexadecimal digits}}
    <checkpoint>/megatron/          Megatron's `torch_dist` format
    <checkpoint>/model_config/      config and tokenizer, of a converted one; a run has them once, beside checkpoints/

Nothing here loads torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_dapo.digests import FileDigest, digest_file, digest_files
from megatron_dapo.types import CheckpointError

META, CHECKSUMS, MODEL, SIDE = "meta.json", "checksums.json", "megatron", "model_config"
FORMAT = 2  # the newest format of meta.json that is read
_BACKENDS = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}


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


def read_checksums(root: Path) -> dict[str, FileDigest]:
    """`checksums.json` of a checkpoint: relative path -> bytes and checksum; empty where there is none."""
    file = root / CHECKSUMS
    if not file.is_file():
        return {}
    return {name: _entry(file, name, entry) for name, entry in _read_object(file).items()}


def _entry(file: Path, name: str, entry: Any) -> FileDigest:
    if not isinstance(entry, dict) or not isinstance(entry.get("bytes"), int) or "xxh3_128" not in entry:
        raise CheckpointError(f"{file}: {name} has {entry!r}, wanted bytes and xxh3_128")
    if not (file.parent / name).resolve().is_relative_to(file.parent.resolve()):
        raise CheckpointError(f"{file}: {name} is outside the checkpoint")
    return FileDigest(entry["bytes"], entry["xxh3_128"])


def find_faults(
    root: Path, entries: dict[str, FileDigest], on_bytes: Callable[[int], None] = lambda count: None
) -> Iterator[Fault]:
    """Compare the files that `entries` of `checksums.json` name with what they must be; reads all of them."""
    for name, wanted in entries.items():
        file = root / name
        if not file.is_file():
            yield Fault(name, "is missing")
        elif (size := file.stat().st_size) != wanted.bytes:
            yield Fault(name, f"has {size} bytes, {wanted.bytes} were written")
            on_bytes(wanted.bytes)
        elif (found := digest_file(file, on_bytes)) != wanted:
            yield Fault(name, f"is damaged: its xxh3_128 is {found.xxh3_128}, {wanted.xxh3_128} was written")


def write_manifest(root: Path, meta: dict[str, Any]) -> None:
    """Write `meta.json`, and `checksums.json` of all files that are in `root` by then."""
    (root / META).write_text(json.dumps(meta, indent=1) + "\n")
    names = sorted(str(file.relative_to(root)) for file in root.rglob("*") if file.is_file())
    entries = {name: asdict(found) for name, found in digest_files(root, names).items() if found is not None}
    (root / CHECKSUMS).write_text(json.dumps(entries, indent=1) + "\n")


def _read_object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is damaged, it is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} holds {type(found).__name__}, wanted an object")
    return found
