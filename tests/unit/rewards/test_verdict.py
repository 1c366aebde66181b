"""What a verifier's return value means."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_dapo.rewards.verdict import TEXT_LIMIT, Verdict, from_exception, read


@pytest.mark.parametrize(
    "returned, metrics",
    [
        (0.5, {"score": 0.5, "acc": 1.0}),
        (-1, {"score": -1.0, "acc": 0.0}),
        (0, {"score": 0.0, "acc": 0.0}),
        (True, {"score": 1.0, "acc": 1.0}),
        (np.float32(0.5), {"score": 0.5, "acc": 1.0}),
        ({"score": 1.0}, {"score": 1.0, "acc": 1.0}),
        ({"score": 1.0, "acc": False}, {"score": 1.0, "acc": 0.0}),
        ({"score": np.float64(-1), "acc": np.bool_(True)}, {"score": -1.0, "acc": 1.0}),
        ({"score": 1, "format": True, "steps": 7}, {"score": 1.0, "acc": 1.0, "format": 1.0, "steps": 7.0}),
        ({"score": 1, "note": "12", "parts": [1, 2], "array": np.ones(2), "none": None}, {"score": 1.0, "acc": 1.0}),
    ],
)
def test_numbers_become_metrics_and_the_rest_goes_nowhere(returned, metrics):
    verdict = read(returned)
    assert (verdict.status, verdict.score, verdict.metrics, verdict.pred) == ("ok", metrics["score"], metrics, "")
    assert {type(value) for value in verdict.metrics.values()} == {float}


@pytest.mark.parametrize("pred, text", [("34", "34"), (34, "34"), (None, ""), ("x" * 5000, "x" * TEXT_LIMIT)])
def test_the_prediction_becomes_text_and_no_metric(pred, text):
    verdict = read({"score": 1.0, "pred": pred})
    assert verdict.pred == text
    assert "pred" not in verdict.metrics


def test_no_answer_is_unparsable_and_keeps_its_score():
    assert read({"score": -1.0, "acc": False, "pred": "[INVALID]"}) == Verdict(
        "unparsable", -1.0, {"score": -1.0, "acc": 0.0}, "[INVALID]"
    )


@pytest.mark.parametrize(
    "returned, told",
    [
        (None, "returned None; want a number"),
        ("1.0", "returned '1.0'"),
        ([1.0], r"returned \[1.0\]"),
        ({"acc": True}, "a dict with a number 'score'"),
        ({"score": None}, "a dict with a number 'score'"),
        (10**400, "want a number"),
        ({"score": 1.0, "acc": "yes"}, "acc = 'yes'"),
        (math.nan, r"\{'score': nan\}; want finite"),
        ({"score": -math.inf}, r"\{'score': -inf\}"),
        ({"score": 1.0, "bonus": math.nan}, r"\{'bonus': nan\}"),
    ],
)
def test_what_is_no_score_is_an_error_that_shows_it(returned, told):
    verdict = read(returned)
    assert verdict.status == "error"
    assert math.isnan(verdict.score)
    assert verdict.metrics == {}
    with pytest.raises(AssertionError, match=told):
        raise AssertionError(verdict.detail)


def test_an_exception_is_told_on_one_line_with_its_place():
    try:
        raise ValueError("two\nlines" + "x" * 5000)
    except ValueError as error:
        detail = from_exception(error).detail
    assert detail.startswith("ValueError: two lines")
    assert detail.endswith("in test_an_exception_is_told_on_one_line_with_its_place)")
    assert len(detail) == TEXT_LIMIT
