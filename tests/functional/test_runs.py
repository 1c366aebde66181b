"""Whole runs in this process: the same bits twice and after a resume, honest ratios, named endings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_run import make_workspace

from megatron_dapo.cli import main
from megatron_dapo.mcore.parallel import shutdown
from megatron_dapo.obs.jsonl import deterministic_part, read_metrics


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_workspace(tmp_path_factory.mktemp("runs"))


@pytest.fixture(autouse=True)
def _one_run_after_another() -> Iterator[None]:
    yield
    if dist.is_initialized():  # a run that failed leaves its process groups behind
        shutdown()


def train(config: Path, out: Path, *overrides: str) -> int:
    return main(["train", str(config), f"trainer.default_local_dir={out}", *overrides])


def metrics(out: Path) -> list[dict[str, Any]]:
    return [deterministic_part(record) for record in read_metrics(out / "metrics.jsonl")]


@pytest.fixture(scope="module")
def reference(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps without interruption."""
    out = tmp_path_factory.mktemp("reference")
    assert train(config, out, "trainer.total_training_steps=4", "trainer.test_freq=2") == 0
    shutdown() if dist.is_initialized() else None
    return out


def test_two_runs_with_one_seed_write_the_same_metrics_to_the_last_bit(
    config: Path, reference: Path, tmp_path: Path
) -> None:
    assert train(config, tmp_path, "trainer.total_training_steps=4", "trainer.test_freq=2") == 0
    assert metrics(tmp_path) == metrics(reference)
    assert (tmp_path / "samples.jsonl").read_text() == (reference / "samples.jsonl").read_text()


def test_another_seed_gives_another_run(config: Path, reference: Path, tmp_path: Path) -> None:
    assert train(config, tmp_path, "trainer.total_training_steps=2", "data.seed=2") == 0
    assert metrics(tmp_path)[1] != metrics(reference)[1]


def test_a_run_resumed_after_two_steps_equals_one_that_was_never_stopped(
    config: Path, reference: Path, tmp_path: Path
) -> None:
    for steps in (2, 4):
        assert train(config, tmp_path, f"trainer.total_training_steps={steps}", "trainer.test_freq=2") == 0
    assert metrics(tmp_path) == metrics(reference)


def test_a_policy_that_leaves_its_device_while_engines_write_is_the_same(
    config: Path, reference: Path, tmp_path: Path
) -> None:
    offload = "actor_rollout_ref.actor.offload=[weights,gradients,optimizer]"
    for steps in (2, 4):  # saved and loaded in between
        assert train(config, tmp_path, f"trainer.total_training_steps={steps}", "trainer.test_freq=2", offload) == 0
    assert metrics(tmp_path) == metrics(reference)


def test_trainer_and_engine_agree_after_every_update(reference: Path) -> None:
    steps = metrics(reference)[1:]
    assert len(steps) == 4
    assert max(step["mismatch/logp_diff_max"] for step in steps) < 1e-4
    assert any(abs(step["actor/ratio"] - 1) > 1e-4 for step in steps), "no update changed the policy"


def test_no_uniform_group_is_trained_on(reference: Path) -> None:
    samples = [json.loads(line) for line in (reference / "samples.jsonl").read_text().splitlines()]
    groups: dict[tuple[int, int], set[bool]] = {}
    for sample in samples:
        groups.setdefault((sample["step"], sample["draw_index"]), set()).add(bool(sample["accuracy"]))
    assert groups
    assert all(len(outcomes) == 2 for outcomes in groups.values())


def test_with_learning_rate_0_the_ratio_is_1_and_nothing_is_clipped(config: Path, tmp_path: Path) -> None:
    out = tmp_path
    assert train(config, out, "actor_rollout_ref.actor.optim.lr=0", "actor_rollout_ref.actor.ppo_epochs=2") == 0
    for step in metrics(out)[1:]:
        assert step["actor/ratio"] == pytest.approx(1.0, abs=1e-6)
        assert step["actor/clipped_high"] == step["actor/clipped_low"] == step["actor/dual_clipped"] == 0


