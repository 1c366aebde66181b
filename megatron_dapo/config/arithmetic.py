"""The arithmetic of a run, each number with its unit and where it comes from; `--dry-run` prints it.

Counts only: memory and seconds are not estimated here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_dapo.config.tree import RunConfig


@dataclass(frozen=True)
class Line:
    """One number; text where there is none, such as "no limit"."""

    name: str
    value: int | float | str
    unit: str
    derivation: str


def run_arithmetic(
    config: RunConfig, world_size: int, num_prompts: int | None, num_val_prompts: int | None = None
) -> list[Line]:
    """Every count of a run on `world_size` ranks, one GPU each; `config` has passed `check`.

    `num_prompts`, `num_val_prompts`: rows of the datasets after filtering, None where they are not known. "At most"
    in a name is a bound; other numbers are exact as long as no group is left out for failed responses.
    """
    counts = _Counts(config, world_size)
    return [
        *_generation(config, counts),
        *_updates(config, counts),
        *_layout(config, counts),
        *_run(config, counts, num_prompts),
        *_evaluation(config, num_val_prompts),
    ]


def format_arithmetic(lines: Sequence[Line]) -> str:
    """Aligned columns: name, value, unit, derivation."""
    values = [line.value if isinstance(line.value, str) else f"{line.value:,}" for line in lines]
    name_width = max(len(line.name) for line in lines)
    value_width = max(len(value) for value in values)
    unit_width = max(len(line.unit) for line in lines)
    return "\n".join(
        f"{line.name:<{name_width}}  {value:>{value_width}}  {line.unit:<{unit_width}}  {line.derivation}".rstrip()
        for line, value in zip(lines, values, strict=True)
    )


class _Counts:
    """The numbers that more than one part needs."""

    def __init__(self, config: RunConfig, world_size: int) -> None:
        actor = config.actor_rollout_ref.actor
        self.n = config.actor_rollout_ref.rollout.n
        self.gen_prompts = config.data.gen_batch_size or config.data.train_batch_size
        self.step_prompts = config.data.train_batch_size
        self.mini_prompts = actor.ppo_mini_batch_size
        self.updates = self.step_prompts // self.mini_prompts * actor.ppo_epochs
        self.world_size = world_size
        self.dp_size = world_size // actor.megatron.model_parallel_size
        self.cp_size = actor.megatron.context_parallel_size
        self.rank_sequences = _ceil(self.mini_prompts * self.n, self.dp_size)


def _generation(config: RunConfig, counts: _Counts) -> Iterator[Line]:
    n, gen = counts.n, counts.gen_prompts
    source = "data.train_batch_size" if config.data.gen_batch_size is None else "data.gen_batch_size"
    yield Line("generation batch", gen, "prompts", source)
    yield Line("generation batch", gen * n, "responses", f"{gen} prompts x rollout.n {n}")
    filtering = config.algorithm.filter_groups
    if not filtering.enable:
        batches = _ceil(counts.step_prompts, gen)
        yield Line("generation batches a step", batches, "generation batches", "groups are not filtered")
    elif filtering.max_num_gen_batches > 0:
        most = filtering.max_num_gen_batches
        limit = "filter_groups.max_num_gen_batches"
        yield Line("generation batches a step, at most", most, "generation batches", limit)
        yield Line("prompts drawn a step, at most", most * gen, "prompts", f"{most} x {gen}")
        yield Line("responses a step, at most", most * gen * n, "responses", f"{most} x {gen} x {n}")
    else:
        why = f"filter_groups.max_num_gen_batches is {filtering.max_num_gen_batches}"
        yield Line("generation batches a step, at most", "no limit", "generation batches", why)


def _updates(config: RunConfig, counts: _Counts) -> Iterator[Line]:
    n, step, mini = counts.n, counts.step_prompts, counts.mini_prompts
    epochs = config.actor_rollout_ref.actor.ppo_epochs
    yield Line("training step", step, "prompts", "data.train_batch_size")
    yield Line("training step", step * n, "sequences", f"{step} prompts x rollout.n {n}")
    yield Line("mini-batch", mini, "prompts", "actor.ppo_mini_batch_size")
    yield Line("mini-batch", mini * n, "sequences", f"{mini} prompts x rollout.n {n}")
    yield Line("training step", step // mini, "mini-batches", f"{step} / {mini} prompts")
    yield Line("training step", counts.updates, "optimizer updates", f"{step // mini} x ppo_epochs {epochs}")


def _layout(config: RunConfig, counts: _Counts) -> Iterator[Line]:
    actor = config.actor_rollout_ref.actor
    megatron = actor.megatron
    parts = (
        f"tensor {megatron.tensor_model_parallel_size} x pipeline {megatron.pipeline_model_parallel_size} x "
        f"context {megatron.context_parallel_size}"
    )
    yield Line("world size", counts.world_size, "GPUs", "one rank each")
    yield Line("model-parallel size", megatron.model_parallel_size, "GPUs", parts)
    size = f"{counts.world_size} / {megatron.model_parallel_size}"
    yield Line("data-parallel size", counts.dp_size, "data-parallel ranks", size)
    share = f"{counts.mini_prompts * counts.n} / {counts.dp_size}, rounded up; ranks are balanced by their tokens"
    yield Line("optimizer update, equal lengths", counts.rank_sequences, "sequences a rank", share)

    prompt, response = config.data.max_prompt_length, config.data.max_response_length
    yield Line("sequence, at most", prompt + response, "tokens", f"prompt {prompt} + response {response}")
    sequences = actor.ppo_micro_batch_size_per_gpu
    if actor.use_dynamic_bsz or sequences is None:
        limit = actor.ppo_max_token_len_per_gpu
        yield Line("micro-batch, at most", limit, "tokens a GPU", "actor.ppo_max_token_len_per_gpu")
        whole = f"{limit} x context {counts.cp_size}"
        yield Line("micro-batch, at most", limit * counts.cp_size, "tokens", whole)
    else:
        yield Line("micro-batch, at most", sequences, "sequences", "actor.ppo_micro_batch_size_per_gpu")
    for name, length in (("full-length", prompt + response), ("half-length", prompt + _ceil(response, 2))):
        count, why = _micro_batches(config, counts, length)
        yield Line(f"optimizer update, {name} responses", count, "micro-batches a rank", why)
    tokens = _ceil(counts.updates * counts.rank_sequences * (prompt + response), counts.cp_size)
    split = f"{counts.updates} updates x {counts.rank_sequences} x {prompt + response} / context {counts.cp_size}"
    yield Line("training step, full-length responses", tokens, "tokens a GPU", split)


def _micro_batches(config: RunConfig, counts: _Counts, length: int) -> tuple[int, str]:
    """Micro-batches of one data-parallel rank and update where every sequence has `length` tokens, and why."""
    actor = config.actor_rollout_ref.actor
    sequences = actor.ppo_micro_batch_size_per_gpu
    if actor.use_dynamic_bsz or sequences is None:
        holds = actor.ppo_max_token_len_per_gpu * counts.cp_size // length
    else:
        holds = sequences
    count = _ceil(counts.rank_sequences, holds)
    why = f"{counts.rank_sequences} sequences of {length} tokens, {holds} in a micro-batch"
    if actor.megatron.virtual_pipeline_model_parallel_size is None:
        return count, why
    stages = actor.megatron.pipeline_model_parallel_size
    return _ceil(count, stages) * stages, f"{why}; a multiple of the {stages} stages of the interleaved pipeline"


def _run(config: RunConfig, counts: _Counts, num_prompts: int | None) -> Iterator[Line]:
    steps, why = _training_steps(config, num_prompts)
    filtering = config.algorithm.filter_groups.enable
    bound = ", at most" if filtering else ""
    if filtering and steps is not None:
        why += "; less what filtering drops"
    unknown = "unknown without the data"
    total = None if steps is None else steps * counts.updates
    yield Line(f"run{bound}", unknown if steps is None else steps, "training steps", why)
    yield Line(f"run{bound}", unknown if total is None else total, "optimizer updates", f"x {counts.updates} a step")
    warmup = config.actor_rollout_ref.actor.optim.lr_warmup_steps
    yield Line("learning-rate warmup", warmup, "training steps", "optim.lr_warmup_steps")
    yield Line("learning-rate warmup", warmup * counts.updates, "optimizer updates", f"x {counts.updates} a step")


def _training_steps(config: RunConfig, num_prompts: int | None) -> tuple[int | None, str]:
    epochs, limit = config.trainer.total_epochs, config.trainer.total_training_steps
    batch = config.data.train_batch_size
    if num_prompts is None:
        return limit, f"trainer.total_epochs {epochs}" if limit is None else "trainer.total_training_steps"
    steps = epochs * num_prompts // batch
    if limit is not None and limit < steps:
        return limit, "trainer.total_training_steps"
    return steps, f"total_epochs {epochs} x {num_prompts} prompts / {batch}, rounded down"


def _evaluation(config: RunConfig, num_val_prompts: int | None) -> Iterator[Line]:
    n, freq = config.actor_rollout_ref.rollout.val_kwargs.n, config.trainer.test_freq
    if num_val_prompts is None:
        yield Line("evaluation", n, "responses a prompt", "val_kwargs.n")
    else:
        yield Line("evaluation", num_val_prompts * n, "responses", f"{num_val_prompts} prompts x val_kwargs.n {n}")
    every: int | str = freq if freq > 0 else "never"
    yield Line("evaluation every", every, "training steps", "trainer.test_freq")


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
