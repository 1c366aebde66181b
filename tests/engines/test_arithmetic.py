"""A whole run through each server. It comes before the other tests: an idle server of theirs may take a core."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from megatron_dapo.obs.jsonl import read_metrics
from tests.engines.servers import Served

ROOT = Path(__file__).parents[2]


def test_the_arithmetic_example_through_it_agrees_with_the_trainer_after_every_update(
    served: Served, tmp_path: Path
) -> None:
    """Its embedding is tied, that of the other tests is not. Every push is verified, too."""
    overrides = [
        f"actor_rollout_ref.rollout.name={served.library}",
        "actor_rollout_ref.rollout.weight_sync.verify_every=1",
        "trainer.total_training_steps=3",
        "trainer.test_freq=3",
    ]
    command = [sys.executable, str(ROOT / "examples" / "arithmetic" / "run.py"), "--out", str(tmp_path), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    steps = [record for record in read_metrics(tmp_path / "metrics.jsonl") if "mismatch/logp_diff_max" in record]
    assert len(steps) == 3
    assert max(step["mismatch/logp_diff_max"] for step in steps) < 1e-4
    assert any(abs(step["actor/ratio"] - 1) > 1e-4 for step in steps), "no update changed the policy"
