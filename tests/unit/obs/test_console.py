from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from megatron_dapo.obs.console import ConsoleLogger
from megatron_dapo.obs.run_info import RunInfo

STEP = {
    "sampling/accuracy": 0.5,
    "reward/mean": -0.25,
    "throughput/tokens_per_second": 12345.6,
    "response/length_mean": 33.25,
    "actor/entropy": 0.125,
    "seconds/step": 60.0,
}
EVALUATION = {
    "val/openai[b]/gsm8k/avg@8": 0.521,
    "val/openai[b]/gsm8k/avg@8_low": 0.478,
    "val/openai[b]/gsm8k/avg@8_high": 0.563,
    "val/openai[b]/gsm8k/pass@2": 0.7,
    "val/openai[b]/gsm8k/pass@2_low": 0.6,
    "val/openai[b]/gsm8k/pass@2_high": 0.8,
    "val/openai[b]/gsm8k/pass@8": 0.9,
    "val/openai[b]/gsm8k/pass@8_low": 0.85,
    "val/openai[b]/gsm8k/pass@8_high": 0.95,
    "val/openai[b]/gsm8k/failed": 0,
}


def logged(terminal: bool, first_step: int = 0, total: int | None = 20) -> tuple[ConsoleLogger, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120, height=30, _environ={"TERM": "xterm-256color"})
    return ConsoleLogger(RunInfo(Path(), "p", "arithmetic", first_step, total, {}, console)), out


def test_without_a_terminal_each_step_is_one_plain_line():
    logger, out = logged(terminal=False)
    logger.log(0, EVALUATION)
    logger.log(1, STEP)
    logger.log(2, STEP | {"seconds/step": 30.0} | EVALUATION)
    logger.close()
    figures = "accuracy 0.500  reward -0.250  tokens/s 12,346  length 33.2  entropy 0.125"
    assert out.getvalue().splitlines() == [
        "step 0  val/openai[b]/gsm8k  avg@8 0.521 [0.478, 0.563]  pass@8 0.900 [0.850, 0.950]",
        f"step 1/20  {figures}  0:19:00 left",
        "step 2  val/openai[b]/gsm8k  avg@8 0.521 [0.478, 0.563]  pass@8 0.900 [0.850, 0.950]",
        f"step 2/20  {figures}  0:13:30 left",
    ]


def test_without_a_known_end_no_time_left_is_told():
    logger, out = logged(terminal=False, total=None)
    logger.log(1, STEP)
    assert out.getvalue().startswith("step 1  accuracy")
    assert "left" not in out.getvalue()


def test_on_a_terminal_bar_figures_and_time_left_are_live_and_evaluations_stay():
    logger, out = logged(terminal=True, first_step=5)
    logger.log(5, STEP | EVALUATION)
    logger.log(6, STEP | {"sampling/accuracy": 0.75})
    logger.close()
    screen = out.getvalue()
    for text in ("arithmetic", "4/20", "5/20", "6/20", "accuracy 0.500", "accuracy 0.750", "0:14:00 left"):
        assert text in screen
    assert screen.count("avg@8 0.521") == 1
    assert "\x1b[2K" in screen, "lines are drawn over"
    assert screen.index("\x1b[?25l") < screen.rindex("\x1b[?25h"), "the cursor comes back"


def test_the_estimate_of_the_time_left_forgets_old_steps():
    logger, out = logged(terminal=False, total=100)
    for step in range(1, 51):
        logger.log(step, STEP | {"seconds/step": 600.0 if step <= 30 else 2.0})
    assert out.getvalue().splitlines()[-1].endswith("0:01:40 left")
