"""What Megatron is told on a machine without CUDA, and that nobody else is told it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import megatron_dapo.mcore  # noqa: F401  (installs the hook)

import megatron.core.tensor_parallel.layers as megatron_layers  # isort: skip

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA, so nothing is changed")


def test_megatron_gets_the_cpu_where_it_asks_for_cuda():
    seen = megatron_layers.torch
    assert seen.cuda.current_device() == torch.device("cpu")
    assert seen.zeros(2, device="cuda").device.type == "cpu"
    assert seen.empty(2, device="cuda:3", pin_memory=True).device.type == "cpu"
    assert seen.cuda.Stream().wait_stream(None) is None


def test_the_rest_of_the_proxy_is_torch_itself():
    assert megatron_layers.torch.Tensor is torch.Tensor
    assert megatron_layers.torch.matmul is torch.matmul


def test_everybody_elses_torch_is_as_it_was():
    with pytest.raises((AssertionError, RuntimeError), match="CUDA"):
        torch.zeros(2, device="cuda")
    with torch.device("meta"):
        assert torch.arange(3).device.type == "meta"
    assert torch.zeros(1).type() == "torch.FloatTensor"


def test_megatron_that_was_imported_too_early_is_refused():
    program = "import sys; sys.modules['megatron.core'] = sys; import megatron_dapo.mcore"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "RuntimeError: megatron.core was imported before megatron_dapo.mcore" in done.stderr
