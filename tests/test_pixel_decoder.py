"""The pixel decoder, whichever way conditions reach the patches: who reads whom, by places and not by order."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from experiments import renderer, renderer_choices
from unihetero_jax.arrays import Flow
from unihetero_jax.model import unihetero
from unihetero_jax.model.attention import token_mask
from unihetero_jax.model.layers import ParamKeys
from unihetero_jax.model.pixel_decoder import _CrossAttention, _Tokens
from unihetero_jax.model.unihetero import build

BOTH = ("adaptive_norm", "cross_attention")


def small_config(conditioning, objective="unihetero", **changes):
    return small.pixel_config(objective, model__pixel_decoder__conditioning=conditioning, **changes)


def drawing_of(config, batch):
    """The velocity at every patch of fixed noise, as a jitted function of (params, condition, is_conditioned)."""
    noisy = jnp.asarray(np.random.default_rng(0).standard_normal(batch.patches.shape), jnp.float32)
    flow = Flow(noisy, jnp.full(noisy.shape[:2], 0.5), noisy, jnp.ones(noisy.shape[:2], bool))

    @jax.jit
    def velocity(params, condition, is_conditioned):
        model = build(config.model, config.objective, params)
        return model.pixel_velocity(batch.patch_segment_ids, batch.patch_coords, flow, condition, is_conditioned)

    return lambda *arguments: np.asarray(velocity(*arguments))


def two_images():
    """One row: an image of 2x2 tokens, one of 1x2, and padding of two tokens; conditions at random, all given."""
    rng = np.random.default_rng(3)
    batch = small.batch_of([[small.reading(rng, (2, 2)), small.drawing(rng, (1, 2))]], 40, 32)
    condition = jnp.asarray(rng.standard_normal((1, 8, 32)), jnp.float32)
    return batch, condition, jnp.ones((1, 8), bool)


def test_the_mask_from_patches_to_tokens_is_the_drawing():
    segments = jnp.array([[1] * 8 + [2] * 4 + [0] * 4])
    drawing = ["xx.."] * 8 + ["..x."] * 4 + ["...."] * 4
    np.testing.assert_array_equal(token_mask(segments)[0], [[cell == "x" for cell in line] for line in drawing])


@pytest.mark.parametrize("conditioning", [BOTH[0], pytest.param(BOTH[1], marks=pytest.mark.slow)])
@pytest.mark.parametrize(("objective", "whole_image"), [("unihetero", True), ("pixel_through", False)])
def test_a_condition_moves_its_own_group_alone(conditioning, objective, whole_image):
    """Of the renderer that is the image, as an objective the block; never another image (padding is read by nobody)."""
    config = small_config(conditioning, objective)
    params, (batch, condition, given) = small.perturbed(config), two_images()
    draw = drawing_of(config, batch)
    before = draw(params, condition, given)
    assert np.isfinite(before).all()
    images = np.asarray(batch.patch_segment_ids[0])
    for token in range(8):
        after = draw(params, condition.at[0, token].multiply(-2.0), given)
        moved = np.abs(after - before).max(axis=-1)[0]
        group = images == images[4 * token] if whole_image else np.arange(32) // 4 == token
        assert (moved[group & (images > 0)] > 1e-4).all() and (moved[~group & (images > 0)] == 0).all()


@pytest.mark.parametrize("conditioning", BOTH)
def test_what_is_not_conditioned_reads_the_learned_nothing(conditioning):
    config = small_config(conditioning)
    params, (batch, condition, given) = small.perturbed(config), two_images()
    none, draw = given.at[0, :4].set(False), drawing_of(config, batch)
    before = draw(params, condition, none)
    np.testing.assert_array_equal(draw(params, condition.at[0, :4].multiply(-2.0), none), before)
    decoder = params["pixel_decoder"]
    other = params | {"pixel_decoder": decoder | {"no_condition": decoder["no_condition"] + 1.0}}
    moved = np.abs(draw(other, condition, none) - before).max(axis=-1)[0]
    images = np.asarray(batch.patch_segment_ids[0])
    assert (moved[images == 1] > 0).all() and (moved[images == 2] == 0).all()


@pytest.mark.parametrize("conditioning", BOTH)
def test_places_tell_tokens_apart_and_their_order_does_not(conditioning):
    """Stored in another order with place and condition, a block is drawn the same; with another's condition, not."""
    config = small_config(conditioning)
    params, (batch, condition, given) = small.perturbed(config), two_images()
    order = np.array([2, 0, 3, 1, 4, 5, 6, 7])
    of_patches = (4 * order[:, None] + np.arange(4)).reshape(-1)
    noise = np.random.default_rng(0).standard_normal(batch.patches.shape).astype(np.float32)
    model = build(config.model, config.objective, params)

    @jax.jit
    def velocity(noise, coords, condition):
        flow = Flow(noise, jnp.full(noise.shape[:2], 0.5), noise, jnp.ones(noise.shape[:2], bool))
        return model.pixel_velocity(batch.patch_segment_ids, coords, flow, condition, given)

    before = velocity(noise, batch.patch_coords, condition)
    moved = velocity(noise[:, of_patches], batch.patch_coords[:, of_patches], condition[:, order])
    real = np.asarray(batch.patch_segment_ids) > 0
    np.testing.assert_allclose(moved[real], before[:, of_patches][real], atol=2e-5)
    exchanged = velocity(noise, batch.patch_coords, condition[:, order])
    assert (np.abs(exchanged - before).max(axis=-1)[0, :16] > 1e-4).all()


