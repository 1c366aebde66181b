"""What every logger is made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console


@dataclass(frozen=True)
class RunInfo:
    """`first_step` is the first step that will be logged: 0 in a fresh run (the evaluation before training),
    k + 1 in one resumed after step k. What an earlier attempt logged from there on is cut.
    """

    directory: Path
    project: str
    experiment: str
    first_step: int
    total_steps: int | None  # None: the end is not known
    config: Mapping[str, Any]  # plain values, as shown on a run's page
    console: Console = field(default_factory=Console)
    logger_ids: Mapping[str, str] = field(default_factory=dict)  # what `Loggers.ids` gave, of a resumed run
