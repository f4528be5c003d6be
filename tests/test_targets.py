"""Targets, controls and flow matching: each loss against numpy, and what one objective may not do to another."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
from conftest import make_tiny_config

from unihetero_jax import optim, step
from unihetero_jax.config import ConfigError
from unihetero_jax.model import unihetero
from unihetero_jax.objectives import (
    count_targets,
    draw_flow,
    pixel_flow,
    supervised_text,
    visual_flow,
)
from unihetero_jax.sharding import make_mesh
from unihetero_jax.state import create_state, ema_components
from unihetero_jax.step import loss_terms, make_train_step

FLOW = {"model__semantic_head__kind": "flow", "loss__visual_loss": "mse"}
MSE = {"loss__visual_loss": "mse"}


def drawn_rows(num_rows=2, per_row=2, grid=(2, 2)):
    """Rows of images of one size that are drawn, and one that is read."""
    rng = np.random.default_rng(5)
    rows = [[*(small.drawing(rng, grid) for _ in range(per_row)), small.reading(rng)] for _ in range(num_rows)]
    return small.batch_of(rows, 64, 64)


def losses_of(config, batch, seed=0):
    params = params_of(config, seed)
    ema = {name: params[name] for name in ema_components(config)}
    one = jnp.float32(1)
    run = jax.jit(lambda params, batch: loss_terms(config, params, ema, batch, one, count_targets(config, batch)))
    return params, run(params, batch)


def params_of(config, seed=0):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: unihetero.init_params(config.model, config.objective, 0))
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.asarray((path[-1].key == "gain") + 0.2 * rng.standard_normal(x.shape), jnp.float32), shapes
    )


def visual_positions(batch):
    return [tuple(int(i) for i in at) for at in np.argwhere(np.asarray(batch.visual_loss_mask))]


def true_targets(config, params, batch):
    """What each objective's target is, by hand, [B, U, Z]."""
    model = unihetero.build(config.model, config.objective, params)
    vision = jax.jit(lambda params, batch: unihetero.build(config.model, config.objective, params).see(batch))(
        params, batch
    )
    pixels = np.asarray(batch.patches, np.float64) / 255
    num_rows, num_patches = pixels.shape[:2]
    match config.objective:
        case "semantic_input":
            return np.asarray(vision.visual_embeddings)
        case "semantic_encoder" | "random":
            return np.asarray(vision.merged)
        case "patch":
            patch = model.encoder.patch
            scaled = (pixels - 0.5) / 0.5
            return (scaled @ np.asarray(patch.kernel[...]) + np.asarray(patch.bias[...])).reshape(
                num_rows, num_patches // 4, -1
            )
        case "pixels":
            blocks = pixels.reshape(num_rows, num_patches // 4, -1)
            return (blocks - blocks.mean(-1, keepdims=True)) / np.sqrt(blocks.var(-1, keepdims=True) + 1e-4)


@pytest.mark.parametrize("objective", ["semantic_input", "semantic_encoder", "patch", "pixels", "random"])
def test_the_loss_of_every_target_level(objective):
    config, batch = make_tiny_config(objective=objective, **MSE), drawn_rows()
    params, losses = losses_of(config, batch)
    target = true_targets(config, params, batch)
    output = jax.jit(lambda p, b: unihetero.build(config.model, objective, p)(b))(params, batch)
    predicted, index = np.asarray(output.predicted_embeddings), np.asarray(batch.visual_index)
    expected = [((predicted[b, t - 1] - target[b, index[b, t]]) ** 2).mean() for b, t in visual_positions(batch)]
    np.testing.assert_allclose(losses.sums["visual"], np.sum(expected), rtol=2e-4)
    assert losses.counts["visual"] == 2 * 2 * 4


def test_without_shift_a_position_predicts_itself():
    config, batch = make_tiny_config(loss__target_shift=0, **MSE), drawn_rows()
    params, losses = losses_of(config, batch)
    target = true_targets(config, params, batch)
    output = small.forward()(params, batch)
    predicted, index = np.asarray(output.predicted_embeddings), np.asarray(batch.visual_index)
    expected = [((predicted[b, t] - target[b, index[b, t]]) ** 2).mean() for b, t in visual_positions(batch)]
    np.testing.assert_allclose(losses.sums["visual"], np.sum(expected), rtol=2e-4)


def test_shuffled_targets_are_another_images_at_the_same_place():
    config = make_tiny_config(loss__target_shuffled=True, data__image_max_patches=16, **MSE)
    batch = drawn_rows()
    params, losses = losses_of(config, batch)
    target = true_targets(config, params, batch)
    output = small.forward()(params, batch)
    predicted, index = np.asarray(output.predicted_embeddings), np.asarray(batch.visual_index)
    at = visual_positions(batch)
    assert len(at) == 16  # four images of four tokens
    expected = []
    for number, (b, t) in enumerate(at):
        other, place = at[(number + 4) % 16]
        expected.append(((predicted[b, t - 1] - target[other, index[other, place]]) ** 2).mean())
    np.testing.assert_allclose(losses.sums["visual"], np.sum(expected), rtol=2e-4)


def test_statistics_standardise_the_targets_and_follow_them():
    config = make_tiny_config(model__semantic_head__standardise_targets=True, **MSE)
    batch = drawn_rows()
    params, losses = losses_of(config, batch)
    target, index = true_targets(config, params, batch), np.asarray(batch.visual_index)
    head = params["semantic_head"]
    mean, square = np.asarray(head["target_mean"]), np.asarray(head["target_square"])
    deviation = np.sqrt(np.maximum(square - mean**2, 1e-6))
    predicted = np.asarray(small_forward(config)(params, batch).predicted_embeddings)
    at = visual_positions(batch)
    wanted = [(target[b, index[b, t]] - mean) / deviation for b, t in at]
    expected = [((predicted[b, t - 1] - z) ** 2).mean() for (b, t), z in zip(at, wanted, strict=True)]
    np.testing.assert_allclose(losses.sums["visual"], np.sum(expected), rtol=1e-3)

    state = create_state(config, params, optim.make_optimizer(config))
    after, metrics = jax.jit(make_train_step(config))(state, batch)
    found = [target[b, index[b, t]] for b, t in at]
    kept = config.model.semantic_head.statistics_decay
    np.testing.assert_allclose(
        after.params["semantic_head"]["target_mean"], kept * mean + (1 - kept) * np.mean(found, axis=0), rtol=1e-3,
        atol=1e-5,
    )  # fmt: skip
    assert "target_mean" not in metrics.sums


def small_forward(config):
    return jax.jit(lambda params, batch: unihetero.build(config.model, config.objective, params)(batch))


def test_a_prediction_goes_back_to_the_space_of_the_targets():
    config = make_tiny_config(model__semantic_head__standardise_targets=True, **MSE)
    params = params_of(config)
    head = unihetero.build(config.model, config.objective, params).semantic_head
    hidden = jnp.asarray(np.random.default_rng(0).standard_normal((3, 32)), jnp.float32)
    mean, deviation = head.statistics.mean, head.statistics.deviation
    expected = np.asarray(head(hidden)) * np.asarray(deviation) + np.asarray(mean)
    np.testing.assert_allclose(head.draw(hidden, jax.random.key(0)), expected, rtol=1e-5)


# ---------------------------------------------------------------- flow matching


def test_flow_lies_between_data_and_noise_whatever_the_batch():
    rng = np.random.default_rng(0)
    clean = jnp.asarray(rng.standard_normal((3, 5, 4)), jnp.float32)
    groups = jnp.array([[0, 0, 1, 1, 2]] * 3)
    hashes = jnp.asarray(rng.integers(0, 2**31, (3, 2)), jnp.uint32)
    mask = jnp.ones((3, 5), bool)
    flow = draw_flow(clean, groups, mask, hashes, 0)
    tau = np.asarray(flow.tau)
    assert (tau[:, 0] == tau[:, 1]).all() and (tau[:, 2] == tau[:, 3]).all() and len(np.unique(tau)) == 9
    noise = np.asarray(flow.velocity) + np.asarray(clean)
    np.testing.assert_allclose(flow.noisy, (1 - tau[..., None]) * clean + tau[..., None] * noise, atol=1e-5)
    alone = draw_flow(clean[1:2], groups[1:2], mask[1:2], hashes[1:2], 0)
    np.testing.assert_array_equal(alone.noisy[0], flow.noisy[1])
    assert abs(noise.mean()) < 0.4 and 0.7 < noise.std() < 1.3
    other = draw_flow(clean, groups, mask, hashes, 1)
    assert np.abs(np.asarray(other.noisy) - np.asarray(flow.noisy)).min() > 0, "each purpose has its own noise"


def test_a_flow_head_has_as_many_weights_and_its_loss_is_the_velocitys():
    batch = drawn_rows()
    config, regression = make_tiny_config(**FLOW), make_tiny_config()
    heads = [jax.tree_util.tree_leaves_with_path(params_of(one)["semantic_head"]) for one in (config, regression)]
    sizes = [sum(x.size for path, x in head if path[-1].key == "kernel") for head in heads]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.03)
    params, losses = losses_of(config, batch)
    output = small_forward(config)(params, batch)
    assert output.predicted_embeddings is None
    flow = visual_flow(config, output, batch, output.vision)
    head = jax.tree.map(np.asarray, params["semantic_head"]["mlp"])
    expected, hidden = [], np.asarray(output.hidden)
    for b, t in visual_positions(batch):
        noisy, tau = np.asarray(flow.noisy[b, t]), float(flow.tau[b, t])
        x = np.concatenate([hidden[b, t - 1], noisy, [tau]]) @ head["up"]["kernel"] + head["up"]["bias"]
        x = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
        velocity = x @ head["down"]["kernel"] + head["down"]["bias"]
        expected.append(((velocity - np.asarray(flow.velocity[b, t])) ** 2).mean())
    np.testing.assert_allclose(losses.sums["visual"], np.sum(expected), rtol=1e-3)


