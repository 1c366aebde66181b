"""What each section refuses of itself."""

from __future__ import annotations

import pytest

from megatron_dapo.config.load import load_config
from megatron_dapo.config.tree import ConfigError

ACTOR = "actor_rollout_ref.actor"
MEGATRON = f"{ACTOR}.megatron"
ROLLOUT = "actor_rollout_ref.rollout"


@pytest.mark.parametrize(
    "override, message",
    [
        ("data.max_prompt_length=0", "data.max_prompt_length is 0: wanted at least 1"),
        ("data.max_response_length=0", "data.max_response_length is 0: wanted at least 1"),
        ("data.train_batch_size=0", "data.train_batch_size is 0: wanted at least 1"),
        ("data.gen_batch_size=0", "data.gen_batch_size is 0: wanted at least 1"),
        ("data.truncation=top", "data.truncation is 'top' .text.: wanted one of left, right, middle, error"),
        ("algorithm.adv_estimator=gae", "algorithm.adv_estimator is 'gae' .text.: wanted grpo, the only choice"),
        ("algorithm.kl_ctrl.kl_coef=-0.1", "algorithm.kl_ctrl.kl_coef is -0.1: wanted at least 0"),
        ("algorithm.filter_groups.max_staleness=-1", "max_staleness is -1: wanted at least 0"),
        ("algorithm.filter_groups.min_valid=0", "min_valid is 0: wanted at least 1"),
        ("algorithm.filter_groups.metric=''", "algorithm.filter_groups.metric is empty: wanted acc, score"),
        (f"{ACTOR}.ppo_mini_batch_size=0", "ppo_mini_batch_size is 0: wanted at least 1"),
        (f"{ACTOR}.ppo_epochs=0", "ppo_epochs is 0: wanted at least 1"),
        (f"{ACTOR}.clip_ratio_low=0", "clip_ratio_low is 0.0: wanted more than 0"),
        (f"{ACTOR}.clip_ratio_high=-0.2", "clip_ratio_high is -0.2: wanted more than 0"),
        (f"{ACTOR}.clip_ratio_c=1", "clip_ratio_c is 1.0: wanted more than 1"),
        (f"{ACTOR}.loss_agg_mode=mean", "loss_agg_mode is 'mean' .text.: wanted one of token-mean, seq-mean"),
        (f"{ACTOR}.use_dynamic_bsz=false", "ppo_micro_batch_size_per_gpu is absent and use_dynamic_bsz is false"),
        (f"{ACTOR}.optim.min_lr=1", "optim.min_lr is 1.0: wanted at most lr, 1e-06"),
        (f"{ACTOR}.optim.betas=[0.9,1]", r"optim.betas are \[0.9, 1.0\]: wanted two numbers from 0 to below 1"),
        (f"{ACTOR}.optim.eps=0", "optim.eps is 0.0: wanted more than 0"),
        (f"{MEGATRON}.tensor_model_parallel_size=0", "tensor_model_parallel_size is 0: wanted at least 1"),
        (f"{MEGATRON}.sequence_parallel=true", "sequence_parallel is true with tensor_model_parallel_size 1"),
        (f"{MEGATRON}.virtual_pipeline_model_parallel_size=2", "is 2 with pipeline_model_parallel_size 1: set a"),
        (f"{MEGATRON}.overlap_param_gather=true", "overlap_param_gather is true: it needs"),
        (f"{MEGATRON}.recompute_granularity=full", "recompute_method is absent: recompute_granularity full needs"),
        (f"{MEGATRON}.recompute_num_layers=1", "recompute_num_layers is 1 with recompute_granularity None"),
        (f"{ACTOR}.rollout_correction.tis_cap=0", "tis_cap is 0.0: wanted more than 0"),
        (f"{ACTOR}.rollout_correction.mis_low=1.1", "mis_low is 1.1: wanted from 0 to below 1, so that a ratio of 1"),
        (f"{ACTOR}.rollout_correction.mis_high=0.9", "mis_high is 0.9: wanted above 1, so that a ratio of 1 is kept"),
        (f"{ACTOR}.gspo.clip_ratio_low=0", "gspo.clip_ratio_low is 0.0: wanted more than 0"),
        (f"{ROLLOUT}.n=0", "rollout.n is 0: wanted at least 1"),
        (f"{ROLLOUT}.temperature=0", "rollout.temperature is 0.0: wanted more than 0"),
        (
            f"{ROLLOUT}.top_p=0.9",
            "rollout.top_p is 0.9: training samples from .*; wanted 1.0 .top_p for eval",
        ),
        (f"{ROLLOUT}.top_k=50", "rollout.top_k is 50: training samples from .*; wanted -1 .top_k for eval"),
        (f"{ROLLOUT}.val_kwargs.n=0", "val_kwargs.n is 0: wanted at least 1"),
        (f"{ROLLOUT}.val_kwargs.temperature=-1", "val_kwargs.temperature is -1.0: wanted at least 0"),
        (f"{ROLLOUT}.val_kwargs.top_p=0", "val_kwargs.top_p is 0.0: wanted more than 0"),
        (f"{ROLLOUT}.val_kwargs.top_k=0", "val_kwargs.top_k is 0: wanted at least 1, or -1 for off"),
        ("actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=0", "log_prob_max_token_len_per_gpu is 0: wanted"),
        ("reward_model.overlong_buffer.enable=true", "overlong_buffer.len is 0 with enable true: wanted"),
        ("reward_model.overlong_buffer.penalty_factor=-1", "penalty_factor is -1.0: wanted at least 0"),
        ("reward_model.timeout=0", "reward_model.timeout is 0.0: wanted more than 0"),
        ("reward_model.max_failure_rate=1.5", "reward_model.max_failure_rate is 1.5: wanted at most 1"),
        ("reward_model.num_workers=0", "reward_model.num_workers is 0: wanted at least 1"),
        ("trainer.total_epochs=0", "trainer.total_epochs is 0: wanted at least 1"),
        ("trainer.n_gpus_per_node=0", "trainer.n_gpus_per_node is 0: wanted at least 1"),
        ("actor_rollout_ref.ref.nnodes=4", "ref.nnodes is 4 and n_gpus_per_node is absent: .* give the GPUs of a node"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_with_its_place_and_what_is_wanted(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, [override])


@pytest.mark.parametrize(
    "overrides",
    [
        [f"{MEGATRON}.tensor_model_parallel_size=2", f"{MEGATRON}.sequence_parallel=true"],
        [
            f"{MEGATRON}.pipeline_model_parallel_size=2",
            f"{MEGATRON}.virtual_pipeline_model_parallel_size=2",
        ],
        [f"{MEGATRON}.overlap_param_gather=true", f"{MEGATRON}.overlap_grad_reduce=true"],
        [f"{MEGATRON}.recompute_granularity=selective"],
        [
            f"{MEGATRON}.recompute_granularity=full",
            f"{MEGATRON}.recompute_method=block",
            f"{MEGATRON}.recompute_num_layers=2",
        ],
        [f"{ACTOR}.use_dynamic_bsz=false", f"{ACTOR}.ppo_micro_batch_size_per_gpu=2"],
        [f"{ACTOR}.optim.lr=0"],
        [f"{ROLLOUT}.n=1"],
        [f"{ROLLOUT}.val_kwargs.temperature=0"],
        ["algorithm.use_kl_in_reward=true", "algorithm.filter_groups.enable=true"],
    ],
)
def test_what_the_refused_settings_call_for_is_taken(overrides):
    load_config(None, overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["old_log_prob=rollout", "rollout_correction.tis_cap=2"], "old_log_prob is rollout, .* use .*recompute"),
        (["old_log_prob=rollout", "rollout_correction.mis_low=0.5"], "old_log_prob is rollout, .* use .*recompute"),
        (
            ["old_log_prob=first_minibatch_free", "rollout_correction.mis_high=2"],
            "first_minibatch_free and rollout_correction masks sequences: .* or tis_cap alone",
        ),
        (
            ["old_log_prob=first_minibatch_free", "ppo_epochs=2"],
            "first_minibatch_free with ppo_epochs 2: .*ppo_epochs=1",
        ),
    ],
)
def test_old_log_probs_that_do_not_go_with_what_else_is_asked_for_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, [f"{ACTOR}.{override}" for override in overrides])


@pytest.mark.parametrize(
    "overrides",
    [
        ["old_log_prob=recompute", "rollout_correction.tis_cap=2", "rollout_correction.mis_low=0.5", "ppo_epochs=2"],
        ["old_log_prob=first_minibatch_free", "rollout_correction.tis_cap=2"],
        ["old_log_prob=rollout", "ppo_epochs=2"],
    ],
)
def test_old_log_probs_that_go_with_it_are_taken(overrides):
    load_config(None, [f"{ACTOR}.{override}" for override in overrides])


def test_the_metric_after_kl_needs_kl_in_the_reward():
    overrides = ["algorithm.filter_groups.enable=true", "algorithm.filter_groups.metric=seq_final_reward"]
    with pytest.raises(ConfigError, match=r"filter_groups.metric is seq_final_reward, .* use metric seq_reward"):
        load_config(None, overrides)
    load_config(None, [*overrides, "algorithm.use_kl_in_reward=true"])
