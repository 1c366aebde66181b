"""launch/torchrun.sh, and launch/submit.sh to a Ray head with a dashboard that launch/ray_cluster.sh started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tiny_run import make_workspace

from megatron_dapo.checkpoints.store import CheckpointStore
from megatron_dapo.exit_codes import FAILED, REQUEUE, USAGE_ERROR
from megatron_dapo.obs.jsonl import read_metrics
from megatron_dapo.rollout.server_process import free_port

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
ENVIRONMENT = os.environ | {"VENV": sys.prefix, "PATH": f"{sys.prefix}/bin{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("scripts"), tied=True)


def torchrun(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [LAUNCH / "torchrun.sh", *words],
        env=ENVIRONMENT | {"RANKS_PER_NODE": "2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_torchrun_sh_passes_signals_on_and_ends_with_the_runs_own_code(config: Path, tmp_path: Path) -> None:
    """torchrun's own code is 1, whatever the run's is."""
    words = [str(config), f"trainer.default_local_dir={tmp_path}", "trainer.val_before_train=false"]
    run = torchrun(*words, "trainer.logger=[console]", "trainer.total_training_steps=100000")
    assert run.stdout is not None
    said = ""
    while "step 1/" not in said:
        line = run.stdout.readline()
        assert line, said
        said += line
    run.send_signal(signal.SIGUSR1)
    said += run.communicate(timeout=180)[0]
    assert run.returncode == REQUEUE, said
    assert (tmp_path / "exit_status").read_text() == f"{REQUEUE}\n"
    assert len(CheckpointStore(tmp_path).entries()) == 1


def test_torchrun_sh_names_a_wrong_setting_before_it_starts_anything(config: Path) -> None:
    run = torchrun(str(config), "trainer.n_gpu_per_node=2")
    assert "trainer.n_gpus_per_node" in run.communicate(timeout=60)[0]
    assert run.returncode == USAGE_ERROR


@pytest.fixture
def dashboard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the dashboard of a head with two CPU slots."""
    folder = tmp_path_factory.mktemp("h")  # short: the paths of Ray's sockets have a limit
    port = free_port()
    environment = ENVIRONMENT | {
        "HEAD_ADDRESS": "127.0.0.1",
        "RAY_PORT": str(free_port()),
        "DASHBOARD_PORT": str(port),
        "RAY_TMP": str(folder / "tmp"),
        "LOGS": str(folder / "logs"),
        "RAY_AUTH_MODE": "disabled",
        "SLURM_CPUS_ON_NODE": "3",  # two for ranks, one for the job's own process
        "SLURM_GPUS_ON_NODE": "0",
        "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(100 * 2**20),
    }
    head = subprocess.Popen([LAUNCH / "ray_cluster.sh", "head"], env=environment, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    for _ in range(120):
        with suppress(OSError), urllib.request.urlopen(f"{address}/api/version", timeout=5):
            break
        assert head.poll() is None
        time.sleep(1)
    yield address
    head.send_signal(signal.SIGUSR2)
    head.wait(60)
    assert not (folder / "tmp").exists()


@pytest.mark.slow
def test_submit_sh_runs_a_job_on_a_cluster(config: Path, dashboard: str, tmp_path: Path) -> None:
    settings = [f"trainer.default_local_dir={tmp_path}", "trainer.n_gpus_per_node=2", "trainer.val_before_train=false"]
    environment = ENVIRONMENT | {"RAY_ADDRESS": dashboard, "RAY_AUTH_MODE": "disabled", "WORKING_DIR": str(ROOT)}
    words = [LAUNCH / "submit.sh", str(config), *settings]
    job = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=400)
    assert job.returncode == 0, job.stdout + job.stderr
    assert "succeeded" in job.stdout
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def drive(folder: Path, **environment: str) -> subprocess.Popen[str]:
    """The driver's script where no head answers."""
    variables = {"HEAD_ADDRESS": "127.0.0.1", "RAY_PORT": str(free_port()), "LOGS": str(folder)} | environment
    command = [LAUNCH / "ray_cluster.sh", "drive", "config.yaml"]
    return subprocess.Popen(command, env=ENVIRONMENT | variables, stderr=subprocess.PIPE, text=True)


def test_a_driver_without_a_head_gives_up_and_says_where_it_looked(tmp_path: Path) -> None:
    run = drive(tmp_path, NODE_WAIT_SECONDS="0", RAY_PORT="1")
    assert "no Ray head answers at 127.0.0.1:1 after 0 s" in run.communicate(timeout=60)[1]
    assert run.returncode == FAILED


def test_a_driver_does_not_wait_for_a_head_that_has_ended(tmp_path: Path) -> None:
    (tmp_path / "head_ended").touch()
    run = drive(tmp_path)
    assert "the Ray head has ended: see the first node's log" in run.communicate(timeout=60)[1]
    assert run.returncode == FAILED


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_driver_that_is_preempted_before_the_nodes_came_asks_to_be_started_again(
    tmp_path: Path, number: signal.Signals
) -> None:
    run = drive(tmp_path / "logs")
    while not (tmp_path / "logs").exists():  # made just before it waits
        time.sleep(0.02)
    time.sleep(1)
    run.send_signal(number)
    run.communicate(timeout=60)
    assert run.returncode == REQUEUE


def test_submit_sh_wants_a_configuration() -> None:
    ended = subprocess.run([LAUNCH / "submit.sh"], capture_output=True, text=True)
    assert ended.returncode == USAGE_ERROR
    assert "usage: launch/submit.sh CONFIG" in ended.stderr


def test_submit_sh_to_a_dashboard_that_is_not_there_says_where_it_looked() -> None:
    environment = ENVIRONMENT | {"RAY_ADDRESS": "http://127.0.0.1:1"}
    ended = subprocess.run([LAUNCH / "submit.sh", "config.yaml"], env=environment, capture_output=True, text=True)
    assert ended.returncode == FAILED
    assert ended.stderr.startswith("megatron-dapo: no Ray dashboard answers at http://127.0.0.1:1: set RAY_ADDRESS to")
    assert len(ended.stderr.splitlines()) == 1
