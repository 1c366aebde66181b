"""The seeded order in which prompts are drawn, and its position.

Every epoch is a permutation of the dataset, epochs follow each other without a gap: nothing of an epoch is thrown
away because it does not fill a batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_dapo.data.prompts import EmptyDatasetError, PromptDataset
from megatron_dapo.types import IntArray, Prompt


class OtherPromptsError(ValueError):
    """A saved position belongs to another dataset, seed or order."""


class PromptStream:
    """Hands out prompts one after another, for `epochs` passes over the dataset or, with None, without end."""

    def __init__(self, prompts: PromptDataset, seed: int, shuffle: bool = True, epochs: int | None = None):
        if not len(prompts):
            raise EmptyDatasetError("the dataset holds no prompt; name files that hold prompts")
        self.prompts = prompts
        self._seed = seed
        self._shuffle = shuffle
        self._epochs = epochs
        self._position = 0
        self._order_epoch = -1
        self._order: IntArray = np.zeros(0, np.int64)  # [prompts] of epoch _order_epoch

    @property
    def position(self) -> int:
        """Prompts handed out so far."""
        return self._position

    @property
    def epoch(self) -> float:
        """Passes over the dataset so far, with their fraction."""
        return self._position / len(self.prompts)

    @property
    def remaining(self) -> int | None:
        """Prompts still to be handed out; None where there is no end."""
        return None if self._epochs is None else max(self._epochs * len(self.prompts) - self._position, 0)

    def next(self) -> Prompt:
        """The next prompt.

        Raises:
            StopIteration: `remaining` is 0.
        """
        if self.remaining == 0:
            raise StopIteration
        epoch, offset = divmod(self._position, len(self.prompts))
        if epoch != self._order_epoch:
            self._order, self._order_epoch = self._permutation(epoch), epoch
        self._position += 1
        return self.prompts[int(self._order[offset])]

    def state_dict(self) -> dict[str, Any]:
        return {
            "position": self._position,
            "fingerprint": self.prompts.fingerprint,
            "rows": len(self.prompts),
            "seed": self._seed,
            "shuffle": self._shuffle,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            OtherPromptsError: the dataset, seed or shuffling is another one, so the position would mean other prompts.
        """
        own = self.state_dict()
        for name, remedy in [
            ("rows", "train on the files that the state was saved with"),
            ("fingerprint", "train on the files, tokenizer and length limits that the state was saved with"),
            ("seed", "set data.seed back"),
            ("shuffle", "set data.shuffle back"),
        ]:
            if state[name] != own[name]:
                raise OtherPromptsError(
                    f"cannot go on from the saved position {state['position']}: the dataset's {name} was "
                    f"{state[name]}, now it is {own[name]}; {remedy}, or start a new run"
                )
        self._position = int(state["position"])

    def _permutation(self, epoch: int) -> IntArray:
        if not self._shuffle:
            return np.arange(len(self.prompts), dtype=np.int64)
        return np.random.default_rng([self._seed, epoch]).permutation(len(self.prompts)).astype(np.int64)
