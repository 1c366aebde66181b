"""No layout changes loss, log-probs, gradients or a step: all equal transformers + plain PyTorch on one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from tiny_models import make_rollouts, save_tiny_model, token_terms

WORKER = Path(__file__).parent / "layout_worker.py"
TOLERANCE = 1e-5
STEP = {"lr": 1.0, "eps": 1.0, "clip": 0.5}  # as in layout_worker.py

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
SP = {"sequence_parallel": True}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
DISTRIBUTED = {"use_distributed_optimizer": True}
OVERLAP = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}


def case(name: str, *settings: dict[str, Any], model: str = "qwen2", **more: Any) -> dict[str, Any]:
    megatron: dict[str, Any] = {}
    for setting in settings:
        megatron |= setting
    return {"name": f"{model} {name}", "model": model, "megatron": megatron, **more}


ONE = [
    case("one process"),
    case("one process, 3 micro-batches", micro_batches=3),
    case("padded", packed=False),
    case("padded, 3 micro-batches", packed=False, micro_batches=3),
    case("recompute", RECOMPUTE),
    case("distributed optimizer", DISTRIBUTED),
    case("one process", model="qwen2-tied"),
    case("one process", model="qwen3"),
    case("one process", model="llama"),
    case(
        "KL, entropy bonus, temperature",
        model="qwen2-terms",
        objective={"temperature": 0.7, "entropy_coeff": 0.03, "kl_coef": 0.2},
    ),
]
TWO = [
    case("TP2", TP2),
    case("TP2 SP, 3 micro-batches", TP2, SP, micro_batches=3),
    case("TP2 SP padded", TP2, SP, packed=False),
    case("PP2, 3 micro-batches", PP2, micro_batches=3),
    case("PP2 padded, 2 micro-batches", PP2, packed=False, micro_batches=2),
    case("DP2"),
    case("DP2 overlap, 2 micro-batches", OVERLAP, micro_batches=2),
    case("CP2", CP2),
    case("CP2 padded, 2 micro-batches", CP2, packed=False, micro_batches=2),
    case("TP2 SP", TP2, SP, model="qwen2-tied"),
    case("PP2", PP2, model="qwen2-tied", micro_batches=2),
    case("TP2 SP recompute", TP2, SP, RECOMPUTE, model="qwen3"),
    case("CP2", CP2, model="qwen3"),
    case("PP2", PP2, model="llama", micro_batches=2),
    case("TP2", TP2, model="llama"),
    case(
        "TP2 SP, KL, entropy, temperature",
        TP2,
        SP,
        model="qwen2-terms",
        objective={"temperature": 0.7, "entropy_coeff": 0.03, "kl_coef": 0.2},
    ),
]
FOUR = [
    case("TP2 PP2 SP, 2 micro-batches", TP2, PP2, SP, micro_batches=2),
    case("TP2 PP2 SP, 2 micro-batches", TP2, PP2, SP, micro_batches=2, model="qwen2-tied"),
    case("TP2 CP2 SP", TP2, CP2, SP, model="qwen3"),
    case("PP2 DP2 overlap", PP2, OVERLAP, micro_batches=2),
    case("TP2 DP2 SP distributed optimizer", TP2, SP, DISTRIBUTED, model="qwen2-tied"),
]
FAULTS = [
    case("TP2 SP", TP2, SP, fault="missing sequence-parallel reduction"),
    case("CP2", CP2, fault="extra division by context-parallel size"),
    case("PP2", PP2, model="qwen2-tied", micro_batches=2, fault="unsynchronised tied embedding"),
    case("one process", fault="weights off by one token"),
]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and the oracle's answers, made once."""
    root = tmp_path_factory.mktemp("layouts")
    for name, family, tied, terms in (
        ("qwen2", "qwen2", False, oracle.Terms()),
        ("qwen2-tied", "qwen2", True, oracle.Terms()),
        ("qwen2-terms", "qwen2", False, oracle.Terms(temperature=0.7, entropy_coeff=0.03, kl_coef=0.2)),
        ("qwen3", "qwen3", True, oracle.Terms()),
        ("llama", "llama", False, oracle.Terms()),
    ):
        save_tiny_model(root / name, family, tied)
        torch.save(_data(root / name, terms), root / f"{name}.pt")
    return root


def _data(model: Path, terms: oracle.Terms) -> dict[str, Any]:
    rollouts = make_rollouts()
    sequences = rollouts.sequences
    logp = oracle.all_logp(model, sequences, terms.temperature)
    ref = logp + np.random.default_rng(5).normal(size=len(logp)) * 0.3 if terms.kl_coef else None
    weight = 1.0 / (len(sequences) * sequences.response_lengths)  # seq-mean-token-mean: unequal, so that a shift shows
    given = token_terms(rollouts, weight, logp, ref)
    answer = oracle.answer(model, sequences, given, terms, STEP["lr"], STEP["eps"], STEP["clip"])
    weights = {name: param.detach().clone() for name, param in oracle.load(model).named_parameters()}
    return {"sequences": sequences, "terms": given, "weights": weights, **vars(answer)}


def run(workspace: Path, world: int, cases: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    for entry in cases:
        entry.update(data=str(workspace / f"{entry['model']}.pt"), model=str(workspace / entry["model"]))
    cases_file, out = workspace / f"cases{world}.json", workspace / f"out{world}.json"
    cases_file.write_text(json.dumps(cases))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(world),
            str(WORKER),
            str(cases_file),
            str(out),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize(("world", "cases"), [(1, ONE), (2, TWO), (4, FOUR)], ids=["world1", "world2", "world4"])
def test_every_layout_gives_the_single_process_loss_gradients_and_step(
    workspace: Path, world: int, cases: list[dict[str, Any]]
) -> None:
    found = run(workspace, world, cases)
    assert len(found) == len(cases)
    beyond = {n: {k: v for k, v in d.items() if not v <= TOLERANCE} for n, d in found.items()}
    assert not any(beyond.values()), json.dumps({n: d for n, d in beyond.items() if d}, indent=1)


@pytest.mark.parametrize("world", [1, 2])
def test_planted_faults_are_seen(workspace: Path, world: int) -> None:
    cases = [dict(c) for c in FAULTS if (c["name"] == "qwen2 one process") == (world == 1)]
    for name, deviations in run(workspace, world, cases).items():
        assert max(deviations.values()) > 100 * TOLERANCE, (name, deviations)
