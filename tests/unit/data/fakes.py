"""A small engine and a small scorer that finish things in any order they are told to, and datasets for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_dapo.config.tree import FilterGroupsConfig
from megatron_dapo.data.dynamic_sampling import DynamicSampler, SamplerSettings, StepGroups
from megatron_dapo.data.generation import GroupRollout, Key
from megatron_dapo.data.judging import Finalize
from megatron_dapo.data.prompts import PromptDataset
from megatron_dapo.data.sampling_stats import SamplingStats
from megatron_dapo.data.stream import PromptStream
from megatron_dapo.types import Completion, Group, Prompt, Request, RewardResult, SamplingParams

N = 4  # responses a prompt
MAX_TOKENS = 12
Verdict = Callable[[Key, str], RewardResult]


def dataset(size: int) -> PromptDataset:
    return PromptDataset.from_prompts(
        Prompt(index, np.arange(index + 1, index + 4), f"prompt {index}", "fake", str(index), {"index": index})
        for index in range(size)
    )


def graded(acc: float, score: float | None = None, **metrics: float) -> RewardResult:
    value = 2 * acc - 1 if score is None else score
    return RewardResult("ok", value, {"score": value, "acc": acc, **metrics}, pred=f"{acc:g}")


def failed(status: str) -> RewardResult:
    return RewardResult(status, float("nan"), {}, detail="scripted")


def mixed(key: Key, text: str) -> RewardResult:
    """Three draws of six teach something (0, 1, 2); the others are all right (3) or all wrong (4, 5)."""
    draw_index, sample_index = key
    return graded(([float(sample_index % 2)] * 3 + [1.0, 0.0, 0.0])[draw_index % 6])


@dataclass
class ShuffledEngine:
    """Writes what a request's seed says; finishes requests in an order drawn from `order`, a few a poll."""

    order: np.random.Generator
    version: int = 0
    aborts: dict[Key, int] = field(default_factory=dict)  # how often it gives a response up
    interrupt_after: int | None = None  # completions until Ctrl-C
    waiting: list[Request] = field(default_factory=list)
    submitted: list[Request] = field(default_factory=list)

    def submit(self, requests: Sequence[Request]) -> None:
        self.waiting += requests
        self.submitted += requests

    def poll(self) -> list[Completion]:
        if self.interrupt_after is not None:
            self.interrupt_after -= 1
            if self.interrupt_after < 0:
                raise KeyboardInterrupt
        finished = [self._pick() for _ in range(min(int(self.order.integers(0, 9)), len(self.waiting)))]
        return [self._write(request) for request in finished]

    @property
    def pending(self) -> int:
        return len(self.waiting)

    def abort(self) -> None:
        self.waiting.clear()

    def _pick(self) -> Request:
        return self.waiting.pop(int(self.order.integers(len(self.waiting))))

    def _write(self, request: Request) -> Completion:
        key = (request.draw_index, request.sample_index)
        rng = np.random.default_rng(request.seed)
        length = int(rng.integers(1, MAX_TOKENS + 1))
        reason = "length" if length == MAX_TOKENS else "stop"
        if self.aborts.get(key, 0):
            self.aborts[key] -= 1
            reason = "abort"
        return Completion(
            *key,
            token_ids=rng.integers(0, 100, length),
            logprobs=-rng.random(length, dtype=np.float32),
            finish_reason=reason,
            weight_version=self.version,
        )


@dataclass
class ShuffledScorer:
    """Scores by `verdict`, in an order drawn from `order`; a poll that may wait returns something."""

    order: np.random.Generator
    verdict: Verdict
    waiting: list[tuple[Key, str]] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)

    def submit(self, key: Key, task: str) -> None:
        self.waiting.append((key, task))

    def poll(self, wait: float) -> list[tuple[Key, RewardResult]]:
        self.waits.append(wait)
        least = 1 if wait and self.waiting else 0
        count = max(least, int(self.order.integers(0, len(self.waiting) + 1)))
        picked = [self.waiting.pop(int(self.order.integers(len(self.waiting)))) for _ in range(count)]
        return [(key, self.verdict(key, text)) for key, text in picked]

    @property
    def pending(self) -> int:
        return len(self.waiting)


def rollout(
    verdict: Verdict = mixed, order_seed: int = 0, n: int = N, aborts: dict[Key, int] | None = None
) -> GroupRollout[str]:
    return GroupRollout(
        engine=ShuffledEngine(np.random.default_rng(order_seed), aborts=dict(aborts or {})),
        scorer=ShuffledScorer(np.random.default_rng(order_seed + 1), verdict),
        make_task=lambda prompt, text: f"{prompt.index}:{text}",
        decode=lambda ids: " ".join(map(str, ids)),
        overlong_penalty=lambda length: -length / MAX_TOKENS,
        params=SamplingParams(MAX_TOKENS),
        n=n,
        seed=7,
    )


def sampler(
    verdict: Verdict = mixed,
    *,
    order_seed: int = 0,
    prompts: int = 50,
    epochs: int | None = None,
    train_batch_size: int = 8,
    gen_batch_size: int = 12,
    mini_batch_size: int = 4,
    n: int = N,
    aborts: dict[Key, int] | None = None,
    finalize: Finalize | None = None,
    **rule: object,
) -> DynamicSampler[str]:
    """A sampler over fakes; `rule` are settings of filter_groups, which is on."""
    return DynamicSampler(
        PromptStream(dataset(prompts), seed=3, epochs=epochs),
        rollout(verdict, order_seed, n, aborts),
        SamplerSettings(
            FilterGroupsConfig(**{"enable": True, "max_staleness": 100, **rule}),
            train_batch_size,
            gen_batch_size,
            mini_batch_size,
        ),
        finalize,
    )


def bits_of_group(group: Group) -> tuple:
    """All that a group holds, comparable."""
    return (
        group.draw_index,
        group.prompt.index,
        group.weight_version,
        tuple(
            (
                s.completion.sample_index,
                s.completion.token_ids.tobytes(),
                s.completion.logprobs.tobytes(),
                s.completion.finish_reason,
                s.result.status,
                s.result.score,
                tuple(s.result.metrics.items()),
                s.result.pred,
                s.overlong_penalty,
                s.reward,
            )
            for s in group.samples
        ),
    )


def bits(step: StepGroups) -> tuple:
    """All that a step holds, comparable."""
    return tuple(map(bits_of_group, step.groups)), step.stats, step.total, step.exhausted


def row(problem: str, answer: object = "1", **more: object) -> dict[str, object]:
    """A row in the recipe's schema."""
    return {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": problem}],
        "ability": "MATH",
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": {"index": f"id of {problem}"},
        **more,
    }


def steps(source: DynamicSampler[str], count: int) -> list[StepGroups]:
    return [source.collect(version) for version in range(count)]


def draws(step: StepGroups) -> list[int]:
    return [group.draw_index for group in step.groups]


def assert_sums(stats: SamplingStats, n: int = N) -> None:
    assert stats.prompts_drawn == stats.groups_generated
    assert stats.groups_generated == stats.groups_accepted + stats.groups_uniform + stats.groups_short
    assert (
        stats.groups_carried_in + stats.groups_accepted
        == stats.groups_used + stats.groups_carried_out + stats.groups_stale + stats.groups_discarded
    )
    failures = stats.samples_timeout + stats.samples_error + stats.samples_abort
    assert stats.groups_generated * n == stats.samples_scored + failures
