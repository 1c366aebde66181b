"""The planner against step times that others have published of runs of 8B and 32B models.

`python benchmarks/plan_published.py [--json FILE]`: for each run its settings as far as they are known here, what was
published, what the planner says with the assumptions of `plan/hardware.yaml` unchanged, and the ratio. Needs no GPU and
no download. Where another framework splits the model in a way that is not planned here (FSDP), a Megatron layout of the
same number of GPUs is planned; the case says so.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_dapo.config.convert import build
from megatron_dapo.config.tree import RunConfig
from megatron_dapo.mcore.families import FAMILIES, ModelShape
from megatron_dapo.plan.hardware import DEFAULT, load_cluster
from megatron_dapo.plan.planner import Planner
from megatron_dapo.plan.timeline import POLICY

_DENSE = {"tied": False, "norm_eps": 1e-6, "rope_theta": 1e6, "rope_scaling_factor": None, "max_positions": 131072}
LLAMA_8B = ModelShape(FAMILIES["llama"], 32, 4096, 14336, 32, 8, 128, 128256, **_DENSE)
QWEN2_32B = ModelShape(FAMILIES["qwen2"], 64, 5120, 27648, 40, 8, 128, 152064, **_DENSE)
QWEN3_32B = ModelShape(FAMILIES["qwen3"], 64, 5120, 25600, 64, 8, 128, 151936, **_DENSE)


@dataclass(frozen=True)
class Published:
    name: str
    source: str
    seconds: float  # of a step
    shape: ModelShape
    gpu: str
    nodes: int
    assume: tuple[str, ...]
    settings: Mapping[str, Any]
    policy: str = POLICY


_NEMO = "NVIDIA-NeMo/RL, docs/about/performance-summary.md (v0.4) and examples/configs/recipes/llm/performance"
_NEMO_RUN = {
    # A sequence has 4096 tokens in all; prompts of OpenMathInstruct-2 are counted as 100.
    "data.max_prompt_length": 100,
    "data.max_response_length": 3996,
    "data.train_batch_size": 64,
    "actor_rollout_ref.rollout.n": 32,
    "actor_rollout_ref.actor.ppo_mini_batch_size": 16,  # 512 sequences an update
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": 4096,
    "actor_rollout_ref.actor.use_kl_loss": True,
    "actor_rollout_ref.actor.kl_loss_coef": 0.01,
    "actor_rollout_ref.rollout.name": "vllm",
    "actor_rollout_ref.rollout.gpu_memory_utilization": 0.6,
}
RUNS = (
    Published(
        "NeMo RL, Qwen3-32B GRPO, 32 H100",
        f"{_NEMO}, grpo-qwen3-32b-4n8g.yaml: TP4 PP4, vLLM TP4, 2048 sequences of 3206 tokens on average",
        393.0,
        QWEN3_32B,
        "h100",
        4,
        ("prompt_tokens=100", f"response_share={3106 / 3996}"),
        _NEMO_RUN
        | {
            "actor_rollout_ref.rollout.tensor_model_parallel_size": 4,
            "actor_rollout_ref.actor.megatron.tensor_model_parallel_size": 4,
            "actor_rollout_ref.actor.megatron.sequence_parallel": True,
            "actor_rollout_ref.actor.megatron.pipeline_model_parallel_size": 4,
        },
    ),
    Published(
        "NeMo RL, Llama-3.1-8B GRPO, 16 H100",
        f"{_NEMO}, grpo-llama3.1-8b-instruct-2n8g.yaml: PP2, vLLM TP1, 2048 sequences of 1060 tokens on average",
        97.7,
        LLAMA_8B,
        "h100",
        2,
        ("prompt_tokens=100", f"response_share={960 / 3996}"),
        _NEMO_RUN
        | {
            "actor_rollout_ref.actor.megatron.pipeline_model_parallel_size": 2,
            "actor_rollout_ref.actor.megatron.recompute_granularity": "full",
            "actor_rollout_ref.actor.megatron.recompute_method": "uniform",
            "actor_rollout_ref.actor.megatron.recompute_num_layers": 1,
        },
    ),
    Published(
        "verl, DAPO Qwen2.5-32B, 128 A800",
        "github.com/verl-project/verl/issues/795: 230 steps in 5 days, the recipe's settings, FSDP with sequences over "
        "8 GPUs (planned: TP8 PP2); mean response 2400 tokens, of the paper's curve up to that step",
        5 * 86400 / 230,
        QWEN2_32B,
        "a800",
        16,
        (f"response_share={2400 / 20480}",),
        {
            "data.max_prompt_length": 2048,
            "data.max_response_length": 20480,
            "data.train_batch_size": 512,
            "data.gen_batch_size": 1536,
            "data.val_files": ["aime-2024.parquet"],
            "algorithm.filter_groups.enable": True,
            "algorithm.filter_groups.max_num_gen_batches": 10,
            "actor_rollout_ref.rollout.n": 16,
            "actor_rollout_ref.rollout.name": "vllm",
            "actor_rollout_ref.rollout.tensor_model_parallel_size": 4,
            "actor_rollout_ref.rollout.gpu_memory_utilization": 0.8,
            "actor_rollout_ref.rollout.enforce_eager": True,
            "actor_rollout_ref.actor.ppo_mini_batch_size": 32,
            "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": 22528,
            "actor_rollout_ref.actor.megatron.tensor_model_parallel_size": 8,
            "actor_rollout_ref.actor.megatron.sequence_parallel": True,
            "actor_rollout_ref.actor.megatron.pipeline_model_parallel_size": 2,
            "actor_rollout_ref.actor.megatron.recompute_granularity": "full",
            "actor_rollout_ref.actor.megatron.recompute_method": "uniform",
            "actor_rollout_ref.actor.megatron.recompute_num_layers": 1,
            "trainer.test_freq": 5,
        },
        policy="rounds",
    ),
)
_EVERY = {
    "actor_rollout_ref.actor.megatron.params_dtype": "bfloat16",
    "actor_rollout_ref.actor.offload": ["weights", "gradients", "optimizer"],
    "runtime.name": "ray",
}


@dataclass(frozen=True)
class Comparison:
    run: Published
    phases: Mapping[str, float]
    fits: bool

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())

    @property
    def ratio(self) -> float:
        """Planned over published."""
        return self.seconds / self.run.seconds


def compare(run: Published) -> Comparison:
    config = build(RunConfig, {**_EVERY, **run.settings})
    planner = Planner(run.shape, load_cluster(DEFAULT, run.gpu, run.nodes, 8, run.assume))
    plan = planner.plan(config, policies=tuple({POLICY, run.policy}), exact=False)
    phases = dict(plan.timeline.phases) | {"rollout": plan.policies[run.policy].seconds}
    return Comparison(run, phases, plan.memory.fits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    found = [compare(run) for run in RUNS]
    table = Table("run", "published, s", "planned, s", "planned / published", "rollout", "log-probs", "updates", "fits")
    for one in found:
        logps = one.phases["old log-probs"] + one.phases["reference log-probs"]
        parts = [one.run.seconds, one.seconds]
        shown = [one.phases["rollout"], logps, one.phases["updates"]]
        table.add_row(
            one.run.name,
            *[f"{value:.0f}" for value in parts],
            f"{one.ratio:.2f}",
            *[f"{value:.0f}" for value in shown],
            "yes" if one.fits else "no",
        )
    Console().print(table)
    if options.json is not None:
        rows = [
            {"run": one.run.name, "source": one.run.source, "published": one.run.seconds, "planned": dict(one.phases)}
            for one in found
        ]
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
