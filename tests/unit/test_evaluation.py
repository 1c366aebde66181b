from __future__ import annotations

import math
import random

import numpy as np
import pytest

from megatron_dapo.config.tree import ConfigError, CustomRewardFunctionConfig, RewardModelConfig, ValKwargsConfig
from megatron_dapo.data.generation import response_seed
from megatron_dapo.evaluation import Evaluator, sampling_params
from megatron_dapo.obs.metric_table import find_metric
from megatron_dapo.rewards.pool import RewardPool
from megatron_dapo.rewards.table import RewardTask, VerifierSpec
from megatron_dapo.types import Completion, Prompt, Request, RewardResult, SamplingParams

SAMPLED = ValKwargsConfig(n=4, do_sample=True, temperature=0.7, top_p=0.9)


class ScriptedEngine:
    """Writes the token `seed % 7`, finishing in any order; `again` how often it gives a response up first."""

    def __init__(self, order_seed: int = 0, aborts: dict[tuple[int, int], int] | None = None):
        self.requests: list[Request] = []
        self._waiting: list[Request] = []
        self._order, self._aborts = random.Random(order_seed), dict(aborts or {})

    def submit(self, requests):
        self.requests += requests
        self._waiting += requests

    def poll(self):
        request = self._waiting.pop(self._order.randrange(len(self._waiting)))
        key = (request.draw_index, request.sample_index)
        given_up = self._aborts.get(key, 0) > 0
        self._aborts[key] = self._aborts.get(key, 0) - 1
        token = 5 if request.params.temperature == 0 else request.seed % 7
        ids = np.array([token] * (1 + request.draw_index))
        reason = "abort" if given_up else "length" if token == 0 else "stop"
        return [Completion(*key, ids, np.zeros(len(ids), np.float32), reason, 0)]

    @property
    def pending(self):
        return len(self._waiting)

    def abort(self):
        self._waiting = []


class ScriptedScorer:
    """Right where the response is the ground truth; `failing` texts cannot be scored; no answer in "6"."""

    def __init__(self, failing: str = "", returns_acc: bool = True):
        self._results: list = []
        self._failing, self._returns_acc = failing, returns_acc

    def submit(self, key, task):
        text, truth = task
        if text[0] in self._failing:
            result = RewardResult("timeout", math.nan, {}, detail="too slow")
        else:
            acc = float(text[0] in truth)
            metrics = {"score": 2 * acc - 1} | ({"acc": acc} if self._returns_acc else {})
            result = RewardResult("unparsable" if text[0] == "6" else "ok", 2 * acc - 1, metrics, pred=text[0])
        self._results.append((key, result))

    def poll(self, wait):
        taken, self._results = self._results, []
        return taken[::-1]

    @property
    def pending(self):
        return len(self._results)


def prompts(*rows: tuple[str, int, str]) -> list[Prompt]:
    """(data source, problem, ground truth)"""
    return [
        Prompt(i, np.array([problem]), f"problem {problem}", source, truth)
        for i, (source, problem, truth) in enumerate(rows)
    ]


def evaluator(rows, engine=None, scorer=None, val_kwargs=SAMPLED, run_seed=1) -> Evaluator:
    return Evaluator(
        prompts=rows,
        engine=engine or ScriptedEngine(),
        scorer=scorer or ScriptedScorer(),
        make_task=lambda prompt, text: (text, prompt.ground_truth),
        decode=lambda ids: "".join(str(i) for i in ids),
        val_kwargs=val_kwargs,
        max_response_length=16,
        run_seed=run_seed,
    )


TWO_SOURCES = prompts(("sums", 1, "0123"), ("sums", 2, "3456"), ("products", 3, "012"), ("sums", 4, ""))


def written(engine: ScriptedEngine) -> dict[tuple[int, int], str]:
    return {(r.draw_index, r.sample_index): str(r.seed % 7) for r in engine.requests}


def test_figures_are_those_of_the_responses_by_source_and_in_all():
    engine = ScriptedEngine()
    report = evaluator(TWO_SOURCES, engine).run(step=20)
    answers = written(engine)
    right = np.array([[answers[p, s] in TWO_SOURCES[p].ground_truth for s in range(4)] for p in range(4)])
    metrics = report.metrics()
    assert metrics["val/sums/avg@4"] == pytest.approx(right[[0, 1, 3]].mean())
    assert metrics["val/products/avg@4"] == pytest.approx(right[2].mean())
    assert metrics["val/all/avg@4"] == pytest.approx(right.mean())
    assert metrics["val/all/pass@4"] == pytest.approx(right.any(1).mean())
    assert 0 < metrics["val/all/avg@4_low"] < metrics["val/all/avg@4"] < metrics["val/all/avg@4_high"] < 1
    assert metrics["val/all/unparsable_share"] == list(answers.values()).count("6") / 16
    assert metrics["val/all/truncated_share"] == list(answers.values()).count("0") / 16
    assert (metrics["val/all/length_mean"], metrics["val/products/length_mean"]) == (2.5, 3)
    assert [metrics[f"val/sums/{name}"] for name in ("problems", "responses", "failed")] == [3, 12, 0]
    assert report.step == 20


def test_every_metric_of_a_report_is_in_the_table():
    metrics = evaluator(TWO_SOURCES).run(0).metrics()
    assert [name for name in metrics if find_metric(name) is None] == []


def test_one_source_is_not_reported_twice():
    names = evaluator(TWO_SOURCES[:2]).run(0).metrics()
    assert {name.split("/")[1] for name in names} == {"sums"}


