"""The command over files: verdict, exit code, the signature named, the picture."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from megatron_dapo.regression.command import main
from megatron_dapo.regression.references import AIME, REFERENCES
from megatron_dapo.regression.series import Series
from tests.unit.regression.curves import ablation, dapo, stalled, write_run

GREEN, RED = np.array([44, 160, 44]), np.array([214, 39, 40])  # a run within, a run outside


def colours_of(png: Path) -> tuple[bool, bool]:
    picture = np.rint(matplotlib.image.imread(png)[..., :3] * 255)
    green, red = (bool((np.abs(picture - colour).sum(-1) < 8).any()) for colour in (GREEN, RED))
    return green, red


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


@pytest.mark.parametrize(
    ("folder", "code"),
    [("DAPO-Early-Qwen2.5-32B", 0), ("DAPO-wo-DS-Qwen2.5-32B", 1), ("my-run", 2)],
)
def test_without_a_name_the_folder_says_which_recipes_reference_it_is(
    tmp_path: Path, folder: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / folder
    out.mkdir()
    at_44 = {AIME: Series(dapo()[AIME].updates, np.minimum(dapo()[AIME].values, 0.44))}
    write_run(out / "metrics.jsonl", at_44)
    assert main([str(out)]) == code
    if code == 2:
        assert "names no reference (my_run)" in capsys.readouterr().err


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
