"""From a configuration to a run: the workers of each rank, and on the driver the trainer around them.

The one place that knows which parts there are. Choosing by name happens in visible tables; here they are put together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from megatron_dapo.algo.loss import PolicyLossConfig
from megatron_dapo.algo.overlong import overlong_penalty
from megatron_dapo.checkpoints.of_run import RunCheckpoints
from megatron_dapo.config.convert import to_dict
from megatron_dapo.config.tree import ConfigError, RunConfig
from megatron_dapo.data.dynamic_sampling import DynamicSampler, SamplerSettings
from megatron_dapo.data.generation import GroupRollout
from megatron_dapo.data.prompts import PromptDataset, load_prompts
from megatron_dapo.data.stream import PromptStream
from megatron_dapo.engines import make_engine, ranks_per_engine
from megatron_dapo.evaluation import Evaluator
from megatron_dapo.interrupts import Interrupts
from megatron_dapo.manifest import SIDE
from megatron_dapo.mcore.fused_loss import Objective
from megatron_dapo.mcore.hf_save import copy_side_files
from megatron_dapo.mcore.model import DTYPES
from megatron_dapo.obs.loggers import Loggers
from megatron_dapo.obs.run_info import RunInfo
from megatron_dapo.obs.samples import SampleLog
from megatron_dapo.obs.timers import Timers
from megatron_dapo.rewards.guarded import GuardedPool
from megatron_dapo.rewards.pool import RewardPool
from megatron_dapo.rewards.table import RewardTask, VerifierSpec
from megatron_dapo.runtime.group import WorkerError, WorkerGroup
from megatron_dapo.runtime.host import WorkerHost
from megatron_dapo.sync.embedded import CheckpointSync
from megatron_dapo.sync.restoring import RestoringSync
from megatron_dapo.sync.survey import Ranks
from megatron_dapo.sync.transports import make_weight_sync
from megatron_dapo.sync.verify import Probe, VerifiedSync
from megatron_dapo.trainer import Trainer
from megatron_dapo.training_step import StepRules, final_rewards
from megatron_dapo.types import IntArray, Prompt, SamplingParams
from megatron_dapo.workers.passes import MicroBatchLimits
from megatron_dapo.workers.policy import PolicySettings, PolicyWorker
from megatron_dapo.workers.policy_group import PassLimits, PolicyGroup
from megatron_dapo.workers.reference import ReferenceWorker
from megatron_dapo.workers.reference_group import OwnReference, Reference, SharedReference
from megatron_dapo.workers.rollout import RolloutFleet, RolloutWorker
from megatron_dapo.workers.turns import Turns

# How far an engine's log-probs may be from the policy's: other kernels, the same weights.
_PROBE_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}


@dataclass(frozen=True)
class Datasets:
    train: PromptDataset
    val: PromptDataset | None
    reports: tuple[str, ...]  # what was found in the files, a line a set


def load_datasets(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Datasets:
    train, report = load_prompts(config.data.train_files, tokenizer, config.data)
    reports, val = [f"train: {report}"], None
    if config.data.val_files:
        val, report = load_prompts(config.data.val_files, tokenizer, config.data)
        reports.append(f"val: {report}")
    return Datasets(train, val, tuple(reports))


def load_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(config.actor_rollout_ref.model.path)


def build_host(config: RunConfig) -> WorkerHost:
    """The workers of this rank; collective over all ranks."""
    host = WorkerHost()
    host.add(PolicyWorker(policy_settings(config)))
    host.add(RolloutWorker(make_engine(config)))
    return host


def build_policy_host(config: RunConfig) -> WorkerHost:
    """This rank where engines have ranks of their own; collective over all ranks of the policy."""
    host = WorkerHost()
    host.add(PolicyWorker(policy_settings(config)))
    return host


def build_reference_host(config: RunConfig) -> WorkerHost:
    """This rank with the frozen reference alone; collective over all ranks of the reference."""
    host = WorkerHost()
    host.add(ReferenceWorker(policy_settings(config)))
    return host


def build_rollout_host(config: RunConfig) -> WorkerHost:
    """This rank with an engine alone, which has no weights yet."""
    host = WorkerHost()
    host.add(RolloutWorker(make_engine(config)))
    return host


def policy_settings(config: RunConfig) -> PolicySettings:
    section = config.actor_rollout_ref
    actor = section.actor
    clip = actor.gspo if actor.gspo.enable else actor
    return PolicySettings(
        model_path=section.model.path,
        packed=section.model.use_remove_padding,
        megatron=actor.megatron,
        optim=actor.optim,
        grad_clip=actor.grad_clip,
        objective=Objective(
            PolicyLossConfig(clip.clip_ratio_low, clip.clip_ratio_high, actor.clip_ratio_c),
            temperature=section.rollout.temperature,
            tis_cap=actor.rollout_correction.tis_cap,
            ratio="sequence" if actor.gspo.enable else "token",
            entropy_coeff=actor.entropy_coeff,
            kl_coef=actor.kl_loss_coef if actor.kl_in_loss else 0.0,
            kl_kind=actor.kl_loss_type,
        ),
        seed=config.data.seed,
        with_reference=config.shares_reference,
    )


@contextmanager
def building_trainer(
    config: RunConfig,
    ranks: Ranks,
    reference_ranks: WorkerGroup | None,
    datasets: Datasets,
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
) -> Iterator[Trainer]:
    """The trainer, restored from its checkpoint where the configuration says so. Leaving ends what it started.

    `reference_ranks`: of a reference with ranks of its own.
    """
    directory = Path(config.trainer.default_local_dir)
    (directory / SIDE).mkdir(parents=True, exist_ok=True)
    copy_side_files(config.actor_rollout_ref.model.path, directory / SIDE)  # for `export`, without the first model
    total_steps = training_steps(config, len(datasets.train))
    limits = _limits(config)
    policy = PolicyGroup(ranks.policy, limits)
    reference = OwnReference(reference_ranks, limits.reference) if reference_ranks else SharedReference(policy)
    checkpoints = RunCheckpoints.of(config, policy, console)
    found = checkpoints.find(config.trainer.resume_mode)
    first_step = 0 if found is None else found.meta.step + 1
    interrupts = Interrupts()
    sync = _weight_sync(config, ranks, policy, partial(console.print, markup=False, highlight=False))
    engine = RolloutFleet(ranks.engines, interrupts.check, sync.restore, ranks.engine_every)
    with ExitStack() as stack:
        stack.callback(_close_engines, ranks.engines)
        pool: RewardPool[Any] = stack.enter_context(_reward_pool(config))
        expected = config.data.train_batch_size * config.actor_rollout_ref.rollout.n
        scorer = GuardedPool(pool, config.reward_model.max_failure_rate, expected)
        info = RunInfo(
            directory=directory,
            project=config.trainer.project_name,
            experiment=config.trainer.experiment_name,
            first_step=first_step,
            total_steps=total_steps,
            config=to_dict(config),
            console=console,
            logger_ids={} if found is None else found.state["loggers"],
        )
        decode = _decoder(tokenizer)
        trainer = Trainer(
            config=config.trainer,
            optim=config.actor_rollout_ref.actor.optim,
            rules=StepRules(config.actor_rollout_ref.actor, config.algorithm, config.reward_model),
            total_steps=total_steps,
            policy=policy,
            reference=reference,
            engine=engine,
            sampler=_sampler(config, datasets.train, engine, scorer, decode, policy, reference),
            sync=sync,
            turns=_turns(config, ranks, policy, engine),
            evaluator=None if datasets.val is None else _evaluator(config, datasets.val, engine, pool, decode),
            scorer=scorer,
            loggers=stack.enter_context(Loggers(config.trainer.logger, info)),
            sample_log=SampleLog(directory / "samples.jsonl", config.trainer.log_samples, decode, first_step),
            timers=Timers(),
            interrupts=interrupts,
            make_saver=partial(checkpoints.saver, config.trainer),
        )
        stack.callback(trainer.sample_log.close)
        ranks.policy.on_stall(lambda aside: trainer.saver.last_will(lambda: PolicyGroup(aside, limits)))
        if found is not None:
            same_layout = trainer.restore(found)
            how = "" if same_layout else f"; it was saved on another layout ({found.meta.layout}): fresh random streams"
            checkpoints.report(f"resuming after step {trainer.progress.step} from {found.path}{how}")
        stack.enter_context(interrupts.watched())
        yield trainer


@contextmanager
def building_evaluator(
    config: RunConfig, group: WorkerGroup, prompts: PromptDataset, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Evaluator[RewardTask]]:
    """An evaluator of the checkpoint's own weights."""
    sync = RestoringSync(CheckpointSync(group, config.actor_rollout_ref.model.path), group, print)
    engine = RolloutFleet(group, lambda: None, sync.restore, ranks_per_engine(config))
    with ExitStack() as stack:
        stack.callback(_close_engines, group)
        sync.push(0)
        pool = stack.enter_context(_reward_pool(config))
        yield _evaluator(config, prompts, engine, pool, _decoder(tokenizer))


