"""The run lock, the preflight, and atomic writes."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from unihetero_jax import workdir as workdir_module
from unihetero_jax.workdir import RunLock, WorkdirError, prepare_workdir, write_atomically, write_config


def edit_lock(workdir, **changes):
    path = workdir / "lock.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def abandoned_lock(workdir, **changes):
    """A lock that this process wrote and did not release, as after a kill; `changes` edit it."""
    lock = RunLock(workdir).acquire()
    lock._stop.set()
    edit_lock(workdir, **changes)


def test_second_run_is_refused_and_told_who_holds_the_lock(tmp_path):
    refusal = pytest.raises(WorkdirError, match=f"host {socket.gethostname()}, pid {os.getpid()}, started")
    with RunLock(tmp_path), refusal:
        RunLock(tmp_path).acquire()
    with RunLock(tmp_path):
        assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "lock.json").exists()


def test_lock_of_a_killed_process_is_taken_over(tmp_path):
    code = (
        "import os, signal; from unihetero_jax.workdir import RunLock; "
        f"RunLock({str(tmp_path)!r}).acquire(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    killed = json.loads((tmp_path / "lock.json").read_text())
    with RunLock(tmp_path):
        assert json.loads((tmp_path / "lock.json").read_text())["token"] != killed["token"]


@pytest.mark.parametrize(
    ("changes", "stale"),
    [
        ({}, False),
        ({"process_start": 1}, True),  # the pid was reused by a later process
        ({"heartbeat": time.time() - 130}, True),
        ({"host": "elsewhere", "pid": 2**22 + 1}, False),  # a pid of another host says nothing here
        ({"namespace": "another container", "pid": 2**22 + 1}, False),
        ({"host": "elsewhere", "heartbeat": time.time() - 130}, True),
        ({"pid": 2**22 + 1}, True),
    ],
)
def test_staleness(tmp_path, changes, stale):
    abandoned_lock(tmp_path, **changes)
    if stale:
        RunLock(tmp_path).acquire().release()
    else:
        with pytest.raises(WorkdirError, match="in use by another run"):
            RunLock(tmp_path).acquire()


def test_torn_lock_file_counts_as_fresh_then_stale(tmp_path):
    path = tmp_path / "lock.json"
    path.write_text('{"host": "a", "pi')
    with pytest.raises(WorkdirError, match="in use"):
        RunLock(tmp_path).acquire()
    os.utime(path, (time.time() - 130, time.time() - 130))
    RunLock(tmp_path).acquire().release()


def test_of_many_simultaneous_starts_exactly_one_wins(tmp_path):
    abandoned_lock(tmp_path, pid=2**22 + 1)  # so that the takeover is raced for, too
    winners, barrier = [], threading.Barrier(8)

    def start():
        lock = RunLock(tmp_path)
        barrier.wait()
        try:
            winners.append(lock.acquire())
        except WorkdirError:
            pass

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(winners) == 1
    winners[0].release()


def test_heartbeat_is_refreshed_and_a_lost_lock_is_noticed(tmp_path):
    lock = RunLock(tmp_path, heartbeat_interval_s=0.02).acquire()
    first = json.loads((tmp_path / "lock.json").read_text())["heartbeat"]
    deadline = time.time() + 5
    while json.loads((tmp_path / "lock.json").read_text())["heartbeat"] == first and time.time() < deadline:
        time.sleep(0.01)
    assert json.loads((tmp_path / "lock.json").read_text())["heartbeat"] > first
    lock.check()
    (tmp_path / "other").mkdir()
    write_atomically(tmp_path / "lock.json", json.dumps({"token": "someone else", "heartbeat": time.time()}))
    lock._thread.join(timeout=5)
    with pytest.raises(WorkdirError, match="taken over"):
        lock.check()
    lock.release()
    assert json.loads((tmp_path / "lock.json").read_text())["token"] == "someone else"


def test_unwritable_workdir_is_refused_before_anything_runs(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkdirError, match="cannot write there"):
        prepare_workdir(tmp_path / "file" / "run")
    if os.geteuid() == 0:
        return  # root writes through any mode bits
    folder = tmp_path / "read-only"
    folder.mkdir(mode=0o555)
    with pytest.raises(WorkdirError, match="cannot write there"):
        prepare_workdir(folder)


def test_read_only_file_system_is_refused():
    folder = "/proc/unihetero"  # no one may create files here, root neither
    with pytest.raises(WorkdirError, match="cannot write there"):
        prepare_workdir(folder)


def test_prepare_leaves_nothing_behind(tmp_path):
    assert prepare_workdir(tmp_path / "a" / "b").exists()
    assert os.listdir(tmp_path / "a" / "b") == []


def test_config_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write_config(tmp_path, {"b": 1, "a": {"c": 0.1}})
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": {"c": 0.1}, "b": 1}

    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(workdir_module.os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_config(tmp_path, {"a": 2})
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": {"c": 0.1}, "b": 1}
    assert os.listdir(tmp_path) == ["config.json"]
