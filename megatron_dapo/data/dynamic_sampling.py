"""Dynamic sampling: groups that teach something, a training step's worth at a time.

Prompts are drawn in generation batches, a batch's groups are judged when all of them are closed, and more is drawn
until enough are accepted. So what is accepted depends on draw order alone, never on what finished first, and how much
is drawn depends on groups that are closed. Engine, scorer and the rest of the world come in through `GroupRollout`.
Source: DAPO, arXiv 2503.14476, eq. 11 and algorithm 1; adaptive demand and carried groups are this project's.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Generic

from megatron_dapo.config.tree import FilterGroupsConfig
from megatron_dapo.data.demand import PassRate
from megatron_dapo.data.generation import Draw, GroupRollout, Task
from megatron_dapo.data.group_state import group_from_state, group_state
from megatron_dapo.data.judging import Finalize, judge
from megatron_dapo.data.sampling_stats import SamplingStats
from megatron_dapo.data.stream import PromptStream
from megatron_dapo.types import Group

logger = logging.getLogger(__name__)


class SamplingExhausted(RuntimeError):  # noqa: N818
    """A step's generation batches brought too few groups. The message holds the counts and the remedies."""

    def __init__(self, message: str, stats: SamplingStats):
        super().__init__(message)
        self.stats = stats


@dataclass(frozen=True)
class SamplerSettings:
    """Sizes count prompts. `max_num_gen_batches` allows that many times `gen_batch_size` prompts a step, in however
    many generation batches: one that the pass rate made small costs only what it drew."""

    filter: FilterGroupsConfig
    train_batch_size: int
    gen_batch_size: int
    mini_batch_size: int

    @property
    def budget(self) -> int | None:
        """Prompts that may be drawn in a step; None without a limit."""
        limited = self.filter.enable and self.filter.max_num_gen_batches > 0
        return self.filter.max_num_gen_batches * self.gen_batch_size if limited else None


@dataclass(frozen=True)
class StepGroups:
    """What one training step trains on: `train_batch_size` groups in draw order, carried ones first.

    Fewer where sampling was exhausted. `exhausted`: the run ends after these groups (there may be none), because the
    policy says stop or the dataset's epochs are over.
    """

    groups: tuple[Group, ...]
    stats: SamplingStats  # of this step
    total: SamplingStats  # of the run, this step included
    exhausted: bool


@dataclass(frozen=True)
class _Progress:
    """All that the sampler remembers between steps, but for the stream's position."""

    next_draw: int = 0
    again: tuple[int, ...] = ()  # dataset positions of prompts to be drawn once more
    carried: tuple[Group, ...] = ()
    rate: PassRate = field(default_factory=PassRate)
    total: SamplingStats = field(default_factory=SamplingStats)


