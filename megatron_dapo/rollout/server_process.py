"""An engine's server as a child process: started on a free port, asked whether it is well, stopped, started again.

It has a process group of its own, so that what it starts ends with it and a Ctrl-C at the terminal does not reach it;
`server_guard.py` ends the group when this process is gone. Nothing here knows which engine it is.
"""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_dapo.rollout import server_guard
from megatron_dapo.rollout.failures import EngineDiedError, EngineFailedError, EngineHangsError, PortInUseError

HOST = "127.0.0.1"
TAIL_LINES = 30  # of the log in an error
PORT_TRIES = 3  # another process may take a free port before the server does
BETWEEN_LOOKS = 0.2  # seconds
RANK_VARIABLES = ("RANK", "LOCAL_", "GROUP_", "ROLE_", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_")


@dataclass(frozen=True)
class ServerSpec:
    name: str  # in errors
    command: Callable[[int], Sequence[str]]  # of a port
    environment: Mapping[str, str]  # the whole of it
    log: Path  # written anew at each start
    health_path: str  # answers 200 when the server can work
    headers: Mapping[str, str]  # of every request
    port: int | None = None  # a free one if absent
    start_limit: float = 600.0  # seconds until it is healthy
    stop_limit: float = 10.0  # seconds between asking it to end and killing it
    answer_limit: float = 60.0  # seconds for an answer about its health


class ServerProcess:
    """`port` is where it listens since the last `start`."""

    def __init__(self, spec: ServerSpec):
        self.spec = spec
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._lifeline = -1

    def start(self) -> None:
        """Start it and wait until it is healthy.

        Raises:
            PortInUseError: something listens on the port that was asked for, or on every free one that was tried.
            EngineDiedError: it ended before it was healthy.
            EngineHangsError: it was not healthy within `start_limit`.
        """
        if self._process is not None:
            raise RuntimeError(f"the {self.spec.name} server runs already, on port {self.port}; stop it first")
        for _ in range(1 if self.spec.port is not None else PORT_TRIES):
            self.port = self.spec.port or free_port()
            self._refuse_taken_port()
            self._spawn()
            try:
                self._wait_until_healthy()
                return
            except EngineDiedError:
                self.stop()
                if not _listens(self.port):
                    raise
            except BaseException:
                self.stop()
                raise
        self._refuse_taken_port()

    def stop(self) -> None:
        """End it and all it started. Harmless where nothing runs."""
        process, self._process = self._process, None
        if process is None:
            return
        deadline = time.monotonic() + self.spec.stop_limit
        _signal_group(process.pid, signal.SIGTERM)
        while not _has_ended(process.pid) and time.monotonic() < deadline:
            time.sleep(BETWEEN_LOOKS / 4)
        self._kill(process)

    def kill(self) -> None:
        """End it and all it started at once."""
        process, self._process = self._process, None
        if process is not None:
            self._kill(process)

    def restart(self) -> None:
        """Kill what is left of it and start it, on another port if none was asked for. Errors as for `start`."""
        self.kill()
        self.start()

    def check(self) -> None:
        """Raises EngineDiedError: it has ended, or was never started."""
        if self._process is None:
            raise EngineDiedError(f"the {self.spec.name} server does not run; start it")
        if _has_ended(self._process.pid):
            raise EngineDiedError(f"the {self.spec.name} server has ended by itself.{self.log_tail()}")

    def check_health(self) -> None:
        """Ask it. Blocks for `answer_limit` seconds at most.

        Raises:
            EngineDiedError, EngineHangsError: see there.
        """
        self.check()
        limit = self.spec.answer_limit
        if self._is_healthy(limit):
            return
        time.sleep(BETWEEN_LOOKS)  # the end of a process takes a moment to be seen
        self.check()
        raise EngineHangsError(
            f"the {self.spec.name} server on port {self.port} runs and did not say within {limit:g} s that it is "
            f"well.{self.log_tail()}"
        )

    def failure(self, error: Exception, limit: float = 5.0) -> EngineFailedError:
        """What is behind an `error` in talking to it: died, if it ends within `limit` seconds, else hangs."""
        deadline = time.monotonic() + limit
        while self._process is not None and not _has_ended(self._process.pid) and time.monotonic() < deadline:
            time.sleep(BETWEEN_LOOKS)
        try:
            self.check()
        except EngineDiedError as died:
            return died
        return EngineHangsError(
            f"the {self.spec.name} server on port {self.port} runs and does not answer ({error!r}).{self.log_tail()}"
        )

    def log_tail(self) -> str:
        """The log's last lines under a heading."""
        try:
            lines = self.spec.log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        except FileNotFoundError:
            lines = []
        return f" The end of {self.spec.log}:\n" + "\n".join(f"    {line}" for line in lines or ["(empty)"])

    def _spawn(self) -> None:
        self.spec.log.parent.mkdir(parents=True, exist_ok=True)
        reading, self._lifeline = os.pipe()
        guard = [sys.executable, "-I", "-S", server_guard.__file__, str(reading)]
        with self.spec.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*guard, *self.spec.command(self.port)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(self.spec.environment),
                pass_fds=(reading,),
                start_new_session=True,
            )
        os.close(reading)

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + self.spec.start_limit
        while time.monotonic() < deadline:
            self.check()
            if _listens(self.port) and self._is_healthy(min(self.spec.answer_limit, deadline - time.monotonic())):
                return
            time.sleep(BETWEEN_LOOKS)
        raise EngineHangsError(
            f"the {self.spec.name} server was not healthy {self.spec.start_limit:g} s after its start: allow it more "
            f"time, or see what it waits for.{self.log_tail()}"
        )

    def _is_healthy(self, limit: float) -> bool:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=max(limit, BETWEEN_LOOKS))
        try:
            connection.request("GET", self.spec.health_path, headers=dict(self.spec.headers))
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _refuse_taken_port(self) -> None:
        if _listens(self.port):
            raise PortInUseError(
                f"the {self.spec.name} server should listen on port {self.port} of {HOST}, where another process "
                "does already; end that one, or give another port"
            )

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        # Not waited for yet, so that its process group cannot be another's by now.
        _signal_group(process.pid, signal.SIGKILL)
        process.wait()
        os.close(self._lifeline)


def child_environment(more: Mapping[str, str], search_path: Sequence[Path]) -> dict[str, str]:
    """This process's own with `more`, and `search_path` before its PYTHONPATH; without what makes a rank of torchrun.

    torch would take a child that inherits those for that rank, and meet its peers where the run's own do.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(RANK_VARIABLES)}
    path = [*map(str, search_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**kept, **({"PYTHONPATH": os.pathsep.join(path)} if path else {}), **more}


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(BETWEEN_LOOKS)
        return probe.connect_ex((HOST, port)) == 0


def _has_ended(pid: int) -> bool:
    """Whether a child has ended, without taking note of it: its process group stays its own."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _signal_group(group: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)
