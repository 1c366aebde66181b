"""What is known of each distinct prompt: a digest, counts and lengths. Texts are not kept, so that memory is small.

Some 250 bytes a distinct prompt. Equal digests (128 bits) are taken for equal prompts.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Sequence

import numpy as np

from megatron_dapo.data.files import Row
from megatron_dapo.types import IntArray

UNKNOWN_LENGTH = -1


class PromptLedger:
    """Numbers prompts in the order in which they are met. `measure`: rows to the tokens of their prompts."""

    def __init__(self, measure: Callable[[Sequence[Row]], Sequence[int]] | None, share: float, seed: int):
        """`share` of the prompts are for validation; which ones depends on `seed` and their text alone."""
        self._measure, self._limit, self._seed = measure, share * 2**64, seed
        self._numbers: dict[bytes, int] = {}
        self._lengths, self._answers, self._apart = array("q"), array("Q"), bytearray()
        self._rows = np.zeros(0, np.int64)
        self.first_conflict = ""  # where a prompt was first met with another ground truth than before
        self._conflicting: set[int] = set()

    def __len__(self) -> int:
        return len(self._numbers)

    def enter(self, rows: Sequence[Row]) -> IntArray:
        """[rows] the number of each one's prompt; new prompts are measured. Rows are counted by `count`."""
        numbers = np.empty(len(rows), np.int64)
        new: list[Row] = []
        for position, row in enumerate(rows):
            digest = _digest(json.dumps(row.messages))
            number = numbers[position] = self._numbers.setdefault(digest, len(self._numbers))
            answer = _short_digest(row.ground_truth.encode())
            if number == len(self._answers):
                new.append(row)
                self._answers.append(answer)
                self._apart.append(_short_digest(b"%d" % self._seed + digest) < self._limit)
            elif self._answers[number] != answer:
                self.first_conflict = self.first_conflict or row.where
                self._conflicting.add(int(number))
        self._lengths.extend(self._measure(new) if self._measure else [UNKNOWN_LENGTH] * len(new))
        return numbers

    def count(self, numbers: IntArray) -> None:
        """`numbers`: [rows], with every repetition."""
        found = np.bincount(numbers, minlength=len(self))
        found[: len(self._rows)] += self._rows
        self._rows = found

    @property
    def conflicting(self) -> int:
        """Prompts that were met with more than one ground truth."""
        return len(self._conflicting)

    @property
    def repeats(self) -> IntArray:
        """[prompts] rows of each."""
        return self._rows

    @property
    def lengths(self) -> IntArray:
        """[prompts] tokens, UNKNOWN_LENGTH where nothing measures."""
        return np.array(self._lengths, np.int64)

    @property
    def for_validation(self) -> np.ndarray:
        """[prompts] bool."""
        return np.array(self._apart, bool)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _short_digest(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
