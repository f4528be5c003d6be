"""The commands as a user meets them: what they say, what they return, and that no mistake ends in a traceback."""

import io
import json
import math
import os
import types

import jax
import jax.numpy as jnp
import pytest
from conftest import make_tiny_config
from PIL import Image

from unihetero_jax import evaluate_run, train_run
from unihetero_jax.checkpoint import list_steps
from unihetero_jax.cli import main
from unihetero_jax.evaluate_run import choose_steps
from unihetero_jax.evaluation import runner
from unihetero_jax.inference import generate
from unihetero_jax.loaded_run import fingerprint
from unihetero_jax.metrics import read_metrics
from unihetero_jax.workdir import RunLock


@pytest.fixture(scope="module")
def experiment():
    return "--config=experiments/quickstart.py"


@pytest.fixture(scope="module")
def trained(program, tiny_flags, tmp_path_factory):
    """(workdir, output) of `train` for a single step, in a process of its own, on a scene world that is missing."""
    folder = tmp_path_factory.mktemp("cli")
    world = folder / "made" / "world"
    changes = {
        "train__num_steps": 1, "scene_world__path": world, "scene_world__num_scenes": 40,
        "data__tokenizer": world / "tokenizer", "data__sources__qa__path": world / "qa",
        "data__sources__generation__path": world / "generation",
    }  # fmt: skip
    workdir = folder / "runs" / "first"
    finished = program.run([
        "train", "--config=experiments/quickstart.py", f"--workdir={workdir}", *tiny_flags(**changes)
    ])  # fmt: skip
    assert finished.code == 0, finished.output
    return workdir, finished.output


@pytest.fixture(autouse=True)
def at_the_root(repo_root, monkeypatch):
    monkeypatch.chdir(repo_root)


def test_one_step_makes_a_world_a_checkpoint_and_a_validation(trained):
    workdir, output = trained
    assert "world is missing: generating 40 easy scenes" in output
    assert "gradient table of objective semantic_input" in output and "semantic_head" in output
    assert "Total:" in output, "the overview of parameters"
    assert list_steps(workdir) == [1]
    (line,) = read_metrics(workdir)
    assert line["step"] == 1 and line["eval_loss"].keys() == {"qa", "generation"}
    assert not list((workdir.parent.parent / "made").glob("*.partial*"))


def test_a_scene_world_has_the_seed_that_is_asked_for(tmp_path, tiny_experiment):
    changes = {"scene_world__path": str(tmp_path / "world"), "scene_world__num_scenes": 4, "scene_world__seed": 9}
    train_run.make_scene_world(tiny_experiment(**changes))
    assert json.loads((tmp_path / "world" / "manifest.json").read_text())["seed"] == 9


def test_evaluate_writes_results_and_prints_them(trained, tiny_world, capsys):
    workdir, _ = trained
    assert main(["evaluate", f"--workdir={workdir}", f"--benchmarks={tiny_world / 'questions.tsv'}"]) == 0
    printed = capsys.readouterr().out
    assert "question type" in printed and "overall" in printed and "existence" in printed
    result = json.loads((workdir / "eval" / "questions-1.json").read_text())
    assert result["step"] == 1 and result["overall"]["num_items"] == 18 and len(result["items"]) == 18
    assert {"prompt_template", "scorer", "data_hash", "config_hash"} <= result.keys()
    assert 0 <= result["overall"]["accuracy"] <= 1


@pytest.mark.parametrize("mode", ["letters", "generation", "words"])
def test_the_other_modes_have_files_of_their_own(trained, tiny_world, capsys, mode):
    workdir, _ = trained
    flags = [f"--benchmarks={tiny_world / 'questions.tsv'}", f"--mode={mode}", "--steps=all", "--max-new-tokens=4"]
    assert main(["evaluate", f"--workdir={workdir}", *flags]) == 0
    result = json.loads((workdir / "eval" / f"questions-{mode}-1.json").read_text())
    assert result["mode"] == mode and len(result["items"]) == 18
    assert ("OPTIONS" in result["prompt_template"].upper()) == (mode != "words")
    assert mode == "letters" or "VLMEvalKit" in result["rule"]
    assert "overall" in capsys.readouterr().out


