"""Whole runs on several devices: the same losses, log-probabilities and data as on one."""

import dataclasses
import functools
import json
import shutil
import signal

import jax
import numpy as np
import pytest
import small
from conftest import make_tiny_config

from experiments import quickstart
from unihetero_jax import gradient_table, step
from unihetero_jax import train as trainer
from unihetero_jax.checkpoint import list_steps
from unihetero_jax.config import ConfigError, config_hash
from unihetero_jax.config_reading import from_config_dict
from unihetero_jax.data.mixture import make_train_iterator
from unihetero_jax.data.tokenizer import load_tokenizer
from unihetero_jax.loaded_run import make_log_probs
from unihetero_jax.metrics import read_metrics
from unihetero_jax.model import unihetero
from unihetero_jax.model.layers import ParamKeys
from unihetero_jax.sharding import make_mesh, to_global
from unihetero_jax.train import Interrupted, train


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """A run that goes on, and one with another seed, take the step that is compiled already."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("abstract_state", "compile_train_step"):
            patch.setattr(step, name, functools.cache(getattr(step, name)))
        yield


def random_params(config):
    """Drawn by numpy, which compiles nothing."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: unihetero.init_params(config.model, config.objective, 0))
    return jax.tree.map(lambda x: (0.2 * rng.standard_normal(x.shape)).astype(np.float32), shapes)


def placed(tree, abstract):
    """The arrays where the shardings of `abstract` want them."""
    return jax.tree.map(lambda x, where: jax.device_put(np.array(x), where.sharding), tree, abstract)


def test_the_quickstart_fits_a_mesh_of_eight():
    experiment = quickstart.get_config()
    experiment.mesh.fsdp, experiment.mesh.tensor = 4, 2
    config = from_config_dict(experiment)
    sizes = []
    for leaf in jax.tree.leaves(step.abstract_state(config, make_mesh(config.mesh)).params):
        sizes.append((leaf.size, np.prod(leaf.sharding.shard_shape(leaf.shape))))  # refuses what does not divide
    whole, part = np.sum(sizes, axis=0)
    assert whole / 8 <= part < whole / 4, "kernels and tables are split eight ways, the rest is little"


def test_a_mesh_that_does_not_divide_the_quickstart_is_refused_with_every_reason():
    experiment = quickstart.get_config()
    experiment.mesh.fsdp, experiment.mesh.tensor = 3, 4
    with pytest.raises(ConfigError) as caught:
        from_config_dict(experiment)
    text = "\n".join(caught.value.faults)
    for reason in ("rows per microbatch", "model.decoder.num_kv_heads", "model.decoder.dim", "eval.batch_rows"):
        assert reason in text, reason


@pytest.mark.parametrize("mesh", [{"mesh__data": 2, "mesh__tensor": 2}])
def test_log_probs_of_evaluation_on_four_devices_are_those_on_one(mesh):
    batch = small.mixed_batch(0, 4)
    arrays = {field.name: np.asarray(getattr(batch, field.name)) for field in dataclasses.fields(batch)}
    found = []
    for changes in ({}, mesh):
        config = make_tiny_config(**changes)
        abstract = step.abstract_state(config, make_mesh(config.mesh)).params
        params = placed(random_params(config), abstract)
        found.append(make_log_probs(config, params)(arrays))
    kernel = params["decoder"]["blocks"]["mlp"]["up"]["kernel"]
    assert len(kernel.sharding.device_set) == 4 and kernel.addressable_shards[0].data.size == kernel.size // 2
    targets = arrays["text_loss_mask"]
    assert np.abs(found[0][targets]).min() > 0 and found[0].shape == targets.shape
    np.testing.assert_allclose(found[1][targets], found[0][targets], atol=1e-5)


EIGHT_ROWS = {
    "train__num_steps": 1000, "train__global_batch_rows": 8, "eval__batch_rows": 8, "checkpoint__every_steps": 1000,
    "model__decoder__num_kv_heads": 2,
}  # fmt: skip
"""A run that only a signal ends."""
CUBE = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}


def run_until(last_step, config, workdir, hook=lambda number, state: None):
    """Trains until SIGTERM after a step, which is saved; returns the lines. The gradient table is taken as proved."""
    workdir.mkdir(exist_ok=True)
    proof = {"config_hash": config_hash(config), "norms": {}}
    (workdir / gradient_table.FILE_NAME).write_text(json.dumps(proof))

    def stop(number, state):
        if number == last_step:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(config, workdir, [hook, stop])
    assert list_steps(workdir)[-1] == last_step
    return read_metrics(workdir)


@pytest.fixture
def start_by_numpy(monkeypatch):
    """Runs start from values drawn by numpy: `test_equivalence.py` has the initialiser on meshes, slow to compile."""

    def init_state(config, mesh):
        abstract = step.abstract_state(config, mesh)
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
        params = random_params(config)
        state = dataclasses.replace(zeros, params=params, ema={name: params[name] for name in abstract.ema})
        return placed(state, abstract)

    monkeypatch.setattr(step, "init_state", init_state)