def _close_engines(group: WorkerGroup) -> None:
    """Where the ranks still listen; servers of those that do not end with them."""
    with suppress(WorkerError, RuntimeError):
        group.call_all(RolloutWorker.close)


def training_steps(config: RunConfig, prompts: int) -> int:
    """`total_training_steps`, else what the epochs give if no group is dropped.

    Raises:
        ConfigError: there are too few prompts for a single step.
    """
    if config.trainer.total_training_steps is not None:
        return config.trainer.total_training_steps
    steps = config.trainer.total_epochs * prompts // config.data.train_batch_size
    if steps == 0:
        raise ConfigError(
            f"{prompts} prompts x {config.trainer.total_epochs} epochs are fewer than one step's "
            f"data.train_batch_size = {config.data.train_batch_size}; lower it or add prompts"
        )
    return steps


def _limits(config: RunConfig) -> PassLimits:
    """How much a micro-batch of each pass holds. Context parallelism spreads one over several GPUs."""
    section = config.actor_rollout_ref
    actor, megatron = section.actor, section.actor.megatron
    multiple = megatron.pipeline_model_parallel_size if megatron.virtual_pipeline_model_parallel_size else 1
    hidden_size = AutoConfig.from_pretrained(section.model.path).hidden_size

    def limits(by_tokens: bool, tokens_per_gpu: int | None, name: str) -> MicroBatchLimits:
        if not by_tokens and actor.ppo_micro_batch_size_per_gpu is None:
            raise ConfigError(
                f"actor_rollout_ref.{name} is false, so micro-batches count sequences, and "
                "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu is not set; set it, or use tokens"
            )
        tokens = (tokens_per_gpu or actor.ppo_max_token_len_per_gpu) * megatron.context_parallel_size
        return MicroBatchLimits(
            tokens=tokens if by_tokens else None,
            sequences=None if by_tokens else actor.ppo_micro_batch_size_per_gpu,
            multiple_of=multiple,
            quadratic=1 / (12 * hidden_size),
        )

    rollout, ref = section.rollout, section.ref
    return PassLimits(
        update=limits(actor.use_dynamic_bsz, None, "actor.use_dynamic_bsz"),
        log_prob=limits(
            rollout.log_prob_use_dynamic_bsz,
            rollout.log_prob_max_token_len_per_gpu,
            "rollout.log_prob_use_dynamic_bsz",
        ),
        reference=limits(
            ref.log_prob_use_dynamic_bsz, ref.log_prob_max_token_len_per_gpu, "ref.log_prob_use_dynamic_bsz"
        ),
    )


