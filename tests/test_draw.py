"""Drawing: patches back to images, the flow followed exactly where its answer is known, and the commands."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from conftest import make_tiny_config
from PIL import Image

from data_pipelines.scenes import encode_png
from unihetero_jax import cli, train_run
from unihetero_jax.checkpoint import restore_subtree
from unihetero_jax.data.mixture import image_spec
from unihetero_jax.data.tokenizer import load_tokenizer
from unihetero_jax.data.transforms import patchify, resize_to_grid, unpatchify
from unihetero_jax.evaluation.drawings import BlockBank, block_bank
from unihetero_jax.inference import draw
from unihetero_jax.loaded_run import load_run
from unihetero_jax.model import unihetero
from unihetero_jax.objectives import pixel_flow
from unihetero_jax.state import averages_of_targets, ema_components, params_in_use, update_ema
from unihetero_jax.step import loss_terms
from unihetero_jax.train import train


def with_drawing(config, **changes):
    return dataclasses.replace(config, drawing=dataclasses.replace(config.drawing, **changes))


def test_unpatchify_undoes_patchify():
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3)).astype(np.uint8)
    patches, _ = patchify(pixels, 4)
    np.testing.assert_array_equal(unpatchify(patches, 24, 40, 4), pixels)


class Known:
    """Stands for the model: the exact velocity of data that are one point, `(y - point) / tau`, or a curved one."""

    dtype = jnp.float32

    def __init__(self, point, shifted=0.0, curved=False):
        self.point, self.shifted, self.curved = point, shifted, curved

    def pixel_velocity(self, segments, coords, flow, condition, is_conditioned):
        tau = flow.tau[..., None]
        point = jnp.where(is_conditioned.all(), self.point, self.point + self.shifted)
        if self.curved:
            return 3 * (flow.noisy - point) * tau**2
        return (flow.noisy - point) / jnp.maximum(tau, 1e-6)


def drawn_by(model, monkeypatch, **changes):
    config = with_drawing(make_tiny_config(objective="unihetero"), **changes)
    monkeypatch.setattr(draw, "build", lambda *_: model)
    _, coords = patchify(np.zeros((8, 16, 3), np.uint8), 4)
    return draw.draw_patches.__wrapped__(config, {}, jnp.zeros((2, 2, 32)), jnp.asarray(coords), jax.random.key(0))


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_a_straight_flow_is_followed_to_its_end_in_any_number_of_steps(monkeypatch, sampler):
    for steps in (1, 7):
        found = drawn_by(Known(0.5), monkeypatch, sampler=sampler, steps=steps)
        np.testing.assert_array_equal(found, 191)


def test_heun_is_of_higher_order_than_euler(monkeypatch):
    """dy/dtau = 3 (y - p) tau^2 from tau 1 to 0 leaves (y1 - p) / e: the error of Heun's method is far smaller."""
    noise = jax.random.normal(jax.random.key(0), (2, 8, 48), jnp.float32)
    exact = np.clip((0.1 + (np.asarray(noise) - 0.1) * np.exp(-1.0) + 1) * 127.5, 0, 255)
    errors = {
        name: np.abs(np.asarray(drawn_by(Known(0.1, curved=True), monkeypatch, sampler=name, steps=12), float) - exact)
        for name in ("euler", "heun")
    }
    assert errors["heun"].mean() < 0.5 < errors["euler"].mean()


def test_guidance_goes_beyond_the_condition(monkeypatch):
    """Without: p + .4, with: p. At a scale of 2 the flow ends at p - .4."""
    for scale, expected in ((1.0, 0.2), (2.0, -0.2), (0.0, 0.6)):
        found = drawn_by(Known(0.2, 0.4), monkeypatch, sampler="euler", steps=5, guidance=scale)
        np.testing.assert_allclose(np.asarray(found, float), (expected + 1) * 127.5, atol=1)


