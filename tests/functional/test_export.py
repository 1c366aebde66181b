"""A run's checkpoint, written on two ranks, is exported by one process: the weights that the run ended with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import make_workspace

from megatron_dapo.cli import main

MEGATRON = "actor_rollout_ref.actor.megatron"


@pytest.mark.parametrize(
    "overrides",
    [
        [f"{MEGATRON}.tensor_model_parallel_size=2", f"{MEGATRON}.sequence_parallel=true"],
        pytest.param([f"{MEGATRON}.pipeline_model_parallel_size=2"], marks=pytest.mark.slow),
        pytest.param([], marks=pytest.mark.slow),
    ],
    ids=["TP2 SP", "PP2", "DP2"],
)
def test_a_run_on_two_ranks_is_exported_verified_as_it_ended(tmp_path: Path, overrides: list[str]) -> None:
    config, run, out = make_workspace(tmp_path), tmp_path / "run", tmp_path / "out"
    settings = ["trainer.total_training_steps=2", f"trainer.default_local_dir={run}", *overrides]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "megatron_dapo", "train", str(config), *settings],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert main(["export", str(run), str(out), "--verify"]) == 0
    found, wanted = load_file(out / "model.safetensors"), load_file(run / "hf" / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    first = load_file(tmp_path / "model" / "model.safetensors")
    assert all(not torch.equal(found[name], first[name]) for name in first), "training changed nothing"
