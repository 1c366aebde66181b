"""No layout changes loss, log-probs, gradients or a step: all equal transformers + plain PyTorch on one process."""

from __future__ import annotations

import json

import pytest

from tests.functional.layout_cases import FAULTS, OTHER_SETTINGS, TELLING, TOLERANCE, Case, layouts, matrix, pairs
from tests.functional.layout_ranks import Answers, Ranks, beyond


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


def test_any_two_values_of_two_settings_meet_in_the_matrix():
    met = set().union(*(pairs(case) for case in matrix()))
    wanted = {
        ("tp", layout.tp, "gradients", gradients) for layout in layouts() for gradients in OTHER_SETTINGS["gradients"]
    }
    assert wanted <= met, json.dumps(sorted(map(str, wanted - met)))
