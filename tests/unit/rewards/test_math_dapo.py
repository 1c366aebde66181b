"""The recipe's verifier against 500 of its own verdicts, and the rules that they show least."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_dapo.rewards.math_dapo import NO_ANSWER, Score, last_boxed, normalize, score

CASES = [
    json.loads(line)
    for line in (Path(__file__).parents[2] / "data" / "math_dapo_scorer_cases.jsonl").read_text().splitlines()
]


def test_every_verdict_is_the_recipes():
    assert len(CASES) == 500
    for case in CASES:
        found = score(case["response"], case["ground_truth"])
        assert found == Score(case["score"], case["acc"], case["pred"]), case["response"]


def test_every_strict_verdict_is_the_recipes():
    for case in CASES:
        found = score(case["response"], case["ground_truth"], strict_box_verify=True)
        assert found == Score(**case["strict_box"]), case["response"]


@pytest.mark.parametrize(
    "answer, form",
    [
        ("x = y = 3", "3"),
        (r"\frac12", r"\frac{1}{2}"),
        (r"\frac{1}{2}", r"\frac{1}{2}"),
        (r"\sqrt3", r"\sqrt{3}"),
        ("1,234,567", "1234567"),
        ("1,2 and 3", "1,2and3"),
        (r"\overline{AB}", "AB"),
        (r"the $x$ of $y$", "x"),
        (r"5\text{ cm}^2", "5"),  # the unit first, then the empty wrapper with its power
        (r"5\text{m}^2", "5"),
        (r"7\mathrm{th}", "7"),
        (r"\left(1,2\right)", r"\left(1,2\right)"),
        (r"90^{\circ}", "90"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"2,\!000", "2000"),
    ],
)
def test_normal_forms(answer, form):
    assert normalize(answer) == form


def test_only_the_last_300_characters_count():
    assert score("Answer: 7\n" + "x" * 290, "7").acc
    assert score("Answer: 7\n" + "x" * 291, "7").pred == NO_ANSWER


def test_only_the_last_100_characters_count_in_the_strict_mode():
    assert score(r"\boxed{7}" + "x" * 91, "7", strict_box_verify=True).acc
    assert score(r"\boxed{7}" + "x" * 92, "7", strict_box_verify=True).pred is None


def test_the_strict_mode_compares_the_strings_as_they_are():
    assert score(r"\boxed{ 7}", "7", strict_box_verify=True) == Score(-1.0, False, " 7")


@pytest.mark.parametrize(
    "response, pred",
    [
        (r"so \boxed{1,234}", "1234"),
        ("Answer: 5\nso \\boxed{6}", "5"),  # an `Answer:` goes first
        (r"so \boxed{6", NO_ANSWER),
        ("so 6", NO_ANSWER),
    ],
)
def test_the_box_is_looked_at_where_there_is_no_answer_if_that_is_asked_for(response, pred):
    assert score(response, "6", fallback_boxed=True).pred == pred
    assert score(r"so \boxed{6}", "6").pred == NO_ANSWER


@pytest.mark.parametrize(
    "text, inside",
    [
        (r"\boxed{1} then \boxed{\frac{1}{2}} end", r"\frac{1}{2}"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{}", ""),
        (r"\boxed{1} then \boxed{2", None),
        (r"\boxed 3", None),
    ],
)
def test_the_last_box_is_read_to_its_own_brace(text, inside):
    assert last_boxed(text) == inside
