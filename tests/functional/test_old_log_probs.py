"""Whole runs with each kind of old log-probs, with corrections, and with ratios of sequences.

On a CPU in float32 engine and trainer agree to 1e-5, so all kinds must give the same run up to that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_run import make_workspace

from megatron_dapo.cli import main
from megatron_dapo.mcore.parallel import shutdown
from megatron_dapo.obs.jsonl import read_metrics

ACTOR = "actor_rollout_ref.actor"
Steps = list[dict[str, Any]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Steps]:
    """run(key=value of the actor, ...) trains two steps of two updates each and returns their metrics."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("old_log_probs")
    config = make_workspace(root)

    def train(*settings: str) -> Steps:
        out = tmp_path_factory.mktemp("run")
        words = [f"{ACTOR}.{setting}" for setting in settings]
        words += ["trainer.total_training_steps=2", "trainer.val_before_train=false"]
        words += ["algorithm.filter_groups.surplus=discard"]  # carried groups are of older weights than the trainer's
        assert main(["train", str(config), f"trainer.default_local_dir={out}", *words]) == 0
        if dist.is_initialized():
            shutdown()
        return list(read_metrics(out / "metrics.jsonl"))

    return train


@pytest.fixture(scope="module")
def recomputed(run: Callable[..., Steps]) -> Steps:
    return run()


@pytest.mark.parametrize("kind", ["rollout", "first_minibatch_free"])
def test_all_kinds_of_old_log_probs_give_the_same_run(run: Callable[..., Steps], recomputed: Steps, kind: str) -> None:
    found = run(f"old_log_prob={kind}")
    for got, wanted in zip(found, recomputed, strict=True):
        for name in ("actor/loss", "actor/grad_norm", "actor/ratio", "actor/entropy", "reward/mean"):
            assert got[name] == pytest.approx(wanted[name], rel=1e-3, abs=1e-5), name
        assert 0 < got["mismatch/logp_diff_max"] < 1e-4
    assert found[1]["sampling/groups_generated"] == recomputed[1]["sampling/groups_generated"]


@pytest.mark.parametrize("kind", ["recompute", "first_minibatch_free"])
def test_where_engine_and_trainer_agree_truncated_importance_sampling_changes_nothing(
    run: Callable[..., Steps], recomputed: Steps, kind: str
) -> None:
    found = run(f"old_log_prob={kind}", "rollout_correction.tis_cap=2.0")
    for got, wanted in zip(found, recomputed, strict=True):
        assert got["actor/tis_weight"] == pytest.approx(1.0, abs=1e-4)
        assert got["actor/tis_capped"] == 0
        assert got["actor/grad_norm"] == pytest.approx(wanted["actor/grad_norm"], rel=1e-3)


def test_a_low_cap_scales_the_policy_gradient_down(run: Callable[..., Steps], recomputed: Steps) -> None:
    """A cap of 0.5 halves every token's policy loss where engine and trainer agree."""
    found = run("rollout_correction.tis_cap=0.5")
    assert found[0]["actor/tis_capped"] == 1
    assert found[0]["actor/policy_loss"] == pytest.approx(recomputed[0]["actor/policy_loss"] / 2, rel=0.02, abs=1e-4)


def test_a_band_that_nothing_leaves_masks_nothing(run: Callable[..., Steps], recomputed: Steps) -> None:
    found = run("rollout_correction.mis_low=0.99", "rollout_correction.mis_high=1.01")
    assert [step["left_out/masked_sequences"] for step in found] == [0, 0]
    assert [step["actor/loss"] for step in found] == [step["actor/loss"] for step in recomputed]


def test_ratios_of_sequences_are_clipped_by_their_own_bounds(run: Callable[..., Steps]) -> None:
    found = run("gspo.enable=true")
    assert found[0]["actor/ratio"] == pytest.approx(1.0, abs=0.05)
    clipped = sum(step["actor/clipped_high"] + step["actor/clipped_low"] for step in found)
    assert clipped > 0  # 3e-4 and 4e-4 bite where 0.2 and 0.28 would not
    wide = run("gspo.enable=true", "gspo.clip_ratio_low=0.2", "gspo.clip_ratio_high=0.28")
    assert sum(step["actor/clipped_high"] + step["actor/clipped_low"] for step in wide) < clipped
