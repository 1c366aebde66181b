"""What flows through a training step: one frozen type a stage.

    Prompt -> Request -> Completion -> Sample -> Group -> SequenceRows -> SequenceBatch -> MicroBatch

Everything here is plain numpy, so that it travels between processes as it is. Axes:
`R` response tokens of one sequence, `S` sequences, `T` tokens of all sequences back to back (prompts and
responses), `N` response tokens of all sequences back to back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]

FinishReason = Literal["stop", "length", "abort"]
RewardStatus = Literal["ok", "unparsable", "timeout", "error"]


@dataclass(frozen=True)
class Prompt:
    """One row of a dataset, ready to be sent to an engine."""

    index: int  # position in the dataset after filtering: stable for one set of files and settings
    token_ids: IntArray  # [P]
    text: str  # the chat template applied
    data_source: str
    ground_truth: str
    extra_info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SamplingParams:
    """How an engine draws tokens. `temperature` 0 is greedy; `top_k` -1 is off."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1


@dataclass(frozen=True)
class Request:
    """One response to be written. (draw_index, sample_index) names it for its whole life."""

    draw_index: int
    sample_index: int
    prompt_ids: IntArray  # [P]
    seed: int
    params: SamplingParams


@dataclass(frozen=True)
class Completion:
    """One response as the engine wrote it.

    `logprobs` are those of the distribution that was really sampled (temperature, top-p, top-k included).
    With finish reason "stop" the last token is the end-of-sequence token.
    """

    draw_index: int
    sample_index: int
    token_ids: IntArray  # [R]
    logprobs: FloatArray  # [R]
    finish_reason: FinishReason
    weight_version: int


@dataclass(frozen=True)
class RewardResult:
    """What a verifier said of one response.

    `metrics` holds every number that the reward function returned, `score` and `acc` among them. It is empty,
    and `score` is NaN, where `status` is "timeout" or "error"; `detail` then says what happened.
    """

    status: RewardStatus
    score: float
    metrics: Mapping[str, float]
    pred: str = ""
    detail: str = ""

    @property
    def usable(self) -> bool:
        return self.status in ("ok", "unparsable")


@dataclass(frozen=True)
class Sample:
    """A completion with its reward: verifier's score + overlong penalty, less KL where it is in the reward."""

    completion: Completion
    result: RewardResult
    overlong_penalty: float
    reward: float

    @property
    def length(self) -> int:
        """Response tokens."""
        return len(self.completion.token_ids)


@dataclass(frozen=True)
class Group:
    """All usable responses to one draw of one prompt."""

    draw_index: int
    prompt: Prompt
    samples: tuple[Sample, ...]
    weight_version: int  # of the policy that wrote the oldest of them


@dataclass(frozen=True)
class SequenceRows:
    """S sequences, each prompt + response, in the arrays that their groups hold: `select` is what copies tokens."""

    prompts: Sequence[IntArray]  # [S] of [P]
    responses: Sequence[IntArray]  # [S] of [R]

    @staticmethod
    def from_groups(groups: Iterable[Group]) -> SequenceRows:
        """The groups' samples in order: group by group, sample by sample."""
        rows = [(group.prompt.token_ids, sample.completion.token_ids) for group in groups for sample in group.samples]
        return SequenceRows([prompt for prompt, _ in rows], [response for _, response in rows])

    def __len__(self) -> int:
        return len(self.responses)

    @cached_property
    def prompt_lengths(self) -> IntArray:
        """[S]"""
        return np.array([len(prompt) for prompt in self.prompts], np.int64)

    @cached_property
    def response_lengths(self) -> IntArray:
        """[S]"""
        return np.array([len(response) for response in self.responses], np.int64)

    @property
    def lengths(self) -> IntArray:
        """[S] prompt + response tokens."""
        return self.prompt_lengths + self.response_lengths

    @cached_property
    def cu_responses(self) -> IntArray:
        """[S+1] where each response starts in an array over response tokens [N]."""
        return _offsets(self.response_lengths)

    def select(self, indices: Sequence[int]) -> SequenceBatch:
        """The sequences at `indices`, in that order."""
        parts = [part for index in indices for part in (self.prompts[index], self.responses[index])]
        return SequenceBatch(
            token_ids=np.concatenate(parts, dtype=np.int32) if parts else np.zeros(0, np.int32),
            lengths=self.lengths[list(indices)],
            prompt_lengths=self.prompt_lengths[list(indices)],
        )


