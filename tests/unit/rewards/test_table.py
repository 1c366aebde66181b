"""Which verifier judges what, and the contract that all of them keep."""

from __future__ import annotations

import pytest

from megatron_dapo.config.tree import ConfigError, CustomRewardFunctionConfig, RewardModelConfig
from megatron_dapo.rewards.table import VERIFIERS, RewardTask, VerifierSpec, build
from megatron_dapo.rewards.verdict import read


@pytest.fixture
def own(tmp_path) -> str:
    path = tmp_path / "own.py"
    path.write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    return {'score': float(ground_truth in solution_str), 'pred': extra_info['name']}\n"
    )
    return str(path)


@pytest.mark.parametrize("name", VERIFIERS)
def test_every_verifier_tells_right_from_wrong(name, own):
    verify = build(VerifierSpec(default=name, custom_path=own))
    right = read(verify(RewardTask("Answer: 34", "34", "anything", {"name": "n"})))
    wrong = read(verify(RewardTask("Answer: 35", "34", "anything", {"name": "n"})))
    assert (right.status, right.metrics["acc"], wrong.status, wrong.metrics["acc"]) == ("ok", 1.0, "ok", 0.0)
    assert right.score > wrong.score
    assert right.metrics["score"] == right.score


@pytest.mark.parametrize("name", ["math_dapo", "math_verify"])
def test_a_response_without_an_answer_is_unparsable(name):
    assert read(build(VerifierSpec(default=name))(RewardTask("I give up.", "34", "anything"))).status == "unparsable"


def test_the_data_source_chooses_and_the_default_takes_the_rest():
    verify = build(VerifierSpec(default="math_dapo", by_source={"algebra": "math_verify"}))
    assert read(verify(RewardTask("Answer: 0.5", "1/2", "algebra"))).score == 1.0
    assert read(verify(RewardTask("Answer: 0.5", "1/2", "arithmetic"))).score == -1.0


def test_the_settings_of_math_dapo_reach_it():
    boxed = RewardTask(r"so \boxed{34}", "34", "anything")
    assert read(build(VerifierSpec())(boxed)).status == "unparsable"
    assert read(build(VerifierSpec(fallback_boxed=True))(boxed)).score == 1.0
    assert read(build(VerifierSpec(strict_box_verify=True))(boxed)).score == 1.0
    unboxed = RewardTask("Answer: 34", "34", "anything")
    assert read(build(VerifierSpec(strict_box_verify=True))(unboxed)).status == "unparsable"


def test_a_custom_function_judges_all_that_is_not_named_otherwise(own):
    config = RewardModelConfig(verifiers={"aime": "math_dapo"})
    spec = VerifierSpec.from_config(config, CustomRewardFunctionConfig(path=own))
    verify = build(spec)
    assert read(verify(RewardTask("34", "34", "anything", {"name": "mine"}))).pred == "mine"
    assert read(verify(RewardTask("34", "34", "aime"))).status == "unparsable"


def test_without_a_custom_function_the_configured_default_judges():
    config = RewardModelConfig(default_verifier="math_verify", strict_box_verify=True, fallback_boxed=True)
    spec = VerifierSpec.from_config(config, CustomRewardFunctionConfig())
    assert spec == VerifierSpec("math_verify", {}, strict_box_verify=True, fallback_boxed=True)


def test_an_unknown_name_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match="'math_dap'; there are: math_dapo, math_verify, custom"):
        VerifierSpec(by_source={"aime": "math_dap"})


def test_custom_without_a_path_is_refused():
    with pytest.raises(ConfigError, match=r"custom_reward_function.path is not set"):
        VerifierSpec(by_source={"aime": "custom"})


def test_a_file_that_is_not_there_is_refused_before_any_process_starts(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.py.*no such file"):
        VerifierSpec.from_config(RewardModelConfig(), CustomRewardFunctionConfig(path=str(tmp_path / "nowhere.py")))
