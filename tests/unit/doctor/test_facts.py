"""The facts that can be known on any machine."""

from __future__ import annotations

import socket
from pathlib import Path

import torch

from megatron_dapo.doctor import facts
from megatron_dapo.doctor.gpus import Torch


def test_torch_is_asked_in_a_process_of_its_own() -> None:
    said = facts.ask_torch()
    assert isinstance(said, Torch)
    assert (said.version, said.cuda, len(said.gpus)) == (
        torch.__version__,
        torch.version.cuda,
        torch.cuda.device_count(),
    )


def test_a_library_that_cannot_be_imported_is_told_with_the_last_line() -> None:
    assert facts.try_import("json").works
    missing = facts.try_import("no_such_library")
    assert (missing.works, missing.said) == (False, "ModuleNotFoundError: No module named 'no_such_library'")


def test_a_process_that_is_killed_by_an_import_is_told_by_its_signal() -> None:
    assert facts.try_import("os; os.kill(os.getpid(), 11)").said == "ended by signal 11"


def test_a_port_answers_while_somebody_listens() -> None:
    with socket.create_server((facts.LOOPBACK, 0)) as server:
        port = server.getsockname()[1]
        assert facts.answers(facts.LOOPBACK, port)
    assert not facts.answers(facts.LOOPBACK, port)
    assert facts.port_opens()


def test_the_next_folder_above_that_is_there_is_found(tmp_path: Path) -> None:
    assert facts.existing(tmp_path / "runs" / "x") == tmp_path
    assert 0 < facts.free_bytes(tmp_path) <= facts.total_bytes(tmp_path)


def test_versions_are_those_that_are_installed() -> None:
    assert facts.installed("torch") == torch.__version__
    assert facts.installed("no-such-package") is None
    assert any(each.startswith("megatron-core") for each in facts.requirements())
