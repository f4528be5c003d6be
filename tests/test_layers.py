"""Building blocks against numpy, jax.image and, where it is installed, torch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_tiny_config

from unihetero_jax.config import RopeScalingConfig
from unihetero_jax.model.attention import attend, rope_frequencies, rotate
from unihetero_jax.model.layers import LayerNorm, ParamKeys, RMSNorm, scan_layers, stack_layers
from unihetero_jax.model.semantic_encoder import Projector, token_embedding_rms
from unihetero_jax.model.vision_encoder import EncoderBlock, resize_weights

KEYS = ParamKeys(jax.random.key(0))
FREQUENCIES = rope_frequencies(8, 100.0, RopeScalingConfig())


@pytest.mark.parametrize("grid", [(6, 6), (2, 12), (10, 4), (3, 3), (24, 6)])
def test_positions_are_resized_like_images(grid):
    table = np.random.default_rng(0).standard_normal((6, 6, 5)).astype(np.float32)
    height, width = grid
    rows = resize_weights(jnp.arange(height), jnp.full(height, height), 6)
    columns = resize_weights(jnp.arange(width), jnp.full(width, width), 6)
    ours = np.einsum("yi,xj,ije->yxe", rows, columns, table)
    expected = jax.image.resize(table, (height, width, 5), "linear", antialias=True)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_norms():
    x = np.random.default_rng(1).standard_normal((3, 8)).astype(np.float32) * 5 + 2
    rms = RMSNorm(8, 1e-6, KEYS, gain_init=0.5)(jnp.asarray(x))
    np.testing.assert_allclose(rms, 0.5 * x / np.sqrt((x**2).mean(-1, keepdims=True)), rtol=1e-5)
    layer = LayerNorm(8, 1e-6, KEYS)(jnp.asarray(x))
    np.testing.assert_allclose(layer, (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True), atol=1e-5)


def test_rotary_scores_depend_on_distance_only_and_keep_length():
    rng = np.random.default_rng(2)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 2, 8)), jnp.float32) for _ in range(2))

    def score(at_q, at_k):
        turned = [rotate(x, jnp.array([[at]]), FREQUENCIES) for x, at in ((q, at_q), (k, at_k))]
        return np.asarray((turned[0] * turned[1]).sum(-1))

    np.testing.assert_allclose(score(7, 3), score(104, 100), atol=1e-4)
    assert np.abs(score(7, 3) - score(7, 4)).max() > 1e-2
    angle = 5.0 * 100.0 ** (-np.arange(4) / 4)
    pairs = np.asarray(q[0, 0, 0, :4]) + 1j * np.asarray(q[0, 0, 0, 4:])
    turned = pairs * np.exp(1j * angle)
    ours = np.asarray(rotate(q, jnp.array([[5]]), FREQUENCIES))[0, 0, 0]
    np.testing.assert_allclose(ours, np.concatenate([turned.real, turned.imag]), atol=1e-5)


def test_grouped_query_attention():
    rng = np.random.default_rng(3)
    query, key, value = (rng.standard_normal((1, 5, heads, 4)).astype(np.float32) for heads in (4, 2, 2))
    mask = np.tril(np.ones((5, 5), bool))[None]
    ours = attend(*(jnp.asarray(x) for x in (query, key, value, mask)))
    for head in range(4):
        scores = query[0, :, head] @ key[0, :, head // 2].T / 2
        weights = np.where(mask[0], np.exp(scores), 0)
        weights /= weights.sum(-1, keepdims=True)
        np.testing.assert_allclose(ours[0, :, 4 * head : 4 * head + 4], weights @ value[0, :, head // 2], atol=1e-5)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("num_layers", [2, 6])
def test_scanned_layers_equal_one_after_another(remat, num_layers):
    config = make_tiny_config(model__encoder__num_layers=num_layers).model.encoder
    blocks = stack_layers(lambda keys: EncoderBlock(config, keys), num_layers, KEYS)
    x = jnp.asarray(np.random.default_rng(4).standard_normal((1, 8, config.dim)), jnp.float32)
    attention = functools.partial(attend, mask=jnp.ones((1, 8, 8), bool))
    together, _ = scan_layers(blocks, x, lambda block, x, _: (block(x, attention), None), remat)
    for i in range(num_layers):
        x = EncoderBlock(config, KEYS.child(str(i)))(x, attention)
    np.testing.assert_allclose(together, x, atol=1e-4)


def test_projector_gives_its_output_the_scale_of_tokens_and_restores_it_to_a_direction():
    config = make_tiny_config(model__decoder__norm_eps=1e-12).model  # an epsilon that counts would not cancel
    projector = Projector(config, KEYS)
    merged = jnp.asarray(np.random.default_rng(5).standard_normal((6, 4 * config.encoder.dim)), jnp.float32)
    z = projector.of_blocks(merged)
    np.testing.assert_allclose(jnp.sqrt((z**2).mean(-1)), token_embedding_rms(config), rtol=1e-2)
    projector.norm.gain[...] = projector.norm.gain[...] * jnp.linspace(0.5, 2, config.decoder.dim)
    z = projector.of_blocks(merged)
    for scale in (0.01, 1.0, 30.0):
        np.testing.assert_allclose(projector.rescale(scale * z), z, rtol=2e-3, atol=1e-5)


def test_parameters_depend_on_seed_and_path_alone():
    def gain(name):
        return jax.random.normal(KEYS.child(name).key, (3,))

    assert not np.array_equal(gain("a"), gain("b"))
    np.testing.assert_array_equal(gain("a"), gain("a"))
