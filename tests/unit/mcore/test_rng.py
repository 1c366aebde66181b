"""Every random stream goes on where its state was taken, also after a way through JSON and safetensors."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from megatron.core import tensor_parallel

from megatron_dapo.checkpoints.state_file import read_state, write_state
from megatron_dapo.mcore.parallel import RankLayout
from megatron_dapo.mcore.rng import rng_state, set_rng_state


def draws() -> list[float]:
    found = [random.random(), random.gauss(0, 1), np.random.random(), np.random.standard_normal(), torch.rand(1).item()]
    with tensor_parallel.get_cuda_rng_tracker().fork():
        found.append(torch.rand(1).item())
    return found


def test_all_streams_go_on_as_if_nothing_had_been_drawn(layout: RankLayout, tmp_path: Path):
    draws()  # leaves half a pair of normal deviates in Python and numpy
    write_state(tmp_path, {"rng": rng_state()})
    wanted = [draws() for _ in range(3)]
    assert wanted[0] != wanted[1]
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    assert draws() != wanted[0]
    set_rng_state(read_state(tmp_path)["rng"])
    assert [draws() for _ in range(3)] == wanted