def _turns(config: RunConfig, ranks: Ranks, policy: PolicyGroup, engine: RolloutFleet) -> Turns:
    section = config.actor_rollout_ref
    sleeps = ranks.colocated and section.rollout.free_cache_engine
    return Turns(policy, engine, section.actor.offload if ranks.colocated else (), sleeps)


def _weight_sync(config: RunConfig, ranks: Ranks, policy: PolicyGroup, say: Callable[[str], None]) -> VerifiedSync:
    section = config.actor_rollout_ref
    settings, dtype = section.rollout.weight_sync, section.actor.megatron.params_dtype
    tolerance = _PROBE_TOLERANCE[dtype] if settings.probe_tolerance is None else settings.probe_tolerance
    probe = Probe(
        vocab_size=AutoConfig.from_pretrained(section.model.path).vocab_size,
        prompt_tokens=min(8, config.data.max_prompt_length),
        response_tokens=min(8, config.data.max_response_length),
        temperature=section.rollout.temperature,
        tolerance=tolerance,
    )
    return make_weight_sync(ranks, policy, settings, DTYPES[dtype], probe, say)


def _reward_pool(config: RunConfig) -> RewardPool[Any]:
    section = config.reward_model
    spec = VerifierSpec.from_config(section, config.custom_reward_function)
    return RewardPool(spec, section.num_workers, section.timeout, section.max_retries)


