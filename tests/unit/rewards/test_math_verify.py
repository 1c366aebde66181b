"""The math-verify adapter: equality as mathematics, and what it does with what it cannot read."""

from __future__ import annotations

import signal

import pytest

from megatron_dapo.rewards.math_dapo import NO_ANSWER
from megatron_dapo.rewards.math_verify import score


@pytest.mark.parametrize(
    "response, ground_truth, acc",
    [
        ("Answer: 0.5", r"\frac{1}{2}", True),
        (r"so it is $\frac{2}{4}$.", "0.5", True),
        (r"thus \boxed{1,234}", "1234", True),
        (r"\boxed{x+1}", "1+x", True),
        ("Answer: 35", "34", False),
        (r"\boxed{\frac{1}{3}}", "0.33", False),
    ],
)
def test_answers_are_compared_as_mathematics(response, ground_truth, acc):
    found = score(response, ground_truth)
    assert (found.score, found.acc) == ((1.0, True) if acc else (-1.0, False))
    assert found.pred not in (NO_ANSWER, "")


def test_a_response_without_an_answer_is_marked():
    assert score("I do not know.", "34").pred == NO_ANSWER


def test_a_ground_truth_that_cannot_be_read_is_an_error_and_not_a_wrong_answer():
    with pytest.raises(ValueError, match=r"cannot read the ground truth ''.*reward_model.verifiers"):
        score("Answer: 34", "")


def test_the_librarys_alarm_is_left_alone():
    called = []
    before = signal.signal(signal.SIGALRM, lambda *_: called.append(True))
    try:
        signal.alarm(3600)
        score("Answer: 34", "34")
        assert signal.alarm(0) > 3000
    finally:
        signal.signal(signal.SIGALRM, before)
