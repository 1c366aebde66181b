"""Which of a generation batch's groups are kept, and the counts of what happened to the others.

The rule itself is `algo.filter.is_informative`; here is what it is asked of, and the groups that never get so far.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_dapo.algo.filter import is_informative
from megatron_dapo.config.tree import FilterGroupsConfig
from megatron_dapo.data.generation import ClosedDraw
from megatron_dapo.data.sampling_stats import SamplingStats
from megatron_dapo.types import Group, Sample

Finalize = Callable[[list[Group]], list[Group]]  # the same groups in the same order, with their final rewards


class UnknownMetricError(ValueError):
    """algorithm.filter_groups.metric names a number that the reward function does not return."""


@dataclass(frozen=True)
class Verdict:
    """accepted: in draw order. again: dataset positions of prompts to draw once more."""

    accepted: tuple[Group, ...]
    again: tuple[int, ...]
    stats: SamplingStats


def judge(closed: Sequence[ClosedDraw], rule: FilterGroupsConfig, min_valid: int, finalize: Finalize | None) -> Verdict:
    """Keep, in draw order, the groups with at least `min_valid` samples whose metric is not the same for all of them.

    With the filter off every group with enough samples is kept. `finalize` runs once, before the filter.

    Raises:
        UnknownMetricError: see `metric_values`.
        ValueError: `finalize` lost, added or reordered groups or samples.
    """
    short = [c for c in closed if len(c.samples) < min_valid]
    groups = [_group(c) for c in closed if len(c.samples) >= min_valid]
    if finalize is not None and groups:
        finals = finalize(groups)
        if _shape(finals) != _shape(groups):
            raise ValueError(f"finalize was given {len(groups)} groups and returned others; return them all, in order")
        groups = finals
    uniform = [g for g in groups if rule.enable and not is_informative(metric_values(g.samples, rule.metric))]
    dropped = {g.draw_index for g in uniform}
    accepted = tuple(g for g in groups if g.draw_index not in dropped)
    stats = SamplingStats(
        prompts_drawn=len(closed),
        prompts_redrawn=sum(c.draw.again for c in closed),
        generation_batches=1,
        groups_generated=len(closed),
        groups_accepted=len(accepted),
        groups_uniform=len(uniform),
        groups_short=len(short),
        groups_all_right=sum(_all_acc(g, 1.0) for g in groups),
        groups_all_wrong=sum(_all_acc(g, 0.0) for g in groups),
        groups_uniform_other=sum(not _all_acc(g, 1.0) and not _all_acc(g, 0.0) for g in uniform),
    )
    again = tuple(c.draw.prompt.index for c in short if not c.draw.again)
    return Verdict(accepted, again, stats + _sample_stats(closed))


def metric_values(samples: Sequence[Sample], metric: str) -> list[float]:
    """What the filter looks at: "seq_reward" is score + overlong penalty, "seq_final_reward" the final reward,
    anything else a number that the reward function returned.

    Raises:
        UnknownMetricError: a sample lacks it, or it is not finite.
    """
    if metric == "seq_reward":
        values = [s.result.score + s.overlong_penalty for s in samples]
    elif metric == "seq_final_reward":
        values = [s.reward for s in samples]
    else:
        for sample in samples:
            if metric not in sample.result.metrics:
                raise UnknownMetricError(
                    f"algorithm.filter_groups.metric={metric}, and the reward function returned only "
                    f"{', '.join(sorted(sample.result.metrics)) or 'nothing'} for draw {sample.completion.draw_index}; "
                    "choose one of those, seq_reward or seq_final_reward"
                )
        values = [s.result.metrics[metric] for s in samples]
    if not all(map(math.isfinite, values)):
        raise UnknownMetricError(
            f"algorithm.filter_groups.metric={metric} is not finite for draw {samples[0].completion.draw_index}: "
            f"{values}; a group cannot be judged by it, so the reward function must return a number"
        )
    return values


def _group(closed: ClosedDraw) -> Group:
    oldest = min(s.completion.weight_version for s in closed.samples)
    return Group(closed.draw.draw_index, closed.draw.prompt, closed.samples, oldest)


def _shape(groups: Sequence[Group]) -> list[tuple[int, int]]:
    return [(g.draw_index, len(g.samples)) for g in groups]


def _all_acc(group: Group, value: float) -> bool:
    return all(s.result.metrics.get("acc") == value for s in group.samples)


def _sample_stats(closed: Sequence[ClosedDraw]) -> SamplingStats:
    results = [s.result for c in closed for s in c.samples]
    failures = Counter(failure for c in closed for failure in c.failures)
    return SamplingStats(
        samples_scored=len(results),
        samples_unparsable=sum(r.status == "unparsable" for r in results),
        samples_timeout=failures["timeout"],
        samples_error=failures["error"],
        samples_abort=failures["abort"],
        aborts_retried=sum(c.retries for c in closed),
        acc_sum=math.fsum(r.metrics.get("acc", 0.0) for r in results),
        score_sum=math.fsum(r.score for r in results),
    )
