"""After a load, training goes on as if it had never stopped, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from megatron_dapo.config.tree import OptimConfig
from megatron_dapo.digests import digest_file
from megatron_dapo.mcore import checkpoint
from megatron_dapo.mcore.optimizer import apply_update, zero_gradients
from megatron_dapo.mcore.parallel import RankLayout
from megatron_dapo.mcore.save_plan import Planning
from megatron_dapo.mcore.shard_write import Written
from tests.unit.mcore.helpers import OPTIMIZERS, Training, start_training

OPTIM = OptimConfig(lr=0.01, weight_decay_all=False)  # two groups of parameters


@pytest.fixture(params=OPTIMIZERS)
def start(
    layout: RankLayout, checkpoint_of: Callable[..., Path], request: pytest.FixtureRequest
) -> Callable[[], Training]:
    return lambda: start_training(checkpoint_of(), OPTIM, OPTIMIZERS[request.param])


def update(training: Training, number: int) -> None:
    zero_gradients(training.modules, training.optimizer)
    training.set_gradients(seed=number)
    assert apply_update(training.optimizer, lr=0.01 / (1 + number), loss=0.0).applied


def save(
    training: Training, path: Path, meanwhile: Callable[[], None] | None = None, planning: Planning | None = None
) -> None:
    """At once, or in the background of `meanwhile`."""
    saving = checkpoint.start_save(
        training.chunks, training.optimizer, planning or Planning(), path, background=meanwhile is not None
    )
    if meanwhile is not None:
        meanwhile()
    written = saving.outcome(wait=True)
    assert isinstance(written, Written), written
    assert saving.finish([written.results]) is None
    named = set(written.digests) | {".metadata", "metadata.json"}
    assert {file.name for file in path.iterdir()} == named
    assert {name: digest_file(path / name) for name in written.digests} == dict(written.digests)


def assert_same(found: Training, wanted: Training) -> None:
    weights = wanted.weights()
    assert [name for name, weight in found.weights().items() if not torch.equal(weight, weights[name])] == []
    assert all(torch.equal(*pair) for pair in zip(found.moments(), wanted.moments(), strict=True))


@pytest.mark.parametrize("updates", [0, 2])
def test_the_updates_after_a_load_equal_those_of_a_run_that_went_on(
    start: Callable[[], Training], tmp_path: Path, updates: int
):
    going_on = start()
    for number in range(updates):
        update(going_on, number)
    save(going_on, tmp_path)

    resumed = start()
    checkpoint.load(resumed.chunks, resumed.optimizer, tmp_path)
    assert_same(resumed, going_on)
    for number in (10, 11):
        update(going_on, number)
        update(resumed, number)
        assert_same(resumed, going_on)


def test_a_load_replaces_what_was_trained_before(start: Callable[[], Training], tmp_path: Path):
    training = start()
    update(training, 0)
    save(training, tmp_path)
    weights, moments = training.weights(), training.moments()
    update(training, 1)
    checkpoint.load(training.chunks, training.optimizer, tmp_path)
    assert all(torch.equal(weights[name], weight) for name, weight in training.weights().items())
    assert all(torch.equal(*pair) for pair in zip(moments, training.moments(), strict=True))


def test_every_parameter_counts_its_own_steps(start: Callable[[], Training], tmp_path: Path):
    training = start()
    update(training, 0)
    save(training, tmp_path)
    checkpoint.load(training.chunks, training.optimizer, tmp_path)
    (part,) = training.optimizer.chained_optimizers
    steps = [state["step"] for state in part.optimizer.state.values()]
    assert {step.item() for step in steps} == {1.0}
    assert len({step.data_ptr() for step in steps}) == len(steps)


def test_saving_changes_nothing(start: Callable[[], Training], tmp_path: Path):
    saving, other, planning = start(), start(), Planning()
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        save(saving, tmp_path / str(number), planning=planning)
        update(saving, number)
        update(other, number)
    assert_same(saving, other)


def test_what_is_trained_while_a_save_is_written_is_not_in_it(start: Callable[[], Training], tmp_path: Path):
    training = start()
    update(training, 0)
    weights, moments = training.weights(), training.moments()
    save(training, tmp_path, meanwhile=lambda: [update(training, number) for number in (1, 2)] and None)
    assert not torch.equal(training.moments()[0], moments[0])
    resumed = start()
    checkpoint.load(resumed.chunks, resumed.optimizer, tmp_path)
    assert all(torch.equal(weights[name], weight) for name, weight in resumed.weights().items())
    assert all(torch.equal(*pair) for pair in zip(moments, resumed.moments(), strict=True))


def test_a_save_leaves_no_process_behind(start: Callable[[], Training], tmp_path: Path):
    training = start()
    before = set(psutil.Process().children())
    save(training, tmp_path, meanwhile=lambda: None)
    assert set(psutil.Process().children()) <= before
