"""Weights from Megatron's ranks into an engine on each, through every transport that a CPU has; and with faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_tiny_model

WORKER = Path(__file__).parent / "sync_worker.py"
ROOT = WORKER.parents[2]
MODELS = {"untied": ("qwen2", False), "tied": ("qwen3", True)}
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
VPP2 = PP2 | {"virtual_pipeline_model_parallel_size": 2}
ONE_EACH, SOME, ALL = 1, 8192, 2**30  # bucket sizes: a tensor in each, some, the whole model in one


def case(model: str, megatron: dict[str, Any], transport: str, bucket_bytes: int, **more: Any) -> dict[str, Any]:
    layout = " ".join(f"{key.split('_')[0]}{size}" for key, size in megatron.items()) or "data"
    name = " ".join([model, layout, transport, str(bucket_bytes), *map(str, more.values())])
    return {
        "name": name,
        "model": model,
        "megatron": megatron,
        "transport": transport,
        "bucket_bytes": bucket_bytes,
    } | more


TWO = [
    case(model, layout, transport, size)
    for model in MODELS
    for layout, transport, size in [
        (TP2, "auto", ONE_EACH),
        (TP2, "auto", SOME),
        (TP2, "auto", ALL),
        (PP2, "auto", ONE_EACH),
        (PP2, "auto", SOME),
        (VPP2, "auto", SOME),
        (TP2, "broadcast", SOME),
        (PP2, "broadcast", ONE_EACH),
        ({}, "shared_memory", SOME),
        (CP2, "broadcast", ALL),
        ({}, "auto", SOME),
        (TP2, "in_process", SOME),
    ]
] + [
    case("untied", TP2, "auto", SOME, temperature=0.7),
    case("untied", TP2, "auto", SOME, engine_every=2),
    case("tied", {}, "auto", SOME, engine_every=2),
]
FAULTS = [
    case("untied", TP2, "auto", size, fault=fault, at_rank=rank)
    for fault in ("drop", "swap", "corrupt")
    for size, rank in ((SOME, 0), (ONE_EACH, 1))
]
FOUR = [
    case(model, layout, transport, size)
    for model in MODELS
    for layout in (TP2 | PP2, TP2, PP2, TP2 | CP2, TP2 | VPP2)
    for transport in ("auto", "broadcast")
    for size in (ONE_EACH, SOME, ALL)
]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("weight_sync")
    for name, (family, tied) in MODELS.items():
        save_tiny_model(root / name, family, tied)
    return root


def run(workspace: Path, world: int, cases: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    cases_file, out = workspace / "cases.json", workspace / "out.json"
    cases_file.write_text(json.dumps([one | {"model": str(workspace / one["model"])} for one in cases]))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    done = subprocess.run(
        [*torchrun, str(WORKER), str(cases_file), str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-12000:]
    found = json.loads(out.read_text())
    assert list(found) == [one["name"] for one in cases]
    return found


@pytest.mark.parametrize(
    ("world", "cases"), [(2, TWO), pytest.param(4, FOUR, marks=pytest.mark.slow)], ids=["world2", "world4"]
)
def test_after_every_push_each_engine_has_the_bits_of_the_gathering_export(
    workspace: Path, world: int, cases: list[dict[str, Any]]
) -> None:
    for name, found in run(workspace, world, cases).items():
        assert found["error"] == "", name
        assert found["different"] == [[[], [], []]] * world, name
        assert found["names left"] == [[]] * world, name
        assert found["in_process"] == ("in_process" in name or "data auto" in name), name


def test_a_dropped_swapped_or_corrupted_tensor_stops_the_run_and_is_named(workspace: Path) -> None:
    for name, found in run(workspace, 2, FAULTS).items():
        said = found["error"]
        assert "layers.1.mlp.up_proj.weight" in said, (name, said)
        assert f"{'process' if 'drop' in name else 'engine'} {name[-1]}" in said, (name, said)
        assert ("layers.1.mlp.gate_proj.weight" in said) == ("swap" in name), (name, said)
        assert "layers.0" not in said, (name, said)
