"""The CUDA shard against the CPU's, which `test_fused_loss.py` holds against autograd.

With a CUDA device, or without one under Triton's interpreter, in an environment that has the triton package:

    TRITON_INTERPRET=1 python -m pytest tests/unit/mcore/fused/test_rows.py
"""

from __future__ import annotations

import importlib.util
import os
import threading

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dapo.mcore.fused.blocked import BlockedShard
from megatron_dapo.mcore.fused.softmax import Slopes, Vocabulary, combine
from tests.unit.mcore.thread_ranks import on_ranks

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() and not INTERPRETED,
        reason="no CUDA device; TRITON_INTERPRET=1 runs the kernels without one where triton is installed",
    ),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("v, tp_size", [(37, 1), (37, 2), (5, 4), (4100, 1), (9000, 1)])
@pytest.mark.parametrize("temperature, with_entropy", [(1.0, False), (0.7, True)])
def test_the_cuda_shard_computes_what_the_cpu_shard_computes(
    dtype: torch.dtype, v: int, tp_size: int, temperature: float, with_entropy: bool
):
    from megatron_dapo.mcore.fused.rows import RowShard

    n, h, rows = 5, 16, -(-v // tp_size)
    draw = torch.Generator().manual_seed(3)
    hidden = torch.randn(n, h, generator=draw).to(dtype)
    weight = torch.randn(rows * tp_size, h, generator=draw).to(dtype)
    targets = torch.randint(v, (n,), generator=draw)
    d_logp, d_entropy = torch.randn(2, n, generator=draw)
    one_at_a_time = threading.Lock()  # ranks are threads here, and Triton's interpreter knows of one

    def rank(group: dist.ProcessGroup) -> tuple[list[Tensor], list[Tensor]]:
        mine = weight[group.rank() * rows : (group.rank() + 1) * rows].contiguous()
        vocabulary = Vocabulary(v, group, 10**9)
        wanted = BlockedShard(mine, vocabulary, temperature, n, keep=True)
        found = RowShard(mine.to(DEVICE), vocabulary, temperature, n)
        both = []
        for shard, device in ((wanted, "cpu"), (found, DEVICE)):
            with one_at_a_time:
                statistics = shard.statistics(hidden.to(device), targets.to(device)).cpu()
            softmax = combine(statistics, group)
            softmax = type(softmax)(*(x.to(device) for x in vars(softmax).values()))
            slopes = Slopes(d_logp.to(device), d_entropy.to(device) if with_entropy else None)
            d_hidden = torch.empty(n, h, dtype=dtype, device=device)
            d_weight = torch.ones(rows, h, device=device)
            with one_at_a_time:
                shard.backward(softmax, slopes, d_hidden, d_weight)
            both.append([softmax.logp.cpu(), softmax.entropy.cpu(), d_hidden.cpu().float(), d_weight.cpu()])
        return both[0], both[1]

    for wanted, found in on_ranks(tp_size, rank):
        # Without CUDA a product of bfloat16 comes out rounded; with it logits are float32, their gradient is not.
        rounding = 1e-5 if dtype is torch.float32 else 2**-7
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=rounding * max(1.0, b.abs().max().item()) * 2)
