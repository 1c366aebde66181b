"""A run in processes forked from one that has imported everything: a start takes a second, not ten.

It is forked from a server of its own, never from the process of the tests: that may have run gloo before, whose threads
a fork loses and whose state it keeps, so that the child would wait for ever.

The ranks of a run over several are forked from a process of their own (`forked_ranks.py`).

A process may be told to die, or to be signalled, at a moment of the package's own code: the function at that moment is
wrapped in that process alone.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import multiprocess  # as multiprocessing, but what it sends may hold modules and functions of tests
from torch.multiprocessing.spawn import ProcessException

from megatron_dapo.cli import main
from tests.functional.forked_ranks import run_ranks

PATIENCE = 400  # seconds: a run takes a few, a busy machine makes them many
_SERVER = multiprocess.get_context("forkserver")
_SERVER.set_forkserver_preload(["megatron_dapo.cli", "megatron_dapo.launch"])


@dataclass(frozen=True)
class Moment:
    """Before (or after) the `count`-th call of `owner.name`, the process that calls it gets `number`."""

    owner: Any
    name: str
    count: int
    number: signal.Signals = signal.SIGKILL
    after: bool = False

    def install(self) -> None:
        real, calls, run = getattr(self.owner, self.name), iter(range(1, 1_000_000)), os.getpid()

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            now = next(calls) == self.count
            if now and not self.after:
                os.kill(run, self.number)
            result = real(*args, **kwargs)
            if now and self.after:
                os.kill(run, self.number)
            return result

        setattr(self.owner, self.name, wrapped)


@dataclass(frozen=True)
class Ended:
    """`code` is negative for a signal. `said` is standard output and error."""

    code: int
    said: str


def run(
    config: Path,
    out: Path,
    *overrides: str,
    prepare: Callable[[], None] = lambda: None,
    killed_after: float | None = None,  # seconds
    ranks: int = 1,
) -> Ended:
    """A whole run, or what is left of it; `prepare` is called in each rank's process first."""
    out.mkdir(parents=True, exist_ok=True)
    log = out.with_name(out.name + ".log")
    words = ["train", str(config), f"trainer.default_local_dir={out}", *overrides]
    child = _SERVER.Process(target=_child, args=(log, partial(_launch, ranks) if ranks > 1 else _rank, prepare, words))
    child.start()
    return Ended(_wait(child, killed_after), log.read_text())


def on_rank(rank: int, prepare: Callable[[], None]) -> None:
    """`prepare` where the process is that rank's."""
    if os.environ["RANK"] == str(rank):
        prepare()


def _child(log: Path, start: Callable[..., int], prepare: Callable[[], None], words: list[str]) -> None:
    code = 99
    try:
        _redirect(log)
        faulthandler.dump_traceback_later(PATIENCE - 10)
        code = start(prepare, words)
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 98
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _rank(prepare: Callable[[], None], words: list[str]) -> int:
    prepare()
    return main(words)


def _launch(ranks: int, prepare: Callable[[], None], words: list[str]) -> int:
    try:
        run_ranks(ranks, _launched, prepare, words)
    except ProcessException as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _launched(prepare: Callable[[], None], words: list[str]) -> None:
    if code := _rank(prepare, words):
        sys.exit(code)


def _redirect(log: Path) -> None:
    file = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    for standard in (1, 2):
        os.dup2(file, standard)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)


def _wait(child: Any, killed_after: float | None) -> int:
    begun, killed = time.monotonic(), False
    while (waited := time.monotonic() - begun) < PATIENCE:
        if killed_after is not None and waited > killed_after and not killed:
            child.kill()
            killed = True
        child.join(0.02)
        if child.exitcode is not None:
            return child.exitcode
    child.kill()
    child.join()
    raise TimeoutError(f"the run did not end within {PATIENCE} s")
