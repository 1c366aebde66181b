"""Engines' own servers behind their engines: log-probs, weights, stops, sleep and deaths.

Each test leaves the server running and idle.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor
from transformers import PreTrainedModel

from megatron_dapo.algo.checksum import checksum
from megatron_dapo.rollout.failures import EngineDiedError, EngineHangsError, WeightsNotLoadedError
from megatron_dapo.rollout.http_engine import HttpEngine
from megatron_dapo.runtime.host import WorkerHost
from megatron_dapo.runtime.spmd import SpmdControl
from megatron_dapo.sync.embedded import CheckpointSync
from megatron_dapo.sync.restoring import RestoringSync
from megatron_dapo.workers.rollout import RolloutFleet, RolloutWorker
from tests.engines.asking import EOS, LONG, drain, greedy, lives, logp_of, processes, requests, weights, write
from tests.engines.servers import Served


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_log_probs_are_those_of_transformers_at_the_temperature_drawn_from(
    engine: HttpEngine, references: list[PreTrainedModel], temperature: float
) -> None:
    engine.load_weights(weights(references[0]), 3)
    asked = requests(temperature=temperature)
    for request, completion in zip(asked, write(engine, asked), strict=True):
        assert np.abs(logp_of(references[0], request, completion) - completion.logprobs).max() < 1e-4
        assert completion.weight_version == 3
        ended = completion.token_ids[-1] == EOS
        assert completion.finish_reason == ("stop" if ended else "length")
        assert ended or len(completion.token_ids) == request.params.max_tokens
        assert EOS not in completion.token_ids[:-1]


def test_after_an_update_the_same_prompts_are_continued_by_the_new_weights(
    engine: HttpEngine, references: list[PreTrainedModel]
) -> None:
    """The prompts are in the prefix cache by then."""
    asked = requests(n=1, temperature=0.0)
    told = [[greedy(model, request) for request in asked] for model in references]
    assert told[0] != told[1]
    for version, model in ((4, 0), (5, 1), (6, 0)):
        engine.load_weights(weights(references[model]), version)
        found = write(engine, asked)
        assert [c.token_ids.tolist() for c in found] == told[model]
        assert {c.weight_version for c in found} == {version}


def test_its_checksums_are_those_of_the_tensors_sent(engine: HttpEngine, references: list[PreTrainedModel]) -> None:
    for version, model in ((7, 1), (8, 0)):
        engine.load_weights(weights(references[model]), version)
        assert engine.weight_checksums() == {name: checksum(tensor) for name, tensor in weights(references[model])}
    assert {c.weight_version for c in write(engine, requests())} == {8}


def test_weights_that_do_not_fit_are_refused_and_nothing_is_written_until_they_do(
    engine: HttpEngine, references: list[PreTrainedModel]
) -> None:
    whole = weights(references[0])
    for bad, message in (
        (whole[1:], "1 of .* weights never came"),
        ([*whole, whole[0]], "came twice"),
        ([("model.norm.wait", whole[0][1])], "the nearest is 'model.norm.weight'"),
        ([(whole[0][0], whole[0][1][1:])], "the model has"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.load_weights(bad, 7)
        with pytest.raises(WeightsNotLoadedError):
            engine.submit(requests())
    engine.load_weights(whole, 7)
    assert len(write(engine, requests())) == 12


def test_an_abort_leaves_the_engine_idle_and_ready(engine: HttpEngine) -> None:
    engine.submit(requests(draws=30, n=4, tokens=LONG))
    engine.poll()
    with pytest.raises(RuntimeError, match="pending"):
        engine.load_weights([], 8)
    engine.abort()
    assert engine.pending == 0
    assert engine.poll() == []
    write(engine, requests())


def test_paused_requests_wait_and_go_on(engine: HttpEngine, references: list[PreTrainedModel]) -> None:
    engine.load_weights(weights(references[0]), 9)
    engine.pause()
    asked = requests(tokens=LONG)
    engine.submit(asked)
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        assert engine.poll() == []
    engine.resume()
    for request, completion in zip(asked, drain(engine), strict=True):
        assert np.abs(logp_of(references[0], request, completion) - completion.logprobs).max() < 1e-4


def test_asleep_it_writes_nothing_and_awake_it_wants_weights(
    engine: HttpEngine, references: list[PreTrainedModel]
) -> None:
    engine.sleep(["weights", "kv_cache"])
    with pytest.raises(WeightsNotLoadedError):
        engine.submit(requests())
    engine.wake(["weights"])
    engine.load_weights(weights(references[1]), 10)
    with pytest.raises(RuntimeError, match="kv_cache of the engine sleep"):
        engine.submit(requests())
    engine.wake(["kv_cache"])
    assert {c.weight_version for c in write(engine, requests())} == {10}


def test_a_server_killed_while_it_writes_is_restarted_and_all_requests_come_back_once(
    engine: HttpEngine, served: Served, models: list[Path], references: list[PreTrainedModel]
) -> None:
    with SpmdControl.connect() as control:
        host = WorkerHost()
        host.add(RolloutWorker(engine))
        group, said = control.group(host), []
        sync = RestoringSync(CheckpointSync(group, str(models[0])), group, said.append)
        sync.push(11)
        fleet = RolloutFleet(group, lambda: None, sync.restore)
        asked = requests(draws=20, n=4, tokens=LONG)
        fleet.submit(asked)
        found = fleet.poll()
        os.kill(processes()[0].pid, signal.SIGKILL)
        while fleet.pending:
            found += fleet.poll()
    assert len(said) == 1
    assert f"{served.name} server has ended by itself" in said[0]
    by_name = {(c.draw_index, c.sample_index): c for c in found}
    assert len(found) == len(by_name) == len(asked)
    for request in asked:
        completion = by_name[request.draw_index, request.sample_index]
        assert np.abs(logp_of(references[0], request, completion) - completion.logprobs).max() < 1e-4
        assert completion.weight_version == 11


def test_a_server_killed_during_an_update_is_restarted_and_gets_the_same_weights(
    engine: HttpEngine, served: Served, references: list[PreTrainedModel]
) -> None:
    def arriving() -> Iterator[tuple[str, Tensor]]:
        for number, named in enumerate(weights(references[1])):
            if number == 20:
                os.kill(processes()[0].pid, signal.SIGKILL)
            yield named

    worker = RolloutWorker(engine)
    worker.load_weights(arriving(), 12)
    assert f"{served.name} server has ended by itself" in worker.failure
    assert list(worker.generate(requests())) == []
    worker.restart_failed(None)
    worker.load_weights(weights(references[1]), 12)
    assert worker.failure == ""
    asked = requests(n=1, temperature=0.0)
    assert [c.token_ids.tolist() for c in write(engine, asked)] == [greedy(references[1], r) for r in asked]


def test_a_server_that_stands_still_hangs_by_name_and_is_ended(
    engine: HttpEngine, served: Served, references: list[PreTrainedModel]
) -> None:
    engine.load_weights(weights(references[0]), 13)
    all_of_it = processes()
    engine.submit(requests(draws=20, n=4, tokens=LONG))
    for process in served.stopped(all_of_it):
        process.suspend()
    with pytest.raises((EngineHangsError, EngineDiedError)) as caught:
        while engine.pending:
            engine.poll()
    assert caught.type is EngineHangsError
    while any(map(lives, all_of_it)):  # a killed process takes a moment to go; the test's own time-out ends it
        time.sleep(0.05)
    engine.restart()
    engine.load_weights(weights(references[0]), 14)
    write(engine, requests())
    assert threading.active_count() < 100
