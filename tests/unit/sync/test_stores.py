"""Memory that processes share: written by one, read by another without a copy; nothing is left of a killed one."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from megatron_dapo.sync.stores import make_cuda_memory, make_host_memory

SHARED = Path("/dev/shm")
ROOT = Path(__file__).parents[3]

READER = """
import pickle, sys
handle = pickle.load(sys.stdin.buffer)
memory = handle.open()
print(int(memory[5]), flush=True)
memory[6] = 7
"""
OWNER = """
import pickle, sys, time
from megatron_dapo.sync.stores import make_host_memory
memory, handle = make_host_memory(4096)
memory[0] = 1
print(handle.name.decode(), flush=True)
time.sleep(600)
"""


def started(program: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )


def test_another_process_sees_what_is_written_and_writes_back():
    memory, handle = make_host_memory(4096)
    assert not memory.any()
    memory[5] = 42
    out, _ = started(READER).communicate(pickle.dumps(handle), timeout=120)
    assert out == b"42\n"
    assert memory[6] == 7


@contextlib.contextmanager
def sharing_by_file_system() -> Iterator[None]:
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        torch.multiprocessing.set_sharing_strategy(before)


def test_a_view_pickled_as_engines_want_it_is_the_same_memory():
    """What SGLang unpickles is a handle: the view's storage is not copied into another one."""
    memory, handle = make_host_memory(4096)
    view = memory[64:128].view(torch.float32).view(4, 4)
    with sharing_by_file_system():
        buffer = io.BytesIO()
        ForkingPickler(buffer).dump(view)
    assert len(buffer.getvalue()) < 2000
    assert handle.name in buffer.getvalue()
    arrived = pickle.loads(buffer.getvalue())
    view[1, 2] = 3.5
    assert arrived[1, 2] == 3.5


def test_nothing_is_left_of_a_process_that_was_killed():
    owner = started(OWNER)
    assert owner.stdout is not None
    file = SHARED / owner.stdout.readline().decode().strip().lstrip("/")
    assert file.exists()
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    deadline = time.monotonic() + 30
    while file.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not file.exists()


def test_memory_is_taken_when_it_is_made():
    """So that a /dev/shm that is too small is said then, and is no bus error in the middle of a push."""
    memory, handle = make_host_memory(1 << 24)
    assert memory.shape == (1 << 24,)
    status = os.stat(SHARED / handle.name.decode().lstrip("/"))
    assert status.st_blocks * 512 >= 1 << 24


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA's inter-process handles need a CUDA device")
def test_another_process_sees_cuda_memory():
    memory, handle = make_cuda_memory(4096)
    memory[5] = 42
    torch.cuda.synchronize()
    out, _ = started("import torch\n" + READER).communicate(pickle.dumps(handle), timeout=120)
    assert out == b"42\n"