def test_rows_that_repeat_a_problem_are_its_responses():
    rows = prompts(*[("aime", problem, "3") for problem in (1, 2) for _ in range(3)], ("aime", 1, "4"))
    report = evaluator(rows[:6], val_kwargs=ValKwargsConfig(n=2, do_sample=True)).run(0)
    assert (report.overall.estimates.problems, report.overall.estimates.k) == (2, 6)
    report = evaluator(rows, val_kwargs=ValKwargsConfig(n=2, do_sample=True)).run(0)
    assert report.overall.estimates.problems == 3, "another ground truth is another problem"


def test_a_response_whose_reward_failed_is_wrong_and_counted():
    engine = ScriptedEngine()
    rows = prompts(*[("sums", problem, "0123456") for problem in range(8)])
    report = evaluator(rows, engine, ScriptedScorer(failing="25")).run(0)
    failed = sum(answer in "25" for answer in written(engine).values())
    assert failed > 0
    assert report.overall.failed == failed
    assert report.overall.estimates.avg.value == pytest.approx(1 - failed / 32)
    assert report.overall.responses == 32


def test_a_response_that_the_engine_gives_up_for_good_is_wrong_and_one_given_up_once_is_written_again():
    rows = prompts(("sums", 1, "0123456"))
    report = evaluator(rows, ScriptedEngine(aborts={(0, 1): 1, (0, 2): 99})).run(0)
    assert (report.overall.failed, report.overall.estimates.avg.value) == (1, 0.75)


def test_a_source_without_any_score_is_all_wrong_and_its_lengths_are_nan():
    report = evaluator(TWO_SOURCES, scorer=ScriptedScorer(failing="0123456")).run(0)
    assert (report.overall.failed, report.overall.estimates.avg.value) == (16, 0.0)
    assert math.isnan(report.overall.length_mean)


def test_seeds_are_the_same_at_each_evaluation_differ_between_responses_and_are_not_those_of_training():
    engine = ScriptedEngine()
    evaluate = evaluator(TWO_SOURCES, engine)
    evaluate.run(0)
    evaluate.run(5)
    seeds = [request.seed for request in engine.requests]
    assert seeds[:16] == seeds[16:]
    assert len(set(seeds)) == 16
    assert not set(seeds) & {response_seed(1, draw, sample) for draw in range(4) for sample in range(4)}
    other = ScriptedEngine()
    evaluator(TWO_SOURCES, other, run_seed=2).run(0)
    assert not set(seeds) & {request.seed for request in other.requests}


def test_the_order_in_which_responses_finish_changes_nothing():
    reports = [evaluator(TWO_SOURCES, ScriptedEngine(order_seed=seed)).run(0) for seed in range(5)]
    assert all(report == reports[0] for report in reports)


def test_sampling_follows_val_kwargs_and_without_do_sample_is_greedy():
    assert sampling_params(SAMPLED, 16) == SamplingParams(16, temperature=0.7, top_p=0.9, top_k=-1)
    greedy = ValKwargsConfig(n=1, do_sample=False, temperature=0.7, top_p=0.9, top_k=3)
    assert sampling_params(greedy, 16) == SamplingParams(16, temperature=0.0, top_p=1.0, top_k=-1)


def test_several_greedy_responses_a_prompt_are_refused():
    with pytest.raises(ConfigError, match="writes the same response 8 times; use n=1, or do_sample=true"):
        evaluator(TWO_SOURCES, val_kwargs=ValKwargsConfig(n=8, do_sample=False))


def test_an_engine_at_work_on_something_else_is_refused():
    engine = ScriptedEngine()
    evaluate = evaluator(TWO_SOURCES, engine)
    engine.submit([Request(0, 0, np.array([1]), 3, SamplingParams(4))])
    with pytest.raises(RuntimeError, match="1 responses are being written"):
        evaluate.run(0)


def test_a_reward_that_does_not_tell_right_from_wrong_is_refused():
    with pytest.raises(ValueError, match=r"wants acc .* but the reward returns \['score'\]"):
        evaluator(TWO_SOURCES, scorer=ScriptedScorer(returns_acc=False)).run(0)


def test_no_prompt_and_a_source_named_all_are_refused():
    with pytest.raises(ValueError, match="no prompt to evaluate on"):
        evaluator([])
    with pytest.raises(ValueError, match="named 'all'"):
        evaluator(prompts(("all", 1, "2"), ("sums", 1, "2")))
    evaluator(prompts(("all", 1, "2"))).run(0)


def test_the_reward_processes_and_their_verifier_score_an_evaluation():
    engine = ScriptedEngine()
    rows = prompts(*[("math_dapo", problem, "3") for problem in range(6)])
    with RewardPool(VerifierSpec.from_config(RewardModelConfig(), CustomRewardFunctionConfig()), 1, 30, 0) as pool:
        report = Evaluator(
            prompts=rows,
            engine=engine,
            scorer=pool,
            make_task=lambda prompt, text: RewardTask(text, prompt.ground_truth, prompt.data_source, {}),
            decode=lambda ids: f"so it is {ids[0]}.\nAnswer: {ids[0]}" if ids[0] != 6 else "no idea",
            val_kwargs=SAMPLED,
            max_response_length=16,
            run_seed=1,
        ).run(0)
    answers = list(written(engine).values())
    assert report.overall.estimates.avg.value == pytest.approx(answers.count("3") / 24)
    assert report.overall.unparsable_share == pytest.approx(answers.count("6") / 24)
    assert answers.count("3") > 0 < answers.count("6")
