"""No layout changes loss, log-probs, gradients or a step: all equal transformers + plain PyTorch on one process."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.functional.layout_cases import FAULTS, OTHER_SETTINGS, TELLING, Case, Deviations, layouts, matrix, pairs
from tests.functional.layout_ranks import Answers, Ranks

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    return Answers(tmp_path_factory.mktemp("answers"))


@pytest.fixture(scope="module")
def world(request: pytest.FixtureRequest, ranks: Ranks) -> Iterator[int]:
    """As many ranks as the parameter says: one torchrun for all tests of a world size that come one after another."""
    with ranks.world(request.param):
        yield request.param


def on_ranks(cases: tuple[Case, ...]) -> pytest.MarkDecorator:
    ordered = sorted(cases, key=lambda case: case.world)
    values = [pytest.param(case.world, case, id=case.fault or case.name) for case in ordered]
    return pytest.mark.parametrize(("world", "case"), values, indirect=["world"])


def beyond(found: Deviations, tolerance: float) -> Deviations:
    assert found
    return {what: value for what, value in found.items() if not value <= tolerance}


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
