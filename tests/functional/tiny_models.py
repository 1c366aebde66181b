"""Tiny Hugging Face checkpoints of every family, and sequences that reach every branch of the loss."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers

from megatron_dapo.types import SequenceBatch, TokenTerms

VOCAB = 61  # odd: padded under tensor parallelism


def save_tiny_model(
    path: Path,
    family: str,
    tied: bool,
    layers: int = 4,
    seed: int = 3,
    vocab: int = VOCAB,
    sharpness: float = 4.0,
    bf16: bool = False,
    width: int = 32,
    heads: int = 8,
) -> None:
    """A random model in fp32 whose norms and biases are not the identity, so that a lost one is seen.

    `sharpness` multiplies the matrices: 1 is transformers' own start, near a uniform softmax. With `bf16` every
    weight is rounded to what bfloat16 holds, so that both types load the same model.
    """
    sizes = {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads if family == "llama" else heads // 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
    }
    config = {
        "qwen2": lambda: transformers.Qwen2Config(**sizes),
        "qwen3": lambda: transformers.Qwen3Config(**sizes, head_dim=8),
        "llama": lambda: transformers.LlamaConfig(**sizes),
    }[family]()
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "norm" in name or "bias" in name:
                param.add_(torch.randn_like(param) * 0.1)
            else:
                param.mul_(sharpness)
            if bf16:
                param.copy_(param.bfloat16())
    model.float().save_pretrained(path, safe_serialization=True)


@dataclass(frozen=True)
class Rollouts:
    """Sequences with all that the loss wants of them but weights. `shift` = log-prob minus old log-prob."""

    sequences: SequenceBatch
    advantage: np.ndarray  # [S]
    shift: np.ndarray  # [N]


def make_rollouts(count: int = 9, seed: int = 0) -> Rollouts:
    """Unequal lengths (1-token responses among them); ratios within the clip, beyond either side and beyond c = 10."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(1, 9, count)
    responses = rng.integers(1, 14, count)
    responses[:2] = 1, 17
    lengths = prompts + responses
    total = int(responses.sum())
    return Rollouts(
        sequences=SequenceBatch(
            token_ids=rng.integers(0, VOCAB, int(lengths.sum())).astype(np.int64),
            lengths=lengths.astype(np.int64),
            prompt_lengths=prompts.astype(np.int64),
        ),
        advantage=rng.normal(size=count),
        shift=rng.choice(SHIFTS, size=total),
    )


# Log-ratios: within the clip, beyond either side of it, and beyond c = 10.
SHIFTS = (0.0, 0.1, -0.1, 0.6, -0.6, 2.8)


def token_terms(rollouts: Rollouts, weight_S: np.ndarray, logp_N: np.ndarray, ref_N: np.ndarray | None) -> TokenTerms:
    return TokenTerms(
        weight=weight_S.astype(np.float32),
        advantage=rollouts.advantage.astype(np.float32),
        old_logp=(logp_N - rollouts.shift).astype(np.float32),
        ref_logp=None if ref_N is None else ref_N.astype(np.float32),
        rollout_logp=None,
    )