def test_cross_attention_by_hand():
    """Two heads over three tokens, of which the second patch may read one."""
    config = small_config("cross_attention").model.pixel_decoder
    layer = _CrossAttention(config, ParamKeys(jax.random.key(0)))
    rng = np.random.default_rng(0)
    layer.out.kernel[...] = jnp.asarray(rng.standard_normal((16, 16)), jnp.float32)
    x, place = rng.standard_normal((2, 1, 2, 16)).astype(np.float32)
    given, token_place = rng.standard_normal((2, 1, 3, 16)).astype(np.float32)
    mask = np.array([[[True, True, True], [False, True, False]]])
    found = layer(jnp.asarray(x), _Tokens(*map(jnp.asarray, (given, given + token_place, place, mask))))

    def linear(part, values):
        return values @ np.asarray(part.kernel[...]) + np.asarray(part.bias[...])

    query, key = linear(layer.query, x + place)[0], linear(layer.key, given + token_place)[0]
    value, rows = linear(layer.value, given)[0], []
    for patch in range(2):
        heads = []
        for head in (slice(0, 8), slice(8, 16)):
            weights = np.exp(key[:, head] @ query[patch, head] / np.sqrt(8)) * mask[0, patch]
            heads.append((weights / weights.sum()) @ value[:, head])
        rows.append(np.concatenate(heads))
    np.testing.assert_allclose(found[0], linear(layer.out, np.stack(rows)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("conditioning", BOTH)
def test_a_fresh_decoder_draws_grey(conditioning):
    config, (batch, condition, given) = small_config(conditioning), two_images()
    params = unihetero.init_params(config.model, config.objective, 0)
    noisy = np.random.default_rng(0).standard_normal(batch.patches.shape).astype(np.float32)
    np.testing.assert_allclose(drawing_of(config, batch)(params, condition, given), noisy / 0.5, rtol=1e-5)


def test_what_exists_is_as_it_was_and_cross_attention_comes_on_top():
    """The parameters of adaptive norms keep their names and their initial values."""
    plain, more = (unihetero.init_params(small_config(one).model, "unihetero", 0)["pixel_decoder"] for one in BOTH)
    cross = more["blocks"].pop("cross_attention")
    assert cross.keys() == {"query", "key", "value", "out"} and plain["blocks"].keys() == more["blocks"].keys()
    jax.tree.map(np.testing.assert_array_equal, plain, more)


def test_the_renderer_of_an_export_is_configured_by_its_step(repo_root, tmp_path, monkeypatch):
    monkeypatch.chdir(repo_root)
    config = renderer.get_config("reference/demo")
    assert config.data.tokenizer == "reference/demo/tokenizer" and config.objective == "unihetero"
    assert config.optimizer.frozen == renderer.KEPT and config.model.pixel_decoder.rollout_passes == 0
    with pytest.raises(ValueError, match="no workdir of a run"):
        renderer.get_config(str(tmp_path))


@pytest.mark.slow
def test_choices_are_trained_drawn_and_read(tiny_experiment, tmp_path, monkeypatch, capsys):
    base = tiny_experiment(
        objective="unihetero", train__num_steps=1, drawing__steps=1, eval__validation_rows=4,
        **small.PIXEL_SIZES,
    )  # fmt: skip

    def make_config(run, arm, seed, num_steps):
        pixels = dataclasses.replace(base.model.pixel_decoder, conditioning=arm)
        model = dataclasses.replace(base.model, pixel_decoder=pixels)
        return dataclasses.replace(base, model=model, seed=seed)

    monkeypatch.setattr(renderer_choices, "make_config", make_config)
    flags = [
        f"--workdir={tmp_path}",
        "--steps=1",
        "--seeds=1",
        "--scenes=4",
        "--guidance=1.0",
        "--arms=cross_attention",
    ]
    assert renderer_choices.main(flags) == 0
    (result,) = json.loads((tmp_path / "choices.json").read_text())
    assert (result["arm"], result["seed"], result["steps"]) == ("cross_attention", 0, 1)
    assert result["drawn"]["1.0"].keys() == {"true", "captions"} and result["pixel_loss"] > 0
    printed = capsys.readouterr().out
    assert "cross_attention" in printed and "GFLOP/step" in printed
    assert renderer_choices.main(["--arms=nothing"]) == 2
    assert "there are adaptive_norm" in capsys.readouterr().err


def test_the_rolled_out_arm_rolls_out_whole_images(repo_root, monkeypatch):
    monkeypatch.chdir(repo_root)
    config = renderer_choices.make_config("reference/demo", "adaptive_norm+rollout", 1, 30)
    pixels = config.model.pixel_decoder
    assert (pixels.conditioning, pixels.rollout_passes, config.seed, config.data.seed) == ("adaptive_norm", 8, 1, 1)
    cross = renderer_choices.make_config("reference/demo", "cross_attention", 0, 30).model.pixel_decoder
    assert (cross.conditioning, cross.rollout_passes) == ("cross_attention", 0)
