"""Rolled-out conditions in training: passes of the decoder over its own predictions are a free rollout, and nothing
else of a step knows about them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from conftest import make_tiny_config

from unihetero_jax import step
from unihetero_jax.data.packing import PackedSample
from unihetero_jax.inference.rollout import rollout
from unihetero_jax.model.unihetero import build
from unihetero_jax.objectives import count_targets, pixel_flow
from unihetero_jax.sharding import make_mesh, to_global

NUM_TOKENS = 4


def small_config(**changes):
    return small.pixel_config("unihetero", **changes)


def reread(config, params, batch, num_passes):
    """What is predicted of each position from the one before, [B, T, D]."""

    def predictions(params):
        model = build(config.model, config.objective, params)
        return model.reread_predictions(batch, model(batch), num_passes)

    return np.roll(np.asarray(jax.jit(predictions)(params)), 1, axis=1)


@pytest.mark.parametrize("branch", [{}, pytest.param({"model__visual_branch__split_layer": 1}, marks=pytest.mark.slow)])
@pytest.mark.parametrize("cut", [{}, {"loss__cut_input_gradient": True, "loss__cut_branch_gradient": True}])
def test_passes_are_the_free_rollout(branch, cut):
    """After n passes the first n + 1 embeddings; the next ones are others still."""
    config = small_config(**branch, **cut)
    params, (prompts, whole) = small.perturbed(config), small.drawing_prompts_and_truth()
    free = np.asarray(rollout(config, params, prompts, NUM_TOKENS, jax.random.key(0)).embeddings)
    drawn = np.asarray(whole.visual_loss_mask)
    for num_passes in range(NUM_TOKENS + 2):
        found = reread(config, params, whole, num_passes)[drawn].reshape(free.shape)
        exact = num_passes + 1
        np.testing.assert_allclose(found[:, :exact], free[:, :exact], atol=1e-5)
        if exact < NUM_TOKENS:
            assert (np.abs(found - free)[:, exact:].max(axis=-1) > 1e-4).all()


@pytest.mark.slow
@pytest.mark.parametrize("turns", ["branches", "repeated_prefix"])
def test_packed_samples_are_rolled_out_as_if_alone(turns):
    """Beside an image that is only read, plain text and questions with a prefix of their own; true images stay true."""
    rng = np.random.default_rng(5)
    asked = PackedSample([*small.drawing(rng).pieces[:-1], *small.reading(rng, turns=(2, 5)).pieces[3:]])
    samples = [small.reading(rng), small.drawing(rng, (1, 3)), small.writing(rng), asked]
    config = small_config()
    params = small.perturbed(config)
    together = small.batch_of([samples], 96, 64, turns)
    packed, start = reread(config, params, together, 3)[0], 0
    for sample in samples:
        alone = small.batch_of([[sample]], 96, 64, turns)
        length = int((alone.segment_ids > 0).sum())
        expected = reread(config, params, alone, 3)[0]
        np.testing.assert_allclose(packed[start + 1 : start + length], expected[1:length], atol=1e-5)
        start += length


def losses_and_gradients(config, params, batch):
    counts = count_targets(config, batch)

    def total(params):
        losses = step.loss_terms(config, params, {}, batch, jnp.float32(0.5), counts)
        return losses.loss, losses

    return jax.jit(jax.grad(total, has_aux=True))(params)


@pytest.mark.slow
@pytest.mark.parametrize("branch", [{}, {"model__visual_branch__split_layer": 1, "loss__cut_branch_gradient": True}])
def test_nothing_but_the_renderer_notices(branch):
    """Text and visual loss and all that they train are the same, bit for bit; the renderer has other conditions."""
    found = {}
    for num_passes in (0, 3):
        config = small_config(
            model__pixel_decoder__rollout_passes=num_passes, model__pixel_decoder__predicted_share=1.0,
            loss__target="stop_gradient", **branch,
        )  # fmt: skip
        found[num_passes] = losses_and_gradients(config, small.perturbed(config), small.mixed_batch(num_rows=2))
    (gradients, losses), (other, others) = found[0], found[3]
    for name in losses.sums.keys() - {"pixel"}:
        np.testing.assert_array_equal(losses.sums[name], others.sums[name])
    for name in gradients.keys() - {"pixel_decoder"}:
        jax.tree.map(np.testing.assert_array_equal, gradients[name], other[name])
    assert losses.sums["pixel"] != others.sums["pixel"] and losses.counts["pixel"] == others.counts["pixel"]


@pytest.mark.slow
def test_the_renderer_is_given_the_free_rollout():
    """`predicted_share` 1, no noise: the conditions of a step are what inference rolls out."""
    config = small_config(
        model__pixel_decoder__predicted_share=1.0, model__pixel_decoder__condition_noise=0.0,
        model__pixel_decoder__rollout_passes=NUM_TOKENS,
    )  # fmt: skip
    params, (prompts, whole) = small.perturbed(config), small.drawing_prompts_and_truth()
    model = build(config.model, config.objective, params)
    output = model(whole)
    predicted = model.reread_predictions(whole, output, NUM_TOKENS)
    free = rollout(config, params, prompts, NUM_TOKENS, jax.random.key(0)).embeddings
    np.testing.assert_allclose(pixel_flow(config, output, whole, predicted)[1], free, atol=1e-5)


@pytest.mark.slow
def test_eight_devices_equal_one():
    """A step of a renderer that cross-attends and is trained on rollouts."""
    changes = {
        "model__pixel_decoder__conditioning": "cross_attention", "model__pixel_decoder__rollout_passes": 2,
        "train__global_batch_rows": 8, "eval__batch_rows": 8,
    }  # fmt: skip
    losses = []
    for mesh_changes in ({}, {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}):
        config = small_config(**changes, **mesh_changes)
        mesh = make_mesh(config.mesh)
        state, train_step = step.init_state(config, mesh), step.compile_train_step(config, mesh)
        for number in range(2):
            batch = to_global(small.host(small.mixed_batch(number, 8)), mesh)
            state, metrics = train_step(state, batch)
        losses.append(jax.device_get(metrics))
    for name in ("text", "visual", "pixel"):
        np.testing.assert_allclose(losses[0].sums[name], losses[1].sums[name], rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "pixel_through"}, "objective=pixel_through has no renderer .* or objective=unihetero"),
        ({"objective": "semantic_input"}, "objective=semantic_input has no renderer"),
        (
            {"model__semantic_head__kind": "flow", "loss__visual_loss": "mse"},
            "rollout_passes: conditions are predictions of a regression head; set .*=0, or",
        ),
        ({"loss__target_shift": 0}, "must be of the next embedding"),
        ({"loss__target_norm": "layer_norm"}, "loss.target_norm none or l2"),
        ({"model__pixel_decoder__predicted_share": 0.0}, "no image takes them as its condition"),
        ({"model__pixel_decoder__rollout_passes": -1}, "rollout_passes -1 must not be negative"),
        ({"model__pixel_decoder__conditioning": "cross"}, "did you mean 'cross_attention'"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_tiny_config(**({"objective": "unihetero", "model__pixel_decoder__rollout_passes": 2} | changes))


def test_a_step_of_few_passes_is_trained_on_predictions_of_predictions():
    """By hand: one pass reads, at drawn positions, what the head predicts from true images."""
    config = small_config()
    params, batch = small.perturbed(config), small.mixed_batch(num_rows=2)
    model = build(config.model, config.objective, params)
    output = model(batch)
    first = model.predict_embedding(output.visual_hidden, jax.random.key(0))
    embeddings = np.asarray(output.vision.visual_embeddings).copy()
    for b, t in np.argwhere(np.asarray(batch.visual_loss_mask)):
        embeddings[b, int(batch.visual_index[b, t])] = first[b, t - 1]
    again = model(batch, visual_embeddings=jnp.asarray(embeddings))
    expected = model.predict_embedding(again.visual_hidden, jax.random.key(0))
    found = model.reread_predictions(batch, output, 1)
    real = np.asarray(batch.segment_ids) > 0
    np.testing.assert_allclose(np.asarray(found)[real], np.asarray(expected)[real], atol=1e-5)
