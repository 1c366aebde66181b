"""From logits to tokens: temperature, top-k, top-p, and random numbers that belong to a request.

Row b draws token t with the uniform number u(seed_b, t), a pure function: what else is in the batch, and in which
order rows finish, changes nothing. The numbers are the SplitMix64 generator's (Steele, Lea, Flood 2014,
"Fast splittable pseudorandom number generators"), started at a hash of the seed.

Log-probs are those of the distribution that was drawn from. Greedy rows (temperature 0) draw from no
distribution: theirs are those of the plain softmax, temperature 1, nothing cut off.

Axes: `B` rows, `V` vocabulary, `K` draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_dapo.types import SamplingParams

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def check_params(params: SamplingParams) -> None:
    """Raises ValueError for a value that no distribution has."""
    if params.max_tokens < 1:
        raise ValueError(f"max_tokens is {params.max_tokens}; a response has at least 1 token")
    if not (math.isfinite(params.temperature) and params.temperature >= 0):
        raise ValueError(f"temperature is {params.temperature}; use a number above 0, or 0 for greedy")
    if not 0 < params.top_p <= 1:
        raise ValueError(f"top_p is {params.top_p}; use a number above 0 and at most 1 (1 is off)")
    if params.top_k != -1 and params.top_k < 1:
        raise ValueError(f"top_k is {params.top_k}; use a whole number of at least 1, or -1 for off")


def uniforms(seeds_B: NDArray[np.uint64], start: int, count: int) -> NDArray[np.float64]:
    """[B, count] numbers in [0, 1) for draws start..start+count-1 of each seed, in steps of 2^-48."""
    draws_K = np.arange(start + 1, start + count + 1, dtype=np.uint64)
    bits_BK = _mix(_mix(seeds_B)[:, None] + draws_K * _GOLDEN)
    # 48 bits: u x total stays below total in float64, so the search of the cumulative sum cannot run past the end
    return (bits_BK >> np.uint64(16)).astype(np.float64) * 2.0**-48


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@dataclass(frozen=True)
class RowSampler:
    """The sampling parameters of B rows, on the engine's device."""

    greedy_B: Tensor  # bool
    temperature_B1: Tensor  # 1 where greedy
    top_k_B1: Tensor  # vocabulary size where off or greedy
    top_p_B1: Tensor  # 1 where off or greedy

    # What no row needs is not computed; the results are the same.
    any_greedy: bool
    all_greedy: bool
    any_scaled: bool
    any_truncated: bool

    @staticmethod
    def of(params: Sequence[SamplingParams], vocab_size: int, device: torch.device) -> RowSampler:
        greedy = [p.temperature == 0 for p in params]
        temperature = [p.temperature or 1.0 for p in params]
        top_k = [p.top_k if p.top_k > 0 and p.temperature else vocab_size for p in params]
        top_p = [p.top_p if p.temperature else 1.0 for p in params]
        return RowSampler(
            greedy_B=torch.tensor(greedy, device=device),
            temperature_B1=torch.tensor(temperature, dtype=torch.float32, device=device)[:, None],
            top_k_B1=torch.tensor(top_k, device=device)[:, None],
            top_p_B1=torch.tensor(top_p, dtype=torch.float64, device=device)[:, None],
            any_greedy=any(greedy),
            all_greedy=all(greedy),
            any_scaled=any(t != 1 for t in temperature),
            any_truncated=any(k < vocab_size for k in top_k) or any(p < 1 for p in top_p),
        )

    def select(self, rows: Tensor) -> RowSampler:
        """The rows at `rows`, in that order."""
        return replace(
            self,
            greedy_B=self.greedy_B[rows],
            temperature_B1=self.temperature_B1[rows],
            top_k_B1=self.top_k_B1[rows],
            top_p_B1=self.top_p_B1[rows],
        )

    def sample(self, logits_BV: Tensor, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
        """One token a row: (tokens [B] int64, their log-probs [B] float32).

        `uniforms_B` are float64 in [0, 1). A row whose logits are not finite gets a log-prob that is not finite
        and a token that may be outside the vocabulary.
        """
        logits_BV = logits_BV.float()
        if self.any_scaled:
            logits_BV = logits_BV / self.temperature_B1
        if self.any_truncated:
            logits_BV = _truncate(logits_BV, self.top_k_B1, self.top_p_B1)
        logprobs_BV = torch.log_softmax(logits_BV, dim=-1)
        if self.all_greedy:
            tokens_B1 = logits_BV.argmax(-1, keepdim=True)
        else:
            cumulative_BV = logprobs_BV.exp().cumsum(-1, dtype=torch.float64)
            # the first token whose cumulative mass exceeds u x total: it has mass of its own
            tokens_B1 = torch.searchsorted(cumulative_BV, uniforms_B[:, None] * cumulative_BV[:, -1:], right=True)
            if self.any_greedy:
                tokens_B1 = torch.where(self.greedy_B[:, None], logits_BV.argmax(-1, keepdim=True), tokens_B1)
        in_range_B1 = tokens_B1.clamp(max=logits_BV.shape[-1] - 1)
        return tokens_B1[:, 0], logprobs_BV.gather(-1, in_range_B1)[:, 0]


def _truncate(logits_BV: Tensor, top_k_B1: Tensor, top_p_B1: Tensor) -> Tensor:
    """-inf outside the k most likely tokens, and then outside the fewest of these whose mass reaches p.

    Of equal logits the lower token id counts as more likely.
    """
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    rank_V = torch.arange(logits_BV.shape[-1], device=logits_BV.device)
    sorted_BV = sorted_BV.masked_fill(rank_V >= top_k_B1, -math.inf)
    mass_BV = torch.softmax(sorted_BV, dim=-1, dtype=torch.float64)
    before_BV = mass_BV.cumsum(-1) - mass_BV
    sorted_BV = sorted_BV.masked_fill(before_BV >= top_p_B1, -math.inf)
    return torch.empty_like(logits_BV).scatter_(-1, order_BV, sorted_BV)
