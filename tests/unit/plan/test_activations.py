"""The closed forms against sums written out by hand; against real passes: tests/functional/test_plan_memory.py."""

from __future__ import annotations

import pytest

from megatron_dapo.config.tree import MegatronConfig
from megatron_dapo.plan.activations import (
    MicroBatchSize,
    chunks_in_flight,
    head_bytes,
    saved_by_chunk,
    saved_peak,
)
from tests.unit.mcore.helpers import QWEN_32B

SIZE = MicroBatchSize(tokens=1000, response_tokens=900, sequences=2)
TP8 = {"tensor_model_parallel_size": 8, "sequence_parallel": True, "params_dtype": "bfloat16"}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def test_a_layer_of_transformer_engine_keeps_what_its_modules_save() -> None:
    # A token and rank: twice a norm's input and output and its scale, over 8 ranks; q, k, v and the output; the
    # log-sum-exp of 5 heads; gate, up and their product.
    layer = 2 * (2 * 5120 * 2 + 4) / 8 + (5120 + 2 * 1024 + 5120) / 8 * 2 + 5 * 4 + 3 * 27648 / 8 * 2
    found = saved_by_chunk(QWEN_32B, MegatronConfig(**TP8), "te", SIZE, first=False, last=False)
    assert found.layers == pytest.approx(64 * 1000 * layer)
    assert (found.ends, found.again) == (0, 0)


def test_full_recomputation_keeps_a_layers_input_and_one_layer_at_a_time() -> None:
    plain = saved_by_chunk(QWEN_32B, MegatronConfig(**TP8), "te", SIZE, False, False)
    full = saved_by_chunk(QWEN_32B, MegatronConfig(**TP8, **FULL), "te", SIZE, False, False)
    assert full.layers == 64 * 1000 * 5120 * 2 / 8
    assert full.again == pytest.approx(plain.layers / 64)


def test_without_sequence_parallelism_norms_are_kept_whole() -> None:
    with_it = saved_by_chunk(QWEN_32B, MegatronConfig(**TP8), "te", SIZE, False, False).layers
    without = saved_by_chunk(QWEN_32B, MegatronConfig(**TP8 | {"sequence_parallel": False}), "te", SIZE, False, False)
    assert without.layers - with_it == pytest.approx(64 * 1000 * 2 * (2 * 5120 * 2 + 4) * 7 / 8)


@pytest.mark.parametrize(
    ("virtual", "stage", "micro_batches", "in_flight"),
    [
        (None, 0, 9, 4),
        (None, 3, 9, 1),
        (None, 0, 2, 2),
        (2, 0, 8, 2 * 3 + 4 + 1),
        (2, 3, 8, 4 + 1),
        (2, 0, 4, 8),  # as many micro-batches as stages: all forward passes come first
    ],
)
def test_in_flight_are_as_many_as_megatrons_schedule_warms_up_with(
    virtual: int | None, stage: int, micro_batches: int, in_flight: int
) -> None:
    config = MegatronConfig(pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=virtual)
    assert chunks_in_flight(config, stage, micro_batches) == in_flight


def test_the_first_stage_keeps_one_micro_batch_for_each_stage_behind_it() -> None:
    config = MegatronConfig(**TP8, pipeline_model_parallel_size=4)
    peaks = [saved_peak(QWEN_32B, config, "te", SIZE, stage, 8) for stage in (0, 1, 2)]
    one = saved_by_chunk(QWEN_32B, config, "te", SIZE, False, False).layers
    assert peaks == pytest.approx([4 * (one + 8 * 1000), 3 * one, 2 * one])


def test_the_heads_logits_are_one_chunk_and_never_more() -> None:
    config = MegatronConfig(**TP8)
    states = (1000 + 900) * 5120 * 2
    assert head_bytes(QWEN_32B, config, SIZE, False) == 900 * 152064 / 8 * 4 + states
    many = MicroBatchSize(22528, 22528, 2)
    assert head_bytes(QWEN_32B, config, many, True) == 512 * 2**20 + 2 * 2 * 22528 * 5120 * 2
