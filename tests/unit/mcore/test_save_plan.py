"""A plan is made once, and used only for what it was made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_dapo.config.tree import MegatronConfig
from megatron_dapo.digests import FileDigest
from megatron_dapo.mcore import checkpoint
from megatron_dapo.mcore.optimizer import apply_update, zero_gradients
from megatron_dapo.mcore.parallel import RankLayout
from megatron_dapo.mcore.safe_load import read_metadata
from megatron_dapo.mcore.save_plan import Planning
from megatron_dapo.mcore.shard_write import Written
from tests.functional.tiny_models import save_tiny_model
from tests.unit.mcore.helpers import Training, start_training

DISTRIBUTED = MegatronConfig(use_distributed_optimizer=True)


@pytest.fixture
def start(layout: RankLayout, checkpoint_of: Callable[..., Path]) -> Callable[..., Training]:
    return lambda config=DISTRIBUTED: start_training(checkpoint_of(), megatron=config)


def update(training: Training) -> None:
    zero_gradients(training.modules, training.optimizer)
    training.set_gradients(seed=1)
    assert apply_update(training.optimizer, lr=0.01, loss=0.0).applied


def save(training: Training, planning: Planning, path: Path) -> dict[str, FileDigest]:
    """Digests of the files that a rank writes."""
    path.mkdir()
    saving = checkpoint.start_save(training.chunks, training.optimizer, planning, path, background=False)
    written = saving.outcome(wait=True)
    assert isinstance(written, Written), written
    assert saving.finish([written.results]) is None
    return dict(written.digests)


def assert_same_places(one: Path, other: Path) -> None:
    found, wanted = read_metadata(one), read_metadata(other)
    assert found.state_dict_metadata == wanted.state_dict_metadata
    assert found.storage_data == wanted.storage_data
    assert found.storage_data


@pytest.mark.parametrize(
    "config",
    [DISTRIBUTED, replace(DISTRIBUTED, use_distributed_optimizer=False), replace(DISTRIBUTED, params_dtype="bfloat16")],
    ids=["distributed", "plain", "bf16"],
)
def test_a_plan_that_is_used_again_gives_the_files_of_a_new_one(
    start: Callable[..., Training], tmp_path: Path, config: MegatronConfig
):
    training, planning = start(config), Planning()
    before = save(training, planning, tmp_path / "first")
    update(training)
    again = save(training, planning, tmp_path / "again")
    assert again != before
    assert again == save(training, Planning(), tmp_path / "new")
    assert_same_places(tmp_path / "again", tmp_path / "new")


def test_values_alone_need_no_new_plan(start: Callable[..., Training], tmp_path: Path):
    training, planning = start(), Planning()
    save(training, planning, tmp_path / "first")
    made = planning._placement
    update(training)
    save(training, planning, tmp_path / "again")
    assert made is not None
    assert planning._placement is made


def test_something_else_to_save_gets_a_plan_of_its_own(start: Callable[..., Training], tmp_path: Path):
    """Another type, another number of layers with the same names, another vocabulary."""
    others = [start(replace(DISTRIBUTED, params_dtype="bfloat16"))]
    for number, different in enumerate(({"layers": 3}, {"vocab": 57})):
        save_tiny_model(tmp_path / f"model{number}", "qwen2", tied=False, **{"layers": 2, **different})
        others.append(start_training(tmp_path / f"model{number}", megatron=DISTRIBUTED))
    for number, other in enumerate(others):
        planning = Planning()
        save(start(), planning, tmp_path / f"first{number}")
        found = save(other, planning, tmp_path / f"other{number}")
        assert found == save(other, Planning(), tmp_path / f"new{number}")
        assert_same_places(tmp_path / f"other{number}", tmp_path / f"new{number}")


def test_a_tensor_that_moves_to_another_place_gets_a_new_plan(start: Callable[..., Training], tmp_path: Path):
    """Two layers change places: the same names, shapes and types, each at another position of the whole."""
    training, planning = start(), Planning()
    save(training, planning, tmp_path / "first")
    first, second = training.chunks[0].decoder.layers  # type: ignore[misc]
    first.layer_number, second.layer_number = second.layer_number, first.layer_number
    found = save(training, planning, tmp_path / "swapped")
    assert found == save(training, Planning(), tmp_path / "new")
    assert_same_places(tmp_path / "swapped", tmp_path / "new")
