"""`sbatch launch/dapo_32b.slurm`, as it stands in the checkout, on a Slurm of stand-ins (`slurm_standin.py`).

First what the script decides, with a cluster and a run that do nothing; then a tiny run over two real Ray nodes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import slurm_standin
from tiny_run import make_workspace

from megatron_dapo.exit_codes import DONE, FAILED, REQUEUE
from megatron_dapo.obs.jsonl import read_metrics

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "dapo_32b.slurm"

# A checkout whose nodes and run do nothing. A node ends at SIGUSR2 alone. The run follows the words it was given.
NOTHING = """#!/usr/bin/env bash
ended() { echo "$1" >> "$LOGS/nodes"; exit 0; }
if [[ $1 == node ]]; then
  trap : TERM
  trap 'ended "$SLURMD_NODENAME"' USR2
  touch "$LOGS/up_$SLURMD_NODENAME"
  while :; do sleep 0.05; done
fi
shift
for name in $NODE_NAMES; do
  until [[ -e $LOGS/up_$name ]]; do sleep 0.05; done
done
words="$*"
case "${SLURM_RESTART_COUNT:-0} $words" in
  "0 "*until=handled*) trap 'echo saved; exit 75' USR1 TERM ;;
  "0 "*until=killed*) ;;
  *code=*) exit "${words##*code=}" ;;