@pytest.mark.slow
def test_a_run_on_eight_devices_is_the_run_on_one_and_goes_on_there(tiny_experiment, tmp_path, start_by_numpy):
    """Two steps on data x fsdp x tensor, then SIGTERM; the rest on one device, from the checkpoint of the eight."""
    parts = []

    def count_parts(number, state):
        kernel = state.params["decoder"]["blocks"]["mlp"]["up"]["kernel"]
        parts.append((len(kernel.sharding.device_set), kernel.size // kernel.addressable_shards[0].data.size))

    whole = run_until(4, tiny_experiment(**EIGHT_ROWS), tmp_path / "one")
    assert len(run_until(2, tiny_experiment(**EIGHT_ROWS, **CUBE), tmp_path / "cube", count_parts)) == 2
    lines = run_until(4, tiny_experiment(**EIGHT_ROWS), tmp_path / "cube", count_parts)
    assert parts == [(8, 4)] * 2 + [(1, 1)] * 2, "a kernel is split over fsdp x tensor"
    assert [line["step"] for line in lines] == [line["step"] for line in whole] == [1, 2, 3, 4]
    for name in ("batch_hash", "totals", "learning_rate", "visual_weight"):
        assert [line[name] for line in lines] == [line[name] for line in whole], name
    assert lines[0]["loss"] == pytest.approx(whole[0]["loss"], abs=1e-5)
    for line, other in zip(lines, whole, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], abs=1e-3)
        for component, norm in other["gradient_norm"].items():
            assert line["gradient_norm"][component] == pytest.approx(norm, rel=1e-3)
    assert len({line["loss"] for line in whole}) == 4


FSDP, TENSOR = {"mesh__data": 2, "mesh__fsdp": 4}, {"mesh__data": 2, "mesh__tensor": 2}
"""Eight devices without tensor parallelism; four without FSDP."""


@pytest.fixture
def restored(monkeypatch):
    """Parameters as runs start with them, in order."""
    found, original = [], trainer._restore_or_init

    def remembered(*arguments):
        result = original(*arguments)
        found.append(jax.device_get(result[0].params))  # the step donates what it is given
        return result

    monkeypatch.setattr(trainer, "_restore_or_init", remembered)
    return found


@pytest.mark.slow
def test_every_mesh_goes_on_from_every_other(tiny_experiment, tmp_path, start_by_numpy, restored):
    """8 -> 4 -> 1 -> 8 devices, FSDP -> tensor parallelism -> none -> both, a step on each; and each from one step."""
    saved, parts = {}, []

    def remember(number, state):
        saved[number] = jax.device_get(state.params)
        kernel = state.params["decoder"]["blocks"]["mlp"]["up"]["kernel"]
        parts.append((len(kernel.sharding.device_set), kernel.size // kernel.addressable_shards[0].data.size))

    def same_bits(a, b):
        same = jax.tree.map(lambda x, y: x.dtype == y.dtype and x.tobytes() == y.tobytes(), a, b)
        return all(jax.tree.leaves(same))

    configs = [tiny_experiment(**EIGHT_ROWS, **mesh) for mesh in (FSDP, TENSOR, {}, CUBE)]
    chain = tmp_path / "chain"
    run_until(1, configs[0], chain, remember)
    first = saved[1]
    copies = [shutil.copytree(chain, tmp_path / f"copy-{number}") for number in range(4)]
    for number, config in enumerate(configs[1:], start=2):
        lines = run_until(number, config, chain, remember)
        assert same_bits(restored[-1], saved[number - 1]), number
        assert not same_bits(saved[number], saved[number - 1])
    assert parts == [(8, 4), (4, 2), (1, 1), (8, 4)]
    restored.clear()
    seconds = [run_until(2, config, copy)[1] for config, copy in zip(configs, copies, strict=True)]
    assert len(restored) == 4 and all(same_bits(params, first) for params in restored)
    assert [line["batch_hash"] for line in seconds] == [lines[1]["batch_hash"]] * 4
    for line in seconds:
        assert line["loss"] == pytest.approx(seconds[0]["loss"], abs=1e-5)
        assert line["terms"]["visual"]["mean"] == pytest.approx(seconds[0]["terms"]["visual"]["mean"], abs=1e-5)
    assert len({line["batch_hash"] for line in lines}) == 4, "and four batches in all"


@pytest.mark.slow
def test_replicates_spread_over_devices_are_the_single_runs_of_their_seeds(tiny_experiment, tmp_path, monkeypatch):
    """Four models, two on each device, for two steps of the loop; then each alone, from where it started."""
    starts = []
    init_state = step.init_state

    def remembered(config, mesh):
        state = init_state(config, mesh)
        starts.append(jax.device_get(state))  # the step donates what it is given
        held = [shard.data.shape[0] for shard in state.params["decoder"]["embedding"].addressable_shards]
        assert held == [2, 2]
        return state

    monkeypatch.setattr(step, "init_state", remembered)
    config = tiny_experiment(**EIGHT_ROWS, train__num_replicates=4, mesh__data=2)
    lines = run_until(2, config, tmp_path)
    losses = np.array([line["loss_by_replicate"] for line in lines])
    assert losses.shape == (2, 4) and len(set(losses[0].tolist())) == 4

    alone = tiny_experiment(**EIGHT_ROWS)
    mesh = make_mesh(alone.mesh)
    train_step = step.compile_train_step(alone, mesh)
    stream = make_train_iterator(alone, load_tokenizer(alone.data.tokenizer))
    batches = [to_global(next(stream).arrays, mesh) for _ in range(2)]
    stream.close()
    for replicate in range(4):
        start = jax.tree.map(lambda x, replicate=replicate: x[replicate], starts[0])
        key = ParamKeys(jax.random.key(replicate)).child("decoder").child("embedding").key
        table = start.params["decoder"]["embedding"]
        np.testing.assert_allclose(table, jax.random.normal(key, table.shape) / np.sqrt(32), atol=1e-6)
        state = placed(start, step.abstract_state(alone, mesh))
        for batch, loss in zip(batches, losses[:, replicate], strict=True):
            state, metrics = train_step(state, batch)
            assert float(metrics.loss) == pytest.approx(loss, rel=1e-5), replicate
