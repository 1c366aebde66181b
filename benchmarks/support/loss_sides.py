"""One side of the loss benchmark in a process of its own; prints a line of JSON.

python loss_sides.py SIDE TOKENS HIDDEN VOCABULARY DTYPE LOGITS_BYTES: {"seconds", "workspace", "peak"} (bytes), or
{"skipped": why}; SIDE "products": {"gflops"}, the rate of the three products alone.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.utils.checkpoint import checkpoint

from megatron_dapo.algo.loss import PolicyLossConfig
from megatron_dapo.mcore.batch import HeadTerms
from megatron_dapo.mcore.fused_loss import MainGrad, Objective, Vocabulary, dapo_loss

LOW, HIGH, DUAL = 0.2, 0.28, 10.0
WARM_UP_TOKENS = 64


@dataclass(frozen=True)
class Inputs:
    hidden: Tensor  # [n,h]
    weight: Tensor  # [v,h]
    main_grad: Tensor  # [v,h] float32
    targets: Tensor  # [n]
    old_logp: Tensor
    advantage: Tensor
    loss_weight: Tensor

    def first(self, tokens: int) -> Inputs:
        parts = (x[:tokens] for x in (self.targets, self.old_logp, self.advantage, self.loss_weight))
        return Inputs(self.hidden[:tokens].detach().requires_grad_(), self.weight, self.main_grad, *parts)


def make_inputs(n: int, h: int, v: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    draw = torch.Generator().manual_seed(0)

    def normal(*dims: int) -> Tensor:
        return torch.randn(dims, generator=draw)

    return Inputs(
        hidden=normal(n, h).to(device, dtype).requires_grad_(),
        weight=normal(v, h).div_(h**0.5).to(device, dtype).requires_grad_(),
        main_grad=torch.zeros(v, h, device=device),
        targets=torch.randint(v, (n,), generator=draw).to(device),
        old_logp=(normal(n) * 0.1 - 11).to(device),
        advantage=normal(n).to(device),
        loss_weight=torch.full((n,), 1 / n, device=device),
    )


def eager(inputs: Inputs, _: int) -> None:
    logp, _entropy = softmax(inputs.hidden, inputs.weight, inputs.targets)
    finish(inputs, policy(logp, inputs))


def recompute(inputs: Inputs, logits_bytes: int) -> None:
    size = max(1, logits_bytes // (4 * len(inputs.weight)))
    parts = [
        checkpoint(softmax, h, inputs.weight, y, use_reentrant=False)
        for h, y in zip(inputs.hidden.split(size), inputs.targets.split(size), strict=True)
    ]
    finish(inputs, policy(torch.cat([logp for logp, _ in parts]), inputs))


def fused(inputs: Inputs, logits_bytes: int) -> None:
    n, v = len(inputs.hidden), len(inputs.weight)
    nowhere = torch.zeros(n, dtype=torch.int64, device=inputs.targets.device)
    terms = HeadTerms(inputs.loss_weight, inputs.advantage, inputs.old_logp, None, None, nowhere, 1)
    objective = Objective(PolicyLossConfig(LOW, HIGH, DUAL), temperature=1.0)
    vocabulary = Vocabulary(v, dist.ProcessGroup(HashStore(), 0, 1), logits_bytes)
    main_grad = MainGrad(inputs.main_grad, shared=False)
    result = dapo_loss(inputs.hidden, inputs.weight, inputs.targets, terms, objective, vocabulary, main_grad=main_grad)
    result.loss.backward()
    inputs.weight.grad = None


def liger(inputs: Inputs, _: int) -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss  # pyright: ignore[reportMissingImports]

    # It takes [sequences, tokens]: rows of 1024 tokens, whose advantage is their first token's.
    rows = len(inputs.hidden) // 1024 or 1
    loss = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, epsilon_low=LOW, epsilon_high=HIGH, loss_type="dapo", delta=DUAL
    )
    found = loss(
        inputs.hidden.view(rows, -1, inputs.hidden.size(1)),
        inputs.weight,
        inputs.targets.view(rows, -1),
        torch.ones_like(inputs.targets).view(rows, -1),
        inputs.advantage.view(rows, -1)[:, 0],
        old_per_token_logps=inputs.old_logp.view(rows, -1),
    )
    finish(inputs, found[0])


def verl(inputs: Inputs, _: int) -> None:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

    logp, _entropy = linear_cross_entropy(inputs.hidden, inputs.weight, inputs.targets, 1.0, "none")
    finish(inputs, policy(logp, inputs))


SIDES: dict[str, Callable[[Inputs, int], None]] = {
    "eager": eager,
    "recompute": recompute,
    "fused": fused,
    "liger": liger,
    "verl": verl,
}
PACKAGES = {"liger": ("liger_kernel", "liger-kernel"), "verl": ("verl", "verl")}  # CUDA alone


def softmax(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-prob, and entropy without a gradient, through full logits."""
    logp_all = (hidden @ weight.T).float().log_softmax(-1)
    with torch.no_grad():
        entropy = -(logp_all.exp() * logp_all).sum(-1)
    return logp_all.gather(1, targets[:, None])[:, 0], entropy


