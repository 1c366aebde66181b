"""What a preparation found and wrote."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_dapo.types import IntArray


@dataclass(frozen=True)
class Lengths:
    """Tokens of the distinct prompts, chat template included."""

    shortest: int
    median: float
    p95: float
    longest: int
    limit: int | None
    prompts_over: int  # the limit
    rows_over: int

    @staticmethod
    def of(lengths: IntArray, repeats: IntArray, limit: int | None) -> Lengths:
        """`lengths`, `repeats`: [distinct prompts]."""
        over = np.zeros(len(lengths), bool) if limit is None else lengths > limit
        return Lengths(
            shortest=int(lengths.min()),
            median=float(np.median(lengths)),
            p95=float(np.percentile(lengths, 95)),
            longest=int(lengths.max()),
            limit=limit,
            prompts_over=int(over.sum()),
            rows_over=int(repeats[over].sum()),
        )

    def __str__(self) -> str:
        over = (
            "" if self.limit is None else f"; {self.prompts_over:,} prompts ({self.rows_over:,} rows) over {self.limit}"
        )
        return f"{self.shortest} to {self.longest} tokens, median {self.median:g}, 95th percentile {self.p95:g}{over}"


@dataclass(frozen=True)
class Output:
    path: str
    rows: int
    prompts: int  # distinct


@dataclass(frozen=True)
class PreparationReport:
    files: tuple[str, ...]
    rows: int
    distinct: int  # prompts
    repeats: tuple[int, float, int]  # rows of a prompt: fewest, median, most
    conflicting: int  # prompts with more than one ground truth
    first_conflict: str  # where; empty if there is none
    sources: tuple[tuple[str, int], ...]  # data_source, rows
    lengths: Lengths | None  # None without a tokenizer
    outputs: tuple[Output, ...]

    @property
    def duplicates(self) -> int:
        """Rows whose prompt stands in an earlier row."""
        return self.rows - self.distinct

    def __str__(self) -> str:
        return "\n".join(f"{name:<18} {text}" for name, text in self._lines())

    def _lines(self) -> Iterator[tuple[str, str]]:
        fewest, median, most = self.repeats
        yield "read", ", ".join(self.files)
        yield "rows", f"{self.rows:,}"
        yield "distinct prompts", f"{self.distinct:,}"
        yield (
            "duplicate rows",
            f"{self.duplicates:,} (a prompt stands in {fewest:,} to {most:,} rows, median {median:g})",
        )
        where = f" (first at {self.first_conflict})" if self.conflicting else ""
        yield "contradictions", f"{self.conflicting:,} prompts with more than one ground truth{where}"
        yield "data sources", ", ".join(f"{name} {rows:,}" for name, rows in self.sources)
        if self.lengths is not None:
            yield "prompt lengths", str(self.lengths)
        for output in self.outputs:
            yield "written", f"{output.path}: {output.rows:,} rows, {output.prompts:,} distinct prompts"
