"""Rows of local files, stretch by stretch, in the recipe's schema (`COLUMNS`).

Files hold such rows already, or plain problems with answers (`ProblemColumns`), which get the recipe's prompt text.
No file is held in memory as a whole. `ability` is "math" and `extra_info.index` the row's number where a file has none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_dapo.data.files import (
    MalformedRowError,
    MissingColumnError,
    MissingFileError,
    UnreadableFileError,
    missing_column,
    parsed_line,
)

CHUNK_ROWS = 1 << 16  # bounds the memory
REQUIRED = ("data_source", "prompt", "reward_model")
COLUMNS = ("data_source", "prompt", "ability", "reward_model", "extra_info")
ABILITY = "math"
# The recipe's prompt around a problem (DAPO-Math-17k and AIME-2024 hold it as it stands here).
BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'
_INDEX = pa.struct([("index", pa.int64())])
PROBLEM_SCHEMA = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("ground_truth", pa.string()), ("style", pa.string())])),
        ("extra_info", _INDEX),
    ]
)


@dataclass(frozen=True)
class ProblemColumns:
    """Which columns of a file of plain problems hold what. Without a `source` column all are of `data_source`."""

    problem: str = "problem"
    answer: str = "answer"
    source: str | None = None
    data_source: str = "math_dapo"


@dataclass(frozen=True)
class Chunk:
    rows: pa.RecordBatch  # COLUMNS, at most CHUNK_ROWS
    path: Path
    first: int  # the number of its first row in the file, from 0

    def where(self, row: int) -> str:
        return f"{self.path} row {self.first + row} (from 0)"


class RowFiles:
    """Parquet and JSONL files under one schema, in order; iterating reads them anew."""

    def __init__(self, files: Sequence[str | Path], problems: ProblemColumns | None = None):
        """
        Raises:
            PromptDataError: a file or column is missing, or the files' columns have types that do not fit together.
        """
        self.paths = tuple(Path(file).expanduser() for file in files)
        self._problems = problems
        for path in self.paths:
            if not path.is_file():
                raise MissingFileError(f"{path} is not there (or is no file); name a .parquet or .jsonl file")
        self.schema = PROBLEM_SCHEMA if problems else _common_schema(self.paths)

    @property
    def num_rows(self) -> int | None:
        """Known without reading for parquet alone."""
        if any(path.suffix != ".parquet" for path in self.paths):
            return None
        return sum(_open_parquet(path).metadata.num_rows for path in self.paths)

    def __iter__(self) -> Iterator[Chunk]:
        for path in self.paths:
            first = 0
            for rows in _problem_rows(path, self._problems) if self._problems else _recipe_rows(path):
                yield Chunk(_aligned(rows, self.schema), path, first)
                first += len(rows)


def recipe_row(problem: str, answer: str, data_source: str, index: int) -> dict[str, Any]:
    """A row of the recipe's schema, with the recipe's prompt text around the problem."""
    return {
        "data_source": data_source,
        "prompt": [{"content": f"{BEFORE}{problem}{AFTER}", "role": "user"}],
        "ability": ABILITY,
        "reward_model": {"ground_truth": answer, "style": "rule"},
        "extra_info": {"index": index},
    }


def _common_schema(paths: Sequence[Path]) -> pa.Schema:
    schema, first = None, ""
    for path in paths:
        for found in [_parquet_schema(path)] if path.suffix == ".parquet" else (r.schema for r in _recipe_rows(path)):
            try:
                schema = pa.unify_schemas([schema or found, found], promote_options="permissive")
            except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                raise MalformedRowError(
                    f"{path} has columns of other types than the rows before it, from {first} on ({error}); "
                    "prepare the files one by one, or make the types equal"
                ) from error
            first = first or str(path)
    return schema or PROBLEM_SCHEMA


def _parquet_schema(path: Path) -> pa.Schema:
    found = _open_parquet(path).schema_arrow
    for column in REQUIRED:
        if column not in found.names:
            raise MissingColumnError(missing_column(path, column, found.names, "prompt"))
    types = {"ability": pa.string(), "extra_info": _INDEX}
    types |= {name: found.field(name).type for name in COLUMNS if name in found.names}
    return pa.schema([(name, types[name]) for name in COLUMNS])


def _recipe_rows(path: Path) -> Iterator[pa.RecordBatch]:
    if path.suffix != ".parquet":
        for first, lines in _json_lines(path):
            for number, line in enumerate(lines):
                for column in REQUIRED:
                    if column not in line:
                        where = f"{path} row {first + number} (from 0)"
                        raise MissingColumnError(missing_column(where, column, list(line), "prompt"))
            yield _from_values(path, first, lines)
        return
    schema, file, first = _parquet_schema(path), _open_parquet(path), 0
    present = [name for name in COLUMNS if name in file.schema_arrow.names]
    for rows in file.iter_batches(batch_size=CHUNK_ROWS, columns=present):
        columns = _defaults(first, len(rows)) | {name: rows.column(name) for name in present}
        yield pa.RecordBatch.from_arrays([columns[name] for name in COLUMNS], schema=schema)
        first += len(rows)


def _from_values(path: Path, first: int, values: Sequence[Mapping[str, Any]]) -> pa.RecordBatch:
    """Types are those of the values."""
    columns = _defaults(first, len(values))
    for name in COLUMNS:
        given = [value.get(name) for value in values]
        if name in REQUIRED or any(each is not None for each in given):
            try:
                columns[name] = pa.array(given)
            except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                last = first + len(values) - 1
                raise MalformedRowError(
                    f"{path} rows {first} to {last} (from 0): {name!r} has values of several types ({error}); "
                    "give every row the same"
                ) from error
    return pa.RecordBatch.from_arrays([columns[name] for name in COLUMNS], names=list(COLUMNS))


def _defaults(first: int, rows: int) -> dict[str, pa.Array]:
    return {
        "ability": pa.array([ABILITY] * rows, pa.string()),
        "extra_info": pa.array([{"index": first + row} for row in range(rows)], _INDEX),
    }


def _problem_rows(path: Path, columns: ProblemColumns) -> Iterator[pa.RecordBatch]:
    for first, values in _values(path):
        rows = [
            _problem_row(value, columns, first + row, f"{path} row {first + row} (from 0)")
            for row, value in enumerate(values)
        ]
        yield pa.RecordBatch.from_pylist(rows, schema=PROBLEM_SCHEMA)


def _problem_row(value: Mapping[str, Any], columns: ProblemColumns, index: int, where: str) -> dict[str, Any]:
    wanted = [columns.problem, columns.answer, *([columns.source] if columns.source else [])]
    for column in wanted:
        if column not in value:
            raise MissingColumnError(
                f"{where} has no column {column!r}; it has {', '.join(value)}; say which of them holds what"
            )
    answer = value[columns.answer]
    whole = isinstance(answer, int) and not isinstance(answer, bool)
    texts = {**value, columns.answer: str(answer) if whole else answer}
    for column in wanted:
        if not isinstance(texts[column], str) or not texts[column].strip():
            raise MalformedRowError(
                f"{where}: {column!r} is {texts[column]!r}; it must be text (an answer: or a whole number)"
            )
    data_source = texts[columns.source] if columns.source else columns.data_source
    return recipe_row(texts[columns.problem], texts[columns.answer], data_source, index)


def _values(path: Path) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """(number of the first row, rows) of each stretch of a file with any columns."""
    if path.suffix != ".parquet":
        yield from _json_lines(path)
        return
    first = 0
    for rows in _open_parquet(path).iter_batches(batch_size=CHUNK_ROWS):
        yield first, rows.to_pylist()
        first += len(rows)


def _json_lines(path: Path) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    if path.suffix != ".jsonl":
        raise UnreadableFileError(f"{path} ends in {path.suffix!r}; prompt files end in .parquet or .jsonl")
    first = 0
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
            while chunk := [parsed_line(line, f"{path} line {number}") for number, line in islice(lines, CHUNK_ROWS)]:
                yield first, chunk
                first += len(chunk)
    except UnicodeDecodeError as error:
        raise UnreadableFileError(f"{path} is not UTF-8 ({error}); make it again") from error


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise UnreadableFileError(f"{path} cannot be read as parquet ({error}); make it again") from error


def _aligned(rows: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The same rows under `schema`, which has every field that theirs has."""
    if rows.schema.equals(schema):
        return rows
    columns = [
        rows.column(field.name)
        if rows.schema.field(field.name).type == field.type
        else pa.array(rows.column(field.name).to_pylist(), field.type)
        for field in schema
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)
