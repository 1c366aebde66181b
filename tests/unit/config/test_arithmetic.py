"""The recipe's 32B run on 128 GPUs, worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_dapo.config.arithmetic import Line, format_arithmetic, run_arithmetic
from megatron_dapo.config.load import load_config
from megatron_dapo.config.tree import RunConfig

LISTS = Path(__file__).parents[2] / "data" / "recipe_overrides"
ROWS = 1_791_700  # of the published training file, 17,917 prompts a hundred times


def recipe(name: str, *more: str) -> RunConfig:
    return load_config(None, [*(LISTS / f"{name}.txt").read_text().splitlines(), *more]).config


def table(lines: list[Line]) -> dict[tuple[str, str], int | float | str]:
    found = {(line.name, line.unit): line.value for line in lines}
    assert len(found) == len(lines), "name and unit tell the lines apart"
    return found


def test_the_32b_run_on_128_gpus():
    assert table(run_arithmetic(recipe("full"), 128, ROWS, 960)) == {
        ("generation batch", "prompts"): 1536,
        ("generation batch", "responses"): 24_576,  # 1536 x 16
        ("generation batches a step, at most", "generation batches"): 10,
        ("prompts drawn a step, at most", "prompts"): 15_360,
        ("responses a step, at most", "responses"): 245_760,
        ("training step", "prompts"): 512,
        ("training step", "sequences"): 8192,  # 512 x 16
        ("mini-batch", "prompts"): 32,
        ("mini-batch", "sequences"): 512,  # 32 x 16
        ("training step", "mini-batches"): 16,  # 512 / 32
        ("training step", "optimizer updates"): 16,
        ("world size", "GPUs"): 128,
        ("model-parallel size", "GPUs"): 8,  # Ulysses 8 becomes context 8
        ("data-parallel size", "data-parallel ranks"): 16,  # 128 / 8
        ("optimizer update, equal lengths", "sequences a rank"): 32,  # 512 / 16
        ("sequence, at most", "tokens"): 22_528,  # 2048 + 20480
        ("micro-batch, at most", "tokens a GPU"): 22_528,
        ("micro-batch, at most", "tokens"): 180_224,  # x 8: eight of the longest sequences
        ("optimizer update, full-length responses", "micro-batches a rank"): 4,  # 32 / 8
        ("optimizer update, half-length responses", "micro-batches a rank"): 3,  # 32 / 14; 14 x 12288 = 172032
        ("training step, full-length responses", "tokens a GPU"): 1_441_792,  # 8192 x 22528 / 128
        ("run, at most", "training steps"): 3499,  # 512 x 3499 = 1791488
        ("run, at most", "optimizer updates"): 55_984,  # 3499 x 16
        ("learning-rate warmup", "training steps"): 10,
        ("learning-rate warmup", "optimizer updates"): 160,
        ("evaluation", "responses"): 960,
        ("evaluation every", "training steps"): 5,
    }


def test_without_dynamic_sampling_the_steps_are_exact():
    found = table(run_arithmetic(recipe("without_dynamic_sampling"), 128, ROWS))
    assert found["generation batch", "prompts"] == 512
    assert found["generation batches a step", "generation batches"] == 1
    assert found["run", "training steps"] == 3499
    assert found["run", "optimizer updates"] == 55_984
    assert ("prompts drawn a step, at most", "prompts") not in found


def test_without_the_data_the_steps_are_unknown_but_where_their_number_is_set():
    found = table(run_arithmetic(recipe("full"), 128, None))
    assert found["run, at most", "training steps"] == "unknown without the data"
    assert found["run, at most", "optimizer updates"] == "unknown without the data"
    assert found["evaluation", "responses a prompt"] == 1
    limited = table(run_arithmetic(recipe("full", "trainer.total_training_steps=7"), 128, None))
    assert limited["run, at most", "training steps"] == 7
    assert limited["run, at most", "optimizer updates"] == 112


@pytest.mark.parametrize("limit, steps", [(7, 7), (100, 49)])
def test_the_shorter_of_epochs_and_step_limit_ends_the_run(limit, steps):
    config = load_config(
        None, ["data.train_batch_size=64", "trainer.total_epochs=5", f"trainer.total_training_steps={limit}"]
    ).config
    # Epochs follow each other without a gap: 5 x 630 = 3150 prompts are 49 batches of 64 and 14 prompts.
    assert table(run_arithmetic(config, 1, 630))["run", "training steps"] == steps


def test_several_passes_over_a_batch_multiply_updates_and_tokens():
    one, two = (
        table(run_arithmetic(recipe("full", f"actor_rollout_ref.actor.ppo_epochs={epochs}"), 128, ROWS))
        for epochs in (1, 2)
    )
    for key in [
        ("training step", "optimizer updates"),
        ("training step, full-length responses", "tokens a GPU"),
        ("run, at most", "optimizer updates"),
        ("learning-rate warmup", "optimizer updates"),
    ]:
        assert two[key] == 2 * one[key], key
    assert one["training step", "mini-batches"] == two["training step", "mini-batches"] == 16


def test_micro_batches_counted_in_sequences():
    actor = "actor_rollout_ref.actor"
    config = recipe("full", f"{actor}.use_dynamic_bsz=false", f"{actor}.ppo_micro_batch_size_per_gpu=5")
    found = table(run_arithmetic(config, 128, ROWS))
    assert found["micro-batch, at most", "sequences"] == 5
    assert found["optimizer update, full-length responses", "micro-batches a rank"] == 7  # 32 / 5
    assert ("micro-batch, at most", "tokens") not in found


def test_an_interleaved_pipeline_has_a_multiple_of_its_stages():
    megatron = "actor_rollout_ref.actor.megatron"
    config = recipe(
        "full",
        f"{megatron}.pipeline_model_parallel_size=4",
        f"{megatron}.virtual_pipeline_model_parallel_size=2",
    )
    found = table(run_arithmetic(config, 128, ROWS))
    assert found["data-parallel size", "data-parallel ranks"] == 4
    # 512 / 4 = 128 sequences a rank: 16 micro-batches of 8, and 10 of 14 rounded up to 12.
    assert found["optimizer update, full-length responses", "micro-batches a rank"] == 16
    assert found["optimizer update, half-length responses", "micro-batches a rank"] == 12


def test_no_limit_on_generation_batches_is_said_in_words():
    found = table(run_arithmetic(recipe("full", "algorithm.filter_groups.max_num_gen_batches=0"), 128, ROWS))
    assert found["generation batches a step, at most", "generation batches"] == "no limit"


def test_the_printed_table_has_a_row_a_line_with_aligned_columns():
    lines = [Line("short", 1234567, "tokens", "a x b"), Line("a longer name", "no limit", "prompts", "")]
    assert format_arithmetic(lines).splitlines() == [
        "short          1,234,567  tokens   a x b",
        "a longer name   no limit  prompts",
    ]
