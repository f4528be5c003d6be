"""Every loss against a few lines of numpy, on literal arrays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from conftest import make_tiny_config

from unihetero_jax.config import MeshConfig
from unihetero_jax.objectives import (
    across_image_spread,
    compute_loss,
    count_targets,
    embedding_distance,
    normalise_target,
    visual_weight,
    within_image_spread,
)
from unihetero_jax.sharding import activation_mesh, make_mesh
from unihetero_jax.text_loss import text_nll


def loss_config(**changes):
    return dataclasses.replace(make_tiny_config().loss, **changes)


def log_softmax(x):
    shifted = x - x.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize(
    ("chunk", "mesh"),
    [(1, {}), (3, {}), (100, {}), (4, {"data": 2}), (3, {"fsdp": 2, "tensor": 2, "context": 2}), (100, {"data": 4})],
)
def test_text_nll_and_its_gradients(chunk, mesh):
    """Against the softmax written out; on a mesh every device has its own positions and part of the vocabulary."""
    rng = np.random.default_rng(0)
    hidden, table = rng.standard_normal((4, 10, 8)), rng.standard_normal((8, 8))
    tokens, mask = rng.integers(0, 8, (4, 10)), rng.random((4, 10)) < 0.4
    mask[1], mask[2] = False, True  # a row without a target, and one full of them
    expected, hidden_gradient, table_gradient = np.zeros((4, 10)), np.zeros(hidden.shape), np.zeros(table.shape)
    logits = log_softmax(hidden @ table.T)
    for row, t in np.argwhere(mask):
        if t > 0:
            expected[row, t] = -logits[row, t - 1, tokens[row, t]]
            error = np.exp(logits[row, t - 1]) - np.eye(8)[tokens[row, t]]
            hidden_gradient[row, t - 1] = error @ table
            table_gradient += np.outer(error, hidden[row, t - 1])

    def weighted(hidden, table):
        with activation_mesh(make_mesh(MeshConfig(**{"data": 1, "fsdp": 1, "tensor": 1, "context": 1} | mesh))):
            total, nll = text_nll(hidden, table, jnp.int32(tokens), jnp.asarray(mask), chunk)
        return 3 * total, (total, nll)

    gradients, (total, nll) = jax.jit(jax.grad(weighted, (0, 1), has_aux=True))(jnp.float32(hidden), jnp.float32(table))
    np.testing.assert_allclose(nll, expected, atol=1e-5)
    np.testing.assert_allclose(total, expected.sum(), rtol=1e-5)
    np.testing.assert_allclose(gradients[0], 3 * hidden_gradient, atol=2e-5)
    np.testing.assert_allclose(gradients[1], 3 * table_gradient, atol=5e-5)


def test_text_nll_never_holds_all_logits():
    """Peak memory of the gradient does not grow like [B, T, V] when the vocabulary grows 16 times."""

    def temporary_bytes(vocab_size):
        hidden, table = jnp.zeros((4, 256, 16)), jnp.zeros((vocab_size, 16))
        tokens, mask = jnp.zeros((4, 256), jnp.int32), jnp.ones((4, 256), bool)
        gradient = jax.jit(jax.grad(lambda h, w: text_nll(h, w, tokens, mask, 32)[0], (0, 1)))
        return gradient.lower(hidden, table).compile().memory_analysis().temp_size_in_bytes

    logits_of_all = 4 * 256 * 16384 * 4
    assert temporary_bytes(16384) < 0.3 * logits_of_all


def numpy_distance(kind, norm, p, z):
    if norm == "l2":
        p, z = p / np.linalg.norm(p), z / np.linalg.norm(z)
    if norm == "layer_norm":
        z = (z - z.mean()) / np.sqrt(z.var() + 1e-6)
    if kind == "cosine":
        return 1 - p @ z / np.linalg.norm(p) / np.linalg.norm(z)
    if kind == "mse":
        return ((p - z) ** 2).mean()
    return np.mean([0.5 * d * d if abs(d) < 1 else abs(d) - 0.5 for d in p - z])


@pytest.mark.parametrize("kind", ["cosine", "mse", "smooth_l1"])
@pytest.mark.parametrize("norm", ["none", "l2", "layer_norm"])
def test_embedding_distance(kind, norm):
    rng = np.random.default_rng(1)
    predicted, target = 3 * rng.standard_normal((5, 6)), 2 * rng.standard_normal((5, 6)) + 1
    config = loss_config(visual_loss=kind, target_norm=norm)
    got = embedding_distance(jnp.float32(predicted), normalise_target(jnp.float32(target), config), config)
    expected = [numpy_distance(kind, norm, p, z) for p, z in zip(predicted, target, strict=True)]
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-6)


def test_within_image_spread_is_one_minus_the_mean_cosine_of_pairs():
    rng = np.random.default_rng(2)
    embeddings = rng.standard_normal((1, 7, 5)).astype(np.float32) + 1
    images = [1, 1, 1, 2, 2, 3, 0]  # the third has one token only, so no pair; the last is padding
    spreads = []
    for image in (1, 2):
        z = [embeddings[0, i] / np.linalg.norm(embeddings[0, i]) for i in range(7) if images[i] == image]
        spreads.append(1 - np.mean([a @ b for i, a in enumerate(z) for j, b in enumerate(z) if i != j]))
    total, count = within_image_spread(jnp.asarray(embeddings), jnp.repeat(jnp.array([images]), 4, axis=1))
    assert count == 2
    np.testing.assert_allclose(total, sum(spreads), rtol=1e-5)


def test_across_image_spread_is_one_minus_the_mean_cosine_at_each_place():
    rng = np.random.default_rng(3)
    embeddings = rng.standard_normal((2, 7, 5)).astype(np.float32) + 1
    images = np.array([[1, 1, 1, 2, 2, 3, 0], [1, 1, 2, 2, 2, 2, 0]])
    by_place = {}
    for row, ids in enumerate(images):
        for image in set(ids.tolist()) - {0}:
            for place, i in enumerate(np.flatnonzero(ids == image)):
                by_place.setdefault(place, []).append(embeddings[row, i] / np.linalg.norm(embeddings[row, i]))
    spreads = [
        1 - np.mean([a @ b for i, a in enumerate(z) for j, b in enumerate(z) if i != j])
        for z in by_place.values() if len(z) > 1
    ]  # fmt: skip
    assert len(by_place) == 4 and len(spreads) == 3, "one place has one image only"
    total, count = across_image_spread(jnp.asarray(embeddings), jnp.repeat(jnp.asarray(images), 4, axis=1))
    assert count == 3
    np.testing.assert_allclose(total, sum(spreads), rtol=1e-5)


def test_tokens_that_tell_their_place_alone_have_no_spread_across_images():
    embeddings = jnp.tile(jnp.eye(3)[None], (2, 4, 1))  # four images a row, each of the same three different tokens
    image_ids = jnp.repeat(jnp.repeat(jnp.arange(1, 5), 3)[None], 2, axis=0)
    total, count = across_image_spread(embeddings, jnp.repeat(image_ids, 4, axis=1))
    assert count == 3
    np.testing.assert_allclose(total, 0, atol=1e-5)
    within, _ = within_image_spread(embeddings, jnp.repeat(image_ids, 4, axis=1))
    np.testing.assert_allclose(within, 8, rtol=1e-6)


def test_a_collapsed_image_has_no_spread_however_different_the_images_are():
    embeddings = jnp.repeat(jnp.eye(4)[None], 3, axis=1)  # four images of three equal tokens each
    total, count = within_image_spread(embeddings, jnp.repeat(jnp.array([[1, 2, 3, 4]]), 12, axis=1))
    assert count == 4
    np.testing.assert_allclose(total, 0, atol=1e-5)


@pytest.mark.parametrize("objective", ["semantic_input", "semantic_encoder"])
def test_total_terms_and_baselines(objective):
    config = make_tiny_config(objective=objective)
    batch = small.batch_of(
        [[small.drawing(np.random.default_rng(i), (2, 2)), small.reading(np.random.default_rng(9))] for i in (1, 2)]
    )
    output = small.forward(objective)(small.params_of(objective), batch)
    weight = jnp.float32(0.25)
    losses = compute_loss(config, output, batch, output.vision, weight, count_targets(config, batch))
    z = np.asarray(output.vision.merged if objective == "semantic_encoder" else output.vision.visual_embeddings)
    predicted, tokens = np.asarray(output.predicted_embeddings), np.asarray(batch.tokens)
    logits = log_softmax(np.asarray(output.hidden) @ np.asarray(output.unembedding).T)
    targets = [z[b, batch.visual_index[b, t]] for b, t in np.argwhere(np.asarray(batch.visual_loss_mask))]
    mean = np.mean(targets, axis=0)
    text, visual, copied, from_mean = [], [], [], []
    for b, t in np.argwhere(np.asarray(batch.text_loss_mask)):
        text.append(-logits[b, t - 1, tokens[b, t]])
    for b, t in np.argwhere(np.asarray(batch.visual_loss_mask)):
        target = z[b, batch.visual_index[b, t]]
        visual.append(numpy_distance("cosine", "none", predicted[b, t - 1], target))
        from_mean.append(numpy_distance("cosine", "none", mean, target))
        if batch.visual_mask[b, t - 1]:
            copied.append(numpy_distance("cosine", "none", z[b, batch.visual_index[b, t - 1]], target))
    expected = {"text": text, "visual": visual, "visual_copy_previous": copied, "visual_mean_embedding": from_mean}
    for name, values in expected.items():
        np.testing.assert_allclose(losses.sums[name], np.sum(values), rtol=1e-4)
        assert losses.counts[name] == len(values)
    assert len(visual) == 2 * 4 and len(copied) == 2 * 3  # N tokens give N terms; the first has nothing to copy
    np.testing.assert_allclose(losses.loss, np.mean(text) + 0.25 * np.mean(visual), rtol=1e-5)


def test_text_loss_by_source_adds_up():
    base = make_tiny_config()
    two = dict.fromkeys(("a", "b"), base.data.sources["only"])
    config = dataclasses.replace(base, data=dataclasses.replace(base.data, sources=two))
    batch = small.mixed_batch(0, 2)
    batch = dataclasses.replace(batch, source_ids=jnp.where(batch.segment_ids == 3, 1, 0))
    output = small.forward()(small.params_of(), batch)
    losses = compute_loss(config, output, batch, output.vision, jnp.float32(0.0), count_targets(config, batch))
    np.testing.assert_allclose(losses.sums["text_by_source"].sum(), losses.sums["text"], rtol=1e-5)
    mask = np.asarray(batch.text_loss_mask)
    second = np.asarray(batch.segment_ids) == 3
    assert losses.counts["text_by_source"].tolist() == [(mask & ~second).sum(), (mask & second).sum()]


def test_lambda_ramps_linearly_and_then_stays():
    config = loss_config(visual_weight=1.0, visual_weight_start=0.2, visual_ramp_steps=4)
    weights = [float(visual_weight(config, jnp.int32(s))) for s in (0, 1, 2, 4, 100)]
    np.testing.assert_allclose(weights, [0.2, 0.4, 0.6, 1.0, 1.0], rtol=1e-6)
    assert float(visual_weight(loss_config(visual_ramp_steps=0), jnp.int32(0))) == 1.0
