"""One rank of the policy, alone: updates, the frozen reference, weights out, state to disk and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from megatron_dapo.config.tree import MegatronConfig, OptimConfig
from megatron_dapo.mcore.parallel import shutdown
from megatron_dapo.types import CheckpointError
from megatron_dapo.workers.policy import PolicyWorker, SaveOrder, UpdateShard, UpdateStats
from megatron_dapo.workers.reference import ReferenceWorker
from tests.functional import oracle
from tests.functional.tiny_models import make_rollouts, save_tiny_model
from tests.unit.mcore.helpers import save_model
from tests.unit.workers.one_rank import policy_worker, settings_of, training_batch

SEQUENCES = make_rollouts().sequences
SPLIT = [SEQUENCES.select([0, 3, 8]), SEQUENCES.select([1, 2]), SEQUENCES.select([4, 5, 6, 7])]


def update(worker: PolicyWorker, lr: float, mini_batches: int = 1, advantage: float = 1.0) -> list[UpdateStats]:
    """Updates on the three micro-batches of SPLIT, with the worker's own log-probs as the old ones."""
    old = [stats.logp for stats in worker.log_probs(tuple(SPLIT))]
    batches = tuple(training_batch(part, logp, advantage) for part, logp in zip(SPLIT, old, strict=True))
    return list(worker.update(UpdateShard((batches,) * mini_batches, lr)))


def weights(worker: PolicyWorker) -> dict[str, torch.Tensor]:
    return dict(worker.export())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("packed", [True, False])
def test_at_learning_rate_0_every_ratio_is_1_and_nothing_is_clipped(model: Path, packed: bool):
    with policy_worker(settings_of(model, packed=packed)) as worker:
        before = weights(worker)
        first, second = update(worker, lr=0.0, mini_batches=2)
        assert same(weights(worker), before)
    for stats in (first, second):
        assert stats.applied
        assert stats.grad_norm > 0
        assert stats.sums["ratio"] == stats.sums["tokens"] == int(SEQUENCES.cu_responses[-1])
        assert stats.sums["approx_kl"] == 0
        assert [stats.sums[name] for name in ("clipped_high", "clipped_low", "dual_clipped", "clamped")] == [0] * 4
    assert first == second


def test_updates_move_the_policy_away_from_the_old_one(model: Path):
    with policy_worker(settings_of(model)) as worker:
        before = weights(worker)
        found = update(worker, lr=0.05, mini_batches=3)
        assert not same(weights(worker), before)
    assert [stats.lr for stats in found] == [0.05] * 3
    assert found[0].sums["ratio"] == found[0].sums["tokens"]
    assert all(stats.sums["approx_kl"] != 0 for stats in found[1:])
    assert sum(stats.sums["clipped_high"] + stats.sums["clipped_low"] for stats in found[1:]) > 0
    assert found[2].sums["loss"] < found[0].sums["loss"]


def test_a_nan_in_the_batch_leaves_the_weights_alone(model: Path):
    with policy_worker(settings_of(model)) as worker:
        before = weights(worker)
        (stats,) = update(worker, lr=0.05, advantage=float("nan"))
        assert not stats.applied
        assert not np.isfinite(stats.grad_norm)
        assert same(weights(worker), before)
        assert update(worker, lr=0.05)[0].applied


def test_the_reference_keeps_the_first_weights(model: Path):
    with policy_worker(settings_of(model, with_reference=True)) as worker:
        first = worker.log_probs(tuple(SPLIT))
        update(worker, lr=0.05)
        trained, kept = worker.log_probs(tuple(SPLIT)), weights(worker)
        reference = worker.reference_log_probs(tuple(SPLIT))
        assert same(weights(worker), kept)
        again = worker.log_probs(tuple(SPLIT))
    for a, b, c, d in zip(first, reference, trained, again, strict=True):
        assert (a.logp == b.logp).all()
        assert (c.logp == d.logp).all()
        assert (a.logp != c.logp).any()


