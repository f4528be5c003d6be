"""The visual branch: what it starts as, what trains it, that text never needs it, and that rollouts use it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from conftest import make_tiny_config

from unihetero_jax import cli, flops, step
from unihetero_jax.checkpoint import restore_subtree
from unihetero_jax.config import num_branch_layers
from unihetero_jax.inference.generate import decode, draw_and_tell
from unihetero_jax.inference.rollout import rollout
from unihetero_jax.inference.sampling import GREEDY
from unihetero_jax.model import unihetero
from unihetero_jax.model.attention import attend
from unihetero_jax.model.unihetero import build
from unihetero_jax.objectives import count_targets
from unihetero_jax.sharding import activation_mesh, make_mesh, shardings_for, to_global
from unihetero_jax.step import loss_terms
from unihetero_jax.train import train

LAYERS, SPLIT = 3, 1


def branched(**changes):
    return make_tiny_config(
        model__decoder__num_layers=LAYERS,
        model__visual_branch__split_layer=SPLIT,
        loss__target="stop_gradient",
        **changes,
    )


def perturbed(config, seed=0):
    params = jax.jit(lambda: unihetero.init_params(config.model, config.objective, seed))()
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.05 * rng.standard_normal(x.shape).astype(np.float32), params)


def test_it_starts_as_a_copy_so_that_nothing_changes_at_first():
    config, plain = branched(), make_tiny_config(model__decoder__num_layers=LAYERS, loss__target="stop_gradient")
    params = unihetero.init_params(config.model, config.objective, 0)
    for copied, own in zip(
        *(jax.tree.leaves(tree) for tree in (params["visual_branch"]["blocks"], params["decoder"]["blocks"])),
        strict=True,
    ):
        np.testing.assert_array_equal(copied, own[SPLIT:])
    batch = small.mixed_batch(num_rows=2)
    output = build(config.model, config.objective, params)(batch)
    np.testing.assert_allclose(output.visual_hidden, output.hidden, atol=1e-6)
    without = build(plain.model, plain.objective, {k: v for k, v in params.items() if k != "visual_branch"})(batch)
    np.testing.assert_allclose(output.hidden, without.hidden, atol=1e-6)
    np.testing.assert_allclose(output.predicted_embeddings, without.predicted_embeddings, atol=1e-6)


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("objective", ["semantic_input", pytest.param("pixel_through", marks=pytest.mark.slow)])
def test_each_loss_trains_its_own_upper_layers_alone(cut, objective):
    """Shared layers learn from both, unless the branch is cut off: then what is visual trains the branch alone."""
    config = branched(objective=objective, loss__cut_branch_gradient=cut)
    params, batch = perturbed(config), small.mixed_batch(num_rows=2)
    counts = count_targets(config, batch)

    def gradients(name):
        loss = lambda params: loss_terms(config, params, {}, batch, jnp.float32(1), counts).sums[name]  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    def moves(tree):
        return any(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(tree))

    other = "visual" if objective == "semantic_input" else "pixel"
    text, visual = gradients("text"), gradients(other)
    lower, upper = (
        lambda tree: jax.tree.map(lambda x: x[:SPLIT], tree["decoder"]["blocks"]),
        lambda tree: jax.tree.map(lambda x: x[SPLIT:], tree["decoder"]["blocks"]),
    )
    assert moves(lower(text)) and moves(upper(text)) and not moves(text["visual_branch"])
    assert moves(visual["visual_branch"]["blocks"]) and moves(visual["visual_branch"]["norm"])
    assert not moves(upper(visual)) and not moves(visual["decoder"]["norm"])
    assert moves(lower(visual)) == moves(visual["encoder"]) == (not cut)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["semantic_input", "pixel_through"])
def test_a_branch_that_is_cut_off_does_not_change_the_size_of_the_others_update(objective):
    """Clipping is by what shares a loss graph: 1,000 times the visual loss leaves the rest as it is, to the bit."""
    moved, batch = [], small.mixed_batch(num_rows=2)
    for weight in (1.0, 1000.0):
        config = branched(
            objective=objective, loss__cut_branch_gradient=True, loss__visual_weight=weight, loss__visual_ramp_steps=0,
            loss__visual_weight_start=weight, loss__pixel_weight=weight, optimizer__clip_norm=0.01,
            optimizer__warmup_steps=1,
        )  # fmt: skip
        state = step.init_state(config, make_mesh(config.mesh))
        train_step = jax.jit(step.make_train_step(config))
        for _ in range(2):
            state, metrics = train_step(state, batch)
        assert bool(metrics.finite)
        moved.append(jax.device_get(state.params))
    for name in ("encoder", "projector", "decoder"):
        jax.tree.map(np.testing.assert_array_equal, moved[0][name], moved[1][name])
    fresh = jax.device_get(unihetero.init_params(config.model, config.objective, config.seed))
    branches = (jax.tree.leaves(params["visual_branch"]) for params in (fresh, moved[0]))
    assert any(not np.array_equal(a, b) for a, b in zip(*branches, strict=True)), "and the branch learns"


@pytest.mark.slow
def test_text_is_that_of_the_model_without_it_and_a_rollout_is_the_branchs():
    """The cache holds both stacks; each reads its own, as whole rows do."""
    config, plain = branched(), make_tiny_config(model__decoder__num_layers=LAYERS)
    params = perturbed(config)
    without = {name: tree for name, tree in params.items() if name != "visual_branch"}
    batch = small.batch_of([[small.writing(np.random.default_rng(0))]], row_tokens=8, row_patches=4)
    told = [
        decode(c, p, batch, jax.random.key(0), 6, small.EOS, (), GREEDY)
        for c, p in ((config, params), (plain, without))
    ]
    np.testing.assert_array_equal(told[0][0], told[1][0])
    np.testing.assert_allclose(told[0][1], told[1][1], atol=1e-5)

    prompts, _ = small.drawing_prompts_and_truth(1)
    rolled = rollout(config, params, prompts, 4, jax.random.key(0)).embeddings
    model = build(config.model, config.objective, params)
    x = model.decoder.embed(prompts.tokens, prompts.boi_grid, model.dtype)
    for position in range(4):
        length = x.shape[1]
        whole = functools.partial(attend, mask=jnp.tril(jnp.ones((1, length, length), bool)))
        shared = model.decoder.below(x, SPLIT, jnp.arange(length)[None], whole)
        last = model.visual_branch(shared, jnp.arange(length)[None], whole)[:, -1]
        predicted = model.predict_embedding(last, jax.random.key(0))
        np.testing.assert_allclose(rolled[:, position], predicted, atol=1e-5)
        x = jnp.concatenate([x, predicted[:, None]], axis=1)
    drawn, tokens = draw_and_tell(config, params, prompts, jax.random.key(0), 4, small.EOI, 3, small.EOS, (), GREEDY)
    np.testing.assert_allclose(drawn, rolled, atol=1e-5)
    x = jnp.concatenate(
        [x, model.decoder.embed(jnp.full((1, 1), small.EOI), jnp.zeros((1, 1, 2), int), model.dtype)], 1
    )
    length = x.shape[1]
    whole = functools.partial(attend, mask=jnp.tril(jnp.ones((1, length, length), bool)))
    text = model.decoder(x, jnp.arange(length)[None], whole)[:, -1]
    assert int(tokens[0, 0]) == int(jnp.argmax(text @ model.decoder.unembedding.T)), "text after it by the text layers"


@pytest.mark.slow
def test_a_rollout_of_the_branch_on_eight_devices_is_that_on_one():
    config = branched(mesh__fsdp=4, mesh__tensor=2, train__global_batch_rows=8, eval__batch_rows=8)
    params, (prompts, _) = perturbed(config), small.drawing_prompts_and_truth(4)
    one = rollout(branched(), params, prompts, 4, jax.random.key(0)).embeddings
    mesh = make_mesh(config.mesh)
    with activation_mesh(mesh):
        split = jax.device_put(params, shardings_for(unihetero.logical_axes(config.model, config.objective), mesh))
        eight = rollout(config, split, to_global(small.host(prompts), mesh), 4, jax.random.key(0)).embeddings
    np.testing.assert_allclose(eight, one, atol=1e-5)


def test_parameters_and_flops_are_those_of_its_layers():
    config, plain = branched(), make_tiny_config(model__decoder__num_layers=LAYERS, loss__target="stop_gradient")
    params = unihetero.init_params(config.model, config.objective, 0)
    counted = flops.parameter_counts(config.model, config.objective)
    assert counted["visual_branch"] == sum(x.size for x in jax.tree.leaves(params["visual_branch"]))
    work = flops.full_work(config, 4)
    own, base = flops.model_flops(config, work), flops.model_flops(plain, work)
    assert own["visual_branch"] == pytest.approx(base["decoder"] * (LAYERS - SPLIT) / LAYERS)
    assert own["total"] - own["visual_branch"] == pytest.approx(base["total"])
    alone = branched(objective="understanding")
    assert num_branch_layers(alone.model, "understanding") == 0 and "visual_branch" not in unihetero.init_params(
        alone.model, "understanding", 0
    ), "text alone has none"


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"split_layer 3 must leave layers above it: 0 \(no branch\) to 2"):
        make_tiny_config(model__decoder__num_layers=3, model__visual_branch__split_layer=3)
    with pytest.raises(ValueError, match="pixel_detached gives a visual branch no gradient"):
        branched(objective="pixel_detached")


@pytest.mark.slow
def test_staged_training_aligns_the_branch_then_goes_on_with_all(tiny_experiment, tmp_path):
    """First everything but branch and head is frozen; then a run starts from that one and trains it all. The copy of a
    decoder that is loaded is its upper layers.
    """
    common = {"train__num_steps": 2, "model__decoder__num_layers": 2, "eval__benchmarks": {}}
    train(tiny_experiment(objective="understanding", **common), tmp_path / "base")
    parts = ("encoder", "projector", "decoder")
    aligned = tiny_experiment(
        model__visual_branch__split_layer=1, init_from__workdir=str(tmp_path / "base"), init_from__components=parts,
        optimizer__frozen=parts, loss__target="stop_gradient", **common,
    )  # fmt: skip
    state = train(aligned, tmp_path / "aligned")
    before = restore_subtree(tmp_path / "base", None, ["params"])[1]["params"]
    for name in parts:
        for a, b in zip(*(jax.tree.leaves(tree) for tree in (before[name], state.params[name])), strict=True):
            np.testing.assert_array_equal(a, b)
    start = jax.tree.leaves(jax.tree.map(lambda x: x[1:], before["decoder"]["blocks"]))
    moved = jax.tree.leaves(state.params["visual_branch"]["blocks"])
    distances = [float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in zip(start, moved, strict=True)]
    assert 0 < max(distances) < 0.05, "two steps from the copy"
    joint = dataclasses.replace(
        aligned, optimizer=dataclasses.replace(aligned.optimizer, frozen=()),
        init_from=dataclasses.replace(
            aligned.init_from, workdir=str(tmp_path / "aligned"), components=(*parts, "visual_branch", "semantic_head")
        ),
    )  # fmt: skip
    train(joint, tmp_path / "joint")
    assert cli.main(["checkpoints", "export", f"--workdir={tmp_path / 'joint'}", f"--output={tmp_path / 'out'}"]) == 0
