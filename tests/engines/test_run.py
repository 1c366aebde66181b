"""A whole run through each server. It comes before the other tests: an idle server of theirs may take a core."""

from __future__ import annotations

from pathlib import Path

from megatron_dapo.cli import main
from megatron_dapo.obs.jsonl import read_metrics
from tests.engines.servers import Served
from tests.functional.tiny_run import make_workspace


def test_training_through_it_agrees_with_the_trainer_after_every_update(served: Served, tmp_path: Path) -> None:
    """The embedding is tied, that of the other tests is not. Every push is verified, too."""
    config = make_workspace(tmp_path, tied=True, width=served.width, heads=served.heads)
    out = tmp_path / "run"
    overrides = [
        f"trainer.default_local_dir={out}",
        f"actor_rollout_ref.rollout.name={served.library}",
        "actor_rollout_ref.rollout.weight_sync.verify_every=1",
        "trainer.total_training_steps=3",
        "trainer.test_freq=3",
    ]
    assert main(["train", str(config), *overrides]) == 0
    steps = [record for record in read_metrics(out / "metrics.jsonl") if "mismatch/logp_diff_max" in record]
    assert len(steps) == 3
    assert max(step["mismatch/logp_diff_max"] for step in steps) < 1e-4
    assert any(abs(step["actor/ratio"] - 1) > 1e-4 for step in steps), "no update changed the policy"
