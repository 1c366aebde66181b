"""The recipes for GPUs train on a CPU: a tiny model in place of theirs, short responses, few prompts, our own engine.

All else is theirs: bfloat16, recompute, offloading, the optimizer and its warmup, filtering, aggregation, the pipeline;
tensor parallelism of at most 2. Up to a minute each: for `make test-all`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dapo.config.load import load_config
from megatron_dapo.data.prepare.rows import recipe_row
from megatron_dapo.obs.jsonl import read_metrics
from tests.unit.tiny_checkpoint import make_checkpoint

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ACTOR, ROLLOUT, REF = (f"actor_rollout_ref.{part}" for part in ("actor", "rollout", "ref"))
SMALLER = (
    "runtime=spmd",
    f"{ROLLOUT}.name=torch",
    f"{ROLLOUT}.n=4",
    "data.max_prompt_length=64",
    "data.max_response_length=16",
    "reward_model.overlong_buffer.len=4",
    "data.train_batch_size=8",
    f"{ACTOR}.ppo_mini_batch_size=4",
    f"{ACTOR}.ppo_max_token_len_per_gpu=512",
    f"{ROLLOUT}.log_prob_max_token_len_per_gpu=512",
    f"{REF}.log_prob_max_token_len_per_gpu=512",
    "trainer.logger=[console]",
    "trainer.total_training_steps=2",
    f"custom_reward_function.path={EXAMPLES / 'arithmetic' / 'shuffled_reward.py'}",  # no answer of this model is right
)


@pytest.mark.parametrize(
    ("name", "family", "tensor", "ranks", "rates"),
    [
        ("dapo_qwen2.5_32b", "qwen2", 2, 4, [0.0, 1e-7]),
        ("dapo_wo_ds_qwen2.5_32b", "qwen2", 2, 4, [0.0, 1e-7]),
        ("dapo_early_qwen2.5_32b", "qwen2", 2, 4, [0.0, 1e-7]),
        ("dapo_qwen2.5_7b", "qwen2", 2, 2, [1e-7, 2e-7]),
        ("dapo_qwen3_1.7b", "qwen3", 1, 1, [1e-7, 2e-7]),
    ],
)
def test_a_recipe_trains_with_a_tiny_model(
    tmp_path: Path, name: str, family: str, tensor: int, ranks: int, rates: list[float]
) -> None:
    rows = [recipe_row(f"Q {number}", str(number), "math_dapo", number) for number in range(64)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = EXAMPLES / name / "config.yaml"
    filtered = load_config(str(config), []).config.algorithm.filter_groups.enable
    settings = [
        *SMALLER,
        f"data.gen_batch_size={24 if filtered else 8}",
        f"{ACTOR}.megatron.tensor_model_parallel_size={tensor}",
        "trainer.nnodes=1",
        f"trainer.n_gpus_per_node={ranks}",
        f"actor_rollout_ref.model.path={make_checkpoint(tmp_path / 'model', family, layers=4, bf16=True)}",
        f"data.train_files=[{tmp_path / 'rows.jsonl'}]",
        f"data.val_files=[{tmp_path / 'rows.jsonl'}]",
        f"trainer.default_local_dir={tmp_path / 'run'}",
    ]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "megatron_dapo", "train", str(config), *settings]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert ended.returncode == 0, ended.stdout[-1000:] + ended.stderr[-3000:]
    found = [record["actor/lr"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if "actor/lr" in record]
    assert found == pytest.approx(rates)
