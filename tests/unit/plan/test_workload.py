from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from megatron_dapo.config.tree import ConfigError
from megatron_dapo.plan.workload import Workload, cut_mean, fit, kept_share, location

LOAD = Workload(mean=400.0, sigma=0.8, between=0.4, limit=2000, prompt=50, kept_share=0.6, n=8)


def test_drawn_lengths_have_the_mean_that_was_asked_for_after_the_cut() -> None:
    groups = LOAD.draw(20_000, np.random.default_rng(0))
    assert groups.lengths.mean() == pytest.approx(400, rel=0.02)
    assert groups.lengths.max() == 2000
    assert groups.kept.mean() == pytest.approx(0.6, abs=0.02)


def test_the_mean_of_a_cut_log_normal_is_that_of_a_sum_over_its_quantiles() -> None:
    quantiles = np.random.default_rng(1).normal(5.0, 0.7, 400_000)
    assert cut_mean(5.0, 0.7, 300.0) == pytest.approx(np.minimum(np.exp(quantiles), 300).mean(), rel=5e-3)
    assert location(cut_mean(5.0, 0.7, 300.0), 0.7, 300.0) == pytest.approx(5.0)


def test_the_share_of_kept_groups_is_what_drawing_pass_rates_gives() -> None:
    rng = np.random.default_rng(2)
    right = rng.binomial(16, rng.beta(0.45, 0.55, 200_000))
    assert kept_share(0.45, 1.0, 16) == pytest.approx(((right > 0) & (right < 16)).mean(), abs=3e-3)


def test_prompts_that_pass_half_the_time_keep_all_but_two_in_two_to_the_n() -> None:
    assert kept_share(0.5, 1e9, 4) == pytest.approx(1 - 2 / 16)


def test_what_a_run_logged_is_fitted_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    groups = LOAD.draw(400, rng)
    with (tmp_path / "samples.jsonl").open("w") as file:
        for step in range(4):  # the last quarter of steps counts; the others are shorter
            for draw, lengths in enumerate(groups.lengths):
                for length in lengths if step == 3 else lengths // 10:
                    file.write(json.dumps({"step": step, "draw_index": draw, "length": int(length)}) + "\n")
    metrics = [{"step": step, "sampling/kept_share": 0.2 if step < 3 else 0.6} for step in range(4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    found = fit(tmp_path / "samples.jsonl", limit=2000, n=8)
    assert found.mean == pytest.approx(groups.lengths.mean())
    assert found.sigma == pytest.approx(np.log(groups.lengths).std(), rel=1e-3)
    assert found.between == pytest.approx(0.4, abs=0.06)
    assert (found.kept_share, found.n, found.limit) == (0.6, 8, 2000)


def test_a_run_without_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"samples\.jsonl"):
        fit(tmp_path / "samples.jsonl", 100, 4)
    assert math.isfinite(location(99.0, 0.0, 100.0))
