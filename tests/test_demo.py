"""The demo's path in miniature: train, evaluate, roll out, caption, draw, export; and what a finished run leaves."""

import json
import types
from pathlib import Path

import pytest
from PIL import Image

from experiments import demo, demo_images, scene_drawings
from unihetero_jax import cli, train_run

KINDS = {"color", "shape", "location", "count", "relation", "existence"}


@pytest.fixture(scope="module")
def finished(tiny_experiment, tiny_world, tmp_path_factory):
    """A demo of two steps: (workdir, summary, what it printed)."""
    config = tiny_experiment(
        train__num_steps=2, eval__rollout_source="generation", eval__rollout_candidates=8,
        eval__benchmarks={name: str(tiny_world / f"{file}.tsv") for name, file in (
            ("scenes", "questions"), ("scenes_heldout", "questions_heldout"))},
    )  # fmt: skip
    workdir = tmp_path_factory.mktemp("demo") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scene_drawings, "BANK_SCENES", 40)
        yield workdir, demo.run_demo(config, workdir), config


def test_the_summary_has_the_keys_that_scripts_rely_on(finished):
    workdir, summary, _ = finished
    assert json.loads((workdir / "summary.json").read_text()) == summary
    assert summary["accuracy"].keys() == {"overall", *KINDS}
    assert summary["accuracy_heldout"].keys() == {"overall", *KINDS - {"count"}}, "counting has no pair to hold out"
    assert summary["wall_s"] > 0 and 0 < summary["peak_rss_gib"] < 24
    assert summary["rollout"]["num_candidates"] == 8 and summary["rollout"]["chance"] == 1 / 8


def test_summary_and_result_files_agree(finished):
    workdir, summary, _ = finished
    result = json.loads((workdir / "eval" / "scenes-2.json").read_text())
    assert summary["accuracy"]["overall"] == result["overall"]["accuracy"]
    right = list(result["items"].values())
    assert result["overall"]["accuracy"] == pytest.approx(sum(right) / len(right))
    for name in ("prompt_template", "scorer", "data_hash", "config_hash", "image_transform"):
        assert result[name], name
    rollout = json.loads((workdir / "eval" / "rollout-2.json").read_text())
    assert (
        rollout["config_hash"] == result["config_hash"] and rollout["data_hash"] and rollout["source"] == "generation"
    )


def test_rollouts_are_judged_by_position(finished, capsys, refused):
    """In the space of its own encoder here: what counts is that all that was measured is written and drawn."""
    workdir, _, _ = finished
    command = ["evaluate", f"--workdir={workdir}", "--benchmarks=scenes", f"--rollout-judge={workdir}"]
    assert cli.main(command) == 0
    assert "found among 8 by all positions" in capsys.readouterr().out
    found = json.loads((workdir / "eval" / "rollout-error-2.json").read_text())
    assert set(found["overall"]) == set(found["curves"]) == {
        "floor", "free_running", "teacher_0.25", "teacher_0.5", "teacher_0.75", "teacher_forced", "mean_embedding",
        "copy_previous",
    }  # fmt: skip
    assert all(len(curve) == 9 for curve in found["curves"].values()) and len(found["judge"]) == 12
    assert found["curves"]["free_running"][0] == pytest.approx(found["curves"]["teacher_forced"][0], rel=1e-4)
    assert found["overall"]["mean_embedding"][0] > 0.9, "the mean explains nothing"
    assert found["num_images"] == 8 <= found["num_fit_images"] and found["objective"] == "semantic_input"
    assert found["attributes"].keys() == {"nearest blocks", "another image"}, "it draws no pixels of its own"
    assert found["attributes"]["nearest blocks"]["share"].keys() == {"there", "color", "shape", "size"}
    assert (workdir / "eval" / "rollout-error-2.png").stat().st_size > 5000
    assert "no run here" in refused(*command[:-1], f"--rollout-judge={workdir / 'nowhere'}")


def test_an_untrained_model_sets_the_retrieval_alarm_off(finished, capsys):
    """Two steps teach nothing: with an alarm at 1 the rollout must raise it, with one at 0 it must not."""
    workdir, _, _ = finished
    for threshold, alarms in (("1.1", ["rollout_retrieval"]), ("0.0", [])):
        flags = ["evaluate", f"--workdir={workdir}", "--rollout", "--benchmarks=scenes"]
        assert cli.main([*flags, f"--config.diagnostics.retrieval_alarm={threshold}"]) == 0
        assert ("ALARM: rollout retrieval" in capsys.readouterr().out) == bool(alarms)
        assert json.loads((workdir / "eval" / "rollout-2.json").read_text())["alarms"] == alarms


def test_overrides_of_an_evaluation_keep_the_runs_identity(finished):
    workdir, _, _ = finished
    trained = json.loads((workdir / "eval" / "scenes-2.json").read_text())
    flags = ["evaluate", f"--workdir={workdir}", "--benchmarks=scenes", "--config.eval.batch_rows=8"]
    assert cli.main(flags) == 0
    again = json.loads((workdir / "eval" / "scenes-2.json").read_text())
    assert again["config_hash"] == trained["config_hash"]
    assert again["predictions"] == trained["predictions"]


def test_the_sheet_is_a_picture_with_content(finished):
    workdir, _, _ = finished
    picture = Image.open(workdir / "sheet.png").convert("RGB")
    assert min(picture.size) > 300 and len(picture.getcolors(2**20)) > 50


