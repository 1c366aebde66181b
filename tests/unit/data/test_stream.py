"""The order of prompts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dapo.data.prompts import EmptyDatasetError, PromptDataset
from megatron_dapo.data.stream import PromptStream
from tests.unit.data.fakes import dataset


def take(stream: PromptStream, count: int) -> list[int]:
    return [stream.next().index for _ in range(count)]


def test_every_epoch_holds_every_prompt_once_in_another_order() -> None:
    drawn = take(PromptStream(dataset(20), seed=1), 60)
    epochs = [drawn[i : i + 20] for i in (0, 20, 40)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_seed_alone_decides_the_order() -> None:
    assert take(PromptStream(dataset(20), seed=1), 40) == take(PromptStream(dataset(20), seed=1), 40)
    assert take(PromptStream(dataset(20), seed=1), 40) != take(PromptStream(dataset(20), seed=2), 40)


def test_without_shuffling_the_order_is_that_of_the_files() -> None:
    assert take(PromptStream(dataset(3), seed=1, shuffle=False), 7) == [0, 1, 2, 0, 1, 2, 0]


@given(st.integers(0, 100), st.integers(1, 30))
def test_a_restored_stream_goes_on_where_it_was(before: int, size: int) -> None:
    stream = PromptStream(dataset(size), seed=1)
    take(stream, before)
    other = PromptStream(dataset(size), seed=1)
    other.load_state_dict(stream.state_dict())
    assert take(other, 40) == take(stream, 40)


def test_epochs_can_be_limited() -> None:
    stream = PromptStream(dataset(4), seed=1, epochs=2)
    assert stream.remaining == 8
    drawn = take(stream, 7)
    assert (stream.remaining, stream.position, stream.epoch) == (1, 7, 1.75)
    assert sorted([*drawn, stream.next().index]) == [0, 0, 1, 1, 2, 2, 3, 3]
    with pytest.raises(StopIteration):
        stream.next()
    assert PromptStream(dataset(4), seed=1).remaining is None


@pytest.mark.parametrize(
    "other, says",
    [
        (PromptStream(dataset(5), seed=1), "rows was 4, now it is 5; train on the files"),
        (PromptStream(PromptDataset(dataset(4).distinct, np.array([0, 1, 3, 2])), seed=1), "fingerprint was"),
        (PromptStream(dataset(4), seed=2), "seed was 1, now it is 2; set data.seed back"),
        (PromptStream(dataset(4), seed=1, shuffle=False), "shuffle was True, now it is False; set data.shuffle back"),
    ],
)
def test_a_position_in_another_order_is_refused(other: PromptStream, says: str) -> None:
    stream = PromptStream(dataset(4), seed=1)
    take(stream, 3)
    with pytest.raises(ValueError, match=f"saved position 3: .*{says}"):
        other.load_state_dict(stream.state_dict())


def test_an_empty_dataset_has_no_order() -> None:
    with pytest.raises(EmptyDatasetError):
        PromptStream(PromptDataset.from_prompts([]), seed=1)
