"""What is computed, apart from where: groups of responses, and which of the objectives is asked of them.

Everything here is data for both sides, the ranks and the oracle, and neither's arithmetic.
Axes: `S` sequences, `N` response tokens, group by group and sample by sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_dapo.config.tree import LossAggMode, LossScale
from megatron_dapo.types import Completion, FloatArray, Group, Prompt, RewardResult, Sample, SequenceBatch
from tests.functional.tiny_models import SHIFTS, VOCAB


@dataclass(frozen=True)
class Formula:
    """An objective in full: how token losses are put together, and the constants of each."""

    agg_mode: LossAggMode = "token-mean"
    scale: LossScale = "global"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float = 10.0
    temperature: float = 1.0
    entropy_coeff: float = 0.0
    kl_coef: float = 0.0
    overlong_filtering: bool = False


_MODES: tuple[LossAggMode, ...] = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")
_SCALES: tuple[LossScale, ...] = ("global", "group")
FORMULAS = {f"{mode} {scale}": Formula(mode, scale) for mode in _MODES for scale in _SCALES} | {
    "all terms": Formula(temperature=0.7, entropy_coeff=0.03, kl_coef=0.2),
    "overlong filtering": Formula("seq-mean-token-mean", "group", overlong_filtering=True),
}


@dataclass(frozen=True)
class Rollouts:
    """Groups as sampling yields them, with an advantage a sequence. `shift` = log-prob minus old log-prob.

    A NaN in `shift` is a token whose old log-prob is not finite.
    """

    groups: tuple[Group, ...]
    advantages: FloatArray  # [S]
    shift: FloatArray  # [N]

    @property
    def sequences(self) -> SequenceBatch:
        return SequenceBatch.from_groups(self.groups)


@dataclass(frozen=True)
class Problem:
    """Rollouts under one model: the old log-probs are that model's own, shifted."""

    groups: tuple[Group, ...]
    advantages: FloatArray  # [S]
    old_logp: FloatArray  # [N]
    ref_logp: FloatArray | None  # [N]

    @property
    def sequences(self) -> SequenceBatch:
        return SequenceBatch.from_groups(self.groups)


def make_problem(rollouts: Rollouts, logp: Callable[[SequenceBatch], FloatArray], formula: Formula) -> Problem:
    """`logp` gives the model's log-probs [N]; the reference policy is made up around them."""
    found = logp(rollouts.sequences)
    away = np.random.default_rng(5).normal(size=len(found)) * 0.3
    return Problem(
        groups=rollouts.groups,
        advantages=rollouts.advantages,
        old_logp=(found - rollouts.shift).astype(np.float32),
        ref_logp=(found + away).astype(np.float32) if formula.kl_coef else None,
    )


def make_rollouts(shapes: Sequence[tuple[int, Sequence[int]]], seed: int = 0, vocab: int = VOCAB) -> Rollouts:
    """One group for each (prompt length, response lengths); all sequences of a group have the same prompt tokens."""
    rng = np.random.default_rng(seed)
    groups = tuple(_group(draw, prompt, responses, rng, vocab) for draw, (prompt, responses) in enumerate(shapes))
    sequences = sum(len(responses) for _, responses in shapes)
    tokens = sum(sum(responses) for _, responses in shapes)
    return Rollouts(
        groups=groups,
        advantages=rng.normal(size=sequences).astype(np.float32),
        shift=rng.choice(SHIFTS, size=tokens).astype(np.float32),
    )


def ordinary_rollouts() -> Rollouts:
    """Groups of 4, 1, 3 and 2, one-token prompts and responses, two cut-off responses, an old log-prob of NaN."""
    rollouts = make_rollouts([(5, (1, 17, 4, 9)), (1, (8,)), (7, (3, 1, 12)), (3, (6, 2))])
    rollouts.shift[20] = np.nan
    return rollouts


def _group(draw: int, prompt: int, responses: Sequence[int], rng: np.random.Generator, vocab: int) -> Group:
    samples = tuple(_sample(draw, number, length, rng, vocab) for number, length in enumerate(responses))
    return Group(draw, Prompt(draw, rng.integers(0, vocab, prompt), "", "", ""), samples, weight_version=0)


def _sample(draw: int, number: int, length: int, rng: np.random.Generator, vocab: int) -> Sample:
    completion = Completion(
        draw_index=draw,
        sample_index=number,
        token_ids=rng.integers(0, vocab, length),
        logprobs=np.zeros(length, np.float32),
        finish_reason="length" if (draw + number) % 3 == 2 else "stop",
        weight_version=0,
    )
    return Sample(completion, RewardResult("ok", 1.0, {"score": 1.0}), overlong_penalty=0.0, reward=1.0)
