"""A run that is killed at any moment goes on from its last whole checkpoint, to the same last bit."""

from __future__ import annotations

import json
import random
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from forked_run import Moment, run
from run_record import EVENTFUL, assert_whole, record_of
from tiny_run import make_workspace

from megatron_dapo.checkpoints import saver
from megatron_dapo.checkpoints.checksums import read_checksums
from megatron_dapo.checkpoints.store import CheckpointStore
from megatron_dapo.mcore import shard_write
from megatron_dapo.obs.jsonl import read_metrics
from megatron_dapo.obs.loggers import Loggers
from megatron_dapo.sync.embedded import EmbeddedSync
from megatron_dapo.workers import policy
from megatron_dapo.workers.policy_group import PolicyGroup
from megatron_dapo.workers.rollout import RolloutFleet

PROMPTS = 24  # of the workspace


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("killed"))


@pytest.fixture(scope="module")
def reference(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody stops."""
    out = tmp_path_factory.mktemp("reference") / "run"
    ended = run(config, out, *EVENTFUL)
    assert ended.code == 0, ended.said
    return out


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


def _prepare(moment: Moment, slowly: bool) -> None:
    if slowly:
        _write_slowly()
    moment.install()


@pytest.mark.parametrize("when", CASES)
def test_killed_at_a_moment_it_goes_on_to_the_same_end(config: Path, reference: Path, tmp_path: Path, when: str):
    moment, out = MOMENTS[when], tmp_path / "run"

    ended = run(config, out, *EVENTFUL, prepare=partial(_prepare, moment, slowly=moment is WRITING))
    assert ended.code == -signal.SIGKILL, ended.said
    assert not (out / "hf").exists()
    assert_whole(out)
    left = CheckpointStore(out).entries()
    ended = run(config, out, *EVENTFUL)
    assert ended.code == 0, ended.said
    # How many polls a rollout takes depends on how long rewards do: a kill in one may come before the first checkpoint.
    told = f"resuming after step {left[0].step} from" if left else "steps done"
    assert told in ended.said
    assert record_of(out) == record_of(reference)
    assert_whole(out)
    assert not list((out / "checkpoints").glob(".*")), "nothing half done is left"


@pytest.mark.slow
def test_killed_again_and_again_at_random_times_it_comes_to_the_same_end(config: Path, reference: Path, tmp_path: Path):
    """First soon, then later: in parts of what the undisturbed run took, since machines differ."""
    whole = json.loads((reference / "summary.json").read_text())["seconds"]
    out, draw, kills = tmp_path / "run", random.Random(1), 0
    for attempt in range(1, 21):
        ended = run(config, out, *EVENTFUL, killed_after=whole * draw.uniform(0.02, 0.05 * attempt))
        if ended.code == 0:
            break
        assert ended.code == -signal.SIGKILL, ended.said
        kills += 1
        assert_whole(out)
    else:
        assert run(config, out, *EVENTFUL).code == 0
    assert kills >= 3
    assert record_of(out) == record_of(reference)


def test_saved_at_once_or_in_the_background_the_checkpoints_are_the_same(config: Path, reference: Path, tmp_path: Path):
    ended = run(config, tmp_path / "run", *EVENTFUL, "trainer.async_save=false")
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
