from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_dapo.obs.jsonl import JsonlWriter
from megatron_dapo.regression.golden import TOLERANCES, Golden, Origin, differences, read_golden, series_of

ORIGIN = Origin("0" * 40, {"torch": "2"}, ("a=1",), "a machine", "2026-01-01")
SERIES = {name: [0.25, 0.5, 0.75] for name in TOLERANCES}


def moved(name: str, step: int, by: float) -> dict[str, list[float]]:
    values = list(SERIES[name])
    values[step - 1] += by
    return SERIES | {name: values}


def test_the_golden_run_is_itself() -> None:
    assert differences(SERIES, SERIES) == []


@pytest.mark.parametrize("name", TOLERANCES)
def test_a_step_outside_its_tolerance_is_told_with_both_values(name: str) -> None:
    assert differences(SERIES, moved(name, 2, 0.4 * TOLERANCES[name])) == []
    (told,) = differences(SERIES, moved(name, 2, 1.5 * TOLERANCES[name] + 1e-6))
    assert told.startswith(f"{name}: step 2: 0.5")
    assert "1 of 3 steps outside" in told


def test_the_earliest_difference_comes_first() -> None:
    found = moved("actor/loss", 3, 0.1) | {"actor/ratio": [0.3, 0.5, 0.75]}
    assert [line.split(":")[0] for line in differences(SERIES, found)] == ["actor/ratio", "actor/loss"]


def test_a_value_that_is_not_finite_or_a_missing_step_is_told() -> None:
    assert "nan" in differences(SERIES, moved("actor/loss", 1, float("nan")))[0]
    assert "2 steps, the golden run has 3" in differences(SERIES, {name: [0.25, 0.5] for name in SERIES})[0]


def test_a_golden_file_comes_back_as_written_and_not_when_edited(tmp_path: Path) -> None:
    path = tmp_path / "golden" / "a.json"
    Golden(ORIGIN, SERIES).write(path)
    assert read_golden(path) == Golden(ORIGIN, SERIES)
    values = json.loads(path.read_text())
    values["series"]["actor/loss"][0] = 0.3
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="make golden"):
        read_golden(path)


def test_the_series_of_a_run_leave_the_evaluation_before_training_out(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "metrics.jsonl", 0)
    writer.write({"step": 0, "val/a/avg@1": 0.5})
    for step in (1, 2):
        writer.write({"step": step} | dict.fromkeys(TOLERANCES, step / 4))
    writer.close()
    assert series_of(tmp_path) == {name: [0.25, 0.5] for name in TOLERANCES}