def _decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[IntArray], str]:
    def decode(token_ids_R: IntArray) -> str:
        return str(tokenizer.decode(token_ids_R, skip_special_tokens=True))

    return decode


def _reward_task(prompt: Prompt, response: str) -> RewardTask:
    return RewardTask(response, prompt.ground_truth, prompt.data_source, prompt.extra_info)


def _sampler(
    config: RunConfig,
    prompts: PromptDataset,
    engine: RolloutFleet,
    scorer: GuardedPool,
    decode: Callable[[IntArray], str],
    policy: PolicyGroup,
    reference: Reference,
) -> DynamicSampler[RewardTask]:
    data, rollout, filter_groups = config.data, config.actor_rollout_ref.rollout, config.algorithm.filter_groups
    buffer = config.reward_model.overlong_buffer

    def penalty(length: int) -> float:
        if not buffer.enable:
            return 0.0
        return float(overlong_penalty(length, data.max_response_length, buffer.len, buffer.penalty_factor))

    on_final_reward = filter_groups.enable and filter_groups.metric == "seq_final_reward"
    finalize = partial(final_rewards, policy=policy, reference=reference, config=config.algorithm)
    epochs = config.trainer.total_epochs if config.trainer.total_training_steps is None else None
    return DynamicSampler(
        PromptStream(prompts, data.seed, data.shuffle, epochs),
        GroupRollout(
            engine=engine,
            scorer=scorer,
            make_task=_reward_task,
            decode=decode,
            overlong_penalty=penalty,
            params=SamplingParams(data.max_response_length, rollout.temperature, rollout.top_p, rollout.top_k),
            n=rollout.n,
            seed=data.seed,
        ),
        SamplerSettings(
            filter=filter_groups,
            train_batch_size=data.train_batch_size,
            gen_batch_size=data.gen_batch_size or data.train_batch_size,
            mini_batch_size=config.actor_rollout_ref.actor.ppo_mini_batch_size,
        ),
        finalize=finalize if on_final_reward else None,
    )


def _evaluator(
    config: RunConfig,
    prompts: PromptDataset,
    engine: RolloutFleet,
    pool: RewardPool[Any],
    decode: Callable[[IntArray], str],
) -> Evaluator[RewardTask]:
    return Evaluator(
        prompts,
        engine,
        pool,
        _reward_task,
        decode,
        config.actor_rollout_ref.rollout.val_kwargs,
        config.data.max_response_length,
        config.data.seed,
    )
