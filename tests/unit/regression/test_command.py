"""The command over files: verdict, exit code, the signature named, the picture."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from megatron_dapo.regression.command import main
from megatron_dapo.regression.references import REFERENCES
from tests.unit.regression.curves import ablation, dapo, stalled, write_run

GREEN, RED = np.array([44, 160, 44]), np.array([214, 39, 40])  # a run within, a run outside


def colours_of(png: Path) -> tuple[bool, bool]:
    picture = np.rint(matplotlib.image.imread(png)[..., :3] * 255)
    return tuple(bool((np.abs(picture - colour).sum(-1) < 8).any()) for colour in (GREEN, RED))


def test_the_papers_run_is_within(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "metrics.jsonl", dapo())
    assert main([str(tmp_path), "--reference", "dapo_qwen2.5_32b", "--complete"]) == 0
    said = capsys.readouterr().out
    assert "within (99% of the reference's updates)" in said or "within (100% of the reference's updates)" in said
    assert "arXiv 2503.14476, figure 1" in said
    assert colours_of(tmp_path / "compare_dapo_qwen2.5_32b.png") == (True, False)


def test_a_run_outside_ends_with_1_and_names_the_signature(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = dapo() | {"entropy": stalled(ablation("paper_without_clip_higher"), at=2000)["entropy"]}
    write_run(tmp_path / "metrics.jsonl", run)
    assert main([str(tmp_path), "--reference", "dapo_paper", "--picture", str(tmp_path / "p.png")]) == 1
    assert "OUTSIDE: entropy (" in capsys.readouterr().out
    assert colours_of(tmp_path / "p.png") == (True, True)


def test_a_figure_alone_is_compared_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "metrics.jsonl", {name: s for name, s in dapo().items() if name != "entropy"})
    assert main([str(tmp_path), "--reference", "dapo_early_qwen2.5_32b"]) == 0
    assert "published 44%" in capsys.readouterr().out
    assert colours_of(tmp_path / "compare_dapo_early_qwen2.5_32b.png") == (True, False)


def test_nothing_to_compare_ends_with_2_and_says_what_is_wanted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path), "--reference", "dapo_paper"]) == 2
    assert "metrics.jsonl is not there" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path), "--reference", "dapo"])


def test_the_help_lists_every_reference(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    said = capsys.readouterr().out
    assert all(f"{name}: " in said for name in REFERENCES)
