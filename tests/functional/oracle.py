"""The independent answer: transformers, full logits, the loss written out, plain autograd, one sequence at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers

from megatron_dapo.types import SequenceBatch, TokenTerms


@dataclass(frozen=True)
class Terms:
    """The objective's constants."""

    low: float = 0.2
    high: float = 0.28
    dual: float = 10.0
    temperature: float = 1.0
    entropy_coeff: float = 0.0
    kl_coef: float = 0.0


@dataclass(frozen=True)
class Answer:
    loss: float
    logp: np.ndarray  # [N]
    entropy: np.ndarray  # [N]
    grad_norm: float
    grads: dict[str, torch.Tensor]
    stepped: dict[str, torch.Tensor]  # the weights after two AdamW steps on the clipped gradient


def load(path: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def logp_and_entropy(
    model: torch.nn.Module, batch: SequenceBatch, index: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """[R] each, of the response tokens of one sequence."""
    begin, end = batch.cu_seqlens[index], batch.cu_seqlens[index + 1]
    ids = torch.from_numpy(batch.token_ids[begin:end])[None]
    prompt = int(batch.prompt_lengths[index])
    logits = model(ids).logits[0, prompt - 1 : -1].float() / temperature
    log_softmax = logits.log_softmax(-1)
    logp = log_softmax.gather(-1, ids[0, prompt:, None])[:, 0]
    return logp, -(log_softmax.exp() * log_softmax).sum(-1)


def all_logp(path: Path, batch: SequenceBatch, temperature: float = 1.0) -> np.ndarray:
    model = load(path)
    with torch.no_grad():
        return np.concatenate(
            [logp_and_entropy(model, batch, i, temperature)[0].numpy() for i in range(len(batch))]
        ).astype(np.float64)


def answer(
    path: Path, batch: SequenceBatch, token_terms: TokenTerms, terms: Terms, lr: float, eps: float, clip: float
) -> Answer:
    """Loss and gradient under the first weights, and the weights after two updates on the same batch."""
    model = load(path)
    params = dict(model.named_parameters())
    adam = torch.optim.AdamW(params.values(), lr=lr, betas=(0.9, 0.999), eps=eps, weight_decay=0.01)
    loss, logp, entropy = _backward(model, batch, token_terms, terms)
    grads = {name: param.grad.clone() for name, param in params.items()}
    norm = torch.nn.utils.clip_grad_norm_(params.values(), clip).item()
    adam.step()
    adam.zero_grad()
    _backward(model, batch, token_terms, terms)
    torch.nn.utils.clip_grad_norm_(params.values(), clip)
    adam.step()
    stepped = {name: param.detach().clone() for name, param in params.items()}
    return Answer(loss, logp, entropy, norm, grads, stepped)


def _backward(
    model: torch.nn.Module, batch: SequenceBatch, token_terms: TokenTerms, terms: Terms
) -> tuple[float, np.ndarray, np.ndarray]:
    total, logps, entropies = 0.0, [], []
    for index in range(len(batch)):
        part = slice(int(batch.cu_responses[index]), int(batch.cu_responses[index + 1]))
        logp, entropy = logp_and_entropy(model, batch, index, terms.temperature)
        loss = (_at(token_terms.weight, part) * _token_loss(logp, entropy, token_terms, part, terms)).sum()
        loss.backward()
        total += loss.item()
        logps.append(logp.detach().numpy())
        entropies.append(entropy.detach().numpy())
    return total, np.concatenate(logps), np.concatenate(entropies)


def _token_loss(
    logp: torch.Tensor, entropy: torch.Tensor, given: TokenTerms, part: slice, terms: Terms
) -> torch.Tensor:
    advantage = _at(given.advantage, part)
    ratio = torch.exp(logp - _at(given.old_logp, part))
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - terms.low, 1 + terms.high))
    loss = torch.where(advantage < 0, torch.minimum(loss, -advantage * terms.dual), loss)
    if given.ref_logp is not None:
        gap = _at(given.ref_logp, part) - logp
        loss = loss + terms.kl_coef * (gap.exp() - gap - 1).clamp(-10, 10)
    return loss - terms.entropy_coeff * entropy


def _at(values: np.ndarray, part: slice) -> torch.Tensor:
    return torch.from_numpy(values[part].astype(np.float32))
