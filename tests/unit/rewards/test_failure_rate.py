"""When failed rewards stop a run, and what is said then."""

from __future__ import annotations

import math

import pytest

from megatron_dapo.rewards.failure_rate import FailureTally, RewardFailureRateError
from megatron_dapo.types import RewardResult

OK = RewardResult("ok", 1.0, {"score": 1.0, "acc": 1.0})
UNPARSABLE = RewardResult("unparsable", -1.0, {"score": -1.0, "acc": 0.0}, "[INVALID]")


def failed(status, detail: str) -> RewardResult:
    return RewardResult(status, math.nan, {}, detail=detail)


def test_a_rate_at_the_limit_goes_on_and_one_above_it_stops():
    tally = FailureTally()
    tally.add([OK] * 9 + [failed("timeout", "late")])
    tally.check(0.1)
    tally.add([failed("timeout", "late")])
    with pytest.raises(RewardFailureRateError):
        tally.check(0.1)


def test_the_message_has_the_numbers_the_causes_and_the_remedies():
    tally = FailureTally()
    tally.add([OK] * 5 + [failed("error", "boom")] * 2 + [failed("timeout", "no verdict within 10 s")] * 3)
    with pytest.raises(RewardFailureRateError) as caught:
        tally.check(0.25)
    message = str(caught.value)
    assert "5 of 10 responses" in message
    assert "50.0%, and reward_model.max_failure_rate allows 25.0%" in message
    assert message.index("3 x timeout: no verdict within 10 s") < message.index("2 x error: boom")
    assert "reward_model.timeout" in message


def test_a_response_without_an_answer_is_no_failure():
    tally = FailureTally()
    tally.add([UNPARSABLE] * 3)
    tally.check(0.0)
    assert (tally.total, tally.failed) == (3, 0)


def test_nothing_scored_is_no_failure():
    FailureTally().check(0.0)