def policy(logp: Tensor, inputs: Inputs) -> Tensor:
    ratio, advantage = (logp - inputs.old_logp).exp(), inputs.advantage
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - LOW, 1 + HIGH))
    loss = torch.where(advantage < 0, torch.minimum(loss, -advantage * DUAL), loss)
    return (inputs.loss_weight * loss).sum()


def finish(inputs: Inputs, loss: Tensor) -> None:
    """Backward, and what Megatron's DDP does with a weight's gradient."""
    loss.backward()
    assert inputs.weight.grad is not None
    inputs.main_grad.add_(inputs.weight.grad)
    inputs.weight.grad = None


def products(inputs: Inputs) -> float:
    """GFLOP/s of the three products with hot buffers: 2048 tokens, the weight's gradient added in place."""
    n = min(2048, len(inputs.hidden))
    hidden, weight = inputs.hidden[:n].detach(), inputs.weight.detach()
    logits = hidden @ weight.T
    d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)

    def once() -> None:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=d_hidden)
        d_weight.addmm_(logits.T, hidden)

    once()
    return 6.0 * n * weight.numel() / min(seconds_of(once, hidden.device) for _ in range(3)) / 1e9


def seconds_of(work: Callable[[], None], device: torch.device) -> float:
    if device.type == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()  # type: ignore[no-untyped-call]
    work()
    stop.record()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1e3


class ResidentPeak:
    """The highest resident memory of this process while inside, sampled by a thread that costs next to nothing."""

    def __enter__(self) -> ResidentPeak:
        self._process, self._done = psutil.Process(), threading.Event()
        self.bytes = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.bytes = max(self.bytes, self._process.memory_info().rss)


def measure(side: Callable[[Inputs, int], None], inputs: Inputs, logits_bytes: int) -> dict[str, float]:
    """Seconds, and the peak beyond inputs, main_grad and dh."""
    device, d_hidden = inputs.hidden.device, inputs.hidden.numel() * inputs.hidden.element_size()
    if device.type == "cuda":
        side(inputs, logits_bytes)  # compiles, and picks the products' algorithms
        inputs.hidden.grad = None
        seconds = []
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(5):
            seconds.append(seconds_of(lambda: side(inputs, logits_bytes), device))
            inputs.hidden.grad = None
        peak = torch.cuda.max_memory_allocated()
        return {"seconds": sorted(seconds)[2], "workspace": peak - before - d_hidden, "peak": peak}
    side(inputs.first(WARM_UP_TOKENS), logits_bytes)
    gc.collect()
    before = psutil.Process().memory_info().rss
    with ResidentPeak() as peak:
        took = seconds_of(lambda: side(inputs, logits_bytes), device)
    return {"seconds": took, "workspace": peak.bytes - before - d_hidden, "peak": peak.bytes}


def why_not(side: str, device: torch.device) -> str | None:
    if side not in PACKAGES:
        return None
    if device.type != "cuda":
        return "its kernels want CUDA"
    module, package = PACKAGES[side]
    return None if importlib.util.find_spec(module) else f"pip install --no-deps {package} to have it measured"


def main(side: str, n: int, h: int, v: int, dtype: str, logits_bytes: int) -> None:
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = why_not(side, device)
    if reason:
        print(json.dumps({"skipped": reason}))
        return
    inputs = make_inputs(n, h, v, getattr(torch, dtype), device)
    answer = {"gflops": products(inputs)} if side == "products" else measure(SIDES[side], inputs, logits_bytes)
    print(json.dumps(answer))


if __name__ == "__main__":
    tokens, hidden, vocabulary = map(int, sys.argv[2:5])
    main(sys.argv[1], tokens, hidden, vocabulary, sys.argv[5], int(sys.argv[6]))
