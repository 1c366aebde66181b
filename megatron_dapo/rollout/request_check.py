"""Whether requests can be written at all, before any of them is queued: what every engine asks."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from transformers import PreTrainedConfig

from megatron_dapo.rollout.sampling import check_params
from megatron_dapo.types import Request


class RequestCheck:
    def __init__(self, config: PreTrainedConfig, eos_token_ids: Sequence[int]):
        """Raises ValueError: an eos id outside the vocabulary."""
        self._vocab_size, self._max_positions = int(config.vocab_size), int(config.max_position_embeddings)
        outside = [i for i in eos_token_ids if not 0 <= i < self._vocab_size]
        if outside:
            raise ValueError(f"eos_token_ids {outside} are outside the model's vocabulary of {self._vocab_size}")

    def all(self, requests: Sequence[Request], pending: Collection[tuple[int, int]]) -> None:
        """Check `requests` beside those named in `pending`.

        Raises:
            ValueError: an empty prompt, one with ids outside the vocabulary or with max_tokens beyond the model's
                positions, sampling parameters that cannot be, or a (draw_index, sample_index) that is pending.
        """
        names: set[tuple[int, int]] = set()
        for request in requests:
            name = (request.draw_index, request.sample_index)
            try:
                self._one(request)
            except ValueError as error:
                raise ValueError(f"request (draw {name[0]}, sample {name[1]}): {error}") from error
            if name in pending or name in names:
                raise ValueError(f"request (draw {name[0]}, sample {name[1]}) is pending already; number draws anew")
            names.add(name)

    def _one(self, request: Request) -> None:
        check_params(request.params)
        prompt = request.prompt_ids
        if len(prompt) == 0:
            raise ValueError("the prompt is empty; it needs at least 1 token")
        if prompt.min() < 0 or prompt.max() >= self._vocab_size:
            raise ValueError(
                f"prompt ids range from {prompt.min()} to {prompt.max()}; the vocabulary ends at {self._vocab_size - 1}"
            )
        total = len(prompt) + request.params.max_tokens
        if total > self._max_positions:
            raise ValueError(
                f"{len(prompt)} prompt tokens + max_tokens {request.params.max_tokens} = {total} is more than the "
                f"model's {self._max_positions} positions; use max_tokens {self._max_positions - len(prompt)} or less"
            )
