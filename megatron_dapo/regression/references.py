"""What a run is compared with: the DAPO paper's curves, its ablations, and the final figures of the public recipe.

The curves are CSV files in `references/`, read from the vector paths of the figures of arXiv 2503.14476 (their
README says how). The tolerance of a signature is a number of jitters, the jitter being that of the reference's own
points. The numbers are the lowest whole ones at which the paper's other runs of the same kind stay inside: 4 for AIME
(3.2 below, 3.7 above is the most of the runs with clip-higher of figure 2 and with dynamic sampling of figure 6), 9
for entropy (8.2: figure 2 against figure 7). Length and reward were published for one run alone and take entropy's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from megatron_dapo.regression.series import Series

CURVES = Path(__file__).parent / "references"
PAPER = "DAPO, arXiv 2503.14476"
RECIPE = "the public DAPO recipe, results on Qwen2.5-32B"

AIME = "AIME 2024"


@dataclass(frozen=True)
class Signature:
    """One curve that a run has to follow."""

    name: str
    unit: str
    curve: str  # the file's name, without .csv
    source: str
    jitters: float  # the tolerance
    to_run: float = 1.0  # run's unit / the file's: 0.01 for a share where the file has percent
    ratio: bool = False  # distances are ratios: compared as logarithms
    too_high_fails: bool = True
    milestones: tuple[float, ...] = ()  # shares of the final level: when they are reached is checked

    def load(self) -> Series:
        """The curve in the run's unit."""
        rows = np.loadtxt(CURVES / f"{self.curve}.csv", delimiter=",", skiprows=1)
        return Series(np.maximum(rows[:, 0], 0.0), rows[:, 1] * self.to_run)


@dataclass(frozen=True)
class Reference:
    """Curves, or a final figure, or both."""

    meaning: str
    signatures: tuple[Signature, ...] = ()
    figure: float | None = None  # AIME 2024, the best evaluation, as a share
    figure_source: str = RECIPE


def _aime(curve: str, figure: int, to_run: float = 1.0) -> Signature:
    return Signature(
        AIME,
        "avg@k, share",
        curve,
        f"{PAPER}, figure {figure}",
        jitters=4,
        to_run=to_run,
        too_high_fails=False,
        milestones=(0.25, 0.5, 0.75, 0.85),
    )


def _entropy(curve: str, figure: int) -> Signature:
    return Signature("entropy", "nats/token", curve, f"{PAPER}, figure {figure}", jitters=9)


DAPO = (
    _aime("aime24_avg32", 1, to_run=0.01),
    Signature("response length", "tokens", "response_length", f"{PAPER}, figure 7a", jitters=9, ratio=True),
    Signature("reward", "reward", "reward", f"{PAPER}, figure 7b", jitters=9),
    _entropy("entropy", 7),
)

REFERENCES: Mapping[str, Reference] = MappingProxyType(
    {
        "dapo_paper": Reference("DAPO on Qwen2.5-32B, the paper's best run", DAPO, 0.50, f"{PAPER}, table 1"),
        "dapo_qwen2.5_32b": Reference("the recipe's full run: the paper's curves, its own final figure", DAPO, 0.52),
        "dapo_wo_ds_qwen2.5_32b": Reference("the recipe's run without dynamic sampling: its figure", figure=0.50),
        "dapo_early_qwen2.5_32b": Reference("the recipe's early run: its figure", figure=0.44),
        "paper_with_clip_higher": Reference(
            "ablation: with clip-higher", (_aime("cliphigher_on_aime24", 2), _entropy("cliphigher_on_entropy", 2))
        ),
        "paper_without_clip_higher": Reference(
            "ablation: without clip-higher", (_aime("cliphigher_off_aime24", 2), _entropy("cliphigher_off_entropy", 2))
        ),
        "paper_with_overlong_filtering": Reference(
            "ablation: with overlong filtering", (_aime("overlong_filtering_on_aime24", 5),)
        ),
        "paper_without_overlong_filtering": Reference(
            "ablation: without overlong filtering", (_aime("overlong_filtering_off_aime24", 5),)
        ),
        "paper_with_dynamic_sampling": Reference(
            "ablation: with dynamic sampling", (_aime("dynamic_sampling_on_aime24", 6),)
        ),
        "paper_without_dynamic_sampling": Reference(
            "ablation: without dynamic sampling", (_aime("dynamic_sampling_off_aime24", 6),)
        ),
    }
)


def aime_tolerance() -> float:
    """What a final figure may be missed by: DAPO's avg@32 is the one curve with a jitter to measure."""
    return DAPO[0].jitters * DAPO[0].load().jitter()