def test_a_flow_head_draws_what_it_learnt():
    """A head trained alone on two clouds of points draws from both, which no regression does."""
    config = make_tiny_config(**FLOW, model__semantic_head__hidden_dim=64, model__semantic_head__flow_steps=32)
    params = params_of(config)
    rng, hidden = np.random.default_rng(1), jnp.zeros((256, 32))
    centres = jnp.asarray(rng.standard_normal((2, 32)), jnp.float32)

    def build(head):
        return unihetero.build(config.model, config.objective, params | {"semantic_head": head}).semantic_head

    def loss(head, key):
        keys = jax.random.split(key, 3)
        clean = centres[jax.random.bernoulli(keys[0], shape=(256,)).astype(int)]
        noise, tau = jax.random.normal(keys[1], clean.shape), jax.random.uniform(keys[2], (256,))
        noisy = clean + tau[:, None] * (noise - clean)
        return jnp.mean((build(head).velocity(hidden, noisy, tau) - (noise - clean)) ** 2)

    optimizer = optax.adam(3e-3)
    head = jax.tree.map(lambda x: 0.3 * x, params["semantic_head"])

    @jax.jit
    def train(head):
        def body(carry, key):
            head, moments = carry
            updates, moments = optimizer.update(jax.grad(loss)(head, key), moments)
            return (jax.tree.map(jnp.add, head, updates), moments), None

        return jax.lax.scan(body, (head, optimizer.init(head)), jax.random.split(jax.random.key(0), 1500))[0][0]

    drawn = np.asarray(build(train(head)).draw(hidden, jax.random.key(5)))
    distance = np.linalg.norm(drawn[:, None] - np.asarray(centres), axis=-1)
    apart = np.linalg.norm(centres[0] - centres[1])
    assert np.median(distance.min(axis=1)) < 0.25 * apart
    share = (distance.argmin(axis=1) == 0).mean()
    assert 0.3 < share < 0.7, "both clouds are drawn"


