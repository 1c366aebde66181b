"""A checkpoint of one layout is taken up by any other: the same weights, and training that goes on the same way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.functional.tiny_models import save_tiny_model

WORKER = Path(__file__).with_name("checkpoint_worker.py")
TOLERANCE = 1e-5  # relative to the gradient norm, or to the largest change of any weight

TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
INTERLEAVED = PP2 | {"virtual_pipeline_model_parallel_size": 2}
ONE: dict[str, Any] = {}
PLAIN = {"use_distributed_optimizer": False}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Two ranks save under TP2, then take that up as PP2, CP2 and DP2; one process takes it up, and saves for two."""
    root = tmp_path_factory.mktemp("checkpoints")
    save_tiny_model(root / "qwen2", "qwen2", tied=False)
    save_tiny_model(root / "qwen3", "qwen3", tied=True)

    def job(name: str, megatron: dict[str, Any], model: str = "qwen2", **what: Any) -> dict[str, Any]:
        paths = {key: str(root / what[key]) for key in ("load", "save") if key in what}
        return {"megatron": megatron, "model": str(root / model), "out": str(root / f"{name}.pt"), **what, **paths}

    runs = [
        (2, job("saved at TP2", TP2, updates=2, save="tp2")),
        (2, job("TP2 to TP2", TP2, load="tp2")),
        (2, job("TP2 to PP2", PP2, load="tp2")),
        (2, job("TP2 to CP2", CP2, load="tp2")),
        (2, job("TP2 to DP2", ONE, load="tp2")),
        (2, job("plain, saved at TP2", TP2 | PLAIN, updates=2, save="plain", forgets=1)),
        (2, job("plain, TP2 to PP2", PP2 | PLAIN, load="plain")),
        (2, job("TP2 to interleaved PP2", INTERLEAVED, load="tp2")),
        (2, job("saved at interleaved PP2", INTERLEAVED, updates=2, save="interleaved")),
        (1, job("TP2 to one process", ONE, load="tp2")),
        (1, job("plain, TP2 to one process", PLAIN, load="plain")),
        (1, job("interleaved PP2 to one process", ONE, load="interleaved")),
        (1, job("tied, saved at one process", ONE, "qwen3", updates=2, save="tied")),
        (2, job("tied, one process to TP2", TP2, "qwen3", load="tied")),
        (2, job("tied, one process to PP2", PP2, "qwen3", load="tied")),
    ]
    for world, part in ((2, runs[:9]), (1, runs[9:13]), (2, runs[13:])):
        assert {size for size, _ in part} == {world}
        run(root / "jobs.json", world, [job for _, job in part])
    return {path.stem: torch.load(path) for path in root.glob("*.pt")}


def run(jobs_file: Path, world: int, jobs: list[dict[str, Any]]) -> None:
    jobs_file.write_text(json.dumps(jobs))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)] if world > 1 else []
    done = subprocess.run(
        [sys.executable, *torchrun, str(WORKER), str(jobs_file)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


PAIRS = [
    ("saved at TP2", "TP2 to TP2"),
    ("saved at TP2", "TP2 to PP2"),
    ("saved at TP2", "TP2 to CP2"),
    ("saved at TP2", "TP2 to DP2"),
    ("saved at TP2", "TP2 to one process"),
    ("saved at TP2", "TP2 to interleaved PP2"),
    ("saved at interleaved PP2", "interleaved PP2 to one process"),
    ("plain, saved at TP2", "plain, TP2 to PP2"),
    ("plain, saved at TP2", "plain, TP2 to one process"),
    ("tied, saved at one process", "tied, one process to TP2"),
    ("tied, saved at one process", "tied, one process to PP2"),
]


@pytest.mark.parametrize(("saved", "loaded"), PAIRS, ids=[loaded for _, loaded in PAIRS])
def test_the_weights_are_equal_and_the_next_update_is_the_same(
    found: dict[str, dict[str, Any]], saved: str, loaded: str
):
    wanted, got = found[saved], found[loaded]
    assert [name for name, weight in wanted["before"].items() if not torch.equal(got["before"][name], weight)] == []
    assert got["norm"] == pytest.approx(wanted["norm"], rel=TOLERANCE)
    changes = {name: weight - wanted["before"][name] for name, weight in wanted["after"].items()}
    largest = max(change.abs().max().item() for change in changes.values())
    gaps = {name: (got["after"][name] - weight).abs().max().item() for name, weight in wanted["after"].items()}
    assert {name: gap for name, gap in gaps.items() if gap > TOLERANCE * largest} == {}


def test_with_and_without_the_distributed_optimizer_the_updates_are_the_same_and_not_small(
    found: dict[str, dict[str, Any]],
):
    distributed, plain = found["saved at TP2"], found["plain, saved at TP2"]
    torch.testing.assert_close(distributed["after"], plain["after"], rtol=0, atol=1e-6)
    gaps = [(weight - distributed["before"][name]).abs().max() for name, weight in distributed["after"].items()]
    assert min(gaps) > 1e-4
