from __future__ import annotations

import pytest

from megatron_dapo.plan.engine_sim import Engine, EngineModel, Response

# A step of b sequences takes 1 + max(2, b) seconds, 0.01 more for each cached token; a prefilled token 0.5.
PLAIN = EngineModel(1.0, 2.0, 1.0, 0.0, 0.0, max_sequences=8, cache_tokens=10_000)
FULL = EngineModel(1.0, 2.0, 1.0, 0.01, 0.5, max_sequences=8, cache_tokens=10_000)


def written(model: EngineModel, *lengths: int, prompt: int = 1) -> list[float]:
    """When each response ends."""
    engine, responses = Engine(model), [Response(i, prompt, length) for i, length in enumerate(lengths)]
    engine.submit(responses)
    engine.run()
    return [response.finished_at for response in responses]


def test_a_step_takes_as_long_as_the_slower_of_weights_and_products() -> None:
    assert written(PLAIN, 4) == [4 * (1 + 2)]
    assert written(PLAIN, 4, 4, 4, 4) == [4 * (1 + 4)] * 4


def test_sequences_that_end_make_the_others_faster() -> None:
    # Two steps of three sequences, three of two, five of one.
    assert written(PLAIN, 2, 5, 10) == [2 * 4, 2 * 4 + 3 * 3, 2 * 4 + 3 * 3 + 5 * 3]


def test_cached_tokens_and_prefill_are_paid_for() -> None:
    # Prefill 3 x 0.5; steps with 3 and 4 cached tokens before them.
    assert written(FULL, 2, prompt=3) == [pytest.approx(1.5 + 2 * 3 + 0.01 * (3 + 4))]


def test_a_place_that_becomes_free_is_taken_by_the_next_in_order() -> None:
    one_place = EngineModel(1.0, 2.0, 1.0, 0.0, 0.0, max_sequences=1, cache_tokens=10_000)
    assert written(one_place, 5, 1, 3) == [15, 18, 27]


def test_events_in_closed_form_take_as_long_as_steps_one_by_one() -> None:
    def slowly(lengths: list[int]) -> float:
        clock, cached, left = 0.5 * 7 * len(lengths), 7 * len(lengths), sorted(lengths)
        for step in range(1, max(lengths) + 1):
            running = [length for length in left if length >= step]
            clock += 1 + max(2, len(running)) + 0.01 * cached
            cached += len(running) - sum(7 + step for length in running if length == step)
        return clock

    lengths = [3, 17, 17, 29, 64]
    assert max(written(FULL, *lengths, prompt=7)) == pytest.approx(slowly(lengths))


def test_a_full_cache_sends_the_last_one_away_and_all_are_written_in_the_end() -> None:
    engine = Engine(EngineModel(1.0, 2.0, 1.0, 0.0, 0.5, max_sequences=8, cache_tokens=1000))
    responses = [Response(i, 1, 600) for i in range(2)]
    engine.submit(responses)
    engine.run()
    # 499 steps of two fill the cache; the first goes on alone; the second prefills its 500 tokens once more.
    assert engine.preemptions == 1
    first = 2 * 0.5 + 600 * 3
    assert [r.finished_at for r in responses] == [first, first + 500 * 0.5 + 101 * 3]


def test_a_sequence_that_can_never_fit_is_refused_with_its_numbers() -> None:
    with pytest.raises(ValueError, match=r"1 \+ 10000 tokens does not fit .* 10000 tokens"):
        Engine(PLAIN).submit([Response(0, 1, 10_000)])


def test_stopping_at_a_time_keeps_whole_steps_and_going_on_ends_as_if_never_stopped() -> None:
    whole = written(FULL, 10, 40, prompt=3)
    engine, responses = Engine(FULL), [Response(0, 3, 10), Response(1, 3, 40)]
    engine.submit(responses)
    engine.run(until=60.0)
    left = [(r.name, r.done) for r in engine.stop()]
    # 3 s of prefill; steps of 3.06, 3.08, ... seconds: ten of them until 34.2 + ..., then one sequence alone.
    assert left[0][0] == 1
    clock, cached, done = 3.0, 6, 0
    while True:
        running = 2 if done < 10 else 1
        step = 3 + 0.01 * cached
        if clock + step > 60.0:
            break
        clock, done = clock + step, done + 1
        cached += running - (13 if done == 10 else 0)
    assert left == [(1, done)]
    assert responses[0].finished_at == pytest.approx(whole[0])
