"""What has to hold between sections, and between the configuration and the machine.

Each section has checked itself (`tree.py`). Not here: what depends on the model's own shape, such as a head count
that tensor parallelism cannot split, and what depends on the data.
"""

from __future__ import annotations

from math import prod
from pathlib import Path

from megatron_dapo.config.tree import ConfigError, RunConfig

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def planned_world_size(config: RunConfig) -> int | None:
    """GPUs (one rank each) that the configuration asks for; None where it leaves that to the launcher."""
    trainer = config.trainer
    if config.runtime.name == "ray":
        return (trainer.n_gpus_per_node or 1) * (trainer.nnodes or 1)
    return None if trainer.n_gpus_per_node is None else trainer.n_gpus_per_node * (trainer.nnodes or 1)


def check(config: RunConfig, world_size: int) -> None:
    """Raise ConfigError, with the numbers and a remedy, where `config` cannot run on `world_size` ranks."""
    _check_world(config, world_size)
    _check_batches(config, world_size)
    _check_token_limits(config)
    _check_groups(config)
    _check_kl_in_reward(config)
    _check_placement(config, world_size)
    _check_reference(config)
    if config.trainer.test_freq > 0 and not config.data.val_files:
        raise ConfigError(
            f"trainer.test_freq is {config.trainer.test_freq} and data.val_files is empty: "
            "name a file to evaluate on, or set trainer.test_freq=-1"
        )


def check_files(config: RunConfig) -> None:
    """Raise ConfigError where a file that `config` names is not given or not there."""
    _check_checkpoint(config.actor_rollout_ref.model.path)
    if not config.data.train_files:
        raise ConfigError("data.train_files is empty: wanted at least one parquet or JSONL file")
    for key, files in (("data.train_files", config.data.train_files), ("data.val_files", config.data.val_files)):
        for file in files:
            _check_exists(key, file, "the path of a parquet or JSONL file")
    if config.custom_reward_function.path is not None:
        _check_exists("custom_reward_function.path", config.custom_reward_function.path, "the path of a Python file")
    if config.trainer.resume_mode not in ("auto", "disable"):
        _check_exists("trainer.resume_mode", config.trainer.resume_mode, "auto, disable or the path of a checkpoint")


def _check_world(config: RunConfig, world_size: int) -> None:
    megatron, trainer = config.actor_rollout_ref.actor.megatron, config.trainer
    size = megatron.model_parallel_size
    if world_size % size:
        raise ConfigError(
            f"world size {world_size} is not divisible by tensor {megatron.tensor_model_parallel_size} x pipeline "
            f"{megatron.pipeline_model_parallel_size} x context {megatron.context_parallel_size} = {size}; "
            f"use {_multiples(world_size, size)} ranks, or change a *_parallel_size in actor_rollout_ref.actor.megatron"
        )
    given = {"trainer.nnodes": trainer.nnodes, "trainer.n_gpus_per_node": trainer.n_gpus_per_node}
    numbers = {name: number for name, number in given.items() if number is not None}
    ranks = prod(numbers.values())
    fits = world_size == ranks if len(numbers) == len(given) else world_size % ranks == 0
    if not fits:
        named = " x ".join(f"{name} {number}" for name, number in numbers.items())
        raise ConfigError(
            f"world size {world_size} does not fit {named} = {ranks}; "
            f"start a process for each GPU, or set {' and '.join(numbers)} to null to take what was started"
        )


def _check_placement(config: RunConfig, world_size: int) -> None:
    rollout = config.actor_rollout_ref.rollout
    node = config.trainer.n_gpus_per_node or world_size
    if config.runtime.colocate and rollout.name != "torch" and node % rollout.tensor_model_parallel_size:
        raise ConfigError(
            f"actor_rollout_ref.rollout.tensor_model_parallel_size is {rollout.tensor_model_parallel_size} and a node "
            f"has {node} ranks: an engine takes the GPUs of so many ranks of one node; give a divisor of {node}"
        )
    for key in ("nnodes", "n_gpus_per_node"):
        if config.runtime.colocate and getattr(rollout, key) is not None:
            raise ConfigError(
                f"actor_rollout_ref.rollout.{key} is {getattr(rollout, key)} and runtime.colocate is true: engines "
                "live where the policy does; leave it out, or set runtime.colocate=false"
            )


def _check_reference(config: RunConfig) -> None:
    """One with ranks of its own has the policy's layout, on another number of replicas."""
    ranks = config.actor_rollout_ref.ref.own_ranks
    if not ranks:
        return
    named = f"actor_rollout_ref.ref.n_gpus_per_node asks for {ranks} ranks of the reference's own"
    if config.runtime.name != "ray":
        raise ConfigError(
            f"{named}, and runtime.name is {config.runtime.name}, which has one kind of rank; use runtime=ray, or "
            "leave it out: the reference then lives on the policy's ranks"
        )
    if not config.needs_reference:
        raise ConfigError(
            f"{named}, and nothing asks for its log-probs; leave it out, or set actor.use_kl_loss or "
            "algorithm.use_kl_in_reward with a coefficient above 0"
        )
    size = config.actor_rollout_ref.actor.megatron.model_parallel_size
    if ranks % size:
        raise ConfigError(
            f"{named}, and one replica of the policy's layout takes {size}; give a multiple of {size} "
            f"({_multiples(ranks, size)})"
        )


