"""A plan as text and as plain values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_dapo.plan.hardware import Cluster
from megatron_dapo.plan.planner import Plan
from megatron_dapo.plan.rollout_sim import PolicyOutcome

_GB = 1e9
UNVALIDATED = (
    "Bytes of parameters, gradients and optimizer are exact; activations, engines and all seconds are a model that was "
    "never held against a GPU (docs/planner.md)."
)


def print_plan(plan: Plan, cluster: Cluster, console: Console) -> None:
    _print_head(plan, cluster, console)
    _print_memory(plan, console)
    _print_timeline(plan, console)
    print_policies(plan.policies.values(), console)
    for warning in plan.warnings:
        _line(console, f"! {warning}")
    _print_assumptions(cluster, console)


def print_search(plans: Sequence[Plan], searched: int, console: Console) -> None:
    """The plans in their order, one a line."""
    table = Table(title=f"{len(plans)} fastest of {searched} layouts that fit", title_justify="left")
    for name in ("TP", "PP", "VPP", "CP", "DP", "recompute", "tokens/GPU", "engine TP", "peak GB", "step s", "bubble"):
        table.add_column(name, justify="right")
    for plan in plans:
        table.add_row(*[str(value) for value in layout_row(plan).values()])
    console.print(table)


def layout_row(plan: Plan) -> dict[str, Any]:
    section = plan.config.actor_rollout_ref
    megatron = section.actor.megatron
    return {
        "tensor_model_parallel_size": megatron.tensor_model_parallel_size,
        "pipeline_model_parallel_size": megatron.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": megatron.virtual_pipeline_model_parallel_size or "-",
        "context_parallel_size": megatron.context_parallel_size,
        "data_parallel_size": plan.place.policy // megatron.model_parallel_size,
        "recompute": megatron.recompute_granularity or "-",
        "ppo_max_token_len_per_gpu": section.actor.ppo_max_token_len_per_gpu,
        "rollout_tensor_model_parallel_size": section.rollout.tensor_model_parallel_size,
        "peak_gb": round(plan.memory.peak / _GB, 1),
        "step_seconds": round(plan.timeline.step_seconds),
        "bubble": f"{plan.timeline.training.update_pass.bubble:.0%}",
    }


def plan_values(plan: Plan, cluster: Cluster) -> dict[str, Any]:
    """Plain values, for JSON: bytes, seconds, tokens."""
    memory, times = plan.memory, plan.timeline
    return {
        "layout": layout_row(plan),
        "cluster": {"gpu": cluster.gpu, "nodes": cluster.nodes, "gpus_per_node": cluster.gpus_per_node},
        "card": asdict(cluster.card),
        "assumptions": dict(cluster.assumptions.items()),
        "workload": asdict(plan.workload),
        "memory": {
            "fits": memory.fits,
            "usable": memory.usable,
            "host": memory.host_bytes,
            "engine": asdict(memory.engine),
            "stages": [
                {
                    "stage": stage.stage,
                    "held": asdict(stage.held),
                    "phases": {k: dict(v) for k, v in stage.phases.items()},
                }
                for stage in memory.stages
            ],
        },
        "seconds": dict(times.phases) | {"step": times.step_seconds},
        "training": asdict(times.training),
        "run": {"steps": times.steps, "gpu_hours": times.gpu_hours},
        "policies": {name: _outcome(outcome) for name, outcome in plan.policies.items()},
        "warnings": list(plan.warnings),
        "validated": UNVALIDATED,
    }


def print_policies(outcomes: Iterable[PolicyOutcome], console: Console) -> None:
    table = Table(title="Rollout of a step by policy", title_justify="left")
    for name in ("policy", "s", "batches", "prompts", "M tokens", "dropped", "discarded", "length bias", "sent away"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    for outcome in outcomes:
        table.add_row(
            outcome.policy,
            f"{outcome.seconds:.0f}",
            f"{outcome.batches:.1f}",
            f"{outcome.prompts:.0f}",
            f"{outcome.written / 1e6:.1f}",
            f"{outcome.dropped_share:.0%}",
            f"{outcome.discarded_share:.0%}",
            f"{outcome.length_bias:+.1%}",
            f"{outcome.preemptions:.0f}",
        )
    console.print(table)


def _print_head(plan: Plan, cluster: Cluster, console: Console) -> None:
    row, load = layout_row(plan), plan.workload
    verdict = "fits" if plan.memory.fits else "DOES NOT FIT"
    _line(
        console,
        f"{cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu}: TP{row['tensor_model_parallel_size']} "
        f"PP{row['pipeline_model_parallel_size']} CP{row['context_parallel_size']} DP{row['data_parallel_size']}, "
        f"{plan.place.engines} engines of {plan.place.rollout // plan.place.engines}: {verdict} "
        f"({plan.memory.peak / _GB:.1f} of {plan.memory.usable / _GB:.1f} GB), "
        f"{plan.timeline.step_seconds:.0f} s a step",
    )
    _line(
        console,
        f"assumed: prompts of {load.prompt} tokens, responses of {load.mean:.0f} on average (at most {load.limit}), "
        f"{load.kept_share:.0%} of groups kept",
    )


def _print_memory(plan: Plan, console: Console) -> None:
    stages = plan.memory.stages
    table = Table(title="Memory of a GPU, GB, by phase and pipeline stage", title_justify="left")
    table.add_column("")
    for stage in stages:
        table.add_column(f"stage {stage.stage}", justify="right")
    for phase in stages[0].phases:
        table.add_row(f"[bold]{phase}", *[f"[bold]{stage.total(phase) / _GB:.1f}" for stage in stages])
        for part in dict.fromkeys(part for stage in stages for part in stage.phases[phase]):
            table.add_row(f"  {part}", *[f"{stage.phases[phase].get(part, 0) / _GB:.1f}" for stage in stages])
    if not plan.memory.colocated:
        table.add_row("[bold]an engine's GPU", f"[bold]{plan.memory.engine.awake / _GB:.1f}")
    console.print(table)
    _line(
        console,
        f"there is {plan.memory.usable / _GB:.1f} GB beside the reserve; an engine's cache holds "
        f"{plan.memory.engine.cache_tokens:,} tokens; host memory {plan.memory.host_bytes / _GB:.1f} GB a GPU",
    )


def _print_timeline(plan: Plan, console: Console) -> None:
    times = plan.timeline
    table = Table(title="A training step, seconds", title_justify="left")
    for name in ("phase", "s", "share"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for phase, seconds in times.phases.items():
        if seconds:
            table.add_row(phase, f"{seconds:.0f}", f"{seconds / times.step_seconds:.0%}")
    table.add_row("[bold]step", f"[bold]{times.step_seconds:.0f}", "")
    console.print(table)
    training = times.training
    _line(
        console,
        f"an update: {training.update_pass.micro_batches} micro-batches a rank, {training.update_pass.seconds:.1f} s, "
        f"bubble {training.update_pass.bubble:.0%}; of all updates {training.gradient_sync:.0f} s gradients and "
        f"weights between ranks, {training.optimizer:.1f} s Adam",
    )
    _line(
        console,
        f"{times.steps} steps: {times.steps * times.step_seconds / 3600:.0f} h, {times.gpu_hours:,.0f} GPU-hours",
    )


def _print_assumptions(cluster: Cluster, console: Console) -> None:
    card = cluster.card
    _line(
        console,
        f"{cluster.gpu}: {card.memory / _GB:.1f} GB, "
        f"{card.bf16_flops / 1e12:.0f} TFLOP/s, HBM {card.hbm / 1e12:.2f} TB/s, NVLink {card.nvlink / _GB:.0f} and "
        f"network {card.network / _GB:.0f} GB/s one way ({card.source})",
    )
    _line(console, "assumptions: " + ", ".join(f"{name} {value:g}" for name, value in cluster.assumptions.items()))
    _line(console, UNVALIDATED)


def _outcome(outcome: PolicyOutcome) -> dict[str, Any]:
    return {name: value for name, value in vars(outcome).items() if name != "steps"}


def _line(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
