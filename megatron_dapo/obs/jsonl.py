"""Files of one JSON object a line, each with a `step`: written line by line, cut on resume, read back.

Floats are written with `repr`, so equal numbers give equal bytes and reading gives the same bits. JSON has no NaN
and no infinity: these become the strings "NaN", "Infinity" and "-Infinity", and `read_metrics` turns them back.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

VOLATILE_PREFIXES = ("seconds/", "memory/", "throughput/")  # what differs between two equal runs


class JsonlWriter:
    """Appends records to `path`, steps never falling. What a killed run wrote from `first_step` on is cut first.

    Raises:
        ValueError: a line before the last is no JSON object with a step: the file is not one of ours.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        cut_from(path, first_step)
        # A lone surrogate cannot be encoded in UTF-8; this handler's \udXXX is what JSON writes for it.
        self._file = path.open("a", encoding="utf-8", errors="backslashreplace")

    def write(self, record: Mapping[str, Any]) -> None:
        """One line, handed to the operating system before this returns."""
        plain = {key: _plain(value) for key, value in record.items()}
        self._file.write(json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_records(path: Path) -> list[dict[str, Any]]:
    """All whole records, in order. A torn last line, left by a killed run, is left out.

    Raises:
        ValueError: any other line is no JSON object with a step.
    """
    return [record for _, record in _parse(path)]


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The same for metrics.jsonl, where every value is a number: what is not finite becomes a float again."""
    return [
        {key: float(value) if isinstance(value, str) else value for key, value in r.items()} for r in read_records(path)
    ]


def cut_from(path: Path, first_step: int) -> None:
    """Remove the records of `first_step` and all behind them, and a torn last line."""
    if not path.exists():
        return
    end = 0
    for line_end, record in _parse(path):
        if record["step"] >= first_step:
            break
        end = line_end
    os.truncate(path, end)


def replace_file(path: Path, text: str) -> None:
    """Write `text` beside `path` and rename it: a reader sees the old file or the new one, never half of one."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def deterministic_part(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record without time, memory and throughput: equal for two runs of one seed."""
    return {key: value for key, value in record.items() if not key.startswith(VOLATILE_PREFIXES)}


def _parse(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(byte at which the line ends, record) of each line that was written to its end."""
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            end += len(line)
            try:
                record = json.loads(line)
                if not isinstance(record["step"], int):
                    raise TypeError(f"its step is {record['step']!r}")
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{path}, line {number}: wanted a JSON object with a whole-numbered step, found {line[:80]!r} "
                    f"({error}); move the file away, or train into another directory"
                ) from error
            yield end, record


def _plain(value: Any) -> Any:
    """Numbers, numpy's too, as JSON has them; all else as it is."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    if isinstance(value, Integral):
        return int(value)
    number = float(value)
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"
