"""The command line: `megatron-dapo train CONFIG.yaml key=value ...`, `eval`, `plan`, and the commands beside runs.

Exit codes stand in `exit_codes.py`; `train` also leaves its own in `<trainer.default_local_dir>/exit_status`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from megatron_dapo import __version__
from megatron_dapo.checkpoint_commands import add_commands, run_command
from megatron_dapo.config.arithmetic import format_arithmetic, run_arithmetic
from megatron_dapo.config.check import check, check_files, planned_world_size
from megatron_dapo.config.load import LoadedConfig, load_config
from megatron_dapo.config.tree import ConfigError, RunConfig
from megatron_dapo.doctor.command import add_doctor
from megatron_dapo.exit_codes import DONE, FAILED, FILE, INTERRUPTED, REQUEUE, USAGE_ERROR, write_exit_status
from megatron_dapo.plan import options


def run() -> None:
    """The entry point of the `megatron-dapo` command."""
    sys.exit(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the arguments say; returns the exit code."""
    arguments, rest = _parser().parse_known_args(argv)
    if arguments.plain is not None:
        return run_command(arguments.plain, arguments) if not rest else _complain(f"unknown argument {rest[0]}")
    words = [*arguments.words, *rest]  # argparse leaves words behind that stand after an option
    if wrong := [word for word in words if word.startswith("-")]:
        return _complain(f"unknown option {wrong[0]}; settings are written key=value (see megatron-dapo --help)")
    files = [word for word in words if "=" not in word]
    if len(files) > 1:
        return _complain(f"one configuration file is wanted, {len(files)} are named: {', '.join(files)}")
    try:
        loaded = load_config(files[0] if files else None, [word for word in words if "=" in word])
        loaded = replace(loaded, config=_at_ray_address(loaded.config))
        console = Console()
        for notice in loaded.notices if _rank() == 0 else ():
            console.print(str(notice), markup=False, highlight=False)
        return arguments.command(loaded, console, arguments)
    except ConfigError as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        if _rank() == 0:
            print("stopped by Ctrl-C", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron-dapo", description="DAPO on Megatron-Core")
    parser.add_argument("--version", action="version", version=__version__)
    parser.set_defaults(plain=None)  # a command that takes no configuration
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_commands(commands)
    add_doctor(commands)
    for name, command, meaning in (
        ("train", _train, "train a policy with DAPO"),
        ("eval", _evaluate, "evaluate the model at actor_rollout_ref.model.path on data.val_files"),
        ("plan", _plan, "say whether a run fits into GPUs that need not be there, and how long a step takes"),
    ):
        sub = commands.add_parser(name, help=meaning, description=meaning)
        sub.add_argument(
            "words",
            nargs="*",
            metavar="[CONFIG.yaml] key=value",
            help="a YAML file, and settings that replace the file's",
        )
        sub.set_defaults(command=command)
        if name == "plan":
            options.add_options(sub)
        if name == "train":
            sub.add_argument(
                "--dry-run",
                dest="command",
                action="store_const",
                const=_dry_run,
                help="print the arithmetic of the run (prompts, sequences, mini-batches, updates, tokens) and stop",
            )
    return parser


def _at_ray_address(config: RunConfig) -> RunConfig:
    """With the cluster's address from where `ray job submit` and Ray's users put it."""
    address = config.runtime.address or os.environ.get("RAY_ADDRESS")
    return replace(config, runtime=replace(config.runtime, address=address or None))


def _train(loaded: LoadedConfig, console: Console, _: argparse.Namespace) -> int:
    check(loaded.config, _ranks(loaded.config))
    check_files(loaded.config)
    from megatron_dapo import launch  # imports Megatron: seconds that a wrong key need not wait for

    with _exit_status(Path(loaded.config.trainer.default_local_dir)) as left:
        left.code = _stopped(launch.train, loaded.config, console)
    return left.code


def _evaluate(loaded: LoadedConfig, console: Console, _: argparse.Namespace) -> int:
    _ranks(loaded.config)
    check_files(loaded.config)
    from megatron_dapo import launch

    return _stopped(launch.evaluate, loaded.config, console)


def _dry_run(loaded: LoadedConfig, console: Console, _: argparse.Namespace) -> int:
    """The datasets are counted where they are there."""
    config = loaded.config
    world_size = planned_world_size(config) or _world_size()
    check(config, world_size)
    sizes: tuple[int | None, int | None] = None, None
    if all(Path(path).exists() for path in (config.actor_rollout_ref.model.path, *config.data.train_files)):
        from megatron_dapo.assembly import load_datasets, load_tokenizer

        datasets = load_datasets(config, load_tokenizer(config))
        sizes = len(datasets.train), None if datasets.val is None else len(datasets.val)
    text = format_arithmetic(run_arithmetic(config, world_size, *sizes))
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    return 0


def _plan(loaded: LoadedConfig, console: Console, arguments: argparse.Namespace) -> int:
    from megatron_dapo.plan.command import run_plan

    return run_plan(loaded, console, arguments)


def _stopped(action: Callable[[RunConfig, Console], None], config: RunConfig, console: Console) -> int:
    """Run `action`; an error that a user can act on ends it with its message alone."""
    from megatron_dapo.launch import ENDINGS

    try:
        action(config, console)
    except ENDINGS as error:
        return _complain(f"{type(error).__name__}: {error}", FAILED)
    return DONE


@dataclass
class _Left:
    code: int


@contextmanager
def _exit_status(directory: Path) -> Iterator[_Left]:
    """Leave the exit code of what runs inside in `directory`/exit_status: torchrun answers 1 whatever it was."""
    left = _Left(FAILED)
    if _rank() == 0:
        (directory / FILE).unlink(missing_ok=True)  # a killed process leaves none
    try:
        yield left
    except KeyboardInterrupt:
        left.code = INTERRUPTED
        raise
    except ConfigError:
        left.code = USAGE_ERROR
        raise
    except SystemExit as ending:
        left.code = REQUEUE if ending.code == REQUEUE else FAILED
        raise
    finally:
        if _rank() == 0:
            write_exit_status(directory, left.code)


def _complain(message: str, code: int = USAGE_ERROR) -> int:
    if _rank() == 0:
        print(f"megatron-dapo: {message}", file=sys.stderr)
    return code


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def _ranks(config: RunConfig) -> int:
    """Those that a run has: Ray starts them as configured; others are there already.

    Raises:
        ConfigError: Ray is asked for by a process that torchrun started.
    """
    if config.runtime.name != "ray":
        return _world_size()
    if _world_size() > 1:
        raise ConfigError(
            f"runtime.name is ray and torchrun started {_world_size()} processes: Ray starts the ranks itself; start "
            "one process, with trainer.n_gpus_per_node and trainer.nnodes for the number of ranks"
        )
    return planned_world_size(config) or 1
