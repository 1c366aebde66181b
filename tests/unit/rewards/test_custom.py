"""A user's reward function: found, or told why not."""

from __future__ import annotations

import pytest

from megatron_dapo.config.tree import ConfigError
from megatron_dapo.rewards.custom import load_function


def write(tmp_path, text: str) -> str:
    path = tmp_path / "reward_file"  # no suffix needed
    path.write_text(text)
    return str(path)


def test_the_function_is_loaded_and_a_dataclass_beside_it_works(tmp_path):
    path = write(
        tmp_path,
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass\nclass Result:\n    score: float\n"
        "def judge(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    return {'score': Result(2.0).score}\n",
    )
    assert load_function(path, "judge")(data_source="", solution_str="", ground_truth="") == {"score": 2.0}


def test_keywords_that_the_function_does_not_name_may_go_into_kwargs(tmp_path):
    path = write(tmp_path, "def judge(solution_str, **kwargs):\n    return sorted(kwargs)\n")
    function = load_function(path, "judge")
    assert function(solution_str="", ground_truth="", data_source="") == ["data_source", "ground_truth"]


def test_a_missing_file_is_told_with_its_path(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing.py.*no such file"):
        load_function(str(tmp_path / "nothing.py"), "judge")


def test_a_missing_name_is_told_with_those_there_are(tmp_path):
    path = write(tmp_path, "def judge(**kwargs): ...\ndef _helper(): ...\nlimit = 3\n")
    with pytest.raises(ConfigError, match=r"'compute_score'.*it has: judge$"):
        load_function(path, "compute_score")


def test_a_name_that_is_no_function_is_told(tmp_path):
    with pytest.raises(ConfigError, match="it has: none"):
        load_function(write(tmp_path, "limit = 3\n"), "limit")


def test_a_function_with_other_arguments_is_told_before_it_is_called(tmp_path):
    path = write(tmp_path, "def judge(response, truth): ...\n")
    with pytest.raises(ConfigError, match=r"\(response, truth\).*data_source, solution_str, ground_truth, extra_info"):
        load_function(path, "judge")


def test_what_the_file_raises_comes_through(tmp_path):
    with pytest.raises(ZeroDivisionError):
        load_function(write(tmp_path, "1 / 0\n"), "judge")
