"""The overlong penalty against the recipe's golden numbers and by hand."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_dapo.algo.overlong import overlong_penalty


def test_penalties_are_the_recipes_and_so_is_the_shaped_reward(case, golden):
    settings = golden["overlong"]
    arguments = (settings["max_response_length"], settings["len"], settings["penalty_factor"])
    singly = [overlong_penalty(length, *arguments) for length in case["response_length"]]
    assert singly == pytest.approx(case["overlong_reward"], abs=1e-12)
    assert overlong_penalty(np.array(case["response_length"]), *arguments).tolist() == singly
    assert [s + p for s, p in zip(case["score"], singly, strict=True)] == pytest.approx(case["reward"], abs=1e-12)


@pytest.mark.parametrize("length, penalty", [(0, 0.0), (80, 0.0), (81, -0.1), (90, -1.0), (100, -2.0)])
def test_the_penalty_falls_in_a_line_over_the_buffer(length, penalty):
    assert overlong_penalty(length, 100, 20, 2.0) == pytest.approx(penalty)


@pytest.mark.parametrize("buffer_len", [0, -1, 101])
def test_a_buffer_that_cannot_be_is_refused(buffer_len):
    with pytest.raises(ValueError, match=rf"overlong_buffer.len is {buffer_len}; .*100"):
        overlong_penalty(50, 100, buffer_len, 1.0)
