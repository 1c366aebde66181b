"""The loop: sample groups, prepare, update, give the engines the new weights; evaluate, save, log.

How ranks are scheduled, which engine writes and where metrics go is settled before a trainer is made (`assembly.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_dapo.checkpoints.resume import Found
from megatron_dapo.checkpoints.saver import Saver, Snapshot
from megatron_dapo.checkpoints.store import MODEL
from megatron_dapo.config.tree import OptimConfig, TrainerConfig
from megatron_dapo.data.dynamic_sampling import DynamicSampler, SamplingExhausted, StepGroups
from megatron_dapo.evaluation import Evaluator
from megatron_dapo.interrupts import Interrupts
from megatron_dapo.mcore.optimizer import learning_rate
from megatron_dapo.obs.loggers import Loggers
from megatron_dapo.obs.memory import memory_metrics
from megatron_dapo.obs.metrics import (
    group_metrics,
    sampling_metrics,
    throughput_metrics,
    update_metrics,
)
from megatron_dapo.obs.samples import SampleLog
from megatron_dapo.obs.timers import Timers
from megatron_dapo.rewards.failure_rate import RewardFailureRateError
from megatron_dapo.rewards.guarded import GuardedPool
from megatron_dapo.sync.embedded import WeightSync
from megatron_dapo.sync.errors import WeightSyncError
from megatron_dapo.sync.restoring import EnginesKeepFailingError
from megatron_dapo.training_step import PreparedStep, StepRules, prepare_step
from megatron_dapo.workers.policy_group import PolicyGroup, UpdateResult
from megatron_dapo.workers.reference_group import Reference
from megatron_dapo.workers.rollout import RolloutFleet
from megatron_dapo.workers.turns import Turns


class TrainingDivergedError(RuntimeError):
    """Too many updates in a row with a loss or gradient that is not finite. The state was saved."""


# The policy is sound in all these cases.
_SAVED_FIRST = (
    KeyboardInterrupt,
    SystemExit,
    TrainingDivergedError,
    SamplingExhausted,
    RewardFailureRateError,
    WeightSyncError,
    EnginesKeepFailingError,
)


@dataclass(frozen=True)
class Progress:
    """What the loop itself remembers between steps."""

    step: int = 0  # training steps done
    updates: int = 0  # optimizer updates applied
    bad_updates: int = 0  # in a row, at the end

    @property
    def weight_version(self) -> int:
        """The version of the weights that write the next step's responses."""
        return self.step

    def after(self, updates: Sequence[UpdateResult]) -> Progress:
        """One training step later."""
        good = [update.applied for update in updates]
        trailing_bad = next((i for i, applied in enumerate(reversed(good)) if applied), None)
        bad = self.bad_updates + len(good) if trailing_bad is None else trailing_bad
        return Progress(self.step + 1, self.updates + sum(good), bad)


