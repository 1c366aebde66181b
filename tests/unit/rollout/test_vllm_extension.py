"""Packed matrices are read back exactly, and one that is held twice is compared; on layers that pack as vLLM's do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from megatron_dapo.algo.checksum import checksum
from megatron_dapo.rollout.vllm_extension import ROWS_AT_ONCE, HeldParameters, pack_tied, unpacked


class Packer:
    """What vLLM calls a quantisation method: makes `cpu_linear` of what the weight is at that time."""

    def __init__(self, keeps_plain: bool):
        self.keeps_plain = keeps_plain

    def process_weights_after_loading(self, layer: Layer) -> None:
        secret = layer.weight.detach().T.contiguous().clone()
        layer.cpu_linear = lambda x, _, bias: x @ secret if bias is None else x @ secret + bias
        if not self.keeps_plain:
            layer.weight = nn.Parameter(torch.empty(0, dtype=secret.dtype), requires_grad=False)


class Layer(nn.Module):
    cpu_linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def __init__(self, weight: Tensor, keeps_plain: bool = False):
        super().__init__()
        self.weight = nn.Parameter(weight.clone(), requires_grad=False)
        self.input_size_per_partition = weight.shape[1]
        self.quant_method = Packer(keeps_plain)
        self.quant_method.process_weights_after_loading(self)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", [1, ROWS_AT_ONCE, ROWS_AT_ONCE + 3])
def test_a_packed_matrix_is_read_back_to_the_last_bit(dtype: torch.dtype, inputs: int) -> None:
    weight = torch.randn(5, inputs, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[0, 0] = 0.0
    layer = Layer(weight)
    assert torch.equal(unpacked(layer), weight)
    assert checksum(unpacked(layer)) == checksum(weight)


def test_the_sign_of_a_zero_is_lost_and_no_checksum_asks_for_it() -> None:
    weight = torch.tensor([[1.0, -0.0], [-2.0, 3.0]])
    assert checksum(unpacked(Layer(weight))) == checksum(weight)


class TiedModel(nn.Module):
    def __init__(self, weight: Tensor):
        super().__init__()
        self.embed, self.head = Layer(weight, keeps_plain=True), Layer(weight, keeps_plain=True)
        self.head.weight = self.embed.weight
        self.linear = Layer(weight + 1)


def test_a_tied_projection_packed_before_the_last_load_is_told_and_packed_anew() -> None:
    model = TiedModel(torch.randn(4, 3))
    HeldParameters(model).refuse_difference()
    model.embed.weight.copy_(torch.randn(4, 3))
    model.embed.quant_method.process_weights_after_loading(model.embed)
    with pytest.raises(RuntimeError, match=r"head\.weight is held twice"):
        HeldParameters(model).refuse_difference()
    pack_tied(model)
    HeldParameters(model).refuse_difference()


def test_parameters_are_found_plain_or_packed_by_name() -> None:
    weight = torch.randn(4, 3)
    model = TiedModel(weight)
    held = HeldParameters(model)
    assert set(held) == {"embed.weight", "head.weight", "linear.weight"}
    assert len(held) == 3
    assert torch.equal(held["embed.weight"], weight)
    assert torch.equal(held["linear.weight"], weight + 1)
