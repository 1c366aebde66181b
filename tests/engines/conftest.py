"""These tests need an engine's own environment (`make test-engines`); without its library they are not collected.

One server a run of pytest; each test leaves it running and idle.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_dapo.config.tree import RolloutConfig, WeightSyncConfig
from megatron_dapo.rollout.failures import WeightsNotLoadedError
from megatron_dapo.rollout.http_engine import HttpEngine
from tests.engines.asking import EOS, requests
from tests.engines.servers import HERE, SERVED, Served
from tests.functional.tiny_models import save_tiny_model

collect_ignore = [f"test_{served.library}.py" for served in SERVED if served not in HERE]
if not HERE:
    collect_ignore += ["test_run.py", "test_servers.py"]


@pytest.fixture(scope="session", params=HERE, ids=lambda served: served.library)
def served(request: pytest.FixtureRequest) -> Served:
    return request.param


@pytest.fixture(scope="session")
def models(served: Served, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        save_tiny_model(root / str(seed), "qwen2", tied=False, seed=seed, width=served.width, heads=served.heads)
    return [root / "0", root / "1"]


@pytest.fixture(scope="session")
def references(models: list[Path]) -> list[PreTrainedModel]:
    return [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in models]


@pytest.fixture(scope="session")
def engine(served: Served, models: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpEngine]:
    several_buckets_a_push = WeightSyncConfig(bucket_bytes=20_000)
    config = RolloutConfig(max_num_seqs=32, weight_sync=several_buckets_a_push)
    log = tmp_path_factory.mktemp("logs") / "server.log"
    engine = served.engine(models[0], [EOS], config, dtype=torch.float32, devices=None, log=log, quiet_limit=20.0)
    with pytest.raises(WeightsNotLoadedError):
        engine.submit(requests())
    yield engine
    engine.close()
