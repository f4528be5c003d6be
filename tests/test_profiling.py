"""A traced run: the files that XProf and TensorBoard look for, with the steps that were asked for and no others."""

import jax
import jax.numpy as jnp
import pytest

from unihetero_jax import cli
from unihetero_jax.metrics import read_metrics
from unihetero_jax.profiling import Profile, parse_range

EXPERIMENT = "experiments/quickstart.py"


def trace_files(workdir):
    return sorted((workdir / "profile").glob("plugins/profile/*/*.xplane.pb"))


def traced_steps(path):
    """Numbers of the steps annotated in a trace, and the names of all its events."""
    steps, names = [], set()
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            for event in line.events:
                names.add(event.name)
                if event.name == "train":
                    steps.append(int(dict(event.stats)["step_num"]))
    return steps, names


@pytest.mark.slow
def test_a_run_traces_its_steps_and_goes_on(program, tiny_flags, tmp_path):
    flags = [f"--config={EXPERIMENT}", f"--workdir={tmp_path}", *tiny_flags()]
    finished = program.run(["train", "--profile=3:5", *flags])
    assert finished.code == 0, finished.output
    assert f"trace of steps 3 to 5: tensorboard --logdir={tmp_path / 'profile'}" in finished.output
    (path,) = trace_files(tmp_path)
    steps, names = traced_steps(path)
    assert steps == [3, 4, 5]
    assert any("on_mesh" in name for name in names), "the computation of the step is in it"
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 9))
    goodput = [line["goodput"] for line in lines]
    for found in goodput:
        parts = [value for name, value in found.items() if name not in ("goodput", "wall_s")]
        assert sum(parts) == pytest.approx(found["wall_s"]) and found["goodput"] == found["step_s"] / found["wall_s"]
        assert found["start_up_s"] > 0 and found["compile_s"] > 0 and min(parts) >= 0
    assert goodput[0]["save_s"] == 0 < goodput[-1]["save_s"] and goodput[0]["compile_s"] == goodput[-1]["compile_s"]
    assert goodput[-1]["wall_s"] < finished.seconds + 1

    again = program.run(["train", "--profile=3:5", *flags])
    assert again.code == 0 and "steps 3 to 5 are done already, nothing is traced" in again.output, again.output
    assert trace_files(tmp_path) == [path]


def test_a_trace_that_is_cut_off_has_the_steps_so_far(tmp_path):
    step, told = jax.jit(lambda x: x + 1), []
    profile = Profile((2, 9), tmp_path, first_step=2, report=told.append)
    x = jnp.zeros(3)
    for number in (3, 4):
        x = profile.run(number, step, x)
    profile.close()
    profile.close()
    x = profile.run(5, step, x)
    assert x.tolist() == [3.0] * 3
    (path,) = trace_files(tmp_path)
    assert traced_steps(path)[0] == [3, 4]
    assert len(told) == 1 and told[0].startswith("trace of steps 3 to 4")


@pytest.mark.parametrize("text", ["5", "3:1", "0:2", "3:11", "a:b", "-1:2", "1:2:3"])
def test_a_bad_range_is_refused_with_the_remedy(text, tiny_flags, tmp_path, repo_root, monkeypatch, capsys):
    monkeypatch.chdir(repo_root)
    flags = [f"--config={EXPERIMENT}", f"--workdir={tmp_path / 'run'}", *tiny_flags()]
    assert cli.main(["train", f"--profile={text}", *flags, "--config.train.num_steps=10"]) == 2
    error = capsys.readouterr().err
    assert f"--profile={text}: give the first and the last step" in error and "the run has steps 1 to 10" in error
    assert not (tmp_path / "run").exists()


def test_ranges_hold_both_ends():
    assert parse_range("", 10) is None
    assert parse_range("3:3", 10) == (3, 3) and parse_range("1:10", 10) == (1, 10)
