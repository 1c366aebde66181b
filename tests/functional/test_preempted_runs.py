"""A run that a scheduler stops saves its state and asks to be started again; a full disk loses nothing either."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked_run import Moment, run
from tiny_run import make_workspace

from megatron_dapo.checkpoints.store import CheckpointStore
from megatron_dapo.exit_codes import DONE, FAILED, REQUEUE
from megatron_dapo.obs.jsonl import deterministic_part, read_metrics
from megatron_dapo.rewards.guarded import GuardedPool
from megatron_dapo.workers import policy
from megatron_dapo.workers.rollout import RolloutFleet

SETTINGS = ["trainer.total_training_steps=4", "trainer.val_before_train=false"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("preempted"))


@pytest.fixture(scope="module")
def reference(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "run"
    ended = run(config, out, *SETTINGS)
    assert ended.code == DONE, ended.said
    assert (out / "exit_status").read_text() == f"{DONE}\n"
    return out


def metrics(out: Path) -> list[dict[str, float]]:
    return [deterministic_part(record) for record in read_metrics(out / "metrics.jsonl")]


@pytest.mark.parametrize(
    "moment",
    [
        Moment(RolloutFleet, "poll", 8, signal.SIGTERM),
        Moment(policy, "apply_update", 4, signal.SIGUSR1),
        Moment(GuardedPool, "begin_step", 1, signal.SIGUSR1),
    ],
    ids=["SIGTERM in the rollout", "SIGUSR1 in an update", "SIGUSR1 before the first step"],
)
def test_a_schedulers_signal_saves_the_state_and_the_next_start_goes_on(
    config: Path, reference: Path, tmp_path: Path, moment: Moment
):
    out = tmp_path / "run"
    ended = run(config, out, *SETTINGS, prepare=moment.install)
    assert ended.code == REQUEUE, ended.said
    assert (out / "exit_status").read_text() == f"{REQUEUE}\n"
    (entry,) = CheckpointStore(out).entries()
    assert "Traceback" not in ended.said
    ended = run(config, out, *SETTINGS)
    assert ended.code == DONE, ended.said
    assert f"resuming after step {entry.step} from" in ended.said
    assert metrics(out) == metrics(reference)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_under_torchrun_too(config: Path, tmp_path: Path, number: signal.Signals):
    """torchrun passes the scheduler's signal on; its own exit code is 1 whatever its ranks say."""
    out = tmp_path / "run"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    torchrun += ["--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1", "--shutdown-timeout", "120"]
    overrides = [f"trainer.default_local_dir={out}", "trainer.logger=[console]"]

    def start(steps: int) -> subprocess.Popen[str]:
        words = [*torchrun, "-m", "megatron_dapo", "train", str(config), *overrides]
        command = [sys.executable, *words, f"trainer.total_training_steps={steps}"]
        return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    process = start(100_000)
    assert process.stdout is not None
    said = ""
    while "step 2/" not in said:
        line = process.stdout.readline()
        assert line, said
        said += line
    process.send_signal(number)
    said += process.communicate(timeout=180)[0]
    assert (out / "exit_status").read_text() == f"{REQUEUE}\n", said
    (entry,) = CheckpointStore(out).entries()
    again = start(entry.step + 1)
    said = again.communicate(timeout=180)[0]
    assert again.returncode == DONE, said
    assert f"resuming after step {entry.step} from" in said
    assert (out / "exit_status").read_text() == f"{DONE}\n"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1.5 MB: room for one checkpoint of the tiny model (0.9 MB) and not for two."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(path)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.decode()}")
    yield path
    subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_full_disk_is_a_clear_error_and_the_state_is_saved_elsewhere(
    config: Path, reference: Path, tmp_path: Path, small_disk: Path, background: str
):
    out, elsewhere = small_disk / "run", tmp_path / "elsewhere"
    settings = [*SETTINGS, "trainer.save_freq=1", f"trainer.async_save={background}", "trainer.log_samples=0"]
    settings.append(f"trainer.fallback_local_dir={elsewhere}")
    ended = run(config, out, *settings)
    assert ended.code == FAILED, ended.said
    assert "CheckpointWriteError" in ended.said
    assert "No space left on device" in ended.said
    assert "Traceback" not in ended.said
    (before,) = CheckpointStore(out).entries()
    assert before.step == 1
    (rescued,) = CheckpointStore(elsewhere).entries()
    assert rescued.step >= 2
    subprocess.run(["mount", "-o", "remount,size=40m", str(small_disk)], check=True)
    ended = run(config, out, *settings)
    assert ended.code == DONE, ended.said
    assert f"resuming after step {rescued.step} from {rescued.path}" in ended.said
    assert metrics(out) == metrics(reference)


def test_without_a_fallback_the_checkpoint_before_is_untouched_and_taken_up(
    config: Path, reference: Path, small_disk: Path
):
    out = small_disk / "run"
    settings = [*SETTINGS, "trainer.save_freq=1", "trainer.log_samples=0"]
    ended = run(config, out, *settings)
    assert ended.code == FAILED, ended.said
    assert "trainer.fallback_local_dir" in ended.said
    (before,) = CheckpointStore(out).entries()
    subprocess.run(["mount", "-o", "remount,size=40m", str(small_disk)], check=True)
    ended = run(config, out, *settings)
    assert ended.code == DONE, ended.said
    assert f"resuming after step {before.step} from" in ended.said
    assert metrics(out) == metrics(reference)
