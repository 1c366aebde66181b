"""The first Ctrl-C waits for a good moment, the second does not."""

from __future__ import annotations

import signal

import pytest

from megatron_dapo.exit_codes import REQUEUE
from megatron_dapo.interrupts import Interrupts


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def test_nothing_happens_until_it_is_asked_for():
    interrupts = Interrupts()
    with interrupts.watched():
        interrupts.check()
    assert not interrupts.requested


def test_the_first_ctrl_c_is_noted_and_raised_at_the_next_check():
    interrupts = Interrupts()
    with interrupts.watched():
        ctrl_c()
        assert interrupts.requested
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()


def test_a_second_ctrl_c_is_raised_at_once():
    seconds = iter([0.0, 5.0])
    interrupts = Interrupts(clock=lambda: next(seconds))
    with interrupts.watched():
        ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            ctrl_c()


def test_a_ctrl_c_that_arrives_twice_is_one():
    seconds = iter([0.0, 0.2])
    interrupts = Interrupts(clock=lambda: next(seconds))
    with interrupts.watched():
        ctrl_c()
        ctrl_c()


def test_the_handler_that_was_there_is_put_back_also_after_an_error():
    before = signal.getsignal(signal.SIGINT)
    interrupts = Interrupts()
    with pytest.raises(RuntimeError), interrupts.watched():
        assert signal.getsignal(signal.SIGINT) != before
        raise RuntimeError
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_schedulers_signal_is_noted_and_ends_with_the_code_to_requeue_on(number: signal.Signals):
    interrupts = Interrupts()
    with interrupts.watched():
        signal.raise_signal(number)
        signal.raise_signal(number)
        with pytest.raises(SystemExit) as ending:
            interrupts.check()
    assert ending.value.code == REQUEUE == 75


def test_a_sigterm_behind_ctrl_c_changes_nothing():
    interrupts = Interrupts()
    with interrupts.watched():
        ctrl_c()
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
