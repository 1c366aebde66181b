"""The golden cases of the public recipe: groups of responses with rewards, log-probs, losses and gradients."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

GOLDEN = json.loads((Path(__file__).parents[2] / "data" / "dapo_algorithm_cases.json").read_text())


@pytest.fixture(params=GOLDEN["cases"], ids=[f"case{i}" for i in range(len(GOLDEN["cases"]))])
def case(request: pytest.FixtureRequest) -> dict:
    return request.param


@pytest.fixture(scope="session")
def golden() -> dict:
    return GOLDEN
