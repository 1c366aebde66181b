"""The shapes that the examples are planned with have as many parameters as the published models."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest
from transformers import AutoConfig

from megatron_dapo.mcore.families import shape_of
from megatron_dapo.mcore.families.names import hf_shapes

SHAPES = Path(__file__).parents[3] / "examples" / "model_shapes"
PUBLISHED = {"Qwen2.5-32B": 32_763_876_352, "Qwen2.5-7B": 7_615_616_512, "Qwen3-1.7B": 1_720_574_976}


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_a_shape_has_the_published_number_of_parameters(name: str, parameters: int) -> None:
    shape = shape_of(AutoConfig.from_pretrained(SHAPES / name))
    assert sum(prod(dims) for dims in hf_shapes(shape).values()) == parameters


def test_each_is_the_model_of_an_example() -> None:
    configs = [path.read_text() for path in SHAPES.parent.glob("dapo_*/config.yaml")]
    for name in PUBLISHED:
        assert any(f"path: models/{name}" in config for config in configs), name
