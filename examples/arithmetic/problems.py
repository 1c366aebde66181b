"""Sums of two two-digit numbers: the problems, their three disjoint sets, and the two ways the base model has learnt.

Carefully: the sum of the ones and the sum of the tens first, then the answer, which is right. Hastily: an answer at
once, with the carry wrong. Which way the base model was shown how often depends on the first number, so that it
starts out careful on a third of the problems; reinforcement learning has to find out that care pays on all of them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEST, TRAIN = 512, 2000  # problems; the rest, some 5,600, are for the warm-up
CAREFUL_START = 40  # first numbers below it
CAREFUL_SHARE, HASTY_CAREFUL_SHARE = 0.7, 0.25  # of careful answers shown, for first numbers below and above
DATA_SOURCE = "arithmetic"


@dataclass(frozen=True)
class Problem:
    a: int
    b: int

    @property
    def question(self) -> str:
        return f"{self.a}+{self.b}=? Answer: N"

    @property
    def answer(self) -> int:
        return self.a + self.b

    @property
    def careful(self) -> str:
        """ones, tens with their carry, answer: `13,12` for 46+77."""
        ones = self.a % 10 + self.b % 10
        return f"{ones},{self.a // 10 + self.b // 10 + ones // 10}\nAnswer: {self.answer}"

    @property
    def hasty(self) -> str:
        """A carry forgotten, or one too many: wrong by ten."""
        carries = self.a % 10 + self.b % 10 >= 10
        return f"Answer: {self.answer - 10 if carries else self.answer + 10}"

    def demonstration(self, rng: random.Random) -> str:
        """A response to be imitated in the warm-up."""
        share = CAREFUL_SHARE if self.a < CAREFUL_START else HASTY_CAREFUL_SHARE
        return self.careful if rng.random() < share else self.hasty

    def row(self, index: int) -> dict[str, Any]:
        """In the recipe's schema."""
        return {
            "data_source": DATA_SOURCE,
            "prompt": [{"role": "user", "content": self.question}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(self.answer)},
            "extra_info": {"index": index},
        }


@dataclass(frozen=True)
class Split:
    """No problem is in two of them."""

    test: tuple[Problem, ...]
    train: tuple[Problem, ...]
    warmup: tuple[Problem, ...]


def split(seed: int) -> Split:
    """The same test problems for every seed; training and warm-up share out the others."""
    problems = [Problem(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(0).shuffle(problems)
    test, others = problems[:TEST], problems[TEST:]
    random.Random(seed).shuffle(others)
    return Split(tuple(test), tuple(others[:TRAIN]), tuple(others[TRAIN:]))


def write_rows(path: Path, problems: Iterable[Problem]) -> None:
    """A data file of them, in the recipe's schema."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(problem.row(index)) + "\n" for index, problem in enumerate(problems)))
