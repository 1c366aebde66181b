"""A scoring process: takes batches of tasks, answers within milliseconds of judging, ends with its parent.

It never imports torch. What a reward function prints goes to stderr, so that it cannot spoil the run's own output.
The parent's side is `process.py`.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import pickle
import signal
import time
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection

from megatron_dapo.config.tree import ConfigError
from megatron_dapo.rewards.table import Verifier, build
from megatron_dapo.rewards.verdict import Verdict, from_exception, read

ANSWER_EVERY = 0.005  # seconds: answering tiny tasks one by one costs more than judging them


def main(connection_fd: int, lifeline_fd: int, progress_fd: int) -> None:
    """Serve until the parent closes the connection.

    Messages in: the VerifierSpec, then lists of pickled RewardTasks.
    Messages out: None when ready or (whether it is a ConfigError, text) when not; then, for the tasks in order, lists
    of the fields of their Verdicts, each list with the monotonic time when it was complete.
    Shared memory: one byte, the tasks of the batch that are judged, so that the parent knows the one at fault when
    this process has to be killed with verdicts unsent.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # terminals and schedulers send them to every
        signal.signal(number, signal.SIG_IGN)  # process; only the parent acts on them
    die_with(lifeline_fd)
    os.set_inheritable(connection_fd, False)  # what a reward function starts must not hold it open
    os.dup2(2, 1)
    with suppress(EOFError, ConnectionError), Connection(connection_fd) as connection:
        verify = _load(connection)
        progress = mmap.mmap(progress_fd, 1)
        while verify is not None:
            _serve(verify, connection, progress)


def _serve(verify: Verifier, connection: Connection, progress: mmap.mmap) -> None:
    """Receive one batch and answer it."""
    batch: list[bytes] = connection.recv()
    verdicts: list[tuple] = []
    sent = time.monotonic()
    for done, blob in enumerate(batch, start=1):
        verdicts.append(tuple(judge(verify, blob)))
        progress[0] = done
        now = time.monotonic()
        if done == len(batch) or now - sent > ANSWER_EVERY:
            connection.send((verdicts, now))
            verdicts, sent = [], now


def die_with(lifeline_fd: int) -> None:
    """Let the kernel end this process when the last holder of the pipe's other end is gone.

    By signal and not by a thread: a regular expression that runs away holds the interpreter lock for good.
    """
    os.set_inheritable(lifeline_fd, False)
    fcntl.fcntl(lifeline_fd, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline_fd, fcntl.F_SETFL, fcntl.fcntl(lifeline_fd, fcntl.F_GETFL) | os.O_ASYNC)


def judge(verify: Verifier, blob: bytes) -> Verdict:
    """Score one pickled task. Whatever the reward function raises, `sys.exit` included, is an error of that task."""
    try:
        return read(verify(pickle.loads(blob)))
    except BaseException as error:
        return from_exception(error)


def _load(connection: Connection) -> Verifier | None:
    try:
        verify = build(connection.recv())
    except ConfigError as error:
        connection.send((True, str(error)))
        return None
    except BaseException:
        connection.send((False, traceback.format_exc()))
        return None
    connection.send(None)
    return verify
