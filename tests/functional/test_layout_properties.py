"""Whatever the shapes, a layout computes the objective: rollouts drawn at random, the real worker on one or two ranks.

Held against the same oracle and to the same tolerance as `test_layout_invariance.py`. What is drawn: how many groups
and how large, lengths down to one token, how many sequences a micro-batch holds, vocabulary, layout and model. The
examples name the corners: data-parallel ranks and pipeline micro-batches without a sequence, a group of one, responses
of one token, vocabularies that two ranks cannot share evenly.
A gradient is measured by the largest entry of all gradients: with a single token to attend to, those of queries and
keys are 0. KL and entropy terms are on, so that the whole is not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.functional.layout_cases import MODELS, TOLERANCE, Case, Job
from tests.functional.layout_problem import FORMULAS, make_rollouts
from tests.functional.layout_ranks import Answers, Ranks, beyond, solve

VOCABULARIES = (2, 7, 61, 64)  # 7 and 61 are padded over two ranks; of 2 a rank holds a single row
PLACES = {
    1: (Case(), Case(gradients="distributed overlapped")),
    2: (
        Case(tp=2),
        Case(tp=2, sp=True),
        Case(pp=2),
        Case(pp=2, virtual=2),
        Case(cp=2),
        Case(dp=2),
        Case(dp=2, gradients="distributed overlapped"),
    ),
}
EXAMPLES = {1: 10, 2: 20}


@dataclass(frozen=True)
class Drawn:
    """`shapes` as `make_rollouts` takes them; the seed is of tokens, advantages and old log-probs."""

    case: Case
    shapes: tuple[tuple[int, tuple[int, ...]], ...]
    vocab: int = 61
    seed: int = 0
    sequences_per_micro_batch: int = 1


def drawn(world: int) -> st.SearchStrategy[Drawn]:
    responses = st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple)
    settings_of_case: dict[str, Any] = {
        "packed": st.booleans(),
        "micro_batches": st.sampled_from(("one", "many")),
        "model": st.sampled_from(MODELS),
        "formula": st.sampled_from(tuple(FORMULAS)),
    }
    return st.builds(
        Drawn,
        case=st.builds(replace, st.sampled_from(PLACES[world]), **settings_of_case),
        shapes=st.lists(st.tuples(st.integers(1, 6), responses), min_size=1, max_size=4).map(tuple),
        vocab=st.sampled_from(VOCABULARIES),
        seed=st.integers(0, 1000),
        sequences_per_micro_batch=st.integers(1, 3),
    )


def deviations(drawn: Drawn, ranks: Ranks, answers: Answers) -> dict[str, float]:
    case = drawn.case
    path = answers.model(case.model, case.layers, drawn.vocab)
    formula = replace(FORMULAS[case.formula], entropy_coeff=0.03, kl_coef=0.2, overlong_filtering=False)
    problem, answer = solve(path, make_rollouts(drawn.shapes, drawn.seed, drawn.vocab), formula, case.steps)
    found = ranks.ask(Job(case, str(path), problem, formula, answer, drawn.sequences_per_micro_batch))
    return {what: gap for what, gap in found.items() if what not in ("gradient", "gradient distance")}


@pytest.mark.parametrize("world", [1], indirect=True)
@settings(max_examples=EXAMPLES[1], deadline=None, derandomize=True, database=None)
@given(drawn=drawn(1))
@example(drawn=Drawn(Case(), ((1, (1,)),)))
@example(drawn=Drawn(Case(packed=False, micro_batches="many"), ((1, (1, 1)), (6, (7,)))))
def test_on_one_rank_any_shapes_give_the_single_process_answer(
    world: int, ranks: Ranks, answers: Answers, drawn: Drawn
):
    assert beyond(deviations(drawn, ranks, answers), TOLERANCE) == {}


@pytest.mark.parametrize("world", [2], indirect=True)
@settings(max_examples=EXAMPLES[2], deadline=None, derandomize=True, database=None)
@given(drawn=drawn(2))
@example(drawn=Drawn(Case(dp=2), ((3, (2,)),)))  # the second rank has no sequence
@example(drawn=Drawn(Case(dp=2, packed=False, micro_batches="many"), ((3, (2, 5)), (1, (1,)))))  # one rank has fewer
@example(drawn=Drawn(Case(pp=2, virtual=2), ((2, (3,)),)))  # the second micro-batch only fills the pipeline
@example(drawn=Drawn(Case(tp=2, sp=True, packed=False), ((1, (1,)), (1, (1,))), vocab=7))
@example(drawn=Drawn(Case(cp=2, packed=False, model="llama tied"), ((1, (1,)),), vocab=2))
@example(drawn=Drawn(Case(tp=2, model="qwen3 tied"), ((5, (1, 1, 1, 1)),), vocab=2))
def test_on_two_ranks_any_shapes_give_the_single_process_answer(
    world: int, ranks: Ranks, answers: Answers, drawn: Drawn
):
    assert beyond(deviations(drawn, ranks, answers), TOLERANCE) == {}