def test_a_reference_with_ranks_of_its_own_is_the_policy_at_its_start_to_the_last_bit(model: Path):
    for dtype in ("float32", "bfloat16"):
        settings = settings_of(model, megatron=MegatronConfig(params_dtype=dtype))
        with policy_worker(settings) as worker:
            wanted = worker.log_probs(tuple(SPLIT))
        try:
            found = ReferenceWorker(settings).log_probs(tuple(SPLIT))
        finally:
            shutdown()
        assert all((a.logp == b.logp).all() for a, b in zip(wanted, found, strict=True))


def test_training_goes_on_from_a_saved_state(model: Path, tmp_path: Path):
    settings = settings_of(model)
    with policy_worker(settings) as worker:
        update(worker, lr=0.05)
        worker.start_save(SaveOrder(str(tmp_path), background=True))
        written = worker.save_outcome(wait=True)
        assert worker.finish_save([written.results]) is None
        assert worker.save_outcome(wait=True) is None, "no save is under way"
        wanted, after = update(worker, lr=0.05), weights(worker)
    with policy_worker(settings) as worker:
        worker.load(str(tmp_path))
        assert update(worker, lr=0.05) == wanted
        assert same(weights(worker), after)


def test_the_state_of_a_model_with_another_vocabulary_is_refused_with_the_tensor(model: Path, tmp_path: Path):
    save_tiny_model(tmp_path / "other", "qwen2", tied=False, layers=2, vocab=57)
    with policy_worker(settings_of(tmp_path / "other")) as worker:
        save_model(worker.chunks, tmp_path / "state")
    with policy_worker(settings_of(model)) as worker:
        before = weights(worker)
        with pytest.raises(CheckpointError, match=r"embedding\.word_embeddings\.weight has shape \[57, 32\]"):
            worker.load(str(tmp_path / "state"))
        assert same(weights(worker), before)


def test_the_exported_checkpoint_computes_the_policy(model: Path, tmp_path: Path):
    with policy_worker(settings_of(model)) as worker:
        update(worker, lr=0.05)
        (stats,) = worker.log_probs((SEQUENCES,))
        worker.save_hf(str(tmp_path / "hf"))
    assert np.abs(oracle.all_logp(tmp_path / "hf", SEQUENCES) - stats.logp).max() < 1e-5
    assert np.abs(oracle.all_logp(model, SEQUENCES) - stats.logp).max() > 1e-2
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hf").eos_token == "<end>"


def test_bf16_trains_and_exports_in_its_type(model: Path, tmp_path: Path):
    with policy_worker(settings_of(model, megatron=MegatronConfig(params_dtype="bfloat16"))) as worker:
        (stats,) = worker.log_probs((SEQUENCES,))
        assert np.abs(oracle.all_logp(model, SEQUENCES) - stats.logp).mean() < 0.1
        assert update(worker, lr=1e-3)[0].applied
        worker.save_hf(str(tmp_path / "hf"))
        exported = weights(worker)
    assert {tensor.dtype for tensor in exported.values()} == {torch.bfloat16}
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert same({name: param.detach() for name, param in found.named_parameters()}, exported)


def test_the_optimizer_is_set_as_configured(model: Path):
    """Without gradients a step is the decay alone."""
    optim = OptimConfig(weight_decay=0.5, betas=(0.5, 0.5))
    with policy_worker(settings_of(model, optim=optim)) as worker:
        before = weights(worker)
        update(worker, lr=0.1, advantage=0.0)
        after = weights(worker)
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], 0.95 * tensor, rtol=1e-5, atol=1e-7)


def test_a_policy_of_one_process_reports(model: Path):
    with policy_worker(settings_of(model)) as worker:
        layout = worker.rank_layout(None)
    assert layout.reports
    assert not replace(layout, tp_rank=1).reports
    assert not replace(layout, pp_size=2).reports
    assert not replace(layout, cp_rank=1).reports
    assert replace(layout, dp_rank=1).reports