# ---------------------------------------------------------------- pixels


def test_pixel_loss_draws_each_block_from_the_hidden_state_before_it():
    config, batch = make_tiny_config(objective="pixel_through"), drawn_rows()
    params, losses = losses_of(config, batch)
    assert losses.counts["pixel"] == 2 * 2 * 4 * 4, "four patches for each drawn token"
    output = small_forward(config)(params, batch)
    flow, condition, _ = pixel_flow(config, output, batch)
    for b, t in visual_positions(batch):
        token = int(batch.visual_index[b, t])
        np.testing.assert_array_equal(condition[b, token], output.hidden[b, t - 1])
        assert flow.mask[b, 4 * token : 4 * token + 4].all()
        clean = np.asarray(flow.noisy - flow.tau[..., None] * flow.velocity)[b, 4 * token]
        np.testing.assert_allclose(clean, np.asarray(batch.patches[b, 4 * token]) / 127.5 - 1, atol=1e-5)


@pytest.mark.slow
def test_a_drawn_block_reads_no_other_block_and_a_renderer_reads_its_image():
    batch = drawn_rows(1, 1)
    for objective, reads_others in (("pixel_through", False), ("unihetero", True)):
        config = make_tiny_config(objective=objective)
        params = params_of(config)
        output = small_forward(config)(params, batch)
        flow, condition, given = pixel_flow(config, output, batch)
        given = jnp.ones_like(given)

        def velocity(noisy, config=config, params=params, flow=flow, condition=condition, given=given):
            model = unihetero.build(config.model, config.objective, params)
            flow = dataclasses.replace(flow, noisy=noisy)
            return model.pixel_velocity(batch.patch_segment_ids, batch.patch_coords, flow, condition, given)

        moved = jnp.abs(velocity(flow.noisy.at[0, 0].add(1.0)) - velocity(flow.noisy)).max(axis=-1)[0]
        images = np.asarray(batch.patch_segment_ids[0])
        assert (moved[:4] > 0).all() and (np.asarray(moved[4:16] > 0) == reads_others).all()
        assert (moved[images > 1] == 0).all(), "never another image"


