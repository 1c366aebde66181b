"""A run in a process forked from this one, which has imported everything: a start takes a second, not ten.

The child may be told to die, or to be signalled, at a moment of the package's own code: the function at that moment is
wrapped in the child alone.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dapo import launch  # noqa: F401  (imported for the children)
from megatron_dapo.cli import main

PATIENCE = 60  # seconds


@dataclass(frozen=True)
class Moment:
    """Before (or after) the `count`-th call of `owner.name`, the run's own process gets `number`."""

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
) -> Ended:
    """A whole run, or what is left of it; `prepare` is called in the child first."""
    out.mkdir(parents=True, exist_ok=True)
    log = out.with_name(out.name + ".log")
    child = os.fork()
    if child == 0:
        code = 99
        try:
            _redirect(log)
            faulthandler.dump_traceback_later(PATIENCE - 10)
            prepare()
            code = main(["train", str(config), f"trainer.default_local_dir={out}", *overrides])
        except SystemExit as ending:
            code = ending.code if isinstance(ending.code, int) else 98
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return Ended(_wait(child, killed_after), log.read_text())


def _redirect(log: Path) -> None:
    file = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    for standard in (1, 2):
        os.dup2(file, standard)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)


def _wait(child: int, killed_after: float | None) -> int:
    begun, killed = time.monotonic(), False
    while (waited := time.monotonic() - begun) < PATIENCE:
        if killed_after is not None and waited > killed_after and not killed:
            os.kill(child, signal.SIGKILL)
            killed = True
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError(f"the run did not end within {PATIENCE} s")
