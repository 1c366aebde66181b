"""What is said while nodes come, and when they do not."""

from __future__ import annotations

import time

import pytest

from launch.wait_for_nodes import await_nodes

NODE = {"CPU": 90.0, "GPU": 8.0, "memory": 1e12}


def test_what_is_there_is_said_once_and_others_nodes_do_not_count(capsys: pytest.CaptureFixture[str]) -> None:
    looks = iter([{"n1": NODE, "x": NODE}, {"n1": NODE, "x": NODE}, {"n1": NODE, "n2": NODE}])
    assert await_nodes(["n1", "n2"], lambda: next(looks), time.monotonic() + 60)
    assert capsys.readouterr().out.splitlines() == [
        "nodes wanted: 2, present: 1 (90 CPU, 8 GPU); missing: n2",
        "nodes wanted: 2, present: 2 (180 CPU, 16 GPU)",
    ]


def test_nodes_that_do_not_come_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert not await_nodes(["n1", "n2", "n3"], lambda: {"n2": NODE}, time.monotonic() - 1)
    assert capsys.readouterr().out == "nodes wanted: 3, present: 1 (90 CPU, 8 GPU); missing: n1 n3\n"
