from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from megatron_dapo.rollout.failures import WeightsNotLoadedError
from megatron_dapo.rollout.sampling import uniforms
from megatron_dapo.rollout.torch_engine import TorchEngine
from megatron_dapo.types import Completion, Request, SamplingParams
from tests.unit.rollout.reference import (
    CONFIGS,
    EOS,
    FAMILIES,
    GREEDY,
    SAMPLED,
    VOCAB,
    assert_identical,
    engine_for,
    prompts,
    reference_model,
    requests,
    run,
    sampled_logprobs,
)


def generated(model: PreTrainedModel, prompt: np.ndarray, max_tokens: int, eos: Sequence[int]) -> list[int]:
    """What transformers' own greedy `generate` answers to one prompt, alone."""
    ids = torch.from_numpy(prompt)[None]
    out = model.generate(  # pyright: ignore[reportCallIssue]
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=max_tokens,
        eos_token_id=list(eos),
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_generate(family: str) -> None:
    model = reference_model(family)
    eos = (EOS, 7)
    asked = requests(prompts(8), GREEDY)
    done = run(engine_for(model, eos), asked)
    expected = [generated(model, r.prompt_ids, 16, eos) for r in asked]
    assert [done[r.draw_index, 0].token_ids.tolist() for r in asked] == expected
    reasons = [done[r.draw_index, 0].finish_reason for r in asked]
    assert reasons == ["stop" if tokens[-1] in eos else "length" for tokens in expected]
    assert set(reasons) == {"stop", "length"}, "the case should hold both"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(16),
        SamplingParams(16, temperature=0.7),
        SamplingParams(16, top_p=0.7),
        SamplingParams(16, top_k=5),
        SamplingParams(16, temperature=1.3, top_k=8, top_p=0.8),
        GREEDY,
    ],
    ids=str,
)
def test_logprobs_are_those_of_a_full_forward_over_the_distribution_that_was_sampled(
    family: str, params: SamplingParams
) -> None:
    model = reference_model(family)
    asked = requests(prompts(6), params, samples=3)
    done = run(engine_for(model), asked)
    for request in asked:
        completion = done[request.draw_index, request.sample_index]
        assert completion.token_ids.dtype == np.int64
        assert completion.logprobs.dtype == np.float32
        np.testing.assert_allclose(completion.logprobs, sampled_logprobs(model, request, completion), atol=1e-5, rtol=0)
    assert len({len(c.token_ids) for c in done.values()}) > 1, "rows should finish at different steps"


def test_chunks_hold_max_num_seqs_requests_in_submission_order_and_never_two_calls() -> None:
    model = reference_model("qwen2")
    engine = engine_for(model, eos=(), max_num_seqs=4)
    asked = requests(prompts(3), SamplingParams(2), samples=2)
    engine.submit(asked)
    engine.submit(requests(prompts(1), SamplingParams(2), first_draw=9))
    batches = []
    while engine.pending:
        batches.append([(c.draw_index, c.sample_index) for c in engine.poll()])
    assert batches == [[(0, 0), (0, 1), (1, 0), (1, 1)], [(2, 0), (2, 1)], [(9, 0)]]


def test_rows_that_end_together_are_returned_in_submission_order() -> None:
    engine = engine_for(reference_model("qwen2"), eos=())
    engine.submit([Request(i, 0, np.array([4]), i, SamplingParams(n)) for i, n in enumerate([1, 5, 5, 5, 5])])
    assert [c.draw_index for c in engine.poll()] == [0]
    assert [c.draw_index for c in engine.poll()] == [1, 2, 3, 4]


def test_the_same_calls_give_the_same_bits_whenever_poll_is_called() -> None:
    model = reference_model("qwen2")
    first, second = requests(prompts(4), SAMPLED, samples=4), requests(prompts(3), SAMPLED, samples=4, first_draw=50)
    eager, late = engine_for(model, max_num_seqs=6), engine_for(model, max_num_seqs=6)
    before = run(eager, first) | run(eager, second)
    late.submit(first)
    after: dict[tuple[int, int], Completion] = {(c.draw_index, c.sample_index): c for c in late.poll()}
    late.submit(second)
    while late.pending:
        after |= {(c.draw_index, c.sample_index): c for c in late.poll()}
    assert_identical(before, after)


