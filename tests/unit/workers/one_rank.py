"""The workers of a process that is alone, as a run would make them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from megatron_dapo.algo.loss import PolicyLossConfig
from megatron_dapo.config.tree import MegatronConfig, OptimConfig
from megatron_dapo.data.minibatch import Update
from megatron_dapo.mcore.fused_loss import Objective
from megatron_dapo.mcore.parallel import shutdown
from megatron_dapo.rollout.torch_engine import TorchEngine
from megatron_dapo.types import MicroBatch, Request, SamplingParams, SequenceBatch, TokenTerms
from megatron_dapo.workers.policy import PolicySettings, PolicyWorker
from tests.functional.tiny_models import VOCAB, save_tiny_model

END = 1  # the token that ends a response


def save_model(path: Path) -> Path:
    """Of two layers, with a tokenizer, so that it can be exported."""
    save_tiny_model(path, "qwen2", tied=False, layers=2)
    words = Tokenizer(WordLevel({"a": 0, "<end>": END}, unk_token="a"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(path)
    return path


def settings_of(model: Path, **changes: object) -> PolicySettings:
    plain = PolicySettings(
        model_path=str(model),
        packed=True,
        megatron=MegatronConfig(),
        optim=OptimConfig(),
        grad_clip=1.0,
        objective=Objective(PolicyLossConfig(0.2, 0.28, 10.0), temperature=1.0),
        seed=1,
        with_reference=False,
    )
    return replace(plain, **changes)


@contextmanager
def policy_worker(settings: PolicySettings) -> Iterator[PolicyWorker]:
    """Takes Megatron's process groups down again, for the next one."""
    try:
        yield PolicyWorker(settings)
    finally:
        shutdown()


def engine_of(model: Path, max_num_seqs: int = 8) -> TorchEngine:
    return TorchEngine(model, [END], max_num_seqs=max_num_seqs, device="cpu", dtype=torch.float32)


def requests_of(draws: int, n: int, first_draw: int = 0, max_tokens: int = 12) -> list[Request]:
    prompts = [np.random.default_rng(draw).integers(2, VOCAB, 2 + draw % 4) for draw in range(draws)]
    params = SamplingParams(max_tokens)
    return [
        Request(first_draw + draw, sample, prompts[draw], 1000 * (first_draw + draw) + sample, params)
        for draw in range(draws)
        for sample in range(n)
    ]


def training_batch(sequences: SequenceBatch, old_logp: np.ndarray, advantage: float = 1.0) -> MicroBatch:
    """Every response token weighs the same; advantages alternate from sequence to sequence."""
    signs = np.where(np.arange(len(sequences)) % 2, -advantage, advantage)
    weight = np.full(len(sequences), 1 / len(old_logp), np.float32)
    return MicroBatch(sequences, TokenTerms(weight, signs.astype(np.float32), old_logp, None, None))


def update_of(ranks: Sequence[Sequence[MicroBatch]]) -> Update:
    """An update of these micro-batches, without what only its log-probs or metrics are read from."""
    return Update(tuple(map(tuple, ranks)), (), np.zeros(1, np.int64), 0, 0, 0, 0)
