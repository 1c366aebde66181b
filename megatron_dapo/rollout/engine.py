"""What a rollout engine is: token ids in, token ids and log-probs out, weights by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch

from megatron_dapo.types import Completion, Request


class RolloutEngine(Protocol):
    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests. What is submitted in one call may be batched together, never with another call's."""
        ...

    def poll(self) -> list[Completion]:
        """Completions finished since the last call, in any order; an embedded engine works inside this call."""
        ...

    @property
    def pending(self) -> int:
        """Requests submitted and not yet returned by `poll`."""
        ...

    def abort(self) -> None:
        """Drop all pending requests; `pending` is 0 afterwards."""
        ...

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Replace every weight by the Hugging Face name; completions carry `version` from here on.

        Raises:
            ValueError: a name or shape that the model does not have, or a weight that never came.
        """
        ...

    def weight_checksums(self) -> Mapping[str, int]:
        """Hugging Face name -> `algo.checksum.checksum` of the whole tensor as the engine holds it now, in its dtype.

        An engine of several ranks adds up (`add_checksums`) what each computes of its slices. A tied output projection
        is not named.
        """
        ...
