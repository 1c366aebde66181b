"""A run that is killed at any moment goes on from its last whole checkpoint, to the same last bit."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from forked_run import Moment, run
from tiny_run import make_workspace

from megatron_dapo.checkpoints import saver
from megatron_dapo.checkpoints.checksums import check_digests, read_checksums
from megatron_dapo.checkpoints.store import CheckpointStore
from megatron_dapo.digests import digest_file, digest_files
from megatron_dapo.mcore import shard_write
from megatron_dapo.obs.jsonl import deterministic_part, read_metrics
from megatron_dapo.obs.loggers import Loggers
from megatron_dapo.sync.embedded import EmbeddedSync
from megatron_dapo.workers import policy
from megatron_dapo.workers.policy_group import PolicyGroup
from megatron_dapo.workers.rollout import RolloutFleet

MEGATRON = "actor_rollout_ref.actor.megatron"
PROMPTS = 24  # of the workspace
SETTINGS = [
    "trainer.total_training_steps=8",
    "trainer.save_freq=2",
    "trainer.save_total_limit=2",
    "trainer.test_freq=4",
    "algorithm.filter_groups.surplus=carry",
    "actor_rollout_ref.actor.optim.lr_decay_style=cosine",
    "data.gen_batch_size=6",
]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("killed"))


@pytest.fixture(scope="module")
def reference(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody stops."""
    out = tmp_path_factory.mktemp("reference") / "run"
    ended = run(config, out, *SETTINGS)
    assert ended.code == 0, ended.said
    return out


def record_of(out: Path) -> dict[str, Any]:
    """All that must not depend on what happened on the way."""
    steps = read_metrics(out / "metrics.jsonl")
    newest = CheckpointStore(out).entries()[0].path
    return {
        "metrics": [deterministic_part(step) for step in steps],
        "samples": (out / "samples.jsonl").read_text(),
        "weights": digest_file(out / "hf" / "model.safetensors"),
        "state": [(newest / name).read_bytes() for name in ("trainer.json", "arrays.safetensors")],
    }


def assert_whole(out: Path) -> None:
    """What can be found is whole, and `latest` names one of them."""
    store = CheckpointStore(out)
    for entry in store.entries():
        check_digests(entry.path, digest_files(entry.path, read_checksums(entry.path)))
    pointer = store.root / "latest"
    if pointer.exists():
        assert (store.root / pointer.read_text()).is_dir()


def test_the_reference_crosses_an_epoch_and_carries_groups(reference: Path):
    steps = read_metrics(reference / "metrics.jsonl")[1:]
    assert sum(step["sampling/prompts_drawn"] for step in steps) > PROMPTS
    assert any(step["sampling/groups_carried_in"] > 0 for step in steps)
    assert len({step["actor/lr"] for step in steps}) > 4
    assert [entry.step for entry in CheckpointStore(reference).entries()] == [8, 6]


WRITING = Moment(PolicyGroup, "start_save", 2, after=True)
MOMENTS = {
    "during the rollout": Moment(RolloutFleet, "poll", 16, after=True),
    "before an optimizer step": Moment(policy, "apply_update", 6),
    "after an optimizer step": Moment(policy, "apply_update", 7, after=True),
    "while the engine gets its weights": Moment(EmbeddedSync, "push", 4),
    "after a step is logged": Moment(Loggers, "log", 5, after=True),
    "before the driver's state is written": Moment(saver, "write_state", 2),
    "as the ranks begin to write": Moment(PolicyGroup, "start_save", 2),
    "while the ranks write": WRITING,
    "before the checksums": Moment(saver, "write_checksums", 2),
    "before the checkpoint is published": Moment(CheckpointStore, "publish", 2),
    "between the rename and the pointer": Moment(CheckpointStore, "_point_to", 2),
    "between the pointer and the clean-up": Moment(CheckpointStore, "prune", 3),
    "after the clean-up": Moment(CheckpointStore, "prune", 3, after=True),
}
# `make test` takes one moment of each kind; the rest are slow.
TELLING = {
    "during the rollout",
    "after an optimizer step",
    "while the ranks write",
    "between the rename and the pointer",
}
CASES = [name if name in TELLING else pytest.param(name, marks=pytest.mark.slow) for name in MOMENTS]


