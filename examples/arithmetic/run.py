"""`make train`: base model, DAPO, and greedy accuracy before and after, by transformers on the exported checkpoint.

python examples/arithmetic/run.py [--seed N] [--out FOLDER] [--control shuffled-rewards|lr0] [key=value ...]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from base_model import WARMUP_STEPS, build_model, build_tokenizer, greedy_accuracy, save, warm_up
from problems import Problem, Split, split
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_dapo.cli import main as megatron_dapo
from megatron_dapo.obs.curve import draw_curve
from megatron_dapo.obs.summary import write_summary

HERE = Path(__file__).parent
CONTROLS = {
    "shuffled-rewards": [f"custom_reward_function.path={HERE / 'shuffled_reward.py'}"],
    "lr0": ["actor_rollout_ref.actor.optim.lr=0"],
}


def main() -> int:
    arguments = _arguments()
    started, out, console = time.monotonic(), Path(arguments.out), Console()
    problems = split(arguments.seed)
    base = out / "base"
    for name, rows in (("train", problems.train), ("test", problems.test)):
        _write_rows(out / f"{name}.jsonl", rows)
    _build_base(base, problems, arguments, console)
    before = greedy_accuracy(base, problems.test)
    console.print(f"base model: {before:.1%} of {len(problems.test)} held-out problems right (greedy)")
    code = megatron_dapo(_command(arguments, base))
    if code:
        return code
    after = greedy_accuracy(out / "hf", problems.test)
    draw_curve(out / "metrics.jsonl", out / "curve.png")
    summary = json.loads((out / "summary.json").read_text())
    summary |= {
        "greedy_accuracy_before": before,
        "greedy_accuracy_after": after,
        "seconds": time.monotonic() - started,
        "control": arguments.control,
    }
    write_summary(out / "summary.json", summary)
    console.print(
        f"\ngreedy accuracy on {len(problems.test)} held-out problems: {before:.1%} before, {after:.1%} after "
        f"({summary['steps']} steps, {summary['seconds']:.0f} s)\n"
        f"{out}/: hf/ (the checkpoint), metrics.jsonl, samples.jsonl, curve.png, summary.json",
        highlight=False,
    )
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="of the base model, the training problems and the run")
    parser.add_argument("--out", default="runs/arithmetic", help="where everything goes")
    parser.add_argument("--warmup-steps", type=int, default=WARMUP_STEPS, help="fewer: a weaker base model, sooner")
    parser.add_argument("--control", choices=CONTROLS, help="train with a reward or a rate that can teach nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace config.yaml's")
    return parser.parse_args()


def _command(arguments: argparse.Namespace, base: Path) -> list[str]:
    out = Path(arguments.out)
    return [
        "train",
        str(HERE / "config.yaml"),
        f"actor_rollout_ref.model.path={base}",
        f"data.train_files=[{out / 'train.jsonl'}]",
        f"data.val_files=[{out / 'test.jsonl'}]",
        f"data.seed={arguments.seed}",
        f"trainer.default_local_dir={out}",
        *(CONTROLS[arguments.control] if arguments.control else ()),
        *arguments.overrides,
    ]


def _write_rows(path: Path, problems: tuple[Problem, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(problem.row(index)) + "\n" for index, problem in enumerate(problems)))


def _build_base(path: Path, problems: Split, arguments: argparse.Namespace, console: Console) -> None:
    seed, steps = arguments.seed, arguments.warmup_steps
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed)
    console.print(f"warming up a base model of {sum(p.numel() for p in model.parameters()):,} parameters")
    columns = (
        TextColumn("warm-up"),
        BarColumn(),
        TextColumn("step {task.completed}/{task.total}  loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=steps, loss=0.0)

        def report(step: int, loss: float) -> None:
            progress.update(task, completed=step, loss=loss)

        warm_up(model, tokenizer, problems, seed, report, steps)
    save(model, tokenizer, path)


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main())
