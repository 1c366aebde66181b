"""The policy loss against the recipe's golden numbers, against autograd, and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dapo.algo.aggregation import SequenceLayout, sequence_weights
from megatron_dapo.algo.loss import LOG_RATIO_LIMIT, PolicyLossConfig, policy_loss

DAPO = PolicyLossConfig(clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=10.0)


def by_graph(logp: torch.Tensor, old_logp: torch.Tensor, advantage: torch.Tensor, config: PolicyLossConfig):
    """The equation written as its textbook form, differentiated by autograd: (loss, gradient)."""
    logp = logp.detach().clone().requires_grad_()
    ratio = (logp - old_logp).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    limited = ratio.clamp(1 - config.clip_ratio_low, 1 + config.clip_ratio_high)
    loss = torch.maximum(-advantage * ratio, -advantage * limited)
    loss = torch.where(advantage < 0, torch.minimum(loss, -advantage * config.clip_ratio_c), loss)
    (grad,) = torch.autograd.grad(loss.sum(), logp)
    return loss.detach(), grad


@pytest.mark.parametrize("scale", ["global", "reference"])
@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
@pytest.mark.parametrize("clip_ratio_c", [3, 10])
def test_weighted_loss_gradient_and_clip_fractions_are_the_recipes(case, golden, mode, scale, clip_ratio_c):
    config = PolicyLossConfig(golden["clip_ratio_low"], golden["clip_ratio_high"], clip_ratio_c)
    expected = case["loss"][f"{mode}|clip_ratio_c={clip_ratio_c}"]
    logp, old_logp = (torch.tensor(case[key], dtype=torch.float64) for key in ("logp", "old_logp"))
    lengths = np.array(case["length"])
    mask = torch.arange(logp.shape[1]) < torch.tensor(lengths)[:, None]
    advantage = torch.tensor(case["advantage"], dtype=torch.float64)[:, None].expand_as(logp)

    one_micro_batch = SequenceLayout(np.zeros(len(lengths), int), np.zeros(len(lengths), int), dp_size=1)
    weights = torch.from_numpy(sequence_weights(mode, scale, lengths, case["group"], layout=one_micro_batch))
    weights = weights[:, None] * mask
    result = policy_loss(logp, old_logp, advantage, config)

    assert float((weights * result.loss).sum()) == pytest.approx(expected["loss"], abs=1e-9)
    torch.testing.assert_close(
        weights * result.grad, torch.tensor(expected["grad"], dtype=torch.float64), rtol=0, atol=1e-9
    )
    share = mask.double() / (mask.sum() + 1e-8)
    clipped = (result.clipped_high | result.clipped_low) * share
    assert float(clipped.sum()) == pytest.approx(expected["clipfrac"], abs=1e-9)
    assert float((result.dual_clipped * share).sum()) == pytest.approx(expected["clipfrac_lower"], abs=1e-9)


# Each bound from both sides, but not to the last bit: there rounding alone says which branch is the larger.
bounds = [math.log(0.8), math.log(1.28), math.log(10.0)]
edges = st.sampled_from([0.0, 20.0, -20.0, 25.0, -25.0, 300.0, *(b + e for b in bounds for e in (-1e-9, 1e-9))])
log_ratios = st.one_of(edges, st.floats(-5, 5))
advantages = st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0]), st.floats(1e-3, 3), st.floats(-3, -1e-3))


@settings(max_examples=200)
@given(st.lists(st.tuples(log_ratios, advantages), min_size=1, max_size=8))
def test_loss_and_gradient_equal_autograd_on_both_sides_of_every_bound(tokens):
    log_ratio, advantage = torch.tensor(tokens, dtype=torch.float64).unbind(1)
    result = policy_loss(log_ratio - 1.5, torch.full_like(log_ratio, -1.5), advantage, DAPO)
    loss, grad = by_graph(log_ratio - 1.5, torch.full_like(log_ratio, -1.5), advantage, DAPO)
    torch.testing.assert_close(result.loss, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(result.grad, grad, rtol=1e-12, atol=0)


def test_a_ratio_of_exactly_c_has_half_the_slope_as_autograd_has():
    config = PolicyLossConfig(0.2, 0.28, math.exp(1.0))
    logp, old_logp, advantage = torch.tensor([[1.0], [0.0], [-2.0]], dtype=torch.float64)
    assert torch.equal((logp - old_logp).exp(), torch.tensor([config.clip_ratio_c], dtype=torch.float64))
    result = policy_loss(logp, old_logp, advantage, config)
    assert result.grad.item() == pytest.approx(math.e) == by_graph(logp, old_logp, advantage, config)[1].item()
    assert not result.dual_clipped.item()


@pytest.mark.parametrize(
    "ratio, advantage, loss, slope, flag",
    [
        (1.1, 2.0, -2.2, -2.2, None),
        (1.5, 2.0, -2.56, 0.0, "clipped_high"),
        (0.5, 2.0, -1.0, -1.0, None),
        (1.5, -2.0, 3.0, 3.0, None),
        (0.5, -2.0, 1.6, 0.0, "clipped_low"),
        (12.0, -2.0, 20.0, 0.0, "dual_clipped"),
        (12.0, 0.0, 0.0, 0.0, None),
    ],
)
def test_values_worked_by_hand(ratio, advantage, loss, slope, flag):
    logp, old_logp, advantages = torch.tensor([[math.log(ratio)], [0.0], [advantage]], dtype=torch.float64)
    result = policy_loss(logp, old_logp, advantages, DAPO)
    assert result.loss.item() == pytest.approx(loss)
    assert result.grad.item() == pytest.approx(slope)
    assert result.ratio.item() == pytest.approx(ratio)
    raised = {name for name in ("clipped_high", "clipped_low", "dual_clipped", "clamped") if getattr(result, name)}
    assert raised == ({flag} if flag else set())


def test_a_log_ratio_past_the_clamp_is_marked_has_a_finite_loss_and_no_gradient():
    log_ratio = torch.tensor([-1000.0, -21.0, -20.0, 20.0, 21.0, 1000.0, math.inf], dtype=torch.float64)
    result = policy_loss(log_ratio, torch.zeros_like(log_ratio), torch.ones_like(log_ratio), DAPO)
    assert result.clamped.tolist() == [True, True, False, False, True, True, True]
    assert result.loss.isfinite().all()
    assert result.grad[result.clamped].tolist() == [0.0] * 5
    assert result.grad[2].item() == pytest.approx(-math.exp(-20))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_and_shape_are_kept_and_inputs_are_left_alone(dtype):
    inputs = [torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3)]
    before = [tensor.clone() for tensor in inputs]
    logp, old_logp, advantage = inputs
    result = policy_loss(logp, old_logp, advantage, DAPO)
    assert {result.loss.dtype, result.grad.dtype, result.ratio.dtype} == {dtype}
    assert {result.loss.shape, result.grad.shape, result.clamped.shape} == {inputs[0].shape}
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, before, strict=True))


@pytest.mark.parametrize(
    "low, high, c, named", [(1.5, 0.28, 10, "1.5"), (0.2, -0.1, 10, "-0.1"), (0.2, 0.28, 1, "c is 1")]
)
def test_a_clip_range_that_cannot_be_is_refused_with_its_value(low, high, c, named):
    with pytest.raises(ValueError, match=named):
        PolicyLossConfig(low, high, c)
