"""Draws in, scored responses out."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import replace

import numpy as np
import pytest

from megatron_dapo.data.generation import Draw, response_seed
from megatron_dapo.types import Completion, RewardResult
from tests.unit.data.fakes import N, ShuffledEngine, ShuffledScorer, dataset, failed, graded, mixed, rollout

DRAWS = [Draw(index + 10, prompt) for index, prompt in enumerate(dataset(5))]


def test_a_seed_depends_on_run_draw_and_sample_and_on_nothing_else() -> None:
    seeds = {response_seed(run, draw, sample) for run in range(5) for draw in range(20) for sample in range(20)}
    assert len(seeds) == 5 * 20 * 20
    assert min(seeds) >= 0
    assert max(seeds) < 2**63
    assert max(seeds) > 2**62
    assert response_seed(1, 2, 34) != response_seed(12, 3, 4) != response_seed(1, 23, 4)


def test_a_seed_is_the_first_63_bits_of_blake2b() -> None:
    digest = hashlib.blake2b(b"7 11 3", digest_size=8).hexdigest()
    assert response_seed(7, 11, 3) == int(digest, 16) // 2


def test_draws_come_back_in_the_order_given_with_their_samples_in_order() -> None:
    closed = rollout().run(DRAWS)
    assert [c.draw for c in closed] == DRAWS
    for c in closed:
        assert [s.completion.sample_index for s in c.samples] == list(range(N))
        assert {s.completion.draw_index for s in c.samples} == {c.draw.draw_index}


def test_all_requests_go_to_the_engine_in_one_call_in_draw_order() -> None:
    class CountingEngine(ShuffledEngine):
        calls = 0

        def submit(self, requests):
            CountingEngine.calls += 1
            super().submit(requests)

    engine = CountingEngine(np.random.default_rng(0))
    replace(rollout(), engine=engine).run(DRAWS)
    assert CountingEngine.calls == 1
    assert [(r.draw_index, r.sample_index) for r in engine.submitted] == [
        (d, s) for d in range(10, 15) for s in range(N)
    ]
    assert [r.seed for r in engine.submitted] == [response_seed(7, d, s) for d in range(10, 15) for s in range(N)]


def test_a_task_is_made_from_the_prompt_and_the_decoded_response() -> None:
    tasks: dict[tuple[int, int], str] = {}

    def remember(key: tuple[int, int], text: str) -> RewardResult:
        tasks[key] = text
        return graded(1.0)

    for closed in rollout(remember).run(DRAWS):
        for s in closed.samples:
            ids = " ".join(map(str, s.completion.token_ids))
            assert tasks[closed.draw.draw_index, s.completion.sample_index] == f"{closed.draw.prompt.index}:{ids}"


def test_failed_samples_are_left_out_by_kind() -> None:
    def verdict(key: tuple[int, int], text: str) -> RewardResult:
        return {(11, 0): failed("timeout"), (11, 3): failed("error")}.get(key, graded(1.0))

    closed = rollout(verdict, aborts={(12, 1): 99}).run(DRAWS)
    assert [sorted(c.failures) for c in closed] == [[], ["error", "timeout"], ["abort"], [], []]
    assert [s.completion.sample_index for s in closed[1].samples] == [1, 2]
    assert [c.retries for c in closed] == [0, 0, 2, 0, 0]


def test_an_unparsable_response_keeps_its_score() -> None:
    wrong = replace(graded(0.0), status="unparsable")
    closed = rollout(lambda key, text: wrong).run(DRAWS)
    assert all(len(c.samples) == N for c in closed)


def test_the_scorer_is_waited_for_only_when_the_engine_has_nothing_left() -> None:
    base = rollout()

    class WatchingScorer(ShuffledScorer):
        def poll(self, wait: float):
            assert (wait >= 1) == (base.engine.pending == 0)
            return super().poll(wait)

    scorer = WatchingScorer(np.random.default_rng(0), mixed)
    replace(base, scorer=scorer).run(DRAWS)
    assert min(scorer.waits) == 0
    assert max(scorer.waits) >= 1


def test_an_engine_that_works_elsewhere_is_not_polled_in_a_spin() -> None:
    class ThreadEngine(ShuffledEngine):
        polls = 0

        def submit(self, requests):
            super().submit(requests)
            self.ready = threading.Event()
            threading.Timer(0.2, self.ready.set).start()

        def poll(self) -> list[Completion]:
            self.polls += 1
            return super().poll() if self.ready.is_set() else []

    engine = ThreadEngine(np.random.default_rng(0))
    replace(rollout(), engine=engine).run(DRAWS)
    assert engine.polls < 100


def test_an_engine_that_loses_a_response_is_found_out() -> None:
    class LosingEngine(ShuffledEngine):
        def poll(self) -> list[Completion]:
            return [c for c in super().poll() if (c.draw_index, c.sample_index) != (13, 2)]

    with pytest.raises(RuntimeError, match=r"1 responses are lost in the engine and 0 in the scorer.*\(13, 2\)"):
        replace(rollout(), engine=LosingEngine(np.random.default_rng(0))).run(DRAWS)


def test_an_engine_that_returns_a_response_twice_is_found_out() -> None:
    class DoublingEngine(ShuffledEngine):
        def poll(self) -> list[Completion]:
            return [c for c in super().poll() for _ in range(2)]

    with pytest.raises(RuntimeError, match=r"the engine returned response .* not awaited"):
        replace(rollout(), engine=DoublingEngine(np.random.default_rng(0))).run(DRAWS)


def test_a_scorer_that_returns_what_nobody_asked_for_is_found_out() -> None:
    class InventingScorer(ShuffledScorer):
        def poll(self, wait: float):
            return [*super().poll(wait), ((99, 0), graded(1.0))]

    with pytest.raises(RuntimeError, match=r"the scorer returned response \(draw, sample\) = \(99, 0\)"):
        replace(rollout(), scorer=InventingScorer(np.random.default_rng(0), mixed)).run(DRAWS)


def test_an_exception_drops_the_engines_requests() -> None:
    def verdict(key: tuple[int, int], text: str) -> RewardResult:
        raise OSError("the pool is gone")

    tools = rollout(verdict)
    with pytest.raises(OSError, match="the pool is gone"):
        tools.run(DRAWS)
    assert tools.engine.pending == 0
