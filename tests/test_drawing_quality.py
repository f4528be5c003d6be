"""Drawings as a set beside true images: figures that are known, what the command writes, and what it refuses."""

import json

import jax
import numpy as np
import pytest
from conftest import make_tiny_config
from PIL import Image

from unihetero_jax import cli, evaluate_run
from unihetero_jax.evaluation import drawing_quality as instrument
from unihetero_jax.evaluation.diagnostics import drawing_prompts, image_of, samples_of, stored_drawn_records
from unihetero_jax.evaluation.image_distance import compare_images
from unihetero_jax.evaluation.rollout_error import Judge
from unihetero_jax.inference.rollout import rollout
from unihetero_jax.loaded_run import load_run
from unihetero_jax.train import train

NUMBER = 90


@pytest.fixture(scope="module")
def renderer(tiny_experiment, tiny_world, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("renderer") / "run"
    config = tiny_experiment(
        objective="unihetero", train__num_steps=2, model__pixel_decoder__num_layers=1, drawing__steps=2,
        eval__rollout_source="generation", eval__benchmarks={"scenes": str(tiny_world / "questions.tsv")},
    )  # fmt: skip
    train(config, workdir)
    return workdir


@pytest.fixture(scope="module")
def measured(renderer):
    """(the run, its figures and pictures)."""
    run = load_run(str(renderer), -1, 0)
    return run, *instrument.drawing_quality(run.config, run.params, run.tokenizer, NUMBER)


@pytest.mark.slow
def test_a_perfect_generator_has_the_floors_figures_and_a_poor_one_is_far_off(measured):
    run, result, pictures = measured
    judge = Judge(run.config, run.params, run.tokenizer)
    true, captioned, drawn = (judge.features(pictures[name]).mean(axis=1) for name in ("true", "captioned", "drawn"))
    assert compare_images(true, captioned) == pytest.approx(result["floor"])
    assert compare_images(true, drawn) == pytest.approx({name: result[name] for name in result["floor"]})
    floor = result["floor"]
    assert floor["precision"] > 0.7 and floor["recall"] > 0.7
    for found in (result, *result["ceiling"].values()):
        assert found["frechet_distance"] > 2 * floor["frechet_distance"], "two steps teach nobody to draw"
    assert result["ceiling"]["mean picture"]["recall"] == 0.0
    assert result["num_features"] == true.shape[1] and result["encoder_digest"] == judge.digest


@pytest.mark.slow
def test_pictures_belong_to_their_captions(measured, monkeypatch):
    """Drawn in parts, they are those of all at one time, in the captions' order; the true images are all different."""
    run, _, pictures = measured
    monkeypatch.setattr(instrument, "pictures_of", lambda config, params, rolled, *_: list(rolled.embeddings))
    stored = stored_drawn_records(run.config, run.tokenizer, 2 * NUMBER)
    samples = samples_of(run.config, run.tokenizer, stored)
    in_parts = instrument._draw(run.config, run.params, run.tokenizer, samples[:NUMBER], (3, 3))
    prompts = drawing_prompts(run.config, run.tokenizer, samples[:NUMBER])
    whole = rollout(run.config, run.params, prompts, 9, jax.random.key(0)).embeddings
    # Batches of other sizes are summed in another order, and nine steps carry it on: 2e-5 was seen on one processor.
    np.testing.assert_allclose(np.stack(in_parts), whole, atol=1e-4)
    assert np.abs(np.diff(whole, axis=0)).max() > 1e-3, "captions say different things"
    for name, part in (("captioned", samples[:NUMBER]), ("true", samples[NUMBER:])):
        for picture, sample in zip(pictures[name], part, strict=True):
            np.testing.assert_array_equal(picture, image_of(sample))
    assert len({picture.tobytes() for name in ("captioned", "true") for picture in pictures[name]}) == 2 * NUMBER


def test_pictures_that_show_nothing():
    images = [np.full((2, 3, 3), value, np.uint8) for value in (10, 21)]
    images[0][0, 0] = 255
    found = instrument._empty(images)
    assert all((one == found["mean picture"][0]).all() for one in found["mean picture"])
    assert found["mean picture"][0][1, 1, 0] in (15, 16) and found["mean picture"][0][0, 0, 0] == 138
    for image, shuffled in zip(images, found["shuffled pixels"], strict=True):
        assert sorted(map(tuple, image.reshape(-1, 3))) == sorted(map(tuple, shuffled.reshape(-1, 3)))


@pytest.mark.slow
def test_the_command_writes_figures_and_the_folders_for_fid(renderer, capsys):
    """A second call with fewer images leaves none of the first; the judge's encoder is named as such."""
    command = ["evaluate", f"--workdir={renderer}"]
    assert cli.main([*command, "--drawings=6"]) == 0
    assert "true images (floor)" in capsys.readouterr().out
    own = json.loads((renderer / "eval" / "drawings-2.json").read_text())
    assert own["encoder"] == "own" and own["num_images"] == 6 and own["step"] == 2 and own["config_hash"]
    assert (
        cli.main([*command, "--drawings=5", f"--rollout-judge={renderer}", "--config.eval.rollout_candidates=8"]) == 0
    )
    assert "found among 8" in capsys.readouterr().out
    judged = json.loads((renderer / "eval" / "drawings-2.json").read_text())
    assert judged["encoder"] == "judge" and judged["encoder_digest"] == own["encoder_digest"]
    for name in ("drawn", "captioned", "true"):
        files = sorted((renderer / "eval" / "drawings-2" / name).iterdir())
        assert [file.name for file in files] == [f"{number:05d}.png" for number in range(5)]
        with Image.open(files[0]) as picture:
            assert picture.size == (48, 48) and picture.mode == "RGB"


def test_what_cannot_be_drawn_is_refused_before_anything_is_evaluated(renderer, refused, monkeypatch):
    monkeypatch.setattr(evaluate_run, "evaluate", lambda *_, **__: pytest.fail("benchmarks were run first"))
    command = ["evaluate", f"--workdir={renderer}"]
    for number in ("0", "1", "-3"):
        assert f"--drawings={number}: give at least 4" in refused(*command, f"--drawings={number}")
    assert "give at most" in refused(*command, "--drawings=100000")
    nowhere = [*command, "--drawings=5", "--config.eval.rollout_source="]
    assert "eval.rollout_source is empty" in refused(*nowhere)
    assert "no run here" in refused(*command, "--drawings=5", f"--rollout-judge={renderer / 'nowhere'}")
    with pytest.raises(ValueError, match=r"objective=semantic_input draws no pixels .* experiments/renderer.py"):
        instrument.check_drawings(make_tiny_config(), None, 5)
    other = Judge(make_tiny_config(model__encoder__patch_size=8), {}, None)
    with pytest.raises(ValueError, match="reads patches of 8 pixels, the run of 4"):
        other.check_patches(make_tiny_config())
