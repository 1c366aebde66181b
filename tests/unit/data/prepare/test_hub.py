"""Downloads with the real huggingface_hub from a server that answers as the hub does, and breaks, refuses and lies."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_dapo.data.prepare.hub import ATTEMPTS, DownloadError, Fetched, HubFile, HubPlace, fetch
from tests.unit.data.prepare.hub_server import COMMIT, Hub, serve

FILE = HubFile("owner/data", "data/rows.parquet")
CONTENT = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve(Hub({f"{FILE.repository}/{FILE.path}": CONTENT})) as hub:
        yield hub


def fetched(hub: Hub, cache: Path, **place: object) -> Fetched:
    return fetch(FILE, HubPlace(hub.address, cache, **place), pause=0.01)


def test_a_file_comes_whole_with_its_commit_and_checksum(hub: Hub, tmp_path: Path) -> None:
    found = fetched(hub, tmp_path)
    assert found.path.read_bytes() == CONTENT
    assert (found.commit, found.checksum, found.verified) == (COMMIT, SHA256, True)


def test_a_file_in_the_cache_is_not_downloaded_again(hub: Hub, tmp_path: Path) -> None:
    fetched(hub, tmp_path)
    fetched(hub, tmp_path)
    assert len(hub.contents()) == 1


def test_a_connection_that_breaks_in_the_middle_goes_on_where_it_broke(hub: Hub, tmp_path: Path) -> None:
    large = CONTENT * 100  # huggingface_hub writes pieces of 10 MiB, and goes on after the last whole one
    hub.files = dict.fromkeys(hub.files, large)
    hub.breaks = 1
    assert fetched(hub, tmp_path).path.read_bytes() == large
    whole, rest = hub.contents()
    assert "bytes=" not in whole
    assert rest.endswith(f" bytes={10 * 2**20}-")


def test_a_hub_that_refuses_is_asked_again_and_it_is_said(hub: Hub, tmp_path: Path) -> None:
    hub.refuses, said = 2, []
    found = fetch(FILE, HubPlace(hub.address, tmp_path), pause=0.01, say=said.append)
    assert found.path.read_bytes() == CONTENT
    assert ["503" in text and f"of {ATTEMPTS}" in text for text in said] == [True, True]


def test_a_hub_that_keeps_refusing_is_an_error_that_names_file_and_remedy(hub: Hub, tmp_path: Path) -> None:
    hub.refuses = 10**6
    with pytest.raises(DownloadError, match=rf"owner/data/data/rows.parquet.*503.*{ATTEMPTS} attempts failed.*mirror"):
        fetched(hub, tmp_path)


def test_a_file_with_a_wrong_checksum_is_downloaded_again(hub: Hub, tmp_path: Path) -> None:
    hub.alters = 1
    said: list[str] = []
    found = fetch(FILE, HubPlace(hub.address, tmp_path), pause=0.01, say=said.append)
    assert found.path.read_bytes() == CONTENT
    assert len(said) == 1
    assert SHA256 in said[0]


def test_a_checksum_that_stays_wrong_is_an_error_with_both(hub: Hub, tmp_path: Path) -> None:
    hub.checksum = "0" * 64
    with pytest.raises(DownloadError, match=f"has the checksum {SHA256}; wanted {'0' * 64}"):
        fetched(hub, tmp_path)
    assert len(hub.contents()) == ATTEMPTS


def test_a_small_file_is_checked_against_the_checksum_of_git(hub: Hub, tmp_path: Path) -> None:
    hub.checksum = hashlib.sha1(b"blob %d\0" % len(CONTENT) + CONTENT).hexdigest()
    assert fetched(hub, tmp_path).checksum == hub.checksum


def test_offline_the_cache_alone_is_read(hub: Hub, tmp_path: Path) -> None:
    fetched(hub, tmp_path)
    asked = len(hub.requests)
    assert fetched(hub, tmp_path, offline=True).path.read_bytes() == CONTENT
    assert len(hub.requests) == asked


def test_offline_without_the_file_is_an_error_that_says_what_to_do(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=rf"is not in the cache {tmp_path}; fetch it once without offline"):
        fetched(hub, tmp_path, offline=True)


def test_a_damaged_cache_is_mended_online_and_told_offline(hub: Hub, tmp_path: Path) -> None:
    path = fetched(hub, tmp_path).path
    path.resolve().write_bytes(CONTENT[:-1] + b"?")
    with pytest.raises(DownloadError, match="damaged"):
        fetched(hub, tmp_path, offline=True)
    assert fetched(hub, tmp_path).path.read_bytes() == CONTENT


@pytest.mark.parametrize(("file", "revision"), [(HubFile("owner/data", "other"), "main"), (FILE, "no-such-branch")])
def test_what_the_hub_does_not_have_is_told_at_once(hub: Hub, tmp_path: Path, file: HubFile, revision: str) -> None:
    with pytest.raises(DownloadError, match=rf"{file.path} of the data set owner/data \(revision {revision}\)"):
        fetch(file, HubPlace(hub.address, tmp_path, revision=revision), pause=0.01)
    assert not hub.contents()
