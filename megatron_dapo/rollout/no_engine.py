"""In place of an engine on a rank whose device works for the engine of a rank before it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from megatron_dapo.rollout.engine import Tag
from megatron_dapo.types import Completion, Request


class NoEngine:
    """A `RolloutEngine` that holds nothing and is asked for nothing."""

    pending = 0

    def submit(self, requests: Sequence[Request]) -> None:
        """Raises RuntimeError: there are requests."""
        if requests:
            raise RuntimeError(f"{len(requests)} requests for a rank without an engine; its device serves another's")

    def poll(self) -> list[Completion]:
        return []

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Nothing is taken; whoever made `tensors` draws them to their end."""

    def weight_checksums(self) -> Mapping[str, int]:
        return {}

    def abort(self) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def sleep(self, tags: Sequence[Tag]) -> None: ...
    def wake(self, tags: Sequence[Tag]) -> None: ...
    def restart(self) -> None: ...
    def close(self) -> None: ...
