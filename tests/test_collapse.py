"""The collapse that the alarms are for, made to happen: a trainable encoder, its own target, and hardly any text."""

import json

import pytest

from experiments import quickstart
from unihetero_jax import gradient_table
from unihetero_jax.config import config_hash
from unihetero_jax.config_reading import from_config_dict
from unihetero_jax.metrics import read_metrics
from unihetero_jax.model import connectors
from unihetero_jax.train import train

NUM_STEPS, GRACE_STEPS = 400, 300


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    from data_pipelines.scene_world import write_scene_world
    from unihetero_jax.data.records import ImageSpec

    path = tmp_path_factory.mktemp("collapse") / "world"
    write_scene_world(path, "easy", 3000, ImageSpec(8, 36, 36), 512, items_per_kind=3)
    return path


def run_of(world, workdir, target, text_share, connector="mlp", cut=False):
    """(all alarms that were on, metric lines) of a short run with this target, share of questions and connector."""
    config = quickstart.get_config()
    config.data.tokenizer = str(world / "tokenizer")
    for name, weight in (("qa", text_share), ("generation", 1 - text_share)):
        config.data.sources[name].update(path=str(world / name), weight=weight)
    config.scene_world.level = "none"
    config.eval.benchmarks, config.eval.validation_rows, config.eval.rollout_source = {}, 8, ""
    config.model.encoder.update(num_layers=2, dim=64, num_heads=2, mlp_dim=128)
    config.model.projector.kind = connector
    config.model.projector.hidden_dim = config.model.semantic_head.hidden_dim = 128
    config.model.decoder.update(num_layers=2, dim=96, num_heads=3, num_kv_heads=1, head_dim=32, mlp_dim=192)
    config.train.update(num_steps=NUM_STEPS, log_every_steps=10, eval_every_steps=10_000)
    config.checkpoint.every_steps = 10_000
    config.diagnostics.across_spread_grace_steps = GRACE_STEPS
    config.loss.update(
        target=target, cut_input_gradient=cut, visual_weight=1.0, visual_weight_start=1.0, visual_ramp_steps=20
    )
    config = from_config_dict(config)
    workdir.mkdir()
    proof = {"config_hash": config_hash(config), "norms": {}}
    (workdir / gradient_table.FILE_NAME).write_text(json.dumps(proof))
    train(config, workdir)
    lines = read_metrics(workdir)
    return {alarm for line in lines for alarm in line["alarms"]}, lines


def last(lines, term):
    return lines[-1]["terms"][term]["mean"]


@pytest.mark.slow
def test_its_own_target_without_text_collapses_and_the_alarm_says_so(world, tmp_path):
    """With the questions' share at a half, a plain stop-gradient does not collapse here within 900 steps; without text
    the moving average does as well. What all have in common is that the visual loss cannot tell.
    """
    alarms, lines = run_of(world, tmp_path / "starved", "stop_gradient", text_share=0.1)
    default_alarms, default_lines = run_of(world, tmp_path / "default", "ema", text_share=0.5)
    assert alarms == {"across_spread"} and default_alarms == set()
    assert last(lines, "across_spread") < 0.05 < 0.12 < last(default_lines, "across_spread")
    assert last(lines, "visual") < last(default_lines, "visual"), "and yet it looks better"
    assert last(lines, "within_spread") > 0.5, "what happens within an image does not show it"


@pytest.mark.slow
@pytest.mark.parametrize("connector", ["resampler", "qformer"])
def test_queries_that_start_at_the_features_scale_stay_apart(world, tmp_path, connector):
    """By the default target; and copying the token before is far worse than the model."""
    alarms, lines = run_of(world, tmp_path / connector, "stop_gradient", 0.5, connector, cut=True)
    print(connector, {name: round(last(lines, name), 3) for name in lines[-1]["terms"]})
    assert lines[-1]["alarms"] == [], alarms
    assert last(lines, "within_spread") > 0.5 and last(lines, "across_spread") > 0.1
    assert last(lines, "visual") < 0.25 * last(lines, "visual_copy_previous")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("connector", "alarm"),
    [("resampler", "copy_distance"), ("qformer", "copy_distance"), ("cross_attention", "across_spread")],
)
def test_other_connectors_collapse_from_scratch_and_the_alarm_says_how(world, tmp_path, connector, alarm, monkeypatch):
    """With the averaged target and text that keep the MLP's tokens apart.

    Queries that start small all read the same and become alike, so that copying the token before beats the model; what
    is read through gates alone is not held apart by text, and its tokens tell their place. The visual loss looks fine
    in all of them.
    """
    monkeypatch.setattr(connectors, "_QUERY_SCALE", 0.02)
    _, lines = run_of(world, tmp_path / connector, "ema", 0.5, connector)
    print(connector, {name: round(last(lines, name), 3) for name in lines[-1]["terms"]})
    assert alarm in lines[-1]["alarms"]
    assert last(lines, "visual") < 0.1
    if alarm == "copy_distance":
        assert last(lines, "visual_copy_previous") < last(lines, "visual")
    else:
        assert last(lines, "across_spread") < 0.05 and last(lines, "within_spread") > 0.5
