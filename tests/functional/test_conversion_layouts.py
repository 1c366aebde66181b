"""What the conversion writes, Megatron loads on any layout; what Megatron saves on any layout comes back the same.

Hugging Face -> converted (one process) -> Megatron's model on the layout -> saved by Megatron -> Hugging Face (one
process), each to the last bit. The vocabulary is odd, so tensor parallelism pads it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_tiny_model

from megatron_dapo.conversion import Conversion, hf_to_megatron, megatron_to_hf
from megatron_dapo.manifest import MODEL, find_checkpoint

WORKER = Path(__file__).with_name("conversion_worker.py")
FAMILIES = [(family, tied) for family in ("qwen2", "qwen3", "llama") for tied in (False, True)]


def layout(tp: int, pp: int, vpp: int | None = None) -> dict[str, Any]:
    sizes: dict[str, Any] = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    return sizes if vpp is None else sizes | {"virtual_pipeline_model_parallel_size": vpp}


LAYOUTS = {1: [layout(1, 1)], 2: [layout(2, 1), layout(1, 2), layout(1, 2, 2)], 4: [layout(4, 1), layout(2, 2)]}
TELLING = [("qwen2", False), ("qwen3", True)]


@pytest.mark.parametrize(
    ("world", "layouts", "families"),
    [
        (2, LAYOUTS[2], TELLING),
        pytest.param(1, LAYOUTS[1], FAMILIES, marks=pytest.mark.slow),
        pytest.param(2, LAYOUTS[2], FAMILIES, marks=pytest.mark.slow),
        pytest.param(4, LAYOUTS[4], FAMILIES, marks=pytest.mark.slow),
        pytest.param(8, [layout(4, 2)], FAMILIES, marks=pytest.mark.slow),
    ],
    ids=["2 ranks", "1 rank, all families", "2 ranks, all families", "4 ranks, all families", "8 ranks, all families"],
)
def test_every_family_goes_round_through_every_layout_to_the_last_bit(
    tmp_path: Path, world: int, layouts: list[dict[str, Any]], families: list[tuple[str, bool]]
) -> None:
    cases = []
    for family, tied in families:
        model = f"{family}{'-tied' * tied}"
        save_tiny_model(tmp_path / model, family, tied)
        hf_to_megatron(tmp_path / model, tmp_path / f"{model}-converted", Conversion(shard_bytes=50_000))
        for megatron in layouts:
            name = f"{model} {' '.join(map(str, megatron.values()))}"
            paths = {
                "hf": tmp_path / model,
                "converted": tmp_path / f"{model}-converted" / MODEL,
                "saved": tmp_path / name,
            }
            cases.append({"name": name, "megatron": megatron} | {key: str(path) for key, path in paths.items()})
    report = run(tmp_path, world, cases)
    assert report == {case["name"]: [] for case in cases}
    for case in cases:
        out = tmp_path / f"{case['name']} back"
        megatron_to_hf(find_checkpoint(Path(case["saved"])), out, Conversion(), model=Path(case["hf"]))
        found, wanted = load_file(out / "model.safetensors"), load_file(Path(case["hf"]) / "model.safetensors")
        assert found.keys() == wanted.keys()
        assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == [], case["name"]


def run(root: Path, world: int, cases: list[dict[str, Any]]) -> dict[str, list[str]]:
    (root / "cases.json").write_text(json.dumps(cases))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    done = subprocess.run(
        [sys.executable, *torchrun, str(WORKER), str(root / "cases.json"), str(root / "report.json")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads((root / "report.json").read_text())
