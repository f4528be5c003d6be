"""The trained checkpoint in the repository works as it is, and a fresh run follows its curve."""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from data_pipelines.scene_world import CAPTION_PROMPT, generation_record
from data_pipelines.scenes import COLORS, LOCATIONS, SHAPES, encode_png, make_scene, render
from experiments import quickstart
from unihetero_jax.config_reading import from_config_dict
from unihetero_jax.data.mixture import image_spec
from unihetero_jax.data.packing import sample_from_record
from unihetero_jax.evaluation.benchmarks import read_benchmark
from unihetero_jax.evaluation.multiple_choice import score_items
from unihetero_jax.evaluation.scoring import summarize
from unihetero_jax.inference.generate import Prompt, generate_text, prompt_batch
from unihetero_jax.loaded_run import load_run, make_log_probs
from unihetero_jax.model.unihetero import build
from unihetero_jax.objectives import compute_loss, count_targets, means
from unihetero_jax.train_run import run_training

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "reference" / "demo"
BAND = 0.15
"""Relative band around the reference curve; two machines differ by rounding, which 60 steps hardly amplify."""


def test_the_reference_answers_and_describes(monkeypatch):
    monkeypatch.chdir(ROOT)  # the reference names its files from there
    run = load_run(str(REFERENCE), -1, 0)
    config, params, tokenizer = run.config, run.params, run.tokenizer
    assert config.data.tokenizer == "reference/demo/tokenizer", "wherever the repository is cloned to"
    items = read_benchmark(config.eval.benchmarks["scenes"]).items
    chosen = [item for item in items if item.category in ("color", "shape", "count")][::6]
    scores = score_items(chosen, tokenizer, config, make_log_probs(config, params))
    assert summarize(chosen, scores)["accuracy"] > 0.7  # chance is .25
    scene = make_scene(0, "test", "easy", 900_002)
    picture = encode_png(render(scene, 0, "test"))
    caption = generate_text(config, params, tokenizer, [Prompt(CAPTION_PROMPT, (picture,))])[0]
    named = [any(word in caption for word in words) for words in (COLORS, SHAPES, LOCATIONS)]
    assert all(named), caption


def test_its_visual_loss_is_a_fifth_of_what_both_baselines_have_on_new_scenes(monkeypatch):
    """The stated margin, on scenes of the test split: the mean embedding, and the embedding before."""
    monkeypatch.chdir(ROOT)
    run = load_run(str(REFERENCE), -1, 0)
    records = [generation_record(0, "test", "easy", 930_000 + number) for number in range(64)]
    samples = [sample_from_record(record, run.tokenizer, image_spec(run.config)) for record in records]
    batch = prompt_batch(run.config, run.tokenizer, samples)

    @jax.jit
    def terms(batch):
        output = build(run.config.model, run.config.objective, run.params)(batch)
        found = compute_loss(run.config, output, batch, output.vision, jnp.float32(1), count_targets(run.config, batch))
        return means(found.sums, found.counts)

    found = terms(batch)
    assert found["visual"] < 0.2 * min(found["visual_mean_embedding"], found["visual_copy_previous"])
    assert found["within_spread"] > 0.5 and found["across_spread"] > 0.3, "and no collapse makes it easy"


@pytest.mark.slow
def test_a_fresh_run_follows_the_reference_curve(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the scene world is made there

    class Enough(Exception):
        pass

    def stop(done, _):
        if done > 60:
            raise Enough

    lines = [json.loads(line) for line in (REFERENCE / "metrics.jsonl").read_text().splitlines()]
    reference = {line["step"]: line["terms"] for line in lines}
    config = from_config_dict(quickstart.get_config())
    with pytest.raises(Enough):
        run_training(config, os.fspath(tmp_path / "run"), hooks=[stop])
    fresh = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in fresh] == [20, 40, 60]
    for line in fresh:
        for name in ("text", "visual"):
            expected = reference[line["step"]][name]["mean"]
            assert abs(line["terms"][name]["mean"] - expected) < BAND * expected, (line["step"], name)
