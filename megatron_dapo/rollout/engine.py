"""What a rollout engine is: token ids in, token ids and log-probs out, weights by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, Protocol

import torch

from megatron_dapo.types import Completion, Request

Tag = Literal["weights", "kv_cache"]
ALL_TAGS: tuple[Tag, ...] = ("weights", "kv_cache")


class RolloutEngine(Protocol):
    """All but `close` and `restart` may raise EngineFailedError (`failures.py`) where the engine is another process."""

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

    def pause(self) -> None:
        """Write nothing until `resume`; pending requests stay pending and go on where they were."""
        ...

    def resume(self) -> None:
        """Go on after `pause`."""
        ...

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Replace every weight by the Hugging Face name; completions carry `version` from here on.

        A tensor may be a view of memory that is written over when the next one is asked for: none may be kept.

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

    def sleep(self, tags: Sequence[Tag]) -> None:
        """Give the memory of `tags` up. Nothing may be pending. Weights are gone: load them after `wake`."""
        ...

    def wake(self, tags: Sequence[Tag]) -> None:
        """Take the memory of `tags` back."""
        ...

    def restart(self) -> None:
        """As it was when it was made: nothing pending, no weights. Also after it has failed."""
        ...

    def close(self) -> None:
        """End it, with the processes that it started."""
        ...
