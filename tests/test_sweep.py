"""Sweeps: what is planned, that nothing is trained twice or lost, and that interruptions do not change the table."""

import json
import random
import re
import shutil
import signal
import subprocess
from pathlib import Path

import jax
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import tiny_overrides

from experiments import quickstart
from unihetero_jax import claims, job_array, preregistration, sweep, sweep_plan
from unihetero_jax.cli import main
from unihetero_jax.command_line import load_experiment, with_overrides
from unihetero_jax.config import pixel_role, to_dict, visual_target
from unihetero_jax.model.unihetero import init_params
from unihetero_jax.reporting import collapse_alarms, has_collapsed
from unihetero_jax.train import Interrupted
from unihetero_jax.train_run import run_training
from unihetero_jax.workdir import RunLock

FILE = """
BASE = {base!r}

def sweep(scale):
    for seed in range(1 if scale == "smoke" else 2):
        for objective in ("understanding", "semantic_input"):
            yield objective, {{"objective": objective, "seed": seed, "train.num_steps": 2 if scale == "smoke" else 3}}
"""


HEAD = "BASE = 'experiments/quickstart.py'\n\ndef sweep(scale):\n"


@pytest.fixture
def sweep_file(tmp_path, tiny_world):
    """A sweep of two runs of two steps over a base in miniature."""
    overrides = tiny_overrides(tiny_world, train__eval_every_steps=2, checkpoint__every_steps=2)
    values = with_overrides(quickstart.get_config().to_dict(), [one.removeprefix("--config.") for one in overrides])
    base = tmp_path / "base.py"
    base.write_text(f"def get_config():\n    return {to_dict(values)!r}\n")
    path = tmp_path / "sweep.py"
    path.write_text(FILE.format(base=str(base)))
    return path


def rows_of(workdir):
    return pq.read_table(workdir / sweep.RESULTS).to_pylist()


def test_runs_are_planned_by_arm_seed_and_hash(sweep_file):
    planned = sweep_plan.plan_file(f"{sweep_file}:smoke")
    assert [(one.arm, one.config.seed) for one in planned] == [("understanding", 0), ("semantic_input", 0)]
    assert planned[0].config.train.num_steps == 2
    others = sweep_plan.plan_file(f"{sweep_file}:scenes")
    assert len({one.name for one in others}) == 4
    assert not {one.name for one in planned} & {one.name for one in others}, "a changed arm is another run"


def test_a_plain_sweep_is_the_product_of_the_values(tmp_path):
    planned = sweep_plan.plan_product(
        "experiments/quickstart.py",
        ["seed=0,1", "loss.visual_weight=0.1,1.0", "train.num_steps=7", "optimizer.frozen=encoder,projector"],
    )
    assert [(one.arm, one.config.seed) for one in planned] == [
        ("visual_weight=0.1", 0), ("visual_weight=1.0", 0), ("visual_weight=0.1", 1), ("visual_weight=1.0", 1),
    ]  # fmt: skip
    assert all(one.config.optimizer.frozen == ("encoder", "projector") for one in planned), "a tuple keeps its commas"
    with pytest.raises(ValueError, match="nothing varies"):
        sweep_plan.plan_product("experiments/quickstart.py", ["seed=0"])


