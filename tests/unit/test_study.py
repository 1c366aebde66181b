"""The study's page says what its results say, and nothing that was declared is missing or was added."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tools.study_arithmetic import FIRST, LONGER, ROOT, SETTINGS, Outcome, Study, read_outcomes, tables

PAGE = ROOT / "docs" / "study_arithmetic.md"
OUTCOME = Outcome("full", 11, [0, 2, 4], [0.3, 0.7, 0.95], [0, 128, 272], 0.1, 1.0, "0" * 40, {})


@pytest.mark.parametrize("study", [FIRST, LONGER], ids=["first", "longer"])
def test_every_declared_run_is_there_once_and_whole(study: Study) -> None:
    outcomes = read_outcomes(study.results)
    assert sorted((each.seed, each.setting) for each in outcomes) == sorted(
        (seed, setting) for seed in study.seeds for setting in SETTINGS
    )
    assert all(each.steps == list(range(0, study.steps + 1, 2)) for each in outcomes)


def test_a_longer_run_is_the_shorter_one_continued() -> None:
    short = {(each.setting, each.seed): each for each in read_outcomes(FIRST.results)}
    for each in read_outcomes(LONGER.results):
        shorter = short[each.setting, each.seed]
        assert each.accuracy[: len(shorter.accuracy)] == shorter.accuracy


def test_the_page_has_the_tables_of_the_results() -> None:
    text = tables(read_outcomes(FIRST.results), read_outcomes(LONGER.results))
    for table in text.split("\n\n"):
        assert table in PAGE.read_text(), "python tools/study_arithmetic.py --tables"


def test_a_table_by_hand() -> None:
    every_run, means, differences = tables([OUTCOME, replace(OUTCOME, setting="early", accuracy=[0.3, 0.5, 0.6])], []) \
        .split("\n\n")  # fmt: skip
    assert every_run.splitlines()[2:] == [
        "| 11 | full | 2 | 4 | 272 | 65 | 95 |",
        "| 11 | early | 4 | 6 | 272 | 46.7 | 60 |",  # 90 % not reached: one evaluation after the last
    ]
    assert "| full | 1 | 2 (no interval) |" in means
    assert "| full less early | 1 | -2 (no interval) | -2 (no interval) |" in differences
