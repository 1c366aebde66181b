from __future__ import annotations

import sys

import pytest
import torch.distributed as dist

from megatron_dapo.config.tree import ConfigError, MegatronConfig
from megatron_dapo.mcore.footprint import footprint, stage_rank
from tests.unit.mcore.helpers import QWEN_32B

TP8_PP4 = MegatronConfig(tensor_model_parallel_size=8, pipeline_model_parallel_size=4, params_dtype="bfloat16")
# One of 8 tensor-parallel ranks: qkv and its bias, projection, gate and up, down; two norms.
LAYER = (7168 * 5120 + 7168 + 5120 * 5120 + 3 * 27648 * 5120) // 8 + 2 * 5120
EMBEDDING = 152064 // 8 * 5120


def test_a_rank_of_a_32b_model_on_128_gpus_holds_what_hand_arithmetic_says() -> None:
    found = [footprint(QWEN_32B, TP8_PP4, 128, stage_rank(TP8_PP4, 128, stage)) for stage in (0, 1, 3)]
    elements = [16 * LAYER + EMBEDDING, 16 * LAYER, 16 * LAYER + EMBEDDING + 5120]
    assert [f.elements for f in found] == elements
    assert elements[0] == 1_072_674_816
    for held, count in zip(found, elements, strict=True):
        assert (held.parameters, held.gradients) == (2 * count, 4 * count)
        assert (held.master, held.moments) == (4 * count // 4, 8 * count // 4)  # 4 data-parallel ranks share them
        assert held.largest in (2 * EMBEDDING, 2 * 2 * 27648 // 8 * 5120)


def test_it_leaves_no_process_group_and_no_hook_behind() -> None:
    hook = sys.excepthook
    footprint(QWEN_32B, TP8_PP4, 128, 127)
    assert not dist.is_initialized()
    assert sys.excepthook is hook


def test_a_world_that_the_layout_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="world size 100 is not divisible"):
        footprint(QWEN_32B, TP8_PP4, 100, 0)
