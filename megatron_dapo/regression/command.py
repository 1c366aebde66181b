"""`tools/compare_curve.py`: a run against a reference; a table, a verdict, a picture, an exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_dapo.regression.compare import Comparison, compare
from megatron_dapo.regression.picture import draw_comparison
from megatron_dapo.regression.references import REFERENCES, Reference
from megatron_dapo.regression.run_series import RunError, read_run

WITHIN, OUTSIDE, USAGE_ERROR = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Compare as the arguments say; 0: within, 1: outside, 2: there is nothing to compare."""
    arguments = _parser().parse_args(argv)
    name = arguments.reference or _named_by(arguments.run)
    if name not in REFERENCES:
        return _complain(f"the run's folder names no reference ({name}): choose with --reference NAME, see --help")
    reference = REFERENCES[name]
    picture = arguments.picture or _folder(arguments.run) / f"compare_{name}.png"
    try:
        run = read_run(arguments.run, arguments.source)
        comparison = compare(run.series, reference, complete=arguments.complete)
    except RunError as error:
        return _complain(str(error))
    console = Console()
    title = f"{arguments.run} against {name}"
    _report(console, title, reference, comparison, run.evaluated)
    draw_comparison(picture, title, run.series, reference, comparison)
    console.print(f"picture: {picture}", markup=False, highlight=False, soft_wrap=True)
    return WITHIN if comparison.within else OUTSIDE


def _parser() -> argparse.ArgumentParser:
    names = "\n".join(f"  {name}: {reference.meaning}" for name, reference in REFERENCES.items())
    parser = argparse.ArgumentParser(
        description="Compare a run's curves with a reference: exit code 0 within, 1 outside, 2 nothing to compare.",
        epilog=f"references:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, or its metrics.jsonl")
    called = "see below; if absent, the one that the run's folder is called after"
    parser.add_argument("--reference", choices=REFERENCES, metavar="NAME", help=called)
    parser.add_argument("--source", metavar="NAME", help="the data source that is AIME 2024, where there are several")
    parser.add_argument("--complete", action="store_true", help="a run that is not over counts as outside")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="compare_NAME.png beside the metrics if absent")
    return parser


def _folder(run: Path) -> Path:
    return run if run.is_dir() else run.parent


def _named_by(run: Path) -> str:
    """`dapo_qwen2.5_32b` for .../DAPO-Qwen2.5-32B, as the recipes call their runs' folders."""
    return _folder(run).resolve().name.lower().replace("-", "_")


def _complain(message: str) -> int:
    print(f"compare_curve: {message}", file=sys.stderr)
    return USAGE_ERROR


def _report(console: Console, title: str, reference: Reference, comparison: Comparison, evaluated: str) -> None:
    table = Table(title=f"{title}\n{reference.meaning}; evaluated: {evaluated}", title_justify="left")
    for name in ("signature", "check", "", "found and wanted"):
        table.add_column(name)
    for finding in comparison.findings:
        colour = "green" if finding.ok else "red"
        table.add_row(
            finding.signature, finding.check, f"[{colour}]{'ok' if finding.ok else 'FAILED'}[/]", finding.said
        )
    for name in comparison.missing:
        table.add_row(name, "", "-", "not in the run's metrics: not compared")
    console.print(table)
    sources = dict.fromkeys(band.signature.source for band in comparison.bands)
    if reference.figure is not None:
        sources[reference.figure_source] = None
    console.print(f"sources: {'; '.join(sources)}", markup=False, highlight=False)
    far = f"{comparison.covered:.0%} of the reference's updates" if comparison.bands else "the whole run as it is"
    verdict = "within" if comparison.within else f"OUTSIDE: {', '.join(comparison.failed)}"
    console.print(f"{verdict} ({far})", markup=False, highlight=False)
