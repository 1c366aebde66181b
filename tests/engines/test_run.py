"""Whole runs through each server. They come before the other tests: an idle server of theirs may take a core."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from megatron_dapo.obs.jsonl import read_metrics
from tests.engines.servers import Served

EXAMPLE = Path(__file__).parents[2] / "examples" / "arithmetic" / "run.py"


def test_the_arithmetic_example_through_it_agrees_with_the_trainer_after_every_update(
    served: Served, tmp_path: Path
) -> None:
    """Every push is verified, too. A base model of few warm-up steps knows no answer: length tells its groups apart."""
    out = tmp_path / "run"
    overrides = [
        f"actor_rollout_ref.rollout.name={served.library}",
        "actor_rollout_ref.rollout.weight_sync.verify_every=1",
        "algorithm.filter_groups.metric=seq_reward",
        "trainer.total_training_steps=3",
        "trainer.test_freq=3",
        "trainer.logger=[]",
    ]
    command = [sys.executable, str(EXAMPLE), "--out", str(out), "--warmup-steps", "30", *overrides]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    steps = [record for record in read_metrics(out / "metrics.jsonl") if "mismatch/logp_diff_max" in record]
    assert len(steps) == json.loads((out / "summary.json").read_text())["steps"] == 3
    assert max(step["mismatch/logp_diff_max"] for step in steps) < 1e-4
    assert any(abs(step["actor/ratio"] - 1) > 1e-4 for step in steps), "no update changed the policy"
