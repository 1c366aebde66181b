"""Whole runs over the ranks that torchrun started, or in this process alone."""

from __future__ import annotations

import json
import time
from pathlib import Path

from rich.console import Console

from megatron_dapo.assembly import (
    build_host,
    build_rollout_host,
    building_evaluator,
    building_trainer,
    load_datasets,
    load_tokenizer,
)
from megatron_dapo.config.tree import ConfigError, RunConfig
from megatron_dapo.data.dynamic_sampling import SamplingExhausted
from megatron_dapo.data.files import PromptDataError
from megatron_dapo.data.judging import UnknownMetricError
from megatron_dapo.data.prompts import load_prompts
from megatron_dapo.mcore.parallel import shutdown
from megatron_dapo.obs.summary import write_summary
from megatron_dapo.rewards.failure_rate import RewardFailureRateError
from megatron_dapo.rewards.pool import RewardWorkerError
from megatron_dapo.rollout.failures import EngineFailedError, PortInUseError
from megatron_dapo.runtime.group import WorkerError
from megatron_dapo.runtime.spmd import SpmdControl
from megatron_dapo.sync.restoring import EnginesKeepFailingError
from megatron_dapo.trainer import TrainingDivergedError
from megatron_dapo.types import CheckpointError

# What a user can act on: the message says all, a traceback would say less.
ENDINGS = (
    CheckpointError,
    EngineFailedError,
    EnginesKeepFailingError,
    PortInUseError,
    PromptDataError,
    RewardFailureRateError,
    RewardWorkerError,
    SamplingExhausted,
    TrainingDivergedError,
    UnknownMetricError,
    WorkerError,
)


def train(config: RunConfig, console: Console) -> None:
    """Train; the final weights go to `<default_local_dir>/hf` as a Hugging Face checkpoint."""
    started = time.monotonic()
    with SpmdControl.connect() as control:
        if not control.is_driver:
            control.serve(build_host(config))
        else:
            _drive(config, control, console, started)
    shutdown()


def _drive(config: RunConfig, control: SpmdControl, console: Console, started: float) -> None:
    tokenizer = load_tokenizer(config)
    datasets = load_datasets(config, tokenizer)
    for line in datasets.reports:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    directory = Path(config.trainer.default_local_dir)
    with building_trainer(config, control.group(build_host(config)), datasets, tokenizer, console) as trainer:
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


def evaluate(config: RunConfig, console: Console) -> None:
    """Evaluate the checkpoint at `model.path`; the numbers also go to `<default_local_dir>/eval.json`."""
    if not config.data.val_files:
        raise ConfigError("data.val_files is empty: name the files to evaluate on")
    with SpmdControl.connect() as control:
        host = build_rollout_host(config)
        if not control.is_driver:
            control.serve(host)
            return
        tokenizer = load_tokenizer(config)
        prompts, report = load_prompts(config.data.val_files, tokenizer, config.data)
        console.print(f"val: {report}", markup=False, highlight=False, soft_wrap=True)
        with building_evaluator(config, control.group(host), prompts, tokenizer) as evaluator:
            metrics = evaluator.run(step=0).metrics()
        for name, value in metrics.items():
            console.print(f"{name:<40} {value:.4f}", markup=False, highlight=False)
        out = Path(config.trainer.default_local_dir) / "eval.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(metrics, indent=1) + "\n")
        console.print(f"written to {out}", markup=False, highlight=False)
