"""The arithmetic example in DAPO's three settings, thirty steps each, against golden series; and what they must show.

The settings start from one small base model, which is kept with the golden files: no warm-up here.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_dapo.config.load import load_config
from megatron_dapo.data.minibatch import MiniBatch, build_update, mini_batches
from megatron_dapo.obs.summary import DISTRIBUTIONS
from megatron_dapo.regression.golden import differences, read_golden, series_of
from megatron_dapo.training_step import StepRules
from megatron_dapo.types import Completion, Group, Prompt, RewardResult, Sample
from tests.functional import forked_run
from tools.write_golden import BASE, COUNTEREXAMPLES, FOLDER, RUNS, SETTINGS, golden_words

STEPS = 30
FULL, WITHOUT_DYNAMIC_SAMPLING, EARLY = SETTINGS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("golden")


@pytest.fixture(scope="module", params=SETTINGS)
def setting(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def run(folder: Path, setting: str) -> Path:
    out = folder / setting
    config, *overrides = golden_words(folder, out, setting)
    ended = forked_run.run(Path(config), out, *overrides)
    assert ended.code == 0, ended.said
    return out


def golden(name: str) -> dict[str, Any]:
    return dict(read_golden(FOLDER / f"{name}.json").series)


def test_a_run_is_the_golden_one_step_by_step(run: Path, setting: str) -> None:
    told = differences(golden(setting), series_of(run))
    assert not told, f"{setting} left its golden run (docs/regression.md says how to judge it):\n" + "\n".join(told)


def test_no_uniform_group_is_trained_on_with_dynamic_sampling_and_without_it_some_are(run: Path, setting: str) -> None:
    outcomes = [[bool(sample["accuracy"]) for sample in group] for group in logged_groups(run).values()]
    assert len(outcomes) == STEPS * 8
    uniform = sum(len(set(each)) == 1 for each in outcomes)
    if setting == FULL:
        assert uniform == 0
        assert sum(series_of(run)["sampling/groups_uniform"]) > 0, "no group was there to be dropped"
    else:
        assert uniform > 0


def test_a_token_weighs_what_the_settings_mode_says_exactly(run: Path, folder: Path, setting: str) -> None:
    config, *overrides = golden_words(folder, run, setting)
    loaded = load_config(config, overrides).config
    rules = StepRules(loaded.actor_rollout_ref.actor, loaded.algorithm, loaded.reward_model)
    groups = [rebuilt(draw, samples) for (step, draw), samples in logged_groups(run).items() if step == 1]
    batches = mini_batches(groups, rules.actor.ppo_mini_batch_size)
    assert len(batches) == 4
    for groups_of_update in batches:
        lengths = np.array([sample.length for group in groups_of_update for sample in group.samples])
        assert len(lengths) == 16
        assert len(set(lengths)) > 1, "with equal lengths every mode is the same"
        zeros = np.zeros(lengths.sum(), np.float32)
        batch = MiniBatch.from_groups(groups_of_update, np.zeros(len(lengths)), zeros)
        ((micro_batch,),) = build_update(batch, [[list(range(len(lengths)))]], rules.weighting).ranks
        wanted = {
            FULL: np.full(lengths.sum(), 1 / lengths.sum()),
            WITHOUT_DYNAMIC_SAMPLING: np.full(lengths.sum(), 1 / lengths.sum()),
            EARLY: np.repeat(1 / (len(lengths) * lengths), lengths),
        }[setting]
        np.testing.assert_array_equal(np.repeat(micro_batch.terms.weight, lengths), wanted.astype(np.float32))


@pytest.mark.parametrize("wrong", RUNS)
@pytest.mark.parametrize("right", SETTINGS)
def test_no_golden_run_passes_for_another(right: str, wrong: str) -> None:
    """A wrong aggregation mode, dynamic sampling off, clipping off: tolerances must tell them apart."""
    told = differences(golden(right), golden(wrong))
    if right == wrong:
        assert not told
    else:
        names = {line.split(":")[0] for line in told}
        assert {"actor/loss", "actor/grad_norm"} <= names, "told by what is learnt, not by counters alone"
        assert first_step(told) <= 10


def test_the_other_mode_is_told_in_the_first_step_and_no_clipping_where_the_first_token_is_clipped() -> None:
    assert first_step(differences(golden(WITHOUT_DYNAMIC_SAMPLING), golden(EARLY))) == 1
    full = golden(FULL)
    clipped = [high + low > 0 for high, low in zip(full["actor/clipped_high"], full["actor/clipped_low"], strict=True)]
    assert first_step(differences(full, golden("unclipped"))) == clipped.index(True) + 1


@pytest.mark.parametrize("name", RUNS)
def test_a_golden_file_names_commit_versions_and_settings(name: str) -> None:
    origin = read_golden(FOLDER / f"{name}.json").origin
    assert re.fullmatch(r"[0-9a-f]{40}", origin.commit)
    assert all(origin.versions[each] for each in ("python", "megatron-dapo", *DISTRIBUTIONS))
    setting, extra = RUNS[name]
    assert set(origin.overrides) >= {*SETTINGS[setting], *extra, f"trainer.total_training_steps={STEPS}"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", origin.date)


def test_nothing_else_lies_beside_the_golden_files() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {BASE.name, *(f"{name}.json" for name in RUNS)}
    assert set(RUNS) == {*SETTINGS, *COUNTEREXAMPLES}


def first_step(told: list[str]) -> int:
    return int(re.findall(r"step (\d+):", told[0])[0])


@cache
def logged_groups(run: Path) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """(step, draw) -> the samples of a group that was trained on."""
    groups: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for line in (run / "samples.jsonl").read_text().splitlines():
        sample = json.loads(line)
        groups[sample["step"], sample["draw_index"]].append(sample)
    return groups


def rebuilt(draw: int, samples: list[dict[str, Any]]) -> Group:
    """A group of responses of the logged lengths."""
    prompt = Prompt(draw, np.ones(4, np.int32), "", "", "")
    return Group(
        draw,
        prompt,
        tuple(
            Sample(
                Completion(draw, number, np.ones(s["length"], np.int32), np.zeros(s["length"], np.float32), "stop", 0),
                RewardResult("ok", s["score"], {}),
                0.0,
                s["reward"],
            )
            for number, s in enumerate(samples)
        ),
        0,
    )