class DynamicSampler(Generic[Task]):
    """Hands out accepted groups, a step's worth a call.

    `finalize` is for the metric "seq_final_reward" alone: it is given a generation batch's groups once they are all
    closed and returns them with their final rewards.

    Raises:
        ValueError: `finalize` is missing where it is needed, or given where it is not; `min_valid` is over n.
    """

    def __init__(
        self,
        stream: PromptStream,
        rollout: GroupRollout[Task],
        settings: SamplerSettings,
        finalize: Finalize | None = None,
    ):
        rule = settings.filter
        if (rule.enable and rule.metric == "seq_final_reward") != (finalize is not None):
            raise ValueError(
                f"algorithm.filter_groups.metric={rule.metric} (enable={rule.enable}) "
                f"{'came with' if finalize else 'needs'} a finalize callable; it belongs to seq_final_reward alone"
            )
        self._min_valid = rollout.n if rule.min_valid is None else rule.min_valid
        if self._min_valid > rollout.n:
            raise ValueError(
                f"algorithm.filter_groups.min_valid={rule.min_valid} with rollout.n={rollout.n}; it must be at most n"
            )
        self._stream = stream
        self._rollout = rollout
        self._settings = settings
        self._finalize = finalize
        self._progress = _Progress()

    @property
    def total(self) -> SamplingStats:
        """Counters of the run so far."""
        return self._progress.total

    def collect(self, weight_version: int) -> StepGroups:
        """The next step's groups, written by the policy of `weight_version` or carried from at most `max_staleness`
        versions before.

        If engine, scorer or Ctrl-C interrupts it, the sampler is as it was before the call; after
        SamplingExhausted it holds the groups accepted, to be carried.

        Raises:
            SamplingExhausted: the budget is spent, and `on_exhausted` is "error", or "carry" without one full
                mini-batch.
            UnknownMetricError: the filter's metric is none that the reward function returns.
        """
        before, position = self._progress, self._stream.state_dict()
        try:
            ready, stats = self._gather(weight_version)
        except BaseException:
            self._progress = before
            self._stream.load_state_dict(position)
            raise
        return self._hand_out(ready, stats)

    def state_dict(self) -> dict[str, Any]:
        """Numbers, text, lists and numpy arrays."""
        at = self._progress
        return {
            "next_draw": at.next_draw,
            "again": list(at.again),
            "carried": [group_state(group) for group in at.carried],
            "rate": asdict(at.rate),
            "total": asdict(at.total),
            "stream": self._stream.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            ValueError: the prompt stream is another one.
        """
        self._stream.load_state_dict(state["stream"])
        self._progress = _Progress(
            next_draw=state["next_draw"],
            again=tuple(state["again"]),
            carried=tuple(group_from_state(group, self._stream.prompts) for group in state["carried"]),
            rate=PassRate(**state["rate"]),
            total=SamplingStats(**state["total"]),
        )

    def _gather(self, weight_version: int) -> tuple[list[Group], SamplingStats]:
        settings, carried = self._settings, self._progress.carried
        ready = [g for g in carried if weight_version - g.weight_version <= settings.filter.max_staleness]
        stats = SamplingStats(groups_carried_in=len(carried), groups_stale=len(carried) - len(ready))
        while len(ready) < settings.train_batch_size:
            draws = self._draw(self._demand(settings.train_batch_size - len(ready), stats.prompts_drawn))
            if not draws:
                break
            verdict = judge(self._rollout.run(draws), settings.filter, self._min_valid, self._finalize)
            ready += verdict.accepted
            stats += verdict.stats
            self._progress = replace(
                self._progress,
                again=self._progress.again + verdict.again,
                rate=self._progress.rate.after(len(draws), len(verdict.accepted), settings.gen_batch_size),
            )
            logger.info(
                "generation batch %d: %d of %d groups accepted, %d of %d there",
                stats.generation_batches,
                len(verdict.accepted),
                len(draws),
                len(ready),
                settings.train_batch_size,
            )
        return ready, stats

    def _demand(self, missing: int, drawn: int) -> int:
        """Prompts that the next generation batch draws; 0 when budget or dataset is spent."""
        settings, remaining = self._settings, self._stream.remaining
        if settings.filter.enable:
            wanted = self._progress.rate.demand(missing, settings.gen_batch_size)
        else:
            wanted = min(missing, settings.gen_batch_size)
        if settings.budget is not None:
            wanted = min(wanted, settings.budget - drawn)
        return wanted if remaining is None else min(wanted, remaining + len(self._progress.again))

    def _draw(self, count: int) -> list[Draw]:
        """Prompts to be drawn once more come first."""
        at = self._progress
        again = at.again[:count]
        prompts = [self._stream.prompts[position] for position in again]
        prompts += [self._stream.next() for _ in range(count - len(again))]
        self._progress = replace(at, next_draw=at.next_draw + count, again=at.again[len(again) :])
        return [Draw(at.next_draw + i, prompt, i < len(again)) for i, prompt in enumerate(prompts)]

    def _hand_out(self, ready: list[Group], stats: SamplingStats) -> StepGroups:
        settings, policy = self._settings, self._settings.filter.on_exhausted
        full = len(ready) >= settings.train_batch_size
        data_over = not full and self._stream.remaining == 0 and not self._progress.again
        whole = len(ready) // settings.mini_batch_size * settings.mini_batch_size
        if full:
            used = settings.train_batch_size
        elif data_over or policy == "carry":
            used = whole
        else:
            used = 0
        discard = full and settings.filter.surplus == "discard"
        rest = tuple(ready[used:])
        stats += SamplingStats(
            groups_used=used,
            groups_discarded=len(rest) if discard else 0,
            groups_carried_out=0 if discard else len(rest),
        )
        self._progress = replace(self._progress, carried=() if discard else rest, total=self._progress.total + stats)
        exhausted = data_over or (not full and policy == "stop")
        if not full and not exhausted and not used:
            raise SamplingExhausted(self._exhaustion(len(ready), stats), stats)
        return StepGroups(tuple(ready[:used]), stats, self._progress.total, exhausted)

    def _exhaustion(self, accepted: int, stats: SamplingStats) -> str:
        settings, rule = self._settings, self._settings.filter
        return (
            f"{accepted} of {settings.train_batch_size} groups are there (a mini-batch has {settings.mini_batch_size}) "
            f"after {stats.prompts_drawn} prompts in {stats.generation_batches} generation batches, all that "
            f"max_num_gen_batches={rule.max_num_gen_batches} x gen_batch_size={settings.gen_batch_size} allow. Of "
            f"{stats.groups_generated} groups {stats.groups_all_right} were all right, {stats.groups_all_wrong} all "
            f"wrong, {stats.groups_uniform_other} else uniform in {rule.metric}, {stats.groups_short} short of "
            f"{self._min_valid} scored responses (samples: {stats.samples_timeout} timeouts, {stats.samples_error} "
            f"errors, {stats.samples_abort} aborts). Raise algorithm.filter_groups.max_num_gen_batches, take prompts "
            f"that are {'harder' if stats.groups_all_right > stats.groups_all_wrong else 'easier'} for this model, "
            "lower data.train_batch_size and actor.ppo_mini_batch_size, or repair the reward if many are short"
        )
