"""Seconds and peak memory of counting and deduplicating a training file: `python benchmarks/prepare_data.py`.

Made-up rows in the recipe's schema, each with an `extra_info.index` of its own: a quarter of the published file's
number with as many distinct prompts, its number, and its number with no prompt twice. Each in a process of its own,
which writes the deduplicated file. Memory must follow the distinct prompts, not the rows.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from megatron_dapo.data.prepare.pipeline import Preparation, prepare
from megatron_dapo.data.prepare.rows import PROBLEM_SCHEMA, RowFiles, recipe_row

ROWS, DISTINCT = 1_790_000, 17_398  # of the published file, about
ROW_GROUP = 100_000
WORDS = 5000


@dataclass(frozen=True)
class Measured:
    rows: int
    distinct: int
    file_mb: float
    seconds: float  # CPU
    peak_mb: float  # resident, the libraries included


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--one", nargs=2, metavar=("FROM", "TO"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        return _measure(*map(Path, arguments.one))
    cases = [(arguments.rows // 4, DISTINCT), (arguments.rows, DISTINCT), (arguments.rows, arguments.rows)]
    with tempfile.TemporaryDirectory(prefix="prepare_data_") as root:
        measured = [_case(rows, distinct, Path(root)) for rows, distinct in cases]
    table = Table("rows", "distinct prompts", "file, MB", "CPU-s", "peak, MB")
    for each in measured:
        numbers = (f"{each.file_mb:.0f}", f"{each.seconds:.1f}", f"{each.peak_mb:.0f}")
        table.add_row(f"{each.rows:,}", f"{each.distinct:,}", *numbers)
    Console().print(table)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(each) for each in measured], indent=2) + "\n")
    return 0


def _case(rows: int, distinct: int, root: Path) -> Measured:
    source = root / "rows.parquet"
    _write(source, rows, distinct)
    command = [sys.executable, __file__, "--one", str(source), str(root / "out.parquet")]
    ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Measured(file_mb=source.stat().st_size / 1e6, **json.loads(ended.stdout))


def _measure(source: Path, out: Path) -> int:
    started = time.process_time()
    report = prepare(RowFiles([source]), Preparation(out, deduplicate=True))
    seconds = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    print(json.dumps({"rows": report.rows, "distinct": report.distinct, "seconds": seconds, "peak_mb": peak}))
    return 0


def _write(path: Path, rows: int, distinct: int) -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(WORDS)]
    texts = [" ".join(rng.choices(words, k=rng.randint(20, 70))) for _ in range(min(distinct, DISTINCT))]
    with pq.ParquetWriter(path, PROBLEM_SCHEMA) as writer:
        for start in range(0, rows, ROW_GROUP):
            group = [
                recipe_row(f"{texts[prompt % len(texts)]} {prompt}", str(prompt % 1000), "math_dapo", row)
                for row, prompt in ((row, row % distinct) for row in range(start, min(rows, start + ROW_GROUP)))
            ]
            writer.write_batch(pa.RecordBatch.from_pylist(group, schema=PROBLEM_SCHEMA))


if __name__ == "__main__":
    sys.exit(main())
