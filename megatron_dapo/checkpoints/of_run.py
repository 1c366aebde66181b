"""Where a run's checkpoints are, found and written: `store.py`, `resume.py` and `saver.py` put together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

from rich.console import Console
from transformers import AutoConfig

from megatron_dapo.checkpoints.meta import Identity
from megatron_dapo.checkpoints.resume import Found, find
from megatron_dapo.checkpoints.saver import Saver, SaveRules, Snapshot
from megatron_dapo.checkpoints.store import CheckpointStore
from megatron_dapo.config.tree import RunConfig, TrainerConfig
from megatron_dapo.mcore.families import shape_of
from megatron_dapo.workers.policy_group import PolicyGroup


@dataclass(frozen=True)
class RunCheckpoints:
    """`identity`: what they must agree with. `report` is told, in words, what was found and done."""

    store: CheckpointStore
    fallback: CheckpointStore | None
    policy: PolicyGroup
    identity: Identity
    report: Callable[[str], None]

    @classmethod
    def of(cls, config: RunConfig, policy: PolicyGroup, console: Console) -> RunCheckpoints:
        trainer, megatron = config.trainer, config.actor_rollout_ref.actor.megatron
        model = asdict(shape_of(AutoConfig.from_pretrained(config.actor_rollout_ref.model.path)))
        model["family"] = model["family"]["name"]
        training = {
            "params_dtype": megatron.params_dtype,
            "use_distributed_optimizer": megatron.use_distributed_optimizer,
        }
        return cls(
            CheckpointStore(trainer.default_local_dir),
            CheckpointStore(trainer.fallback_local_dir) if trainer.fallback_local_dir else None,
            policy,
            Identity(policy.layout, model, training),
            partial(console.print, markup=False, highlight=False, soft_wrap=True),
        )

    def find(self, resume_mode: str) -> Found | None:
        """What a killed run left half done is cleared away first."""
        stores = [self.store, *([self.fallback] if self.fallback else [])]
        for store in stores:
            store.recover()
        return find(resume_mode, stores, self.identity, self.policy.digest_files, self.report)

    def saver(self, config: TrainerConfig, snapshot: Callable[[], Snapshot]) -> Saver:
        rules = SaveRules(config.async_save, config.save_total_limit)
        return Saver(self.store, self.fallback, self.policy, self.identity, rules, snapshot, self.report)