def test_a_finished_job_is_not_computed_again(trained, tiny_world, monkeypatch, capsys):
    workdir, _ = trained
    command = ["evaluate", f"--workdir={workdir}", f"--benchmarks={tiny_world / 'questions.tsv'}"]
    assert main(command) == 0
    monkeypatch.setattr(runner, "score_items", None)
    assert main(command) == 0, "another computation would have failed"
    page = (workdir / "eval" / "index.html").read_text()
    for words in ("questions", "overall", "Most confident wrong answers", "data:image/png;base64,", "likelihood"):
        assert words in page
    assert "page: " in capsys.readouterr().out


def test_held_out_text_has_the_likelihood_that_validation_found(trained, tiny_world, capsys):
    workdir, _ = trained
    flags = [f"--benchmarks={tiny_world / 'questions.tsv'}", "--held-out"]
    assert main(["evaluate", f"--workdir={workdir}", *flags]) == 0
    found = json.loads((workdir / "eval" / "held-out-1.json").read_text())["sources"]
    (line,) = read_metrics(workdir)
    for name, losses in line["eval_loss"].items():
        assert found[name]["nll_per_token"] == pytest.approx(losses["text"], abs=1e-5)
        assert found[name]["perplexity"] == pytest.approx(math.exp(losses["text"]), rel=1e-4)
        assert 0 < found[name]["standard_error"] < 1
    assert "held-out text of qa" in capsys.readouterr().out


def test_eight_devices_answer_as_one(trained, tiny_world):
    workdir, _ = trained
    found = []
    eight = ["mesh.data=2", "mesh.fsdp=4", "eval.batch_rows=8", "train.global_batch_rows=8"]
    for mesh in ([], [f"--config.{field}" for field in eight]):
        for path in (workdir / "eval").glob("questions-1*"):
            path.unlink()
        flags = [f"--benchmarks={tiny_world / 'questions.tsv'}", "--without-image", *mesh]
        assert main(["evaluate", f"--workdir={workdir}", *flags]) == 0
        result = json.loads((workdir / "eval" / "questions-1.json").read_text())
        lines = (workdir / "eval" / "questions-1.jsonl").read_text().splitlines()[1:]
        found.append((result["items"], [x for line in lines for x in json.loads(line)["log_probs"]]))
    assert found[0][0] == found[1][0] and found[0][1] == pytest.approx(found[1][1], abs=1e-4)


@pytest.mark.slow
def test_eight_devices_say_what_one_says(trained, tiny_world, monkeypatch):
    """Each holds its rows of a batch; the last batch has fewer prompts than rows."""
    workdir, _ = trained
    texts, batches = [], []
    plain = generate.to_global
    monkeypatch.setattr(generate, "to_global", lambda *args: batches.append(plain(*args)) or batches[-1])
    eight = ["mesh.data=2", "mesh.fsdp=4", "eval.batch_rows=8", "train.global_batch_rows=8"]
    for mesh in ([], [f"--config.{field}" for field in eight]):
        for path in (workdir / "eval").glob("questions-words-1*"):
            path.unlink()
        flags = [f"--benchmarks={tiny_world / 'questions.tsv'}", "--mode=words", "--max-new-tokens=6", *mesh]
        assert main(["evaluate", f"--workdir={workdir}", *flags]) == 0
        lines = (workdir / "eval" / "questions-words-1.jsonl").read_text().splitlines()[1:]
        texts.append([json.loads(line)["text"] for line in lines])
    assert texts[0] == texts[1] and len(set(texts[0])) > 1
    assert {shard.data.shape[0] for shard in batches[-1].tokens.addressable_shards} == {1}


def test_watching_a_finished_run_evaluates_each_step_and_ends(trained, tiny_world, capsys):
    workdir, _ = trained
    flags = [f"--benchmarks={tiny_world / 'questions.tsv'}", "--watch=0.05"]
    assert main(["evaluate", f"--workdir={workdir}", *flags]) == 0
    assert capsys.readouterr().out.count("questions  (step 1;") == 1