def test_the_seed_decides_the_tokens_and_nothing_else_of_the_name_does() -> None:
    engine = engine_for(reference_model("qwen2"), eos=())
    prompt = prompts(1)[0]
    asked = [
        Request(draw, sample, prompt, seed, SamplingParams(20))
        for draw, sample, seed in [(0, 0, 5), (7, 3, 5), (1, 0, 6), (2, 0, -1), (3, 0, 2**64 - 1), (4, 0, 2**80 + 5)]
    ]
    done = run(engine, asked)
    tokens = {name: tuple(c.token_ids) for name, c in done.items()}
    assert tokens[0, 0] == tokens[7, 3] == tokens[4, 0]
    assert tokens[0, 0] != tokens[1, 0]
    assert tokens[2, 0] == tokens[3, 0]


def test_torchs_random_state_is_neither_read_nor_moved() -> None:
    model = reference_model("qwen2")
    asked = requests(prompts(3), SAMPLED)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = run(engine_for(model), asked)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert_identical(first, run(engine_for(model), asked))


def test_sampled_frequencies_follow_the_distribution() -> None:
    """Chi-square over 4000 seeds: first tokens against the model's own distribution, at T = 1.2 and top-k 6."""
    model = reference_model("qwen2")
    engine = engine_for(model, max_num_seqs=1000)
    prompt = prompts(1)[0]
    params = SamplingParams(1, temperature=1.2, top_k=6)
    done = run(engine, [Request(0, s, prompt, s, params) for s in range(4000)])
    logits = model(torch.from_numpy(prompt)[None]).logits[0, -1].double() / 1.2
    top = logits.topk(6)
    expected = 4000 * torch.softmax(top.values, -1).numpy()
    drawn = np.array([c.token_ids[0] for c in done.values()])
    counts = np.array([(drawn == token).sum() for token in top.indices.tolist()])
    assert counts.sum() == 4000
    assert expected.min() > 5
    assert ((counts - expected) ** 2 / expected).sum() < 20.5  # 0.999 quantile, 5 degrees of freedom


def test_eos_at_the_last_allowed_token_is_a_stop() -> None:
    model = reference_model("qwen2")
    engine = engine_for(model, eos=range(VOCAB))
    done = run(engine, requests(prompts(3), SamplingParams(max_tokens=1)))
    assert [c.finish_reason for c in done.values()] == ["stop"] * 3


def test_a_response_may_fill_the_models_positions() -> None:
    model = reference_model("llama")
    asked = requests([np.arange(4, 14)], SamplingParams(182))
    completion = run(engine_for(model, eos=()), asked)[0, 0]
    assert len(completion.token_ids) == 182
    np.testing.assert_allclose(completion.logprobs, sampled_logprobs(model, asked[0], completion), atol=1e-5, rtol=0)


def test_token_t_of_a_response_is_what_draw_t_of_its_seed_picks() -> None:
    model = reference_model("qwen2")
    asked = requests(prompts(2), SamplingParams(150), samples=2)
    done = run(engine_for(model, eos=()), asked)
    for request in asked:
        tokens = done[request.draw_index, request.sample_index].token_ids
        ids = torch.from_numpy(np.concatenate([request.prompt_ids, tokens]))
        probabilities = torch.softmax(model(ids[None]).logits[0, len(request.prompt_ids) - 1 : -1].double(), -1)
        draws = torch.from_numpy(uniforms(np.array([request.seed], np.uint64), 0, 150)[0])
        picked = (probabilities.cumsum(-1) <= draws[:, None]).sum(-1)
        assert picked.tolist() == tokens.tolist()


def test_new_weights_change_answers_and_version() -> None:
    engine = engine_for(reference_model("llama"))
    asked = requests(prompts(4), SAMPLED)
    before = run(engine, asked)
    other = reference_model("llama", seed=1)
    engine.load_weights(other.named_parameters(), version=2)
    after = run(engine, asked)
    assert {c.weight_version for c in before.values()} == {1}
    assert {c.weight_version for c in after.values()} == {2}
    assert_identical(after, run(engine_for(other), asked))
    assert any(before[name].token_ids.tolist() != after[name].token_ids.tolist() for name in before)


