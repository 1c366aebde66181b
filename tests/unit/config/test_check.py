from __future__ import annotations

from pathlib import Path

import pytest

from megatron_dapo.config.check import check, check_files, planned_world_size
from megatron_dapo.config.load import load_config
from megatron_dapo.config.tree import ConfigError, RunConfig

ACTOR = "actor_rollout_ref.actor"
MEGATRON = f"{ACTOR}.megatron"
REF = "actor_rollout_ref.ref"
REFERENCE = ["runtime=ray", f"{ACTOR}.use_kl_loss=true", f"{ACTOR}.kl_loss_coef=0.1"]
LISTS = Path(__file__).parents[2] / "data" / "recipe_overrides"


def config_of(*overrides: str) -> RunConfig:
    return load_config(None, overrides).config


@pytest.mark.parametrize("name", ["full", "without_dynamic_sampling", "early"])
def test_the_recipe_fits_its_128_gpus(name):
    config = config_of(*(LISTS / f"{name}.txt").read_text().splitlines())
    assert planned_world_size(config) == 128
    check(config, 128)


@pytest.mark.parametrize("world_size", [1, 2, 3, 64])
def test_the_defaults_fit_any_number_of_ranks(world_size):
    check(RunConfig(), world_size)


@pytest.mark.parametrize(
    "world_size, overrides, message",
    [
        (
            6,
            [f"{MEGATRON}.tensor_model_parallel_size=4"],
            r"world size 6 is not divisible by tensor 4 x pipeline 1 x context 1 = 4; use 4 or 8 ranks",
        ),
        (
            7,
            [f"{MEGATRON}.{part}_parallel_size=2" for part in ("tensor_model", "pipeline_model", "context")],
            r"world size 7 is not divisible by tensor 2 x pipeline 2 x context 2 = 8; use 8 ranks",
        ),
        (
            1,
            ["trainer.nnodes=16", "trainer.n_gpus_per_node=8"],
            r"world size 1 does not fit trainer.nnodes 16 x trainer.n_gpus_per_node 8 = 128; start",
        ),
        (
            256,
            ["trainer.nnodes=16", "trainer.n_gpus_per_node=8"],
            r"world size 256 does not fit trainer.nnodes 16 x trainer.n_gpus_per_node 8 = 128; start",
        ),
        (
            1,
            ["algorithm.use_kl_in_reward=true", f"{ACTOR}.old_log_prob=first_minibatch_free"],
            r"use_kl_in_reward is true and .*old_log_prob is first_minibatch_free: .* use old_log_prob=recompute",
        ),
        (
            1,
            [f"{REF}.n_gpus_per_node=2", f"{ACTOR}.use_kl_loss=true", f"{ACTOR}.kl_loss_coef=0.1"],
            r"asks for 2 ranks of the reference's own, and runtime.name is spmd, .* use runtime=ray, or leave it out",
        ),
        (
            1,
            ["runtime=ray", f"{REF}.n_gpus_per_node=2", f"{ACTOR}.use_kl_loss=true"],
            r"ref.n_gpus_per_node asks for 2 ranks of the reference's own, and nothing asks for its log-probs; leave",
        ),
        (
            4,
            [*REFERENCE, f"{REF}.n_gpus_per_node=3", f"{REF}.nnodes=2", f"{MEGATRON}.tensor_model_parallel_size=4"],
            r"ref.n_gpus_per_node asks for 6 ranks .* one replica of the policy's layout takes 4; .* \(4 or 8\)",
        ),
        (12, ["trainer.n_gpus_per_node=8"], r"world size 12 does not fit trainer.n_gpus_per_node 8 = 8; start"),
        (
            1,
            ["data.train_batch_size=100", f"{ACTOR}.ppo_mini_batch_size=32"],
            r"data.train_batch_size 100 is not divisible by .*ppo_mini_batch_size 32 .*; use a train .* 96 or 128",
        ),
        (
            1,
            ["data.train_batch_size=8", f"{ACTOR}.ppo_mini_batch_size=32"],
            r"data.train_batch_size 8 is not divisible by .*ppo_mini_batch_size 32 .*; use a train batch of 32$",
        ),
        (
            32,
            [
                f"{ACTOR}.ppo_mini_batch_size=2",
                "actor_rollout_ref.rollout.n=3",
                f"{MEGATRON}.tensor_model_parallel_size=4",
            ],
            r"2 prompts x 3 responses = 6 sequences for a data-parallel size of 8: .* at least 3 .* at most 24 ",
        ),
        (
            2,
            [f"{MEGATRON}.context_parallel_size=2", f"{ACTOR}.ppo_max_token_len_per_gpu=1023"],
            r"actor.ppo_max_token_len_per_gpu 1023 x context_parallel_size 2 = 2046 tokens: .* 1024 \+ .* 1024 = 2048; "
            r"use at least 1024$",
        ),
        (
            1,
            ["actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=2047"],
            r"rollout.log_prob_max_token_len_per_gpu 2047 .*; use at least 2048$",
        ),
        (
            1,
            ["actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=2047"],
            r"ref.log_prob_max_token_len_per_gpu 2047 .*; use at least 2048$",
        ),
        (
            1,
            ["reward_model.overlong_buffer.enable=true", "reward_model.overlong_buffer.len=1025"],
            r"overlong_buffer.len is 1025 tokens, more than data.max_response_length 1024: .* use at most 1024",
        ),
        (
            1,
            ["algorithm.filter_groups.min_valid=9"],
            r"filter_groups.min_valid is 9, more than the actor_rollout_ref.rollout.n = 8 responses of a group",
        ),
        (
            6,
            ["actor_rollout_ref.rollout.name=sglang", "actor_rollout_ref.rollout.tensor_model_parallel_size=4"],
            r"rollout.tensor_model_parallel_size is 4 and a node has 6 ranks: .* give a divisor of 6",
        ),
        (
            1,
            ["actor_rollout_ref.rollout.nnodes=2"],
            r"rollout.nnodes is 2 and runtime.colocate is true: .* leave it out, or set runtime.colocate=false",
        ),
        (1, ["trainer.test_freq=5"], r"trainer.test_freq is 5 and data.val_files is empty: name a file"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_numbers_and_a_remedy(world_size, overrides, message):
    with pytest.raises(ConfigError, match=message):
        check(config_of(*overrides), world_size)


@pytest.mark.parametrize(
    "world_size, overrides",
    [
        (8, [f"{MEGATRON}.tensor_model_parallel_size=4"]),
        (8, ["trainer.nnodes=2", "trainer.n_gpus_per_node=4"]),
        (16, ["trainer.n_gpus_per_node=8"]),
        (16, ["trainer.nnodes=2"]),
        (1, ["data.gen_batch_size=8", "data.train_batch_size=64"]),
        (8, [f"{ACTOR}.ppo_mini_batch_size=1", "actor_rollout_ref.rollout.n=8"]),
        (2, [f"{MEGATRON}.context_parallel_size=2", f"{ACTOR}.ppo_max_token_len_per_gpu=1024"]),
        (1, [f"{ACTOR}.use_dynamic_bsz=false", f"{ACTOR}.ppo_micro_batch_size_per_gpu=1"]),
        (
            1,
            [
                "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=1",
                "actor_rollout_ref.ref.log_prob_use_dynamic_bsz=false",
            ],
        ),
        (1, ["reward_model.overlong_buffer.enable=true", "reward_model.overlong_buffer.len=1024"]),
        (1, ["algorithm.filter_groups.min_valid=8"]),
        (1, ["trainer.test_freq=5", "data.val_files=x.parquet"]),
        (8, ["actor_rollout_ref.rollout.name=sglang", "actor_rollout_ref.rollout.tensor_model_parallel_size=4"]),
        (1, ["runtime=ray", "runtime.colocate=false", "actor_rollout_ref.rollout.nnodes=2"]),
    ],
)
def test_what_just_fits_is_taken(world_size, overrides):
    check(config_of(*overrides), world_size)


@pytest.mark.parametrize(
    "overrides, ranks",
    [
        ([], None),
        (["trainer.nnodes=2"], None),
        (["trainer.n_gpus_per_node=8"], 8),
        (["trainer.nnodes=2", "trainer.n_gpus_per_node=8"], 16),
    ],
)
def test_the_world_size_is_the_launchers_where_the_configuration_leaves_it_open(overrides, ranks):
    assert planned_world_size(config_of(*overrides)) == ranks


@pytest.fixture
def complete(tmp_path) -> list[str]:
    for name in ("config.json", "model.safetensors", "tokenizer.json", "train.parquet", "val.jsonl", "reward.py"):
        (tmp_path / name).touch()
    return [
        f"actor_rollout_ref.model.path={tmp_path}",
        f"data.train_files={tmp_path}/train.parquet",
        f"data.val_files={tmp_path}/val.jsonl",
        f"custom_reward_function.path={tmp_path}/reward.py",
        f"trainer.resume_mode={tmp_path}",
    ]


def test_files_that_are_there_are_taken(complete):
    check_files(config_of(*complete))


@pytest.mark.parametrize(
    "missing, message",
    [
        ("config.json", "model.path is .*, which has no config.json: wanted a folder with a Hugging Face checkpoint"),
        ("model.safetensors", "which has no \\*.safetensors"),
        ("tokenizer.json", "which has none of tokenizer.json, tokenizer_config.json, tokenizer.model"),
        ("train.parquet", "data.train_files names .*/train.parquet, which is not there"),
        ("val.jsonl", "data.val_files names .*/val.jsonl, which is not there"),
        ("reward.py", "custom_reward_function.path names .*/reward.py, which is not there"),
    ],
)
def test_a_file_that_is_missing_is_named(complete, tmp_path, missing, message):
    (tmp_path / missing).unlink()
    with pytest.raises(ConfigError, match=message):
        check_files(config_of(*complete))


@pytest.mark.parametrize(
    "override, message",
    [
        ("actor_rollout_ref.model.path=''", "actor_rollout_ref.model.path is not given: wanted a folder"),
        ("actor_rollout_ref.model.path=Qwen/Qwen2.5-32B", "model.path is Qwen/Qwen2.5-32B, which is no folder"),
        ("data.train_files=[]", "data.train_files is empty: wanted at least one"),
        ("trainer.resume_mode=never", "trainer.resume_mode names never, .* wanted auto, disable or the path"),
    ],
)
def test_a_file_that_is_not_given_is_asked_for(complete, override, message):
    with pytest.raises(ConfigError, match=message):
        check_files(config_of(*complete, override))
