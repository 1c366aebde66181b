from __future__ import annotations

import matplotlib.image
import numpy as np
import pytest

from megatron_dapo.obs.curve import draw_curve
from megatron_dapo.obs.jsonl import JsonlWriter

BLUE = np.array([31, 119, 180])  # the first colour of a line


def records(steps: int) -> list[dict]:
    return [
        {
            "step": step,
            "sampling/accuracy": step / 100,
            "reward/mean": float("nan") if step == 2 else 0.1,
            "response/length_mean": 30.0,
            "actor/entropy": 0.5,
            "sampling/kept_share": 0.5,
            "val/a/avg@1": 0.5,
            "val/a/avg@1_low": 0.4,
            "val/a/avg@1_high": 0.6,
        }
        for step in range(steps)
    ]


def panels_with_a_line(path, rows, out) -> list[bool]:
    writer = JsonlWriter(path, 0)
    for row in rows:
        writer.write(row)
    writer.close()
    draw_curve(path, out)
    picture = np.rint(matplotlib.image.imread(out)[..., :3] * 255)
    height, width = picture.shape[0] // 2, picture.shape[1] // 3
    blue = np.abs(picture - BLUE).sum(-1) < 8
    return [
        bool(blue[r * height : (r + 1) * height, c * width : (c + 1) * width].any()) for r in range(2) for c in range(3)
    ]


@pytest.mark.parametrize("steps", [1, 3, 60])
def test_every_panel_shows_its_metric_also_with_few_points(tmp_path, steps):
    assert panels_with_a_line(tmp_path / "m.jsonl", records(steps), tmp_path / "c.png") == [True] * 6


def test_a_panel_without_data_stays_empty(tmp_path):
    rows = [{"step": 1, "actor/entropy": 0.5}]
    assert panels_with_a_line(tmp_path / "m.jsonl", rows, tmp_path / "c.png") == [False] * 3 + [True, False, False]


def test_a_run_without_a_step_gives_an_empty_picture(tmp_path):
    assert panels_with_a_line(tmp_path / "m.jsonl", [], tmp_path / "c.png") == [False] * 6


def test_a_single_point_is_drawn_where_it_lies(tmp_path):
    for name, accuracy in (("low", 0.2), ("high", 0.8)):
        rows = [{"step": 1, "sampling/accuracy": accuracy}]
        panels_with_a_line(tmp_path / f"{name}.jsonl", rows, tmp_path / f"{name}.png")
    assert (tmp_path / "low.png").read_bytes() != (tmp_path / "high.png").read_bytes()
