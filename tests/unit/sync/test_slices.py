"""What a plan asks a policy rank for are views of its parameters, and the rectangles of its checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_dapo.sync.plan import EngineRank, Topology, make_plan, megatron_ranks
from megatron_dapo.sync.regions import Region
from megatron_dapo.sync.slices import LocalSlices
from megatron_dapo.workers.policy import PolicyWorker
from tests.unit.workers.one_rank import policy_worker, settings_of


@pytest.fixture(scope="module")
def worker(model: Path) -> Iterator[PolicyWorker]:
    with policy_worker(settings_of(model)) as made:
        yield made


@pytest.mark.parametrize("engine_ranks", [1, 2, 4])
def test_every_slice_of_a_plan_is_that_rectangle_of_the_checkpoint(
    model: Path, worker: PolicyWorker, engine_ranks: int
) -> None:
    checkpoint, slices = load_file(model / "model.safetensors"), LocalSlices(worker)
    engines = tuple(EngineRank(0, rank, engine_ranks, 0) for rank in range(engine_ranks))
    plan = make_plan(worker.shape, Topology(megatron_ranks(1, 1, [0]), engines, 1, 1), 4)
    seen = {name: torch.zeros_like(tensor, dtype=torch.bool) for name, tensor in checkpoint.items()}
    for region in (transfer.region for transfer in plan.transfers):
        whole = checkpoint[region.name]
        index = region.index(whole.dim())
        assert torch.equal(slices.view(region), whole[index]), region
        seen[region.name][index] = True
    assert all(mask.all() for mask in seen.values())


def test_a_slice_is_the_parameter_itself_also_after_the_weights_were_away(worker: PolicyWorker) -> None:
    slices, region = LocalSlices(worker), Region("model.norm.weight", (2, 5), (0, 1))
    before = slices.view(region).clone()
    worker.leave_device(("weights",))
    slices.view(region).add_(1)
    exported = dict(worker.export())
    assert torch.equal(exported["model.norm.weight"][2:5], before + 1)
    slices.view(region).sub_(1)


@pytest.mark.parametrize(
    "region",
    [Region("model.norm.weight", (0, 10**6), (0, 1)), Region("model.no_such.weight", (0, 1), (0, 1))],
    ids=["too long", "unknown"],
)
def test_what_the_rank_does_not_hold_is_named(worker: PolicyWorker, region: Region) -> None:
    with pytest.raises(LookupError, match=f"does not hold rows .* of '{region.name}'"):
        LocalSlices(worker).view(region)