@pytest.mark.slow
def test_the_renderer_meets_true_noised_and_predicted_embeddings():
    rng = np.random.default_rng(1)
    batch = small.batch_of([[small.drawing(rng, (1, 2)), small.reading(rng)] for _ in range(6)], 64, 64)
    plain = {"model__pixel_decoder__condition_noise": 0.0, "model__pixel_decoder__predicted_share": 0.0}
    config = make_tiny_config(objective="unihetero", **plain)
    params = jax.jit(lambda: unihetero.init_params(config.model, config.objective, 0))()
    output = jax.jit(lambda p: unihetero.build(config.model, config.objective, p)(batch))(params)
    true = np.asarray(output.vision.visual_embeddings)
    predicted = jnp.full_like(output.hidden, 7.0)
    np.testing.assert_array_equal(pixel_flow(config, output, batch, predicted)[1], true)

    all_predicted = make_tiny_config(objective="unihetero", **plain | {"model__pixel_decoder__predicted_share": 1.0})
    condition = np.asarray(pixel_flow(all_predicted, output, batch, predicted)[1])
    images = np.asarray(batch.patch_segment_ids)[:, ::4]
    assert (condition[images == 1] == 7).all(), "of the image that is drawn"
    np.testing.assert_array_equal(condition[images == 2], true[images == 2])

    noisy = make_tiny_config(objective="unihetero", **plain | {"model__pixel_decoder__condition_noise": 0.5})
    amount = np.linalg.norm(np.asarray(pixel_flow(noisy, output, batch)[1]) - true, axis=-1)
    relative = (amount / np.linalg.norm(true, axis=-1))[images > 0]
    assert relative.max() < 0.8 and 0.05 < relative.mean() < 0.5 and relative.std() > 0.05
    loss = loss_terms(
        noisy, params, {}, batch, jnp.float32(1), {n: jnp.float32(1) for n in ("text", "visual", "pixel")}
    )
    assert np.isfinite(loss.sums["pixel"]) and loss.counts["pixel"] == (np.asarray(batch.patch_segment_ids) > 0).sum()


@pytest.fixture(scope="module")
def renderer(tiny_experiment, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("renderer") / "run"
    config = tiny_experiment(
        objective="unihetero", train__num_steps=2, model__pixel_decoder__num_layers=1, model__pixel_decoder__dim=16,
        model__pixel_decoder__num_heads=2, model__pixel_decoder__mlp_dim=16, drawing__steps=3,
    )  # fmt: skip
    train(config, workdir)
    return workdir


def test_a_sheet_is_drawn_and_drawn_again_the_same(renderer, tmp_path, capsys):
    picture = tmp_path / "scene.png"
    Image.new("RGB", (48, 48), "navy").save(picture)
    command = ["generate", f"--workdir={renderer}", "--prompt=a red circle", "--num-images=3", "--grid=2x3"]
    for name in ("a", "b"):
        assert cli.main([*command, f"--reconstruct={picture}", f"--output={tmp_path / name}.png", "--seed=4"]) == 0
    assert "18 visual tokens" in capsys.readouterr().out
    a, b = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("a", "b"))
    np.testing.assert_array_equal(a, b)
    assert cli.main([*command, f"--output={tmp_path / 'c.png'}", "--seed=5"]) == 0
    assert np.asarray(Image.open(tmp_path / "c.png")).shape != a.shape


def test_what_cannot_be_drawn_is_said(renderer, tmp_path, refused):
    command = ["generate", f"--workdir={renderer}", "--num-images=2", "--prompt=a"]
    assert "name the PNG file" in refused(*command)
    assert "at most 9 visual tokens" in refused(*command, "--grid=9x9", f"--output={tmp_path / 'o.png'}")
    assert "such as 3x3" in refused(*command, "--grid=nine", f"--output={tmp_path / 'o.png'}")
    assert "no such file" in refused(*command, f"--reconstruct={tmp_path / 'no.png'}", f"--output={tmp_path / 'o.png'}")
    assert "--prompt says of what" in refused(*command[:-1], f"--output={tmp_path / 'o.png'}")


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "more"), [("pixel_through", set()), ("unihetero", {"reconstructed"})])
def test_what_a_run_draws_of_its_rollouts_is_judged(objective, more, tiny_experiment, tiny_world, tmp_path, capsys):
    """Pixel objectives draw block by block and read what they drew; a renderer draws at the end. Both are measured in
    the judge's space as pictures, without a map.
    """
    workdir = tmp_path / "run"
    config = tiny_experiment(
        objective=objective, train__num_steps=2, model__pixel_decoder__num_layers=1, drawing__steps=2,
        eval__rollout_source="generation", eval__rollout_candidates=8,
        eval__benchmarks={"scenes": str(tiny_world / "questions.tsv")},
    )  # fmt: skip
    train_run.run_training(config, str(workdir))
    assert "finds its image among 8" in capsys.readouterr().out
    assert cli.main(["evaluate", f"--workdir={workdir}", f"--rollout-judge={workdir}"]) == 0
    found = json.loads((workdir / "eval" / "rollout-error-2.json").read_text())
    assert {"drawn", *more} <= found["curves"].keys() and len(found["curves"]["drawn"]) == 9
    assert found["attributes"].keys() == {"nearest blocks", "another image", "drawn", *more}
    sheet = tmp_path / "out.png"
    assert cli.main(["generate", f"--workdir={workdir}", "--prompt=a", "--num-images=2", f"--output={sheet}"]) == 0
    assert sheet.stat().st_size > 1000


