"""The run on the screen: bar, figures and time left, live on a terminal; one plain line a step elsewhere."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping
from datetime import timedelta

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from megatron_dapo.obs.run_info import RunInfo

STEPS_AVERAGED = 20  # by the estimate of the time left

# (metric, label, format) in the order shown; a metric that a step does not have is left out
SHOWN = (
    ("sampling/accuracy", "accuracy", "{:.3f}"),
    ("reward/mean", "reward", "{:+.3f}"),
    ("throughput/tokens_per_second", "tokens/s", "{:,.0f}"),
    ("response/length_mean", "length", "{:,.1f}"),
    ("actor/entropy", "entropy", "{:.3f}"),
)
EVALUATED = re.compile(r"(val/.+)/(avg|pass|cons)@(\d+)")


class ConsoleLogger:
    """Evaluations are printed as lines of their own, which stay above the live display."""

    id = ""

    def __init__(self, run: RunInfo) -> None:
        self._console, self._total = run.console, run.total_steps
        self._recent: deque[float] = deque(maxlen=STEPS_AVERAGED)
        self._figures = Text("waiting for the first step")
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", markup=False),
            console=run.console,
        )
        done = max(run.first_step - 1, 0)
        self._task = self._progress.add_task(run.experiment, total=run.total_steps, completed=done, left="")
        self._live: Live | None = None
        if run.console.is_terminal and not run.console.is_dumb_terminal:
            self._live = Live(get_renderable=self._render, console=run.console)
            self._live.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step > 0 and "seconds/step" in metrics:
            self._recent.append(metrics["seconds/step"])
        figures = [f"{label} {form.format(metrics[name])}" for name, label, form in SHOWN if name in metrics]
        left = self._time_left(step)
        for line in evaluation_lines(metrics):
            self._print(f"step {step}  {line}")
        if self._live is None:
            if figures:
                of_total = "" if self._total is None else f"/{self._total}"
                self._print("  ".join([f"step {step}{of_total}", *figures, *left]))
        else:
            if figures:
                self._figures = Text("  ".join(figures), no_wrap=True, overflow="ellipsis")
            self._progress.update(self._task, completed=step, left="".join(left))
            self._live.refresh()

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()

    def _render(self) -> Group:
        return Group(self._progress.get_renderable(), self._figures)

    def _time_left(self, step: int) -> list[str]:
        """One text, or none where there is nothing to tell it by."""
        if self._total is None or not self._recent:
            return []
        seconds = (self._total - step) * sum(self._recent) / len(self._recent)
        return [f"{timedelta(seconds=round(seconds))} left"]

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def evaluation_lines(metrics: Mapping[str, float]) -> list[str]:
    """One line a data source: `val/aime24  avg@32 0.521 [0.478, 0.563]  cons@32 0.600 [0.423, 0.754]  ...`.

    The interval holds the true value with 95 % confidence. Of pass@k the largest k is shown.
    """
    figures: dict[str, dict[str, tuple[int, str]]] = {}
    for name, value in metrics.items():
        if match := EVALUATED.fullmatch(name):
            source, kind, k = match[1], match[2], int(match[3])
            shown = figures.setdefault(source, {})
            if kind not in shown or k > shown[kind][0]:
                interval = f"[{metrics[name + '_low']:.3f}, {metrics[name + '_high']:.3f}]"
                shown[kind] = (k, f"{kind}@{k} {value:.3f} {interval}")
    return ["  ".join([source, *(text for _, text in shown.values())]) for source, shown in figures.items()]