def test_what_is_missing_is_trained_once_and_the_table_holds_all(sweep_file, tmp_path, capsys, monkeypatch):
    """Interrupted twice, and refused a run that another process has: the table is the unbroken one's."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    command = ["sweep", f"--sweep={sweep_file}:smoke"]
    assert main([*command, f"--workdir={whole}"]) == 0
    assert "2 runs: 2 trained" in capsys.readouterr().out
    planned, trained = sweep_plan.plan_file(f"{sweep_file}:smoke"), []
    run_training = sweep.run_training

    def interrupted(config, workdir):
        trained.append(workdir)
        if len(trained) <= 2:
            raise Interrupted(0, signal.SIGTERM)
        return run_training(config, workdir)

    monkeypatch.setattr(sweep, "run_training", interrupted)
    for _ in range(2):
        assert main([*command, f"--workdir={broken}"]) == 128 + signal.SIGTERM
    held = broken / "claims" / planned[1].name
    held.mkdir(parents=True)
    with RunLock(held):
        assert main([*command, f"--workdir={broken}"]) == 0
        printed = capsys.readouterr().out
        assert "being trained by another process" in printed and "1 elsewhere" in printed
    assert main([*command, f"--workdir={broken}"]) == 0
    assert "2 runs: 1 finished, 1 trained" in capsys.readouterr().out
    assert len(trained) == 4, "two were interrupted, none was taken twice"
    assert rows_of(broken) == rows_of(whole)
    found = {(row["arm"], row["seed"], row["metric"]): row["value"] for row in rows_of(whole)}
    metrics = {metric for _, _, metric in found}
    assert {"held_out/qa/text", "held_out/generation/visual", "collapsed", "pflop"} <= metrics
    assert ("understanding", 0, "held_out/generation/visual") not in found
    line = json.loads((whole / "runs" / planned[1].name / "metrics.jsonl").read_text().splitlines()[-1])
    assert found["semantic_input", 0, "held_out/qa/text"] == line["eval_loss"]["qa"]["text"]


@pytest.mark.slow
def test_five_kills_at_random_moments_leave_the_table_as_it_is(program, sweep_file, tmp_path):
    """Kill -9 at any moment of four runs: planning, compiling, stepping, saving, evaluating, writing the table."""
    command = ["sweep", f"--sweep={sweep_file}:scenes"]
    whole = program.run([*command, f"--workdir={tmp_path / 'whole'}"])
    assert whole.code == 0, whole.output
    rng, kills, workdirs = random.Random(0), 0, []
    while kills < 5:
        workdirs.append(tmp_path / f"round-{len(workdirs)}")
        ended = None
        while ended is None or ended.code:
            delay = rng.uniform(0.1, 1.0) * whole.seconds if kills < 5 else None
            ended = program.run([*command, f"--workdir={workdirs[-1]}"], kill_after_s=delay)
            assert ended.code in (0, -signal.SIGKILL), ended.output
            kills += ended.code != 0
    assert all(rows_of(workdir) == rows_of(tmp_path / "whole") for workdir in workdirs)


def test_a_run_that_fails_is_counted_and_the_others_go_on(sweep_file, tmp_path, capsys, monkeypatch):
    run_training = sweep.run_training

    def failing(config, workdir):
        if config.objective == "understanding":
            raise ValueError("the loss is not finite")
        return run_training(config, workdir)

    monkeypatch.setattr(sweep, "run_training", failing)
    assert main(["sweep", f"--sweep={sweep_file}:smoke", f"--workdir={tmp_path / 'w'}"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED: understanding-0-" in printed and "the loss is not finite" in printed
    assert "1 failed, 1 trained" in printed
    assert {(row["arm"], row["seed"]) for row in rows_of(tmp_path / "w")} == {("semantic_input", 0)}


def test_a_dry_run_does_nothing_and_an_array_gets_its_flags(sweep_file, tmp_path, capsys):
    command = ["sweep", f"--sweep={sweep_file}:smoke", f"--workdir={tmp_path / 'w'}"]
    assert main([*command, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("missing") == 2 and "unknown until a run is finished" in printed
    assert not (tmp_path / "w").exists()
    assert main([*command, "--launcher=slurm"]) == 0
    lines = (tmp_path / "w" / "overrides.txt").read_text().splitlines()
    assert len(lines) == 2 and "sbatch --array=0-1" in capsys.readouterr().out
    assert main([*command, "--launcher=jobset"]) == 0
    assert f"kubectl apply -f {tmp_path / 'w' / 'jobset_array.yaml'}" in capsys.readouterr().out
    arm = sweep_plan.plan_file(f"{sweep_file}:smoke")[1]
    assert lines[1].split()[0] == f"--workdir={tmp_path / 'w' / 'runs' / arm.name}"
    assert {"--config.objective=understanding", "--config.train.num_steps=2"} <= set(lines[0].split())
    started = main(["train", f"--config={tmp_path / 'base.py'}", *lines[1].split()])
    assert started == 0 and sweep.is_finished(arm, tmp_path / "w" / "runs" / arm.name), "as an array would start it"


def test_an_array_is_submitted_once_it_can_be(sweep_file, tmp_path, capsys, monkeypatch, refused):
    """`sbatch` is a stand-in that notes its arguments: there is no queue here."""
    command = ["sweep", f"--sweep={sweep_file}:smoke", f"--workdir={tmp_path / 'w'}", "--submit"]
    assert "--submit is for --launcher=slurm or jobset" in refused(*command)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert "there is no sbatch on this machine; submit it where that works: sbatch" in refused(
        *command, "--launcher=slurm"
    )
    program = tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/noted\necho "Submitted batch job 7"\n')
    program.chmod(0o755)
    assert main([*command, "--launcher=slurm"]) == 0
    assert "Submitted batch job 7" in capsys.readouterr().out
    noted = (tmp_path / "noted").read_text().split()
    assert noted[0] == "--array=0-1" and noted[-2:] == ["train", f"--config={tmp_path / 'base.py'}"]
    assert f"--export=ALL,OVERRIDES={tmp_path / 'w' / 'overrides.txt'}" in noted
    program.write_text("#!/bin/sh\necho no partition gpu >&2\nexit 3\n")
    assert "sbatch exited with 3: no partition gpu" in refused(*command, "--launcher=slurm")


def test_a_job_set_differs_from_its_template_by_what_the_sweep_says(tmp_path):
    folder = tmp_path / "Claim_1.x"
    folder.mkdir()
    job_array.write_array("jobset", ["--workdir=a", "--workdir=b", "--workdir=c"], "experiments/x.py", folder)
    found, template = (
        yaml.safe_load(path.read_text())
        for path in (folder / "jobset_array.yaml", job_array.TEMPLATES / "jobset_array.yaml")
    )
    assert re.fullmatch("unihetero-claim-1-x-[0-9a-f]{6}", found["metadata"].pop("name"))
    assert template["metadata"].pop("name")
    with pytest.raises(ValueError, match="names no image of yours yet"):
        job_array.submit(["kubectl", "apply", "-f", str(folder / "jobset_array.yaml")])
    jobs = [one["spec"]["replicatedJobs"][0]["template"]["spec"] for one in (found, template)]
    assert [jobs[0].pop(name) for name in ("completions", "maxFailedIndexes")] == [3, 3]
    del jobs[1]["completions"], jobs[1]["maxFailedIndexes"]
    scripts = [job["template"]["spec"]["containers"][0].pop("args")[0] for job in jobs]
    assert f"overrides.sh {folder / 'overrides.txt'} " in scripts[0] and "--config=experiments/x.py" in scripts[0]
    assert found == template and len(scripts[0].splitlines()) == len(scripts[1].splitlines())


@pytest.mark.parametrize(
    ("content", "message"),
    [("BASE = 3\n", "needs BASE"), (HEAD + "    return []\n", "plans no run"),
     (HEAD + "    yield 'a', {}\n    yield 'a', {}\n", "twice"),
     (HEAD + "    yield 'a', {'loss.visual_wait': 1}\n", "arm a: invalid")],
)  # fmt: skip
def test_sweep_files_that_cannot_be_used_say_why(tmp_path, content, message):
    path = tmp_path / "wrong.py"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        sweep_plan.plan_file(str(path))


def test_a_run_is_finished_when_its_rollouts_are_measured_too(tmp_path, monkeypatch):
    """Killed between the questions and the rollouts, it would lack a row of the unbroken table."""
    one = sweep_plan.plan_product("experiments/quickstart.py", ["seed=0,1"])[0]
    monkeypatch.setattr(sweep, "list_steps", lambda _: [one.config.train.num_steps])
    (tmp_path / "eval").mkdir()
    for name in one.config.eval.benchmarks:
        (tmp_path / "eval" / f"{name}-2000.json").write_text("{}")
    assert not sweep.is_finished(one, tmp_path)
    (tmp_path / "eval" / "rollout-2000.json").write_text("{}")
    assert sweep.is_finished(one, tmp_path)
    judged = sweep_plan.plan_product("experiments/quickstart.py", ["seed=0,1", "eval.rollout_judge=x"])[0]
    assert not sweep.is_finished(judged, tmp_path)
    (tmp_path / "eval" / "rollout-error-2000.json").write_text("{}")
    assert sweep.is_finished(judged, tmp_path)
    plain = sweep_plan.plan_product("experiments/quickstart.py", ["objective=understanding", "eval.rollout_judge=x,y"])
    assert sweep.is_finished(plain[0], tmp_path), "what draws nothing has nothing to judge"


def test_figures_of_two_judges_make_no_table(tmp_path, monkeypatch):
    planned = sweep_plan.plan_product("experiments/quickstart.py", ["seed=0,1", "eval.rollout_judge=x"])
    monkeypatch.setattr(sweep, "is_finished", lambda *_: True)
    paths = [sweep._result(one, tmp_path / "runs" / one.name, sweep.ROLLOUT_ERROR, 0) for one in planned]
    for path in paths:
        path.parent.mkdir(parents=True)
        path.write_text('{"judge": "a"}')
    sweep._check_one_judge(planned, tmp_path)
    paths[1].write_text('{"judge": "b"}')
    with pytest.raises(ValueError, match=r"different judges: \S+-0-\S+ by a, \S+-1-\S+ by b; remove those files"):
        sweep._check_one_judge(planned, tmp_path)


@pytest.mark.slow
def test_replicates_fill_the_table_like_runs_of_their_own(sweep_file, tiny_world, tiny_experiment, tmp_path):
    """Seeds 3 and 4 in one step, and as two runs; the table has the same rows, to rounding."""
    base, judge = tmp_path / "base.py", tmp_path / "judge"
    run_training(tiny_experiment(objective="understanding", train__num_steps=2), str(judge))
    common = ["data.seed=0", "objective=semantic_input", "eval.without_image=True", "train.num_steps=2,3",
              f"eval.benchmarks.scenes={tiny_world / 'questions.tsv'}", f"eval.rollout_judge={judge}",
              "eval.rollout_source=generation", "eval.rollout_candidates=8"]  # fmt: skip
    found = {}
    for name, own in (("one", ["seed=3", "train.num_replicates=2"]), ("two", ["seed=3,4"])):
        planned = sweep_plan.plan_product(str(base), [*common, *own])
        assert sweep.execute(planned, tmp_path / name) == {"trained": len(planned)}
        found[name] = {(row["arm"], row["seed"], row["metric"]): row["value"] for row in rows_of(tmp_path / name)}
    assert found["one"].keys() == found["two"].keys()
    assert {
        "accuracy/scenes", "answer_nll/scenes", "answer_nll_gain/scenes", "rollout_retrieval", "leak",
        *(f"rollout_error/{name}" for name in ("free_running", "teacher_forced", "floor", "gap", "growth", "horizon")),
    } <= {key[2] for key in found["one"]}  # fmt: skip
    for key, value in found["two"].items():
        assert found["one"][key] == pytest.approx(value, rel=2e-4, abs=1e-5), key
    assert {key[1] for key in found["one"]} == {3, 4}


PROTOCOL = """
PROTOCOL = {
    "metric": "answer_nll/scenes", "margin": 0.01, "num_seeds": 8, "matching": "data",
    "contrasts": {"generation helps": ["semantic_input", ["understanding", "understanding_i2t"]]},
}
"""


def test_a_protocol_is_registered_once_and_void_when_the_file_changes(sweep_file, tmp_path, capsys):
    sweep_file.write_text(sweep_file.read_text() + PROTOCOL)
    flag, workdir = f"{sweep_file}:smoke", tmp_path / "w"
    workdir.mkdir()
    preregistration.register(flag, sweep_plan.plan_file(flag), workdir)
    first = claims.read_protocol(workdir / "protocol.json")
    assert first.protocol == sweep_plan.protocol_of(flag, sweep_plan.plan_file(flag)) and not first.voided
    assert first.about["commit"].startswith("unknown") and len(first.about["digest"]) == 16
    sweep_file.write_text(sweep_file.read_text().replace("0.01", "0.02"))
    preregistration.register(flag, sweep_plan.plan_file(flag), workdir)
    assert claims.read_protocol(workdir / "protocol.json").protocol.margin == 0.02, "nothing had run yet"
    (workdir / "runs" / "understanding-0-abc").mkdir(parents=True)
    other_plan = workdir.parent / "other"
    shutil.copytree(workdir, other_plan)
    preregistration.register(flag, sweep_plan.plan_file(flag.replace("smoke", "scenes")), other_plan)
    assert claims.read_protocol(other_plan / "protocol.json").voided, "the same file, but other seeds and steps"
    capsys.readouterr()
    preregistration.register(flag, sweep_plan.plan_file(flag), workdir)
    assert not claims.read_protocol(workdir / "protocol.json").voided
    sweep_file.write_text(sweep_file.read_text().replace("0.02", "0.001"))
    preregistration.register(flag, sweep_plan.plan_file(flag), workdir)
    last = claims.read_protocol(workdir / "protocol.json")
    assert last.protocol.margin == 0.02 and "changed after the first run" in last.voided
    assert "VOID: " in capsys.readouterr().out
    table = "arm,seed,metric,value\n" + "".join(
        f"{arm},{seed},answer_nll/scenes,{1 + seed / 10 - (arm[0] == 's')}\n"
        for arm in ("understanding", "understanding_i2t", "semantic_input") for seed in range(8)
    )  # fmt: skip
    (workdir / "results.csv").write_text(table)
    assert main(["verify-claims", f"--results={workdir / 'results.csv'}"]) == 1
    assert "WITHHELD" in capsys.readouterr().out


def test_a_protocol_in_a_repository_names_its_commit(sweep_file, tmp_path):
    def git(*arguments):
        flags = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", *flags, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)

    sweep_file.write_text(sweep_file.read_text() + PROTOCOL)
    (tmp_path / "w").mkdir()
    git("init")
    git("add", "sweep.py")
    git("commit", "-m", "x")
    preregistration.register(str(sweep_file), [], tmp_path / "w")
    head = git("rev-parse", "HEAD").stdout.strip()
    assert claims.read_protocol(tmp_path / "w" / "protocol.json").about["commit"] == head
    sweep_file.write_text(sweep_file.read_text() + "\n")
    preregistration.register(str(sweep_file), [], tmp_path / "w")
    assert claims.read_protocol(tmp_path / "w" / "protocol.json").about["commit"] == f"not committed (HEAD {head})"


def test_runs_from_before_a_protocol_void_it(sweep_file, tmp_path, capsys):
    sweep_file.write_text(sweep_file.read_text() + PROTOCOL)
    (tmp_path / "w" / "runs" / "understanding-0-abc").mkdir(parents=True)
    preregistration.register(str(sweep_file), [], tmp_path / "w")
    assert "registered after the first run" in claims.read_protocol(tmp_path / "w" / "protocol.json").voided
    assert "VOID: " in capsys.readouterr().out
    (tmp_path / "w" / "protocol.json").write_text("{}")
    with pytest.raises(ValueError, match=r"protocol\.json was written by hand"):
        preregistration.register(str(sweep_file), [], tmp_path / "w")


def test_an_arm_has_each_seed_once(sweep_file):
    text = sweep_file.read_text().replace('"seed": seed,', '"seed": seed, "train.num_replicates": 2,')
    sweep_file.write_text(text)
    with pytest.raises(ValueError, match="plans understanding, seed 1 twice; a table has one value"):
        sweep_plan.plan_file(f"{sweep_file}:scenes")


def test_a_short_run_that_tells_places_alone_has_collapsed():
    """The alarm's grace is for runs that go on; a warning is no collapse."""
    thresholds = with_overrides(quickstart.get_config().to_dict(), []).diagnostics
    terms = {"within_spread": {"mean": [0.8, 0.15, 0.8]}, "across_spread": {"mean": [0.02, 0.4, 0.4]}}
    assert [has_collapsed(thresholds, terms, i) for i in range(3)] == [True, False, False]
    assert has_collapsed(thresholds, {"within_spread": {"mean": 0.05}}, None)
    assert not has_collapsed(thresholds, {"within_spread": {"mean": None}}, None) and not has_collapsed(
        thresholds, {}, 0
    )
    assert not collapse_alarms(thresholds, 500, {"within_spread": 1, "across_spread": 0.02, "copy_previous_cosine": 1})