def test_pixel_detached_is_pixel_through_but_for_one_stop_gradient():
    batch, gradients = drawn_rows(), {}
    for objective in ("pixel_through", "pixel_detached"):
        config = make_tiny_config(objective=objective)
        params = params_of(config)
        counts = count_targets(config, batch)

        def total(params, config=config, counts=counts):
            return loss_terms(config, params, {}, batch, jnp.float32(1), counts).sums["pixel"]

        gradients[objective] = jax.jit(jax.value_and_grad(total))(params)
    (a, through), (b, detached) = gradients["pixel_through"], gradients["pixel_detached"]
    assert float(a) == pytest.approx(float(b), rel=1e-5)
    pairs = list(zip(*(jax.tree.leaves(g["pixel_decoder"]) for g in (through, detached)), strict=True))
    largest = max(float(np.abs(x).max()) for x, _ in pairs)
    for x, y in pairs:  # compiled apart, sums have other orders
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4 * largest)
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(detached["decoder"]))
    assert max(np.abs(np.asarray(x)).max() for x in jax.tree.leaves(through["decoder"])) > 0


TWENTY_STEPS = """
import sys
import jax, numpy as np, small
from conftest import make_tiny_config
from unihetero_jax import optim, step
from unihetero_jax.model import unihetero
from unihetero_jax.state import create_state

config = make_tiny_config(objective=sys.argv[1], train__num_steps=20, optimizer__clip_norm=0.1)
params = jax.jit(lambda: unihetero.init_params(config.model, config.objective, 3))()
state, train_step = create_state(config, params, optim.make_optimizer(config)), jax.jit(step.make_train_step(config))
for number in range(20):
    state, metrics = train_step(state, small.mixed_batch(number, 4))
leaves = jax.tree_util.tree_leaves_with_path({name: state.params[name] for name in ("encoder", "projector", "decoder")})
np.savez(sys.argv[2], **{jax.tree_util.keystr(path): x for path, x in leaves})
print(sorted(metrics.gradient_norms))
"""


