from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_dapo.config.tree import ConfigError
from megatron_dapo.obs.jsonl import read_metrics
from megatron_dapo.obs.loggers import LOGGERS, Loggers
from megatron_dapo.obs.run_info import RunInfo

HAS_WANDB = importlib.util.find_spec("wandb") is not None


def run_info(directory: Path, first_step: int = 0) -> RunInfo:
    return RunInfo(directory, "project", "experiment", first_step, 10, {"lr": 0.1}, Console(file=io.StringIO()))


def printed(run: RunInfo) -> str:
    return run.console.file.getvalue()


def log_steps(run: RunInfo, names: list[str], steps: list[int], offset: float = 0.0) -> None:
    with Loggers(names, run) as loggers:
        for step in steps:
            loggers.log(step, {"reward/mean": step + offset})


class BreaksAtStepTwo:
    """A remote logger whose server goes away."""

    def __init__(self, calls: list):
        self._calls = calls

    def log(self, step, metrics):
        self._calls.append(step)
        if step == 2:
            raise ConnectionError("server is gone")

    def close(self):
        self._calls.append("close")
        raise ConnectionError("still gone")


def test_metrics_jsonl_is_written_whatever_loggers_are_named(tmp_path):
    log_steps(run_info(tmp_path / "none"), [], [1])
    log_steps(run_info(tmp_path / "named"), ["jsonl", "console", "jsonl"], [1])
    for name in ("none", "named"):
        assert (tmp_path / name / "metrics.jsonl").read_text() == '{"step": 1, "reward/mean": 1.0}\n'


def test_equal_metrics_in_any_order_give_equal_bytes(tmp_path):
    for name, metrics in (("a", {"x": 0.1, "y": 2}), ("b", {"y": 2, "x": 0.1})):
        with Loggers([], run_info(tmp_path / name)) as loggers:
            loggers.log(1, metrics)
    assert (tmp_path / "a/metrics.jsonl").read_bytes() == (tmp_path / "b/metrics.jsonl").read_bytes()


def test_a_resumed_run_has_each_step_once_in_jsonl_and_tensorboard(tmp_path):
    log_steps(run_info(tmp_path), ["tensorboard"], [0, 1, 2, 3, 4])
    log_steps(run_info(tmp_path, first_step=3), ["tensorboard"], [3, 4, 5], offset=0.5)
    expected = [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.5), (4, 4.5), (5, 5.5)]
    assert [(r["step"], r["reward/mean"]) for r in read_metrics(tmp_path / "metrics.jsonl")] == expected
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["reward/mean"]
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == expected


def test_a_logger_that_fails_is_switched_off_with_a_warning_and_nothing_is_lost(tmp_path):
    run, calls = run_info(tmp_path), []
    with Loggers(["remote", "console"], run, LOGGERS | {"remote": lambda run: BreaksAtStepTwo(calls)}) as loggers:
        for step in (1, 2, 3):
            loggers.log(step, {"reward/mean": float(step)})
        assert loggers.failures == {
            "remote": "failed at step 2 and is off for the rest of this run: ConnectionError: server is gone"
        }
    assert calls == [1, 2, "close"]
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert "WARNING: logger remote failed at step 2" in printed(run)
    assert 'raise ConnectionError("server is gone")' in printed(run), "with the traceback"
    assert "could not be closed" in printed(run)
    assert "step 3/10" in printed(run), "the other loggers go on"


def test_metrics_jsonl_that_cannot_be_written_stops_the_run(tmp_path):
    loggers = Loggers(["console"], run_info(tmp_path))
    loggers.close()
    with pytest.raises(ValueError, match="closed file"):
        loggers.log(1, {"reward/mean": 1.0})


@pytest.mark.parametrize("step", [3, 4])
def test_a_step_logged_twice_or_out_of_order_is_refused(tmp_path, step):
    with Loggers([], run_info(tmp_path, first_step=4)) as loggers:
        if step == 4:
            loggers.log(4, {})
        with pytest.raises(ValueError, match=f"step {step} was logged after step {step if step == 4 else 3}"):
            loggers.log(step, {})


def test_an_unknown_logger_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(ConfigError, match="unknown logger 'tensorbord'; did you mean 'tensorboard'"):
        Loggers(["tensorbord"], run_info(tmp_path))


def test_a_run_whose_loggers_cannot_start_cuts_no_metrics_and_closes_those_that_did(tmp_path):
    log_steps(run_info(tmp_path), [], [0, 1])
    calls = []

    def refuses(run):
        raise ConfigError("no key for the server")

    with pytest.raises(ConfigError, match="no key"):
        Loggers(
            ["remote", "other"], run_info(tmp_path), {"remote": lambda run: BreaksAtStepTwo(calls), "other": refuses}
        )
    assert calls == ["close"]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


@pytest.mark.skipif(HAS_WANDB, reason="wandb is installed")
def test_wandb_that_is_not_installed_is_an_error_with_its_remedy(tmp_path):
    with pytest.raises(ConfigError, match="wandb, which is not installed; install it"):
        Loggers(["wandb"], run_info(tmp_path))


@pytest.mark.skipif(not HAS_WANDB, reason="wandb is not installed")
def test_wandb_works_offline_and_keeps_its_page_on_resume(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    log_steps(run_info(tmp_path), ["wandb"], [0, 1])
    page = (tmp_path / "wandb_id").read_text()
    log_steps(run_info(tmp_path, first_step=1), ["wandb"], [1, 2])
    assert (tmp_path / "wandb_id").read_text() == page
    runs = list((tmp_path / "wandb").glob(f"offline-run-*-{page}"))
    assert runs
    assert all((run / f"run-{page}.wandb").stat().st_size > 0 for run in runs)
    log_steps(run_info(tmp_path), ["wandb"], [0])
    assert (tmp_path / "wandb_id").read_text() != page, "a fresh run has a page of its own"


def test_every_logger_of_the_table_takes_a_step_and_closes(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    names = [name for name in LOGGERS if name != "wandb" or HAS_WANDB]
    with Loggers(names, run_info(tmp_path)) as loggers:
        loggers.log(1, {"reward/mean": float("nan"), "count": 3})
        assert loggers.failures == {}
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "reward/mean": "NaN", "count": 3}