def arms(**by_arm):
    """A planned run for each arm, by its overrides."""
    values = quickstart.get_config().to_dict()
    return [sweep_plan.Planned(arm, with_overrides(values, overrides)) for arm, overrides in by_arm.items()]


def check(matching, **by_arm):
    values = {"metric": "x", "margin": 1.0, "num_seeds": 8, "contrasts": {"b helps": ["b", "a"]}, "matching": matching}
    preregistration.check_matching(arms(**by_arm), claims.parse_protocol(values, "here"))


def test_arms_have_in_common_what_the_protocol_says():
    base = ["objective=understanding"]
    generating = ["objective=semantic_input", "data.sources.generation.text_loss=none"]
    check("data", a=base, b=generating)
    check("none", a=base, b=[*base, "train.num_steps=9"])
    for override, field in (
        ("train.num_steps=9", "train.num_steps"), ("data.seed=1", "data.seed"),
        ("data.sources.qa.weight=0.1", "data.sources.qa.weight"),
        ("scene_world.num_scenes=9", "scene_world.num_scenes"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"differ in {field}"):
            check("data", a=base, b=[*base, override])
    check("data", a=base, b=[*base, "seed=1", "train.num_steps=9"])  # another seed's
    check("data", a=base, c=[*base, "train.num_steps=9"])  # no contrast compares them
    with pytest.raises(ValueError, match=r"has \S+ flops, b-0-"):
        check("flops", a=base, b=generating)
    ratio = sweep_plan.run_flops(arms(a=base)[0].config) / sweep_plan.run_flops(arms(a=generating)[0].config)
    fewer = [*generating, f"train.num_steps={round(2000 * ratio)}"]
    check("flops", a=base, b=fewer)
    with pytest.raises(ValueError, match=r"has \S+ parameters, b-0-\S+ \S+: more than 1% apart"):
        check("parameters", a=base, b=generating)
    head = sum(x.size for x in jax.tree.leaves(jax.eval_shape(
        lambda: init_params(arms(a=generating)[0].config.model, "semantic_input", 0)["semantic_head"])))  # fmt: skip
    wider = [*base, f"model.decoder.mlp_dim={384 + round(head / (3 * 3 * 128) / 2) * 2}"]
    check("parameters", a=wider, b=generating)


def test_a_dry_run_says_what_the_planned_seeds_can_show(sweep_file, tmp_path, capsys):
    command = ["sweep", f"--sweep={sweep_file}:smoke", f"--workdir={tmp_path / 'w'}", "--dry-run"]
    pilot = tmp_path / "pilot.csv"
    pilot.write_text("arm,seed,metric,value\n" + "".join(
        f"{arm},{seed},answer_nll/scenes,{0.5 + (seed % 3 + ord(arm[-1])) % 3 / 100}\n"
        for arm in ("understanding", "understanding_i2t") for seed in range(6)
    ))  # fmt: skip
    assert main([*command, f"--pilot={pilot}"]) == 2
    assert "no PROTOCOL" in capsys.readouterr().err
    sweep_file.write_text(sweep_file.read_text() + PROTOCOL)
    assert main(command) == 0 and "unknown without --pilot" in capsys.readouterr().out
    assert main([*command, f"--pilot={pilot}"]) == 0
    assert "smallest detectable difference with 2 seeds and 1 primary contrasts" in capsys.readouterr().out


def test_flags_that_contradict_each_other_are_refused(tmp_path, capsys):
    assert main(["sweep", f"--workdir={tmp_path}"]) == 2
    assert "give --sweep=FILE[:SCALE], or --config=FILE" in capsys.readouterr().err
    assert main(["sweep", "--sweep=nowhere.py", f"--workdir={tmp_path}"]) == 2
    assert "no file nowhere.py" in capsys.readouterr().err


SHIPPED = {
    "claim1_semantics_not_pixels": {
        "smoke": 8, "pilot": 2 * 2, "scenes": 8, "scenes-trainable": 8, "scenes-scratch": 8,
        "accelerator": 8 * (3 + 3 * 15 + 3 * 2 + 2 * 2),
    },
    "claim2_pool": {"smoke": 9, "scenes": 12, "accelerator": 8 * 24},
    "claim2_fresh": {"smoke": 12, "scenes": 15, "accelerator": 8 * 21},
    "claim3_target_space": {"smoke": 7, "scenes": 7, "accelerator": 56},
    "connectors": {"smoke": 12, "scenes": 12, "accelerator": 96},
    "mixture": {"smoke": 11, "scenes": 11, "accelerator": 88},
    "model_scaling": {"smoke": 10, "scenes": 30, "accelerator": 240},
    "split_branch": {"smoke": 5, "scenes": 5, "accelerator": 40},
    "tuning": {"smoke": 36, "scenes": 36, "accelerator": 72},
    "unified_vs_separate": {"smoke": 6, "scenes": 6, "accelerator": 48},
}  # fmt: skip


def check_can_train(one):
    """What predicts images is given some, and a course of shares is longer than a few windows."""
    config = one.config
    drawn = [source for source in config.data.sources.values() if source.weight > 1e-6]
    if visual_target(config.objective) or pixel_role(config.objective):
        assert any(source.path.endswith("generation") for source in drawn), one.name
    if any(source.weight_schedule for source in config.data.sources.values()):
        windows = config.data.planned_draws / config.data.num_data_shards / config.data.window_size
        assert windows >= 10 or config.train.num_steps < 100, one.name


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_sweeps_plan_runs_that_are_valid_match_and_can_be_judged(name):
    path = f"experiments/sweeps/{name}.py"
    num_seeds = {"smoke": 1, "pilot": 16, "scenes": 8, "accelerator": 64}
    num_seeds |= {"scenes": 2, "accelerator": 16} if name == "tuning" else {}
    for scale, num_runs in SHIPPED[name].items():
        planned = sweep_plan.plan_file(f"{path}:{scale}")
        assert len(planned) == num_runs and len({one.name for one in planned}) == num_runs, scale
        protocol = sweep_plan.protocol_of(path, planned)
        assert protocol is not None
        assert protocol.num_seeds == num_seeds[scale.partition("-")[0]]
        preregistration.check_matching(planned, protocol)
        for one in planned:
            check_can_train(one)
        assert len(sweep.override_lines(planned, load_experiment(sweep_plan.base_of(path)), Path("runs"))) == num_runs
        in_contrasts = {one for arm, baselines in protocol.contrasts.values() for one in (arm, *baselines)}
        assert scale == "pilot" or in_contrasts <= {one.arm for one in planned}, scale
    with pytest.raises(ValueError, match="there are smoke"):
        sweep_plan.plan_file(f"{path}:moon")
