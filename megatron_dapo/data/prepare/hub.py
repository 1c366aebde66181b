"""A file of a data set on the Hugging Face hub, or on a mirror of it, checked against the hub's own checksum.

`huggingface_hub` downloads, keeps the cache, and goes on where a connection broke (from the last whole 10 MiB); here
are further tries after a pause, and the checksum, which it does not compare. A killed process's download starts over:
huggingface_hub's partial files are a process's own.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

ATTEMPTS = 4
PAUSE = 2.0  # seconds before the second attempt; twice as long before each further one
# The base of all errors of the HTTP library, which is another one in other versions of huggingface_hub.
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__mro__[1]


@dataclass(frozen=True)
class HubFile:
    repository: str
    path: str


# The recipe's data.
KNOWN = {
    "dapo-math-17k": HubFile("BytedTsinghua-SIA/DAPO-Math-17k", "data/dapo-math-17k.parquet"),
    "aime-2024": HubFile("BytedTsinghua-SIA/AIME-2024", "data/aime-2024.parquet"),
}


@dataclass(frozen=True)
class HubPlace:
    """Where it is fetched from. Absent: what huggingface_hub reads from HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE."""

    endpoint: str | None = None
    cache: Path | None = None
    offline: bool = False  # the cache alone
    revision: str = "main"


@dataclass(frozen=True)
class Fetched:
    path: Path
    commit: str
    checksum: str  # as the hub names the file's content: SHA-256, or git's SHA-1 of small files
    verified: bool  # False where the cache has no links, which carry the checksum

    def __str__(self) -> str:
        return (
            f"{self.path} (commit {self.commit}, checksum {self.checksum}{'' if self.verified else ', not verified'})"
        )


class DownloadError(RuntimeError):
    """Names repository and file, what happened and what to do."""


def fetch(
    file: HubFile, place: HubPlace, *, pause: float = PAUSE, say: Callable[[str], None] = lambda text: None
) -> Fetched:
    """The file in the cache, downloaded where it is not there. `say` is told why it is tried again.

    Raises:
        DownloadError: it is not there, may not be read, or did not come whole in ATTEMPTS attempts.
    """
    problem = ""
    force = False
    for attempt in range(ATTEMPTS):
        if attempt:
            say(f"{problem}; attempt {attempt + 1} of {ATTEMPTS} in {pause:g} s")
            time.sleep(pause)
            pause *= 2
        try:
            fetched = _fetch_once(file, place, force)
        except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise DownloadError(_final(file, place, error)) from error
        except (_HTTP_ERROR, OSError) as error:
            problem = f"{file.repository}/{file.path}: {type(error).__name__}: {_first_line(error)}"
            continue
        found = _checksum(fetched)
        if not fetched.verified or found == fetched.checksum:
            return fetched
        problem = f"{fetched.path} has the checksum {found}; wanted {fetched.checksum}"
        if place.offline:
            raise DownloadError(f"{problem}; it is damaged: fetch it again without offline")
        force = True
    raise DownloadError(
        f"{problem}; {ATTEMPTS} attempts failed. Look at the network, try a mirror (HF_ENDPOINT), or download "
        f"{file.path} of the data set {file.repository} by hand and name the file"
    )


def _fetch_once(file: HubFile, place: HubPlace, force: bool) -> Fetched:
    path = Path(
        hf_hub_download(
            file.repository,
            file.path,
            repo_type="dataset",
            revision=place.revision,
            endpoint=place.endpoint,
            cache_dir=place.cache,
            local_files_only=place.offline,
            force_download=force,
        )
    )
    # The cache's layout: snapshots/<commit>/<file> links to blobs/<the checksum that the hub named>.
    commit = path.parents[file.path.count("/")].name
    checksum = Path(os.readlink(path)).name if path.is_symlink() else ""
    if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", checksum):
        return Fetched(path, commit, checksum, verified=True)
    fetched = Fetched(path, commit, "", verified=False)
    return Fetched(path, commit, _checksum(fetched), verified=False)


def _checksum(fetched: Fetched) -> str:
    """SHA-256, or git's SHA-1 of a blob where the hub names that."""
    if len(fetched.checksum) == 40:
        digest = hashlib.sha1(b"blob %d\0" % fetched.path.stat().st_size)
    else:
        digest = hashlib.sha256()
    with fetched.path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _final(file: HubFile, place: HubPlace, error: Exception) -> str:
    what = f"{file.path} of the data set {file.repository} (revision {place.revision})"
    if isinstance(error, LocalEntryNotFoundError):
        if place.offline:
            return f"{what} is not in the cache {place.cache or '(HF_HOME)'}; fetch it once without offline"
        return (
            f"{what}: {place.endpoint or 'the hub'} does not answer as a hub does, and the cache has no such file "
            f"({_first_line(error)}); look at the network, or name a mirror (HF_ENDPOINT)"
        )
    if isinstance(error, GatedRepoError):
        return f"{what} is gated; accept its terms on the hub, then `hf auth login` or HF_TOKEN"
    return f"{what} is not there ({_first_line(error)}); correct the name or the revision, or log in (HF_TOKEN)"


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
