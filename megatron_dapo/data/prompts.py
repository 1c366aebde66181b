"""Prompts ready for an engine: chat template applied, tokenised, cut to length, duplicates reported.

Reading files is in `files.py`; the order in which prompts are handed out is in `stream.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np
from jinja2 import TemplateError

from megatron_dapo.config.tree import DataConfig
from megatron_dapo.data.files import MalformedRowError, PromptDataError, Row, read_rows
from megatron_dapo.types import IntArray, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class NoChatTemplateError(PromptDataError): ...


class EmptyDatasetError(PromptDataError): ...


class PromptTooLongError(PromptDataError): ...


@dataclass(frozen=True)
class PromptReport:
    """What a dataset holds. All counts but `distinct` are rows, and all but `kept` are taken before filtering."""

    files: tuple[str, ...]
    rows: int
    distinct: int  # different prompt texts
    too_long: int  # over max_prompt_length
    too_long_treatment: str  # what was done to those
    kept: int
    longest: int  # tokens
    max_prompt_length: int

    def __str__(self) -> str:
        repeats = f", each {self.rows / self.distinct:.1f} times on average" if self.rows > self.distinct else ""
        return (
            f"{self.kept} prompts from {', '.join(self.files)}: {self.rows} rows, {self.distinct} distinct{repeats}; "
            f"longest {self.longest} tokens, {self.too_long} rows over {self.max_prompt_length} tokens "
            f"{self.too_long_treatment}"
        )


@dataclass(frozen=True, eq=False)
class PromptDataset(Sequence[Prompt]):
    """Prompts by position; a prompt that stands in many rows is held once."""

    distinct: tuple[Prompt, ...]
    rows: IntArray  # [len(self)] which of `distinct` stands at each position

    @staticmethod
    def from_prompts(prompts: Iterable[Prompt]) -> PromptDataset:
        distinct = tuple(prompts)
        return PromptDataset(distinct, np.arange(len(distinct), dtype=np.int64))

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        return replace(self.distinct[self.rows[position]], index=position)

    @cached_property
    def fingerprint(self) -> str:
        """Equal for equal prompts in equal order: token ids, source and ground truth of every row."""
        digest = hashlib.blake2b(digest_size=16)
        for prompt in self.distinct:
            digest.update(repr((prompt.data_source, prompt.ground_truth, len(prompt.token_ids))).encode())
            digest.update(np.ascontiguousarray(prompt.token_ids, np.int64).tobytes())
        digest.update(self.rows.tobytes())
        return digest.hexdigest()


def load_prompts(
    files: Sequence[str | Path], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> tuple[PromptDataset, PromptReport]:
    """The prompts of parquet and JSONL files in the recipe's schema, in file order.

    A prompt over `max_prompt_length` tokens is left out with `filter_overlong_prompts`, else cut as `truncation`
    says; its `text` stays whole. `config` names the rules, not the files.

    Raises:
        PromptDataError: a file, column, row or chat template is missing or unfit, or nothing is left.
    """
    check_chat_template(tokenizer)
    names = tuple(str(file) for file in files)
    table = read_rows(files, config.prompt_key)
    if not len(table.index):
        raise EmptyDatasetError(
            f"no row in {', '.join(names) or 'the files (none is named)'}; name files that hold prompts"
        )
    texts = templated(table.distinct, tokenizer)
    number_of = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    encoded = tokenizer(list(number_of), add_special_tokens=False)["input_ids"]
    ids = [np.array(encoded[number_of[text]], np.int64) for text in texts]
    lengths = np.array([len(row) for row in ids])
    over = lengths > config.max_prompt_length
    over_rows = over[table.index]
    kept = table.index[~over_rows] if config.filter_overlong_prompts else table.index
    report = PromptReport(
        files=names,
        rows=len(table.index),
        distinct=len(number_of),
        too_long=int(over_rows.sum()),
        too_long_treatment="left out" if config.filter_overlong_prompts else f"truncated ({config.truncation})",
        kept=len(kept),
        longest=int(lengths.max()),
        max_prompt_length=config.max_prompt_length,
    )
    if not len(kept):
        raise EmptyDatasetError(
            f"all {report.rows} prompts of {', '.join(names)} are over data.max_prompt_length="
            f"{config.max_prompt_length} tokens (the shortest has {lengths.min()}, the longest {report.longest}); "
            "raise it, or truncate them with data.filter_overlong_prompts=false"
        )
    prompts = tuple(
        Prompt(number, _cut(row_ids, row, config), text, row.data_source, row.ground_truth, row.extra_info)
        for number, (row, text, row_ids) in enumerate(zip(table.distinct, texts, ids, strict=True))
    )
    return PromptDataset(prompts, kept), report


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise NoChatTemplateError where there is none."""
    if tokenizer.chat_template is None:
        raise NoChatTemplateError(
            f"the tokenizer of {tokenizer.name_or_path or 'the model'} has no chat template, and prompts are chat "
            "messages; put a chat_template.jinja (or tokenizer_config.json with chat_template) into the model's folder"
        )


def templated(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """[rows] the chat template applied, once for equal messages."""
    text_of: dict[tuple[tuple[str, str], ...], str] = {}
    for row in rows:
        if row.messages not in text_of:
            messages = [{"role": role, "content": content} for role, content in row.messages]
            try:
                text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            except TemplateError as error:
                roles = ", ".join(role for role, _ in row.messages)
                raise MalformedRowError(
                    f"{row.where}: the chat template refuses messages with the roles {roles} ({error}); change the row"
                ) from error
            text_of[row.messages] = str(text)
    return [text_of[row.messages] for row in rows]


def _cut(ids: IntArray, row: Row, config: DataConfig) -> IntArray:
    """At most max_prompt_length tokens. "middle" keeps both ends, the odd token at the end."""
    most = config.max_prompt_length
    if len(ids) <= most or config.filter_overlong_prompts:
        return ids
    if config.truncation == "left":
        return ids[-most:]
    if config.truncation == "right":
        return ids[:most]
    if config.truncation == "middle":
        return np.concatenate([ids[: most // 2], ids[len(ids) - (most - most // 2) :]])
    raise PromptTooLongError(
        f"{row.where}: the prompt has {len(ids)} tokens and data.max_prompt_length={most}; raise it, leave such "
        "prompts out with data.filter_overlong_prompts=true, or choose data.truncation=left, right or middle"
    )
