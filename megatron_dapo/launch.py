"""Whole runs: in this process alone, over the ranks that torchrun started, or over Ray's actors. What drives is one."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from megatron_dapo.assembly import (
    build_host,
    build_policy_host,
    build_reference_host,
    build_rollout_host,
    building_evaluator,
    building_trainer,
    load_datasets,
    load_tokenizer,
)
from megatron_dapo.checkpoints.errors import DamagedCheckpointError, ForeignCheckpointError
from megatron_dapo.config.tree import ConfigError, RunConfig
from megatron_dapo.data.dynamic_sampling import SamplingExhausted
from megatron_dapo.data.files import PromptDataError
from megatron_dapo.data.judging import UnknownMetricError
from megatron_dapo.data.prompts import load_prompts
from megatron_dapo.data.stream import OtherPromptsError
from megatron_dapo.engines import ranks_per_engine
from megatron_dapo.exit_codes import FAILED, write_exit_status
from megatron_dapo.mcore.parallel import shutdown
from megatron_dapo.obs.summary import write_summary
from megatron_dapo.rewards.failure_rate import RewardFailureRateError
from megatron_dapo.rewards.pool import RewardWorkerError
from megatron_dapo.rollout.failures import EngineFailedError, PortInUseError
from megatron_dapo.runtime.cluster import ClusterError
from megatron_dapo.runtime.group import WorkerError, WorkerGroup
from megatron_dapo.runtime.host import WorkerHost
from megatron_dapo.runtime.placement import PlacementError
from megatron_dapo.runtime.spmd import SpmdControl
from megatron_dapo.sync.errors import WeightSyncError
from megatron_dapo.sync.restoring import EnginesKeepFailingError
from megatron_dapo.sync.survey import Ranks
from megatron_dapo.trainer import TrainingDivergedError
from megatron_dapo.types import CheckpointError
from megatron_dapo.workers.policy_group import CheckpointWriteError

# What a user can act on: the message says all, a traceback would say less.
ENDINGS = (
    CheckpointError,
    CheckpointWriteError,
    ClusterError,
    DamagedCheckpointError,
    ForeignCheckpointError,
    EngineFailedError,
    EnginesKeepFailingError,
    OtherPromptsError,
    PlacementError,
    PortInUseError,
    PromptDataError,
    RewardFailureRateError,
    RewardWorkerError,
    SamplingExhausted,
    TrainingDivergedError,
    UnknownMetricError,
    WeightSyncError,
    WorkerError,
)

Build = Callable[[RunConfig], WorkerHost]  # the workers of one rank
Workers = Callable[[], Sequence[WorkerGroup]]  # builds them all: one group for each `Build`


def train(config: RunConfig, console: Console) -> None:
    """Train; the final weights go to `<default_local_dir>/hf` as a Hugging Face checkpoint."""
    started = time.monotonic()
    builds = (build_host,) if config.runtime.colocate else (build_policy_host, build_rollout_host)
    if config.actor_rollout_ref.ref.own_ranks:
        builds += (build_reference_host,)
    RUNTIMES[config.runtime.name](config, builds, lambda workers: _drive(config, workers, console, started))


def evaluate(config: RunConfig, console: Console) -> None:
    """Evaluate the checkpoint at `model.path`; the numbers also go to `<default_local_dir>/eval.json`."""
    if not config.data.val_files:
        raise ConfigError("data.val_files is empty: name the files to evaluate on")
    RUNTIMES[config.runtime.name](config, (build_rollout_host,), lambda workers: _evaluate(config, workers, console))


def _on_spmd(config: RunConfig, builds: Sequence[Build], drive: Callable[[Workers], None]) -> None:
    (build,) = builds
    at_forced_end = partial(write_exit_status, Path(config.trainer.default_local_dir), FAILED)
    stall_seconds = config.trainer.stall_seconds
    with SpmdControl.connect(stall_seconds=stall_seconds, at_forced_end=at_forced_end) as control:
        if control.is_driver:
            drive(lambda: [control.group(build(config))])
        else:
            control.serve(build(config))
    shutdown()


def _on_ray(config: RunConfig, builds: Sequence[Build], drive: Callable[[Workers], None]) -> None:
    try:
        from megatron_dapo.runtime.ray import RayRuntime, Share
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"runtime.name is ray and {error.name} is not installed: pip install 'megatron_dapo[ray]'"
        ) from error
    runtime, trainer, section = config.runtime, config.trainer, config.actor_rollout_ref
    rollout, ref = section.rollout, section.ref

    def share(build: Build) -> Share:
        if build is build_reference_host:
            return Share(ref.nnodes, ref.n_gpus_per_node or 1, partial(build, config), name="reference")
        if runtime.colocate or build is not build_rollout_host:
            name = "policy" if len(builds) > 1 else ""
            return Share(trainer.nnodes or 1, trainer.n_gpus_per_node or 1, partial(build, config), name=name)
        width = rollout.tensor_model_parallel_size
        ranks = (rollout.n_gpus_per_node or width) // width
        return Share(rollout.nnodes or 1, ranks, partial(build, config), devices_per_rank=width, name="engines")

    shares = [share(build) for build in builds]
    with RayRuntime.connect(runtime.address, runtime.placement_timeout, stall_seconds=trainer.stall_seconds) as cluster:
        drive(lambda: cluster.groups(shares))


# Name -> where the workers that `builds` make live, and who drives them.
RUNTIMES = {"spmd": _on_spmd, "ray": _on_ray}


def _drive(config: RunConfig, workers: Workers, console: Console, started: float) -> None:
    tokenizer = load_tokenizer(config)
    datasets = load_datasets(config, tokenizer)
    for line in datasets.reports:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    directory = Path(config.trainer.default_local_dir)
    groups = workers()
    engines = groups[0 if config.runtime.colocate else 1]
    reference = groups[-1] if config.actor_rollout_ref.ref.own_ranks else None
    ranks = Ranks(policy=groups[0], engines=engines, engine_every=ranks_per_engine(config))
    with building_trainer(config, ranks, reference, datasets, tokenizer, console) as trainer:
        progress = trainer.fit()
        trainer.policy.save_hf(str(directory / "hf"))
    write_summary(
        directory / "summary.json",
        {
            "steps": progress.step,
            "updates": progress.updates,
            "seconds": time.monotonic() - started,
            "seed": config.data.seed,
        },
    )
    console.print(f"{progress.step} steps done; weights in {directory / 'hf'}", markup=False, highlight=False)


def _evaluate(config: RunConfig, workers: Workers, console: Console) -> None:
    tokenizer = load_tokenizer(config)
    prompts, report = load_prompts(config.data.val_files, tokenizer, config.data)
    console.print(f"val: {report}", markup=False, highlight=False, soft_wrap=True)
    (group,) = workers()
    with building_evaluator(config, group, prompts, tokenizer) as evaluator:
        metrics = evaluator.run(step=0).metrics()
    for name, value in metrics.items():
        console.print(f"{name:<40} {value:.4f}", markup=False, highlight=False)
    out = Path(config.trainer.default_local_dir) / "eval.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(metrics, indent=1) + "\n")
    console.print(f"written to {out}", markup=False, highlight=False)
