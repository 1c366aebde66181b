"""Asking an engine in a test: requests, their answers, and what transformers makes of the same prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from megatron_dapo.rollout.http_engine import HttpEngine
from megatron_dapo.types import Completion, Request, SamplingParams
from tests.functional.tiny_models import VOCAB

EOS = 1
LONG = 80  # tokens


def weights(model: PreTrainedModel) -> list[tuple[str, Tensor]]:
    return list(model.named_parameters())


def requests(
    draws: int = 6, n: int = 2, tokens: int = 24, temperature: float = 1.0, prompt_tokens: int = 40
) -> list[Request]:
    """Prompts longer than a block of any engine's prefix cache, and their responses within 128 positions."""
    rng = np.random.default_rng(0)
    params = SamplingParams(tokens, temperature)
    prompts = rng.integers(3, VOCAB, (draws, prompt_tokens))
    return [Request(d, s, prompts[d], 2**62 + 10 * d + s, params) for d in range(draws) for s in range(n)]


def drain(engine: HttpEngine) -> list[Completion]:
    found: list[Completion] = []
    while engine.pending:
        found += engine.poll()
    return sorted(found, key=lambda c: (c.draw_index, c.sample_index))


def write(engine: HttpEngine, asked: Sequence[Request]) -> list[Completion]:
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


def processes() -> list[psutil.Process]:
    """Of the one server that this process runs: the server first, then what it started."""
    guard = next(p for p in psutil.Process().children() if "server_guard.py" in " ".join(p.cmdline()))
    return guard.children(recursive=True)


def lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