def test_a_bank_gives_back_its_own_images_and_the_nearest_block_of_others():
    """Two images of two blocks; an embedding between them takes the nearer, from its own place."""
    blocks = np.arange(4, dtype=np.uint8).reshape(2, 2, 1, 1, 1) * np.ones((2, 2, 8, 8, 3), np.uint8)
    embeddings = np.array([[[1, 0], [0, 1]], [[0, 1], [1, 0]]], np.float32)
    bank = BlockBank(embeddings, blocks, (1, 2))
    own = bank.draw(3 * embeddings)
    np.testing.assert_array_equal(np.stack(own)[:, 0, ::8, 0], [[0, 1], [2, 3]])
    (mixed,) = bank.draw(np.array([[[0.2, 0.9], [0.1, 0.8]]], np.float32))
    np.testing.assert_array_equal(mixed[0, ::8, 0], [2, 1])
    assert mixed.shape == (8, 16, 3)


def test_a_bank_of_a_run_draws_its_images_as_they_are(tiny_world):
    config, tokenizer = make_tiny_config(), load_tokenizer(tiny_world / "tokenizer")
    pictures = [np.random.default_rng(i).integers(0, 256, (16, 16, 3)).astype(np.uint8) for i in range(3)]
    params = unihetero.init_params(config.model, config.objective, 0)
    files = [encode_png(picture) for picture in pictures]
    bank = block_bank(config, params, tokenizer, files)
    for drawn, picture in zip(bank.draw(bank.embeddings), pictures, strict=True):
        np.testing.assert_array_equal(drawn, resize_to_grid(picture, image_spec(config)))


def test_the_pixel_decoder_that_draws_is_its_average():
    """After two steps by hand: a <- d a + (1 - d) p; the targets' average has its own decay and is not drawn with."""
    config = make_tiny_config(objective="unihetero", loss__pixel_ema_decay=0.75)
    assert ema_components(config) == ("encoder", "projector", "pixel_decoder")
    ema = {"encoder": jnp.float32(0), "pixel_decoder": jnp.float32(0)}
    for value in (4.0, 8.0):
        ema = update_ema(config, ema, {"encoder": jnp.float32(value), "pixel_decoder": jnp.float32(value)})
    assert float(ema["pixel_decoder"]) == 0.75 * 1.0 + 0.25 * 8.0
    decay = config.loss.ema_decay
    assert float(ema["encoder"]) == pytest.approx(decay * (1 - decay) * 4 + (1 - decay) * 8)
    used = params_in_use({"encoder": 1.0, "pixel_decoder": 2.0}, ema)
    assert used == {"encoder": 1.0, "pixel_decoder": ema["pixel_decoder"]}
    assert averages_of_targets(ema).keys() == {"encoder"}
    plain = make_tiny_config(objective="unihetero", loss__pixel_ema_decay=0.0)
    assert "pixel_decoder" not in ema_components(plain)


def test_a_run_is_loaded_with_the_average(renderer):
    stored = restore_subtree(renderer, None, ["params/pixel_decoder", "ema/pixel_decoder"])[1]
    loaded = load_run(str(renderer), -1, 0).params["pixel_decoder"]
    for averaged, used in zip(*map(jax.tree.leaves, (stored["ema"], loaded)), strict=True):
        np.testing.assert_array_equal(used, averaged)
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (stored["params"], loaded)), strict=True))
