"""The picture of a run: metrics.jsonl against the step. Drawn without a display and without pyplot's global state."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_dapo.obs.console import EVALUATED
from megatron_dapo.obs.jsonl import read_metrics

# (title, y label, metrics as (name, legend)) of each panel in reading order; the sixth panel shows evaluations
PANELS = (
    ("Accuracy", "share right", (("sampling/accuracy", "all responses"), ("reward/accuracy", "groups trained on"))),
    ("Reward", "mean reward", (("reward/mean", "with overlong penalty"), ("reward/score", "verifier's score"))),
    ("Response length", "mean tokens", (("response/length_mean", "groups trained on"),)),
    ("Entropy", "nats per token", (("actor/entropy", "policy"),)),
    ("Groups kept", "share of those generated", (("sampling/kept_share", "kept"),)),
)
SHARES = ("Accuracy", "Groups kept", "Evaluation")  # titles of panels whose axis runs from 0 to 1


def draw_curve(metrics_jsonl: Path, out_png: Path) -> None:
    """Draw accuracy, reward, response length, entropy, share of groups kept and evaluations into `out_png`.

    A panel without data says so, and a single point is seen.

    Raises:
        ValueError: the file is not one of metrics (see `read_metrics`).
    """
    records = read_metrics(metrics_jsonl)
    figure = Figure(figsize=(13, 7), layout="constrained")
    axes: list[Axes] = list(figure.subplots(2, 3).flat)
    for ax, (title, unit, metrics) in zip(axes, PANELS, strict=False):
        for name, legend in metrics:
            points = [(record["step"], record[name]) for record in records if name in record]
            if points:
                _line(ax, points, legend)
        _finish(ax, title, unit)
    _draw_evaluations(axes[5], records)
    _same_steps(axes, [record["step"] for record in records])
    figure.savefig(out_png, dpi=120)


def _draw_evaluations(ax: Axes, records: list[dict[str, float]]) -> None:
    """avg@k of every data source, with its 95 % interval as a band."""
    names = sorted({name for record in records for name in record if EVALUATED.fullmatch(name) and "/avg@" in name})
    for name in names:
        rows = [record for record in records if name in record]
        steps = [record["step"] for record in rows]
        (line,) = _line(ax, [(record["step"], record[name]) for record in rows], name.removeprefix("val/"))
        low, high = [record[name + "_low"] for record in rows], [record[name + "_high"] for record in rows]
        ax.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        ax.vlines(steps, low, high, color=line.get_color(), alpha=0.4, linewidth=1)
    _finish(ax, "Evaluation", "avg@k with 95 % interval")


def _same_steps(axes: list[Axes], steps: list[float]) -> None:
    """One range of steps for all panels, ticks at whole steps."""
    first, last = (min(steps), max(steps)) if steps else (0, 1)
    margin = max(0.03 * (last - first), 0.5)
    for ax in axes:
        ax.set_xlim(first - margin, last + margin)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))


def _line(ax: Axes, points: list[tuple[float, float]], legend: str) -> list:
    steps, values = zip(*points, strict=True)
    marker = "o" if len(points) <= 40 else ""  # markers show few points, and hide many
    return ax.plot(steps, values, marker=marker, markersize=3.5, linewidth=1.4, label=legend)


def _finish(ax: Axes, title: str, unit: str) -> None:
    ax.set(title=title, xlabel="training step", ylabel=unit)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    if title in SHARES:
        ax.set_ylim(-0.02, 1.02)
    if ax.lines:
        ax.legend(frameon=False, fontsize=8)
    else:
        ax.text(0.5, 0.5, "no data", transform=ax.transAxes, ha="center", va="center", color="gray")