@pytest.mark.parametrize("when", CASES)
def test_killed_at_a_moment_it_goes_on_to_the_same_end(config: Path, reference: Path, tmp_path: Path, when: str):
    moment, out = MOMENTS[when], tmp_path / "run"

    def prepare() -> None:
        if moment is WRITING:
            _write_slowly()
        moment.install()

    ended = run(config, out, *SETTINGS, prepare=prepare)
    assert ended.code == -signal.SIGKILL, ended.said
    assert not (out / "hf").exists()
    assert_whole(out)
    left = CheckpointStore(out).entries()
    ended = run(config, out, *SETTINGS)
    assert ended.code == 0, ended.said
    assert f"resuming after step {left[0].step} from" in ended.said
    assert record_of(out) == record_of(reference)
    assert_whole(out)
    assert not list((out / "checkpoints").glob(".*")), "nothing half done is left"


@pytest.mark.slow
def test_killed_again_and_again_at_random_times_it_comes_to_the_same_end(config: Path, reference: Path, tmp_path: Path):
    out, draw, kills = tmp_path / "run", random.Random(1), 0
    for _ in range(40):
        ended = run(config, out, *SETTINGS, killed_after=0.5 + 2.5 * draw.random())
        if ended.code == 0:
            break
        assert ended.code == -signal.SIGKILL, ended.said
        kills += 1
        assert_whole(out)
    else:
        assert run(config, out, *SETTINGS).code == 0
    assert kills >= 3
    assert record_of(out) == record_of(reference)


def test_saved_at_once_or_in_the_background_the_checkpoints_are_the_same(config: Path, reference: Path, tmp_path: Path):
    ended = run(config, tmp_path / "run", *SETTINGS, "trainer.async_save=false")
    assert ended.code == 0, ended.said
    assert record_of(tmp_path / "run") == record_of(reference)
    for entry, other in zip(
        CheckpointStore(tmp_path / "run").entries(), CheckpointStore(reference).entries(), strict=True
    ):
        one, two = read_checksums(entry.path), read_checksums(other.path)
        shards = {name for name in one if name.endswith(".distcp")}
        assert shards
        assert {name: one[name] for name in shards} == {name: two[name] for name in shards}


def _write_slowly() -> None:
    real = shard_write._write_bucket

    def slowly(bucket: Any) -> Any:
        time.sleep(5)
        return real(bucket)

    shard_write._write_bucket = slowly


@pytest.mark.parametrize(
    "layout",
    [
        ["tensor_model_parallel_size=2", "sequence_parallel=true"],
        pytest.param(["pipeline_model_parallel_size=2"], marks=pytest.mark.slow),
        pytest.param([], marks=pytest.mark.slow),
    ],
    ids=["TP2 SP", "PP2", "DP2"],
)
def test_on_another_layout_it_goes_on_with_the_same_groups_and_losses(
    config: Path, reference: Path, tmp_path: Path, layout: list[str]
):
    out = tmp_path / "run"
    shutil.copytree(reference / "checkpoints" / "step_00000006", out / "checkpoints" / "step_00000006")
    overrides = [f"trainer.default_local_dir={out}", *SETTINGS, *(f"{MEGATRON}.{setting}" for setting in layout)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "megatron_dapo", "train", str(config), *overrides],
        env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    assert "resuming after step 6" in done.stdout
    assert "fresh random streams" in done.stdout
    wanted, found = read_metrics(reference / "metrics.jsonl")[-2:], read_metrics(out / "metrics.jsonl")
    assert [step["step"] for step in found] == [step["step"] for step in wanted] == [7, 8]
    for one, other in zip(wanted, found, strict=True):
        exact = [name for name in one if name.startswith(("sampling/", "reward/", "response/"))]
        assert {name: other[name] for name in exact} == {name: one[name] for name in exact}
        assert other["actor/loss"] == pytest.approx(one["actor/loss"], rel=0, abs=1e-5)
