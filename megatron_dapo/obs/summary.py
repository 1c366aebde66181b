"""`summary.json`: what a run was and what came out of it, in one object."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import megatron_dapo
from megatron_dapo.obs.jsonl import replace_file

DISTRIBUTIONS = ("torch", "megatron-core", "transformers")


def write_summary(path: Path, values: Mapping[str, Any]) -> None:
    """Write `values` and the versions at work, all at once: a reader never sees half a file.

    Raises:
        ValueError: a value is NaN or infinite.
        TypeError: a value is no plain number, text, list or mapping.
    """
    replace_file(path, json.dumps({**values, "versions": versions()}, indent=2, allow_nan=False) + "\n")


def versions() -> dict[str, str | None]:
    """Of Python, this package and the libraries that numbers depend on; None: not installed."""
    found = {"python": platform.python_version(), "megatron-dapo": megatron_dapo.__version__}
    return found | {name: _version(name) for name in DISTRIBUTIONS}


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
