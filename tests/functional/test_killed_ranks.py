"""One rank of several is killed: the run ends and says which, and the next start goes on, on any layout."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from forked_run import Moment, on_rank, run
from run_record import EVENTFUL, assert_whole, record_of
from tiny_run import make_workspace

from megatron_dapo.checkpoints.store import CheckpointStore
from megatron_dapo.exit_codes import FAILED
from megatron_dapo.mcore import checkpoint, shard_write
from megatron_dapo.obs.jsonl import read_metrics
from megatron_dapo.rollout.torch_engine import TorchEngine
from megatron_dapo.workers import policy

MEGATRON = "actor_rollout_ref.actor.megatron"
LAYOUTS = {
    "one process": [],
    "DP2": [],
    "PP2": [f"{MEGATRON}.pipeline_model_parallel_size=2"],
    "TP2 SP": [f"{MEGATRON}.tensor_model_parallel_size=2", f"{MEGATRON}.sequence_parallel=true"],
}
SAVED_LATE = ".step_00000006."  # part of the path of the third checkpoint while it is being written


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def reference(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """reference(layout) is a run that nobody stops."""

    @cache
    def make(layout: str) -> Path:
        out = tmp_path_factory.mktemp("reference") / "run"
        start(config, out, layout)
        return out

    return make


def start(config: Path, out: Path, layout: str) -> str:
    """A run to its end; what it said."""
    ended = run(config, out, *EVENTFUL, *LAYOUTS[layout], ranks=ranks_of(layout))
    assert ended.code == 0, ended.said
    return ended.said


def ranks_of(layout: str) -> int:
    return 1 if layout == "one process" else 2


def _kill_while_it_writes() -> None:
    """The third save is never written to its end."""
    real = shard_write._write_bucket

    def stuck(bucket: Any) -> Any:
        if SAVED_LATE in bucket[0]:
            time.sleep(3600)
        return real(bucket)

    shard_write._write_bucket = stuck
    Moment(checkpoint, "start_save", 3, after=True).install()


MOMENTS: dict[str, Callable[[], None]] = {
    "in a rollout": Moment(TorchEngine, "poll", 20).install,
    "in an optimizer step": Moment(policy, "apply_update", 12).install,
    "while it writes a checkpoint": _kill_while_it_writes,
}
# `make test` takes two cases; the rest of the matrix is slow.
TELLING = {("DP2", 1, "in an optimizer step"), ("PP2", 1, "while it writes a checkpoint")}
MATRIX = product(("DP2", "PP2", "TP2 SP"), (1, 0), MOMENTS)
CASES = [case if case in TELLING else pytest.param(*case, marks=pytest.mark.slow) for case in MATRIX]


@pytest.mark.parametrize(("layout", "rank", "when"), CASES)
def test_one_rank_is_killed_and_the_run_ends_and_goes_on_to_the_same_end(
    config: Path, reference: Callable[[str], Path], tmp_path: Path, layout: str, rank: int, when: str
):
    out = tmp_path / "run"
    prepare = partial(on_rank, rank, MOMENTS[when])
    ended = run(config, out, *EVENTFUL, *LAYOUTS[layout], prepare=prepare, ranks=2)
    assert ended.code == 1, ended.said
    if rank == 0:
        assert "process 0 terminated with signal SIGKILL" in ended.said
        assert not (out / "exit_status").exists()
    else:
        assert "WorkerError: rank 1 failed" in ended.said
        assert (out / "exit_status").read_text() == f"{FAILED}\n"
    assert_whole(out)
    left = CheckpointStore(out).entries()
    assert left
    assert f"resuming after step {left[0].step} from" in start(config, out, layout)
    assert record_of(out) == record_of(reference(layout))
    assert_whole(out)
    assert not list((out / "checkpoints").glob(".*")), "nothing half done is left"


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [
        ("one process", "TP2 SP"),
        ("PP2", "one process"),
        pytest.param("one process", "PP2", marks=pytest.mark.slow),
        pytest.param("one process", "DP2", marks=pytest.mark.slow),
        pytest.param("DP2", "PP2", marks=pytest.mark.slow),
        pytest.param("PP2", "TP2 SP", marks=pytest.mark.slow),
        pytest.param("TP2 SP", "DP2", marks=pytest.mark.slow),
    ],
)
def test_on_another_layout_it_goes_on_with_the_same_groups_and_losses(
    config: Path, reference: Callable[[str], Path], tmp_path: Path, saved: str, resumed: str
):
    out, before = tmp_path / "run", reference(saved)
    shutil.copytree(before / "checkpoints" / "step_00000006", out / "checkpoints" / "step_00000006")
    said = start(config, out, resumed)
    assert "resuming after step 6" in said
    assert "fresh random streams" in said
    wanted, found = read_metrics(before / "metrics.jsonl")[-2:], read_metrics(out / "metrics.jsonl")
    assert [step["step"] for step in found] == [step["step"] for step in wanted] == [7, 8]
    for one, other in zip(wanted, found, strict=True):
        exact = [name for name in one if name.startswith(("sampling/", "reward/", "response/"))]
        assert {name: other[name] for name in exact} == {name: one[name] for name in exact}
        assert other["actor/loss"] == pytest.approx(one["actor/loss"], rel=0, abs=1e-5)
