"""The contrastive encoder: its loss against loops, pairs that do not see each other, a run that arms can start from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from conftest import make_tiny_config

from experiments import scene_encoder
from unihetero_jax.checkpoint import list_steps
from unihetero_jax.evaluation.rollout_error import digest_of
from unihetero_jax.loaded_run import load_run


def test_the_loss_is_that_of_loops():
    rng = np.random.default_rng(0)
    images, texts = rng.standard_normal((2, 5, 4)).astype(np.float32)
    is_pair = np.array([True, True, False, True, True])
    scale, bias = 0.7, -0.3
    total = 0.0
    for i in range(5):
        for j in range(5):
            if is_pair[i] and is_pair[j]:
                sign = 1 if i == j else -1
                total += np.log1p(np.exp(-sign * (np.exp(scale) * images[i] @ texts[j] + bias)))
    towers = {"scale": jnp.float32(scale), "bias": jnp.float32(bias)}
    found = scene_encoder.sigmoid_loss(jnp.asarray(images), jnp.asarray(texts), jnp.asarray(is_pair), towers)
    assert float(found) == pytest.approx(total / 4, rel=1e-5)


@pytest.fixture(scope="module")
def pairs():
    """(configuration, towers, a batch of two rows with two samples and one, the embedding of its pairs)."""
    config = make_tiny_config(objective="understanding", data__row_patches=16, data__image_min_patches=8)
    rng = np.random.default_rng(1)
    rows = [[small.drawing(rng, (1, 2), 4), small.drawing(rng, (1, 2), 3)], [small.drawing(rng, (1, 2), 5)]]
    batch = small.batch_of(rows, 32, 16)
    towers = scene_encoder.init_towers(config)
    embed = jax.jit(lambda towers, batch: scene_encoder.embed_pairs(config, towers, batch, small.BOI))
    return config, towers, batch, lambda batch: [np.asarray(x) for x in embed(towers, batch)]


def test_a_row_gives_each_of_its_samples_a_pair(pairs):
    _, _, batch, embed = pairs
    images, texts, is_pair = embed(batch)
    assert is_pair.tolist() == [True, True, True, False]
    np.testing.assert_allclose(np.linalg.norm(images[is_pair], axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(texts[is_pair], axis=1), 1, rtol=1e-5)


def test_an_image_moves_its_own_vector_and_no_caption_and_a_caption_no_image(pairs):
    _, _, batch, embed = pairs
    images, texts, _ = embed(batch)
    second = (np.asarray(batch.patch_segment_ids) == 2)[..., None]
    other = dataclasses.replace(batch, patches=jnp.where(second, 255 - batch.patches, batch.patches))
    moved_images, moved_texts, _ = embed(other)
    np.testing.assert_array_equal(moved_texts, texts)
    changed = np.abs(moved_images - images).max(axis=1)
    assert changed[1] > 1e-3 and changed[[0, 2]].max() == 0
    first_word = np.zeros(batch.tokens.shape, bool)
    first_word[0, 0] = True
    reworded = dataclasses.replace(batch, tokens=jnp.where(first_word, batch.tokens + 1, batch.tokens))
    again, said, _ = embed(reworded)
    np.testing.assert_array_equal(again, images)
    changed = np.abs(said - texts).max(axis=1)
    assert changed[0] > 1e-4 and changed[1:].max() == 0


def test_the_digest_names_the_parameters(pairs):
    _, towers, _, _ = pairs
    encoder = towers["model"]["encoder"]
    digest = digest_of(encoder)
    assert digest == digest_of(jax.tree.map(jnp.copy, encoder)) and len(digest) == 12
    assert digest != digest_of(jax.tree.map(lambda x: x + 1e-6, encoder))


def test_it_is_trained_once_stored_and_can_be_started_from(tiny_experiment, tiny_world, tmp_path, capsys):
    source = {"path": str(tiny_world / "generation"), "weight": 1.0, "augment": "none"}
    config = tiny_experiment(
        objective="understanding", data__sources={"captions": source}, train__num_steps=3, eval__benchmarks={}
    )
    scene_encoder.train_encoder(config, str(tmp_path / "encoder"))
    printed = capsys.readouterr().out
    assert "finds the scene of an unseen caption among 64" in printed
    assert list_steps(tmp_path / "encoder") == [3]
    stored = load_run(str(tmp_path / "encoder"), -1, 0).params["encoder"]
    assert f"encoder {digest_of(stored)}" in printed, "what is stored is what was named"
    fresh = scene_encoder.init_towers(config)["model"]["encoder"]
    assert digest_of(fresh) != digest_of(stored), "and it has learned"
    scene_encoder.train_encoder(config, str(tmp_path / "encoder"))
    assert f"encoder {digest_of(stored)} is there" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"holds another encoder \(seed: "):
        scene_encoder.train_encoder(dataclasses.replace(config, seed=5), str(tmp_path / "encoder"))
    assert scene_encoder.main(["--variant=hard", "--workdir=/dev/null/x"]) == 2
