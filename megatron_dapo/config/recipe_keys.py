"""What becomes of each key that the recipe's three 32B scripts set: same, translated, or no effect here.

Source: verl, recipe/dapo, commit 4f80e465 (run_dapo_qwen2.5_32b.sh and its variants without dynamic sampling and
without token-level loss). Three further groups stand with them: the names that older versions of those scripts used,
the dropouts that its smaller scripts set, and what the recipe knows and cannot mean anything here, which is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Literal

from megatron_dapo.config.convert import to_type
from megatron_dapo.config.tree import ConfigError, RunConfig


@dataclass(frozen=True)
class Notice:
    """A given key that did not go into the tree as it stands or does nothing; printed at the start and by --dry-run."""

    key: str
    value: Any
    status: Literal["translated", "no effect"]
    text: str

    def __str__(self) -> str:
        return f"{self.key}={self.value}: {self.status}: {self.text}"


@dataclass(frozen=True)
class Same:
    """The tree has the key under this name and with this meaning."""


@dataclass(frozen=True)
class Translated:
    """`to` makes settings of the tree, dotted name -> value, from a value of type `kind`."""

    kind: Any
    to: Callable[[Any], Mapping[str, Any]]


@dataclass(frozen=True)
class SharedWith:
    """Not a setting of its own: its value has to be that of `key` in the tree."""

    key: str
    kind: Any
    reason: str


@dataclass(frozen=True)
class NoEffect:
    """`allowed`: the values that change nothing; any value where it is empty."""

    reason: str
    allowed: tuple[Any, ...] = field(default=())


_ACTOR = "actor_rollout_ref.actor"
_MODEL = "actor_rollout_ref.model"
_REF = "actor_rollout_ref.ref"
_ROLLOUT = "actor_rollout_ref.rollout"
_MEGATRON = f"{_ACTOR}.megatron"


def _recompute(enabled: bool) -> dict[str, Any]:
    settings = ("full", "uniform", 1) if enabled else (None, None, None)
    names = ("recompute_granularity", "recompute_method", "recompute_num_layers")
    return {f"{_MEGATRON}.{name}": value for name, value in zip(names, settings, strict=True)}


def _rename(kind: Any, key: str) -> Translated:
    return Translated(kind, lambda value: {key: value})


_NO_DROPOUT = NoEffect("dropout is always 0 here", allowed=(0,))
_NO_FSDP = "parameters are split by Megatron's tensor and pipeline parallelism, not by FSDP, and stay on the GPU"

RECIPE_KEYS: Mapping[str, Same | Translated | SharedWith | NoEffect] = {
    "data.train_files": Same(),
    "data.val_files": Same(),
    "data.prompt_key": Same(),
    "data.truncation": Same(),
    "data.max_prompt_length": Same(),
    "data.max_response_length": Same(),
    "data.gen_batch_size": Same(),
    "data.train_batch_size": Same(),
    "algorithm.adv_estimator": Same(),
    "algorithm.use_kl_in_reward": Same(),
    "algorithm.kl_ctrl.kl_coef": Same(),
    "algorithm.filter_groups.enable": Same(),
    "algorithm.filter_groups.max_num_gen_batches": Same(),
    "algorithm.filter_groups.metric": Same(),
    f"{_MODEL}.path": Same(),
    f"{_MODEL}.use_remove_padding": Same(),
    f"{_MODEL}.enable_gradient_checkpointing": Translated(bool, _recompute),
    f"{_ACTOR}.use_kl_loss": Same(),
    f"{_ACTOR}.kl_loss_coef": Same(),
    f"{_ACTOR}.clip_ratio_low": Same(),
    f"{_ACTOR}.clip_ratio_high": Same(),
    f"{_ACTOR}.clip_ratio_c": Same(),
    f"{_ACTOR}.entropy_coeff": Same(),
    f"{_ACTOR}.grad_clip": Same(),
    f"{_ACTOR}.loss_agg_mode": Same(),
    f"{_ACTOR}.use_dynamic_bsz": Same(),
    f"{_ACTOR}.ppo_mini_batch_size": Same(),
    f"{_ACTOR}.ppo_max_token_len_per_gpu": Same(),
    f"{_ACTOR}.optim.lr": Same(),
    f"{_ACTOR}.optim.lr_warmup_steps": Same(),
    f"{_ACTOR}.optim.weight_decay": Same(),
    f"{_ACTOR}.ulysses_sequence_parallel_size": _rename(int, f"{_MEGATRON}.context_parallel_size"),
    f"{_ACTOR}.fsdp_config.optimizer_offload": _rename(bool, f"{_MEGATRON}.optimizer_cpu_offload"),
    f"{_ACTOR}.fsdp_config.param_offload": NoEffect(_NO_FSDP),
    f"{_ACTOR}.fsdp_config.fsdp_size": NoEffect(_NO_FSDP),
    f"{_REF}.log_prob_use_dynamic_bsz": Same(),
    f"{_REF}.log_prob_max_token_len_per_gpu": Same(),
    f"{_REF}.fsdp_config.param_offload": NoEffect(_NO_FSDP),
    f"{_REF}.ulysses_sequence_parallel_size": SharedWith(
        f"{_MEGATRON}.context_parallel_size", int, "the reference shares the actor's layout"
    ),
    f"{_ROLLOUT}.n": Same(),
    f"{_ROLLOUT}.temperature": Same(),
    f"{_ROLLOUT}.top_p": Same(),
    f"{_ROLLOUT}.top_k": Same(),
    f"{_ROLLOUT}.log_prob_use_dynamic_bsz": Same(),
    f"{_ROLLOUT}.log_prob_max_token_len_per_gpu": Same(),
    f"{_ROLLOUT}.val_kwargs.n": Same(),
    f"{_ROLLOUT}.val_kwargs.temperature": Same(),
    f"{_ROLLOUT}.val_kwargs.top_p": Same(),
    f"{_ROLLOUT}.val_kwargs.top_k": Same(),
    f"{_ROLLOUT}.val_kwargs.do_sample": Same(),
    f"{_ROLLOUT}.gpu_memory_utilization": Same(),
    f"{_ROLLOUT}.tensor_model_parallel_size": Same(),
    f"{_ROLLOUT}.enable_chunked_prefill": Same(),
    f"{_ROLLOUT}.max_num_batched_tokens": Same(),
    f"{_ROLLOUT}.enforce_eager": Same(),
    "reward_model.reward_manager": Same(),
    "reward_model.overlong_buffer.enable": Same(),
    "reward_model.overlong_buffer.len": Same(),
    "reward_model.overlong_buffer.penalty_factor": Same(),
    "trainer.logger": Same(),
    "trainer.project_name": Same(),
    "trainer.experiment_name": Same(),
    "trainer.n_gpus_per_node": Same(),
    "trainer.nnodes": Same(),
    "trainer.val_before_train": Same(),
    "trainer.test_freq": Same(),
    "trainer.save_freq": Same(),
    "trainer.total_epochs": Same(),
    "trainer.default_local_dir": Same(),
    "trainer.resume_mode": Same(),
    # Older versions of the scripts.
    f"{_ACTOR}.use_token_level_loss": Translated(
        bool, lambda on: {f"{_ACTOR}.loss_agg_mode": "token-mean" if on else "seq-mean-token-mean"}
    ),
    "custom_reward_function.overlong_buffer.enable": _rename(bool, "reward_model.overlong_buffer.enable"),
    "custom_reward_function.overlong_buffer.len": _rename(int, "reward_model.overlong_buffer.len"),
    "custom_reward_function.overlong_buffer.penalty_factor": _rename(
        float, "reward_model.overlong_buffer.penalty_factor"
    ),
    # The recipe's smaller scripts.
    f"{_MODEL}.override_config.attention_dropout": _NO_DROPOUT,
    f"{_MODEL}.override_config.embd_pdrop": _NO_DROPOUT,
    f"{_MODEL}.override_config.resid_pdrop": _NO_DROPOUT,
}

# Settings of the tree that the embedded engine (rollout.name=torch) has no use for -> why.
NOT_OF_THE_EMBEDDED_ENGINE: Mapping[str, str] = {
    f"{_ROLLOUT}.gpu_memory_utilization": "the embedded engine takes the memory that it needs",
    f"{_ROLLOUT}.tensor_model_parallel_size": "the embedded engine is not tensor-parallel",
    f"{_ROLLOUT}.enable_chunked_prefill": "the embedded engine prefills a prompt whole, once a group",
    f"{_ROLLOUT}.max_num_batched_tokens": "the embedded engine limits sequences: rollout.max_num_seqs",
    f"{_ROLLOUT}.enforce_eager": "the embedded engine has no CUDA graphs",
    f"{_ROLLOUT}.free_cache_engine": "the embedded engine keeps no cache between rollouts",
}

# Of the recipe's trainer, without a meaning here: a key, or a section with all that is below it -> why.
NO_MEANING: Mapping[str, str] = {
    "critic": "DAPO has no critic, its advantage comes from the group; leave it out",
    f"{_ACTOR}.strategy": "Megatron is the only one here; leave it out",
    f"{_ACTOR}.fsdp_config": "there is no FSDP here; leave it out",
    f"{_REF}.fsdp_config": "there is no FSDP here; leave it out",
    f"{_ROLLOUT}.enable_prefix_caching": "the embedded engine computes a prompt once a group; leave it out",
    "algorithm.gamma": "the group advantage discounts nothing; leave it out",
    "algorithm.lam": "the group advantage discounts nothing; leave it out",
}


@dataclass(frozen=True)
class Translation:
    """What recipe keys come to: `settings` of the tree, `shared` keys still to be compared, and the notices."""

    settings: Mapping[str, Any]
    shared: Mapping[str, Any]
    notices: tuple[Notice, ...]


def translate(values: Mapping[str, Any], given: Mapping[str, Any]) -> Translation:
    """Apply the table to `values`, keys of it that the tree does not have, dotted name -> value.

    `given`: what was set in the tree under its own names. Raises ConfigError where a key has a value of the wrong
    type, where a value would have an effect that is not offered, and where two keys set one thing differently.
    """
    settings: dict[str, Any] = {}
    source: dict[str, str] = {}
    shared: dict[str, Any] = {}
    notices: list[Notice] = []
    for key, value in values.items():
        entry = RECIPE_KEYS[key]
        match entry:
            case NoEffect():
                if entry.allowed and value not in entry.allowed:
                    wanted = " or ".join(map(str, entry.allowed))
                    raise ConfigError(f"{key} is {value}: {entry.reason}; wanted {wanted}, or leave it out")
                notices.append(Notice(key, value, "no effect", entry.reason))
            case SharedWith():
                shared[key] = to_type(entry.kind, value, key)
                notices.append(Notice(key, value, "translated", f"{entry.reason}: {entry.key}={value}"))
            case Translated():
                made = entry.to(to_type(entry.kind, value, key))
                for name, setting in made.items():
                    _refuse_contradiction(key, name, setting, {**given, **settings}, source.get(name, name))
                    settings[name], source[name] = setting, key
                notices.append(Notice(key, value, "translated", _assignments(made)))
            case Same():
                raise AssertionError(f"{key} is in the tree")
    return Translation(settings, shared, tuple(notices))


def check_shared(shared: Mapping[str, Any], config: RunConfig) -> None:
    """Raise ConfigError where a shared key differs from the setting that it shares."""
    for key, value in shared.items():
        entry = RECIPE_KEYS[key]
        assert isinstance(entry, SharedWith)
        own = reduce(getattr, entry.key.split("."), config)
        if own != value:
            raise ConfigError(f"{key} is {value}, but {entry.key} is {own}: {entry.reason}; give both one value")


def without_effect(given: Mapping[str, Any], config: RunConfig) -> tuple[Notice, ...]:
    """Of the settings given in the tree, dotted name -> value, those that the chosen engine does not look at."""
    if config.actor_rollout_ref.rollout.name != "torch":
        return ()
    reasons = NOT_OF_THE_EMBEDDED_ENGINE
    return tuple(Notice(key, given[key], "no effect", reason) for key, reason in reasons.items() if key in given)


def no_meaning(key: str) -> str | None:
    """Why a key of the recipe's trainer cannot be given here; None where it is not known as one."""
    reasons = (reason for name, reason in NO_MEANING.items() if key == name or key.startswith(f"{name}."))
    return next(reasons, None)


def _refuse_contradiction(key: str, name: str, setting: Any, known: Mapping[str, Any], by: str) -> None:
    if name in known and known[name] != setting:
        raise ConfigError(f"{key} means {name}={setting}, but {by} makes it {known[name]}: leave one of the two out")


def _assignments(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={'null' if value is None else value}" for name, value in settings.items())
