"""The KL estimators against the recipe's golden numbers and against autograd."""

from __future__ import annotations

import pytest
import torch

from megatron_dapo.algo.kl import KL_ESTIMATORS, kl_penalty


@pytest.mark.parametrize("kind", KL_ESTIMATORS)
def test_values_are_the_recipes(case, kind):
    logp, ref_logp, expected = (
        torch.tensor(values, dtype=torch.float64) for values in (case["logp"], case["ref_logp"], case["kl"][kind])
    )
    mask = torch.arange(logp.shape[1]) < torch.tensor(case["length"])[:, None]
    value, _ = kl_penalty(logp, ref_logp, kind)
    torch.testing.assert_close(value * mask, expected, rtol=0, atol=1e-9)


EQUATIONS = {
    "kl": lambda logp, ref: logp - ref,
    "abs": lambda logp, ref: (logp - ref).abs(),
    "mse": lambda logp, ref: (logp - ref) ** 2 / 2,
    "low_var_kl": lambda logp, ref: (torch.exp(ref - logp) - (ref - logp) - 1).clamp(-10, 10),
}


@pytest.mark.parametrize("kind", KL_ESTIMATORS)
def test_value_and_gradient_equal_autograd_on_the_equation(kind):
    logp = torch.linspace(-15, 15, 301, dtype=torch.float64, requires_grad=True)
    ref_logp = torch.zeros_like(logp)
    expected = EQUATIONS[kind](logp, ref_logp)
    (slope,) = torch.autograd.grad(expected.sum(), logp)
    value, grad = kl_penalty(logp.detach(), ref_logp, kind)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, slope, rtol=1e-12, atol=1e-12)


def test_low_var_kl_stays_finite_and_flat_however_far_the_two_policies_are_apart():
    logp = torch.tensor([-torch.inf, -1e4, 1e4], dtype=torch.float32)
    value, grad = kl_penalty(logp, torch.zeros(3), "low_var_kl")
    assert value.tolist() == [10.0] * 3
    assert grad.tolist() == [0.0] * 3


@pytest.mark.parametrize("kind", KL_ESTIMATORS)
def test_dtype_is_kept(kind):
    value, grad = kl_penalty(torch.tensor([-1.0]).bfloat16(), torch.tensor([-2.0]).bfloat16(), kind)
    assert (value.dtype, grad.dtype) == (torch.bfloat16, torch.bfloat16)
