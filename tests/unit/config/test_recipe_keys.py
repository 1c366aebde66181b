"""The override lists of the recipe's three 32B scripts, shell variables expanded, come to what is read off here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_dapo.config.convert import leaf_types
from megatron_dapo.config.load import load_config
from megatron_dapo.config.recipe_keys import RECIPE_KEYS, Same
from megatron_dapo.config.tree import ConfigError, RunConfig

LISTS = Path(__file__).parents[2] / "data" / "recipe_overrides"
ACTOR = "actor_rollout_ref.actor"
MEGATRON = f"{ACTOR}.megatron"

# Read off the scripts by hand: key -> value in the tree, under the same name.
COMMON: dict[str, Any] = {
    "data.train_files": ("/data/dapo-math-17k.parquet",),
    "data.val_files": ("/data/aime-2024.parquet",),
    "data.prompt_key": "prompt",
    "data.truncation": "left",
    "data.max_prompt_length": 2048,
    "data.max_response_length": 20480,
    "data.train_batch_size": 512,
    "algorithm.adv_estimator": "grpo",
    "algorithm.use_kl_in_reward": False,
    "algorithm.kl_ctrl.kl_coef": 0.0,
    "actor_rollout_ref.model.path": "/models/Qwen2.5-32B",
    "actor_rollout_ref.model.use_remove_padding": True,
    "actor_rollout_ref.actor.use_kl_loss": False,
    "actor_rollout_ref.actor.kl_loss_coef": 0.0,
    "actor_rollout_ref.actor.clip_ratio_low": 0.2,
    "actor_rollout_ref.actor.clip_ratio_high": 0.28,
    "actor_rollout_ref.actor.clip_ratio_c": 10.0,
    "actor_rollout_ref.actor.entropy_coeff": 0.0,
    "actor_rollout_ref.actor.grad_clip": 1.0,
    "actor_rollout_ref.actor.use_dynamic_bsz": True,
    "actor_rollout_ref.actor.ppo_mini_batch_size": 32,
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": 22528,
    "actor_rollout_ref.actor.optim.lr": 0.000001,
    "actor_rollout_ref.actor.optim.lr_warmup_steps": 10,
    "actor_rollout_ref.actor.optim.weight_decay": 0.1,
    "actor_rollout_ref.ref.log_prob_use_dynamic_bsz": True,
    "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu": 22528,
    "actor_rollout_ref.rollout.n": 16,
    "actor_rollout_ref.rollout.temperature": 1.0,
    "actor_rollout_ref.rollout.top_p": 1.0,
    "actor_rollout_ref.rollout.top_k": -1,
    "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz": True,
    "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu": 22528,
    "actor_rollout_ref.rollout.val_kwargs.n": 1,
    "actor_rollout_ref.rollout.val_kwargs.temperature": 1.0,
    "actor_rollout_ref.rollout.val_kwargs.top_p": 0.7,
    "actor_rollout_ref.rollout.val_kwargs.top_k": -1,
    "actor_rollout_ref.rollout.val_kwargs.do_sample": True,
    "reward_model.reward_manager": "dapo",
    "reward_model.overlong_buffer.enable": True,
    "reward_model.overlong_buffer.len": 4096,
    "reward_model.overlong_buffer.penalty_factor": 1.0,
    "trainer.logger": ("console", "wandb"),
    "trainer.project_name": "DAPO-verl",
    "trainer.n_gpus_per_node": 8,
    "trainer.nnodes": 16,
    "trainer.val_before_train": True,
    "trainer.test_freq": 5,
    "trainer.save_freq": 5,
    "trainer.total_epochs": 1,
    "trainer.resume_mode": "auto",
}
OWN: dict[str, dict[str, Any]] = {
    "full": {
        "data.gen_batch_size": 1536,
        "algorithm.filter_groups.enable": True,
        "algorithm.filter_groups.max_num_gen_batches": 10,
        "algorithm.filter_groups.metric": "acc",
        "actor_rollout_ref.actor.loss_agg_mode": "token-mean",
        "trainer.experiment_name": "DAPO-Qwen2.5-32B",
        "trainer.default_local_dir": "/ckpts/DAPO-Qwen2.5-32B",
    },
    "without_dynamic_sampling": {
        "algorithm.filter_groups.enable": False,
        "actor_rollout_ref.actor.loss_agg_mode": "token-mean",
        "trainer.experiment_name": "DAPO-wo-DS-Qwen2.5-32B",
        "trainer.default_local_dir": "/ckpts/DAPO-wo-DS-Qwen2.5-32B",
    },
    "early": {
        "data.gen_batch_size": 512,
        "algorithm.filter_groups.enable": False,
        "actor_rollout_ref.actor.loss_agg_mode": "seq-mean-token-mean",
        "trainer.experiment_name": "DAPO-Early-Qwen2.5-32B",
        "trainer.default_local_dir": "/ckpts/DAPO-Early-Qwen2.5-32B",
    },
}
# key -> (its value in the scripts, the settings that it comes to)
TRANSLATED: dict[str, tuple[Any, dict[str, Any]]] = {
    "actor_rollout_ref.model.enable_gradient_checkpointing": (
        True,
        {
            f"{MEGATRON}.recompute_granularity": "full",
            f"{MEGATRON}.recompute_method": "uniform",
            f"{MEGATRON}.recompute_num_layers": 1,
        },
    ),
    f"{ACTOR}.fsdp_config.optimizer_offload": (True, {f"{MEGATRON}.optimizer_cpu_offload": True}),
    f"{ACTOR}.ulysses_sequence_parallel_size": (8, {f"{MEGATRON}.context_parallel_size": 8}),
    "actor_rollout_ref.ref.ulysses_sequence_parallel_size": (8, {f"{MEGATRON}.context_parallel_size": 8}),
}
NO_EFFECT: dict[str, Any] = {
    "actor_rollout_ref.actor.fsdp_config.param_offload": True,
    "actor_rollout_ref.actor.fsdp_config.fsdp_size": -1,
    "actor_rollout_ref.ref.fsdp_config.param_offload": True,
}
# In the tree under the same name, and announced as long as the engine is the embedded one.
OF_OTHER_ENGINES: dict[str, Any] = {
    "actor_rollout_ref.rollout.gpu_memory_utilization": 0.7,
    "actor_rollout_ref.rollout.tensor_model_parallel_size": 4,
    "actor_rollout_ref.rollout.enable_chunked_prefill": True,
    "actor_rollout_ref.rollout.max_num_batched_tokens": 22528,
}


def overrides(name: str) -> list[str]:
    return (LISTS / f"{name}.txt").read_text().splitlines()


def at(config: object, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize("name", OWN)
def test_each_key_of_a_script_has_the_value_that_the_script_gives_it(name):
    same = COMMON | OWN[name] | OF_OTHER_ENGINES
    keys = {line.split("=", 1)[0] for line in overrides(name)}
    assert keys == {*same, *TRANSLATED, *NO_EFFECT}

    loaded = load_config(None, overrides(name))
    expected = dict(same)
    for _, settings in TRANSLATED.values():
        expected |= settings
    for key in leaf_types(RunConfig):
        wanted = expected[key] if key in expected else at(RunConfig(), key)
        found = at(loaded.config, key)
        assert (found, type(found)) == (wanted, type(wanted)), key


@pytest.mark.parametrize("name", OWN)
def test_each_key_that_the_tree_does_not_have_or_the_engine_not_look_at_is_announced(name):
    notices = {notice.key: notice for notice in load_config(None, overrides(name)).notices}
    assert {key: (notice.value, notice.status) for key, notice in notices.items()} == {
        **{key: (value, "translated") for key, (value, _) in TRANSLATED.items()},
        **{key: (value, "no effect") for key, value in (NO_EFFECT | OF_OTHER_ENGINES).items()},
    }
    for key, (_, settings) in TRANSLATED.items():
        for place, value in settings.items():
            assert f"{place}={value}" in notices[key].text
    for key in NO_EFFECT | OF_OTHER_ENGINES:
        assert len(notices[key].text) > 20, "says why"


def test_the_table_holds_every_key_of_the_three_scripts():
    keys = {line.split("=", 1)[0] for name in OWN for line in overrides(name)}
    assert keys <= RECIPE_KEYS.keys()


def test_a_key_is_called_same_exactly_where_the_tree_has_it():
    leaves = leaf_types(RunConfig).keys()
    for key, entry in RECIPE_KEYS.items():
        assert isinstance(entry, Same) == (key in leaves), key


def test_gradient_checkpointing_off_means_no_recompute():
    config = load_config(None, ["actor_rollout_ref.model.enable_gradient_checkpointing=False"]).config
    megatron = config.actor_rollout_ref.actor.megatron
    assert megatron.recompute_granularity is None
    assert megatron.recompute_method is None
    assert megatron.recompute_num_layers is None


@pytest.mark.parametrize(
    "override, key, value",
    [
        ("actor_rollout_ref.actor.use_token_level_loss=True", f"{ACTOR}.loss_agg_mode", "token-mean"),
        ("actor_rollout_ref.actor.use_token_level_loss=False", f"{ACTOR}.loss_agg_mode", "seq-mean-token-mean"),
        ("custom_reward_function.overlong_buffer.len=40", "reward_model.overlong_buffer.len", 40),
        ("custom_reward_function.overlong_buffer.penalty_factor=2", "reward_model.overlong_buffer.penalty_factor", 2.0),
    ],
)
def test_names_of_older_scripts_are_translated(override, key, value):
    loaded = load_config(None, [override])
    assert at(loaded.config, key) == value
    (notice,) = loaded.notices
    assert (notice.key, notice.status) == (override.split("=")[0], "translated")
    assert f"{key}=" in str(notice)


@pytest.mark.parametrize("override", ["actor_rollout_ref.rollout.enforce_eager=False"])
def test_an_engine_setting_without_effect_is_announced(override):
    loaded = load_config(None, [override])
    assert loaded.config == RunConfig()
    assert [notice.status for notice in loaded.notices] == ["no effect"]
    assert load_config(None, [override, "actor_rollout_ref.rollout.name=sglang"]).notices == ()


def test_a_dropout_of_0_is_announced_and_another_is_refused():
    key = "actor_rollout_ref.model.override_config.attention_dropout"
    assert [notice.key for notice in load_config(None, [f"+{key}=0."]).notices] == [key]
    with pytest.raises(ConfigError, match=rf"{key} is 0\.1: dropout is always 0 here; wanted 0"):
        load_config(None, [f"+{key}=0.1"])


@pytest.mark.parametrize("given", [[], [f"{ACTOR}.ulysses_sequence_parallel_size=2"]])
def test_the_reference_cannot_have_another_ulysses_size_than_the_actor(given):
    reference = "actor_rollout_ref.ref.ulysses_sequence_parallel_size"
    with pytest.raises(ConfigError, match=rf"{reference} is 4, but {MEGATRON}.context_parallel_size is [12]:"):
        load_config(None, [*given, f"{reference}=4"])


def test_a_translated_key_and_its_own_name_may_agree_but_not_differ():
    ulysses, own = f"{ACTOR}.ulysses_sequence_parallel_size", f"{MEGATRON}.context_parallel_size"
    agreed = load_config(None, [f"{ulysses}=2", f"{own}=2"]).config
    assert agreed.actor_rollout_ref.actor.megatron.context_parallel_size == 2
    with pytest.raises(ConfigError, match=rf"{ulysses} means {own}=2, but {own} makes it 1: leave one"):
        load_config(None, [f"{ulysses}=2", f"{own}=1"])


def test_a_translated_key_of_the_wrong_type_is_refused_under_its_own_name():
    with pytest.raises(
        ConfigError, match=r"ulysses_sequence_parallel_size is 1\.5 \(a number\): wanted a whole number"
    ):
        load_config(None, [f"{ACTOR}.ulysses_sequence_parallel_size=1.5"])


@pytest.mark.parametrize(
    "key", ["critic.optim.lr", f"{ACTOR}.strategy", f"{ACTOR}.fsdp_config.wrap_policy.min_num_params", "algorithm.lam"]
)
def test_a_key_of_the_recipe_without_a_meaning_here_is_refused_with_the_reason(key):
    with pytest.raises(ConfigError, match=rf"{key} has no meaning here: .*; leave it out"):
        load_config(None, [f"{key}=1"])
