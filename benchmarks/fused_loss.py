"""The fused loss against full logits and recomputed chunks: seconds, workspace and the rate over three products.

    python benchmarks/fused_loss.py --json fused_loss.json          # the CPU case, or on CUDA its cases
    python benchmarks/fused_loss.py --chunks 8 16 32 64             # MiB of logits held: a table

All sides get the same hidden states, weight and terms and give the same: the loss of DAPO, log-prob and entropy of
each token, dh, and dW added to a float32 `main_grad`. Each measurement is a process of its own, in turns. Seconds are
of CPU (process time) on a CPU and of the device on CUDA. *Workspace* is the peak beyond hidden states, weight, dh and
`main_grad`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

SIDES = Path(__file__).parent / "support" / "loss_sides.py"
MIB = 2**20


@dataclass(frozen=True)
class Shape:
    """n tokens, hidden size h, v rows of the vocabulary."""

    tokens: int
    hidden: int
    vocabulary: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.tokens} × {self.hidden} × {self.vocabulary} {self.dtype}"

    @property
    def flops(self) -> float:
        """Of the three products."""
        return 6.0 * self.tokens * self.hidden * self.vocabulary


CPU_SHAPES = (Shape(8192, 512, 32768, "float32"),)
CUDA_SHAPES = tuple(Shape(n, 5120, v, "bfloat16") for v in (19008, 152064) for n in (8192, 20480, 40960))
CPU_CHUNKS, CUDA_CHUNKS = (64,), (64, 256, 512, 1024)


@dataclass(frozen=True)
class Cost:
    """The medians over the repetitions."""

    shape: str
    side: str
    chunk_mib: int | None  # logits that are held at once; None: all
    seconds: float
    lowest: float
    highest: float
    workspace_mib: float
    total_peak_mib: float  # of the process on a CPU, of the device's allocations on CUDA
    product_share: float  # of the measured rate of products, over three products


def measure(shape: Shape, chunks: Sequence[int], repetitions: int) -> tuple[list[Cost], float]:
    """Every side in turns; and the product rate (of the same machine, in turns too) in GFLOP/s."""
    runs: list[tuple[str, int | None]] = [("eager", None), *(("recompute", c) for c in chunks[:1]), ("liger", None)]
    runs += [("verl", None), *(("fused", c) for c in chunks)]
    found: dict[tuple[str, int | None], list[dict[str, float]]] = {}
    rates: list[float] = []
    for repetition in range(repetitions):
        for side, chunk in runs if repetition % 2 == 0 else runs[::-1]:
            answer = _run(shape, side, chunk)
            if "skipped" in answer:
                if repetition == 0:
                    print(f"{side} skipped: {answer['skipped']}", file=sys.stderr)
                continue
            found.setdefault((side, chunk), []).append(answer)
            print(f"{shape} {side} {chunk or ''}: {answer['seconds']:.2f} s", file=sys.stderr, flush=True)
        rates.append(_run(shape, "products", None)["gflops"])
    rate = statistics.median(rates)
    return [_cost(shape, *run, found[run], rate) for run in runs if run in found], rate


def _run(shape: Shape, side: str, chunk: int | None) -> dict:
    words = [side, shape.tokens, shape.hidden, shape.vocabulary, shape.dtype, (chunk or 0) * MIB]
    done = subprocess.run([sys.executable, str(SIDES), *map(str, words)], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _cost(shape: Shape, side: str, chunk: int | None, answers: Sequence[dict[str, float]], rate: float) -> Cost:
    seconds = [answer["seconds"] for answer in answers]
    return Cost(
        shape=str(shape),
        side=side,
        chunk_mib=chunk,
        seconds=statistics.median(seconds),
        lowest=min(seconds),
        highest=max(seconds),
        workspace_mib=statistics.median(answer["workspace"] for answer in answers) / MIB,
        total_peak_mib=statistics.median(answer["peak"] for answer in answers) / MIB,
        product_share=shape.flops / 1e9 / statistics.median(seconds) / rate,
    )


def cost_table(costs: Sequence[Cost], rate: float) -> Table:
    table = Table(title=f"{costs[0].shape}; products alone: {rate:.1f} GFLOP/s", title_justify="left")
    names = ("side", "chunk MiB", "s", "lowest", "highest", "of product rate", "workspace MiB", "peak MiB")
    names += ("eager s /", "eager workspace /")
    for name in names:
        table.add_column(name, justify="left" if name == "side" else "right")
    eager = next((cost for cost in costs if cost.side == "eager"), None)
    for cost in costs:
        times = (f"{number:.3f}" for number in (cost.seconds, cost.lowest, cost.highest))
        ratios = ("", "")
        if eager is not None:
            ratios = (f"{eager.seconds / cost.seconds:.2f}", f"{eager.workspace_mib / cost.workspace_mib:.1f}")
        memory = (f"{cost.workspace_mib:.0f}", f"{cost.total_peak_mib:.0f}")
        table.add_row(cost.side, str(cost.chunk_mib or "all"), *times, f"{cost.product_share:.0%}", *memory, *ratios)
    return table


def main() -> None:
    arguments = _arguments()
    on_cuda = _has_cuda()
    shapes = CUDA_SHAPES if on_cuda else CPU_SHAPES
    if arguments.shape:
        tokens, hidden, vocabulary = arguments.shape
        shapes = (Shape(tokens, hidden, vocabulary, "bfloat16" if on_cuda else "float32"),)
    chunks = arguments.chunks or (CUDA_CHUNKS if on_cuda else CPU_CHUNKS)
    console, found = Console(width=120), []
    if not on_cuda:
        print("no CUDA device: the CPU case alone", file=sys.stderr)
    for shape in shapes:
        costs, rate = measure(shape, chunks, arguments.repetitions)
        console.print(cost_table(costs, rate))
        found.append({"product_gflops": rate, "costs": [asdict(cost) for cost in costs]})
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


def _has_cuda() -> bool:
    code = "import torch; print(torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "True"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same numbers there")
    parser.add_argument("--chunks", type=int, nargs="+", metavar="MIB", help="logits held at once, each in turn")
    parser.add_argument("--shape", type=int, nargs=3, metavar=("TOKENS", "HIDDEN", "VOCABULARY"), help="another case")
    parser.add_argument("--repetitions", type=int, default=3, help="processes of each side")
    return parser.parse_args()


if __name__ == "__main__":
    main()
