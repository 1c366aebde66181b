from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_dapo.obs.jsonl import JsonlWriter
from megatron_dapo.regression.references import AIME
from megatron_dapo.regression.run_series import RunError, read_run


def write(path: Path, *records: dict[str, float]) -> Path:
    writer = JsonlWriter(path, 0)
    for record in records:
        writer.write(record)
    writer.close()
    return path


def step(number: int, updates: int = 16, **metrics: float) -> dict[str, float]:
    return {"step": number, "actor/updates": updates, "actor/entropy": 0.1 * number} | metrics


def test_evaluations_stand_after_a_steps_updates_and_its_responses_before_them(tmp_path: Path) -> None:
    first = {"step": 0, "val/a/avg@32": 0.01}
    run = write(tmp_path / "metrics.jsonl", first, step(1), step(2, updates=15, **{"val/a/avg@32": 0.2}), step(3))
    found = read_run(tmp_path)
    assert found.evaluated == "val/a/avg@32"
    np.testing.assert_array_equal(found.series[AIME].updates, [0, 31])
    np.testing.assert_array_equal(found.series[AIME].values, [0.01, 0.2])
    np.testing.assert_array_equal(found.series["entropy"].updates, [0, 16, 31])
    assert "reward" not in found.series
    assert read_run(run).series.keys() == found.series.keys()


def test_values_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", step(1, **{"reward/mean": float("nan"), "val/a/avg@1": 0.5}), step(2))
    assert "reward" not in read_run(tmp_path).series


def test_a_step_whose_updates_were_all_skipped_leaves_one_point_at_its_place(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", step(1, **{"val/a/avg@1": 0.5}), step(2, updates=0), step(3))
    entropy = read_run(tmp_path).series["entropy"]
    np.testing.assert_array_equal(entropy.updates, [0, 16])
    np.testing.assert_allclose(entropy.values, [0.1, 0.3])


def test_of_several_evaluations_one_must_be_chosen(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", step(1, **{"val/aime/avg@32": 0.5, "val/amc/avg@32": 0.9}))
    with pytest.raises(RunError, match=r"val/aime/avg@32, val/amc/avg@32; wanted exactly one .*--source"):
        read_run(tmp_path)
    assert read_run(tmp_path, "aime").evaluated == "val/aime/avg@32"
    with pytest.raises(RunError, match="of source gsm"):
        read_run(tmp_path, "gsm")


@pytest.mark.parametrize(
    ("text", "said"),
    [(None, "is not there"), ("", "has the evaluations none"), ("nonsense\n", "wanted a JSON object"),
     ('{"step": 0, "val/a/avg@1": 0.1}\n', "no step with actor/updates")],
    ids=["no file", "empty", "no metrics", "never trained"],
)  # fmt: skip
def test_a_run_that_cannot_be_read_says_what_is_wrong(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(RunError, match=said):
        read_run(tmp_path)
