"""Training and evaluation files in the recipe's schema, from the hub or from local files; and what is in them.

    python tools/prepare_dapo_data.py dapo-math-17k --train data/dapo-math-17k.parquet
    python tools/prepare_dapo_data.py aime-2024 --train data/aime-2024.parquet
    python tools/prepare_dapo_data.py problems.jsonl --problem-key problem --answer-key answer   # counts alone
    python tools/prepare_dapo_data.py rows.parquet --tokenizer models/Qwen2.5-32B --max-prompt-tokens 2048 \\
        --deduplicate --train train.parquet --validation-share 0.05 --validation validation.parquet

Downloads follow HF_ENDPOINT (a mirror), HF_HOME (the cache), HF_TOKEN and HF_HUB_OFFLINE. docs/data.md says more.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_dapo.data.files import PromptDataError
from megatron_dapo.data.prepare.hub import KNOWN, DownloadError, Fetched, HubPlace, fetch
from megatron_dapo.data.prepare.pipeline import Preparation, PreparationReport, prepare
from megatron_dapo.data.prepare.rows import ProblemColumns, RowFiles
from megatron_dapo.exit_codes import DONE, FAILED, USAGE_ERROR


def main() -> int:
    arguments = _parser().parse_args()
    console = Console(stderr=True)
    try:
        return _run(arguments, console)
    except PromptDataError as error:
        return _complain(str(error), USAGE_ERROR)
    except DownloadError as error:
        return _complain(str(error), FAILED)


def _run(arguments: argparse.Namespace, console: Console) -> int:
    plan = Preparation(
        train=arguments.train,
        validation=arguments.validation,
        deduplicate=arguments.deduplicate,
        max_prompt_tokens=arguments.max_prompt_tokens,
        validation_share=arguments.validation_share,
        seed=arguments.seed,
    )
    there = [path for path in (plan.train, plan.validation) if path is not None and path.exists()]
    if there and not arguments.overwrite:
        names = ", ".join(map(str, there))
        return _complain(f"{names} is there already; choose another name, or --overwrite", USAGE_ERROR)
    place = HubPlace(arguments.endpoint, arguments.cache, arguments.offline, arguments.revision)
    fetched = {
        name: fetch(KNOWN[name], place, say=lambda text: console.print(text, markup=False, highlight=False))
        for name in arguments.sources
        if name in KNOWN
    }
    for name, found in fetched.items():
        console.print(f"{name}: {found}", markup=False, highlight=False, soft_wrap=True)
    files = RowFiles(
        [fetched[name].path if name in fetched else name for name in arguments.sources], _columns(arguments)
    )
    report = _prepare(files, plan, arguments.tokenizer, console)
    print(report)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(_record(report, fetched), indent=2) + "\n")
    return DONE


def _prepare(files: RowFiles, plan: Preparation, tokenizer_path: str | None, console: Console) -> PreparationReport:
    tokenizer = None
    if tokenizer_path is not None:
        from transformers import AutoTokenizer  # seconds that counting alone need not wait for

        tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    columns = (
        TextColumn("rows"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("rows", total=files.num_rows)
        return prepare(files, plan, tokenizer, lambda rows: progress.advance(task, rows))


def _columns(arguments: argparse.Namespace) -> ProblemColumns | None:
    """None where rows are in the recipe's schema already."""
    if arguments.problem_key is None and arguments.answer_key is None:
        return None
    return ProblemColumns(
        problem=arguments.problem_key or "problem",
        answer=arguments.answer_key or "answer",
        source=arguments.source_key,
        data_source=arguments.data_source,
    )


def _record(report: PreparationReport, fetched: dict[str, Fetched]) -> dict[str, Any]:
    from_hub = {
        name: {"commit": found.commit, "checksum": found.checksum, "verified": found.verified}
        for name, found in fetched.items()
    }
    return asdict(report) | {"from_hub": from_hub}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", help=f"{', '.join(KNOWN)}, or .parquet and .jsonl files")
    writing = parser.add_argument_group("what is written; nothing without --train")
    writing.add_argument("--train", type=Path, metavar="FILE.parquet")
    writing.add_argument("--validation", type=Path, metavar="FILE.parquet")
    writing.add_argument("--validation-share", type=float, default=0.0, help="of the distinct prompts")
    writing.add_argument("--seed", type=int, default=0, help="of the split")
    writing.add_argument("--deduplicate", action="store_true", help="one row a prompt")
    writing.add_argument("--max-prompt-tokens", type=int, metavar="N", help="longer prompts are left out")
    writing.add_argument("--overwrite", action="store_true", help="files that are there already")
    writing.add_argument("--json", type=Path, metavar="FILE", help="the report, with the hub's commits and checksums")
    reading = parser.add_argument_group("reading")
    reading.add_argument(
        "--tokenizer", metavar="MODEL", help="whose tokens are counted: a folder, or a name of the hub"
    )
    reading.add_argument("--problem-key", help="rows are plain problems: their column (problem); the prompt is made")
    reading.add_argument("--answer-key", help="likewise (answer)")
    reading.add_argument("--source-key", help="likewise; without it all rows are of --data-source")
    reading.add_argument("--data-source", default="math_dapo", help="(%(default)s)")
    hub = parser.add_argument_group("the hub")
    hub.add_argument("--endpoint", help="of a mirror; HF_ENDPOINT if absent")
    hub.add_argument("--cache", type=Path, metavar="FOLDER", help="below HF_HOME if absent")
    hub.add_argument("--revision", default="main", help="a branch or commit (%(default)s)")
    hub.add_argument("--offline", action="store_true", help="the cache alone")
    return parser


def _complain(message: str, code: int) -> int:
    print(f"prepare_dapo_data: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
