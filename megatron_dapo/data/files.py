"""Reads prompt files in the recipe's schema: parquet, or JSONL with the same keys.

Published files repeat each prompt a hundred times, so what comes back are the distinct rows and, for each row of
the files, which of them it is: everything after this touches a distinct row once. Tokenising is in `prompts.py`,
making such files in `prepare/`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_dapo.types import IntArray

BATCH_ROWS = 1 << 18  # rows of a parquet file looked at together: bounds the memory


class PromptDataError(ValueError):
    """A prompt file that cannot be used. The message names file, row or column, what is there and the remedy."""


class MissingFileError(PromptDataError): ...


class UnreadableFileError(PromptDataError): ...


class MissingColumnError(PromptDataError): ...


class MalformedRowError(PromptDataError): ...


@dataclass(frozen=True)
class Row:
    """A distinct row, checked. `messages` holds (role, content)."""

    where: str  # file and row that it was first met in
    messages: tuple[tuple[str, str], ...]
    data_source: str
    ground_truth: str
    extra_info: Mapping[str, Any]


@dataclass(frozen=True)
class RowTable:
    """distinct[index[i]] is row i of the files, in their order."""

    distinct: tuple[Row, ...]
    index: IntArray  # [rows]


def read_rows(files: Sequence[str | Path], prompt_key: str) -> RowTable:
    """All rows of `files`, in order.

    Raises:
        PromptDataError: one of its subclasses above.
    """
    number_of: dict[str, int] = {}
    distinct: list[Row] = []
    index: list[IntArray] = []
    for file in files:
        for batch in _batches(Path(file).expanduser(), prompt_key):
            numbers = np.empty(len(batch.values), np.int64)
            for i, (key, value, where) in enumerate(zip(batch.keys, batch.values, batch.where, strict=True)):
                if key not in number_of:
                    number_of[key] = len(distinct)
                    distinct.append(checked_row(value, prompt_key, where))
                numbers[i] = number_of[key]
            index.append(numbers[batch.index])
    return RowTable(tuple(distinct), np.concatenate(index) if index else np.zeros(0, np.int64))


@dataclass(frozen=True)
class _Batch:
    """A stretch of rows: values[index[i]] is row i. Equal keys mean equal values, across files too."""

    keys: list[str]
    values: list[dict[str, Any]]
    where: list[str]
    index: IntArray


def _batches(path: Path, prompt_key: str) -> Iterator[_Batch]:
    if not path.is_file():
        raise MissingFileError(f"{path} is not there (or is no file); correct data.train_files or data.val_files")
    if path.suffix == ".parquet":
        return _parquet_batches(path, prompt_key)
    if path.suffix == ".jsonl":
        return iter([_jsonl_batch(path, prompt_key)])
    raise UnreadableFileError(f"{path} ends in {path.suffix!r}; prompt files end in .parquet or .jsonl")


def _wanted_columns(prompt_key: str) -> tuple[str, ...]:
    return (prompt_key, "data_source", "reward_model")


def _parquet_batches(path: Path, prompt_key: str) -> Iterator[_Batch]:
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise UnreadableFileError(f"{path} cannot be read as parquet ({error}); make it again") from error
    names = file.schema_arrow.names
    for column in _wanted_columns(prompt_key):
        if column not in names:
            raise MissingColumnError(missing_column(path, column, names, prompt_key))
    columns = [*_wanted_columns(prompt_key), *(["extra_info"] if "extra_info" in names else [])]
    start = 0
    for record in file.iter_batches(batch_size=BATCH_ROWS, columns=columns):
        _, first, inverse = np.unique(equality_codes(record.to_struct_array()), return_index=True, return_inverse=True)
        values = record.take(pa.array(first)).to_pylist()
        yield _Batch(
            keys=[json.dumps(value, sort_keys=True, default=repr) for value in values],
            values=values,
            where=[f"{path} row {start + i} (from 0)" for i in first.tolist()],
            index=inverse.astype(np.int64),
        )
        start += len(record)


def _jsonl_batch(path: Path, prompt_key: str) -> _Batch:
    number_of: dict[str, int] = {}
    batch = _Batch([], [], [], np.zeros(0, np.int64))
    index: list[int] = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: JSON text may hold U+2028 as it is
    except UnicodeDecodeError as error:
        raise UnreadableFileError(f"{path} is not UTF-8 ({error}); make it again") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        if line not in number_of:
            value = parsed_line(line, where)
            for column in _wanted_columns(prompt_key):
                if column not in value:
                    raise MissingColumnError(missing_column(where, column, list(value), prompt_key))
            number_of[line] = len(batch.values)
            batch.keys.append(line)
            batch.values.append(value)
            batch.where.append(where)
        index.append(number_of[line])
    return _Batch(batch.keys, batch.values, batch.where, np.array(index, np.int64))


def parsed_line(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise MalformedRowError(f"{where} is no JSON ({error}); write one JSON object a line") from error
    if not isinstance(value, dict):
        raise MalformedRowError(f"{where} holds a {type(value).__name__}; write one JSON object a line")
    return value


def missing_column(where: object, column: str, names: Sequence[str], prompt_key: str) -> str:
    remedy = "set data.prompt_key" if column == prompt_key else "add it"
    return f"{where} has no column {column!r}; it has {', '.join(names)}; {remedy}"


def equality_codes(array: pa.Array) -> IntArray:
    """[rows] numbers, equal where the rows of a (nested) Arrow array are equal."""
    if pa.types.is_struct(array.type):
        codes = np.asarray(array.is_valid()).astype(np.int64)
        for field in array.flatten():
            codes = pair_codes(codes, equality_codes(field))
        return codes
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        items = equality_codes(array.values)
        starts = np.asarray(array.offsets).tolist()
        content = [items[a:b].tobytes() for a, b in pairwise(starts)]
        codes = np.asarray(pa.array(content, pa.large_binary()).dictionary_encode().indices).astype(np.int64)
        return pair_codes(codes, np.asarray(array.is_valid()).astype(np.int64))
    if pa.types.is_dictionary(array.type):
        return equality_codes(array.dictionary_decode())
    if pa.types.is_nested(array.type):
        return np.arange(len(array), dtype=np.int64)  # maps and unions: every row counts as its own
    return np.asarray(array.dictionary_encode(null_encoding="encode").indices).astype(np.int64)


def pair_codes(left: IntArray, right: IntArray) -> IntArray:
    """[rows] one number for each pair of numbers, small again."""
    if not len(left):
        return left
    return np.unique(left * (right.max() + 1) + right, return_inverse=True)[1].astype(np.int64)


def checked_row(value: Mapping[str, Any], prompt_key: str, where: str) -> Row:
    """Raises MalformedRowError where a part of the row is not what the schema says."""
    messages = value[prompt_key]
    if not isinstance(messages, list) or not messages or not all(_is_message(message) for message in messages):
        raise MalformedRowError(
            f"{where}: {prompt_key!r} is {_short(messages)}; it must be a list, not empty, of "
            '{"role": text, "content": text}'
        )
    reward_model = value["reward_model"]
    ground_truth = reward_model.get("ground_truth") if isinstance(reward_model, dict) else None
    if isinstance(ground_truth, int) and not isinstance(ground_truth, bool):
        ground_truth = str(ground_truth)
    if not isinstance(ground_truth, str):
        raise MalformedRowError(
            f"{where}: 'reward_model' is {_short(reward_model)}; it must hold a ground_truth, text or a whole number"
        )
    if not isinstance(value["data_source"], str):
        raise MalformedRowError(f"{where}: 'data_source' is {_short(value['data_source'])}; it must be text")
    extra_info = value.get("extra_info") or {}
    if not isinstance(extra_info, dict):
        raise MalformedRowError(f"{where}: 'extra_info' is {_short(extra_info)}; it must be an object or left out")
    return Row(
        where=where,
        messages=tuple((message["role"], message["content"]) for message in messages),
        data_source=value["data_source"],
        ground_truth=ground_truth,
        extra_info=extra_info,
    )


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def _short(value: object, most: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}…"
