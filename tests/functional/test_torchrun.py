"""The same run over several ranks, and Ctrl-C in it: real processes, as a user starts them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_run import make_workspace

from megatron_dapo.obs.jsonl import deterministic_part, read_metrics

MEGATRON = "actor_rollout_ref.actor.megatron"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def command(ranks: int, config: Path, out: Path, *overrides: str) -> list[str]:
    run = ["-m", "megatron_dapo", "train", str(config), f"trainer.default_local_dir={out}", *overrides]
    if ranks == 1:
        return [sys.executable, *run]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *run]


def start(*args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(args, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out[-1000:] + err[-4000:]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("torchrun"), tied=True)


@pytest.fixture(scope="module")
def alone(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    finish(start(*command(1, config, out)))
    return out


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (2, ["tensor_model_parallel_size=2", "sequence_parallel=true"]),
        (2, []),
        pytest.param(2, ["pipeline_model_parallel_size=2"], marks=pytest.mark.slow),
        pytest.param(2, ["context_parallel_size=2"], marks=pytest.mark.slow),
        pytest.param(
            4,
            ["tensor_model_parallel_size=2", "pipeline_model_parallel_size=2", "sequence_parallel=true"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["TP2 SP", "DP2", "PP2", "CP2", "TP2 PP2 SP"],
)
def test_a_run_over_several_ranks_is_the_run_on_one(
    config: Path, alone: Path, tmp_path: Path, ranks: int, overrides: list[str]
) -> None:
    finish(start(*command(ranks, config, tmp_path, *(f"{MEGATRON}.{override}" for override in overrides))))
    wanted = [deterministic_part(record) for record in read_metrics(alone / "metrics.jsonl")]
    found = [deterministic_part(record) for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert [record["step"] for record in found] == [record["step"] for record in wanted]
    for one, several in zip(wanted, found, strict=True):
        exact = {name for name in one if name.startswith(("sampling/", "reward/", "response/"))}
        assert {name: several[name] for name in exact} == {name: one[name] for name in exact}
        for name in ("actor/loss", "actor/grad_norm", "actor/entropy", "actor/ratio"):
            if name in one:
                assert several[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_saves_the_state_and_the_next_start_goes_on(config: Path, tmp_path: Path, ranks: int) -> None:
    process = start(
        *command(ranks, config, tmp_path, "trainer.total_training_steps=100000", "trainer.logger=[console]")
    )
    assert process.stdout is not None
    while "step 2/" not in (line := process.stdout.readline()):
        assert line, process.communicate()[1][-4000:]
    _interrupt(process)
    _, err = process.communicate(timeout=120)
    assert "stopped by Ctrl-C" in err
    if ranks == 1:
        assert process.returncode == 130
    steps = [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert (tmp_path / "checkpoints" / "latest").read_text() == f"step_{steps[-1]:08d}"
    finish(start(*command(ranks, config, tmp_path, f"trainer.total_training_steps={steps[-1] + 1}")))
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [*steps, steps[-1] + 1]


def test_a_port_in_use_is_named_at_once(config: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ranks = ["--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", str(port)]
        run = start(*command(1, config, tmp_path)[:1], "-m", "torch.distributed.run", *ranks, "-m", "megatron_dapo")
        _, err = run.communicate(timeout=120)
    assert run.returncode == 1
    assert f"port: {port}" in err
    assert "address already in use" in err


def _interrupt(process: subprocess.Popen[str]) -> None:
    """SIGINT to every process of the run, as a terminal sends it."""
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    for pid in [process.pid, *map(int, children)]:
        os.kill(pid, signal.SIGINT)
    time.sleep(0.1)