@dataclass(frozen=True)
class SequenceBatch:
    """S sequences, each prompt + response, back to back in one buffer.

    Token ids are 32 bits wide here, which holds any vocabulary: they are most of what travels to the ranks.
    """

    token_ids: NDArray[np.integer]  # [T]
    lengths: IntArray  # [S] prompt + response tokens
    prompt_lengths: IntArray  # [S]

    @staticmethod
    def from_groups(groups: Iterable[Group]) -> SequenceBatch:
        """The groups' samples in order: group by group, sample by sample."""
        rows = SequenceRows.from_groups(groups)
        return rows.select(range(len(rows)))

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def response_lengths(self) -> IntArray:
        return self.lengths - self.prompt_lengths

    @cached_property
    def cu_seqlens(self) -> IntArray:
        """[S+1] where each sequence starts in `token_ids`."""
        return _offsets(self.lengths)

    @cached_property
    def cu_responses(self) -> IntArray:
        """[S+1] where each response starts in an array over response tokens [N]."""
        return _offsets(self.response_lengths)

    def select(self, indices: Sequence[int]) -> SequenceBatch:
        """The sequences at `indices`, in that order."""
        return SequenceBatch(
            token_ids=take_ragged(self.token_ids, self.cu_seqlens, indices),
            lengths=self.lengths[list(indices)],
            prompt_lengths=self.prompt_lengths[list(indices)],
        )


def _offsets(lengths: IntArray) -> IntArray:
    """[S+1] where each of S rows back to back starts, and the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def take_ragged(values: NDArray, offsets: IntArray, indices: Sequence[int]) -> NDArray:
    """The rows at `indices` of a ragged array, back to back: values[offsets[i]:offsets[i+1]] for each i."""
    parts = [values[offsets[i] : offsets[i + 1]] for i in indices]
    return np.concatenate(parts) if parts else values[:0]


@dataclass(frozen=True)
class TokenTerms:
    """What the loss needs of each response token, [N], and of each sequence, [S]: float32.

    `weight` is the aggregation: the loss is the plain sum of weight x loss over all tokens of a mini-batch. A token
    with a log-prob in here that is not finite (`nonfinite_tokens`) weighs nothing, whatever its sequence's weight.
    `old_logp` None: the mini-batch is its own old policy, and every ratio is 1.
    `ref_logp` is there where a KL term is part of the loss.
    `rollout_logp`, the engine's, is there where truncated importance sampling is on.
    """

    weight: FloatArray  # [S]: one for all tokens of a response
    advantage: FloatArray  # [S]: likewise
    old_logp: FloatArray | None  # [N], as those that follow
    ref_logp: FloatArray | None
    rollout_logp: FloatArray | None

    def select(self, offsets: IntArray, indices: Sequence[int]) -> TokenTerms:
        """The terms of the sequences at `indices`; `offsets` is their batch's `cu_responses`."""

        def chosen(values: FloatArray | None) -> FloatArray | None:
            return None if values is None else take_ragged(values, offsets, indices)

        return TokenTerms(
            weight=self.weight[list(indices)],
            advantage=self.advantage[list(indices)],
            old_logp=chosen(self.old_logp),
            ref_logp=chosen(self.ref_logp),
            rollout_logp=chosen(self.rollout_logp),
        )


def nonfinite_tokens(*logps: FloatArray | None) -> NDArray[np.intp]:
    """Where among the N tokens any of them is NaN or infinite."""
    found = [np.flatnonzero(~np.isfinite(logp)) for logp in logps if logp is not None]
    return np.unique(np.concatenate(found)) if found else np.zeros(0, np.intp)


@dataclass(frozen=True)
class MicroBatch:
    """What one data-parallel rank trains on in one forward and backward pass."""

    sequences: SequenceBatch
    terms: TokenTerms


@dataclass(frozen=True)
class PlannedMicroBatch:
    """A `MicroBatch` whose tokens still lie where the mini-batch has them. They are copied when it is pickled, which
    makes it one, or read: what is packed for one rank is gone when the next one's is, and takes the same memory."""

    mini_batch: SequenceRows
    mini_batch_terms: TokenTerms
    indices: Sequence[int]  # of its sequences in the mini-batch

    @property
    def sequences(self) -> SequenceBatch:
        return self.mini_batch.select(self.indices)

    @property
    def terms(self) -> TokenTerms:
        return self.mini_batch_terms.select(self.mini_batch.cu_responses, self.indices)

    def __reduce__(self) -> tuple[type[MicroBatch], tuple[SequenceBatch, TokenTerms]]:
        return MicroBatch, (self.sequences, self.terms)


class CheckpointError(ValueError):
    """A checkpoint that cannot be read: names the file or tensor, what was found and what was wanted."""
