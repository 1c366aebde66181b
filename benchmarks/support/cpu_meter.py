"""CPU time of a process and all its descendants, read from outside whenever the process ends a step.

A step has ended when a line is added to a file. Reading from outside costs the measured process nothing and counts
every process it starts (scoring processes, data loaders), whatever the program says of itself.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

POLL_SECONDS = 0.004


def cpu_at_lines(
    command: Sequence[str],
    lines: Path,
    environment: Mapping[str, str],
    log: Path,
    enough: Callable[[bytes], bool] = lambda line: False,
) -> list[float]:
    """Run `command`; the CPU seconds it had used when each line of `lines` was there, line by line.

    The command is stopped after a line that is `enough`.

    Raises:
        RuntimeError: the command failed; with the end of its output, all of which is in `log`.
    """
    readings: list[float] = []
    with log.open("wb") as output:
        process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                written = lines.read_bytes().splitlines(keepends=True) if lines.exists() else []
                whole = [line for line in written if line.endswith(b"\n")]
                if len(whole) > len(readings):
                    readings += [_cpu_seconds(process.pid)] * (len(whole) - len(readings))
                    if enough(whole[-1]):
                        return readings
                time.sleep(POLL_SECONDS)
        finally:
            process.kill()
            process.wait()
    if process.returncode != 0:
        end = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise RuntimeError(f"exit code {process.returncode} of {' '.join(command)}; {log} ends with\n{end}")
    return readings


def _cpu_seconds(pid: int) -> float:
    """User and system seconds of a process and its descendants, those included that have ended and been waited for."""
    total = 0.0
    process = psutil.Process(pid)
    for each in [process, *process.children(recursive=True)]:
        try:
            times = each.cpu_times()
        except psutil.NoSuchProcess:  # ended since the list was made: its parent has it among its children
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total
