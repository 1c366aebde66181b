"""The three settings of DAPO on the small arithmetic example over eight seeds: docs/study_arithmetic.md.

    nice python tools/study_arithmetic.py            # the study: runs what docs/study_arithmetic.jsonl has no line of
    nice python tools/study_arithmetic.py --longer   # its follow-up: docs/study_arithmetic_longer.jsonl
    python tools/study_arithmetic.py --tables        # the page's tables of what is there

One process at a time. A finished run is one line of the results; started again, it goes on behind the last one. What
is run and measured was declared before the first run and is not an option.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "arithmetic"))

from small import SETTINGS, words, write_base, write_problems  # noqa: E402

from megatron_dapo.obs.jsonl import read_metrics  # noqa: E402
from megatron_dapo.obs.summary import versions  # noqa: E402

EVALUATE_EVERY = 2
OVERRIDES = (
    f"trainer.test_freq={EVALUATE_EVERY}",
    "trainer.log_samples=0",
    "actor_rollout_ref.actor.optim.lr=5e-5",
)
THRESHOLDS = (0.6, 0.9)  # greedy accuracy; the second one is the study's question
ACCURACY = "val/arithmetic/avg@1"
T_95 = 2.365  # Student's t for eight values: 7 degrees of freedom, 95 %, two-sided


@dataclass(frozen=True)
class Study:
    seeds: tuple[int, ...]
    steps: int
    results: Path


FIRST = Study((11, 12, 13, 14, 15, 16, 17, 18), 40, ROOT / "docs" / "study_arithmetic.jsonl")
LONGER = Study((14, 15, 16, 18), 100, ROOT / "docs" / "study_arithmetic_longer.jsonl")  # none got to 90 % in 40 steps


@dataclass(frozen=True)
class Outcome:
    """One finished run. Lists are over its evaluations, from the one before training on."""

    setting: str
    seed: int
    steps: list[int]
    accuracy: list[float]  # greedy, of 512 held-out problems
    responses: list[int]  # written for training until then, those of dropped groups too
    entropy: float  # nats a token in the last step
    cpu_seconds: float
    commit: str
    versions: dict[str, str | None]

    def first_at(self, threshold: float) -> int | None:
        """The place of the first evaluation at or above it; None: there is none."""
        return next((place for place, value in enumerate(self.accuracy) if value >= threshold), None)


@dataclass(frozen=True)
class Measure:
    """One number of a run, with a name for the table."""

    name: str
    of: Callable[[Outcome], float]


def _steps_to(threshold: float) -> Callable[[Outcome], float]:
    """Never reached counts as one evaluation after the last: too small, so the page names such runs."""

    def measure(outcome: Outcome) -> float:
        place = outcome.first_at(threshold)
        return outcome.steps[-1] + EVALUATE_EVERY if place is None else outcome.steps[place]

    return measure


def _responses_to(threshold: float) -> Callable[[Outcome], float]:
    def measure(outcome: Outcome) -> float:
        place = outcome.first_at(threshold)
        return outcome.responses[-1 if place is None else place]

    return measure


TO_THE_LAST = (
    Measure(f"steps to {THRESHOLDS[-1]:.0%}", _steps_to(THRESHOLDS[-1])),
    Measure(f"responses written to {THRESHOLDS[-1]:.0%}", _responses_to(THRESHOLDS[-1])),
)
MEASURES = (
    Measure(f"steps to {THRESHOLDS[0]:.0%}", _steps_to(THRESHOLDS[0])),
    *TO_THE_LAST,
    Measure("mean accuracy over the run, %", lambda outcome: 100 * statistics.mean(outcome.accuracy)),
    Measure("accuracy at the end, %", lambda outcome: 100 * outcome.accuracy[-1]),
)


def run_study(study: Study, folder: Path) -> None:
    """Every run that the results have no line of, seed by seed, the three settings of a seed one after another."""
    done = {(outcome.setting, outcome.seed) for outcome in read_outcomes(study.results)}
    for seed in study.seeds:
        for setting in SETTINGS:
            if (setting, seed) in done:
                continue
            inputs = folder / f"inputs-{seed}"
            if not (inputs / "base" / "model.safetensors").exists():
                write_base(inputs / "base", write_problems(inputs, seed), seed)
            outcome = _run(inputs, folder / f"{setting}-{seed}-{study.steps}", setting, seed, study.steps)
            with study.results.open("a") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")
            print(f"{time.strftime('%H:%M:%S')} {setting} {seed}: {outcome.accuracy[-1]:.1%}", flush=True)


def _run(inputs: Path, out: Path, setting: str, seed: int, steps: int) -> Outcome:
    before = os.times()
    command = [
        sys.executable,
        "-m",
        "megatron_dapo",
        "train",
        *words(inputs / "base", inputs, out, setting, seed),
        *OVERRIDES,
    ]
    command.append(f"trainer.total_training_steps={steps}")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    records = read_metrics(out / "metrics.jsonl")
    evaluated = [(place, record) for place, record in enumerate(records) if ACCURACY in record]
    return Outcome(
        setting=setting,
        seed=seed,
        steps=[int(record["step"]) for _, record in evaluated],
        accuracy=[record[ACCURACY] for _, record in evaluated],
        responses=[
            int(sum(each.get("sampling/samples_scored", 0) for each in records[: place + 1])) for place, _ in evaluated
        ],
        entropy=records[-1]["actor/entropy"],
        cpu_seconds=after.children_user - before.children_user + after.children_system - before.children_system,
        commit=_commit(),
        versions=versions(),
    )


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def read_outcomes(path: Path) -> list[Outcome]:
    """All lines, in order; none where there is no file."""
    return [Outcome(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def tables(first: Sequence[Outcome], longer: Sequence[Outcome]) -> str:
    """Markdown: every run; each measure's means, and the settings' differences; then the same with the longer runs."""
    replaced = {(outcome.setting, outcome.seed) for outcome in longer}
    merged = [outcome for outcome in first if (outcome.setting, outcome.seed) not in replaced] + list(longer)
    parts = [_every_run(first, MEASURES), _means(first, MEASURES), _differences(first, MEASURES)]
    if longer:
        parts += [_every_run(longer, TO_THE_LAST), _means(merged, TO_THE_LAST), _differences(merged, TO_THE_LAST)]
    return "\n\n".join(parts)


def _every_run(outcomes: Sequence[Outcome], measures: Sequence[Measure]) -> str:
    order = list(SETTINGS)
    rows = [
        [str(outcome.seed), outcome.setting, *(_shown(measure.of(outcome)) for measure in measures)]
        for outcome in sorted(outcomes, key=lambda outcome: (outcome.seed, order.index(outcome.setting)))
    ]
    return _table(["seed", "setting", *(measure.name for measure in measures)], rows)


def _means(outcomes: Sequence[Outcome], measures: Sequence[Measure]) -> str:
    rows = []
    for setting in SETTINGS:
        of_setting = [outcome for outcome in outcomes if outcome.setting == setting]
        values = [[measure.of(outcome) for outcome in of_setting] for measure in measures]
        rows.append([setting, str(len(of_setting)), *(_interval(each) for each in values)])
    return _table(["setting", "runs", *(measure.name for measure in measures)], rows)


def _differences(outcomes: Sequence[Outcome], measures: Sequence[Measure]) -> str:
    """Over pairs of runs with one seed, and so with one base model and one order of prompts."""
    found = {(outcome.setting, outcome.seed): outcome for outcome in outcomes}
    full, without, early = SETTINGS
    rows = []
    for one, other in ((full, without), (without, early), (full, early)):
        pairs = [
            (found[one, seed], found[other, seed])
            for seed in FIRST.seeds
            if (one, seed) in found and (other, seed) in found
        ]
        values = [[measure.of(a) - measure.of(b) for a, b in pairs] for measure in measures]
        rows.append([f"{one} less {other}", str(len(pairs)), *(_interval(each) for each in values)])
    return _table(["difference", "pairs", *(measure.name for measure in measures)], rows)


def _interval(values: Sequence[float]) -> str:
    """Mean and 95 % interval by Student's t, where all eight are there."""
    if len(values) != len(FIRST.seeds):
        return f"{_shown(statistics.mean(values))} (no interval)" if values else "no run"
    half = T_95 * statistics.stdev(values) / math.sqrt(len(values))
    return f"{_shown(statistics.mean(values))} ± {_shown(half)}"


def _shown(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.1f}".removesuffix(".0")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "study", help="for base models and runs")
    parser.add_argument("--longer", action="store_true", help="run the follow-up, not the study")
    parser.add_argument("--tables", action="store_true", help="run nothing, print the tables")
    arguments = parser.parse_args()
    if arguments.tables:
        print(tables(read_outcomes(FIRST.results), read_outcomes(LONGER.results)))
    else:
        run_study(LONGER if arguments.longer else FIRST, arguments.folder)


if __name__ == "__main__":
    main()
