"""The requests that decode together: one chunk of one `submit` call, from its prompts to its last completion.

Rows leave the batch when they finish and none joins it. Equal prompts are computed once.

Axes: `B` rows of the chunk, `N` of them alive, `U` different prompts, `P` longest prompt, `R` longest response.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_dapo.rollout.decoder import DecodeCache, Decoder
from megatron_dapo.rollout.sampling import RowSampler, uniforms
from megatron_dapo.types import Completion, FinishReason, IntArray, Request

_DRAWS_AHEAD = 64  # random numbers a row made at a time


class Chunk:
    def __init__(
        self,
        requests: Sequence[Request],
        decoder: Decoder,
        eos_token_ids: IntArray,
        device: torch.device,
        weight_version: int,
    ):
        self._requests, self._decoder, self._eos = tuple(requests), decoder, eos_token_ids
        self._device, self._weight_version = device, weight_version
        self._seeds_B = np.array([r.seed % 2**64 for r in requests], np.uint64)
        self._max_tokens_B = np.array([r.params.max_tokens for r in requests], np.int64)
        longest = int(self._max_tokens_B.max())
        self._tokens_BR = np.zeros((len(requests), longest), np.int64)
        self._logprobs_BR = np.zeros((len(requests), longest), np.float32)
        self._alive_N = np.arange(len(requests))
        self._step = 0  # response tokens that every row alive has
        self._uniforms_BK = uniforms(self._seeds_B, 0, _DRAWS_AHEAD)

        row_of_prompt: dict[bytes, int] = {}
        prompts = [np.asarray(r.prompt_ids, np.int64) for r in requests]
        prompt_of_B = np.array([row_of_prompt.setdefault(p.tobytes(), len(row_of_prompt)) for p in prompts])
        lengths_B = np.array([len(p) for p in prompts])
        lengths_U = np.zeros(len(row_of_prompt), np.int64)
        lengths_U[prompt_of_B] = lengths_B
        tokens_UP = np.zeros((len(row_of_prompt), int(lengths_B.max())), np.int64)
        for row, prompt in zip(prompt_of_B, prompts, strict=True):
            tokens_UP[row, : len(prompt)] = prompt
        logits_UV, cache = decoder.prefill(self._to(tokens_UP), self._to(lengths_U))
        # the last token of a response is never fed back
        limit = tokens_UP.shape[1] + longest - 1
        self._cache = DecodeCache(cache, self._to(prompt_of_B), self._to(lengths_B), limit)
        self._logits_NV = logits_UV[self._to(prompt_of_B)]
        self._fed_N: torch.Tensor | None = None  # tokens drawn whose logits are not computed yet
        self._sampler = RowSampler.of([r.params for r in requests], logits_UV.shape[-1], device)

    @property
    def alive(self) -> int:
        """Rows that still decode."""
        return len(self._alive_N)

    def step(self) -> list[Completion]:
        """Draw one token in each row alive. The completions that this ended, in submission order.

        Raises:
            FloatingPointError: the model's logits are not finite; nothing was drawn.
        """
        if self._fed_N is not None:
            self._logits_NV, self._fed_N = self._decoder.step(self._fed_N, self._cache), None
        draw = self._step % _DRAWS_AHEAD
        if draw == 0 and self._step:
            self._uniforms_BK = uniforms(self._seeds_B, self._step, _DRAWS_AHEAD)
        tokens_N, logprobs_N = self._sampler.sample(self._logits_NV, self._to(self._uniforms_BK[self._alive_N, draw]))
        drawn_N, drawn_logprobs_N = tokens_N.cpu().numpy(), logprobs_N.cpu().numpy()
        if not np.isfinite(drawn_logprobs_N).all():
            self._raise_not_finite(int(self._alive_N[np.flatnonzero(~np.isfinite(drawn_logprobs_N))[0]]))
        self._tokens_BR[self._alive_N, self._step] = drawn_N
        self._logprobs_BR[self._alive_N, self._step] = drawn_logprobs_N
        self._step += 1

        stopped_N = np.isin(drawn_N, self._eos)
        done_N = stopped_N | (self._max_tokens_B[self._alive_N] <= self._step)
        if not done_N.any():
            self._fed_N = tokens_N
            return []
        ended = sorted(zip(self._alive_N[done_N].tolist(), stopped_N[done_N].tolist(), strict=True))
        self._fed_N = tokens_N[self._compact(done_N)]
        return [self._completion(row, "stop" if stopped else "length") for row, stopped in ended]

    def _compact(self, done_N: np.ndarray) -> torch.Tensor:
        """Fill the places of rows that are done from the end; the order [alive] in which the old rows now stand."""
        alive = int((~done_N).sum())
        holes = np.flatnonzero(done_N[:alive])
        movers = alive + np.flatnonzero(~done_N[alive:])
        order_N = np.arange(alive)
        order_N[holes] = movers
        self._alive_N = self._alive_N[order_N]
        self._cache.compact(self._to(holes), self._to(movers), alive)
        order = self._to(order_N)
        self._sampler = self._sampler.select(order)
        return order

    def _completion(self, row: int, finish_reason: FinishReason) -> Completion:
        request = self._requests[row]
        return Completion(
            draw_index=request.draw_index,
            sample_index=request.sample_index,
            token_ids=self._tokens_BR[row, : self._step].copy(),
            logprobs=self._logprobs_BR[row, : self._step].copy(),
            finish_reason=finish_reason,
            weight_version=self._weight_version,
        )

    def _raise_not_finite(self, row: int) -> None:
        request = self._requests[row]
        raise FloatingPointError(
            f"logits are not finite for draw {request.draw_index}, sample {request.sample_index}, response token "
            f"{self._step}, weight version {self._weight_version}: look for NaN or infinity in the weights that were "
            "loaded, or use a wider dtype"
        )

    def _to(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)
