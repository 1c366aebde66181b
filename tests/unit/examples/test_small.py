"""The three settings of the small example differ in what the recipe's three runs differ in, and in nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[3] / "examples" / "arithmetic"
sys.path.insert(0, str(EXAMPLE))

from base_model import build_model, build_tokenizer  # noqa: E402
from small import SETTINGS, SIZE, words  # noqa: E402

from megatron_dapo.config.convert import to_dict  # noqa: E402
from megatron_dapo.config.load import load_config  # noqa: E402


@pytest.mark.parametrize(
    ("setting", "filtered", "mode"),
    [
        ("full", True, "token-mean"),
        ("without_dynamic_sampling", False, "token-mean"),
        ("early", False, "seq-mean-token-mean"),
    ],
)
def test_a_setting_differs_only_in_dynamic_sampling_and_aggregation(setting: str, filtered: bool, mode: str) -> None:
    assert setting in SETTINGS
    configs = []
    for name in ("full", setting):
        config, *overrides = words(Path("base"), Path("problems"), Path("out"), name, seed=3)
        configs.append(load_config(config, overrides).config)
    full, found = configs
    assert found.algorithm.filter_groups.enable == filtered
    assert found.actor_rollout_ref.actor.loss_agg_mode == mode
    plain = [to_dict(config) for config in (full, found)]
    for config in plain:
        config["algorithm"]["filter_groups"].pop("enable")
        config["actor_rollout_ref"]["actor"].pop("loss_agg_mode")
    assert plain[0] == plain[1]
    assert found.data.seed == 3
    assert found.data.train_batch_size > found.actor_rollout_ref.actor.ppo_mini_batch_size, "several updates a step"


def test_the_small_model_is_an_eighth_of_the_examples() -> None:
    tokenizer = build_tokenizer()
    small, whole = (sum(p.numel() for p in build_model(tokenizer, 0, *size).parameters()) for size in ((SIZE,), ()))
    assert small == 138_176
    assert whole == 1_064_064