def test_weights_are_copied_in_place_and_converted() -> None:
    model = reference_model("qwen2")
    engine = engine_for(model)
    addresses = {name: p.data_ptr() for name, p in engine._model.named_parameters()}
    sent = {name: p.to(torch.bfloat16).requires_grad_() for name, p in model.named_parameters()}
    engine.load_weights(sent.items(), version=2)
    for name, p in engine._model.named_parameters():
        assert p.data_ptr() == addresses[name]
        assert p.dtype == torch.float32
        assert not p.requires_grad
        assert torch.equal(p, sent[name].float())
    with torch.no_grad():
        sent["model.norm.weight"].zero_()
    assert engine._model.get_parameter("model.norm.weight").any(), "the engine keeps its own copy"


def test_a_tied_output_projection_may_come_or_stay_away() -> None:
    model = reference_model("qwen2")
    assert "lm_head.weight" not in dict(model.named_parameters())
    engine = engine_for(model)
    asked = requests(prompts(3), SAMPLED)
    without = run(engine, asked)
    engine.load_weights(model.state_dict().items(), version=1)
    assert_identical(without, run(engine, asked))
    wrong = model.state_dict() | {"lm_head.weight": torch.zeros(3, 3)}
    with pytest.raises(ValueError, match=r"'lm_head.weight' has shape \[3, 3\]; the model has \[40, 32\]"):
        engine.load_weights(wrong.items(), version=2)


def test_an_untied_output_projection_must_come() -> None:
    model = reference_model("llama")
    weights = {name: p for name, p in model.named_parameters() if name != "lm_head.weight"}
    with pytest.raises(ValueError, match=r"1 of 21 weights never came in version 2: lm_head.weight"):
        engine_for(model).load_weights(weights.items(), version=2)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda w: {"model.layers.0.mlp.up.weight": torch.zeros(1)} | w,
            "nearest is 'model.layers.0.mlp.up_proj.weight'",
        ),
        (lambda w: w | {"model.norm.weight": torch.zeros(31)}, r"'model.norm.weight' has shape \[31\]; .* \[32\]"),
        (lambda w: dict(list(w.items())[:-2]), "2 of 26 weights never came in version 2"),
    ],
    ids=["unknown name", "wrong shape", "missing"],
)
def test_wrong_weights_are_refused_and_stop_generation_until_a_good_load(change, message: str) -> None:
    model = reference_model("qwen2")
    engine = engine_for(model)
    with pytest.raises(ValueError, match=message):
        engine.load_weights(change(dict(model.named_parameters())).items(), version=2)
    with pytest.raises(WeightsNotLoadedError):
        engine.submit(requests(prompts(1), SAMPLED))
    engine.load_weights(model.named_parameters(), version=3)
    assert {c.weight_version for c in run(engine, requests(prompts(1), SAMPLED)).values()} == {3}


def test_a_weight_that_comes_twice_is_refused() -> None:
    model = reference_model("qwen2")
    twice = [*model.named_parameters(), ("model.norm.weight", torch.zeros(32))]
    with pytest.raises(ValueError, match=r"'model.norm.weight' came twice"):
        engine_for(model).load_weights(twice, version=2)


def test_generation_before_the_first_load_is_refused() -> None:
    engine = TorchEngine(CONFIGS["qwen2"](), [EOS], max_num_seqs=4, device="cpu", dtype=torch.float32)
    assert engine.poll() == []
    with pytest.raises(WeightsNotLoadedError, match="load_weights"):
        engine.submit(requests(prompts(1), SAMPLED))


def test_weights_do_not_change_under_a_response() -> None:
    model = reference_model("qwen2")
    engine = engine_for(model)
    engine.submit(requests(prompts(2), SAMPLED))
    with pytest.raises(RuntimeError, match="2 requests are pending"):
        engine.load_weights(model.named_parameters(), version=2)
    while engine.pending:
        assert {c.weight_version for c in engine.poll()} <= {1}


def test_weights_that_are_not_finite_are_named_and_nothing_is_lost() -> None:
    model = reference_model("qwen2")
    engine = engine_for(model)
    broken = dict(model.named_parameters()) | {"model.norm.weight": torch.full((32,), torch.nan)}
    engine.load_weights(broken.items(), version=2)
    engine.submit(requests(prompts(2), SAMPLED))
    for _ in range(2):
        with pytest.raises(FloatingPointError, match="draw 0, sample 0, response token 0, weight version 2"):
            engine.poll()
    assert engine.pending == 2


