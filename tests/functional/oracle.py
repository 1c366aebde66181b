"""The independent answer: transformers, full logits, the objective written out from its definition, plain autograd.

Nothing of the package's arithmetic is used: not its weights, its loss, its gradient, nor its packing. One sequence at
a time, one process, the same precision as asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers

from megatron_dapo.types import FloatArray, SequenceBatch
from tests.functional.layout_problem import Formula, Problem


@dataclass(frozen=True)
class Answer:
    """The objective under the first weights, and the weights after `steps` of plain gradient descent on it."""

    loss: float
    loss_size: float  # the same sum over the absolute values of all terms: what an error of the loss is measured by
    logp: FloatArray  # [N]
    entropy: FloatArray  # [N]
    grads: dict[str, torch.Tensor]
    grad_norm: float
    weights: dict[str, torch.Tensor]
    stepped: dict[str, torch.Tensor]
    logp_stepped: FloatArray  # [N]


_SCALES = (1.0, 1.3, 1.5, 1.9)  # of the loss; no powers of 2, which round nothing otherwise


def load(path: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def all_logp(path: Path, batch: SequenceBatch, temperature: float = 1.0) -> FloatArray:
    """[N] the log-prob of each response token."""
    return _logp_of(load(path), batch, temperature)


def answer(path: Path, problem: Problem, formula: Formula, lr: float, clip: float, steps: int) -> Answer:
    """`steps` times w - lr · g · min(1, clip / |g|), on the same batch each time."""
    model = load(path)
    params = dict(model.named_parameters())
    weights = {name: param.detach().clone() for name, param in params.items()}
    first = _gradient(model, problem, formula)
    norm = _step(params, lr, clip)
    for _ in range(steps - 1):
        _gradient(model, problem, formula)
        _step(params, lr, clip)
    return Answer(
        *first,
        grad_norm=norm,
        weights=weights,
        stepped={name: param.detach().clone() for name, param in params.items()},
        logp_stepped=_logp_of(model, problem.sequences, formula.temperature),
    )


def bf16_error(path: Path, problem: Problem, formula: Formula, exact: Answer) -> dict[str, float]:
    """How far transformers itself is from `exact` when it computes in bfloat16, in the measures of the ranks."""
    model = load(path, torch.bfloat16)
    norm = max(abs(_bf16_norm(model, problem, formula, scale) / exact.grad_norm - 1) for scale in _SCALES)
    _, _, logp, _, grads = _gradient(model, problem, formula)
    largest = max(grad.abs().max().item() for grad in exact.grads.values())
    gaps = {name: (grad.float() - exact.grads[name]) for name, grad in grads.items()}
    among_all = max(gap.abs().max().item() for gap in gaps.values()) / largest
    return {
        "logp": float(np.abs(logp - exact.logp).max()),
        "gradient": max((gap.abs().max() / exact.grads[name].abs().max()).item() for name, gap in gaps.items()),
        "gradient distance": max((gap.norm() / exact.grads[name].norm()).item() for name, gap in gaps.items()),
        "gradient among all": among_all,
        "gradient norm": norm,
        "step": among_all,  # one step is the gradient times a number
    }


def _bf16_norm(model: torch.nn.Module, problem: Problem, formula: Formula, scale: float) -> float:
    """Of the gradient, with the loss scaled, which changes nothing but what is rounded to what."""
    grads = _gradient(model, problem, formula, scale)[-1]
    return torch.stack([grad.float().norm() for grad in grads.values()]).norm().item() / scale


def _logp_of(model: torch.nn.Module, batch: SequenceBatch, temperature: float) -> FloatArray:
    with torch.no_grad():
        parts = [_logp_and_entropy(model, batch, index, temperature)[0].numpy() for index in range(len(batch))]
    return np.concatenate(parts)


def _logp_and_entropy(
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


def _gradient(
    model: torch.nn.Module, problem: Problem, formula: Formula, scale: float = 1.0
) -> tuple[float, float, FloatArray, FloatArray, dict[str, torch.Tensor]]:
    """(loss, size of its terms, log-probs, entropies, gradients); the gradients are the parameters' own, and those of
    the loss times `scale`."""
    model.zero_grad()
    batch, losses, logps, entropies = problem.sequences, [], [], []
    for index in range(len(batch)):
        logp, entropy = _logp_and_entropy(model, batch, index, formula.temperature)
        losses.append(_token_loss(logp, entropy, problem, index, formula))
        logps.append(logp.detach().numpy())
        entropies.append(entropy.detach().numpy())
    counted = list(_counted(problem, losses, formula))
    loss = OBJECTIVES[formula.agg_mode, formula.scale](counted)
    size = OBJECTIVES[formula.agg_mode, formula.scale]([[part.abs() for part in group] for group in counted])
    (scale * loss).backward()
    grads = _gradients(dict(model.named_parameters()))
    return float(loss.item()), float(size.item()), np.concatenate(logps), np.concatenate(entropies), grads


def _token_loss(
    logp: torch.Tensor, entropy: torch.Tensor, problem: Problem, index: int, formula: Formula
) -> torch.Tensor:
    """[R] eq. 8 of DAPO with the dual clip, the k3 estimator of the KL divergence, and the entropy bonus."""
    batch = problem.sequences
    part = slice(int(batch.cu_responses[index]), int(batch.cu_responses[index + 1]))
    advantage = float(problem.advantages[index])
    # A token that is not finite is left out later; as a NaN it would still spoil the gradient, for 0 x NaN is NaN.
    ratio = torch.exp(logp - torch.from_numpy(problem.old_logp[part]).nan_to_num())
    clipped = ratio.clamp(1 - formula.clip_low, 1 + formula.clip_high)
    loss = torch.maximum(-advantage * ratio, -advantage * clipped)
    if advantage < 0:
        loss = loss.clamp(max=-advantage * formula.dual_clip)
    if problem.ref_logp is not None:
        gap = torch.from_numpy(problem.ref_logp[part]) - logp
        loss = loss + formula.kl_coef * (gap.exp() - gap - 1).clamp(-10, 10)
    return loss - formula.entropy_coeff * entropy


def _counted(problem: Problem, losses: list[torch.Tensor], formula: Formula) -> Iterator[list[torch.Tensor]]:
    """Group by group, the token losses of each sequence that counts: a token without a finite old log-prob does not,
    nor does a cut-off response under overlong filtering; a sequence or group without such tokens is none."""
    offsets, index = problem.sequences.cu_responses, 0
    for group in problem.groups:
        held = []
        for sample in group.samples:
            finite = np.isfinite(problem.old_logp[offsets[index] : offsets[index + 1]])
            if formula.overlong_filtering and sample.completion.finish_reason == "length":
                finite[:] = False
            if finite.any():
                held.append(losses[index][torch.from_numpy(finite)])
            index += 1
        if held:
            yield held


def _mean(values: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(values).mean()


def _sequences(groups: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    return [sequence for group in groups for sequence in group]


# The table of objectives, each as it reads: `global` over the whole mini-batch, `group` the mean over groups.
OBJECTIVES = {
    ("token-mean", "global"): lambda groups: torch.cat(_sequences(groups)).mean(),
    ("seq-mean-token-sum", "global"): lambda groups: _mean([s.sum() for s in _sequences(groups)]),
    ("seq-mean-token-mean", "global"): lambda groups: _mean([s.mean() for s in _sequences(groups)]),
    ("token-mean", "group"): lambda groups: _mean([torch.cat(group).mean() for group in groups]),
    ("seq-mean-token-sum", "group"): lambda groups: _mean([_mean([s.sum() for s in group]) for group in groups]),
    ("seq-mean-token-mean", "group"): lambda groups: _mean([_mean([s.mean() for s in group]) for group in groups]),
}


def _step(params: dict[str, torch.nn.Parameter], lr: float, clip: float) -> float:
    """One step of gradient descent on the clipped gradient; returns the norm before clipping."""
    grads = _gradients(params)
    norm = torch.stack([grad.square().sum() for grad in grads.values()]).sum().sqrt().item()
    scale = min(1.0, clip / (norm + 1e-6))
    with torch.no_grad():
        for name, param in params.items():
            param -= lr * scale * grads[name]
    return norm


def _gradients(params: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    return {name: param.grad for name, param in params.items() if param.grad is not None}
