from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_dapo.rollout.sampling import RowSampler, uniforms
from megatron_dapo.types import SamplingParams
from tests.unit.rollout.reference import restricted_log_softmax

CPU = torch.device("cpu")


def splitmix64(state: int, count: int) -> list[int]:
    """The generator as published, in Python's whole numbers."""
    out = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        out.append(z ^ (z >> 31))
    return out


def test_uniforms_are_the_high_bits_of_splitmix64_started_at_a_hash_of_the_seed() -> None:
    assert splitmix64(1234567, 2) == [6457827717110365317, 3203168211198807973]  # published test vector
    hashed = splitmix64((42 - 0x9E3779B97F4A7C15) % 2**64, 1)[0]
    expected = [(z >> 16) / 2**48 for z in splitmix64(hashed, 5)]
    assert uniforms(np.array([42], np.uint64), 0, 5).tolist() == [expected]


def test_a_draw_does_not_depend_on_where_its_block_starts_nor_on_other_seeds() -> None:
    whole = uniforms(np.arange(5, dtype=np.uint64), 0, 100)
    assert np.array_equal(uniforms(np.array([3], np.uint64), 64, 36), whole[3:4, 64:])


@pytest.mark.parametrize("axis", [0, 1], ids=["over neighbouring seeds", "over draws of a seed"])
def test_uniforms_are_uniform_and_not_correlated_with_their_neighbours(axis: int) -> None:
    seeds, draws = (10_000, 2) if axis == 0 else (2, 10_000)
    u = uniforms(np.arange(seeds, dtype=np.uint64), 0, draws)
    assert u.min() >= 0
    assert u.max() < 1
    series = u[:, 0] if axis == 0 else u[0]
    counts = np.histogram(series, bins=20, range=(0, 1))[0]
    assert ((counts - 500) ** 2 / 500).sum() < 43.8  # 0.999 quantile, 19 degrees of freedom
    assert abs(np.corrcoef(series[:-1], series[1:])[0, 1]) < 3.3 / 100
    assert abs(np.corrcoef(*(u.T if axis == 0 else u))[0, 1]) < 3.3 / 100


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(1),
        SamplingParams(1, temperature=0.6),
        SamplingParams(1, top_k=4),
        SamplingParams(1, top_p=0.75),
        SamplingParams(1, temperature=1.5, top_k=9, top_p=0.6),
        SamplingParams(1, top_p=1e-9),
        SamplingParams(1, top_k=100),
    ],
    ids=str,
)
def test_a_uniform_number_picks_the_token_whose_share_of_the_mass_it_falls_into(params: SamplingParams) -> None:
    torch.manual_seed(0)
    logits_V = 2 * torch.randn(17)
    u = (torch.arange(500, dtype=torch.float64) + 0.5) / 500
    tokens, logprobs = RowSampler.of([params] * 500, 17, CPU).sample(logits_V.expand(500, 17), u)
    expected_logprobs = restricted_log_softmax(logits_V.double(), params)
    edges = expected_logprobs.exp().cumsum(-1)
    for i in range(500):
        if (u[i] - edges).abs().min() > 1e-6:
            assert tokens[i] == int((edges <= u[i]).sum())
    np.testing.assert_allclose(logprobs.numpy(), expected_logprobs[tokens].numpy(), atol=1e-5)
    assert expected_logprobs[tokens].isfinite().all(), "no token outside the restriction"


def test_the_ends_of_the_unit_interval_pick_tokens_that_have_mass() -> None:
    logits_BV = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]] * 2)
    u = torch.tensor([0.0, 1 - 2.0**-48], dtype=torch.float64)
    tokens, logprobs = RowSampler.of([SamplingParams(1)] * 2, 4, CPU).sample(logits_BV, u)
    assert tokens.tolist() == [1, 2]
    assert logprobs.isfinite().all()


def test_greedy_ignores_the_number_and_the_restrictions() -> None:
    logits_BV = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    params = [SamplingParams(1, temperature=0, top_k=1, top_p=0.1), SamplingParams(1, top_k=1)]
    u = torch.tensor([0.99, 0.99], dtype=torch.float64)
    tokens, logprobs = RowSampler.of(params, 3, CPU).sample(logits_BV, u)
    assert tokens.tolist() == [1, 0]
    np.testing.assert_allclose(logprobs.numpy(), [-0.40760596, 0.0], atol=1e-6)  # -log(1 + e^-1 + e^-2)


def test_exactly_k_of_equal_logits_are_kept_those_of_lower_id() -> None:
    u = (torch.arange(300, dtype=torch.float64) + 0.5) / 300
    tokens, _ = RowSampler.of([SamplingParams(1, top_k=2)] * 300, 5, CPU).sample(torch.zeros(300, 5), u)
    assert set(tokens.tolist()) == {0, 1}


def test_a_token_of_tiny_mass_is_drawn_where_its_turn_comes() -> None:
    logits_BV = torch.tensor([[0.0, -20.0]] * 2)  # masses 1 - 2e-9 and 2e-9
    u = torch.tensor([1 - 1e-9, 1 - 4e-9], dtype=torch.float64)
    tokens, _ = RowSampler.of([SamplingParams(1)] * 2, 2, CPU).sample(logits_BV, u)
    assert tokens.tolist() == [1, 0]
