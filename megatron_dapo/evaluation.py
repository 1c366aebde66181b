"""Evaluation of the policy as it is: n responses a prompt, scored, as avg@k, pass@k and cons@k with 95 % intervals.

Rows with the same data source, prompt and ground truth are one problem: a file that holds each problem 32 times, with
n = 1, gives avg@32. A response that could not be scored (the reward failed or ran out of time, the engine gave it up)
counts as wrong, with no prediction, and is counted apart: leaving it out would raise the accuracy by what broke.
Writing and scoring are `data/generation.py`'s, the estimates `algo/estimates.py`'s.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from megatron_dapo.algo.estimates import Estimate, Estimates, evaluate_problem_set
from megatron_dapo.config.tree import ConfigError, ValKwargsConfig
from megatron_dapo.data.generation import ClosedDraw, Draw, Engine, GroupRollout, Scorer
from megatron_dapo.types import IntArray, Prompt, Sample, SamplingParams

Task = TypeVar("Task")

ALL = "all"  # what all data sources together are called


@dataclass(frozen=True)
class SourceReport:
    """One data source, or all together. Shares and lengths are of the responses with a score; NaN where none has."""

    estimates: Estimates
    responses: int
    failed: int  # without a score, counted as wrong
    unparsable_share: float
    length_mean: float  # tokens
    truncated_share: float

    def metrics(self, source: str) -> dict[str, float]:
        """`val/<source>/avg@k` and its siblings, each with `_low` and `_high`."""
        found = self.estimates
        named: dict[str, Estimate] = {f"avg@{found.k}": found.avg, f"cons@{found.k}": found.cons}
        named |= {f"pass@{k}": estimate for k, estimate in found.pass_at.items()}
        metrics = {
            f"{name}{end}": value
            for name, estimate in named.items()
            for end, value in (("", estimate.value), ("_low", estimate.low), ("_high", estimate.high))
        }
        metrics |= {
            "problems": found.problems,
            "responses": self.responses,
            "failed": self.failed,
            "unparsable_share": self.unparsable_share,
            "length_mean": self.length_mean,
            "truncated_share": self.truncated_share,
        }
        return {f"val/{source}/{name}": value for name, value in metrics.items()}


@dataclass(frozen=True)
class EvalReport:
    """What the policy of training step `step` can do."""

    step: int
    sources: Mapping[str, SourceReport]  # in the order of the dataset
    overall: SourceReport  # every problem counts alike, whatever its source

    def metrics(self) -> dict[str, float]:
        """Flat names; `val/all/...` where there are several data sources."""
        reports = dict(self.sources) if len(self.sources) == 1 else {**self.sources, ALL: self.overall}
        return {name: value for source, report in reports.items() for name, value in report.metrics(source).items()}


class Evaluator(Generic[Task]):
    """Evaluates on `prompts`; every call draws with the same seeds, whatever training did in between.

    `make_task` and `decode` are as for `GroupRollout`. With `val_kwargs.do_sample` false decoding is greedy.

    Raises:
        ValueError: no prompt, or a data source named "all" beside others.
        ConfigError: see `sampling_params`.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        engine: Engine,
        scorer: Scorer[Task],
        make_task: Callable[[Prompt, str], Task],
        decode: Callable[[IntArray], str],
        val_kwargs: ValKwargsConfig,
        max_response_length: int,
        run_seed: int,
    ):
        sources = {prompt.data_source for prompt in prompts}
        if not sources:
            raise ValueError("there is no prompt to evaluate on; name data.val_files that hold some")
        if len(sources) > 1 and ALL in sources:
            raise ValueError(f"a data source is named {ALL!r}, as all of them together are in the metrics; rename it")
        self._draws = [Draw(index, prompt) for index, prompt in enumerate(prompts)]
        self._engine, self._scorer = engine, scorer
        self._rollout = GroupRollout(
            engine=engine,
            scorer=scorer,
            make_task=make_task,
            decode=decode,
            overlong_penalty=lambda length: 0.0,
            params=sampling_params(val_kwargs, max_response_length),
            n=val_kwargs.n,
            seed=evaluation_seed(run_seed),
        )

    def run(self, step: int) -> EvalReport:
        """Write and score all responses. `step` is only noted.

        Raises:
            RuntimeError: engine or scorer still work on something else.
            ValueError: the reward does not tell whether a response is right.
        """
        if self._engine.pending or self._scorer.pending:
            raise RuntimeError(
                f"evaluation wants engine and scorer for itself, but {self._engine.pending} responses are being "
                f"written and {self._scorer.pending} scored; finish or abort them first"
            )
        closed = self._rollout.run(self._draws)
        by_source: dict[str, list[ClosedDraw]] = {}
        for draw in closed:
            by_source.setdefault(draw.draw.prompt.data_source, []).append(draw)
        return EvalReport(step, {source: report(draws) for source, draws in by_source.items()}, report(closed))


def sampling_params(val_kwargs: ValKwargsConfig, max_response_length: int) -> SamplingParams:
    """Temperature 0 and no cut of the distribution where `do_sample` is false.

    Raises:
        ConfigError: several responses a prompt would be written greedily, all the same.
    """
    if not val_kwargs.do_sample:
        if val_kwargs.n > 1:
            raise ConfigError(
                f"actor_rollout_ref.rollout.val_kwargs.n is {val_kwargs.n} and do_sample is false: greedy decoding "
                f"writes the same response {val_kwargs.n} times; use n=1, or do_sample=true"
            )
        return SamplingParams(max_response_length, temperature=0.0)
    return SamplingParams(max_response_length, val_kwargs.temperature, val_kwargs.top_p, val_kwargs.top_k)


def evaluation_seed(run_seed: int) -> int:
    """A seed apart from training's, so that a prompt in both is not answered alike: 63 bits of BLAKE2b."""
    return int.from_bytes(hashlib.blake2b(f"{run_seed} val".encode(), digest_size=8).digest(), "big") >> 1


def report(draws: Iterable[ClosedDraw]) -> SourceReport:
    """The estimates over the problems among `draws`, and what became of their responses."""
    problems: dict[tuple[str, bytes, str], list[ClosedDraw]] = {}
    for closed in draws:
        prompt = closed.draw.prompt
        key = (prompt.data_source, prompt.token_ids.tobytes(), prompt.ground_truth)
        problems.setdefault(key, []).append(closed)
    correct, preds = [], []
    samples: list[Sample] = []
    failed = 0
    for rows in problems.values():
        scored = [sample for closed in rows for sample in closed.samples]
        without = sum(len(closed.failures) for closed in rows)
        correct.append(np.array([_is_right(sample) for sample in scored] + [False] * without))
        preds.append([sample.result.pred for sample in scored] + [""] * without)
        samples += scored
        failed += without
    reasons = Counter(sample.completion.finish_reason for sample in samples)
    statuses = Counter(sample.result.status for sample in samples)
    scored_count = len(samples) or np.nan
    return SourceReport(
        estimates=evaluate_problem_set(correct, preds),
        responses=len(samples) + failed,
        failed=failed,
        unparsable_share=statuses["unparsable"] / scored_count,
        length_mean=sum(sample.length for sample in samples) / scored_count,
        truncated_share=reasons["length"] / scored_count,
    )


def _is_right(sample: Sample) -> bool:
    """`acc` is 1; part of a point is not right."""
    metrics = sample.result.metrics
    if "acc" not in metrics:
        raise ValueError(
            f"evaluation wants acc (1 right, 0 wrong) of every response, but the reward returns {sorted(metrics)}; "
            "let the reward function return acc too"
        )
    return metrics["acc"] == 1
