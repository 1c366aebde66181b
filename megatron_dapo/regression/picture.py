"""The picture of a comparison: a panel a signature, the reference's band and the run. No display, no pyplot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_dapo.regression.compare import Band, Comparison
from megatron_dapo.regression.references import AIME, Reference
from megatron_dapo.regression.series import Series

WITHIN, OUTSIDE = "tab:green", "tab:red"


def draw_comparison(
    out_png: Path, title: str, run: Mapping[str, Series], reference: Reference, comparison: Comparison
) -> None:
    """Draw every compared signature, or the evaluations against the figure where that is all that the reference has."""
    columns = 2 if len(comparison.bands) > 1 else 1
    rows = max(1, -(-len(comparison.bands) // columns))
    figure = Figure(figsize=(6.5 * columns, 3.6 * rows + 0.6), layout="constrained")
    axes: list[Axes] = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax, band in zip(axes, comparison.bands, strict=False):
        _draw_band(ax, band, run[band.signature.name], band.signature.name in comparison.failed)
    if not comparison.bands:
        _draw_evaluations(axes[0], run[AIME], AIME in comparison.failed)
    if reference.figure is not None:
        axes[0].axhline(reference.figure, color="gray", linestyle=":", label=f"published {reference.figure:.0%}")
        axes[0].legend(frameon=False, fontsize=8)
    for ax in axes[max(1, len(comparison.bands)) :]:
        ax.remove()
    figure.suptitle(f"{title}: {'within' if comparison.within else 'outside'}")
    figure.savefig(out_png, dpi=120)


def _draw_band(ax: Axes, band: Band, run: Series, failed: bool) -> None:
    colour = OUTSIDE if failed else WITHIN
    ax.fill_between(band.updates, band.low, band.high, color="tab:blue", alpha=0.15, linewidth=0, label="band")
    published = band.signature.load()
    ax.plot(published.updates, published.values, ".", color="tab:blue", markersize=3)
    ax.plot(band.updates, band.reference, color="tab:blue", linewidth=1.2, label="reference, smoothed")
    ax.plot(run.updates, run.values, ".", color=colour, markersize=3, alpha=0.5)
    ax.plot(band.updates, band.run, color=colour, linewidth=1.6, label="run, smoothed")
    _finish(ax, band.signature.name, band.signature.unit, failed)


def _draw_evaluations(ax: Axes, run: Series, failed: bool) -> None:
    ax.plot(run.updates, run.values, marker="o", markersize=3, color=OUTSIDE if failed else WITHIN, label="run")
    _finish(ax, AIME, "avg@k, share", failed)


def _finish(ax: Axes, title: str, unit: str, failed: bool) -> None:
    ax.set(title=f"{title}: {'outside' if failed else 'within'}", xlabel="gradient updates", ylabel=unit)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8)
