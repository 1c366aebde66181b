"""The arithmetic example's parts: disjoint problems, demonstrations judged as they are meant, the tokenizer."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[3] / "examples" / "arithmetic"
sys.path.insert(0, str(EXAMPLE))

from base_model import build_model, build_tokenizer, save  # noqa: E402
from problems import TEST, TRAIN, Problem, split  # noqa: E402

from megatron_dapo.config.load import load_config  # noqa: E402
from megatron_dapo.rewards.math_dapo import score  # noqa: E402


@pytest.mark.parametrize("seed", [1, 2])
def test_no_problem_is_in_two_sets_and_the_test_problems_are_the_same_for_every_seed(seed: int) -> None:
    found = split(seed)
    assert (len(found.test), len(found.train)) == (TEST, TRAIN)
    assert len({*found.test, *found.train, *found.warmup}) == 90 * 90
    assert found.test == split(seed + 1).test
    assert found.train != split(seed + 1).train


def test_careful_demonstrations_are_right_and_hasty_ones_are_wrong() -> None:
    for a, b in ((46, 77), (10, 10), (99, 99), (12, 34)):
        problem = Problem(a, b)
        assert score(problem.careful, str(a + b)).acc
        assert not score(problem.hasty, str(a + b)).acc


def test_low_first_numbers_are_shown_carefully_more_often_than_not() -> None:
    rng = random.Random(0)
    shown = {a: [Problem(a, 50).demonstration(rng) == Problem(a, 50).careful for _ in range(400)] for a in (20, 80)}
    assert sum(shown[20]) > 200 > sum(shown[80]) > 0


def test_the_tokenizer_has_a_token_a_character_and_survives_a_round_trip(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = build_tokenizer()
    save(build_model(tokenizer, seed=0), tokenizer, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "46+77=? Answer: N\n13,12\nAnswer: 123"
    assert len(loaded(text)["input_ids"]) == len(text)
    assert loaded.decode(loaded(text)["input_ids"]) == text
    message = [{"role": "user", "content": "46+77=? Answer: N"}]
    assert loaded.apply_chat_template(message, tokenize=False) == "46+77=? Answer: N\n"


def test_the_example_has_everything_of_dapo_switched_on() -> None:
    config = load_config(str(EXAMPLE / "config.yaml"), []).config
    actor = config.actor_rollout_ref.actor
    assert config.algorithm.filter_groups.enable
    assert config.reward_model.overlong_buffer.enable
    assert actor.clip_ratio_high > actor.clip_ratio_low
    assert (actor.loss_agg_mode, actor.loss_scale) == ("token-mean", "global")
    assert config.data.train_batch_size > actor.ppo_mini_batch_size, "several updates a step: ratios leave 1"
