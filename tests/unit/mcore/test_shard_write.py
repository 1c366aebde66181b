"""A rank's files are written here or apart with the same bytes, and a failure is a value on every path."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megatron_dapo.digests import digest_file
from megatron_dapo.mcore.shard_write import PendingWrite, ShardFiles, WriteFailure, Written

# A process that begins a write which never ends (the file is a pipe that nobody reads), says so, and waits.
STUCK = """
import os, sys, time
from pathlib import Path
from megatron_dapo.mcore.shard_write import PendingWrite, ShardFiles
path = Path(sys.argv[1])
os.mkfifo(path)
pending = PendingWrite(ShardFiles([], (path, {})), background=True)
print(pending._process.pid, flush=True)
time.sleep(60)
"""


def files_in(folder: Path, values: dict) -> ShardFiles:
    return ShardFiles([], (folder / "common.pt", values))


@pytest.mark.parametrize("background", [False, True])
def test_what_is_written_is_the_state_of_the_call(tmp_path: Path, background: bool):
    tensor = torch.arange(1_000_000)
    pending = PendingWrite(files_in(tmp_path, {"tensor": tensor}), background)
    tensor.zero_()
    written = pending.outcome(wait=True)
    assert isinstance(written, Written)
    assert written.digests == {"common.pt": digest_file(tmp_path / "common.pt")}
    assert torch.equal(torch.load(tmp_path / "common.pt")["tensor"], torch.arange(1_000_000))
    assert pending.outcome(wait=True) is written, "asked twice"
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("background", [False, True])
def test_a_file_that_cannot_be_written_is_named_and_nothing_raises(tmp_path: Path, background: bool):
    failure = PendingWrite(files_in(tmp_path / "nowhere", {}), background).outcome(wait=True)
    assert isinstance(failure, WriteFailure)
    assert "No such file or directory" in failure.reason
    assert "nowhere/common.pt" in failure.reason


@pytest.mark.parametrize("background", [False, True])
def test_what_cannot_be_saved_comes_with_its_traceback(tmp_path: Path, background: bool):
    failure = PendingWrite(files_in(tmp_path, {"it": lambda: None}), background).outcome(wait=True)
    assert isinstance(failure, WriteFailure)
    assert "Traceback" in failure.reason


def test_a_writer_that_is_killed_is_a_failure_with_its_signal(tmp_path: Path):
    os.mkfifo(tmp_path / "common.pt")  # opening it waits for a reader
    pending = PendingWrite(files_in(tmp_path, {}), background=True)
    assert pending.outcome(wait=False) is None
    os.kill(pending._process.pid, signal.SIGKILL)
    failure = pending.outcome(wait=True)
    assert isinstance(failure, WriteFailure)
    assert "SIGKILL" in failure.reason


def test_a_schedulers_signals_do_not_end_the_writer(tmp_path: Path):
    os.mkfifo(tmp_path / "common.pt")
    pending = PendingWrite(files_in(tmp_path, {"a": 1}), background=True)
    time.sleep(0.5)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(pending._process.pid, number)
    time.sleep(0.2)
    assert pending._process.is_alive()
    pending.abandon()
    assert isinstance(pending.outcome(wait=True), WriteFailure)
    assert multiprocessing.active_children() == []


@pytest.mark.skipif(sys.platform != "linux", reason="a parent's death is told to its children on Linux alone")
def test_a_writer_dies_with_its_parent(tmp_path: Path):
    parent = subprocess.Popen([sys.executable, "-c", STUCK, str(tmp_path / "common.pt")], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    writer = int(parent.stdout.readline())
    time.sleep(0.5)
    assert Path(f"/proc/{writer}").exists()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while _alive(writer) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(writer)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
