"""A real child process that serves HTTP: started, found dead or silent by name, and gone with all it started."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_dapo.rollout.failures import EngineDiedError, EngineHangsError, PortInUseError
from megatron_dapo.rollout.server_process import HOST, ServerProcess, ServerSpec, child_environment, free_port

SERVER = """
import http.server, os, subprocess, sys
port, pids = int(sys.argv[1]), sys.argv[2]
child = subprocess.Popen(["sleep", "600"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
open(pids, "w").write(f"{os.getpid()} {child.pid}")
print("the last words", flush=True)
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""

Make = Callable[..., ServerProcess]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[ServerProcess] = []

    def build(code: str = SERVER, **settings: object) -> ServerProcess:
        spec = ServerSpec(
            name="test",
            command=lambda port: [sys.executable, "-c", code, str(port), str(tmp_path / "pids")],
            environment=child_environment({}, ()),
            log=tmp_path / "logs" / "server.log",
            health_path="/",
            headers={},
            **settings,
        )
        made.append(ServerProcess(spec))
        return made[-1]

    yield build
    for server in made:
        server.kill()


def pids(tmp_path: Path) -> list[int]:
    return [int(pid) for pid in (tmp_path / "pids").read_text().split()]


def wait_until_gone(numbers: list[int]) -> None:
    """The test's own time-out ends it where they stay."""
    while any(_runs(number) for number in numbers):
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_it_is_healthy_when_started_and_gone_with_its_children_when_stopped(make: Make, tmp_path: Path) -> None:
    server = make()
    server.start()
    server.check_health()
    server.stop()
    wait_until_gone(pids(tmp_path))
    with pytest.raises(EngineDiedError, match="does not run"):
        server.check()
    server.stop()


def test_a_killed_server_is_named_with_the_end_of_its_log_and_can_be_restarted(make: Make, tmp_path: Path) -> None:
    server = make()
    server.start()
    before = pids(tmp_path)
    os.kill(before[0], signal.SIGKILL)
    with pytest.raises(EngineDiedError, match=r"(?s)ended by itself.*the last words"):
        raise server.failure(ConnectionResetError())
    server.restart()
    server.check_health()
    assert set(pids(tmp_path)).isdisjoint(before)
    wait_until_gone(before)


def test_a_silent_server_hangs_by_name_and_can_be_killed(make: Make, tmp_path: Path) -> None:
    server = make(answer_limit=0.5)
    server.start()
    os.kill(pids(tmp_path)[0], signal.SIGSTOP)
    with pytest.raises(EngineHangsError, match=r"within 0\.5 s"):
        server.check_health()
    server.kill()
    wait_until_gone(pids(tmp_path))


def test_a_server_that_never_becomes_healthy_is_ended(make: Make, tmp_path: Path) -> None:
    server = make("import time; print('waiting for a device', flush=True); time.sleep(600)", start_limit=1.5)
    with pytest.raises(EngineHangsError, match=r"(?s)not healthy 1\.5 s after.*waiting for a device"):
        server.start()


def test_a_server_that_ends_at_once_is_told_with_its_error(make: Make) -> None:
    with pytest.raises(EngineDiedError, match="no such model"):
        make("raise SystemExit('no such model')").start()


def test_a_port_in_use_is_refused_and_its_owner_untouched(make: Make) -> None:
    with socket.socket() as owner:
        owner.bind((HOST, 0))
        owner.listen()
        with pytest.raises(PortInUseError, match="another process"):
            make(port=owner.getsockname()[1]).start()


def test_two_servers_live_side_by_side(make: Make) -> None:
    first, second = make(), make()
    first.start()
    second.start()
    assert first.port != second.port
    first.stop()
    second.check_health()


def test_the_server_ends_with_a_run_that_is_killed(tmp_path: Path) -> None:
    run = f"""
import sys, time
from pathlib import Path
from megatron_dapo.rollout.server_process import ServerProcess, ServerSpec, child_environment
server = ServerProcess(ServerSpec("test", lambda port: [sys.executable, "-c", {SERVER!r}, str(port),
    {str(tmp_path / "pids")!r}], child_environment({{}}, ()), Path({str(tmp_path / "log")!r}), "/", {{}}))
server.start()
print("up", flush=True)
time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", run], stdout=subprocess.PIPE, cwd=Path(__file__).parents[3])
    assert process.stdout.readline() == b"up\n"
    process.kill()
    process.wait()
    wait_until_gone(pids(tmp_path))


def test_a_child_is_no_rank_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    environment = child_environment({"MORE": "1"}, (Path("/shims"),))
    assert environment["PYTHONPATH"] == "/shims:/elsewhere"
    assert environment["MORE"] == "1"
    assert not {"RANK", "MASTER_PORT"} & set(environment)


def test_a_free_port_can_be_bound() -> None:
    with socket.socket() as probe:
        probe.bind((HOST, free_port()))
