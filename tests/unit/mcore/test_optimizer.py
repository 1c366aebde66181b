"""The learning rate by hand, weight decay, and updates that a bad number must not reach."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_dapo.config.tree import MegatronConfig, OptimConfig
from megatron_dapo.mcore.optimizer import apply_update, learning_rate, zero_gradients
from megatron_dapo.mcore.parallel import RankLayout
from tests.unit.mcore.helpers import Training, start_training

# Rates of steps 0, 1, 2, ... out of 6 with lr 8 and min_lr 2.
SCHEDULES = {
    "constant": (OptimConfig(lr=8.0, min_lr=2.0), [8, 8, 8, 8, 8, 8]),
    "warmup": (OptimConfig(lr=8.0, lr_warmup_steps=4), [2, 4, 6, 8, 8, 8]),
    "warmup from zero": (OptimConfig(lr=8.0, lr_warmup_steps=4, lr_warmup_from_zero=True), [0, 2, 4, 6, 8, 8]),
    "linear": (OptimConfig(lr=8.0, min_lr=2.0, lr_decay_style="linear"), [8, 7, 6, 5, 4, 3]),
    "linear after warmup": (
        OptimConfig(lr=8.0, min_lr=2.0, lr_decay_style="linear", lr_warmup_steps=2),
        [4, 8, 8, 6.5, 5, 3.5],
    ),
    "cosine": (
        OptimConfig(lr=8.0, min_lr=2.0, lr_decay_style="cosine"),
        [8, 5 + 1.5 * math.sqrt(3), 6.5, 5, 3.5, 5 - 1.5 * math.sqrt(3)],
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_learning_rate_follows_its_schedule(name: str):
    config, rates = SCHEDULES[name]
    assert [learning_rate(config, step, 6) for step in range(6)] == pytest.approx(rates)


@pytest.mark.parametrize("style", ["linear", "cosine"])
def test_a_decayed_rate_ends_at_its_minimum_and_stays_there(style: str):
    config = OptimConfig(lr=8.0, min_lr=2.0, lr_decay_style=style, lr_warmup_steps=2)
    assert [learning_rate(config, step, 6) for step in (6, 7, 100)] == pytest.approx([2, 2, 2])


def test_a_run_that_is_all_warmup_has_a_rate():
    config = OptimConfig(lr=8.0, lr_warmup_steps=4, lr_decay_style="cosine")
    assert [learning_rate(config, step, 4) for step in (0, 3, 4)] == pytest.approx([2, 8, 8])


@pytest.fixture(params=[True, False], ids=["distributed", "plain"])
def start(
    layout: RankLayout, request: pytest.FixtureRequest, checkpoint_of: Callable[..., Path]
) -> Callable[..., Training]:
    """start(optim, grad_clip) with the distributed optimizer and without."""
    megatron = MegatronConfig(use_distributed_optimizer=request.param)
    return lambda *args, **kwargs: start_training(checkpoint_of(), *args, megatron=megatron, **kwargs)


@pytest.mark.parametrize("decay_all", [True, False])
def test_norms_and_biases_decay_only_where_asked(start: Callable[..., Training], decay_all: bool):
    training = start(OptimConfig(weight_decay=0.5, weight_decay_all=decay_all))
    before = training.weights()
    training.set_gradients(None)
    assert apply_update(training.optimizer, lr=0.25, loss=0.0).applied
    for name, param in training.parameters.items():
        decays = decay_all or not (name.endswith("bias") or "norm" in name)
        torch.testing.assert_close(param.data, before[name] * (0.875 if decays else 1.0), rtol=1e-6, atol=0)


def test_an_update_is_adam_on_the_clipped_gradient(start: Callable[..., Training]):
    optim = OptimConfig(betas=(0.8, 0.9), eps=1e-3, weight_decay=0.1)
    training = start(optim, grad_clip=2.0)
    reference = {name: torch.nn.Parameter(weight) for name, weight in training.weights().items()}
    adam = torch.optim.AdamW(reference.values(), lr=1.0, betas=optim.betas, eps=optim.eps, weight_decay=0.1)
    for update, lr in enumerate((0.1, 0.02)):
        zero_gradients(training.modules, training.optimizer)
        training.set_gradients(seed=update)
        for name, param in training.parameters.items():
            reference[name].grad = param.main_grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(reference.values(), 2.0)
        adam.param_groups[0]["lr"] = lr
        adam.step()
        outcome = apply_update(training.optimizer, lr, loss=0.0)
        assert outcome.applied
        assert outcome.grad_norm == pytest.approx(norm.item(), rel=1e-6)
        assert outcome.grad_norm > 2.0  # what is reported is the norm before the clip
        for name, param in training.parameters.items():
            torch.testing.assert_close(param.data, reference[name].data, rtol=1e-5, atol=1e-6)


def test_a_clip_of_0_clips_nothing(start: Callable[..., Training]):
    """Adam alone cannot tell: scaled gradients take nearly the same first step. Its moments can."""
    training = start(grad_clip=0.0)
    training.set_gradients(seed=1)
    gradient = max(param.main_grad.abs().max() for param in training.parameters.values())
    apply_update(training.optimizer, lr=0.1, loss=0.0)
    for part in training.optimizer.chained_optimizers:
        largest = max(state["exp_avg"].abs().max() for state in part.optimizer.state.values())
        assert largest == pytest.approx(0.1 * gradient)


BAD = {"nan gradient": (math.nan, 0.0), "infinite gradient": (math.inf, 0.0), "nan loss": (0.5, math.nan)}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_number_changes_no_weight_and_no_moment(start: Callable[..., Training], name: str):
    gradient, loss = BAD[name]
    training, undisturbed = start(), start()
    for one in (training, undisturbed):
        one.set_gradients(seed=1)
        assert apply_update(one.optimizer, lr=0.1, loss=0.0).applied
    weights, moments = training.weights(), training.moments()

    zero_gradients(training.modules, training.optimizer)
    training.set_gradients(seed=2)
    next(iter(training.parameters.values())).main_grad[0, 0] = gradient
    outcome = apply_update(training.optimizer, lr=0.1, loss=loss)
    assert not outcome.applied
    assert math.isfinite(outcome.grad_norm) == math.isfinite(gradient)
    assert all(torch.equal(weights[name], weight) for name, weight in training.weights().items())
    assert all(torch.equal(*pair) for pair in zip(moments, training.moments(), strict=True))

    for one in (training, undisturbed):
        zero_gradients(one.modules, one.optimizer)
        one.set_gradients(seed=3)
        assert apply_update(one.optimizer, lr=0.1, loss=0.0).applied
    wanted = undisturbed.weights()
    assert all(torch.equal(wanted[name], weight) for name, weight in training.weights().items())


def test_gradients_are_zeroed(start: Callable[..., Training]):
    training = start()
    training.set_gradients(seed=1)
    zero_gradients(training.modules, training.optimizer)
    assert not any(param.main_grad.any() for param in training.parameters.values())