def test_parameters_have_a_fingerprint():
    params = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(4, jnp.bfloat16)}
    assert fingerprint(params) == fingerprint(jax.tree.map(jnp.copy, params))
    changed = params | {"a": params["a"].at[0, 0].set(1e-30)}
    assert fingerprint(changed) != fingerprint(params)


def test_watching_takes_steps_as_they_come_and_counts_those_that_went(monkeypatch, capsys):
    seen = iter([[10], [10], [10, 20, 25], [10, 20, 30], [20, 30]])
    evaluated, now = [], []

    def look(workdir):
        now[:] = next(seen, now)
        return now

    def evaluate_step(flags, overrides, step):
        if step == 25:
            raise ValueError("no complete checkpoint of step 25")
        evaluated.append(step)
        return types.SimpleNamespace(config=types.SimpleNamespace(train=types.SimpleNamespace(num_steps=30)))

    monkeypatch.setattr(evaluate_run, "list_steps", look)
    monkeypatch.setattr(evaluate_run, "_evaluate_step", evaluate_step)
    assert main(["evaluate", "--workdir=x", "--watch=0.001"]) == 0
    assert evaluated == [10, 20, 30]
    assert "step 25 was removed before it could be evaluated" in capsys.readouterr().out


def test_training_can_be_interrupted_by_evaluations(monkeypatch):
    """`eval.every_steps`: between the first step and the last, which has an evaluation of its own."""
    evaluated, hooks = [], []
    monkeypatch.setattr(train_run, "agree_on_run", lambda *_: None)
    monkeypatch.setattr(train_run, "prepare_workdir", lambda *_: None)
    monkeypatch.setattr(train_run, "check_evaluation", lambda *_: None)
    monkeypatch.setattr(train_run, "evaluate_state", lambda config, workdir, state, step: evaluated.append(step))
    monkeypatch.setattr(train_run, "train", lambda config, workdir, given, *_: hooks.extend(given))
    train_run.run_training(make_tiny_config(eval__every_steps=2, train__num_steps=6), "x")
    for step in range(1, 7):
        for hook in hooks:
            hook(step, None)
    assert evaluated == [2, 4]


def test_steps_are_chosen_by_name(trained, tmp_path, refused):
    workdir, _ = trained
    assert choose_steps(str(workdir), "last") == [-1] and choose_steps(str(workdir), "all") == [1]
    assert choose_steps(str(workdir), "best") == [1] and choose_steps(str(workdir), "3,7") == [3, 7]
    assert "give last, best, all, or steps" in refused("evaluate", f"--workdir={workdir}", "--steps=newest")
    assert "no complete checkpoint of step 7" in refused("evaluate", f"--workdir={workdir}", "--steps=7")
    assert "no run here" in refused("evaluate", f"--workdir={tmp_path}", "--steps=all")


def test_the_best_step_has_the_least_validation_loss(monkeypatch):
    lines = [{"step": step, "eval_loss": {"qa": {"text": loss}, "pair": {"text": 1.0}}} for step, loss in
             ((10, 3.0), (20, 1.0), (30, 2.0))]  # fmt: skip
    monkeypatch.setattr(evaluate_run, "read_metrics", lambda workdir: [*lines, {"step": 40}])
    monkeypatch.setattr(evaluate_run, "list_steps", lambda workdir: [10, 30, 40])
    assert choose_steps("x", "best") == [30], "step 20 is no longer there, step 40 was not validated"
    monkeypatch.setattr(evaluate_run, "list_steps", lambda workdir: [40])
    with pytest.raises(ValueError, match="no stored step of x was validated"):
        choose_steps("x", "best")


