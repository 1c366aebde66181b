"""Tiny models of the three families, and the slow way to say what an engine should answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from megatron_dapo.rollout.torch_engine import TorchEngine
from megatron_dapo.types import Completion, Request, SamplingParams

VOCAB = 40
EOS = 3
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 192,
    "initializer_range": 0.3,  # far from uniform: an argmax has no near tie, a sample is no coin flip
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": EOS,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen2": lambda: Qwen2Config(**_SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**_SIZES, num_key_value_heads=1, head_dim=16, tie_word_embeddings=False),
    "llama": lambda: LlamaConfig(
        **_SIZES, num_key_value_heads=4, tie_word_embeddings=False, rope_parameters=_LLAMA3_ROPE
    ),
}
FAMILIES = tuple(CONFIGS)

GREEDY = SamplingParams(max_tokens=16, temperature=0)
SAMPLED = SamplingParams(max_tokens=16)


@cache
def reference_model(family: str, seed: int = 0) -> PreTrainedModel:
    """Plain transformers with random weights, biases and norms included."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=torch.float32, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return model.eval().requires_grad_(False)


def engine_for(model: PreTrainedModel, eos: Sequence[int] = (EOS,), max_num_seqs: int = 64) -> TorchEngine:
    engine = TorchEngine(model.config, eos, max_num_seqs=max_num_seqs, device="cpu", dtype=torch.float32)
    engine.load_weights(model.named_parameters(), version=1)
    return engine


def prompts(count: int, shortest: int = 1, longest: int = 9) -> list[np.ndarray]:
    rng = np.random.default_rng(count)
    return [rng.integers(4, VOCAB, rng.integers(shortest, longest + 1)) for _ in range(count)]


def requests(
    prompt_ids: Sequence[np.ndarray], params: SamplingParams, samples: int = 1, first_draw: int = 0
) -> list[Request]:
    """`samples` requests a prompt, each with a seed of its own."""
    return [
        Request(first_draw + d, s, ids, seed=1000 * (first_draw + d) + s, params=params)
        for d, ids in enumerate(prompt_ids)
        for s in range(samples)
    ]


def run(engine: TorchEngine, asked: Sequence[Request]) -> dict[tuple[int, int], Completion]:
    """Submit in one call and poll to the end."""
    engine.submit(asked)
    done: dict[tuple[int, int], Completion] = {}
    for _ in range(10_000):
        for completion in engine.poll():
            name = (completion.draw_index, completion.sample_index)
            assert name not in done, f"{name} was returned twice"
            done[name] = completion
        if engine.pending == 0:
            break
    assert set(done) == {(r.draw_index, r.sample_index) for r in asked}
    return done


def sampled_logprobs(model: PreTrainedModel, request: Request, completion: Completion) -> np.ndarray:
    """[R] log-probs of a completion by one full forward pass and a loop that restricts each distribution."""
    ids = torch.from_numpy(np.concatenate([request.prompt_ids, completion.token_ids]))
    logits = model(ids[None]).logits[0, len(request.prompt_ids) - 1 : -1].double()
    rows = [restricted_log_softmax(row, request.params) for row in logits]
    return np.array([row[token].item() for row, token in zip(rows, completion.token_ids, strict=True)])


def restricted_log_softmax(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """[V] one token's distribution, a token at a time."""
    if params.temperature == 0:
        return torch.log_softmax(logits, -1)
    logits = logits / params.temperature
    by_rank = sorted(range(len(logits)), key=lambda token: -logits[token].item())
    if params.top_k != -1:
        by_rank = by_rank[: params.top_k]
    mass = torch.softmax(logits[by_rank], -1).tolist()
    kept, total = [], 0.0
    for token, probability in zip(by_rank, mass, strict=True):
        if params.top_p < 1 and total >= params.top_p:
            break
        kept.append(token)
        total += probability
    restricted = torch.full_like(logits, -torch.inf)
    restricted[kept] = logits[kept]
    return torch.log_softmax(restricted, -1)


def assert_same(left: dict[tuple[int, int], Completion], right: dict[tuple[int, int], Completion]) -> None:
    """The same tokens and reasons; log-probs up to the rounding of other batch shapes."""
    assert set(left) == set(right)
    for name, a in left.items():
        b = right[name]
        assert a.token_ids.tolist() == b.token_ids.tolist(), name
        assert a.finish_reason == b.finish_reason, name
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5, rtol=0)


def assert_identical(left: dict[tuple[int, int], Completion], right: dict[tuple[int, int], Completion]) -> None:
    assert_same(left, right)
    assert all(np.array_equal(a.logprobs, right[name].logprobs) for name, a in left.items())
