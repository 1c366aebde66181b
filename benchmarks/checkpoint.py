"""Saving and loading a training state against raw writes and reads of the same number of bytes, in the same run.

    OMP_NUM_THREADS=1 python benchmarks/checkpoint.py --json checkpoint.json

A Qwen2 model with random weights, its AdamW state, one process. All rounds take turns, so that what else the machine
does falls on all alike; medians are compared. Raw writes are what `dd bs=4M conv=fsync` does; saves bring their files
to the disk too, and are a run's whole saves, from the driver's state to the published checkpoint. Before each read, raw
or not, the files are dropped from the page cache (`posix_fadvise`), so that both come from the disk; a second pair of
rows has them in memory. A load is all that a resume reads: every byte against its checksum, then the load into model
and optimizer. The pause of a background save is all that training stands still for: until it goes on, and while the
written checkpoint is published. An update between the saves changes all values.

What is left out: several ranks, network file systems, GPUs; the prompts' state; that training after a fork copies each
page of memory that it writes first.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

from megatron_dapo.algo.loss import PolicyLossConfig
from megatron_dapo.checkpoints.meta import Identity
from megatron_dapo.checkpoints.saver import Saver, SaveRules, Snapshot
from megatron_dapo.checkpoints.store import MODEL, CheckpointStore
from megatron_dapo.config.tree import MegatronConfig, OptimConfig
from megatron_dapo.digests import digest_file
from megatron_dapo.mcore.fused_loss import Objective
from megatron_dapo.mcore.optimizer import apply_update, zero_gradients
from megatron_dapo.mcore.parallel import shutdown
from megatron_dapo.runtime.host import WorkerHost
from megatron_dapo.runtime.spmd import SpmdControl
from megatron_dapo.workers.policy import PolicySettings, PolicyWorker
from megatron_dapo.workers.policy_group import MicroBatchLimits, PassLimits, PolicyGroup

BLOCK = 4 << 20  # bytes
LOAD_GOAL, PAUSE_GOAL = 0.7, 0.1


@dataclass(frozen=True)
class Measured:
    """Of one kind of round."""

    name: str
    median_seconds: float
    lowest_seconds: float
    gigabytes_per_second: float  # of the median; 10^9 bytes


class Run:
    """A policy with made-up updates, and what saves it."""

    def __init__(self, root: Path, model: Path):
        self.worker = PolicyWorker(_settings(model))
        host = WorkerHost()
        host.add(self.worker)
        no_limit = MicroBatchLimits(None, None)
        group = SpmdControl.connect().group(host)
        self.policy = PolicyGroup(group, PassLimits(no_limit, no_limit, no_limit))
        self.store = CheckpointStore(root)
        identity = Identity(self.policy.layout, {"family": "qwen2"}, {})
        self.saver = Saver(self.store, None, self.policy, identity, SaveRules(True, None), self._snapshot, print)
        self.updates = 0

    def update(self) -> None:
        zero_gradients(self.worker.modules, self.worker.optimizer)
        for chunk in self.worker.chunks:
            for param in chunk.parameters():
                param.main_grad.normal_()  # type: ignore[attr-defined]  (Megatron's)
        apply_update(self.worker.optimizer, 1e-4, 0.0)
        self.updates += 1

    def save(self, background: bool) -> tuple[float, float]:
        """Seconds that training stands still, and until the checkpoint is published."""
        self.update()
        begun = time.perf_counter()
        self.saver.save(background)
        pause = time.perf_counter() - begun
        if background:
            self.worker.save_outcome(wait=True)
            pause += seconds(self.saver.settle)
        return pause, time.perf_counter() - begun

    def newest(self) -> Path:
        """The folder of model and optimizer."""
        return self.store.entries()[0].path / MODEL

    def load(self) -> None:
        for path in self.newest().iterdir():  # a resume reads several files at a time; here one thread on both sides
            digest_file(path)
        self.worker.load(str(self.newest()))

    def forget_all(self) -> None:
        shutil.rmtree(self.store.root)

    def _snapshot(self) -> Snapshot:
        return Snapshot(self.updates, {"rng": self.policy.rng_states()})


def _settings(model: Path) -> PolicySettings:
    return PolicySettings(
        model_path=str(model),
        packed=True,
        megatron=MegatronConfig(),
        optim=OptimConfig(),
        grad_clip=1.0,
        objective=Objective(PolicyLossConfig(0.2, 0.28, 10.0), temperature=1.0),
        seed=1,
        with_reference=False,
    )


def save_model(folder: Path, hidden: int, layers: int) -> None:
    config = transformers.Qwen2Config(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=4096,
        tie_word_embeddings=False,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def write_raw(path: Path, size: int, block: bytes) -> None:
    with path.open("wb", buffering=0) as file:
        for start in range(0, size, BLOCK):
            file.write(block[: min(BLOCK, size - start)])
        os.fsync(file.fileno())


def read_raw(path: Path) -> None:
    block = bytearray(BLOCK)
    with path.open("rb", buffering=0) as file:
        while file.readinto(block):
            pass


def forget(paths: Iterable[Path]) -> None:
    """Drop the files from the page cache."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def seconds(action: Callable[[], object]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def one_round(run: Run, raw: Path, size: int, block: bytes) -> dict[str, float]:
    """All kinds once; `size` bytes are written raw."""
    took = {"raw write": seconds(lambda: write_raw(raw, size, block))}
    _, took["save, waited for"] = run.save(background=False)
    took["pause of a background save"], took["background save, to its end"] = run.save(background=True)
    folder = run.newest()
    for where in ("disk", "memory"):
        for name, action in (("raw read", lambda: [read_raw(path) for path in folder.iterdir()]), ("load", run.load)):
            if where == "disk":
                forget(folder.iterdir())
            took[f"{name}, from {where}"] = seconds(action)
    run.forget_all()
    return took