def test_generate_with_an_image(trained, tmp_path, capsys):
    workdir, _ = trained
    buffer = io.BytesIO()
    Image.new("RGB", (48, 48), "red").save(buffer, "PNG")
    (tmp_path / "red.png").write_bytes(buffer.getvalue())
    command = ["generate", f"--workdir={workdir}", f"--image={tmp_path / 'red.png'}", "--prompt=Describe the scene."]
    printed = []
    for _ in range(2):
        assert main([*command, "--max-new-tokens=4"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and printed[0].endswith("\n"), "greedy, so always the same"


def test_generate_refuses_bad_input(trained, tmp_path, refused):
    workdir, _ = trained
    run = f"--workdir={workdir}"
    assert "nowhere.png: no such file" in refused("generate", run, "--image=nowhere.png", "--prompt=a")
    (tmp_path / "page.png").write_bytes(b"<html>")
    assert "not_an_image" in refused("generate", run, f"--image={tmp_path / 'page.png'}", "--prompt=a")
    (tmp_path / "empty.png").write_bytes(b"")
    refused("generate", run, f"--image={tmp_path / 'empty.png'}", "--prompt=a")
    assert "nothing to continue" in refused("generate", run, "--prompt= ")
    assert "max_new_tokens 0" in refused("generate", run, "--prompt=a", "--max-new-tokens=0")
    assert "--top-p" in refused("generate", run, "--prompt=a", "--top-p=much")
    refused("generate", run, "--prompt=\udcff broken")
    assert "replicates 0 to 0" in refused("generate", run, "--prompt=a", "--replicate=1")
    assert "no complete checkpoint of step 7; there are [1]" in refused("generate", run, "--prompt=a", "--step=7")


def test_evaluate_refuses_bad_input(trained, tmp_path, refused):
    workdir, _ = trained
    run = f"--workdir={workdir}"
    assert "unknown benchmark 'scene'" in refused("evaluate", run, "--benchmarks=scene")
    assert "gone.tsv" in refused("evaluate", run, "--benchmarks=gone.tsv")
    (tmp_path / "bad.tsv").write_text("no\tcolumns\n1\t2\n")
    assert "bad.tsv" in refused("evaluate", run, f"--benchmarks={tmp_path / 'bad.tsv'}")
    message = refused("evaluate", run, "--config.eval.batch_row=3")
    assert "eval.batch_row: unknown field; did you mean eval.batch_rows?" in message


@pytest.mark.parametrize("command", [("evaluate",), ("generate", "--prompt=a")])
def test_a_folder_without_a_run_is_named(command, tmp_path, refused):
    for path in (tmp_path, tmp_path / "missing"):
        assert f"{path}: no run here" in refused(*command, f"--workdir={path}")


def test_unknown_commands_and_flags(experiment, refused):
    assert "trian" in refused("trian")
    assert "train|evaluate|score|compare|generate" in refused()
    assert "--workdir" in refused("train", experiment)
    message = refused("train", experiment, "--workdir=w", "--confg.seed=1", "--wrkdir=x", "stray")
    assert "--confg.seed: unknown flag" in message and "--wrkdir: unknown flag; did you mean --workdir?" in message
    assert "'stray': unexpected argument" in message
    assert not os.path.exists("w")


def test_config_files_are_checked(tmp_path, refused):
    message = refused("train", "--config=experiments/quikstart.py", f"--workdir={tmp_path}")
    assert "no file experiments/quikstart.py; did you mean experiments/quickstart.py" in message
    (tmp_path / "broken.py").write_text("def get_config(:\n")
    assert "broken.py" in refused("train", f"--config={tmp_path / 'broken.py'}", f"--workdir={tmp_path}")
    assert "takes no argument" in refused("train", "--config=experiments/quickstart.py:x", f"--workdir={tmp_path}")


def test_fields_are_checked_all_at_once(experiment, tmp_path, refused):
    message = refused(
        "train", experiment, f"--workdir={tmp_path / 'w'}", "--config.train.num_stepz=5", "--config.modle.x=1",
        "--config.train.log_every_steps=often", "--config.objective=semantic_inputs", "--config.seed=1.5",
        "--config.optimizer.frozen=encoder,decodr",
    )  # fmt: skip
    for expected in (
        "train.num_stepz: unknown field; did you mean train.num_steps?",
        "modle.x: unknown field; did you mean model.x?",
        "train.log_every_steps: expected int, got 'often' (str)",
        "objective: 'semantic_inputs' is none of",
        "seed: expected int, got 1.5 (float)",
        "optimizer.frozen[1]: 'decodr' is none of",
    ):
        assert expected in message, message
    assert not (tmp_path / "w").exists(), "nothing is made before the configuration holds"


def test_all_invalid_combinations_are_listed(experiment, tmp_path, refused):
    message = refused(
        "train", experiment, f"--workdir={tmp_path / 'w'}", "--config.model.encoder.num_heads=5",
        "--config.train.num_steps=0", "--config.data.row_patches=7", "--config.data.sources.qa.weight=0",
        "--config.mesh.context=5000", "--config.loss.target_norm=l2", "--config.train.accumulation_steps=3",
    )  # fmt: skip
    for field in (
        "model.encoder.num_heads 5", "train.num_steps 0", "data.row_patches 7", "data.sources.qa.weight 0.0",
        "mesh.context 5000", "loss.target_norm", "train.accumulation_steps",
    ):  # fmt: skip
        assert field in message, message
    assert message.count("\n  - ") >= 7


def test_missing_data_is_named(experiment, tmp_path, tiny_flags, refused):
    flags = tiny_flags(scene_world__level="none", data__sources__qa__path=tmp_path / "nowhere")
    message = refused("train", experiment, f"--workdir={tmp_path / 'w'}", *flags)
    assert f"data.sources.qa.path: folder {tmp_path / 'nowhere'} does not exist" in message
    flags = tiny_flags(data__tokenizer=tmp_path / "no-tokenizer")
    assert "data.tokenizer: " in refused("train", experiment, f"--workdir={tmp_path / 'w'}", *flags)
    assert "another scene world" in refused(
        "train", experiment, f"--workdir={tmp_path / 'w'}", *tiny_flags(scene_world__num_scenes=7)
    )
    assert "vocab_size 128" in refused(
        "train", experiment, f"--workdir={tmp_path / 'w'}", *tiny_flags(model__decoder__vocab_size=128)
    )


def test_a_workdir_in_use_is_refused(experiment, tmp_path, tiny_flags, refused):
    with RunLock(tmp_path):
        message = refused("train", experiment, f"--workdir={tmp_path}", *tiny_flags())
    assert "in use by another run" in message and f"pid {os.getpid()}" in message
    assert not (tmp_path / "checkpoints").exists()


def test_a_workdir_that_cannot_be_written_is_refused_at_once(experiment, tmp_path, tiny_flags, refused):
    """Before the scene world is made, which takes a minute for the quickstart."""
    (tmp_path / "file").write_text("")
    world = tmp_path / "world"
    flags = tiny_flags(scene_world__path=world)
    assert "cannot write there" in refused("train", experiment, f"--workdir={tmp_path / 'file' / 'run'}", *flags)
    if os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o555)
        assert "cannot write there" in refused("train", experiment, f"--workdir={tmp_path / 'locked'}", *flags)
    assert not world.exists()


def test_a_checkpoint_of_another_config_is_refused(trained, experiment, tiny_flags, refused):
    workdir, _ = trained
    stored = json.loads((workdir / "config.json").read_text())
    before = sorted(str(path) for path in workdir.rglob("*") if path.name != "gradient_table.json")
    message = refused(
        "train", experiment, f"--workdir={workdir}",
        *tiny_flags(
            data__sources__qa__path=stored["data"]["sources"]["qa"]["path"],
            data__sources__generation__path=stored["data"]["sources"]["generation"]["path"],
            data__tokenizer=stored["data"]["tokenizer"],
            scene_world__path=stored["scene_world"]["path"], scene_world__num_scenes=40,
            data__seed=3, loss__ema_decay=0.5, train__num_steps=2,
        ),
    )  # fmt: skip
    assert "was written with another config" in message
    assert "data.seed: 0 -> 3" in message and "loss.ema_decay: 0.99 -> 0.5" in message
    assert message.count("\n  - ") == 2, "num_steps may change"
    assert sorted(str(path) for path in workdir.rglob("*") if path.name != "gradient_table.json") == before
    assert json.loads((workdir / "config.json").read_text()) == stored
