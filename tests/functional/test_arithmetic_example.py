"""The example as a user runs it: three seeds learn, the controls do not. Minutes a run: for `make test-all`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_dapo.obs.jsonl import read_metrics

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def run_example(out: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "examples" / "arithmetic" / "run.py"), "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return json.loads((out / "summary.json").read_text())


def gain(summary: dict[str, Any]) -> float:
    return summary["greedy_accuracy_after"] - summary["greedy_accuracy_before"]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_greedy_accuracy_rises_by_at_least_25_points(tmp_path: Path, seed: int) -> None:
    summary = run_example(tmp_path, "--seed", str(seed))
    assert 0.20 <= summary["greedy_accuracy_before"] <= 0.40
    assert gain(summary) >= 0.25
    steps = [record for record in read_metrics(tmp_path / "metrics.jsonl") if "mismatch/logp_diff_max" in record]
    assert len(steps) == summary["steps"]
    assert max(record["mismatch/logp_diff_max"] for record in steps) < 1e-4
    assert (tmp_path / "curve.png").stat().st_size > 10_000


@pytest.mark.parametrize("control", ["shuffled-rewards", "lr0"])
def test_a_control_gains_at_most_3_points(tmp_path: Path, control: str) -> None:
    assert gain(run_example(tmp_path, "--control", control)) <= 0.03
