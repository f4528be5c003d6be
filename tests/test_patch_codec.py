"""What the pixel decoder draws of a patch: the cosine transform against SciPy's, its way back, and a renderer in it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from conftest import make_tiny_config
from scipy.fft import dctn, idctn

from unihetero_jax.config import drawn_values
from unihetero_jax.data.transforms import patchify
from unihetero_jax.inference import draw
from unihetero_jax.model import unihetero
from unihetero_jax.objectives import pixel_flow
from unihetero_jax.patch_codec import patch_codec

SIDE, KEPT = small.PATCH, small.PATCH // 2


def config_of(space, **changes):
    return small.pixel_config("unihetero", model__pixel_decoder__space=space, **changes)


def random_patches():
    return np.random.default_rng(0).integers(0, 256, (2, 8, 3 * SIDE**2), np.uint8)


def waves_of(patches):
    """SciPy's orthonormal transform of values in [-1, 1], [B, P, side, side, 3]."""
    pixels = patches.reshape(*patches.shape[:2], SIDE, SIDE, 3) / 127.5 - 1.0
    return dctn(pixels, axes=(2, 3), norm="ortho")


def test_low_frequencies_are_those_of_scipy_and_the_way_back_gives_the_closest_patch():
    codec, patches = patch_codec(config_of("dct").model), random_patches()
    expected = waves_of(patches)[:, :, :KEPT, :KEPT]
    scaled = expected * 0.5
    scaled[:, :, 0, 0] = expected[:, :, 0, 0] / SIDE
    values = codec.encode(jnp.asarray(patches))
    assert codec.num_values == values.shape[-1] == 3 * KEPT**2
    np.testing.assert_allclose(values, scaled.reshape(2, 8, -1), atol=1e-5)

    full = np.zeros((2, 8, SIDE, SIDE, 3))
    full[:, :, :KEPT, :KEPT] = expected
    closest = np.clip((idctn(full, axes=(2, 3), norm="ortho") + 1) * 127.5, 0, 255).reshape(patches.shape)
    assert np.abs(np.asarray(codec.decode(values), float) - closest).max() <= 0.51, "rounded"
    again = codec.decode(codec.encode(jnp.full_like(patches, 200)))
    np.testing.assert_array_equal(again, 200)


def test_pixels_come_back_as_they_were():
    codec, patches = patch_codec(config_of("pixels").model), random_patches()
    assert codec.num_values == patches.shape[-1]
    np.testing.assert_array_equal(codec.decode(codec.encode(jnp.asarray(patches))), patches)


@pytest.mark.slow
def test_the_flow_leads_to_the_coded_patches_and_drawing_decodes_them(monkeypatch):
    config = config_of("dct")
    codec, batch = patch_codec(config.model), small.mixed_batch()
    params = small.perturbed(config)
    output = unihetero.build(config.model, config.objective, params)(batch)
    flow, _, _ = pixel_flow(config, output, batch)
    clean = flow.noisy - flow.tau[..., None] * flow.velocity
    np.testing.assert_allclose(clean, codec.encode(batch.patches), atol=1e-5)

    wanted = np.full((2, 8, 3 * SIDE**2), 90, np.uint8)
    point = codec.encode(jnp.asarray(wanted))

    class Known:
        dtype = jnp.float32

        def pixel_velocity(self, segments, coords, flow, condition, is_conditioned):
            return (flow.noisy - point) / jnp.maximum(flow.tau, 1e-6)[..., None]

    monkeypatch.setattr(draw, "build", lambda *_: Known())
    _, coords = patchify(np.zeros((2 * SIDE, 4 * SIDE, 3), np.uint8), SIDE)
    drawn = draw.draw_patches.__wrapped__(config, {}, jnp.zeros((2, 2, 32)), jnp.asarray(coords), jax.random.key(0))
    np.testing.assert_array_equal(drawn, wanted)


@pytest.mark.parametrize("objective", ["unihetero", "pixel_through"])
def test_the_decoder_is_as_wide_as_what_it_draws(objective):
    config = make_tiny_config(objective=objective, model__pixel_decoder__space="dct")
    decoder = jax.eval_shape(lambda: unihetero.init_params(config.model, objective, 0))["pixel_decoder"]
    values = drawn_values(config.model)
    assert decoder["patch"]["kernel"].shape[0] == decoder["out"]["kernel"].shape[1] == values == 3 * KEPT**2
    pixels = dataclasses.replace(config.model.pixel_decoder, space="pixels")
    assert drawn_values(dataclasses.replace(config.model, pixel_decoder=pixels)) == 4 * values
