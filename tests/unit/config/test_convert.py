from __future__ import annotations

from typing import Literal

import pytest

from megatron_dapo.config.convert import build, leaf_types, to_dict, to_type
from megatron_dapo.config.tree import ConfigError, DataConfig, OptimConfig, RunConfig, TrainerConfig


@pytest.mark.parametrize(
    "wanted, value, found",
    [
        (int, 3, 3),
        (float, 3, 3.0),
        (float, 1e-6, 1e-6),
        (bool, True, True),
        (str, "3", "3"),
        (int | None, None, None),
        (int | None, 3, 3),
        (Literal["a", "b"], "b", "b"),
        (Literal["a", "b"] | None, None, None),
        (tuple[str, ...], ["a", "b"], ("a", "b")),
        (tuple[str, ...], [], ()),
        (tuple[Literal["a", "b"], ...], ["b", "a"], ("b", "a")),
        (tuple[str, ...], "a", ("a",)),
        (tuple[float, float], [0, 0.9], (0.0, 0.9)),
        (dict[str, str], {"a": "b"}, {"a": "b"}),
    ],
)
def test_a_value_of_the_wanted_type_is_taken(wanted, value, found):
    converted = to_type(wanted, value, "key")
    assert converted == found
    assert type(converted) is type(found)


@pytest.mark.parametrize(
    "wanted, value, message",
    [
        (int, True, r"key is True \(true or false\): wanted a whole number"),
        (int, 8.0, r"key is 8\.0 \(a number\): wanted a whole number"),
        (int, "8", r"key is '8' \(text\): wanted a whole number"),
        (int, None, r"key is null: wanted a whole number"),
        (int | None, "8", r"key is '8' \(text\): wanted a whole number"),
        (float, True, r"key is True \(true or false\): wanted a number"),
        (float, float("nan"), r"key is nan \(a number\): wanted a number, finite"),
        (float, float("inf"), r"key is inf \(a number\): wanted a number, finite"),
        (bool, 1, r"key is 1 \(a whole number\): wanted true or false"),
        (bool, "true", r"key is 'true' \(text\): wanted true or false"),
        (str, 8, r"""key is 8 \(a whole number\): wanted text; as text it is quoted: key='"\.\.\."'"""),
        (str, ["a"], r"key is \['a'\] \(a list\): wanted text$"),
        (Literal["a", "b"], "c", r"key is 'c' \(text\): wanted one of a, b"),
        (Literal["a"], "c", r"key is 'c' \(text\): wanted a, the only choice"),
        (Literal["a"], ["a"], r"key is \['a'\] \(a list\): wanted a, the only choice"),
        (tuple[str, ...], {"a": 1}, r"key is \{'a': 1\} \(a mapping\): wanted a list of text"),
        (tuple[Literal["a", "b"], ...], ["a", "c"], r"key\[1\] is 'c' \(text\): wanted one of a, b"),
        (tuple[Literal["a", "b"], ...], 1, r"key is 1 \(a whole number\): wanted a list of texts, each one of a, b"),
        (tuple[str, ...], ["a", 1], r"key\[1\] is 1 \(a whole number\): wanted text"),
        (tuple[float, float], [0.9], r"key is \[0\.9\] \(a list\): wanted a list of 2 numbers"),
        (tuple[float, float], [0.9, "x"], r"key\[1\] is 'x' \(text\): wanted a number"),
        (dict[str, str], "a", r"key is 'a' \(text\): wanted a mapping of text to text"),
        (dict[str, str], {"a": 1}, r"key\.a is 1 \(a whole number\): wanted text"),
    ],
)
def test_a_value_of_another_type_is_refused(wanted, value, message):
    with pytest.raises(ConfigError, match=message):
        to_type(wanted, value, "key")


def test_a_section_is_built_from_its_settings_and_keeps_the_other_defaults():
    config = build(RunConfig, {"data.seed": 4, "actor_rollout_ref.actor.optim.betas": [0.8, 0.9]})
    assert config.data == DataConfig(seed=4)
    assert config.actor_rollout_ref.actor.optim == OptimConfig(betas=(0.8, 0.9))
    assert config.trainer == TrainerConfig()


def test_what_a_section_says_of_itself_is_said_with_its_place():
    with pytest.raises(ConfigError, match=r"^actor_rollout_ref\.rollout\.val_kwargs\.top_p is 1\.5: wanted at most 1$"):
        build(RunConfig, {"actor_rollout_ref.rollout.val_kwargs.top_p": 1.5})
    with pytest.raises(ConfigError, match=r"^top_p is"):
        build(type(RunConfig().actor_rollout_ref.rollout.val_kwargs), {"top_p": 1.5})


def test_every_setting_of_the_tree_can_be_converted_from_its_own_default():
    values = to_dict(RunConfig())
    for key, wanted in leaf_types(RunConfig).items():
        value = values
        for part in key.split("."):
            value = value[part]
        to_type(wanted, value, key)