def test_scenes_imagined_for_captions_are_drawn_and_read(finished):
    """Blocks come from true scenes, so whatever an untrained model imagines is objects of the world."""
    workdir, summary, _ = finished
    assert summary["drawn"].keys() == {"object", "color", "shape", "size", "count", "scene"}
    assert all(0 <= share <= 1 for share in summary["drawn"].values())
    picture = Image.open(workdir / "rollouts.png").convert("RGB")
    assert min(picture.size) > 300 and len(picture.getcolors(2**20)) > 50


@pytest.mark.slow
def test_images_of_a_renderer_are_drawn_and_read(tiny_experiment, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_images, "NUM_SCENES", 9)
    monkeypatch.setattr(demo_images, "KEPT_EVERY", 1)
    monkeypatch.setattr(scene_drawings, "BANK_SCENES", 40)
    config = tiny_experiment(
        objective="unihetero", train__num_steps=2, checkpoint__every_steps=1, drawing__steps=2,
        model__pixel_decoder__num_layers=1,
    )  # fmt: skip
    train_run.run_training(config, str(tmp_path))
    found = demo_images.draw(tmp_path)
    assert set(found["true pictures (the reader's accuracy)"].shares.values()) == {1.0}
    assert "drawn from captions" in capsys.readouterr().out
    stored = json.loads((tmp_path / "images.json").read_text())
    assert stored["step"] == 2 and stored["fidelity"].keys() == found.keys()
    controls = {name for name in found if "named" in name}
    assert controls == {
        "drawn from partial captions: named", "drawn from partial captions: unnamed",
        "nearest blocks, partial: named", "nearest blocks, partial: unnamed", "drawn from captions: those named",
        "another scene's picture: unnamed",
    }  # fmt: skip
    named = {found[name].num_objects for name in controls if "unnamed" not in name}
    unnamed = {found[name].num_objects for name in controls if "unnamed" in name}
    assert len(named) == len(unnamed) == 1 and min(named | unnamed) > 0, "the same objects each time"
    assert stored["answers"].keys() == {
        "true embeddings", "rolled out from captions", "mean embedding", "another scene's rollout",
    }  # fmt: skip
    for name, rows in (("images", 8), ("training", 3)):
        with Image.open(tmp_path / f"{name}.png") as sheet:
            assert rows * 240 <= sheet.height < (rows + 1) * 240, "a row is 240 high, and more where its label breaks"


def test_a_finished_demo_started_again_keeps_its_clock(finished):
    workdir, summary, config = finished
    again = demo.run_demo(config, workdir)
    assert abs(again["wall_s"] - summary["wall_s"]) < 1 and again["accuracy"] == summary["accuracy"]


def test_an_export_stands_alone(finished, tmp_path, capsys, monkeypatch):
    workdir, summary, _ = finished
    with pytest.raises(ValueError, match="give a relative one"):
        demo.export(workdir, tmp_path / "export")
    made_in, moved_to = tmp_path / "here", tmp_path / "there"
    made_in.mkdir()
    monkeypatch.chdir(made_in)
    demo.export(workdir, Path("export"))
    with pytest.raises(ValueError, match="exists"):
        demo.export(workdir, Path("export"))
    made_in.rename(moved_to)
    monkeypatch.chdir(moved_to)
    assert cli.main(["evaluate", "--workdir=export", "--benchmarks=scenes"]) == 0
    result = json.loads(Path("export/eval/scenes-2.json").read_text())
    assert result["overall"]["accuracy"] == summary["accuracy"]["overall"]
    tokenizer = Path("export/tokenizer/tokenizer.json")
    tokenizer.write_text(tokenizer.read_text() + " ")
    assert cli.main(["evaluate", "--workdir=export", "--benchmarks=scenes"]) == 2
    assert "holds another tokenizer" in capsys.readouterr().err


def test_the_comparison_puts_objectives_side_by_side():
    accuracy = {"overall": 0.5, "color": 0.25}
    table = demo.comparison({"a": {"accuracy": accuracy}, "b": {"accuracy": accuracy | {"color": 1.0}}})
    assert [line.split() for line in table.splitlines()][2] == ["color", "0.250", "1.000"]


def test_what_the_evaluation_lacks_is_said_before_training(tiny_experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(train_run, "train", lambda *_: pytest.fail("training began"))
    with pytest.raises(ValueError, match=r"missing\.tsv"):
        missing = tiny_experiment(eval__benchmarks={"a": str(tmp_path / "missing.tsv")})
        train_run.run_training(missing, str(tmp_path / "run"))
    too_many = tiny_experiment(eval__rollout_source="generation", eval__rollout_candidates=100_000)
    with pytest.raises(ValueError, match=r"validation records of generation ask for one image, eval.rollout_candid"):
        train_run.run_training(too_many, str(tmp_path / "run"))


def test_summary_keys_do_not_depend_on_the_objective(finished):
    """`objective=understanding` draws nothing: `rollout` and `drawn` are null, not absent."""
    workdir, summary, _ = finished
    (workdir / "eval" / "rollout-2.json").unlink()
    config = types.SimpleNamespace(objective="understanding", train=types.SimpleNamespace(num_steps=2))
    again = demo.summarise(config, workdir, 1.0, None)
    assert again["rollout"] is None and again.keys() == summary.keys()
