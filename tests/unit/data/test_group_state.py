"""Groups written out and read back."""

from __future__ import annotations

import pickle

import numpy as np

from megatron_dapo.data.group_state import group_from_state, group_state
from megatron_dapo.types import Completion, Group, RewardResult, Sample
from tests.unit.data.fakes import bits_of_group, dataset


def test_a_group_comes_back_as_it_was() -> None:
    prompts = dataset(9)
    samples = tuple(
        Sample(
            Completion(
                41, index, np.arange(index + 1), -np.arange(index + 1, dtype=np.float32) / 3, reason, 17 + index
            ),
            RewardResult(status, -1.0, {"score": -1.0, "acc": 0.0, "style": 0.1 * index}, "7", "detail"),
            overlong_penalty=-0.1 * index,
            reward=-1.3 * index,
        )
        for index, (reason, status) in enumerate([("stop", "ok"), ("length", "unparsable")])
    )
    group = Group(41, prompts[6], samples, 17)
    back = group_from_state(pickle.loads(pickle.dumps(group_state(group))), prompts)
    assert bits_of_group(back) == bits_of_group(group)
    assert (back.weight_version, back.prompt.text) == (17, "prompt 6")
    for old, new in zip(group.samples, back.samples, strict=True):
        assert (new.completion.draw_index, new.completion.weight_version) == (41, old.completion.weight_version)
        assert new.result == old.result
        assert new.completion.token_ids.dtype == np.int64
        assert new.completion.logprobs.dtype == np.float32
