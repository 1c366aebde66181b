"""Three processes' ends of the broadcasts, on threads over real gloo: what arrives, and a member that is gone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from megatron_dapo.sync.network import Network, open_store
from megatron_dapo.sync.parts import Link, Message
from megatron_dapo.sync.regions import Region

CPU = torch.device("cpu")
MATRIX, VECTOR = torch.arange(24.0).view(4, 6), torch.arange(5.0) + 100
TO_BOTH, TO_SECOND = Link(0, (1, 2)), Link(1, (2,))


class Slices:
    """Stands for a rank that holds both tensors."""

    def view(self, region: Region) -> Tensor:
        whole = {"matrix": MATRIX, "vector": VECTOR}[region.name]
        return whole[region.index(whole.dim())]


def networks(links: list[tuple[int, list[Link]]], timeout: float = 20.0) -> list[Network]:
    """[process] its ends; all meet at a store of the first."""
    store = open_store(("127.0.0.1", 0), timeout, master=True)
    with ThreadPoolExecutor(len(links)) as pool:
        made = pool.map(
            lambda item: Network(item[1], item[0], open_store(("127.0.0.1", store.port), timeout), CPU, timeout),
            links,
        )
        return list(made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_arrive_where_they_belong_and_nothing_else_is_touched(dtype: torch.dtype) -> None:
    first = Message(TO_BOTH, (Region("matrix", (1, 3), (2, 6)), Region("vector", (0, 2), (0, 1))))
    second = Message(TO_SECOND, (Region("vector", (4, 5), (0, 1)),))
    messages = {0: [first], 1: [first, second], 2: [first, second]}
    ends = networks([(0, [TO_BOTH]), (1, [TO_BOTH, TO_SECOND]), (2, [TO_BOTH, TO_SECOND])])
    views = [{"matrix": torch.full((4, 6), -1, dtype=dtype), "vector": torch.full((5,), -1, dtype=dtype)} for _ in ends]
    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(end.run, messages[n], Slices(), views[n], dtype) for n, end in enumerate(ends)]
        for run in runs:
            run.result(30)
    nothing = torch.full((4, 6), -1, dtype=dtype)
    wanted = nothing.clone()
    wanted[1:3, 2:6] = torch.tensor([[8.0, 9, 10, 11], [14, 15, 16, 17]])
    assert [torch.equal(view["matrix"], wanted) for view in views] == [False, True, True]
    assert torch.equal(views[0]["matrix"], nothing), "the sender's memory is its own"
    assert [view["vector"].tolist() for view in views[1:]] == [[100, 101, -1, -1, -1], [100, 101, -1, -1, 104]]


def test_a_member_that_never_comes_ends_the_broadcast_after_the_time_limit() -> None:
    message = Message(TO_SECOND, (Region("vector", (0, 5), (0, 1)),))
    sender, _ = networks([(1, [TO_SECOND]), (2, [TO_SECOND])], timeout=2.0)
    with pytest.raises(RuntimeError, match=r"(?i)timed out"):
        sender.run([message], Slices(), {}, torch.float32)
