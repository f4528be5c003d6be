"""The collapse that the alarms are for, made to happen: a trainable encoder that is its own target."""

import json

import numpy as np
import pytest

from experiments import quickstart
from unihetero_jax import gradient_table
from unihetero_jax.config import config_hash, from_config_dict
from unihetero_jax.metrics import read_metrics
from unihetero_jax.train import train

NUM_STEPS = 300


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    from data_pipelines.scene_world import write_scene_world
    from unihetero_jax.data.records import ImageSpec

    path = tmp_path_factory.mktemp("collapse") / "world"
    write_scene_world(path, "easy", 3000, ImageSpec(8, 36, 36), 512, items_per_kind=3)
    return path


def spread_curve(world, workdir, target):
    """(mean within-image spread by log interval, all alarms that were on) of a short run with this target."""
    config = quickstart.get_config()
    config.data.tokenizer = str(world / "tokenizer")
    for name, weight in (("qa", 0.5), ("generation", 0.5)):
        config.data.sources[name].update(path=str(world / name), weight=weight)
    config.scene_world.level = "none"
    config.eval.benchmarks, config.eval.validation_rows, config.eval.rollout_source = {}, 8, ""
    config.model.encoder.update(num_layers=2, dim=64, num_heads=2, mlp_dim=128)
    config.model.projector.hidden_dim = config.model.semantic_head.hidden_dim = 128
    config.model.decoder.update(num_layers=2, dim=96, num_heads=3, num_kv_heads=1, head_dim=32, mlp_dim=192)
    config.train.update(num_steps=NUM_STEPS, log_every_steps=10, eval_every_steps=10_000)
    config.checkpoint.every_steps = 10_000
    config.loss.update(target=target, visual_weight=1.0, visual_weight_start=1.0, visual_ramp_steps=20)
    config = from_config_dict(config)
    workdir.mkdir()
    proof = {"config_hash": config_hash(config), "norms": {}}
    (workdir / gradient_table.FILE_NAME).write_text(json.dumps(proof))
    train(config, workdir)
    lines = read_metrics(workdir)
    spread = np.array([line["terms"]["within_spread"]["mean"] for line in lines])
    return spread, {alarm for line in lines for alarm in line["alarms"]}, lines


@pytest.mark.slow
def test_its_own_target_collapses_and_the_alarm_says_so(world, tmp_path):
    spread, alarms, lines = spread_curve(world, tmp_path / "stop_gradient", "stop_gradient")
    print("stop_gradient", np.round(spread, 3).tolist(), [round(x["terms"]["visual"]["mean"], 3) for x in lines])
    other, other_alarms, other_lines = spread_curve(world, tmp_path / "ema", "ema")
    print("ema", np.round(other, 3).tolist(), [round(x["terms"]["visual"]["mean"], 3) for x in other_lines])
    assert "within_spread" in alarms and spread.min() < 0.1
    assert "within_spread" not in other_alarms and other.min() > 0.1
    assert lines[-1]["terms"]["visual"]["mean"] < other_lines[-1]["terms"]["visual"]["mean"], "and yet it looks better"
