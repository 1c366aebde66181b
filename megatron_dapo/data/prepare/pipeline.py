"""One pass over rows: count prompts, measure them, drop repetitions and long ones, split, write parquet.

Memory is bounded by a stretch of rows and a few numbers for each distinct prompt, whatever the rows.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_dapo.data.files import PromptDataError, Row, checked_row, equality_codes, pair_codes
from megatron_dapo.data.prepare.ledger import PromptLedger
from megatron_dapo.data.prepare.report import Lengths, Output, PreparationReport
from megatron_dapo.data.prepare.rows import Chunk, RowFiles
from megatron_dapo.data.prompts import check_chat_template, templated
from megatron_dapo.types import IntArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Mask = np.ndarray  # [rows] bool


class PreparationError(PromptDataError): ...


@dataclass(frozen=True)
class Preparation:
    """What is done to the rows. `train`, `validation`: files that are written; without both it is a survey alone."""

    train: Path | None = None
    validation: Path | None = None
    deduplicate: bool = False  # of rows with equal prompts the first stays
    max_prompt_tokens: int | None = None  # longer prompts are left out
    validation_share: float = 0.0  # of the distinct prompts; no prompt is in both files
    seed: int = 0  # of the split

    def __post_init__(self) -> None:
        if not 0 <= self.validation_share < 1:
            raise PreparationError(f"validation_share is {self.validation_share}: wanted a share from 0 to below 1")
        if bool(self.validation_share) != bool(self.validation):
            raise PreparationError(
                f"validation_share is {self.validation_share} and the validation file is {self.validation}: a split "
                "needs both"
            )
        if self.validation is not None and self.train is None:
            raise PreparationError("a validation file is named and no train file: a split needs both")
        for path in (self.train, self.validation):
            if path is not None and path.suffix != ".parquet":
                raise PreparationError(f"{path} ends in {path.suffix!r}: parquet is written; name it *.parquet")


def prepare(
    files: RowFiles,
    plan: Preparation,
    tokenizer: PreTrainedTokenizerBase | None = None,
    advance: Callable[[int], None] = lambda rows: None,
) -> PreparationReport:
    """Carry `plan` out; `advance` is told the rows of each stretch. Files are there whole or not at all.

    Raises:
        PromptDataError: a row does not fit the schema, or lengths are wanted without a tokenizer.
    """
    if plan.max_prompt_tokens is not None and tokenizer is None:
        raise PreparationError("max_prompt_tokens is given and no tokenizer: name the model whose tokens are counted")
    ledger = PromptLedger(_measure(tokenizer), plan.validation_share, plan.seed)
    sources: Counter[str] = Counter()
    with ExitStack() as stack:
        outputs = [
            (validation, stack.enter_context(_output(path, files.schema)))
            for path, validation in ((plan.train, False), (plan.validation, True))
            if path is not None
        ]
        for chunk in files:
            known = len(ledger)
            numbers = _enter(chunk, ledger)
            sources.update(
                {each["values"]: each["counts"] for each in chunk.rows["data_source"].value_counts().to_pylist()}
            )
            kept = _kept(numbers, known, plan, ledger.lengths)
            for validation, output in outputs:
                output.write(chunk.rows, numbers, kept & (ledger.for_validation[numbers] == validation))
            advance(len(chunk.rows))
        if not len(ledger):
            raise PreparationError(f"no row in {', '.join(map(str, files.paths)) or 'the files (none is named)'}")
    repeats = ledger.repeats
    return PreparationReport(
        files=tuple(map(str, files.paths)),
        rows=int(repeats.sum()),
        distinct=len(ledger),
        repeats=(int(repeats.min()), float(np.median(repeats)), int(repeats.max())),
        conflicting=ledger.conflicting,
        first_conflict=ledger.first_conflict,
        sources=tuple(sorted(sources.items())),
        lengths=None if tokenizer is None else Lengths.of(ledger.lengths, repeats, plan.max_prompt_tokens),
        outputs=tuple(Output(str(output.path), output.rows, output.prompts) for _, output in outputs),
    )


def _measure(tokenizer: PreTrainedTokenizerBase | None) -> Callable[[Sequence[Row]], Sequence[int]] | None:
    if tokenizer is None:
        return None
    check_chat_template(tokenizer)

    def measure(rows: Sequence[Row]) -> Sequence[int]:
        texts = templated(rows, tokenizer)
        return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []

    return measure


def _enter(chunk: Chunk, ledger: PromptLedger) -> IntArray:
    """[rows] the number of each row's prompt. Python looks at one row of each pair of prompt and answer alone."""
    rows = chunk.rows
    codes = pair_codes(equality_codes(rows["prompt"]), equality_codes(rows["reward_model"]))
    _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    order = np.argsort(first)  # as met, so that numbers do not depend on how codes sort
    values = rows.take(pa.array(first[order])).to_pylist()
    checked = [
        checked_row(value, "prompt", chunk.where(int(row))) for value, row in zip(values, first[order], strict=True)
    ]
    of_pair = np.empty(len(order), np.int64)
    of_pair[order] = ledger.enter(checked)
    numbers = of_pair[inverse]
    ledger.count(numbers)
    return numbers


def _kept(numbers: IntArray, known: int, plan: Preparation, lengths: IntArray) -> Mask:
    """`known`: prompts that were met before these rows."""
    kept = np.ones(len(numbers), bool)
    if plan.max_prompt_tokens is not None:
        kept &= lengths[numbers] <= plan.max_prompt_tokens
    if plan.deduplicate:
        met, first = np.unique(numbers, return_index=True)
        once = np.zeros(len(numbers), bool)
        once[first[met >= known]] = True
        kept &= once
    return kept


class _Output:
    def __init__(self, path: Path, writer: pq.ParquetWriter):
        self.path, self._writer = path, writer
        self.rows = 0
        self._written = np.zeros(0, bool)  # [prompts met so far]

    @property
    def prompts(self) -> int:
        return int(self._written.sum())

    def write(self, rows: pa.RecordBatch, numbers: IntArray, mask: Mask) -> None:
        if not mask.any():
            return
        self._writer.write_batch(rows.filter(pa.array(mask)))
        self.rows += int(mask.sum())
        written = np.zeros(max(len(self._written), int(numbers.max()) + 1), bool)
        written[: len(self._written)] = self._written
        written[numbers[mask]] = True
        self._written = written


@contextmanager
def _output(path: Path, schema: pa.Schema) -> Iterator[_Output]:
    """Under its own name only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with pq.ParquetWriter(partial, schema) as writer:
            yield _Output(path, writer)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
