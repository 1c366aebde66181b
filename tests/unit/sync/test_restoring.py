"""An engine that fails, while it writes or while it takes weights, costs time and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from torch import Tensor

from megatron_dapo.mcore.hf_read import read_hf
from megatron_dapo.rollout.failures import EngineDiedError, EngineHangsError
from megatron_dapo.rollout.torch_engine import TorchEngine
from megatron_dapo.runtime.host import WorkerHost
from megatron_dapo.runtime.spmd import SpmdControl, SpmdGroup
from megatron_dapo.sync.embedded import CheckpointSync
from megatron_dapo.sync.restoring import MAX_RESTARTS, EnginesKeepFailingError, RestoringSync
from megatron_dapo.types import Completion, Request
from megatron_dapo.workers.rollout import RolloutFleet, RolloutWorker
from tests.unit.workers.one_rank import engine_of, requests_of, save_model


class FailingEngine:
    """An engine as a process would be: while `deaths` last it dies at its third poll, or half-way through weights."""

    def __init__(self, inner: TorchEngine, while_writing: int = 0, while_loading: int = 0):
        self._inner, self.while_writing, self.while_loading = inner, while_writing, while_loading
        self._polls, self._dead = 0, False
        self.restarts = 0

    def __getattr__(self, name: str):
        return getattr(self._inner, name)

    def submit(self, requests: list[Request]) -> None:
        self._must_live()
        self._inner.submit(requests)

    def poll(self) -> list[Completion]:
        self._polls += 1
        if self.while_writing and self._polls % 3 == 0:
            self.while_writing -= 1
            self._die(EngineDiedError("killed"))
        return self._inner.poll()

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        self._must_live()
        if self.while_loading:
            self.while_loading -= 1
            next(iter(tensors))
            self._die(EngineHangsError("silent"))
        self._inner.load_weights(tensors, version)

    def restart(self) -> None:
        self.restarts += 1
        self._dead = False
        self._inner.restart()

    def _die(self, error: Exception) -> None:
        self._dead = True
        self._inner.restart()
        raise error

    def _must_live(self) -> None:
        assert not self._dead, "a dead engine was asked for something"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "qwen2")


@pytest.fixture
def control() -> Iterator[SpmdControl]:
    with SpmdControl.connect() as control:
        yield control


def group_with(control: SpmdControl, engine: FailingEngine | TorchEngine) -> SpmdGroup:
    host = WorkerHost()
    host.add(RolloutWorker(engine))
    return control.group(host)


def write(fleet: RolloutFleet, requests: list[Request]) -> dict[tuple[int, int], tuple[list[int], list[float], int]]:
    fleet.submit(requests)
    found: list[Completion] = []
    while fleet.pending:
        found += fleet.poll()
    assert len(found) == len(requests), "none is lost or doubled"
    return {
        (c.draw_index, c.sample_index): (c.token_ids.tolist(), c.logprobs.tolist(), c.weight_version) for c in found
    }


@pytest.mark.parametrize("deaths", [{"while_writing": 1}, {"while_loading": 1}, {"while_writing": 2}])
def test_a_failed_engine_is_restarted_and_every_request_is_written_once(
    control: SpmdControl, model: Path, deaths: dict[str, int]
) -> None:
    engine = FailingEngine(engine_of(model, max_num_seqs=4), **deaths)
    group, said = group_with(control, engine), []
    sync = RestoringSync(CheckpointSync(group, str(model)), group, said.append)
    sync.push(5)
    requests = requests_of(draws=3, n=4)
    found = write(RolloutFleet(group, lambda: None, sync.restore), requests)
    assert engine.restarts == len(said) == sum(deaths.values())
    assert {version for _, _, version in found.values()} == {5}

    healthy = engine_of(model, max_num_seqs=4)
    healthy.load_weights(read_hf(model), 5)
    healthy.submit(requests)
    while healthy.pending:
        for c in healthy.poll():
            assert found[c.draw_index, c.sample_index][0] == c.token_ids.tolist()


def test_an_engine_that_keeps_failing_ends_the_run_and_says_why(control: SpmdControl, model: Path) -> None:
    engine = FailingEngine(engine_of(model), while_loading=99)
    group = group_with(control, engine)
    with pytest.raises(EnginesKeepFailingError, match=r"failed 4 times.*\nengine 0: silent"):
        RestoringSync(CheckpointSync(group, str(model)), group, lambda _: None).push(0)
    assert engine.restarts == MAX_RESTARTS


def test_all_tensors_are_taken_from_a_policy_whose_engine_failed(model: Path) -> None:
    worker = RolloutWorker(FailingEngine(engine_of(model), while_loading=1))
    arriving = iter(read_hf(model))
    worker.load_weights(arriving, 0)
    assert worker.failure == "silent"
    assert next(arriving, None) is None


def test_a_restart_that_fails_is_tried_again(control: SpmdControl, model: Path) -> None:
    class SlowToStart(FailingEngine):
        def restart(self) -> None:
            super().restart()
            if self.restarts == 1:
                self._dead = True
                raise EngineDiedError("no memory yet")

    engine = SlowToStart(engine_of(model), while_loading=1)
    group, said = group_with(control, engine), []
    RestoringSync(CheckpointSync(group, str(model)), group, said.append).push(0)
    assert engine.restarts == 2
    assert "silent" in said[0]
    assert "no memory yet" in said[1]
