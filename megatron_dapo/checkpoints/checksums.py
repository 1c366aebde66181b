"""`checksums.json`: {relative path: {"bytes": n, "xxh3_128": hex}} over all other files of a checkpoint.

Written last before a checkpoint is published, so that a folder without it is not whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from megatron_dapo.checkpoints.errors import DamagedCheckpointError
from megatron_dapo.digests import DigestingFile, FileDigest, digest_files

CHECKSUMS = "checksums.json"
_OLDER = "resume from an older checkpoint"


def write_checksums(folder: Path, known: Mapping[str, FileDigest]) -> None:
    """Over all files below `folder`; those that are not in `known` are read.

    Raises:
        OSError: a file cannot be read or written, or is not as long on disk as what was written into it.
    """
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    digests = dict(known) | {name: d for name, d in digest_files(folder, set(names) - known.keys()).items() if d}
    for name, digest in digests.items():
        size = (folder / name).stat().st_size
        if size != digest.bytes:
            raise OSError(f"{folder / name} has {size} bytes on disk, {digest.bytes} were written")
    with DigestingFile(folder / CHECKSUMS) as file:
        file.write((json.dumps({name: asdict(digests[name]) for name in sorted(digests)}, indent=1) + "\n").encode())


def read_checksums(folder: Path) -> dict[str, FileDigest]:
    """
    Raises:
        DamagedCheckpointError: the file is missing or cannot be read.
    """
    path = folder / CHECKSUMS
    if not path.is_file():
        raise DamagedCheckpointError(f"{path} is missing, so {folder} is no whole checkpoint; {_OLDER}")
    try:
        return {name: FileDigest(**found) for name, found in json.loads(path.read_text()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{path} cannot be read: {error}; {_OLDER}") from error


def check_sizes(folder: Path) -> None:
    """Look whether every file is there at its full length: quick, and blind to changed bytes.

    Raises:
        DamagedCheckpointError: one is not.
    """
    for name, digest in read_checksums(folder).items():
        path = folder / name
        if not path.is_file():
            raise DamagedCheckpointError(f"{path} is missing; {_OLDER}")
        if path.stat().st_size != digest.bytes:
            raise DamagedCheckpointError(f"{path} has {path.stat().st_size} bytes, wanted {digest.bytes}; {_OLDER}")


def check_digests(folder: Path, found: Mapping[str, FileDigest | None]) -> None:
    """Compare what was read from the files now with what was written then.

    Raises:
        DamagedCheckpointError: they differ.
    """
    for name, digest in read_checksums(folder).items():
        now = found[name]
        if now is None:
            raise DamagedCheckpointError(f"{folder / name} is missing; {_OLDER}")
        if now != digest:
            raise DamagedCheckpointError(
                f"{folder / name} is damaged: its {now.bytes} bytes have the checksum {now.xxh3_128}, "
                f"wanted {digest.bytes} bytes with {digest.xxh3_128} ({CHECKSUMS}); {_OLDER}"
            )
