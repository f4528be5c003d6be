"""Starting components from another run: what is taken, what is not, and that a frozen part never moves."""

import json

import jax
import numpy as np
import pytest

from unihetero_jax import gradient_table, step
from unihetero_jax import train as train_module
from unihetero_jax.checkpoint import Checkpointer
from unihetero_jax.config import config_hash
from unihetero_jax.sharding import make_mesh
from unihetero_jax.state import update_ema
from unihetero_jax.train import train

AVERAGED = {"loss__target": "ema", "loss__cut_input_gradient": False}


def host(tree):
    return jax.device_get(tree)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return all(x.tobytes() == y.tobytes() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.fixture(scope="module")
def donor(tiny_experiment, tmp_path_factory):
    """(workdir, parameters) of a run of objective understanding with another seed, saved at steps 10 and 20."""
    workdir = tmp_path_factory.mktemp("donor")
    config = tiny_experiment(objective="understanding", seed=7)
    state = step.init_state(config, make_mesh(config.mesh))
    checkpointer = Checkpointer(workdir, config)
    checkpointer.save(10, state, {}, wait=True)
    doubled = jax.tree.map(lambda x: 2 * x if x.dtype == np.float32 else x, state)
    checkpointer.save(20, doubled, {}, wait=True)
    checkpointer.close()
    return workdir, host(state.params)


@pytest.fixture(scope="module")
def fresh(tiny_experiment):
    """(state, its parameters on the host) of a run that starts from nothing."""
    config = tiny_experiment(**AVERAGED)
    state = step.init_state(config, make_mesh(config.mesh))
    return state, host(state.params)


def test_named_components_of_the_named_step_are_taken(donor, fresh, tiny_experiment, capsys):
    workdir, stored = donor
    changes = {"init_from__workdir": workdir, "init_from__components": "encoder,projector"}
    state, params = fresh
    loaded = train_module._init_from(tiny_experiment(init_from__step=10, **AVERAGED, **changes), state)
    taken = host(loaded.params)
    for name in ("encoder", "projector"):
        assert same(taken[name], stored[name]) and not same(taken[name], params[name])
        assert same(host(loaded.ema[name]), stored[name]), "targets start from the same place"
    for name in ("decoder", "semantic_head"):
        assert same(taken[name], params[name])
    assert jax.tree.map(lambda x: x.sharding, loaded) == jax.tree.map(lambda x: x.sharding, state)
    assert f"encoder, projector initialised from {workdir}, step 10" in capsys.readouterr().out
    newest = train_module._init_from(tiny_experiment(**changes), state)
    assert same(host(newest.params["encoder"]), jax.tree.map(lambda x: 2 * x, stored["encoder"])), "-1: the newest"


def test_random_targets_stay_those_of_every_run(donor, tiny_experiment):
    """The control's encoder is drawn once for all: what a run starts from, or learns, does not touch it."""
    config = tiny_experiment(
        objective="random", eval__rollout_source="", init_from__workdir=donor[0], init_from__components="encoder",
        init_from__step=10,
    )  # fmt: skip
    state = step.init_state(config, make_mesh(config.mesh))
    loaded = train_module._init_from(config, state)
    assert same(host(loaded.params["encoder"]), donor[1]["encoder"])
    assert same(host(loaded.ema), host(state.ema)) and not same(host(loaded.ema["encoder"]), donor[1]["encoder"])
    moved = update_ema(config, loaded.ema, loaded.params)
    assert same(host(moved), host(state.ema))


def test_every_replicate_starts_from_it(donor, tiny_experiment):
    workdir, stored = donor
    config = tiny_experiment(
        train__num_replicates=2, init_from__workdir=workdir, init_from__step=10, init_from__components="encoder"
    )
    state = step.init_state(config, make_mesh(config.mesh))
    params = host(train_module._init_from(config, state).params)
    for replicate in range(2):
        assert same(jax.tree.map(lambda x, r=replicate: x[r].copy(), params["encoder"]), stored["encoder"])
    first, second = (jax.tree.map(lambda x, r=r: x[r].copy(), params["decoder"]) for r in range(2))
    assert not same(first, second), "what is not loaded has its own seed"


@pytest.mark.slow
def test_a_frozen_component_stays_to_the_bit(donor, tiny_experiment, tmp_path):
    workdir, stored = donor
    config = tiny_experiment(
        init_from__workdir=workdir, init_from__step=10, init_from__components="encoder", optimizer__frozen="encoder",
        train__num_steps=4,
    )  # fmt: skip
    proof = {"config_hash": config_hash(config), "norms": {}}  # made by test_gradient_table.py; it takes seconds
    (tmp_path / gradient_table.FILE_NAME).write_text(json.dumps(proof))
    seen = []
    final = train(config, tmp_path, hooks=[lambda number, state: seen.append(host(state.params))])
    assert int(final.step) == 4 and "encoder" not in final.ema
    assert all(same(params["encoder"], stored["encoder"]) for params in seen)
    assert not same(seen[0]["projector"], seen[-1]["projector"])
    assert not same(seen[0]["decoder"], seen[-1]["decoder"])


def test_what_cannot_be_taken_is_named(donor, fresh, tiny_experiment, tmp_path):
    workdir, _ = donor
    state, _ = fresh

    def start(**changes):
        changes = {"init_from__workdir": workdir, "init_from__components": "encoder"} | changes
        train_module._init_from(tiny_experiment(**changes), state)

    with pytest.raises(ValueError, match=r"no arrays under 'params/semantic_head'; there are .*params/decoder"):
        start(init_from__components="semantic_head")
    with pytest.raises(ValueError, match=r"no complete checkpoint of step 15; there are \[10, 20\]"):
        start(init_from__step=15)
    with pytest.raises(ValueError, match=r"no complete checkpoint; train first, or name another workdir"):
        start(init_from__workdir=tmp_path)
    wider = tiny_experiment(
        model__encoder__mlp_dim=48, init_from__workdir=workdir, init_from__components="encoder",
    )  # fmt: skip
    mesh = make_mesh(wider.mesh)
    with pytest.raises(ValueError, match=r"does not fit:[\s\S]*params/encoder/.*32.*expected .*48"):
        train_module._init_from(wider, step.init_state(wider, mesh))
    with pytest.raises(ValueError, match=r"init_from.workdir is set but init_from.components is empty"):
        tiny_experiment(init_from__workdir=workdir)
    with pytest.raises(ValueError, match=r"names semantic_head, which objective=understanding does not have"):
        tiny_experiment(
            objective="understanding", init_from__workdir=workdir, init_from__components="semantic_head"
        )  # fmt: skip
