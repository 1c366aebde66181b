"""Peak memory of the conversion against the size of the model, both ways: `python benchmarks/conversion_memory.py`.

Models that differ in their number of layers alone are converted, each in a process of its own, with files of at most
`--shard-mb`. Measured is the peak of the process's resident memory above what it had when the conversion began;
pages of mapped files count. It must not grow with the model: at most `LIMIT` shards and largest tensors together, or
the program ends with 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

from megatron_dapo.conversion import Conversion, hf_to_megatron, megatron_to_hf
from megatron_dapo.manifest import find_checkpoint
from megatron_dapo.mcore.families import shape_of
from megatron_dapo.mcore.families.names import hf_shapes
from megatron_dapo.mcore.hf_save import save_hf

LAYERS = (4, 8, 16, 32)
LIMIT = 2.0  # x (one shard + the largest tensor)
MB = 10**6


@dataclass(frozen=True)
class Measured:
    direction: str
    layers: int
    model_mb: float
    shard_mb: float
    largest_tensor_mb: float
    peak_mb: float  # above the start
    seconds: float

    @property
    def limit_mb(self) -> float:
        return LIMIT * (self.shard_mb + self.largest_tensor_mb)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")
    parser.add_argument("--shard-mb", type=int, default=100)
    parser.add_argument("--one", nargs=3, metavar=("DIRECTION", "FROM", "TO"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        return convert(arguments.one[0], Path(arguments.one[1]), Path(arguments.one[2]), arguments.shard_mb * MB)
    with tempfile.TemporaryDirectory(prefix="conversion_memory_") as root:
        found = [row for layers in LAYERS for row in measure(Path(root), layers, arguments.shard_mb)]
    Console().print(as_table(found))
    over = [row for row in found if row.peak_mb > row.limit_mb]
    for row in over:
        print(f"{row.direction}, {row.layers} layers: {row.peak_mb:.0f} MB, wanted at most {row.limit_mb:.0f}")
    if arguments.json:
        rows = [asdict(row) | {"limit_mb": row.limit_mb} for row in found]
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if over else 0


def measure(root: Path, layers: int, shard_mb: int) -> Iterator[Measured]:
    hf, megatron, back = (root / f"{name}-{layers}" for name in ("hf", "megatron", "back"))
    sizes = make_model(hf, layers, shard_mb * MB)
    for direction, source, out in (("HF to Megatron", hf, megatron), ("Megatron to HF", megatron, back)):
        started = time.monotonic()
        command = [sys.executable, __file__, "--shard-mb", str(shard_mb), "--one", direction, str(source), str(out)]
        peak = int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])
        seconds = time.monotonic() - started
        yield Measured(direction, layers, sum(sizes) / MB, shard_mb, max(sizes) / MB, peak / MB, seconds)


def make_model(path: Path, layers: int, shard_bytes: int) -> list[int]:
    """A Qwen2 checkpoint in bf16; returns the bytes of each tensor."""
    config = transformers.Qwen2Config(
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    source = path.with_name(f"{path.name}-config")
    config.save_pretrained(source)
    shapes = hf_shapes(shape_of(config))
    tensors = ((name, torch.rand(dims).bfloat16()) for name, dims in shapes.items())
    save_hf(tensors, shapes, torch.bfloat16, str(source), path, writes=True, shard_bytes=shard_bytes)
    return [2 * torch.Size(dims).numel() for dims in shapes.values()]


def convert(direction: str, source: Path, out: Path, shard_bytes: int) -> int:
    """In a process of its own: prints the peak in bytes above the start."""
    torch.set_num_threads(1)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of the imports: forget it
    before = memory("VmRSS")
    how = Conversion(shard_bytes=shard_bytes)
    if direction == "HF to Megatron":
        hf_to_megatron(source, out, how)
    else:
        megatron_to_hf(find_checkpoint(source), out, how)
    print(memory("VmHWM") - before)
    return 0


def memory(field: str) -> int:
    """Bytes: VmRSS is what is resident now, VmHWM its peak."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024


def as_table(found: list[Measured]) -> Table:
    table = Table(title="peak memory of the conversion, above its start")
    for name in ("direction", "layers", "model MB", "shard MB", "largest tensor MB", "peak MB", "limit MB", "seconds"):
        table.add_column(name, justify="left" if name == "direction" else "right")
    for row in found:
        numbers = (row.model_mb, row.shard_mb, row.largest_tensor_mb, row.peak_mb, row.limit_mb)
        table.add_row(row.direction, str(row.layers), *(f"{n:.0f}" for n in numbers), f"{row.seconds:.1f}")
    return table


if __name__ == "__main__":
    sys.exit(main())
