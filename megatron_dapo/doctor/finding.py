"""What a check found: one line of `megatron-dapo doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "broken"]


@dataclass(frozen=True)
class Finding:
    subject: str
    level: Level
    found: str
    remedy: str = ""  # of what is not ok


def ok(subject: str, found: str) -> Finding:
    return Finding(subject, "ok", found)


def warning(subject: str, found: str, remedy: str) -> Finding:
    """A run may work, or work slowly."""
    return Finding(subject, "warning", found, remedy)


def broken(subject: str, found: str, remedy: str) -> Finding:
    """A run will not work."""
    return Finding(subject, "broken", found, remedy)
