"""Golden runs: metric series of whole small runs, and how far a run may be from them at each step.

The numbers of a run depend on the machine only by rounding: with other kernels (SSE4.2 or AVX2 for AVX-512), two
threads for one, other micro-batches or padding, the thirty steps sampled the same tokens, and what is computed from
log-probs differed by at most 2e-7 (entropy, loss, ratio), the gradient norm by 1e-5. Tolerances are some 50 times that;
what is counted from tokens must be equal. A machine on which a token falls the other way leaves the golden run at that
step: the first step that differs is told, and all before it were within tolerance.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

from megatron_dapo.obs.jsonl import read_metrics, replace_file

# Metric -> largest absolute difference at any step.
TOLERANCES: Mapping[str, float] = MappingProxyType(
    {
        "reward/mean": 1e-9,
        "reward/accuracy": 1e-9,
        "response/length_mean": 1e-9,
        "sampling/accuracy": 1e-9,
        "sampling/groups_generated": 0.0,
        "sampling/groups_uniform": 0.0,
        "actor/loss": 1e-5,
        "actor/entropy": 1e-5,
        "actor/ratio": 1e-5,
        "actor/grad_norm": 5e-4,
        "actor/clipped_high": 1e-9,
        "actor/clipped_low": 1e-9,
        "mismatch/logp_diff_max": 1e-4,  # engine against trainer: near 0 in both runs, and no more than this apart
    }
)


@dataclass(frozen=True)
class Origin:
    """Where the numbers come from."""

    commit: str
    versions: Mapping[str, str | None]
    overrides: tuple[str, ...]  # of the configuration
    machine: str
    date: str


@dataclass(frozen=True)
class Golden:
    """`series` has for each metric its value at every step."""

    origin: Origin
    series: Mapping[str, Sequence[float]]

    def write(self, path: Path) -> None:
        values = {"origin": asdict(self.origin), "series": self.series, "digest": _digest(self.series)}
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(values, indent=1, allow_nan=False) + "\n")


def read_golden(path: Path) -> Golden:
    """Raises:
    ValueError: the series are not those that `write` wrote.
    """
    values = json.loads(path.read_text())
    if values["digest"] != _digest(values["series"]):
        raise ValueError(f"{path}: the series have another digest than when they were written; use `make golden`")
    origin = values["origin"]
    return Golden(Origin(**{**origin, "overrides": tuple(origin["overrides"])}), values["series"])


def series_of(run: Path) -> dict[str, list[float]]:
    """The golden metrics of a run folder, step by step.

    Raises:
        KeyError: a step lacks one of them.
    """
    steps = [record for record in read_metrics(run / "metrics.jsonl") if record["step"] > 0]
    return {name: [record[name] for record in steps] for name in TOLERANCES}


def differences(golden: Mapping[str, Sequence[float]], found: Mapping[str, Sequence[float]]) -> list[str]:
    """One line for each metric that leaves its tolerance, the earliest first; empty: the run is the golden one."""
    told: list[tuple[int, str]] = []
    for name, tolerance in TOLERANCES.items():
        wanted_steps, found_steps = golden[name], found[name]
        if len(wanted_steps) != len(found_steps):
            told.append((0, f"{name}: {len(found_steps)} steps, the golden run has {len(wanted_steps)}"))
            continue
        outside = list(_outside(wanted_steps, found_steps, tolerance))
        if outside:
            first = outside[0]
            values = f"{found_steps[first]:.8g}, golden {wanted_steps[first]:.8g}, tolerance {tolerance:g}"
            told.append(
                (first, f"{name}: step {first + 1}: {values}; {len(outside)} of {len(found_steps)} steps outside")
            )
    return [line for _, line in sorted(told)]


def _outside(wanted: Sequence[float], found: Sequence[float], tolerance: float) -> Iterable[int]:
    for place, (one, other) in enumerate(zip(wanted, found, strict=True)):
        if not (math.isfinite(other) and abs(one - other) <= tolerance):
            yield place


def _digest(series: Mapping[str, Sequence[float]]) -> str:
    return hashlib.sha256(json.dumps(series, sort_keys=True).encode()).hexdigest()
