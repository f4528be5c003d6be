"""Distances of sets of images against closed forms, scipy's matrix root, and a drawing whose answer is counted."""

import numpy as np
import pytest
import scipy.linalg

from unihetero_jax.evaluation.image_distance import compare_images, frechet_distance, precision_and_recall


def with_moments(rng, num_images, mean, covariance):
    """Random vectors whose sample mean and covariance are exactly these."""
    x = rng.standard_normal((num_images, len(mean)))
    x -= x.mean(axis=0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return x @ np.linalg.cholesky(covariance).T + mean


def test_gaussians_whose_covariances_commute_have_a_closed_form():
    """|m1 - m2|^2 + sum (s1 - s2)^2 over the shared axes, here turned away from the coordinates."""
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    s1, s2 = np.array([1.0, 2.0, 0.5]), np.array([3.0, 0.1, 0.5])
    a = with_moments(rng, 50, np.array([1.0, 0.0, -1.0]), axes @ np.diag(s1**2) @ axes.T)
    b = with_moments(rng, 80, np.array([1.0, 2.0, -1.5]), axes @ np.diag(s2**2) @ axes.T)
    assert frechet_distance(a, b) == pytest.approx(4 + 0.25 + ((s1 - s2) ** 2).sum(), rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-9)


def test_any_covariances_agree_with_the_root_of_their_product():
    rng = np.random.default_rng(1)
    a = rng.standard_normal((60, 7)) @ rng.standard_normal((7, 7)) + rng.standard_normal(7)
    b = rng.standard_normal((90, 7)) @ rng.standard_normal((7, 7))
    s1, s2 = np.cov(a.T), np.cov(b.T)
    root = np.real(scipy.linalg.sqrtm(s1 @ s2))
    expected = ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum() + np.trace(s1 + s2 - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_fewer_images_than_features():
    """Rank-deficient covariances: of itself nothing, of a shift its length, of a point the set's own variance."""
    rng = np.random.default_rng(2)
    a = rng.standard_normal((10, 300))
    assert frechet_distance(a, a) < 1e-9
    assert frechet_distance(a, a + 0.1) == pytest.approx(300 * 0.01, rel=1e-6)
    assert frechet_distance(a, np.tile(a.mean(axis=0), (5, 1))) == pytest.approx(a.var(axis=0, ddof=1).sum())


def test_few_images_are_too_far_apart():
    """The bias that the floor shows: sets of one distribution, and it falls with their number."""
    rng = np.random.default_rng(3)
    few, many = (frechet_distance(*rng.standard_normal((2, number, 20))) for number in (40, 4000))
    assert few > 20 * many > 0


def test_precision_and_recall_of_a_drawing():
    """True images at 0, 1, 2, 3 on a line; their second neighbours are at 2, 1, 1, 2:

                o                       drawn (1, 2.5)      above all balls
    x-------+---+---+---+-------x       the line is covered from -2 to 5
      o               o           o     drawn -1.5 and 2.5  covered;  5.5  beyond

    Those drawn have their second neighbours at 4 and 3 and further, so that every true one is covered.
    """
    true = np.array([[0, 0], [1, 0], [2, 0], [3, 0]], float)
    drawn = np.array([[-1.5, 0], [2.5, 0], [5.5, 0], [1, 2.5]])
    assert precision_and_recall(true, drawn, 2) == {"precision": 0.5, "recall": 1.0}
    far = np.array([[10, 0], [11, 0], [12, 0]], float)
    assert precision_and_recall(true, far, 1) == {"precision": 0.0, "recall": 0.0}
    one_near = np.concatenate([far, [[3.5, 0]]])
    assert precision_and_recall(true, one_near, 1) == {"precision": 0.25, "recall": 1.0}, "a lone image's ball is wide"


def modes(rng, number, *centres):
    return np.concatenate([0.1 * rng.standard_normal((number, 2)) + centre for centre in centres])


def test_dropped_modes_lower_recall_and_junk_lowers_precision():
    rng = np.random.default_rng(4)
    true = modes(rng, 200, (0, 0), (9, 0))
    whole = precision_and_recall(true, modes(rng, 200, (0, 0), (9, 0)))
    assert min(whole.values()) > 0.9
    dropped = precision_and_recall(true, modes(rng, 200, (0, 0)))
    assert dropped["precision"] > 0.9 and dropped["recall"] == pytest.approx(0.5, abs=0.05)
    junk = precision_and_recall(true, modes(rng, 200, (0, 0), (9, 0), (50, 50), (-50, 50)))
    assert junk["recall"] > 0.9 and junk["precision"] == pytest.approx(0.5, abs=0.05)


def test_equal_images_are_at_no_distance():
    """Copies of one image have balls of no size, which hold that image and no other."""
    one = np.random.default_rng(5).standard_normal((1, 50)) * 1e4
    copies = np.repeat(one, 4, axis=0)
    assert compare_images(copies, copies) == pytest.approx({"frechet_distance": 0, "precision": 1, "recall": 1})
    assert precision_and_recall(copies, copies + 1e-6) == {"precision": 0.0, "recall": 0.0}


def test_what_is_no_set_of_features_is_refused():
    good = np.zeros((4, 2))
    with pytest.raises(ValueError, match=r"\(4, 2\) and \(4, 3\): give \[images, F\] of equal F"):
        frechet_distance(good, np.zeros((4, 3)))
    with pytest.raises(ValueError, match="at least 2 images"):
        frechet_distance(good, good[:1])
    with pytest.raises(ValueError, match="at least 4 images"):
        precision_and_recall(good, good[:3])
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(good, np.full((4, 2), np.nan))
