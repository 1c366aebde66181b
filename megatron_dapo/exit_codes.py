"""How the process of a run ends. Launch scripts read these, so they stand in one place.

torchrun answers 1 whatever its ranks say; the run's own code is therefore also written to
`<trainer.default_local_dir>/exit_status`.
"""

from __future__ import annotations

from pathlib import Path

DONE = 0
FAILED = 1  # an error that says what to change
USAGE_ERROR = 2  # a configuration that cannot be
REQUEUE = 75  # SIGTERM or SIGUSR1: the state is saved, start the same command again (EX_TEMPFAIL of sysexits.h)
INTERRUPTED = 130  # Ctrl-C: the state is saved, and a person wanted it to stop

FILE = "exit_status"


def write_exit_status(directory: Path, code: int) -> None:
    """Leave the code of a run where launch scripts find it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / FILE).write_text(f"{code}\n")
