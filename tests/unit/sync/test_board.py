"""Processes wait for each other by counters, and learn at once of one that fails or dies."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from megatron_dapo.sync.board import Board, Column, PeerError

NAMES = ["process 4", "process 7", "process 9"]


def boards(timeout: float = 30.0) -> list[Board]:
    memory = torch.zeros(Board.bytes_for(len(NAMES)), dtype=torch.uint8)
    return [Board(memory, row, NAMES, timeout) for row in range(len(NAMES))]


def later(action) -> threading.Timer:
    timer = threading.Timer(0.05, action)
    timer.start()
    return timer


def test_a_count_that_is_there_is_not_waited_for():
    first, second, _ = boards()
    first.set(Column.WRITTEN, 3)
    second.wait([0], Column.WRITTEN, 3)
    second.wait([], Column.WRITTEN, 100)
    second.wait([2], Column.RELEASED, -1)


def test_all_are_waited_for():
    first, second, third = boards()
    first.set(Column.WRITTEN, 2)
    begin = time.monotonic()
    later(lambda: second.set(Column.WRITTEN, 2))
    third.wait([0, 1], Column.WRITTEN, 2)
    assert time.monotonic() - begin >= 0.05


def test_one_that_fails_is_named_at_once():
    first, second, third = boards()
    first.set(Column.WRITTEN, 1)
    later(second.fail)
    with pytest.raises(PeerError, match="process 7 failed before its part of a bucket was done"):
        third.wait([0, 1], Column.WRITTEN, 1)


def test_one_that_does_not_come_is_named_after_the_timeout():
    first, _, third = boards(timeout=0.2)
    first.set(Column.RELEASED, 1)
    with pytest.raises(PeerError, match=r"process 7 was waited for during 0\.2 s"):
        third.wait([0, 1], Column.RELEASED, 1)


def test_one_that_died_is_named_within_seconds():
    first, _, third = boards(timeout=600.0)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert third._cells[1, Column.PID] == os.getpid()
    third._cells[1, Column.PID] = gone.pid
    with pytest.raises(PeerError, match="process 7 died before"):
        first.wait([1], Column.WRITTEN, 1)
