"""The helpers beside the functional tests are imported by their plain names; the ranks that layout tests share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.functional.layout_ranks import Answers, Ranks

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    return Answers(tmp_path_factory.mktemp("answers"))


@pytest.fixture(scope="module")
def world(request: pytest.FixtureRequest, ranks: Ranks) -> Iterator[int]:
    """As many ranks as the parameter says: one torchrun for all tests of a world size that come one after another."""
    with ranks.world(request.param):
        yield request.param