def test_abort_drops_everything_and_the_engine_goes_on() -> None:
    model = reference_model("qwen2")
    engine = engine_for(model, eos=(), max_num_seqs=4)
    asked = requests(prompts(3), SamplingParams(12), samples=3)
    engine.submit(asked)
    assert engine.pending == 9
    assert engine.poll() == []
    engine.abort()
    assert engine.pending == 0
    assert [engine.poll() for _ in range(5)] == [[]] * 5
    assert_identical(run(engine, asked), run(engine_for(model, eos=(), max_num_seqs=4), asked))


@pytest.mark.parametrize(
    "request_, message",
    [
        (Request(1, 2, np.zeros(0, np.int64), 0, SAMPLED), r"\(draw 1, sample 2\): the prompt is empty"),
        (Request(1, 2, np.arange(60), 0, SAMPLED), "prompt ids range from 0 to 59; the vocabulary ends at 39"),
        (Request(1, 2, np.array([-1]), 0, SAMPLED), "prompt ids range from -1 to -1"),
        (
            Request(1, 2, np.full(180, 4), 0, SAMPLED),
            r"180 prompt tokens \+ max_tokens 16 = 196 .* 192 .* max_tokens 12 or",
        ),
        (Request(1, 2, np.array([4]), 0, SamplingParams(0)), "max_tokens is 0"),
        (Request(1, 2, np.array([4]), 0, SamplingParams(1, temperature=-0.5)), "temperature is -0.5"),
        (Request(1, 2, np.array([4]), 0, SamplingParams(1, temperature=float("nan"))), "temperature is nan"),
        (Request(1, 2, np.array([4]), 0, SamplingParams(1, top_p=0.0)), "top_p is 0.0"),
        (Request(1, 2, np.array([4]), 0, SamplingParams(1, top_k=0)), "top_k is 0"),
        (Request(0, 0, np.array([4]), 0, SAMPLED), r"\(draw 0, sample 0\) is pending already"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_request_that_cannot_be_is_refused_with_all_of_its_call(request_: Request, message: str) -> None:
    engine = engine_for(reference_model("qwen2"))
    good = Request(0, 0, np.array([4]), 0, SAMPLED)
    with pytest.raises(ValueError, match=message):
        engine.submit([good, request_])
    assert engine.pending == 0
    run(engine, [good])


def test_a_name_that_is_pending_from_another_call_is_refused_until_it_returns() -> None:
    engine = engine_for(reference_model("qwen2"))
    asked = requests(prompts(1), SAMPLED)
    engine.submit(asked)
    with pytest.raises(ValueError, match="is pending already"):
        engine.submit(asked)
    while engine.pending:
        engine.poll()
    run(engine, asked)


def test_the_engine_is_built_from_a_folder_by_its_config_alone(tmp_path) -> None:
    model = reference_model("qwen3")
    model.config.save_pretrained(tmp_path)
    engine = TorchEngine(tmp_path, [EOS], max_num_seqs=8, device="cpu", dtype=torch.float32)
    engine.load_weights(model.named_parameters(), version=1)
    asked = requests(prompts(3), SAMPLED)
    assert_identical(run(engine, asked), run(engine_for(model), asked))


def test_bfloat16_generates_from_float32_weights() -> None:
    model = reference_model("qwen2")
    engine = TorchEngine(model.config, [EOS], max_num_seqs=8, device="cpu", dtype=torch.bfloat16)
    engine.load_weights(model.named_parameters(), version=1)
    asked = requests(prompts(6), SamplingParams(6))
    done = run(engine, asked)
    for request in asked:
        completion = done[request.draw_index, 0]
        # 8 bits of mantissa on logits of up to 30 or so
        np.testing.assert_allclose(completion.logprobs, sampled_logprobs(model, request, completion), atol=0.3, rtol=0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"eos_token_ids": [3, VOCAB]}, r"eos_token_ids \[40\] are outside the model's vocabulary of 40"),
    ],
)
def test_an_engine_that_cannot_be_is_refused(arguments: dict, message: str) -> None:
    good = {"eos_token_ids": [EOS], "max_num_seqs": 4, "device": "cpu", "dtype": torch.float32}
    with pytest.raises(ValueError, match=message):
        TorchEngine(CONFIGS["qwen2"](), **(good | arguments))
