"""The example made small, for runs by the dozen: 138 thousand parameters, 8 prompts a step; and DAPO's three settings.

A step takes a third of a CPU-second, the base model's warm-up half a minute. Golden runs and the study use it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from base_model import Size, WarmUp, build_model, build_tokenizer, save, warm_up
from problems import Split, split, write_rows

SIZE = Size(hidden=64, intermediate=256, layers=2, heads=4)
WARM_UP = WarmUp(steps=400, batch=64, peak_lr=4e-3)

# The three runs of the recipe, as they differ from config.yaml, which has everything on.
WITHOUT_DYNAMIC_SAMPLING = ("algorithm.filter_groups.enable=false",)
SETTINGS = {
    "full": (),
    "without_dynamic_sampling": WITHOUT_DYNAMIC_SAMPLING,
    "early": (*WITHOUT_DYNAMIC_SAMPLING, "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean"),
}
BATCH = (
    "data.train_batch_size=8",
    "data.gen_batch_size=8",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
)
# Thirty steps of four updates each at a rate that lets ratios be clipped. What they cost is steps: no evaluation.
GOLDEN_SEED = 1
GOLDEN = (
    "trainer.total_training_steps=30",
    "trainer.val_before_train=false",
    "trainer.test_freq=-1",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    "actor_rollout_ref.actor.optim.lr=2e-4",
)
QUIET = ("trainer.logger=[]", "trainer.save_freq=-1", "trainer.resume_mode=disable")


def write_problems(folder: Path, seed: int) -> Split:
    """`train.jsonl` and `test.jsonl` into `folder`."""
    problems = split(seed)
    write_rows(folder / "train.jsonl", problems.train)
    write_rows(folder / "test.jsonl", problems.test)
    return problems


def write_base(folder: Path, problems: Split, seed: int) -> None:
    """The base model, its weights in half precision: a quarter of a megabyte."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed, SIZE)
    warm_up(model, tokenizer, problems, seed, lambda step, loss: None, WARM_UP)
    save(model.half(), tokenizer, folder)


def words(base: Path, problems: Path, out: Path, setting: str, seed: int) -> list[str]:
    """CONFIG.yaml and overrides of one run, for `megatron-dapo train`; `problems` is the folder of their files."""
    return [
        str(Path(__file__).parent / "config.yaml"),
        f"actor_rollout_ref.model.path={base}",
        f"data.train_files=[{problems / 'train.jsonl'}]",
        f"data.val_files=[{problems / 'test.jsonl'}]",
        f"data.seed={seed}",
        f"trainer.default_local_dir={out}",
        *BATCH,
        *QUIET,
        *SETTINGS[setting],
    ]
