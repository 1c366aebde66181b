"""`megatron-dapo plan CONFIG key=value --gpu h800 --nodes 16`: does it fit, how long is a step, what is faster."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoConfig

from megatron_dapo.config.load import LoadedConfig
from megatron_dapo.config.tree import ConfigError, RunConfig
from megatron_dapo.exit_codes import DONE, FAILED
from megatron_dapo.mcore.families import ModelShape, shape_of
from megatron_dapo.plan.hardware import load_cluster
from megatron_dapo.plan.planner import Planner
from megatron_dapo.plan.report import layout_row, plan_values, print_plan, print_search
from megatron_dapo.plan.search import search
from megatron_dapo.plan.workload import fit

_COLUMNS = 120  # that tables take, also where the output is no terminal, which counts as 80


def run_plan(loaded: LoadedConfig, console: Console, options: argparse.Namespace) -> int:
    """Exit code 0 if it fits, 1 if not. Raises ConfigError where there is no plan."""
    config = loaded.config
    cluster = load_cluster(options.hardware, options.gpu, options.nodes, options.gpus_per_node, options.assume)
    limit, n = config.data.max_response_length, config.actor_rollout_ref.rollout.n
    workload = fit(options.samples, limit, n) if options.samples else None
    planner = Planner(read_model(config), cluster, workload)
    plan = planner.plan(config)
    console = Console(width=max(console.width, _COLUMNS))
    print_plan(plan, cluster, console)
    values = plan_values(plan, cluster)
    if options.search:
        result = search(planner, config)
        print_search(result.best, result.fitting, console)
        best = [layout_row(found) for found in result.best]
        values["search"] = {"tried": result.tried, "fitting": result.fitting, "best": best}
    if options.json:
        _write(options.json, values)
    return DONE if plan.memory.fits else FAILED


def read_model(config: RunConfig) -> ModelShape:
    """From `config.json` alone: weights and tokenizer need not be there.

    Raises:
        ConfigError: there is none, or it is of a model that is not supported.
    """
    path = Path(config.actor_rollout_ref.model.path)
    if not (path / "config.json").is_file():
        raise ConfigError(
            f"actor_rollout_ref.model.path is {str(path)!r}, which has no config.json: wanted a folder with a Hugging "
            "Face model's config.json; a plan needs nothing else of it"
        )
    return shape_of(AutoConfig.from_pretrained(path))


def _write(path: str, values: dict[str, Any]) -> None:
    try:
        Path(path).write_text(json.dumps(values, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"--json {path} cannot be written: {error}") from error
