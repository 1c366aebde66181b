"""An engine over several GPUs gets those of the ranks that it serves, whoever started them."""

from __future__ import annotations

import pytest

from megatron_dapo.runtime.devices import ENGINE_DEVICES, engine_devices, own_and_after


def test_under_ray_each_rank_is_told_the_devices_after_its_own_on_its_node():
    told = own_and_after(["3", "1", "0", "2", "GPU-a", "GPU-b", "5", "4"], ranks_per_node=4)
    assert told == ["3,1,0,2", "1,0,2", "0,2", "2", "GPU-a,GPU-b,5,4", "GPU-b,5,4", "5,4", "4"]
    first, third = ({ENGINE_DEVICES: told[rank], "CUDA_VISIBLE_DEVICES": "3"} for rank in (0, 2))
    assert engine_devices(2, local_rank=0, there=1, environment=first) == ("3", "1")
    assert engine_devices(2, local_rank=0, there=1, environment=third) == ("0", "2")


def test_an_actor_with_an_engine_of_its_own_gives_it_all_that_it_sees():
    (told, _) = own_and_after(["4,5,6,7", "0,1,2,3"], ranks_per_node=1)
    assert engine_devices(4, local_rank=0, there=4, environment={ENGINE_DEVICES: told}) == ("4", "5", "6", "7")


def test_under_torchrun_they_are_counted_from_the_rank_on():
    assert engine_devices(2, local_rank=4, there=8, environment={}) == ("4", "5")
    shown = {"CUDA_VISIBLE_DEVICES": "7,6,5,4"}
    assert engine_devices(2, local_rank=2, there=4, environment=shown) == ("5", "4")


def test_too_few_are_told_with_both_numbers():
    with pytest.raises(ValueError, match=r"an engine takes 4 GPUs .* from this rank on its node has 2: 6, 7; lower it"):
        engine_devices(4, local_rank=6, there=8, environment={})
