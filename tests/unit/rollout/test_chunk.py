from __future__ import annotations

import pytest
import torch

from megatron_dapo.types import Completion, Request, SamplingParams
from tests.unit.rollout.reference import (
    FAMILIES,
    GREEDY,
    SAMPLED,
    assert_same,
    engine_for,
    prompts,
    reference_model,
    requests,
    run,
)


def test_requests_of_one_call_may_have_different_sampling_parameters() -> None:
    model = reference_model("qwen2")
    kinds = [
        GREEDY,
        SAMPLED,
        SamplingParams(3, temperature=0.5),
        SamplingParams(9, top_p=0.5),
        SamplingParams(5, top_k=1),
    ]
    asked = [r for i, kind in enumerate(kinds) for r in requests(prompts(4), kind, first_draw=10 * i)]
    mixed = run(engine_for(model), asked)
    apart: dict[tuple[int, int], Completion] = {}
    for i in range(len(kinds)):
        apart |= run(engine_for(model), asked[4 * i : 4 * i + 4])
    assert_same(mixed, apart)


def test_equal_prompts_answer_as_if_each_had_been_sent_alone() -> None:
    engine = engine_for(reference_model("qwen3"))
    asked = requests(prompts(4), SAMPLED, samples=5)
    together = run(engine, asked)
    apart: dict[tuple[int, int], Completion] = {}
    for request in asked:
        apart |= run(engine, [request])
    assert_same(together, apart)
    assert len({tuple(c.token_ids) for c in together.values()}) > 10, "samples of a group should differ"


def test_a_prompt_is_computed_once_for_all_its_samples() -> None:
    model = reference_model("qwen2")
    engine = engine_for(model)
    seen: list[torch.Size] = []
    embed = engine._model.get_input_embeddings()
    with_hook = embed.register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    run(engine, requests(prompts(3, shortest=4, longest=4), SamplingParams(1), samples=6))
    with_hook.remove()
    assert seen == [torch.Size([3, 4])]


def test_finished_rows_leave_the_batch() -> None:
    engine = engine_for(reference_model("qwen2"), eos=())
    rows: list[int] = []
    embed = engine._model.get_input_embeddings()
    with_hook = embed.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    asked = [Request(i, 0, prompts(1)[0], i, SamplingParams(max_tokens=n)) for i, n in enumerate([2, 5, 1, 3, 5])]
    run(engine, asked)
    with_hook.remove()
    assert rows == [1, 4, 3, 2, 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_outlive_others_answer_as_if_alone(family: str) -> None:
    engine = engine_for(reference_model(family), eos=())
    limits = [1, 20, 3, 3, 20, 7, 40, 2, 11, 5]
    asked = [
        Request(i, 0, ids, seed=i, params=SamplingParams(max_tokens=n))
        for i, (ids, n) in enumerate(zip(prompts(len(limits)), limits, strict=True))
    ]
    together = run(engine, asked)
    assert [len(together[i, 0].token_ids) for i in range(len(limits))] == limits
    apart: dict[tuple[int, int], Completion] = {}
    for request in asked:
        apart |= run(engine, [request])
    assert_same(together, apart)


def test_chunking_changes_no_token() -> None:
    model = reference_model("qwen2")
    asked = requests(prompts(5), SAMPLED, samples=3)
    assert_same(run(engine_for(model, max_num_seqs=64), asked), run(engine_for(model, max_num_seqs=4), asked))