def test_the_exported_checkpoint_loads_into_transformers_and_is_what_the_engine_samples_from(
    reference: Path, config: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(reference / "hf", dtype=torch.float32)
    assert AutoTokenizer.from_pretrained(reference / "hf").chat_template
    overrides = [f"actor_rollout_ref.model.path={reference / 'hf'}", f"trainer.default_local_dir={tmp_path}"]
    assert main(["eval", str(config), *overrides]) == 0
    evaluated = json.loads((tmp_path / "eval.json").read_text())
    assert evaluated["val/tiny/avg@1"] == metrics(reference)[-1]["val/tiny/avg@1"]
    before = AutoModelForCausalLM.from_pretrained(config.parent / "model", dtype=torch.float32)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize(
    "overrides",
    [
        ["actor_rollout_ref.actor.use_kl_loss=true", "actor_rollout_ref.actor.kl_loss_coef=0.1"],
        ["algorithm.use_kl_in_reward=true", "algorithm.kl_ctrl.kl_coef=0.1"],
        [
            "algorithm.use_kl_in_reward=true",
            "algorithm.kl_ctrl.kl_coef=0.1",
            "algorithm.filter_groups.metric=seq_final_reward",
        ],
    ],
    ids=["KL in the loss", "KL in the reward", "filtered on the final reward"],
)
def test_a_frozen_reference_serves_the_kl_terms(config: Path, tmp_path: Path, overrides: list[str]) -> None:
    assert train(config, tmp_path, *overrides, "trainer.val_before_train=false") == 0
    steps = metrics(tmp_path)
    if "use_kl_loss" in overrides[0]:
        assert steps[0]["actor/kl_loss"] < steps[-1]["actor/kl_loss"], "the policy moves away, the reference stays"
    else:
        last = steps[-1]
        assert last["reward/mean"] != pytest.approx(last["reward/score"] + last["reward/overlong_penalty"], abs=1e-9)


def test_updates_that_are_not_finite_end_the_run_with_its_state_saved(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    huge = "actor_rollout_ref.actor.optim.lr=1e30"
    epochs = "actor_rollout_ref.actor.ppo_epochs=4"
    assert train(config, tmp_path, huge, epochs, "actor_rollout_ref.actor.optim.lr_warmup_steps=0") == 1
    assert "TrainingDivergedError" in capsys.readouterr().err
    assert metrics(tmp_path)[-1]["actor/skipped_updates"] >= 3
    assert (tmp_path / "checkpoints" / "latest").exists()


def test_a_reward_that_always_fails_ends_the_run_by_name_with_its_state_saved(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("def compute_score(**kwargs):\n    raise RuntimeError('no such verifier')\n")
    assert train(config, tmp_path / "out", f"custom_reward_function.path={broken}", "data.val_files=[]") == 1
    said = capsys.readouterr().err
    assert "RewardFailureRateError" in said
    assert "no such verifier" in said
    assert (tmp_path / "out" / "checkpoints" / "latest").exists()


def test_a_reward_that_sometimes_hangs_costs_its_sample_and_nothing_else(config: Path, tmp_path: Path) -> None:
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import time, zlib\n"
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    number = zlib.crc32((solution_str + ground_truth).encode())\n"
        "    if number % 29 == 0:\n"
        "        time.sleep(60)\n"
        "    return {'score': 1.0, 'acc': True} if number % 3 == 0 else {'score': -1.0, 'acc': False}\n"
    )
    settings = ["reward_model.timeout=0.5", "reward_model.max_retries=0", "reward_model.max_failure_rate=0.5"]
    overrides = [f"custom_reward_function.path={slow}", "data.val_files=[]", *settings]
    assert train(config, tmp_path / "out", *overrides, "algorithm.filter_groups.min_valid=2") == 0
    steps = metrics(tmp_path / "out")
    assert [step["sampling/groups_used"] for step in steps] == [4, 4, 4]
    assert sum(step["sampling/samples_timeout"] for step in steps) > 0


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("actor_rollout_ref.actor.clip_ratio_hihg=0.3", "clip_ratio_high"),
        ("actor_rollout_ref.actor.megatron.tensor_model_parallel_size=3", "not divisible"),
        ("data.train_batch_size=5", "not divisible"),
        ("actor_rollout_ref.model.path=/nowhere", "/nowhere"),
        ("data.train_files=[/nowhere.parquet]", "/nowhere.parquet"),
        ("data.prompt_key=question", "question"),
        ("data.max_prompt_length=1 data.filter_overlong_prompts=true", "max_prompt_length"),
        ("algorithm.filter_groups.metric=elegance", "elegance"),
        ("reward_model.default_verifier=math_dpo custom_reward_function.path=null", "math_dapo"),
        ("trainer.logger=[tensorbord]", "tensorboard"),
    ],
)
def test_bad_input_is_named_with_its_remedy(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, wanted: str
) -> None:
    assert train(config, tmp_path, *override.split()) in (1, 2)
    said = capsys.readouterr().err
    assert wanted in said
    assert "Traceback" not in said


def test_a_dry_run_prints_the_arithmetic_and_trains_nothing(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(config), "--dry-run", f"trainer.default_local_dir={tmp_path / 'run'}"]) == 0
    assert "optimizer updates" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