esac
echo "waits for a signal"
while :; do sleep 0.05; done
"""


@dataclass(frozen=True)
class Job:
    """A job under way."""

    process: subprocess.Popen[bytes]
    state: Path  # of the stand-ins
    log: Path

    def said(self) -> str:
        return self.log.read_text()

    def wait_for(self, text: str, seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.said():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)

    def signal_script(self, number: int) -> None:
        """As `#SBATCH --signal=B:` does: to the batch script alone."""
        os.kill(int((self.state / "batch").read_text()), number)

    def signal_all(self, number: int) -> None:
        """As a preemption does: to the script and to every task."""
        self.signal_script(number)
        for pid in slurm_standin.tasks(self.state):
            os.kill(pid, number)

    def end(self, seconds: float = 240) -> int:
        return self.process.wait(seconds)

    def requeues(self) -> int:
        return sum(call[:2] == ["scontrol", "requeue"] for call in slurm_standin.calls(self.state))


Submit = Callable[..., Job]


@pytest.fixture
def submit(tmp_path: Path) -> Iterator[Submit]:
    started: list[Job] = []

    def start(root: Path, *words: str, script: Path = SCRIPT, **environment: str) -> Job:
        # The number is the process's, so that jobs of tests beside each other have ports and folders of their own.
        state = tmp_path / f"job_{os.getpid()}"
        variables = slurm_standin.install(state) | {"LOG_DIR": str(tmp_path / "logs")} | environment
        log = tmp_path / "job.log"
        command = ["sbatch", "--nodes=2", "--gpus-per-node=0", str(script), *words]
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, cwd=root, env=variables, stdout=out, stderr=out, executable=state / "bin" / "sbatch"
            )
        started.append(Job(process, state, log))
        return started[-1]

    yield start
    for job in started:  # what a failed test left
        job.process.kill()
        job.process.wait()
        for process in psutil.process_iter():
            if _is_of(process, job.state):
                process.kill()


@pytest.fixture
def nothing(tmp_path: Path) -> Path:
    """A checkout in which a job costs nothing."""
    root = tmp_path / "checkout"
    (root / "launch").mkdir(parents=True)
    (root / "launch" / "ray_cluster.sh").write_text(NOTHING)
    (root / "launch" / "ray_cluster.sh").chmod(0o755)
    (root / "config.yaml").touch()
    return root


def ended_nodes(job: Job) -> list[str]:
    return sorted(line for path in job.log.parent.glob("logs/*/start_*/nodes") for line in path.read_text().split())


@pytest.mark.parametrize("code", [DONE, FAILED])
def test_a_run_that_ends_by_itself_ends_the_nodes_and_the_job_with_its_code(
    submit: Submit, nothing: Path, code: int
) -> None:
    job = submit(nothing, f"code={code}", CONFIG="config.yaml")
    assert job.end() == code
    assert job.requeues() == 0
    assert f"the run ended with exit code {code}" in job.said()
    assert ended_nodes(job) == ["127.0.0.2", "127.0.0.3"]


@pytest.mark.parametrize(("number", "ending"), [("SIGUSR1", "handled"), ("SIGTERM", "handled"), ("SIGUSR1", "killed")])
def test_a_preempted_job_is_requeued_when_the_run_has_saved_or_not_yet_begun(
    submit: Submit, nothing: Path, number: str, ending: str
) -> None:
    job = submit(nothing, f"until={ending}", "code=0", CONFIG="config.yaml")
    job.wait_for("waits for a signal")
    send = job.signal_script if number == "SIGUSR1" else job.signal_all
    send(signal.Signals[number])
    assert job.end() == DONE
    assert job.requeues() == 1
    assert ("saved" in job.said()) == (ending == "handled")
    assert ended_nodes(job) == ["127.0.0.2", "127.0.0.2", "127.0.0.3", "127.0.0.3"]


def test_a_cancelled_job_saves_and_is_not_requeued(submit: Submit, nothing: Path) -> None:
    job = submit(nothing, "until=handled", CONFIG="config.yaml")
    job.wait_for("waits for a signal")
    (job.state / "cancelled").touch()
    job.signal_all(signal.SIGTERM)
    assert job.end() == REQUEUE
    assert job.requeues() == 0
    assert "submitted again, the run goes on from its latest checkpoint" in job.said()


def test_both_steps_run_in_the_container_that_was_asked_for(submit: Submit, nothing: Path) -> None:
    container = {"CONTAINER_IMAGE": "dapo.sqsh", "CONTAINER_MOUNTS": "/data:/data"}
    job = submit(nothing, "code=0", CONFIG="config.yaml", **container)
    assert job.end() == DONE
    steps = [call for call in slurm_standin.calls(job.state) if call[0] == "srun"]
    assert len(steps) == 2
    for step in steps:
        assert "--container-image=dapo.sqsh" in step
        assert f"--container-mounts={nothing}:{nothing},/tmp:/tmp,/data:/data" in step


def test_a_job_from_elsewhere_or_without_its_configuration_ends_at_once(submit: Submit, tmp_path: Path) -> None:
    job = submit(tmp_path)
    assert job.end() == 2
    assert "is not the root of a checkout" in job.said()


def test_a_run_over_two_ray_nodes_is_preempted_requeued_and_goes_on(submit: Submit, tmp_path: Path) -> None:
    config, out, steps = make_workspace(tmp_path / "workspace", tied=True), tmp_path / "run", 24
    job = submit(
        ROOT,
        f"trainer.default_local_dir={out}",
        "trainer.n_gpus_per_node=1",
        f"trainer.total_training_steps={steps}",
        "trainer.val_before_train=false",
        "trainer.logger=[console]",
        CONFIG=str(config),
        VENV=sys.prefix,
        RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES=str(100 * 2**20),
    )
    job.wait_for("step 2/")
    job.signal_all(signal.SIGTERM)
    assert job.end() == DONE, job.said()
    said = job.said()
    assert job.requeues() == 1
    assert "nodes wanted: 2, present: 2 (2 CPU, 0 GPU)" in said
    assert (out / "exit_status").read_text() == f"{DONE}\n"
    saved = int(said.split("resuming after step ")[1].split()[0])
    assert 2 <= saved < steps
    assert [record["step"] for record in read_metrics(out / "metrics.jsonl")] == list(range(1, steps + 1))
    for start in (0, 1):
        logs = tmp_path / "logs" / str(os.getpid()) / f"start_{start}"
        assert {path.name for path in logs.iterdir()} >= {"127.0.0.2", "127.0.0.2.log", "127.0.0.3", "127.0.0.3.log"}
    assert not list(Path("/tmp").glob(f"ray-{os.getpid()}*"))
    assert [process.name() for process in psutil.process_iter() if _is_of(process, job.state)] == []


def _is_of(process: psutil.Process, state: Path) -> bool:
    try:
        return process.environ().get("STANDIN_DIR") == str(state)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False
