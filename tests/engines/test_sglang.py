"""SGLang's own server behind the engine: its log-probs, weights, stops, sleep and deaths, and a whole run through it.

One server for the file; each test leaves it running and idle.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_dapo.algo.checksum import checksum
from megatron_dapo.config.tree import RolloutConfig, WeightSyncConfig
from megatron_dapo.obs.jsonl import read_metrics
from megatron_dapo.rollout.failures import EngineDiedError, EngineHangsError, WeightsNotLoadedError
from megatron_dapo.rollout.sglang_engine import SGLangEngine
from megatron_dapo.runtime.host import WorkerHost
from megatron_dapo.runtime.spmd import SpmdControl
from megatron_dapo.sync.embedded import CheckpointSync
from megatron_dapo.sync.restoring import RestoringSync
from megatron_dapo.types import Completion, Request, SamplingParams
from megatron_dapo.workers.rollout import RolloutFleet, RolloutWorker
from tests.functional.tiny_models import VOCAB, save_tiny_model
from tests.functional.tiny_run import make_workspace

EOS = 1
LONG = 100


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        save_tiny_model(root / str(seed), "qwen2", tied=False, seed=seed)
    return [root / "0", root / "1"]


@pytest.fixture(scope="module")
def references(models: list[Path]) -> list[PreTrainedModel]:
    return [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in models]


@pytest.fixture(scope="module")
def engine(models: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangEngine]:
    config = RolloutConfig(
        name="sglang", max_num_seqs=32, weight_sync=WeightSyncConfig(bucket_bytes=20_000)
    )  # several buckets a push
    log = tmp_path_factory.mktemp("logs") / "sglang.log"
    engine = SGLangEngine(models[0], [EOS], config, dtype=torch.float32, cuda_device=None, log=log, quiet_limit=20.0)
    with pytest.raises(WeightsNotLoadedError):
        engine.submit(requests())
    yield engine
    engine.close()


def weights(model: PreTrainedModel) -> list[tuple[str, Tensor]]:
    return list(model.named_parameters())


def requests(draws: int = 6, n: int = 2, tokens: int = 24, temperature: float = 1.0) -> list[Request]:
    rng = np.random.default_rng(0)
    params = SamplingParams(tokens, temperature)
    prompts = rng.integers(3, VOCAB, (draws, 7))
    return [Request(d, s, prompts[d], 10 * d + s, params) for d in range(draws) for s in range(n)]


def drain(engine: SGLangEngine) -> list[Completion]:
    found: list[Completion] = []
    while engine.pending:
        found += engine.poll()
    return sorted(found, key=lambda c: (c.draw_index, c.sample_index))


def write(engine: SGLangEngine, asked: Sequence[Request]) -> list[Completion]:
    engine.submit(asked)
    found = drain(engine)
    assert [(c.draw_index, c.sample_index) for c in found] == [(r.draw_index, r.sample_index) for r in asked]
    return found


@torch.no_grad()
def logp_of(model: PreTrainedModel, request: Request, completion: Completion) -> np.ndarray:
    ids = torch.tensor(np.concatenate([request.prompt_ids, completion.token_ids]))
    logits = model(ids[None]).logits[0, len(request.prompt_ids) - 1 : -1] / (request.params.temperature or 1.0)
    return logits.log_softmax(-1).gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0].numpy()


@torch.no_grad()
def greedy(model: PreTrainedModel, request: Request) -> list[int]:
    ids = [*request.prompt_ids.tolist()]
    while len(ids) < len(request.prompt_ids) + request.params.max_tokens:
        ids.append(int(model(torch.tensor(ids)[None]).logits[0, -1].argmax()))
        if ids[-1] == EOS:
            break
    return ids[len(request.prompt_ids) :]


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_log_probs_are_those_of_transformers_at_the_temperature_drawn_from(
    engine: SGLangEngine, references: list[PreTrainedModel], temperature: float
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
    engine: SGLangEngine, references: list[PreTrainedModel]
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


def test_its_checksums_are_those_of_the_tensors_sent(engine: SGLangEngine, references: list[PreTrainedModel]) -> None:
    for version, model in ((7, 1), (8, 0)):
        engine.load_weights(weights(references[model]), version)
        assert engine.weight_checksums() == {name: checksum(tensor) for name, tensor in weights(references[model])}
    assert {c.weight_version for c in write(engine, requests())} == {8}


def test_weights_that_do_not_fit_are_refused_and_nothing_is_written_until_they_do(
    engine: SGLangEngine, references: list[PreTrainedModel]
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


def test_an_abort_leaves_the_engine_idle_and_ready(engine: SGLangEngine) -> None:
    engine.submit(requests(draws=30, n=4, tokens=LONG))
    engine.poll()
    with pytest.raises(RuntimeError, match="pending"):
        engine.load_weights([], 8)
    engine.abort()
    assert engine.pending == 0
    assert engine.poll() == []
    write(engine, requests())


def test_paused_requests_wait_and_go_on(engine: SGLangEngine, references: list[PreTrainedModel]) -> None:
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
    engine: SGLangEngine, references: list[PreTrainedModel]
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


def processes(engine: SGLangEngine) -> list[psutil.Process]:
    """The server first, then what it started."""
    guard = next(p for p in psutil.Process().children() if "server_guard.py" in " ".join(p.cmdline()))
    return guard.children(recursive=True)


def lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_server_killed_while_it_writes_is_restarted_and_all_requests_come_back_once(
    engine: SGLangEngine, models: list[Path], references: list[PreTrainedModel]
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
        os.kill(processes(engine)[0].pid, signal.SIGKILL)
        while fleet.pending:
            found += fleet.poll()
    assert len(said) == 1
    assert "SGLang server has ended by itself" in said[0]
    by_name = {(c.draw_index, c.sample_index): c for c in found}
    assert len(found) == len(by_name) == len(asked)
    for request in asked:
        completion = by_name[request.draw_index, request.sample_index]
        assert np.abs(logp_of(references[0], request, completion) - completion.logprobs).max() < 1e-4
        assert completion.weight_version == 11


def test_a_server_killed_during_an_update_is_restarted_and_gets_the_same_weights(
    engine: SGLangEngine, references: list[PreTrainedModel]
) -> None:
    def arriving() -> Iterator[tuple[str, Tensor]]:
        for number, named in enumerate(weights(references[1])):
            if number == 20:
                os.kill(processes(engine)[0].pid, signal.SIGKILL)
            yield named

    worker = RolloutWorker(engine)
    worker.load_weights(arriving(), 12)
    assert "SGLang server has ended by itself" in worker.failure
    assert list(worker.generate(requests())) == []
    worker.restart_failed(None)
    worker.load_weights(weights(references[1]), 12)
    assert worker.failure == ""
    asked = requests(n=1, temperature=0.0)
    assert [c.token_ids.tolist() for c in write(engine, asked)] == [greedy(references[1], r) for r in asked]


def test_a_server_that_stands_still_hangs_by_name_and_is_ended(
    engine: SGLangEngine, references: list[PreTrainedModel]
) -> None:
    engine.load_weights(weights(references[0]), 13)
    stopped = processes(engine)
    engine.submit(requests(draws=20, n=4, tokens=LONG))
    for process in stopped:
        process.suspend()
    with pytest.raises((EngineHangsError, EngineDiedError)) as caught:
        while engine.pending:
            engine.poll()
    assert caught.type is EngineHangsError
    while any(map(lives, stopped)):  # a killed process takes a moment to go; the test's own time-out ends it
        time.sleep(0.05)
    engine.restart()
    engine.load_weights(weights(references[0]), 14)
    write(engine, requests())
    assert threading.active_count() < 100


def test_training_through_it_agrees_with_the_trainer_after_every_update(tmp_path: Path) -> None:
    from megatron_dapo.cli import main

    config = make_workspace(tmp_path)
    out = tmp_path / "run"
    overrides = ["actor_rollout_ref.rollout.name=sglang", "trainer.total_training_steps=3", "trainer.test_freq=3"]
    assert main(["train", str(config), f"trainer.default_local_dir={out}", *overrides]) == 0
    steps = [record for record in read_metrics(out / "metrics.jsonl") if "mismatch/logp_diff_max" in record]
    assert len(steps) == 3
    assert max(step["mismatch/logp_diff_max"] for step in steps) < 1e-4
    assert any(abs(step["actor/ratio"] - 1) > 1e-4 for step in steps), "no update changed the policy"
