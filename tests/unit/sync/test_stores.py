"""Memory that processes share: written by one, read by another without a copy; nothing is left of a killed one."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from glob import glob
from pathlib import Path

import pytest
import torch

from megatron_dapo.sync.stores import NAMES, make_cuda_memory, make_host_memory

ROOT = Path(__file__).parents[3]

READER = """
import pickle, sys
handle = pickle.load(sys.stdin.buffer)
memory = handle.open()
print(int(memory[5]), flush=True)
sys.stdin.read(1)
memory[6] = memory[5] + 1
print("written", flush=True)
"""


def started(program: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )


def test_processes_share_memory_that_has_lost_its_name_and_nothing_is_left_in_dev_shm():
    memory, handle = make_host_memory(4096)
    assert not memory.any()
    memory[5] = 42
    reader = started(READER)
    assert reader.stdin is not None
    assert reader.stdout is not None
    reader.stdin.write(pickle.dumps(handle))
    reader.stdin.flush()
    assert reader.stdout.readline() == b"42\n"
    handle.forget_name()
    assert not Path(handle.path).exists()
    memory[5] = 6
    reader.stdin.write(b".")
    reader.stdin.close()
    assert reader.stdout.read() == b"written\n"
    assert memory[6] == 7
    with pytest.raises(FileNotFoundError):
        handle.open()


def test_memory_is_taken_when_it_is_made():
    """So that a /dev/shm that is too small is said then, and is no bus error in the middle of a push."""
    memory, handle = make_host_memory(1 << 24)
    assert memory.shape == (1 << 24,)
    assert os.stat(handle.path).st_blocks * 512 >= 1 << 24
    handle.forget_name()


def test_more_than_there_is_is_told_and_leaves_nothing():
    more = os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize + 1
    before = glob(f"{NAMES}{os.getpid()}_*")
    with pytest.raises(
        RuntimeError, match=r"/dev/shm has no room for [\d,]+ bytes .* lower .*bucket_bytes, or make it"
    ):
        make_host_memory(more)
    assert glob(f"{NAMES}{os.getpid()}_*") == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA's inter-process handles need a CUDA device")
def test_another_process_sees_cuda_memory():
    memory, handle = make_cuda_memory(4096)
    memory[5] = 42
    torch.cuda.synchronize()
    out, _ = started("import torch\n" + READER).communicate(pickle.dumps(handle), timeout=120)
    assert out == b"42\n"
