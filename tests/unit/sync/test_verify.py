"""What is said of sums that differ. That faults of real transports are seen: tests/functional/test_weight_sync.py."""

from __future__ import annotations

import pytest

from megatron_dapo.sync.errors import WeightSyncError
from megatron_dapo.sync.verify import Probe, raise_on_difference

SUMS = {f"layer.{number}": number for number in range(9)}


def test_equal_sums_are_fine():
    raise_on_difference(SUMS, dict(SUMS), engine=0, version=1)


def test_tensors_that_differ_are_named_with_engine_and_version():
    with pytest.raises(WeightSyncError, match=r"version 4 in engine 2, checksums: layer\.3 differ from .*8 of 9 tens"):
        raise_on_difference(SUMS, SUMS | {"layer.3": 99}, engine=2, version=4)


def test_what_is_missing_and_what_is_too_much_is_named():
    found = {name: value for name, value in SUMS.items() if name != "layer.5"} | {"other": 1}
    with pytest.raises(WeightSyncError, match=r"layer\.5 are not there; other are there, and the policy has none"):
        raise_on_difference(SUMS, found, engine=0, version=0)


def test_a_long_list_is_cut():
    with pytest.raises(WeightSyncError, match=r"layer\.0, layer\.1, layer\.2, layer\.3, layer\.4 and 4 more differ"):
        raise_on_difference(SUMS, dict.fromkeys(SUMS, -1), engine=0, version=0)


@pytest.mark.parametrize("temperature, drawn_at", [(1.0, 0.0), (0.7, 0.7)])
def test_the_probe_is_greedy_where_that_has_the_trainers_temperature(temperature: float, drawn_at: float):
    request = Probe(50, 6, 4, temperature, 1e-3).request
    assert request.params.temperature == drawn_at
    assert request.params.max_tokens == 4
    assert request.prompt_ids.shape == (6,)
    assert 0 <= request.prompt_ids.min() <= request.prompt_ids.max() < 50
    assert (request.prompt_ids == Probe(50, 6, 4, temperature, 1e-3).request.prompt_ids).all()
