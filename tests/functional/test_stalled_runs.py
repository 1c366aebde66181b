"""Whole runs over two ranks: one whose rank stalls ends by name and is gone on with; a slow one is let alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny_run import make_workspace

from megatron_dapo.obs.jsonl import deterministic_part, read_metrics

SCRIPT = Path(__file__).with_name("stalling_run.py")
LIMIT = 6  # seconds


def start(fault: str, config: Path, out: Path, *overrides: str) -> subprocess.Popen[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    settings = [f"trainer.default_local_dir={out}", f"trainer.stall_seconds={LIMIT}", "trainer.save_freq=1", *overrides]
    return subprocess.Popen(
        [*torchrun, "--shutdown-timeout", "2", str(SCRIPT), fault, "train", str(config), *settings],
        env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], code: int) -> str:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == code, said[-6000:]
    return said


def metrics(out: Path) -> list[dict[str, Any]]:
    return [deterministic_part(record) for record in read_metrics(out / "metrics.jsonl")]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("stalled"), tied=True)


@pytest.fixture(scope="module")
def side_by_side(config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Fault -> folder of a run that comes to its end; all at the same time."""
    folders = {fault: tmp_path_factory.mktemp("run") for fault in ("none", "slow rollout")}
    runs = {fault: start(fault, config, out) for fault, out in folders.items()}
    for fault, run in runs.items():
        (folders[fault] / "said").write_text(finish(run, 0))
    return folders


def test_two_runs_side_by_side_and_a_slow_rollout_disturb_nothing(side_by_side: dict[str, Path]) -> None:
    assert len(metrics(side_by_side["none"])) == 4
    assert metrics(side_by_side["slow rollout"]) == metrics(side_by_side["none"])
    slow = read_metrics(side_by_side["slow rollout"] / "metrics.jsonl")
    assert max(step.get("seconds/rollout", 0) for step in slow) > LIMIT
    assert not [out for out in side_by_side.values() if "stood still" in (out / "said").read_text()]


def test_a_stall_is_named_and_the_save_under_way_is_what_the_next_start_goes_on_from(
    config: Path, side_by_side: dict[str, Path], tmp_path: Path
) -> None:
    said = finish(start("stall", config, tmp_path), 1)
    assert "RankStalledError: rank 1 stood still for " in said
    assert "in PolicyWorker.update, micro-batch 1 of " in said
    assert "in stuck_here" in said
    assert "The save after step 2 that was under way was completed. The next start goes on after step 2, from" in said
    assert (tmp_path / "exit_status").read_text() == "1\n"
    assert "resuming after step 2" in finish(start("none", config, tmp_path), 0)
    assert metrics(tmp_path) == metrics(side_by_side["none"])


@pytest.mark.slow
def test_a_stopped_rank_ends_the_run_and_is_ended(config: Path, side_by_side: dict[str, Path], tmp_path: Path) -> None:
    run = start("none", config, tmp_path, "trainer.total_training_steps=100000", "trainer.logger=[console]")
    assert run.stdout is not None
    while "step 2/" not in (line := run.stdout.readline()):
        assert line
    ranks = [child for child in psutil.Process(run.pid).children() if str(SCRIPT) in child.cmdline()]
    (stopped,) = [rank for rank in ranks if rank.environ()["RANK"] == "1"]
    stopped.send_signal(signal.SIGSTOP)
    said = finish(run, 1)
    assert "rank 1 has not answered for " in said
    assert "The next start goes on after step " in said
    assert not psutil.wait_procs(ranks, timeout=10)[1]
    finish(start("none", config, tmp_path), 0)
    assert metrics(tmp_path)[:3] == metrics(side_by_side["none"])[:3]
