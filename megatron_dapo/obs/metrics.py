"""From a step's data to flat metric names. Pure functions; every name is listed in `metric_table.py`.

Axes: `S` sequences, `N` response tokens of all sequences back to back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from megatron_dapo.algo.repetition import ngram_repetition
from megatron_dapo.types import FloatArray, Group, IntArray

WEIGHTED = ("loss", "policy_loss", "kl_loss")


def group_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Rewards and responses of the accepted groups; means are over their samples.

    `reward/accuracy` is there where the reward function returns `acc`.

    Raises:
        ValueError: no sample at all.
    """
    samples = [sample for group in groups for sample in group.samples]
    if not samples:
        raise ValueError("no sample in the accepted groups: there is no step to describe")
    lengths_S = np.array([sample.length for sample in samples])
    metrics = {
        "reward/mean": np.mean([sample.reward for sample in samples]),
        "reward/score": np.mean([sample.result.score for sample in samples]),
        "reward/overlong_penalty": np.mean([sample.overlong_penalty for sample in samples]),
        "reward/unparsable_share": np.mean([sample.result.status == "unparsable" for sample in samples]),
        "response/length_mean": lengths_S.mean(),
        "response/length_max": lengths_S.max(),
        "response/length_min": lengths_S.min(),
        "response/truncated_share": np.mean([sample.completion.finish_reason == "length" for sample in samples]),
        "response/repetition": np.mean([ngram_repetition(sample.completion.token_ids) for sample in samples]),
    }
    acc = [sample.result.metrics["acc"] for sample in samples if "acc" in sample.result.metrics]
    if len(acc) == len(samples):
        metrics["reward/accuracy"] = np.mean(acc)
    return {name: float(value) for name, value in metrics.items()}


def sampling_metrics(counters: Mapping[str, float]) -> dict[str, float]:
    """The counters of dynamic sampling under `sampling/`, and shares of them where something was generated.

    The sums `acc_sum` and `score_sum` over `samples_scored` become means: over all that was written, before any group
    was dropped, so that they show the policy and not the filter.
    """
    sums = {"acc_sum": "accuracy", "score_sum": "score"}
    metrics = {f"sampling/{name}": value for name, value in counters.items() if name not in sums}
    if counters["groups_generated"]:
        metrics["sampling/kept_share"] = counters["groups_accepted"] / counters["groups_generated"]
    if counters["samples_scored"]:
        metrics |= {f"sampling/{mean}": counters[name] / counters["samples_scored"] for name, mean in sums.items()}
    return metrics


def update_metrics(
    sums: Sequence[Mapping[str, float]], grad_norms: Sequence[float], lr: float, skipped: int
) -> dict[str, float]:
    """The step's optimizer updates under `actor/`.

    Args:
        sums: for each update that was applied, sums over all tokens of its mini-batch: `tokens`, those under
            `WEIGHTED`, which hold the aggregation's weights, and others, which become means over tokens.
        grad_norms: likewise, before clipping.
        lr: of the last update.
        skipped: updates not applied.
    """
    metrics: dict[str, float] = {"actor/lr": lr, "actor/updates": len(sums), "actor/skipped_updates": skipped}
    if not sums:
        return metrics
    metrics["actor/grad_norm"] = sum(grad_norms) / len(grad_norms)
    tokens = sum(update["tokens"] for update in sums)
    for name in sums[0]:
        if name != "tokens":
            total = sum(update[name] for update in sums)
            metrics[f"actor/{name}"] = total / (len(sums) if name in WEIGHTED else tokens)
    return metrics


def throughput_metrics(
    trained_tokens: int, step_seconds: float, generated_tokens: int, rollout_seconds: float
) -> dict[str, float]:
    """Tokens a second. `trained_tokens` counts prompts and responses, `generated_tokens` responses alone."""
    return {
        "throughput/tokens_per_second": trained_tokens / step_seconds,
        "throughput/generated_per_second": generated_tokens / rollout_seconds,
    }


@dataclass(frozen=True)
class Mismatch:
    """How far the trainer's log-probs of the sampled tokens are from the engine's, which wrote them.

    With d = trainer − engine a token and w = exp(d): `kl_k1` = mean(−d) and `kl_k3` = mean(w − 1 − d) estimate
    KL(engine ‖ trainer) in nats a token, from samples of the engine (Schulman, "Approximating KL divergence", 2020).
    `ess` = (Σw)² / (n·Σw²) is the effective sample size as a share of n, 1 where the two agree: over the weights of
    tokens, and over those of sequences (the product of their tokens' weights).
    """

    logp_diff_mean: float  # of |d|, as the next
    logp_diff_max: float
    kl_k1: float
    kl_k3: float
    ess_tokens: float
    ess_sequences: float

    def metrics(self) -> dict[str, float]:
        return {f"mismatch/{name}": value for name, value in asdict(self).items()}


def mismatch(trainer_logp_N: FloatArray, engine_logp_N: FloatArray, cu_responses: IntArray) -> Mismatch:
    """Compare log-probs of the same tokens, [N] each; `cu_responses` [S+1] tells where sequences begin.

    Raises:
        ValueError: the arrays are empty or differ in length, or a sequence has no token.
    """
    lengths_S = np.diff(cu_responses)
    if not len(trainer_logp_N) == len(engine_logp_N) == cu_responses[-1] or len(lengths_S) == 0 or lengths_S.min() < 1:
        raise ValueError(
            f"wanted equally many log-probs, in sequences of at least one token each; found {len(trainer_logp_N)} of "
            f"the trainer, {len(engine_logp_N)} of the engine, {len(lengths_S)} sequences of {cu_responses[-1]} tokens "
            f"in all, {np.sum(lengths_S < 1)} of them empty"
        )
    d_N = trainer_logp_N.astype(np.float64) - engine_logp_N.astype(np.float64)
    d_S = np.add.reduceat(d_N, cu_responses[:-1])
    return Mismatch(
        logp_diff_mean=float(np.abs(d_N).mean()),
        logp_diff_max=float(np.abs(d_N).max()),
        kl_k1=float(-d_N.mean()),
        kl_k3=float((np.expm1(d_N) - d_N).mean()),
        ess_tokens=_effective_share(d_N),
        ess_sequences=_effective_share(d_S),
    )


def _effective_share(log_weights: np.ndarray) -> float:
    weights = np.exp(log_weights - log_weights.max())  # a common factor cancels; this one keeps exp finite
    return float(weights.sum() ** 2 / (len(weights) * (weights**2).sum()))
