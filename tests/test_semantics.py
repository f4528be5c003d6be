"""What may influence what: no leak between samples, turns or images, none from the future, none through the target."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from conftest import make_tiny_config

from unihetero_jax import objectives, step
from unihetero_jax.model.attention import decoder_attention, decoder_mask, encoder_mask
from unihetero_jax.model.unihetero import build
from unihetero_jax.model.vision_encoder import merge_patches
from unihetero_jax.objectives import compute_loss, count_targets
from unihetero_jax.state import ema_components


def test_decoder_mask_is_the_drawing():
    segment = jnp.array([[1, 1, 1, 1, 1, 2, 2, 0]])
    branch = jnp.array([[0, 0, 1, 1, 2, 0, 0, 0]])
    drawn = """
        x.......
        xx......
        xxx.....
        xxxx....
        xx..x...
        .....x..
        .....xx.
        ........
    """
    expected = [[cell == "x" for cell in line] for line in drawn.split()]
    np.testing.assert_array_equal(decoder_mask(segment, branch)[0], expected)


@pytest.mark.parametrize("causal", [False, True])
def test_encoder_mask_sees_its_image_only_and_no_later_block(causal):
    images = jnp.array([[1] * 8 + [2] * 4 + [0] * 4])
    mask = np.asarray(encoder_mask(images, causal)[0])
    for query in range(16):
        for key in range(16):
            same = images[0, query] == images[0, key] and images[0, query] > 0
            assert mask[query, key] == (same and (not causal or key // 4 <= query // 4))


def moved_predictions(batch):
    """From a position to how far every prediction moves when the input embedding there changes."""
    config, params = make_tiny_config(), small.params_of()

    @jax.jit
    def predictions(change):
        model = build(config.model, config.objective, params)
        attention = decoder_attention("dense", batch.segment_ids, batch.branch_ids)
        x = model.embed(batch, model.see(batch)) + change
        return model.semantic_head(model.decoder(x, batch.positions, attention))

    nothing = jnp.zeros((*batch.tokens.shape, config.model.decoder.dim))
    before = predictions(nothing)
    return lambda p: np.abs(np.asarray(predictions(nothing.at[0, p].add(1.0)) - before)).max(axis=-1)[0]


def test_changing_an_embedding_moves_no_prediction_before_it_and_none_elsewhere():
    batch = small.mixed_batch(0, 1)
    segments, branches = np.asarray(batch.segment_ids[0]), np.asarray(batch.branch_ids[0])
    moved_by = moved_predictions(batch)
    for position in np.flatnonzero(segments > 0):
        moved = moved_by(position)
        later = np.arange(len(segments)) >= position
        may_see = (segments == segments[position]) & later
        may_see &= (branches[position] == 0) | (branches == branches[position])
        assert (moved[~may_see & (segments > 0)] == 0).all()  # padding is read by nobody
        assert (moved[may_see] > 0).all()


def test_pixels_of_one_image_move_nothing_in_another_sample():
    batch = small.mixed_batch(0, 1)
    image_two = (batch.patch_segment_ids == 2)[..., None]
    changed = dataclasses.replace(batch, patches=jnp.where(image_two, 255 - batch.patches, batch.patches))
    before = small.forward()(small.params_of(), batch).hidden[0]
    after = small.forward()(small.params_of(), changed).hidden[0]
    moved = np.abs(np.asarray(after - before)).max(axis=-1)
    segments = np.asarray(batch.segment_ids[0])
    assert (moved[(segments != 2) & (segments > 0)] == 0).all()
    assert moved[segments == 2].max() > 0


def visual_gradient(config, params, batch, *, cut=False):
    def loss(params):
        model = build(config.model, config.objective, params)
        output = model(batch, cut)
        weight, counts = jnp.float32(1.0), count_targets(config, batch)
        return compute_loss(config, output, batch, output.vision, weight, counts).sums["visual"]

    return jax.jit(jax.grad(loss))(params)


def test_the_target_is_stopped_and_removing_that_changes_the_gradient(monkeypatch):
    config = make_tiny_config(loss__target="stop_gradient")
    params, batch = small.params_of(), small.mixed_batch(0, 1)
    norm = lambda tree: float(sum(jnp.sum(x**2) for x in jax.tree.leaves(tree)))  # noqa: E731
    cut = visual_gradient(config, params, batch, cut=True)
    assert norm(cut["encoder"]) == 0 and norm(cut["projector"]) == 0  # neither inputs nor targets carry gradient
    assert norm(visual_gradient(config, params, batch)["encoder"]) > 0  # without the cut, the inputs do
    monkeypatch.setattr(objectives, "target_space", lambda _, vision, batch: vision.visual_embeddings)
    assert norm(visual_gradient(config, params, batch, cut=True)["encoder"]) > 0  # the missing stop is seen


def test_every_generated_image_token_is_a_target_predicted_from_its_predecessor():
    batch = small.mixed_batch(0, 2)
    targets = np.asarray(batch.visual_loss_mask)
    assert targets.sum() == 2 * 2  # one drawn image of two tokens per row; the image that is read carries none
    previous = np.roll(targets, 1, axis=1)
    first = targets & ~previous
    before_first = np.asarray(batch.tokens)[np.roll(first, -1, axis=1)]
    assert (before_first == small.BOI).all()


def test_the_visual_loss_reads_the_position_before_the_target():
    config, batch = make_tiny_config(), small.mixed_batch(0, 1)
    output = small.forward()(small.params_of(), batch)
    weight, counts = jnp.float32(1.0), count_targets(config, batch)

    def visual(predicted):
        return compute_loss(
            config, dataclasses.replace(output, predicted_embeddings=predicted), batch, output.vision, weight, counts
        ).sums["visual"]

    gradient = jax.grad(visual)(output.predicted_embeddings)
    touched = np.abs(np.asarray(gradient)).max(axis=-1)[0] > 0
    np.testing.assert_array_equal(touched, np.roll(np.asarray(batch.visual_loss_mask[0]), -1))


def test_ema_target_takes_encoder_and_projector_from_the_average():
    config = make_tiny_config()
    assert ema_components(config) == ("encoder", "projector")
    assert ema_components(make_tiny_config(optimizer__frozen=("encoder",))) == ("projector",)
    assert ema_components(make_tiny_config(objective="understanding")) == ()
    params, batch = small.params_of(), small.mixed_batch(0, 1)
    other = small.params_of(seed=1)
    ema = {name: other[name] for name in ("encoder", "projector")}
    weight, counts = jnp.float32(1.0), count_targets(config, batch)
    online = step.loss_terms(config, params, {}, batch, weight, counts).sums["visual"]
    averaged = step.loss_terms(config, params, ema, batch, weight, counts).sums["visual"]
    output = small.forward()(params, batch)
    target = small.forward()(params | ema, batch).vision
    expected = compute_loss(config, output, batch, target, weight, counts).sums["visual"]
    np.testing.assert_allclose(averaged, expected, rtol=1e-5)
    assert abs(float(online) - float(averaged)) > 1e-3


@pytest.mark.parametrize("objective", ["semantic_input", "semantic_encoder"])
@pytest.mark.parametrize("scale", [0.05, 20.0])
def test_what_a_rollout_feeds_back_does_not_depend_on_the_heads_scale(objective, scale):
    """A cosine loss trains the direction of a prediction only; the scale that the model is fed must be its own."""
    params = small.params_of(objective)
    down = params["semantic_head"]["mlp"]["down"]
    scaled = params | {"semantic_head": {"mlp": params["semantic_head"]["mlp"] | {
        "down": {name: scale * value for name, value in down.items()}}}}  # fmt: skip
    hidden = jnp.asarray(np.random.default_rng(3).standard_normal((5, 32)), jnp.float32)
    config = make_tiny_config(objective=objective)
    fed_back, other = (
        build(config.model, objective, each).predict_embedding(hidden, jax.random.key(0)) for each in (params, scaled)
    )
    np.testing.assert_allclose(fed_back, other, rtol=2e-4, atol=1e-5)
    true = small.forward(objective)(params, small.mixed_batch()).vision.visual_embeddings
    assert 0.3 < float(jnp.std(fed_back) / jnp.std(true)) < 3, "and it is that of true embeddings"


def test_a_direction_of_encoder_output_gets_its_length_back():
    params = small.params_of("semantic_encoder")
    model = build(make_tiny_config(objective="semantic_encoder").model, "semantic_encoder", params)
    features = model.encoder.norm(jnp.asarray(np.random.default_rng(4).standard_normal((2, 8, 16)), jnp.float32))
    merged = merge_patches(features)
    for scale in (0.1, 1.0, 7.0):
        np.testing.assert_allclose(model.encoder.rescale_merged(scale * merged), merged, rtol=1e-3, atol=1e-4)
