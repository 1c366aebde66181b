"""The comparison must be able to fail: for each way to go wrong, by the signature that goes wrong."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_dapo.regression.compare import Comparison, compare
from megatron_dapo.regression.references import AIME, REFERENCES
from megatron_dapo.regression.run_series import RunError
from megatron_dapo.regression.series import Series
from tests.unit.regression.curves import ablation, cut, dapo, late, noisy, stalled

SEEDS = 200


def against(run: dict[str, Series], name: str = "dapo_paper", complete: bool = False) -> Comparison:
    return compare(run, REFERENCES[name], complete=complete)


def failed_checks(comparison: Comparison) -> set[str]:
    return {finding.check for finding in comparison.findings if not finding.ok}


def test_dapos_own_curves_pass_with_noise_added() -> None:
    passed = [against(noisy(dapo(), seed), complete=True).within for seed in range(SEEDS)]
    assert np.mean(passed) == 1.0, f"{np.mean(passed):.1%} of {SEEDS} seeds"


@pytest.mark.parametrize(
    "name",
    [
        "paper_without_clip_higher",
        "paper_without_dynamic_sampling",
        "paper_with_overlong_filtering",
        "paper_without_overlong_filtering",
    ],
)
def test_an_ablation_fails_dapos_band_also_with_noise_added(name: str) -> None:
    plain = against(ablation(name))
    assert AIME in plain.failed
    assert {"band", "final level"} <= failed_checks(plain)
    assert not any(against(noisy(ablation(name), seed)).within for seed in range(SEEDS))


@pytest.mark.parametrize("name", ["paper_with_clip_higher", "paper_with_dynamic_sampling"])
def test_the_papers_other_runs_of_the_same_kind_pass(name: str) -> None:
    comparison = against(ablation(name))
    assert comparison.within, comparison.failed
    assert 0.5 < comparison.covered < 0.6


def test_a_run_without_clip_higher_is_told_by_its_entropy_too() -> None:
    assert against(ablation("paper_without_clip_higher")).failed == (AIME, "entropy")


def test_a_collapsed_entropy_alone_fails_and_is_named() -> None:
    run = dapo() | {"entropy": ablation("paper_without_clip_higher")["entropy"]}
    assert against(run).failed == ("entropy",)


def test_a_run_that_stalls_fails_by_its_level_and_what_it_never_reaches() -> None:
    comparison = against(stalled(dapo(), at=1500))
    assert AIME in comparison.failed
    never = [finding for finding in comparison.findings if not finding.ok and "not reached" in finding.said]
    assert never
    assert all(finding.check.startswith("reaches") for finding in never)
    assert {"band", "final level", "figure"} <= failed_checks(comparison)


def test_a_stalled_reward_or_length_alone_fails_and_is_named() -> None:
    for name in ("reward", "response length"):
        assert against(dapo() | {name: stalled(dapo(), at=80)[name]}).failed == (name,)


def test_a_run_that_comes_late_fails_by_when_it_gets_there_though_it_gets_there() -> None:
    comparison = against(dapo() | {AIME: late(dapo(), by=900)[AIME]})
    assert comparison.failed == (AIME,)
    reaches = [finding for finding in comparison.findings if finding.check.startswith("reaches")]
    assert any(not finding.ok for finding in reaches)
    assert all("not reached" not in finding.said for finding in reaches)


def test_an_accuracy_in_another_unit_fails() -> None:
    in_percents_of_percent = {
        name: s if name != AIME else Series(s.updates, s.values / 100) for name, s in dapo().items()
    }
    assert against(in_percents_of_percent).failed == (AIME,)


def test_a_better_accuracy_is_not_outside() -> None:
    run = dapo()
    assert against(run | {AIME: Series(run[AIME].updates, run[AIME].values + 0.2)}).within


def test_half_a_run_is_within_so_far_and_outside_where_a_whole_one_is_asked_for() -> None:
    half = cut(dapo(), after=2640)
    assert against(half).within
    assert against(half).covered == pytest.approx(0.5, abs=0.02)
    assert failed_checks(against(half, complete=True)) >= {"whole run"}


@pytest.mark.parametrize(
    ("name", "best", "within"),
    [
        ("dapo_wo_ds_qwen2.5_32b", 0.50, True),
        ("dapo_wo_ds_qwen2.5_32b", 0.44, False),
        ("dapo_early_qwen2.5_32b", 0.44, True),
        ("dapo_early_qwen2.5_32b", 0.38, False),
    ],
)
def test_a_final_figure_is_held_against_the_best_evaluation(name: str, best: float, within: bool) -> None:
    run = {AIME: Series(np.array([0.0, 80.0, 160.0]), np.array([0.01, best, best - 0.02]))}
    comparison = against(run, name)
    assert comparison.within == within
    assert [finding.check for finding in comparison.findings] == ["figure"]


def test_the_papers_run_passes_the_recipes_full_reference_and_fails_where_it_ends_at_44() -> None:
    assert against(dapo(), "dapo_qwen2.5_32b", complete=True).within
    run = dapo()
    capped = run | {AIME: Series(run[AIME].updates, np.minimum(run[AIME].values, 0.44))}
    assert failed_checks(against(capped, "dapo_qwen2.5_32b")) == {"figure"}


def test_a_signature_that_the_run_does_not_log_is_said_to_be_missing() -> None:
    assert against({AIME: dapo()[AIME]}).missing == ("response length", "reward", "entropy")


def test_too_short_a_run_or_one_without_evaluation_is_no_comparison() -> None:
    with pytest.raises(RunError, match="train on"):
        against(cut(dapo(), after=300))
    with pytest.raises(RunError, match="no evaluation"):
        against({"entropy": dapo()["entropy"]})
