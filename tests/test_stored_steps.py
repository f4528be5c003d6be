"""The command `checkpoints`: what it lists, finds damaged, compares and removes."""

import os
import shutil

import numpy as np
import pytest

from tests.test_checkpoint import make_config, make_state, position_of, restore_newest, write_steps
from unihetero_jax import cli
from unihetero_jax.checkpoint import Checkpointer, CheckpointError, list_steps
from unihetero_jax.stored_steps import compare_steps, describe_steps, prune_steps, verify_steps
from unihetero_jax.workdir import RunLock, WorkdirError


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    write_steps(workdir, range(1, 6), make_config(**{"checkpoint.keep_last": 9}))
    return workdir


@pytest.fixture
def copied(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


def damage(workdir, step):
    path = max(
        (workdir / "checkpoints" / str(step) / "state").rglob("*"), key=lambda p: p.is_file() and p.stat().st_size
    )
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    return path.name


def test_every_kind_of_step_is_listed(copied, capsys):
    (copied / "checkpoints" / "2" / "manifest.json").unlink()
    (copied / "checkpoints" / "3" / "damaged.json").write_text('{"fault": "file x is missing"}')
    (copied / "checkpoints" / "4" / "manifest.json").write_text("{}")
    steps = describe_steps(copied)
    assert [(s.step, s.state) for s in steps] == [
        (1, "complete"), (2, "unfinished"), (3, "damaged"), (4, "damaged"), (5, "complete")
    ]  # fmt: skip
    files = [
        path for path in (copied / "checkpoints" / "5").rglob("*") if path.is_file() and path.name != "manifest.json"
    ]
    assert (steps[4].num_files, steps[4].num_bytes) == (len(files), sum(path.stat().st_size for path in files))
    assert cli.main(["checkpoints", "list", f"--workdir={copied}"]) == 0
    assert "file x is missing" in capsys.readouterr().out
    assert cli.main(["checkpoints", "list", f"--workdir={copied / 'nowhere'}"]) == 2
    assert "no checkpoints; train first" in capsys.readouterr().err


def test_verify_names_the_file_and_changes_nothing(copied, capsys):
    name = damage(copied, 3)
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    faults = verify_steps(copied)
    assert [step for step, fault in faults.items() if fault] == [3] and name in faults[3]
    assert cli.main(["checkpoints", "verify", f"--workdir={copied}"]) == 2
    assert "damaged: step 3" in capsys.readouterr().err
    assert cli.main(["checkpoints", "verify", f"--workdir={copied}", "--steps=1,5"]) == 0
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before
    with pytest.raises(CheckpointError, match="no complete checkpoint of step 7; there are 1, 2, 3, 4, 5"):
        verify_steps(copied, [1, 7])


def test_differences_are_those_of_the_values(copied, capsys):
    groups, config = compare_steps(copied, 2, 5)
    found = {group.group: group for group in groups}
    old, new = (np.asarray(make_state(step).params["encoder"]["kernel"], np.float64) for step in (2, 5))
    encoder = found["params/encoder"]
    assert encoder.largest == pytest.approx(np.abs(new - old).max(), rel=1e-6) and encoder.num_equal == 0
    assert encoder.relative == pytest.approx(np.linalg.norm(new - old) / np.linalg.norm(old), rel=1e-6)
    assert config == []
    same, _ = compare_steps(copied, 4, 4)
    assert all(group.num_equal == group.num_arrays and group.largest == group.relative == 0 for group in same)
    assert cli.main(["checkpoints", "diff", f"--workdir={copied}", "--steps=2,5"]) == 0
    assert "the configurations are equal" in capsys.readouterr().out
    assert cli.main(["checkpoints", "diff", f"--workdir={copied}", "--steps=2"]) == 2
    with pytest.raises(SystemExit):
        cli.main(["checkpoints", "diff", f"--workdir={copied}", "--steps=a"])


def test_changed_configurations_are_shown(tmp_path):
    for step, rate in ((1, 10), (2, 20)):
        config = make_config(**{"train.log_every_steps": rate})
        checkpointer = Checkpointer(tmp_path, config, report=lambda _: None)
        if step > 1:
            checkpointer.restore(make_state(0))
        checkpointer.save(step, make_state(step), position_of(step), wait=True)
        checkpointer.close()
    assert compare_steps(tmp_path, 1, 2)[1] == ["train.log_every_steps: 10 -> 20"]


@pytest.mark.parametrize(
    ("last", "every", "kept"), [(1, 0, [5]), (2, 0, [4, 5]), (1, 2, [2, 4, 5]), (9, 0, [1, 2, 3, 4, 5])]
)
def test_prune_keeps_what_the_policy_says(copied, last, every, kept):
    would = prune_steps(copied, last, every, dry_run=True, report=lambda _: None)
    assert list_steps(copied) == [1, 2, 3, 4, 5]
    assert prune_steps(copied, last, every, report=lambda _: None) == would
    assert list_steps(copied) == kept and not (copied / "lock.json").exists()
    assert {path.name for path in (copied / "checkpoints").iterdir()} == {"completed.json", *map(str, kept)}


def test_prune_never_removes_the_last_step_that_verifies(copied):
    for step in (3, 4, 5):
        damage(copied, step)
    told = []
    assert prune_steps(copied, 1, 0, report=told.append) == [1, 3, 4]
    assert list_steps(copied) == [2, 5] and sum("is damaged" in line for line in told) == 3
    assert restore_newest(copied, make_config(**{"checkpoint.keep_last": 9}))[0] == 2
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        prune_steps(copied / "nowhere", 1, 0)


def test_prune_without_any_valid_step_removes_nothing(copied):
    for step in range(1, 6):
        damage(copied, step)
    with pytest.raises(CheckpointError, match="no checkpoint verifies"):
        prune_steps(copied, 1, 0, report=lambda _: None)
    assert list_steps(copied) == [1, 2, 3, 4, 5]


def test_prune_waits_for_no_run(copied, capsys):
    with RunLock(copied), pytest.raises(WorkdirError, match=f"pid {os.getpid()}"):
        prune_steps(copied, 1, 0)
    assert cli.main(["checkpoints", "prune", f"--workdir={copied}", "--keep-last=0"]) == 2
    assert "--keep-last 0 must be positive" in capsys.readouterr().err
    assert list_steps(copied) == [1, 2, 3, 4, 5]