def _check_batches(config: RunConfig, world_size: int) -> None:
    actor, train = config.actor_rollout_ref.actor, config.data.train_batch_size
    mini = actor.ppo_mini_batch_size
    if train % mini:
        raise ConfigError(
            f"data.train_batch_size {train} is not divisible by actor_rollout_ref.actor.ppo_mini_batch_size {mini} "
            f"(prompts, both); use a train batch of {_multiples(train, mini)}"
        )
    n, replicas = config.actor_rollout_ref.rollout.n, world_size // actor.megatron.model_parallel_size
    if mini * n < replicas:
        raise ConfigError(
            f"a mini-batch has {mini} prompts x {n} responses = {mini * n} sequences for a data-parallel size of "
            f"{replicas}: some ranks would have none; use actor_rollout_ref.actor.ppo_mini_batch_size of at least "
            f"{-(-replicas // n)} prompts, or at most {mini * n * actor.megatron.model_parallel_size} ranks"
        )


def _check_token_limits(config: RunConfig) -> None:
    """A micro-batch holds the longest sequence that there can be."""
    section = config.actor_rollout_ref
    actor, rollout, ref = section.actor, section.rollout, section.ref
    limits = {
        "actor.ppo_max_token_len_per_gpu": actor.ppo_max_token_len_per_gpu if actor.use_dynamic_bsz else None,
        "rollout.log_prob_max_token_len_per_gpu": (
            rollout.log_prob_max_token_len_per_gpu if rollout.log_prob_use_dynamic_bsz else None
        ),
        "ref.log_prob_max_token_len_per_gpu": (
            ref.log_prob_max_token_len_per_gpu if ref.log_prob_use_dynamic_bsz else None
        ),
    }
    cp_size = actor.megatron.context_parallel_size
    prompt, response = config.data.max_prompt_length, config.data.max_response_length
    for name, limit in limits.items():
        if limit is not None and limit * cp_size < prompt + response:
            raise ConfigError(
                f"actor_rollout_ref.{name} {limit} x context_parallel_size {cp_size} = {limit * cp_size} tokens: a "
                f"micro-batch cannot hold the longest sequence, data.max_prompt_length {prompt} + "
                f"data.max_response_length {response} = {prompt + response}; use at least "
                f"{-(-(prompt + response) // cp_size)}"
            )


def _check_groups(config: RunConfig) -> None:
    n, min_valid = config.actor_rollout_ref.rollout.n, config.algorithm.filter_groups.min_valid
    if min_valid is not None and min_valid > n:
        raise ConfigError(
            f"algorithm.filter_groups.min_valid is {min_valid}, more than the actor_rollout_ref.rollout.n = {n} "
            f"responses of a group; use at most {n}"
        )
    buffer, longest = config.reward_model.overlong_buffer, config.data.max_response_length
    if buffer.enable and buffer.len > longest:
        raise ConfigError(
            f"reward_model.overlong_buffer.len is {buffer.len} tokens, more than data.max_response_length {longest}: "
            f"the buffer is the last part of a response; use at most {longest}"
        )


def _check_kl_in_reward(config: RunConfig) -> None:
    if config.algorithm.use_kl_in_reward and config.actor_rollout_ref.actor.old_log_prob == "first_minibatch_free":
        raise ConfigError(
            "algorithm.use_kl_in_reward is true and actor_rollout_ref.actor.old_log_prob is first_minibatch_free: the "
            "KL of the first mini-batch's rewards needs log-probs that are not computed; use old_log_prob=recompute, "
            "or a KL in the loss (actor.use_kl_loss)"
        )


def _check_checkpoint(path: str) -> None:
    key = "actor_rollout_ref.model.path"
    wanted = "wanted a folder with a Hugging Face checkpoint: config.json, *.safetensors and a tokenizer"
    if not path:
        raise ConfigError(f"{key} is not given: {wanted}")
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(f"{key} is {path}, which is no folder: {wanted}; a checkpoint of the hub is downloaded first")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{key} is {path}, which has no config.json: {wanted}")
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(f"{key} is {path}, which has no *.safetensors: {wanted}")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ConfigError(f"{key} is {path}, which has none of {', '.join(_TOKENIZER_FILES)}: {wanted}")


def _check_exists(key: str, path: str, wanted: str) -> None:
    if not Path(path).expanduser().exists():
        raise ConfigError(f"{key} names {path}, which is not there: wanted {wanted}")


def _multiples(number: int, divisor: int) -> str:
    """The multiples of `divisor` next to `number`, in words."""
    below = number // divisor * divisor
    return f"{below} or {below + divisor}" if below else str(divisor)
