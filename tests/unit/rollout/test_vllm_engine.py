"""What vLLM's server is started with, by device and settings; the server itself is tested in tests/engines."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from megatron_dapo.config.tree import RolloutConfig
from megatron_dapo.rollout.vllm_engine import server_environment, server_flags
from tests.functional.tiny_models import save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_tiny_model(path, "qwen2", tied=True, width=64, heads=2)
    return path


def values(flags: list[str]) -> dict[str, str]:
    return {name: value for name, value in pairwise(flags) if name.startswith("--")}


def test_on_gpus_an_engine_sees_its_own_and_the_settings_arrive(model: Path) -> None:
    config = RolloutConfig(
        name="vllm",
        tensor_model_parallel_size=2,
        gpu_memory_utilization=0.6,
        enforce_eager=True,
        enable_chunked_prefill=False,
        max_num_batched_tokens=4096,
        max_num_seqs=7,
    )
    devices = ("5", "GPU-a")
    flags = server_flags(model, config, torch.bfloat16, devices)
    found = values(flags)
    assert found["--tensor-parallel-size"] == "2"
    assert (found["--gpu-memory-utilization"], found["--dtype"]) == ("0.6", "bfloat16")
    assert (found["--max-num-batched-tokens"], found["--max-num-seqs"]) == ("4096", "7")
    assert {"--enforce-eager", "--no-enable-chunked-prefill", "--enable-sleep-mode"} <= set(flags)
    assert "--enforce-eager" not in server_flags(model, replace(config, enforce_eager=False), torch.bfloat16, devices)
    assert "VLLM_BATCH_INVARIANT" not in server_environment(config, devices)
    assert server_environment(config, devices)["CUDA_VISIBLE_DEVICES"] == "5,GPU-a"
    assert server_environment(replace(config, deterministic=True), devices)["VLLM_BATCH_INVARIANT"] == "1"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RolloutConfig(tensor_model_parallel_size=2), "tensor_model_parallel_size is 2, and vLLM runs on the CPU"),
        (RolloutConfig(deterministic=True), "deterministic is True, and vLLM runs on the CPU"),
    ],
)
def test_what_needs_a_gpu_is_refused_on_a_cpu(model: Path, config: RolloutConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        server_flags(model, config, torch.float32, None)


def test_heads_that_the_cpu_kernels_do_not_know_are_refused_before_the_start(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "qwen2", tied=True)
    with pytest.raises(ValueError, match=r"heads of size 4, and vLLM on the CPU knows \(32, 64"):
        server_flags(tmp_path, RolloutConfig(), torch.float32, None)
