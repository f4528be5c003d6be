"""Rollout retrieval and its baselines on embeddings whose answers are known."""

import types

import numpy as np
import pytest
from conftest import make_tiny_config

from unihetero_jax.data.packing import ImagePiece, PackedSample, TokenPiece
from unihetero_jax.evaluation.diagnostics import _compare as compare
from unihetero_jax.evaluation.diagnostics import common_grid, drawing_prompts

IMAGES, TOKENS, WIDTH = 64, 4, 16


def embeddings(seed, num_images=IMAGES):
    return np.random.default_rng(seed).standard_normal((num_images, TOKENS, WIDTH))


def test_the_true_embeddings_find_themselves():
    true = embeddings(0)
    found = compare(true.copy(), true)
    assert (found["retrieval"], found["standard_error"]) == (1.0, 0.0)
    assert (found["num_candidates"], found["chance"]) == (IMAGES, 1 / IMAGES)
    np.testing.assert_allclose(found["free_running_by_position"], np.zeros(TOKENS), atol=1e-12)


def test_length_does_not_count_and_a_little_noise_does_no_harm():
    true = embeddings(0)
    found = compare(true * 7 + embeddings(1), true)
    assert found["retrieval"] == 1.0 and 0 < found["free_running"] < 0.03


def test_rollouts_of_other_images_are_counted_one_by_one():
    """Three of eight rollouts stay in their place, so three are found."""
    true = embeddings(2, 8)
    found = compare(true[[0, 2, 1, 3, 5, 6, 4, 7]], true)
    assert (found["retrieval"], found["chance"]) == (3 / 8, 1 / 8)
    assert found["standard_error"] == pytest.approx(np.sqrt(3 / 8 * 5 / 8 / 8))
    assert compare(np.roll(true, 1, axis=0), true)["retrieval"] == 0.0


def test_shuffled_or_unrelated_rollouts_find_theirs_by_chance():
    true = embeddings(3)
    within = 4 * np.sqrt(1 / IMAGES / IMAGES)
    shuffled = compare(np.random.default_rng(4).permutation(true), true)
    unrelated = compare(embeddings(5), true)
    for found in (shuffled, unrelated):
        assert found["retrieval"] <= 1 / IMAGES + within
        assert found["free_running"] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("drawn", ["one vector", "one image", "the mean image"])
def test_one_rollout_for_all_captions_finds_one_image(drawn, offset):
    """Whatever all images share cannot help, however close it comes."""
    true = embeddings(6) + offset * embeddings(7, 1)
    same = {
        "one vector": np.ones_like(true),
        "one image": np.broadcast_to(true[5], true.shape),
        "the mean image": np.broadcast_to(true.mean(axis=0), true.shape),
    }[drawn]
    found = compare(same, true)
    assert found["retrieval"] == 1 / IMAGES
    if offset and drawn != "one vector":
        assert found["free_running"] < 0.01, "the loss would look superb"


@pytest.mark.parametrize("num_images", [7, 63, 64])
def test_a_collapsed_space_finds_by_chance(num_images):
    """All embeddings are one vector, rolled out exactly; how their mean is rounded must not tell them apart."""
    true = np.repeat(embeddings(11, 1)[:, :1], TOKENS, axis=1).repeat(num_images, axis=0)
    found = compare(true.copy(), true)
    assert found["retrieval"] == 1 / num_images
    for name in ("free_running", "mean_embedding", "copy_previous", "within_spread"):
        assert found[name] == pytest.approx(0, abs=1e-9), name


def test_images_are_told_apart_by_direction_from_the_mean_of_their_position():
    """Four images of two tokens, far from the origin, near each other, and at various distances from their mean."""
    apart = np.array([[6.0, 0.0], [1.0, 1.0], [-3.0, 1.0], [-4.0, -2.0]])[:, None]
    mean = np.array([[10.0, 0.0], [0.0, -20.0]])
    true = mean + apart * [[1.0], [0.5]]
    assert compare(mean + 0.1 * (true - mean), true)["retrieval"] == 1.0, "rollouts that hardly leave the mean"
    assert compare(mean - 0.1 * (true - mean), true)["retrieval"] == 0.0
    # The mean is that of the true images: rollouts that all err by one vector are drawn to the image it points at.
    assert compare(true + [0.0, 50.0], true)["retrieval"] == 1 / 4


def test_baselines_by_hand():
    """Tokens of two images of unit vectors x and y: `x x y` and `y y x`.

    The mean embedding is (x + y) / 2, 45 degrees from either; copying the previous token is right once and once at a
    right angle; of three pairs one is equal.
    """
    x, y = [1.0, 0.0], [0.0, 1.0]
    true = np.array([[x, x, y], [y, y, x]])
    drawn = np.array([[x, y, y], [y, y, y]])
    found = compare(3 * drawn, 2 * true)
    assert found["mean_embedding"] == pytest.approx(1 - np.sqrt(0.5))
    assert found["copy_previous"] == pytest.approx(0.5)
    assert found["within_spread"] == pytest.approx(2 / 3)
    np.testing.assert_allclose(found["free_running_by_position"], [0, 0.5, 0.5], atol=1e-12)
    assert found["free_running"] == pytest.approx(1 / 3)


def test_baselines_by_loops():
    true, drawn = embeddings(9, 5), embeddings(10, 5)

    def distance(a, b):
        return 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    mean = true.reshape(-1, WIDTH).mean(axis=0)
    places = [(image, token) for image in range(5) for token in range(TOKENS)]
    expected = {
        "free_running": [distance(drawn[i, t], true[i, t]) for i, t in places],
        "mean_embedding": [distance(mean, true[i, t]) for i, t in places],
        "copy_previous": [distance(true[i, t - 1], true[i, t]) for i, t in places if t > 0],
        "within_spread": [distance(true[i, t], true[i, u]) for i, t in places for u in range(TOKENS) if u != t],
    }
    found = compare(drawn, true)
    for name, values in expected.items():
        assert found[name] == pytest.approx(np.mean(values)), name


def picture(height, width):
    """An image of so many visual tokens of 2 x 2 patches of 4 x 4 pixels."""
    return ImagePiece(np.zeros((8 * height, 8 * width, 3), np.uint8), True)


def test_prompts_for_drawing_end_before_the_image_and_carry_its_grid():
    """Captions of one and of three tokens, then `<boi>` (2) and an image of 2 x 3; a picture is no part of a prompt."""
    samples = [
        PackedSample([TokenPiece(caption), TokenPiece([2], True), picture(2, 3), TokenPiece([3], True)])
        for caption in ([7], [7, 8, 9])
    ]
    assert common_grid(make_tiny_config(), samples) == (2, 3)
    batch = drawing_prompts(make_tiny_config(), types.SimpleNamespace(pad_id=0), samples)
    np.testing.assert_array_equal(batch.tokens, [[7, 2, 0, 0], [7, 8, 9, 2]])
    np.testing.assert_array_equal(np.asarray(batch.boi_grid).sum(axis=-1), [[0, 5, 0, 0], [0, 0, 0, 5]])
    np.testing.assert_array_equal(batch.boi_grid[1, 3], [2, 3])
    assert not np.any(batch.visual_mask)
