"""No layout changes loss, log-probs, gradients or a step: all equal transformers + plain PyTorch on one process.

In fp32 to 1e-5. In bf16 against the same answers in fp32, for a model whose weights bfloat16 holds exactly:

- the loss, the entropies and the mean error of the log-probs, before and after a step, to 2e-3. They are sums in which
  rounding averages out, so an error of the layout would show in them.
- the gradient's norm to 2e-3, or where that cannot be had, as in models of eight layers, as near as transformers comes
  in bfloat16 on one process: its worst of four scales of the loss, for the errors of a single number cancel by chance.
- single log-probs, gradients and the step cannot be had to 2e-3 by anyone: one rounding to bfloat16 is an error of up
  to 2^-9 = 2e-3, and there are dozens in a row. Their bound is twice the error that transformers itself makes when it
  computes the same in bfloat16 on one process: worst token against worst token, worst parameter against worst
  parameter. The worst token after a step has no bound: weights are rounded anew there, and one that lies in the middle
  goes either way, so that two runs as exact as each other differ by more than twice.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, product

import pytest

from tests.functional.layout_cases import (
    BF16,
    FAULTS,
    LAYOUT_SETTINGS,
    OTHER_SETTINGS,
    TELLING,
    TOLERANCE,
    Case,
    Deviations,
    layouts,
    matrix,
    pairs,
)
from tests.functional.layout_ranks import Answers, Ranks, beyond

BF16_TOLERANCE = 2e-3
BF16_FACTOR = 2


def on_ranks(cases: tuple[Case, ...]) -> pytest.MarkDecorator:
    ordered = sorted(cases, key=lambda case: case.world)
    values = [pytest.param(case.world, case, id=case.fault or case.name) for case in ordered]
    return pytest.mark.parametrize(("world", "case"), values, indirect=["world"])


@on_ranks(TELLING)
def test_a_layout_gives_the_single_process_loss_gradients_and_step(
    world: int, case: Case, ranks: Ranks, answers: Answers
):
    assert beyond(ranks.ask(answers.job(case)), TOLERANCE) == {}


@on_ranks(FAULTS)
def test_a_planted_fault_is_seen(world: int, case: Case, ranks: Ranks, answers: Answers):
    assert beyond(ranks.ask(answers.job(case)), 100 * TOLERANCE)


@pytest.mark.slow
@on_ranks(matrix())
def test_every_layout_of_8_processes_gives_the_single_process_loss_gradients_and_step(
    world: int, case: Case, ranks: Ranks, answers: Answers
):
    assert beyond(ranks.ask(answers.job(case)), TOLERANCE) == {}


@on_ranks(BF16)
def test_in_bf16_a_layout_is_as_near_to_fp32_as_rounding_allows(world: int, case: Case, ranks: Ranks, answers: Answers):
    assert beyond_bf16(ranks.ask(answers.job(case)), answers.bf16_error(case)) == {}


@pytest.mark.slow
@on_ranks(tuple(replace(case, bf16=True, steps=1) for case in matrix() if case.packed))
def test_in_bf16_every_layout_is_as_near_to_fp32_as_rounding_allows(
    world: int, case: Case, ranks: Ranks, answers: Answers
):
    assert beyond_bf16(ranks.ask(answers.job(case)), answers.bf16_error(case)) == {}


def beyond_bf16(found: Deviations, of_transformers: Deviations) -> Deviations:
    bounds = {what: BF16_FACTOR * error for what, error in of_transformers.items()}
    bounds["gradient norm"] = max(BF16_TOLERANCE, of_transformers["gradient norm"])
    return {what: gap for what, gap in found.items() if not gap <= bounds.get(what, BF16_TOLERANCE)}


def test_any_two_values_of_two_settings_meet_in_the_matrix():
    values = OTHER_SETTINGS | {name: {getattr(case, name) for case in layouts()} for name in LAYOUT_SETTINGS}
    wanted = {
        (one, first, other, second)
        for one, other in combinations((*LAYOUT_SETTINGS, *OTHER_SETTINGS), 2)
        if other in OTHER_SETTINGS
        for first, second in product(values[one], values[other])
    }
    met = set().union(*(pairs(case) for case in matrix()))
    assert sorted(map(str, wanted - met)) == []
