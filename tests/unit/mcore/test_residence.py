"""What leaves the device is gone from it, and training goes on afterwards to the same last bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dapo.config.tree import OffloadPart, OptimConfig
from megatron_dapo.mcore.optimizer import apply_update, zero_gradients
from megatron_dapo.mcore.parallel import RankLayout
from megatron_dapo.mcore.residence import PARTS, Residence
from tests.unit.mcore.helpers import OPTIMIZERS, Training, start_training


@pytest.fixture(params=OPTIMIZERS)
def start(
    layout: RankLayout, checkpoint_of: Callable[..., Path], request: pytest.FixtureRequest
) -> Callable[[], Training]:
    return lambda: start_training(checkpoint_of(), OptimConfig(lr=0.01), OPTIMIZERS[request.param])


def update(training: Training, number: int) -> None:
    zero_gradients(training.modules, training.optimizer)
    training.set_gradients(seed=number)
    assert apply_update(training.optimizer, lr=0.01, loss=0.0).applied


def buffers(training: Training) -> list[Any]:
    modules: list[Any] = list(training.modules)
    return [buffer for module in modules for buffer in module.buffers]


def held_bytes(training: Training) -> dict[str, int]:
    """Bytes in the storages of the weights, of the gradient buffers and of Adam's moments."""
    weights = {p.untyped_storage()._cdata: p.untyped_storage() for chunk in training.chunks for p in chunk.parameters()}
    moments = [
        state[name]
        for part in training.optimizer.chained_optimizers
        for state in part.optimizer.state.values()
        for name in ("exp_avg", "exp_avg_sq")
    ]
    return {
        "weights": sum(storage.nbytes() for storage in weights.values()),
        "gradients": sum(buffer.grad_data.untyped_storage().nbytes() for buffer in buffers(training)),
        "optimizer": sum(moment.untyped_storage().nbytes() for moment in moments),
    }


@pytest.mark.parametrize("parts", [PARTS, ("weights",), ("gradients", "optimizer")])
def test_updates_go_on_to_the_same_last_bit_after_parts_were_away(
    start: Callable[[], Training], parts: tuple[OffloadPart, ...]
):
    staying, leaving = start(), start()
    residence = Residence(leaving.modules, leaving.optimizer)
    for number in range(3):
        residence.leave(parts)
        residence.leave(parts)  # once more is nothing
        residence.come_back()
        for training in (staying, leaving):
            update(training, number)
    weights = staying.weights()
    assert all(torch.equal(weights[name], weight) for name, weight in leaving.weights().items())
    assert all(torch.equal(*pair) for pair in zip(leaving.moments(), staying.moments(), strict=True))


def test_the_memory_of_what_is_away_is_given_back_and_of_nothing_else(start: Callable[[], Training]):
    training = start()
    update(training, 0)
    before = held_bytes(training)
    assert all(before.values())
    residence = Residence(training.modules, training.optimizer)
    for part in PARTS:
        residence.leave([part])
        assert held_bytes(training) == before | {part: 0}
        residence.come_back([part])
        assert held_bytes(training) == before


def test_gradients_come_back_as_zeros(start: Callable[[], Training]):
    training = start()
    training.set_gradients(seed=0)
    residence = Residence(training.modules, training.optimizer)
    residence.leave(["gradients"])
    residence.come_back()
    assert all(not buffer.grad_data.any() for buffer in buffers(training))


def test_a_weight_that_is_away_cannot_be_read_unnoticed(start: Callable[[], Training]):
    training = start()
    Residence(training.modules, training.optimizer).leave(["weights"])
    param = next(training.chunks[0].parameters())
    with pytest.raises(RuntimeError, match="storage of size 0"):
        param.data.view(-1)[:1].clone()
