"""Curves for the tests: the paper's, and what can go wrong with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_dapo.obs.jsonl import JsonlWriter
from megatron_dapo.regression.references import AIME, DAPO, REFERENCES
from megatron_dapo.regression.run_series import METRICS
from megatron_dapo.regression.series import Series

UPDATES_PER_STEP = 16


def dapo() -> dict[str, Series]:
    return {signature.name: signature.load() for signature in DAPO}


def ablation(name: str) -> dict[str, Series]:
    return {signature.name: signature.load() for signature in REFERENCES[name].signatures}


def noisy(curves: dict[str, Series], seed: int) -> dict[str, Series]:
    """Each point once more displaced by the jitter of its curve; of length by a ratio."""
    rng = np.random.default_rng(seed)
    displaced = {}
    for name, series in curves.items():
        error = rng.standard_normal(len(series.values))
        if name == "response length":
            values = series.values * np.exp(series.log().jitter() * error)
        else:
            values = series.values + series.jitter() * error
        displaced[name] = Series(series.updates, values)
    return displaced


def stalled(curves: dict[str, Series], at: float) -> dict[str, Series]:
    """Nothing moves any more from `at` updates on."""
    return {
        name: Series(s.updates, np.interp(np.minimum(s.updates, at), s.updates, s.values)) for name, s in curves.items()
    }


def late(curves: dict[str, Series], by: float) -> dict[str, Series]:
    """All of it `by` updates later: the untrained policy until then."""
    return {
        name: Series(s.updates, np.interp(np.maximum(s.updates - by, 0.0), s.updates, s.values))
        for name, s in curves.items()
    }


def cut(curves: dict[str, Series], after: float) -> dict[str, Series]:
    return {name: Series(s.updates[s.updates <= after], s.values[s.updates <= after]) for name, s in curves.items()}


def write_run(path: Path, curves: dict[str, Series], source: str = "math_dapo") -> Path:
    """metrics.jsonl of a run with 16 updates a step: training metrics every step, evaluations every five."""
    steps = int(curves[AIME].updates[-1]) // UPDATES_PER_STEP
    writer = JsonlWriter(path, 0)
    for step in range(steps + 1):
        record: dict[str, float] = {"step": step}
        begin = (step - 1) * UPDATES_PER_STEP
        if step:
            record["actor/updates"] = UPDATES_PER_STEP
            record |= {
                METRICS[name]: float(np.interp(begin, series.updates, series.values))
                for name, series in curves.items()
                if name in METRICS
            }
        if step % 5 == 0:
            accuracy = np.interp(step * UPDATES_PER_STEP, curves[AIME].updates, curves[AIME].values)
            record[f"val/{source}/avg@32"] = float(accuracy)
            record[f"val/{source}/pass@32"] = 0.7
        writer.write(record)
    writer.close()
    return path
