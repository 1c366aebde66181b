"""The commands around checkpoints: `megatron-dapo export`, `checkpoint ls|show|verify`, and those of `tools/`.

Exit codes: 0 done, 1 a checkpoint that is damaged, of another model or refused, 2 a command that cannot be.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_dapo.config.tree import ConfigError
from megatron_dapo.inspection import list_checkpoints, show_checkpoint, verify_checkpoint
from megatron_dapo.manifest import find_checkpoint
from megatron_dapo.types import CheckpointError

Command = Callable[[argparse.Namespace, Console], int]
_DONE, _FAILED, _USAGE_ERROR = 0, 1, 2
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def add_commands(commands: Any) -> None:
    """Add `export` and `checkpoint` to the subcommands of `megatron-dapo`."""
    meaning = "write the model of a run or of a checkpoint as a Hugging Face checkpoint"
    export = commands.add_parser("export", help=meaning, description=meaning)
    export_arguments(export)
    meaning = "list, show or verify checkpoints"
    inspect = commands.add_parser("checkpoint", help=meaning, description=meaning)
    kinds = inspect.add_subparsers(required=True, metavar="ls|show|verify")
    for name, command, meaning in (
        ("ls", _list, "the checkpoints of a run: step, layout, size"),
        ("show", _show, "what one checkpoint holds: step, layout, model, versions, tensors"),
        ("verify", _verify, "read all files and compare them with their checksums; exit 1 if one is not as written"),
    ):
        sub = kinds.add_parser(name, help=meaning, description=meaning)
        sub.add_argument("path", type=Path, help="a run's folder (its latest checkpoint), or a checkpoint")
        sub.set_defaults(plain=command)


def export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="a run's folder (its latest checkpoint), or a checkpoint")
    _output_arguments(parser, "the folder to write, which must not be there yet")
    parser.add_argument(
        "--model", type=Path, help="the Hugging Face folder with config and tokenizer (default: its own)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as it is stored")
    parser.set_defaults(plain=_export)


def import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="the folder of a Hugging Face checkpoint")
    _output_arguments(parser, "the folder to write, which must not be there yet")
    parser.set_defaults(plain=_import)


def run_tool(describe: str, add_arguments: Callable[[argparse.ArgumentParser], None]) -> int:
    """The whole of a program with one command."""
    parser = argparse.ArgumentParser(description=describe)
    add_arguments(parser)
    arguments = parser.parse_args()
    return run_command(arguments.plain, arguments)


def run_command(command: Command, arguments: argparse.Namespace) -> int:
    """Run it; an error that a user can act on ends it with its message alone."""
    try:
        return command(arguments, Console())
    except (CheckpointError, ConfigError, OSError) as error:
        named = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
        print(f"megatron-dapo: {named}{error}", file=sys.stderr)
        return _USAGE_ERROR if isinstance(error, ConfigError) else _FAILED


def _output_arguments(parser: argparse.ArgumentParser, meaning: str) -> None:
    parser.add_argument("out", type=Path, help=meaning)
    parser.add_argument(
        "--max-shard-size", type=_bytes, default="5GB", metavar="SIZE", help="of a file, as 5GB or 500MB (default: 5GB)"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare all weights, and the logits of a probe prompt in Megatron and in transformers; if they differ "
        "nothing is left at OUT. Needs 4 bytes a parameter",
    )


def _export(arguments: argparse.Namespace, console: Console) -> int:
    stored = find_checkpoint(arguments.checkpoint)
    from megatron_dapo.conversion import DTYPES, Conversion, megatron_to_hf  # torch: seconds

    dtype = None if arguments.dtype is None else DTYPES[arguments.dtype]
    with _progress(console) as progress:
        how = Conversion(arguments.max_shard_size, arguments.verify, progress)
        megatron_to_hf(stored, arguments.out, how, arguments.model, dtype)
    _say(console, f"{stored.root} is at {arguments.out} for Hugging Face{_proven(arguments.verify)}")
    return _DONE


def _import(arguments: argparse.Namespace, console: Console) -> int:
    from megatron_dapo.conversion import Conversion, hf_to_megatron

    with _progress(console) as progress:
        hf_to_megatron(
            arguments.source, arguments.out, Conversion(arguments.max_shard_size, arguments.verify, progress)
        )
    _say(console, f"{arguments.source} is at {arguments.out} for Megatron{_proven(arguments.verify)}")
    return _DONE


def _list(arguments: argparse.Namespace, console: Console) -> int:
    console.print(list_checkpoints(arguments.path))
    return _DONE


def _show(arguments: argparse.Namespace, console: Console) -> int:
    for table in show_checkpoint(arguments.path):
        console.print(table)
    return _DONE


def _verify(arguments: argparse.Namespace, console: Console) -> int:
    root = find_checkpoint(arguments.path).root
    with _progress(console) as progress:
        faults = list(verify_checkpoint(arguments.path, lambda count, total: progress("checking", count, total)))
    for fault in faults:
        print(f"{root / fault.file} {fault.what}", file=sys.stderr)
    _say(console, f"{root}: {'all files are as they were written' if not faults else f'{len(faults)} faults'}")
    return _FAILED if faults else _DONE


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each phase, in bytes."""
    columns = (TextColumn("{task.description:<10}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bars:
        tasks: dict[str, Any] = {}

        def advance(what: str, count: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.advance(tasks[what], count)

        yield advance


def _proven(verified: bool) -> str:
    return "; weights and logits are the same" if verified else ""


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?B|)", text.strip().upper())
    if match is None or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write for example 5GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2]])
