"""Stopped anywhere and started again, a run is the run that was never stopped: to the bit, step by step."""

import json
import random
import signal

import pytest

from unihetero_jax.checkpoint import list_steps
from unihetero_jax.metrics import METRICS_NAME, REPLACED_NAME

EXPERIMENT = "experiments/quickstart.py"


@pytest.fixture(scope="module")
def train(program, tiny_flags):
    """The same command every time: `train(workdir)`; keyword arguments say how it is stopped."""

    def run(workdir, changes=None, **stops):
        flags = tiny_flags(**(changes or {}))
        return program.run(["train", f"--config={EXPERIMENT}", f"--workdir={workdir}", *flags], **stops)

    return run


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def trace_of(workdir, name=METRICS_NAME):
    """What each step computed, in file order: everything that does not tell the time."""
    kept = ("step", "loss", "batch_hash", "terms", "gradient_norm", "learning_rate", "totals")
    return [{name: line[name] for name in kept} for line in lines_of(workdir / name)]


@pytest.fixture(scope="module")
def unbroken(train, tmp_path_factory):
    """A run that was never stopped."""
    workdir = tmp_path_factory.mktemp("unbroken")
    finished = train(workdir)
    assert finished.code == 0, finished.output
    trace = trace_of(workdir)
    assert [line["step"] for line in trace] == list(range(1, 9))
    assert len({line["batch_hash"] for line in trace}) == 8 and len({line["loss"] for line in trace}) == 8
    return trace


def test_three_kills_change_nothing(train, unbroken, tmp_path):
    """Killed inside the first save, before a manifest is written, and inside the removal of an old step."""
    assert train(tmp_path, kill_at="during_save:2").code == -signal.SIGKILL
    assert list_steps(tmp_path) == []
    seen_first = lines_of(tmp_path / METRICS_NAME)
    assert [line["step"] for line in seen_first] == [1, 2]

    killed = train(tmp_path, kill_at="before_manifest:4")
    assert killed.code == -signal.SIGKILL
    assert "leftover of an unfinished save" in killed.output and "2 lines beyond step 0 moved" in killed.output
    assert lines_of(tmp_path / REPLACED_NAME) == seen_first
    assert list_steps(tmp_path) == [2]
    with (tmp_path / METRICS_NAME).open("a") as file:
        file.write('{"step": 5, "loss": 5.0')  # a kill may leave half a line

    killed = train(tmp_path, kill_at="during_retention:6")
    assert killed.code == -signal.SIGKILL
    assert "going on from the checkpoint of step 2" in killed.output
    assert "1 torn line dropped" in killed.output
    assert list_steps(tmp_path) == [4, 6], "2 was on its way out"

    finished = train(tmp_path)
    assert finished.code == 0, finished.output
    assert "going on from the checkpoint of step 6" in finished.output
    assert trace_of(tmp_path) == unbroken
    replaced = trace_of(tmp_path, REPLACED_NAME)
    steps = [line["step"] for line in replaced]
    # A run goes on while its save is under way, so how far it came beyond a saved step is a matter of speed.
    assert steps[:4] == [1, 2, 3, 4] and steps.count(3) == 1 and set(steps[4:]) <= {5, 6, 7, 8}, steps
    assert all(line == unbroken[line["step"] - 1] for line in replaced)
    assert not (tmp_path / "lock.json").exists()
    assert not [path.name for path in (tmp_path / "checkpoints").iterdir() if not path.name.isdigit()
                and path.name != "completed.json"]  # fmt: skip


@pytest.mark.slow
def test_signals_save_first(train, unbroken, tmp_path):
    """SIGTERM and SIGINT finish the step and save it, though no save was due; nothing is computed twice."""
    for number, step in ((signal.SIGTERM, 3), (signal.SIGINT, 5)):
        stopped = train(tmp_path, signal_at=(number, step))
        assert stopped.code == 128 + number, stopped.output
        assert f"stopped by {number.name} after step {step}" in stopped.output and "same command" in stopped.output
        assert "Traceback" not in stopped.output
        assert max(list_steps(tmp_path)) == step
        assert trace_of(tmp_path) == unbroken[:step]
    finished = train(tmp_path)
    assert finished.code == 0, finished.output
    assert trace_of(tmp_path) == unbroken
    assert not (tmp_path / REPLACED_NAME).exists()


@pytest.mark.slow
def test_twenty_kills_at_random_moments(train, tmp_path):
    """Kill -9 at any moment: while importing data, compiling, stepping, saving. 20 of 20 go on identically."""
    changes = {"train__num_steps": 200, "checkpoint__every_steps": 10}
    whole = train(tmp_path / "unbroken", changes)
    assert whole.code == 0, whole.output
    expected = trace_of(tmp_path / "unbroken")
    rng = random.Random(0)
    kills, round_number = 0, 0
    while kills < 20:
        workdir = tmp_path / f"round-{round_number}"
        while True:
            delay = rng.uniform(0.3, 1.0) * whole.seconds if kills < 20 else None
            ended = train(workdir, changes, kill_after_s=delay)
            if ended.code == 0:
                break
            assert ended.code == -signal.SIGKILL, ended.output
            kills += 1
        assert trace_of(workdir) == expected, f"round {round_number}"
        round_number += 1
    assert round_number >= 1 and kills == 20
