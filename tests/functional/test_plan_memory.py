"""What the planner says of memory, held against real ranks on a CPU: bytes held to the byte, bytes kept within 10 %."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_tiny_model

WORKER = Path(__file__).parent / "plan_memory_worker.py"
ROOT = WORKER.parents[2]
MODELS = {
    "qwen2": ("qwen2", False),
    "qwen2 tied": ("qwen2", True),
    "qwen3": ("qwen3", False),
    "qwen3 tied": ("qwen3", True),
    "llama": ("llama", False),
}
TP2 = {"tensor_model_parallel_size": 2}
SP = {"sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
PP4 = {"pipeline_model_parallel_size": 4}
CP2 = {"context_parallel_size": 2}
VPP2 = PP2 | {"virtual_pipeline_model_parallel_size": 2}
BF16 = {"params_dtype": "bfloat16"}
WHOLE = {"use_distributed_optimizer": False}
BUCKETS = {"overlap_grad_reduce": True, "overlap_param_gather": True}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
PAIRS = FULL | {"recompute_num_layers": 2}
BLOCK = FULL | {"recompute_method": "block", "recompute_num_layers": 3}
SELECTIVE = {"recompute_granularity": "selective"}


def case(world: int, model: str, micro_batches: int, **megatron: Any) -> dict[str, Any]:
    words = [f"{key.removesuffix('_model_parallel_size')}={value}" for key, value in megatron.items()]
    name = f"{model} on {world}: {', '.join(words)}"
    return {"name": name, "world": world, "model": model, "megatron": megatron, "micro_batches": micro_batches}


CASES = [
    case(1, "qwen2", 2),
    case(1, "qwen3 tied", 2, **BF16),
    case(1, "llama", 2, **WHOLE),
    case(1, "qwen2", 2, **BF16, **WHOLE),
    case(1, "qwen3", 2, **FULL),
    case(1, "qwen2", 2, **PAIRS, **BF16),
    case(1, "qwen2", 2, **BLOCK),
    case(1, "qwen3", 2, **SELECTIVE),
    case(2, "qwen2", 3, **BF16),
    case(2, "qwen3", 3, **BUCKETS),
    case(2, "qwen2 tied", 3, **TP2),
    case(2, "llama", 3, **TP2, **SP, **BF16),
    case(2, "qwen3 tied", 3, **PP2),
    case(2, "qwen2", 3, **PP2, **BF16, **FULL),
    case(2, "qwen2", 4, **VPP2),
    case(2, "qwen2", 3, **CP2),
    case(4, "qwen2", 5, **TP2, **SP, **PP2, **BF16),
    case(4, "qwen3 tied", 6, **PP4),
    case(4, "qwen3", 5, **PP2, **BF16, **BUCKETS),
    case(4, "llama", 5, **TP2, **CP2),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("plan_memory")
    for name, (family, tied) in MODELS.items():
        save_tiny_model(root / name, family, tied, width=64, vocab=67)
    cases, out = root / "cases.json", root / "out.json"
    cases.write_text(json.dumps([one | {"model": str(root / one["model"])} for one in CASES]))
    done = subprocess.run(
        [sys.executable, str(WORKER), str(cases), str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-12000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", [one["name"] for one in CASES])
def test_parameters_gradients_and_optimizer_are_planned_to_the_byte(found: dict[str, Any], name: str) -> None:
    parts = ("parameters", "gradients", "optimizer")
    real, planned = ([{part: rank[part] for part in parts} for rank in found[name][of]] for of in ("real", "planned"))
    assert planned == real


@pytest.mark.parametrize("name", [one["name"] for one in CASES])
def test_what_autograd_keeps_is_planned_within_a_tenth(found: dict[str, Any], name: str) -> None:
    for rank, (real, planned) in enumerate(zip(found[name]["real"], found[name]["planned"], strict=True)):
        assert planned["saved"] == pytest.approx(real["saved"], rel=0.1), f"rank {rank}"