@pytest.mark.slow
def test_twenty_steps_of_pixel_detached_leave_the_language_model_as_understanding_does(tmp_path, repo_root):
    """Bit for bit, clipping, moments and all; compiled as a run is, not as plainly as the tests are."""
    found = {}
    for objective in ("understanding", "pixel_detached"):
        path = tmp_path / f"{objective}.npz"
        code = TWENTY_STEPS.replace(
            "import sys\n", "import sys\nimport conftest, os\nos.environ['XLA_FLAGS'] = ''\n", 1
        )
        done = subprocess.run(
            [sys.executable, "-c", code, objective, str(path)], cwd=repo_root / "tests", capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": str(repo_root)}, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        found[objective] = dict(np.load(path))
    assert "'pixel_decoder'" in done.stdout, "it is clipped apart"
    assert found["understanding"].keys() == found["pixel_detached"].keys()
    for name, value in found["understanding"].items():
        np.testing.assert_array_equal(value, found["pixel_detached"][name], err_msg=name)


# ---------------------------------------------------------------- what is read and supervised


def test_the_specialist_for_generation_learns_the_text_of_drawn_samples_alone():
    batch = small.mixed_batch(0, 2)
    config = make_tiny_config(objective="generation")
    mask = np.asarray(supervised_text(config, batch))
    drawn = {(b, int(batch.segment_ids[b, t])) for b, t in visual_positions(batch)}
    expected = np.array([
        [bool(batch.text_loss_mask[b, t]) and (b, int(batch.segment_ids[b, t])) in drawn for t in range(40)]
        for b in range(2)
    ])  # fmt: skip
    np.testing.assert_array_equal(mask, expected)
    assert 0 < mask.sum() < np.asarray(batch.text_loss_mask).sum()
    assert count_targets(config, batch)["text"] == mask.sum()
    _, losses = losses_of(config, batch)
    assert losses.counts["text"] == mask.sum()


def test_random_targets_never_move_and_are_those_of_every_run():
    config, batch = make_tiny_config(objective="random"), drawn_rows()
    mesh = make_mesh(config.mesh)
    state = step.init_state(config, mesh)
    other = step.init_state(dataclasses.replace(config, seed=7), mesh)
    before = jax.device_get(state.ema["encoder"])
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(other.ema["encoder"]), strict=True):
        np.testing.assert_array_equal(x, y)
    assert np.abs(before["patch"]["kernel"] - np.asarray(state.params["encoder"]["patch"]["kernel"])).max() > 0.01
    state, _ = jax.jit(make_train_step(config))(state, batch)
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(state.ema["encoder"]), strict=True):
        np.testing.assert_array_equal(x, np.asarray(y))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss__target_shift": 2}, "loss.target_shift 2 must be 1"),
        ({"loss__target_shuffled": True, "train__accumulation_steps": 2}, "train.accumulation_steps"),
        ({"model__semantic_head__kind": "flow"}, "set loss.visual_loss=mse"),
        ({"objective": "random", "eval__rollout_source": "only"}, "cannot be fed back"),
        ({"objective": "patch", "eval__rollout_source": "only"}, "leaves the length of a patch embedding open"),
        ({"model__semantic_head__standardise_targets": True, "loss__target_norm": "layer_norm"}, "normalises already"),
        ({"model__pixel_decoder__dim": 30}, "model.pixel_decoder.dim 30"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        make_tiny_config(**changes)
