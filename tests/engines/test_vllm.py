"""What vLLM alone has behind the engine: seeds, top-p and top-k in log-probs, and a key for every path."""

from __future__ import annotations

import http.client
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from megatron_dapo.rollout.exchange import RefusedError
from megatron_dapo.rollout.http_engine import HttpEngine
from megatron_dapo.types import SamplingParams
from tests.engines.asking import requests, weights, write


def test_a_seed_gives_the_same_response_alone_and_in_company(
    engine: HttpEngine, references: list[PreTrainedModel]
) -> None:
    engine.load_weights(weights(references[0]), 40)
    asked = requests(draws=8, n=4)
    together = write(engine, asked)
    for place in (0, 13, 31):
        (alone,) = write(engine, asked[place : place + 1])
        assert alone.token_ids.tolist() == together[place].token_ids.tolist()
        assert np.abs(alone.logprobs - together[place].logprobs).max() < 1e-5
    first_of_a_prompt = {tuple(completion.token_ids) for completion in together[:4]}
    assert len(first_of_a_prompt) == 4, "samples of a prompt have seeds of their own"


def test_log_probs_are_renormalised_over_top_k(engine: HttpEngine, references: list[PreTrainedModel]) -> None:
    engine.load_weights(weights(references[0]), 41)
    asked = [replace(request, params=SamplingParams(24, 1.0, 1.0, 3)) for request in requests(n=1)]
    for request, completion in zip(asked, write(engine, asked), strict=True):
        ids = torch.tensor(np.concatenate([request.prompt_ids, completion.token_ids]))
        with torch.no_grad():
            logits = references[0](ids[None]).logits[0, len(request.prompt_ids) - 1 : -1]
        three = logits.topk(3).values
        drawn = logits.gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        assert (drawn >= three[:, -1] - 1e-5).all()
        assert np.abs((drawn - three.logsumexp(-1)).numpy() - completion.logprobs).max() < 1e-4


@pytest.mark.parametrize("path", ["/weight_info", "/collective_rpc", "/inference/v1/generate", "/health"])
@pytest.mark.parametrize("key", [None, "Bearer guess"])
def test_no_path_answers_without_the_key(engine: HttpEngine, path: str, key: str | None) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", engine.server.port, timeout=20)
    connection.request("POST", path, b"{}", {} if key is None else {"Authorization": key})
    assert connection.getresponse().status == 401
    connection.close()


def test_a_request_that_the_server_refuses_is_said_with_its_reason(
    engine: HttpEngine, references: list[PreTrainedModel]
) -> None:
    engine.load_weights(weights(references[0]), 42)
    (asked, *_) = requests()
    engine.submit([replace(asked, seed=2**64)])
    with pytest.raises(RefusedError, match="vLLM refused /inference/v1/generate: status 4"):
        while engine.pending:
            engine.poll()
    engine.abort()
    write(engine, requests())