def measure(hidden: int, layers: int, rounds: int, root: Path) -> tuple[list[Measured], int]:
    with tempfile.TemporaryDirectory(dir=root) as folder:
        save_model(Path(folder, "model"), hidden, layers)
        run = Run(Path(folder), Path(folder, "model"))
        run.save(background=False)
        size = sum(path.stat().st_size for path in run.newest().iterdir())
        run.forget_all()
        block = os.urandom(BLOCK)
        found = [one_round(run, Path(folder, "raw"), size, block) for _ in range(rounds)]
        shutdown()
    measured = []
    for name in found[0]:
        took = [round_[name] for round_ in found]
        median = statistics.median(took)
        measured.append(Measured(name, median, min(took), size / median / 1e9))
    return measured, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, default=Path("."), help="on the disk to be measured")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    measured, size = measure(arguments.hidden, arguments.layers, arguments.rounds, arguments.directory)
    by_name = {row.name: row.median_seconds for row in measured}
    ratios = {
        "load / raw read, from disk": by_name["raw read, from disk"] / by_name["load, from disk"],
        "load / raw read, from memory": by_name["raw read, from memory"] / by_name["load, from memory"],
        "load from disk / raw write": by_name["raw write"] / by_name["load, from disk"],
        "save / raw write": by_name["raw write"] / by_name["save, waited for"],
        "pause / save that is waited for": by_name["pause of a background save"] / by_name["save, waited for"],
    }
    show(measured, size, ratios)
    if arguments.json:
        record = {"bytes": size, "measured": [asdict(row) for row in measured], "bandwidth_ratios": ratios}
        with suppress(FileExistsError):
            arguments.json.parent.mkdir(parents=True)
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


def show(measured: list[Measured], size: int, ratios: dict[str, float]) -> None:
    console, table = Console(), Table(title=f"{size / 1e9:.2f} GB of model and optimizer")
    for heading in ("", "seconds (median)", "lowest", "GB/s"):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in measured:
        table.add_row(
            row.name, f"{row.median_seconds:.3f}", f"{row.lowest_seconds:.3f}", f"{row.gigabytes_per_second:.2f}"
        )
    console.print(table)
    goals = {
        "load / raw read, from disk": f"at least {LOAD_GOAL}",
        "pause / save that is waited for": f"at most {PAUSE_GOAL}",
    }
    for name, ratio in ratios.items():
        console.print(f"{name:<34} {ratio:.3f}  {goals.get(name, '')}", highlight=False)


if __name__ == "__main__":
    main()
