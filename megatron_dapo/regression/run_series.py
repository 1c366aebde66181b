"""A run's metrics.jsonl as series over gradient updates, in the units of `docs/metrics.md`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_dapo.obs.jsonl import read_metrics
from megatron_dapo.regression.references import AIME
from megatron_dapo.regression.series import Series

AVG = re.compile(r"val/(?P<source>.+)/avg@(?P<k>\d+)")
# Signature -> metric. The paper does not say whether its reward is of all responses or of the groups trained on; the
# recipe logs that of the groups trained on, with the overlong penalty.
METRICS = {"response length": "response/length_mean", "reward": "reward/mean", "entropy": "actor/entropy"}


class RunError(ValueError):
    """The run cannot be compared: what is there, what was wanted, what to do."""


@dataclass(frozen=True)
class RunCurves:
    """By signature. `evaluated` names the metric that was taken for AIME 2024."""

    series: Mapping[str, Series]
    evaluated: str


def read_run(run: Path, source: str | None = None) -> RunCurves:
    """The curves of the run folder (or metrics.jsonl) `run`; `source`: of several evaluated data sources this one.

    The training metrics of a step stand where its updates began, the evaluation where they ended: the first step's
    responses are the untrained policy's, and the paper's curves begin with them at 0.

    Raises:
        RunError: no such file, no metrics in it, no evaluation, or several and none chosen.
    """
    path = run / "metrics.jsonl" if run.is_dir() else run
    if not path.exists():
        raise RunError(f"{path} is not there: give a run's folder (trainer.default_local_dir) or its metrics.jsonl")
    try:
        records = read_metrics(path)
    except ValueError as error:
        raise RunError(str(error)) from error
    evaluated = _evaluation(path, records, source)
    ends = np.cumsum([record.get("actor/updates", 0.0) for record in records])
    if not len(ends) or ends[-1] == 0:
        raise RunError(f"{path} has no step with actor/updates: curves are compared by gradient updates; train first")
    begins = np.concatenate([[0.0], ends[:-1]])
    found = {AIME: _series(records, ends, lambda record: record.get(evaluated))}
    for signature, metric in METRICS.items():
        found[signature] = _series(records, begins, lambda record, metric=metric: record.get(metric))
    return RunCurves({name: series for name, series in found.items() if series is not None}, evaluated)


def _evaluation(path: Path, records: Sequence[Mapping[str, float]], source: str | None) -> str:
    names = sorted({name for record in records for name in record if AVG.fullmatch(name)})
    wanted = [name for name in names if source in (None, AVG.fullmatch(name)["source"])]  # pyright: ignore
    if len(wanted) != 1:
        there = ", ".join(names) or "none"
        which = "any source" if source is None else f"source {source}"
        raise RunError(
            f"{path} has the evaluations {there}; wanted exactly one of {which}: evaluate on AIME 2024 "
            "(data.val_files, trainer.test_freq), or choose with --source NAME"
        )
    return wanted[0]


def _series(
    records: Sequence[Mapping[str, float]], updates: np.ndarray, value: Callable[[Mapping[str, float]], float | None]
) -> Series | None:
    """Of the records that have the value, the last one where several stand at one number of updates."""
    points = {
        float(at): number
        for at, record in zip(updates, records, strict=True)
        if (number := value(record)) is not None and math.isfinite(number)
    }
    return Series(np.array(list(points)), np.array(list(points.values()))) if points else None
