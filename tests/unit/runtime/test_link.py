"""Messages: what goes in comes out, big arrays are not copied, broken connections and missing ranks are seen."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import numpy as np
import pytest
from torch.distributed import HashStore, ProcessGroupGloo  # pyright: ignore[reportPrivateImportUsage]

from megatron_dapo.runtime.link import APART_BYTES, Kind, Link, Message, meet

BIG = APART_BYTES // 8 + 1  # int64 values, just enough to travel apart


def linked() -> tuple[Link, Link]:
    """Both ends of a connection, in this one process."""
    store = HashStore()
    with ThreadPoolExecutor(2) as pool:
        groups = list(pool.map(lambda rank: ProcessGroupGloo(store, rank, 2, timedelta(seconds=30)), (0, 1)))
    return Link(groups[0], 1), Link(groups[1], 0)


def test_big_arrays_travel_beside_the_pickle_from_and_into_their_own_memory():
    big, small = np.arange(BIG), np.arange(3)
    message = Message.of(Kind.ITEM, {"big": big, "small": small})
    assert [np.shares_memory(part, big) for part in message.apart] == [True]
    assert len(message.frame) < 1000
    loaded = message.load()
    assert np.shares_memory(loaded["big"], big)
    np.testing.assert_array_equal(loaded["small"], small)


def test_a_read_only_array_is_copied_since_torch_takes_writable_memory_only():
    frozen = np.arange(BIG)
    frozen.flags.writeable = False
    message = Message.of(Kind.ITEM, frozen)
    assert not np.shares_memory(message.apart[0], frozen)
    np.testing.assert_array_equal(message.load(), frozen)


def assert_received(here: Link, there: Link, payload: object) -> None:
    with ThreadPoolExecutor(1) as pool:
        received = pool.submit(there.receive)
        here.send(Message.of(Kind.ITEM, payload))
        message = received.result(30)
    assert message.kind is Kind.ITEM
    np.testing.assert_equal(message.load(), payload)


@pytest.mark.parametrize(
    "payload",
    [
        None,
        "text",
        {"a": [1, 2]},
        np.arange(BIG),
        np.asfortranarray(np.arange(2.0 * BIG).reshape(2, BIG)),
        b"x" * 300_000,
    ],
    ids=["none", "text", "nested", "big array", "fortran order", "long bytes"],
)
def test_what_is_sent_is_received(payload: object):
    assert_received(*linked(), payload)


def test_messages_of_many_threads_arrive_whole_and_those_of_one_in_order():
    here, there = linked()

    def send(thread: int) -> None:
        for i in range(20):
            here.send(Message.of(Kind.ITEM, (thread, i, np.full(BIG, 100 * thread + i))))

    senders = [threading.Thread(target=send, args=(thread,)) for thread in range(3)]
    for sender in senders:
        sender.start()
    received = [there.receive().load() for _ in range(60)]
    for sender in senders:
        sender.join()
    assert all((array == 100 * thread + i).all() for thread, i, array in received)
    for thread in range(3):
        assert [i for other, i, _ in received if other == thread] == list(range(20))


def test_a_broken_connection_reads_as_closed():
    here, there = linked()
    assert_received(here, there, None)
    del here
    assert there.receive().kind is Kind.CLOSED


def test_what_cannot_be_pickled_raises_before_anything_is_sent():
    with pytest.raises((AttributeError, TypeError), match="pickle"):
        Message.of(Kind.ITEM, lambda: None)


def test_ranks_that_do_not_come_are_named():
    store = HashStore()
    store.set("rank 2", "here")
    with pytest.raises(TimeoutError, match=r"^rank 1, rank 3 did not start within 0.1 s, wanted 4 ranks"):
        meet(store, 0, 4, timedelta(seconds=0.1))
