"""CPU-seconds of a training step here and in TRL's GRPOTrainer(loss_type="dapo"), and to a greedy accuracy.

    python benchmarks/step_vs_trl.py --json step_vs_trl.json
    python benchmarks/step_vs_trl.py --inputs runs/arithmetic      # what `make train` left there

Both sides train the arithmetic example's model on its prompts: the same batch, lengths, sampling, reward, optimizer
and number of updates a rollout, one thread each, every run in a process of its own, in turns. CPU time is read from
outside at the end of each step, descendants included (`support/cpu_meter.py`); set-up and the first steps are left out.

A step: without dynamic sampling, which TRL has not, and at a learning rate that leaves the policy where it is, so
that both write responses of the same lengths from the first step to the last.

To an accuracy: each trains as the example does, dynamic sampling included on our side, until greedy decoding gets
enough of the held-out problems right. Evaluating costs nothing: a step that ends with an evaluation counts as the
mean of those that do not.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from support.cpu_meter import cpu_at_lines

ROOT = Path(__file__).parents[1]
WARM_UP = 3  # steps
EVALUATE_EVERY = 2  # steps
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ROOT),
}
BATCH = ("data.train_batch_size=16", "data.gen_batch_size=16", "actor_rollout_ref.rollout.n=8")
QUIET = ("trainer.logger=[jsonl]", "trainer.log_samples=0", "trainer.save_freq=-1", "trainer.resume_mode=disable")


@dataclass(frozen=True)
class Run:
    """The lines that a side wrote, one a step, and the CPU seconds that it had used at each."""

    lines: list[dict[str, float]]
    cpu_seconds: list[float]

    def step_seconds(self) -> list[float]:
        """[steps - 1] of steps 2, 3, ...: the first reading includes the set-up."""
        return [after - before for before, after in zip(self.cpu_seconds, self.cpu_seconds[1:], strict=False)]


@dataclass(frozen=True)
class Side:
    """One of the two: its command, the file of its lines, and what it calls things."""

    name: str
    command: Callable[[Path], list[str]]  # folder of the run -> the command, but for CONFIG.yaml and overrides
    lines: str
    length: str
    greedy_accuracy: str  # a pattern

    def run(self, folder: Path, words: Sequence[str], enough: float = 2.0) -> Run:
        """Run with `words`, CONFIG.yaml and overrides, to the end, or until a greedy accuracy is `enough`."""
        folder.mkdir(parents=True)
        lines = folder / self.lines
        readings = cpu_at_lines(
            [*self.command(folder), *words],
            lines,
            ENVIRONMENT,
            folder / "output.log",
            lambda line: self._is_enough(json.loads(line), enough),
        )
        print(
            f"{folder.name}: {len(readings)} steps, {readings[-1]:.0f} CPU-s with set-up", file=sys.stderr, flush=True
        )
        return Run([json.loads(line) for line in lines.read_text().splitlines()[: len(readings)]], readings)

    def _is_enough(self, line: dict[str, float], enough: float) -> bool:
        """Not at the first evaluation: before it, no step but the first is without one, and that has the set-up."""
        return line["step"] > EVALUATE_EVERY and (self.accuracy(line) or 0.0) >= enough

    def accuracy(self, line: dict[str, float]) -> float | None:
        """The greedy accuracy, where the step ended with an evaluation."""
        return next((value for key, value in line.items() if re.fullmatch(self.greedy_accuracy, key)), None)


SIDES = (
    Side(
        name="megatron_dapo",
        command=lambda folder: [sys.executable, "-m", "megatron_dapo", "train", f"trainer.default_local_dir={folder}"],
        lines="metrics.jsonl",
        length="response/length_mean",
        greedy_accuracy=r"val/[^/]+/avg@1",
    ),
    Side(
        name="trl",
        command=lambda folder: [sys.executable, f"{ROOT}/benchmarks/support/trl_side.py", f"{folder}/rollouts.jsonl"],
        lines="rollouts.jsonl",
        length="response_length",
        greedy_accuracy="greedy_accuracy",
    ),
)


@dataclass(frozen=True)
class StepCost:
    side: str
    cpu_seconds: float  # a step: the median over the repetitions of each one's median
    lowest: float  # of the repetitions
    highest: float
    response_length: float  # tokens, the mean over all measured steps
    steps: int  # measured


@dataclass(frozen=True)
class AccuracyCost:
    """Medians over the repetitions; None where half of them or more did not get there."""

    side: str
    steps: float | None
    cpu_seconds: float | None
    lowest: float | None  # CPU seconds of the repetitions
    highest: float | None  # None also where one did not get there
    best: float  # the highest accuracy seen


def make_inputs(folder: Path) -> Path:
    """The example's base model and problems, made in `folder`: some minutes."""
    folder.mkdir()
    print("warming up the example's base model", file=sys.stderr)
    make = [sys.executable, f"{ROOT}/benchmarks/support/arithmetic_inputs.py", str(folder)]
    subprocess.run(make, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    return folder


def example_run(inputs: Path) -> list[str]:
    """CONFIG.yaml and overrides of the arithmetic example with the model and problems in `inputs`."""
    return [
        f"{ROOT}/examples/arithmetic/config.yaml",
        f"actor_rollout_ref.model.path={inputs / 'base'}",
        f"data.train_files=[{inputs / 'train.jsonl'}]",
        f"data.val_files=[{inputs / 'test.jsonl'}]",
        *BATCH,
        *QUIET,
    ]


def step_costs(folder: Path, run: Sequence[str], repetitions: int, steps: int) -> list[StepCost]:
    """The sides in turns, the first one changing, `repetitions` times; `steps` measured steps each time."""
    settings = [
        *run,
        "algorithm.filter_groups.enable=false",
        "actor_rollout_ref.actor.optim.lr=1e-7",
        "trainer.test_freq=-1",
        "trainer.val_before_train=false",
        f"trainer.total_training_steps={WARM_UP + steps}",
    ]
    runs: dict[str, list[Run]] = {side.name: [] for side in SIDES}
    for repetition in range(repetitions):
        for side in SIDES if repetition % 2 == 0 else reversed(SIDES):
            words = [*settings, f"data.seed={repetition}"]
            runs[side.name].append(side.run(folder / f"step-{repetition}-{side.name}", words))
    return [_step_cost(side, runs[side.name]) for side in SIDES]


def _step_cost(side: Side, runs: Sequence[Run]) -> StepCost:
    medians = [statistics.median(run.step_seconds()[WARM_UP - 1 :]) for run in runs]
    lengths = [line[side.length] for run in runs for line in run.lines[WARM_UP:]]
    return StepCost(
        side=side.name,
        cpu_seconds=statistics.median(medians),
        lowest=min(medians),
        highest=max(medians),
        response_length=statistics.mean(lengths),
        steps=len(lengths),
    )


def accuracy_costs(
    folder: Path, run: Sequence[str], repetitions: int, enough: float, most_steps: int
) -> list[AccuracyCost]:
    """The sides in turns, `repetitions` times, each until a greedy accuracy of `enough` or for `most_steps`."""
    settings = [
        *run,
        f"trainer.test_freq={EVALUATE_EVERY}",
        "trainer.val_before_train=false",
        "actor_rollout_ref.rollout.val_kwargs.do_sample=false",
        "actor_rollout_ref.rollout.val_kwargs.n=1",
        f"trainer.total_training_steps={most_steps}",
    ]
    runs: dict[str, list[Run]] = {side.name: [] for side in SIDES}
    for repetition in range(repetitions):
        for side in SIDES if repetition % 2 == 0 else reversed(SIDES):
            words = [*settings, f"data.seed={repetition}"]
            runs[side.name].append(side.run(folder / f"accuracy-{repetition}-{side.name}", words, enough))
    return [_accuracy_cost(side, runs[side.name], enough) for side in SIDES]


def _accuracy_cost(side: Side, runs: Sequence[Run], enough: float) -> AccuracyCost:
    steps, seconds, best = [], [], 0.0
    for run in runs:
        accuracies = [side.accuracy(line) for line in run.lines]
        best = max([best, *(value for value in accuracies if value is not None)])
        reached = next((step for step, value in enumerate(accuracies, 1) if value and value >= enough), math.inf)
        plain = [s for s, value in zip(run.step_seconds(), accuracies[1:], strict=True) if value is None]
        steps.append(reached)
        seconds.append(reached * statistics.mean(plain))
    return AccuracyCost(
        side=side.name,
        steps=_finite(statistics.median(steps)),
        cpu_seconds=_finite(statistics.median(seconds)),
        lowest=_finite(min(seconds)),
        highest=_finite(max(seconds)),
        best=best,
    )


def _finite(value: float) -> float | None:
    return value if value < math.inf else None


def step_table(costs: Sequence[StepCost]) -> Table:
    table = Table(title="one step: 16 prompts × 8 responses", title_justify="left")
    for name in ("side", "CPU-s", "lowest", "highest", "response tokens", "steps", "against trl"):
        table.add_column(name, justify="left" if name == "side" else "right", no_wrap=True)
    trl = next(cost.cpu_seconds for cost in costs if cost.side == "trl")
    for cost in costs:
        numbers = (cost.cpu_seconds, cost.lowest, cost.highest, cost.response_length)
        ratio = f"1/{trl / cost.cpu_seconds:.2f}"
        table.add_row(cost.side, *(f"{number:.2f}" for number in numbers), str(cost.steps), ratio)
    return table


def accuracy_table(costs: Sequence[AccuracyCost], enough: float) -> Table:
    table = Table(title=f"to a greedy accuracy of {enough:.0%}", title_justify="left")
    for name in ("side", "steps", "CPU-s", "lowest", "highest", "best accuracy"):
        table.add_column(name, justify="left" if name == "side" else "right", no_wrap=True)
    for cost in costs:
        numbers = (cost.steps, cost.cpu_seconds, cost.lowest, cost.highest)
        shown = ("not reached" if value is None else f"{value:.1f}" for value in numbers)
        table.add_row(cost.side, *shown, f"{cost.best:.1%}")
    return table


def main() -> None:
    arguments = _arguments()
    console = Console(width=100)
    found: dict[str, list[StepCost] | list[AccuracyCost]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = example_run(arguments.inputs or make_inputs(folder / "inputs"))
        if arguments.only != "accuracy":
            found["step"] = costs = step_costs(folder, run, arguments.repetitions, arguments.steps)
            console.print(step_table(costs))
        if arguments.only != "step":
            found["accuracy"] = reached = accuracy_costs(
                folder, run, arguments.repetitions, arguments.accuracy, arguments.most_steps
            )
            console.print(accuracy_table(reached, arguments.accuracy))
    if arguments.json:
        numbers = {figure: [asdict(cost) for cost in costs] for figure, costs in found.items()}
        arguments.json.write_text(json.dumps(numbers, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same numbers there")
    parser.add_argument(
        "--inputs", type=Path, metavar="FOLDER", help="with base/, train.jsonl, test.jsonl; made anew where not given"
    )
    parser.add_argument("--only", choices=("step", "accuracy"), help="one of the two figures")
    parser.add_argument("--repetitions", type=int, default=3, help="runs of each side")
    parser.add_argument("--steps", type=int, default=12, help="measured steps of a run")
    parser.add_argument("--accuracy", type=float, default=0.8, help="greedy accuracy to reach")
    parser.add_argument("--most-steps", type=int, default=150, help="steps after which it counts as not reached")
    return parser.parse_args()


if __name__ == "__main__":
    main()
