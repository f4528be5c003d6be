"""The watchdog alone: when it ends a process, and whom it names. `test_processes.py` has real ones."""

import os
import socket
import threading

import pytest

from unihetero_jax import distributed, watchdog
from unihetero_jax.watchdog import EXIT_STALLED, Watchdog

HOST = socket.gethostname()


@pytest.fixture
def ended(monkeypatch):
    """Set when a watchdog ends the process, with its exit code; the watching thread stops there."""
    event, codes = threading.Event(), []

    def end(code):
        codes.append(code)
        event.set()
        threading.Event().wait(5.0)

    monkeypatch.setattr(os, "_exit", end)
    event.codes = codes
    return event


def run_of(monkeypatch, count, signs):
    """A run of several processes, of which the others publish what `signs` says; this one is process 1."""
    monkeypatch.setattr(distributed, "num_processes", lambda: count)
    monkeypatch.setattr(distributed, "process_id", lambda: 1)
    monkeypatch.setattr(distributed, "is_lead", lambda: False)
    monkeypatch.setattr(distributed, "publish", lambda key, text: None)
    monkeypatch.setattr(distributed, "published", lambda folder: signs())


def test_a_step_that_ends_in_time_ends_nothing(ended):
    with Watchdog(1.0) as dog:
        for step in range(1, 12):
            dog.beat(step)
            assert not ended.wait(0.15)


def test_before_the_first_step_there_is_no_limit(ended):
    with Watchdog(0.2):
        assert not ended.wait(0.8)


def test_a_step_that_takes_too_long_ends_the_process_with_all_stacks(ended, capfd):
    with Watchdog(0.3) as dog:
        dog.beat(7)
        assert ended.wait(5.0)
    said = capfd.readouterr().err
    assert ended.codes == [EXIT_STALLED] == [75]
    assert "(train.step_deadline_s 0) after step 7" in said
    assert "Thread 0x" in said and "test_watchdog.py" in said, "the stack of this very test"


def test_a_silent_process_is_named_long_before_the_deadline(ended, monkeypatch, capfd):
    """Process 2 gives no sign of life, process 0 does."""
    number = iter(range(1000))
    run_of(monkeypatch, 3, lambda: {"watchdog/0": f"{next(number)} 4", "watchdog/1": f"{next(number)} 4",
                                    "watchdog/2": "17 3"})  # fmt: skip
    monkeypatch.setattr(watchdog, "SILENT_S", 0.6)
    monkeypatch.setattr(watchdog, "MAX_POLL_S", 0.1)
    with Watchdog(1000.0) as dog:
        dog.beat(4)
        assert ended.wait(10.0)
    said = capfd.readouterr().err
    assert "process 2 (unknown host) was not heard of for" in said and "process 0 (" not in said, said


def test_all_alive_and_stuck_is_said_as_such(ended, monkeypatch, capfd):
    number = iter(range(1000))
    run_of(monkeypatch, 2, lambda: {"watchdog/0": f"{next(number)} 9", "watchdog/1": f"{next(number)} 8"})
    with Watchdog(2.0) as dog:
        dog.beat(8)
        assert ended.wait(10.0)
    said = capfd.readouterr().err
    assert "All processes are alive; the last steps that they finished: 0: 9, 1: 8" in said, said


def test_a_coordinator_that_does_not_answer_is_named(ended, monkeypatch, capfd):
    run_of(monkeypatch, 2, lambda: threading.Event().wait(60))
    monkeypatch.setattr(watchdog, "ANSWER_S", 0.1)
    with Watchdog(1.0) as dog:
        dog.beat(8)
        assert ended.wait(10.0)
    assert "process 0 (unknown host), the coordinator, does not answer" in capfd.readouterr().err
