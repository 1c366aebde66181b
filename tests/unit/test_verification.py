"""Two checkpoints that are not the same model are told apart, and where."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from megatron_dapo.conversion import Conversion, hf_to_megatron
from megatron_dapo.manifest import MODEL
from megatron_dapo.mcore.families import shape_of
from megatron_dapo.types import CheckpointError
from megatron_dapo.verification import LOGIT_TOLERANCE, compare_logits, compare_tensors
from tests.unit.tiny_checkpoint import make_checkpoint, weights_of


def nothing(what: str, count: int, total: int) -> None:
    pass


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.v_proj.bias", "lm_head.weight"])
def test_one_changed_bit_in_one_tensor_is_named(tmp_path: Path, name: str):
    source = make_checkpoint(tmp_path / "hf")
    hf_to_megatron(source, tmp_path / "megatron", Conversion())
    shape = shape_of(AutoConfig.from_pretrained(source))
    compare_tensors(source, tmp_path / "megatron" / MODEL, shape, nothing)
    tensors = weights_of(source)
    tensors[name].view(torch.int32).view(-1)[-1] ^= 1
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"tensor {name} of"):
        compare_tensors(source, tmp_path / "megatron" / MODEL, shape, nothing)


@pytest.mark.parametrize("wrong", [2 * LOGIT_TOLERANCE * 8, torch.nan, torch.inf])
def test_a_logit_that_differs_is_named_with_its_place(wrong: float):
    wanted = torch.linspace(-8, 8, 15).view(3, 5)
    found = wanted.clone()
    found[1, 3] += wrong
    with pytest.raises(CheckpointError, match="after 2 of 3 probe tokens the logit of token 3"):
        compare_logits(found, wanted)


def test_rounding_of_fp32_is_no_difference():
    wanted = torch.linspace(-8, 8, 15).view(3, 5)
    compare_logits(wanted + 0.5 * LOGIT_TOLERANCE * 8, wanted)