@dataclass
class Trainer:
    """One run. `fit` is all there is to call."""

    config: TrainerConfig
    optim: OptimConfig
    rules: StepRules
    total_steps: int
    policy: PolicyGroup
    reference: Reference
    engine: RolloutFleet
    sampler: DynamicSampler[Any]
    sync: WeightSync
    turns: Turns
    evaluator: Evaluator[Any] | None
    scorer: GuardedPool
    loggers: Loggers
    sample_log: SampleLog
    timers: Timers
    interrupts: Interrupts
    make_saver: Callable[[Callable[[], Snapshot]], Saver]
    progress: Progress = Progress()
    saved: bool = False  # the state as it stands is in a checkpoint, or on its way there

    def __post_init__(self) -> None:
        self.saver = self.make_saver(self._snapshot)

    def fit(self) -> Progress:
        """Train to the end, or until the data or the user ends it.

        Raises:
            KeyboardInterrupt, SystemExit: asked for by Ctrl-C, SIGTERM or SIGUSR1.
            TrainingDivergedError, SamplingExhausted, RewardFailureRateError, WeightSyncError, EnginesKeepFailingError:
                see there. The state is saved first, in all these cases.
            CheckpointWriteError: a checkpoint could not be written, nor at a second try.
        """
        try:
            self._push()
            if self.progress.step == 0 and self.config.val_before_train and self.evaluator is not None:
                self.loggers.log(0, self._evaluate() | self.timers.flush())
            while self.progress.step < self.total_steps and self._step():
                self.interrupts.check()
        except _SAVED_FIRST:
            self._save_last()
            raise
        self._save_last()
        return self.progress

    def restore(self, found: Found) -> bool:
        """Go on from a checkpoint. Before `fit`. False if its random streams were those of another layout: the
        ranks then draw from fresh ones."""
        state = found.state
        self.policy.load(str(found.path / MODEL))
        self.sampler.load_state_dict(state["sampler"])
        self.progress = Progress(**state["progress"])
        self.saved = True
        same = found.meta.layout == self.policy.layout
        if same:
            self.policy.set_rng_states(state["rng"])
        return same

    def _snapshot(self) -> Snapshot:
        state = {
            "progress": asdict(self.progress),
            "sampler": self.sampler.state_dict(),
            "rng": self.policy.rng_states(),
            "loggers": self.loggers.ids(),
        }
        return Snapshot(self.progress.step, state)

    def _save_last(self) -> None:
        """Leave the state as it stands on the disk, unless it is there."""
        self.saver.settle(wait=True)
        if not self.saved:
            self.saver.save(background=False)
            self.saved = True

    def _step(self) -> bool:
        """One training step; False when there is nothing more to train on."""
        self.saved = False
        batch, generated = self._rollout()
        if not batch.groups:
            return False
        with self.timers.phase("publish"):
            self.saver.poll()
        with self.timers.phase("turns"):
            self.turns.policy_begins()
        prepared = prepare_step(batch.groups, self.policy, self.reference, self.rules, self.timers)
        with self.timers.phase("update"):
            lr = learning_rate(self.optim, self.progress.step, self.total_steps)
            updates = list(self.policy.update(prepared.updates, lr, report_first=prepared.measured_later))
        mismatch = prepared.mismatch(self.progress.weight_version, updates[0].logp)
        self.progress = self.progress.after(updates)
        with self.timers.phase("turns"):
            self.turns.weights_change_hands()
        self._push()
        metrics = _metrics(batch, prepared, updates, lr) | ({} if mismatch is None else mismatch.metrics())
        if self._due(self.config.test_freq) and self.evaluator is not None:
            metrics |= self._evaluate()
        self.sample_log.write(self.progress.step, prepared.groups)
        self.loggers.log(self.progress.step, metrics | self._costs(prepared, generated))
        with self.timers.phase("publish"):
            self.saver.settle()
        if self._due(self.config.save_freq):
            with self.timers.phase("save"):  # after the step's line in metrics.jsonl: a resume cuts what is too much
                self.saver.save()
                self.turns.engines_begin()
            self.saved = True
        if self.progress.bad_updates >= self.config.max_bad_updates:
            raise TrainingDivergedError(
                f"{self.progress.bad_updates} optimizer updates in a row had a loss or gradient that is NaN or "
                f"infinite and were skipped (trainer.max_bad_updates is {self.config.max_bad_updates}); lower "
                "actor.optim.lr or actor.grad_clip, or look at the last steps of metrics.jsonl and samples.jsonl"
            )
        return not batch.exhausted

    def _push(self) -> None:
        with self.timers.phase("sync"):
            self.sync.push(self.progress.weight_version)
        with self.timers.phase("turns"):
            self.turns.engines_begin()

    def _rollout(self) -> tuple[StepGroups, int]:
        """The step's groups, and how many response tokens were written for them."""
        written = self.engine.tokens_written
        self.scorer.begin_step()
        with self.timers.phase("rollout"):
            batch = self.sampler.collect(self.progress.weight_version)
        return batch, self.engine.tokens_written - written

    def _evaluate(self) -> dict[str, float]:
        assert self.evaluator is not None
        with self.timers.phase("evaluate"):
            return self.evaluator.run(self.progress.step).metrics()

    def _due(self, every: int) -> bool:
        """Every so many steps, and at the end of a run that does it at all."""
        step = self.progress.step
        return every > 0 and (step % every == 0 or step == self.total_steps)

    def _costs(self, prepared: PreparedStep, generated: int) -> dict[str, float]:
        seconds = self.timers.flush()
        trained = sum(len(g.prompt.token_ids) + s.length for g in prepared.groups for s in g.samples)
        speed = throughput_metrics(trained, seconds["seconds/step"], generated, seconds["seconds/rollout"])
        return seconds | speed | memory_metrics()


def _metrics(batch: StepGroups, prepared: PreparedStep, updates: Sequence[UpdateResult], lr: float) -> dict[str, float]:
    applied = [update for update in updates if update.applied]
    return (
        group_metrics(prepared.groups)
        | sampling_metrics(asdict(batch.stats))
        | {f"left_out/{what}": count for what, count in prepared.left_out().items()}
        | update_metrics(
            [update.sums for update in applied],
            [update.grad_norm for update in applied],
            lr,
            skipped=len(updates) - len(applied),
        )
    )
