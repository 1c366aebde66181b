"""Which layouts, settings, models and objectives the invariance tests run.

`TELLING` is chosen by hand for `make test`. `matrix()` is the whole of what 8 processes allow: every layout, each with
variants of the other settings, so that any two values of two settings meet at least once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, product
from random import Random
from typing import Any, Literal

from megatron_dapo.config.tree import MegatronConfig
from tests.functional.layout_problem import FORMULAS, Formula, Problem
from tests.functional.oracle import Answer

Gradients = Literal["plain", "plain overlapped", "distributed", "distributed overlapped"]

MODELS = tuple(f"{family}{tied}" for family in ("qwen2", "qwen3", "llama") for tied in ("", " tied"))
LAYERS = 4
WORLDS = (1, 2, 4, 8)
LR, CLIP = 1.0, 0.5  # of the steps of plain gradient descent
TOLERANCE = 1e-5  # in fp32, of everything
Deviations = dict[str, float]


@dataclass(frozen=True)
class Case:
    """One model and objective on one layout. `virtual` counts a rank's interleaved pipeline stages."""

    tp: int = 1
    sp: bool = False
    pp: int = 1
    virtual: int | None = None
    cp: int = 1
    dp: int = 1
    packed: bool = True
    micro_batches: Literal["one", "many"] = "one"
    recompute: bool = False
    gradients: Gradients = "plain"
    model: str = "qwen2"
    formula: str = "token-mean global"
    steps: int = 1
    bf16: bool = False
    fault: str | None = None

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def layers(self) -> int:
        return max(LAYERS, self.pp * (self.virtual or 1))

    @property
    def name(self) -> str:
        parts = [
            f"TP{self.tp}" * (self.tp > 1) + "SP" * self.sp,
            f"PP{self.pp}" * (self.pp > 1) + f"x{self.virtual}" * (self.virtual is not None),
            f"CP{self.cp}" * (self.cp > 1),
            f"DP{self.dp}" * (self.dp > 1),
        ]
        settings = [
            "packed" if self.packed else "padded",
            self.micro_batches,
            "recompute" * self.recompute,
            "" if self.gradients == "plain" else self.gradients,
            "bf16" * self.bf16,
            f"{self.steps} steps" * (self.steps > 1),
        ]
        layout = "-".join(filter(None, parts)) or "alone"
        return ", ".join([layout, self.model, self.formula, *filter(None, settings)])

    def megatron(self) -> MegatronConfig:
        recompute: dict[str, Any] = {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
        overlap = self.gradients.endswith("overlapped")
        distributed = self.gradients.startswith("distributed")
        return MegatronConfig(
            tensor_model_parallel_size=self.tp,
            sequence_parallel=self.sp,
            pipeline_model_parallel_size=self.pp,
            virtual_pipeline_model_parallel_size=self.virtual,
            context_parallel_size=self.cp,
            use_distributed_optimizer=distributed,
            overlap_grad_reduce=overlap,
            overlap_param_gather=overlap and distributed,
            params_dtype="bfloat16" if self.bf16 else "float32",
            **(recompute if self.recompute else {}),
        )


@dataclass(frozen=True)
class Job:
    """A case with all that the ranks need for it, and what they should find."""

    case: Case
    model_path: str
    problem: Problem
    formula: Formula
    answer: Answer
    sequences_per_micro_batch: int = 2  # where the case has many


def layouts() -> Iterator[Case]:
    """Every layout that 8 processes allow."""
    tensor = [(1, False), (2, False), (2, True), (4, False), (4, True)]
    pipeline = [(1, None), (2, None), (2, 2), (4, None), (4, 2)]
    for (tp, sp), (pp, virtual), cp, dp in product(tensor, pipeline, (1, 2), (1, 2)):
        case = Case(tp=tp, sp=sp, pp=pp, virtual=virtual, cp=cp, dp=dp)
        if case.world <= max(WORLDS):
            yield case


LAYOUT_SETTINGS = ("tp", "sp", "pp", "virtual", "cp", "dp")
OTHER_SETTINGS: dict[str, tuple[Any, ...]] = {
    "packed": (True, False),
    "micro_batches": ("one", "many"),
    "recompute": (False, True),
    "gradients": ("plain", "plain overlapped", "distributed", "distributed overlapped"),
    "model": MODELS,
    "formula": tuple(FORMULAS),
    "steps": (1, 2),
}
Pair = tuple[str, Any, str, Any]


def pairs(case: Case) -> set[Pair]:
    """Each two values of settings that meet in a case, but for two that are both of the layout."""
    return {
        (one, getattr(case, one), other, getattr(case, other))
        for one, other in combinations((*LAYOUT_SETTINGS, *OTHER_SETTINGS), 2)
        if other in OTHER_SETTINGS
    }


@cache
def matrix() -> tuple[Case, ...]:
    """Every layout twice, packed and padded; of 64 drawn variants the one with most new pairs is taken each time."""
    choices = [dict(zip(OTHER_SETTINGS, values, strict=True)) for values in product(*OTHER_SETTINGS.values())]
    draw, met = Random(0), set[Pair]()
    chosen: list[Case] = []
    for packed, layout in product((True, False), layouts()):
        options = [replace(layout, **choice | {"packed": packed}) for choice in draw.sample(choices, 64)]
        best = max(options, key=lambda case: len(pairs(case) - met))
        met |= pairs(best)
        chosen.append(best)
    return tuple(sorted(chosen, key=lambda case: case.world))


OVERLAPPED: Gradients = "distributed overlapped"

TELLING = (
    Case(model="qwen2 tied", micro_batches="many", formula="overlong filtering"),
    Case(model="qwen3", formula="all terms", recompute=True),
    Case(model="llama", packed=False, micro_batches="many", formula="token-mean group", gradients=OVERLAPPED),
    # Two ranks
    Case(tp=2, model="llama tied", formula="seq-mean-token-sum global"),
    Case(tp=2, sp=True, micro_batches="many", formula="all terms", recompute=True),
    Case(tp=2, sp=True, packed=False, model="qwen3 tied", formula="token-mean group"),
    Case(pp=2, micro_batches="many", model="qwen2 tied", formula="seq-mean-token-mean global"),
    Case(pp=2, packed=False, model="llama"),
    Case(pp=2, virtual=2, micro_batches="many", formula="seq-mean-token-mean group"),
    Case(pp=2, virtual=2, packed=False, model="qwen3 tied", formula="overlong filtering", recompute=True),
    Case(cp=2, model="qwen3", micro_batches="many", formula="token-mean group"),
    Case(cp=2, packed=False, model="qwen2", gradients="distributed"),
    Case(dp=2, model="qwen2 tied", formula="seq-mean-token-sum group", gradients=OVERLAPPED, steps=2),
    Case(dp=2, micro_batches="many", model="llama", gradients="plain overlapped"),
    # Four
    Case(tp=2, sp=True, pp=2, virtual=2, micro_batches="many", model="qwen2 tied", formula="all terms"),
    Case(tp=2, sp=True, cp=2, model="qwen3 tied", formula="seq-mean-token-mean group", gradients=OVERLAPPED),
    Case(pp=2, virtual=2, dp=2, micro_batches="many", gradients=OVERLAPPED, steps=2, formula="token-mean group"),
    Case(tp=4, sp=True, packed=False, model="llama", micro_batches="many"),
    # Eight
    Case(tp=2, sp=True, pp=2, virtual=2, dp=2, model="qwen2 tied", gradients=OVERLAPPED, steps=2),
    Case(tp=2, sp=True, pp=2, cp=2, model="qwen3", micro_batches="many", formula="token-mean group"),
    Case(pp=4, virtual=2, cp=2, packed=False, model="llama tied", recompute=True, gradients="distributed"),
)

BF16 = (
    Case(bf16=True),
    Case(bf16=True, model="llama", packed=False, micro_batches="many", formula="all terms"),
    Case(bf16=True, tp=2, sp=True, model="qwen3 tied", formula="seq-mean-token-mean group"),
    Case(bf16=True, pp=2, virtual=2, micro_batches="many"),
    Case(bf16=True, cp=2, model="llama", formula="all terms"),
    Case(bf16=True, dp=2, gradients=OVERLAPPED),
)

FAULTS = (
    Case(formula="seq-mean-token-mean global", fault="weights off by one sequence"),
    Case(fault="old log-probs off by one token"),
    Case(tp=2, sp=True, fault="missing sequence-parallel reduction"),
    Case(cp=2, fault="extra division by context-parallel size"),
    Case(pp=2, model="qwen2 tied", micro_batches="many", fault="unsynchronised tied embedding"),
    Case(pp=2, virtual=2, micro_batches="many", fault="interleaved chunks in the wrong order"),
    Case(dp=2, gradients=OVERLAPPED, steps=2, fault="weights not gathered"),
    Case(pp=2, virtual=2, dp=2, micro_batches="many", fault="gradients of the first chunk alone reduced"),
)
