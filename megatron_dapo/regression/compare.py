"""Checks of a run's curves against a reference: inside its band, its levels in time, its final level, its figure.

The band is the smoothed reference plus and minus the tolerance; what is compared with it is the run, smoothed alike,
at the reference's own places as far as the run got. Axes: `X` these places.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from megatron_dapo.regression.references import AIME, Reference, Signature, aime_tolerance
from megatron_dapo.regression.run_series import RunError
from megatron_dapo.regression.series import Floats, Series, first_at

LEAST_PLACES = 5  # evaluations, or as many places of another curve
ALLOWED_OUTSIDE = 0.1  # of the places: a smoothed edge or a spike is no verdict
FINAL_PLACES = 5
WHOLE = 0.9  # of the reference's updates: what a run that counts as whole has done


@dataclass(frozen=True)
class Band:
    """A signature's curves at [X], in its unit."""

    signature: Signature
    updates: Floats
    run: Floats
    reference: Floats
    low: Floats
    high: Floats


@dataclass(frozen=True)
class Finding:
    """One check of one signature; `said` has what was wanted and what was found."""

    signature: str
    check: str
    ok: bool
    said: str


@dataclass(frozen=True)
class Comparison:
    findings: tuple[Finding, ...]
    bands: tuple[Band, ...]
    missing: tuple[str, ...]  # signatures that the run has no metric of
    covered: float  # of the reference's updates

    @property
    def within(self) -> bool:
        return all(finding.ok for finding in self.findings)

    @property
    def failed(self) -> tuple[str, ...]:
        """The signatures outside, each once."""
        return tuple(dict.fromkeys(finding.signature for finding in self.findings if not finding.ok))


def compare(run: Mapping[str, Series], reference: Reference, *, complete: bool = False) -> Comparison:
    """Every check that the run is far enough for. `complete`: a run that is not whole fails.

    Raises:
        RunError: no evaluation, or too few places to compare at.
    """
    if AIME not in run:
        raise RunError(f"the run has no evaluation on {AIME}, without which no reference can be compared")
    bands = tuple(_band(signature, run[signature.name]) for signature in reference.signatures if signature.name in run)
    missing = tuple(signature.name for signature in reference.signatures if signature.name not in run)
    covered = _covered(run[AIME], reference)
    findings = [finding for band in bands for finding in _checks(band)]
    if complete:
        said = f"{covered:.0%} of the reference's updates done, {WHOLE:.0%} wanted"
        findings.append(Finding(AIME, "whole run", covered >= WHOLE, said))
    if reference.figure is not None and (covered >= WHOLE or complete):
        findings.append(_figure(run[AIME], reference.figure))
    return Comparison(tuple(findings), bands, missing, covered)


def _covered(run: Series, reference: Reference) -> float:
    """1 where the reference has no curve: its length is not known."""
    ends = [signature.load().updates[-1] for signature in reference.signatures if signature.name == AIME]
    return min(1.0, float(run.updates[-1] / ends[0])) if ends else 1.0


def _band(signature: Signature, run: Series) -> Band:
    reference = signature.load()
    inside_X = (reference.updates >= run.updates[0]) & (reference.updates <= run.updates[-1])
    updates_X = reference.updates[inside_X]
    if len(updates_X) < LEAST_PLACES:
        raise RunError(
            f"{signature.name}: the run has values from update {run.updates[0]:.0f} to {run.updates[-1]:.0f}, which "
            f"holds {len(updates_X)} places of the reference; {LEAST_PLACES} are wanted: train on"
        )
    if signature.ratio:
        low_X, middle_X, high_X, run_X = (np.exp(v) for v in _edges(signature, reference.log(), run.log(), updates_X))
    else:
        low_X, middle_X, high_X, run_X = _edges(signature, reference, run, updates_X)
    return Band(signature, updates_X, run_X, middle_X, low_X, high_X)


def _edges(signature: Signature, reference: Series, run: Series, updates_X: Floats) -> tuple[Floats, ...]:
    middle_X = reference.smoothed(updates_X)
    tolerance = signature.jitters * reference.jitter()
    return middle_X - tolerance, middle_X, middle_X + tolerance, run.smoothed(updates_X)


def _checks(band: Band) -> Iterator[Finding]:
    yield _inside(band)
    yield from _milestones(band)
    yield _final(band)


def _inside(band: Band) -> Finding:
    outside_X = _outside(band, band.run, band.low, band.high)
    share = float(outside_X.mean())
    said = f"outside at {share:.0%} of {len(outside_X)} places ({ALLOWED_OUTSIDE:.0%} allowed)"
    if outside_X.any():
        first = int(np.flatnonzero(outside_X)[0])
        bounds = f"{band.low[first]:.3g} to {band.high[first]:.3g}"
        said += f"; first at update {band.updates[first]:.0f}: {band.run[first]:.3g}, wanted {bounds}"
    return Finding(band.signature.name, "band", share <= ALLOWED_OUTSIDE, said)


def _milestones(band: Band) -> Iterator[Finding]:
    """Each level no later than the band's lower edge is there; a level that the edge does not get to is not checked."""
    final = float(band.signature.load().values[-FINAL_PLACES:].mean())
    for share in band.signature.milestones:
        level = share * final
        latest = first_at(band.updates, band.low, level)
        if latest is None:
            continue
        usual = first_at(band.updates, band.reference, level)
        found = first_at(band.updates, band.run, level)
        there = "not reached" if found is None else f"reached at update {found:.0f}"
        said = f"{there}; the reference at {usual:.0f}, wanted by {latest:.0f}"
        yield Finding(band.signature.name, f"reaches {level:.3g}", found is not None and found <= latest, said)


def _final(band: Band) -> Finding:
    """The last places of what was compared, where the whole of a shorter run's curve may lie."""
    run, reference, low, high = (
        curve[-FINAL_PLACES:].mean(keepdims=True) for curve in (band.run, band.reference, band.low, band.high)
    )
    ok = not _outside(band, run, low, high)[0]
    wanted = f"{low[0]:.3g} to {high[0]:.3g}" if band.signature.too_high_fails else f"at least {low[0]:.3g}"
    said = f"{run[0]:.3g} over the last {FINAL_PLACES} places; the reference {reference[0]:.3g}, wanted {wanted}"
    return Finding(band.signature.name, "final level", bool(ok), said)


def _outside(band: Band, run: Floats, low: Floats, high: Floats) -> np.ndarray:
    return (run < low) | ((run > high) & band.signature.too_high_fails)


def _figure(run: Series, figure: float) -> Finding:
    """The best evaluation: published figures are those of a run's best one (the paper's 50 is its curve's maximum)."""
    least, best = figure - aime_tolerance(), float(run.values.max())
    said = f"best evaluation {best:.1%}; published {figure:.0%}, wanted at least {least:.1%}"
    return Finding(AIME, "figure", best >= least, said)
