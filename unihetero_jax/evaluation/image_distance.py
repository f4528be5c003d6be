"""How two sets of images differ, by vectors of features: the Frechet distance, and precision and recall.

    FD = |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2))          Heusel et al., arXiv 1706.08500
    precision = share of drawn images within the true ones' manifold  Kynkaanniemi et al., arXiv 1904.06991
    recall    = share of true images within the drawn ones' manifold

m and S are mean and covariance of a set. A set's manifold is the union of a ball around each of its images that reaches
to its k-th nearest other image. Both depend on the number of images: FD of few images is too large (the bias falls like
1 / n and grows with the features), and precision and recall of few are too rough. So neither figure means anything
without those of two sets of true images of the same sizes beside it.
"""

import numpy as np

NUM_NEIGHBOURS = 3
"""k of the manifolds, as in the paper."""
MIN_IMAGES = NUM_NEIGHBOURS + 1
"""Of a set: each image has k others."""


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Of the Gaussians through two sets of features, `float[images, F]`; in squared units of the features.

    With A and B the centred features over sqrt(n - 1), S1 = A'A and S2 = B'B, the trace of (S1 S2)^(1/2) is the sum of
    the singular values of A B'. No covariance is inverted or rooted, so it holds for fewer images than features, too.

    Raises:
        ValueError: the sets have different features, fewer than two images, or values that are not finite.
    """
    a, b = _checked(a, b, 2)
    root_a, root_b = _root(a), _root(b)
    shared = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    spread = (root_a**2).sum() + (root_b**2).sum()
    return float(max(((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum() + spread - 2 * shared, 0.0))


def _root(x: np.ndarray) -> np.ndarray:
    """R with R'R the covariance, [at most F, F]: all that the singular values of A B' need of A."""
    return np.asarray(np.linalg.qr((x - x.mean(axis=0)) / np.sqrt(len(x) - 1), mode="r"))


def precision_and_recall(true: np.ndarray, drawn: np.ndarray, num_neighbours: int = NUM_NEIGHBOURS) -> dict[str, float]:
    """`precision` and `recall` of drawn images, by features `float[images, F]`, in [0, 1].

    Junk lowers precision alone, kinds that are never drawn lower recall alone.

    Raises:
        ValueError: the sets have different features, not `num_neighbours` + 1 images, or values that are not finite.
    """
    true, drawn = _checked(true, drawn, num_neighbours + 1)
    between = _squared_distances(drawn, true)
    return {
        "precision": float((between <= _squared_radii(true, num_neighbours)).any(axis=1).mean()),
        "recall": float((between.T <= _squared_radii(drawn, num_neighbours)).any(axis=1).mean()),
    }


def compare_images(true: np.ndarray, drawn: np.ndarray) -> dict[str, float]:
    """`frechet_distance`, `precision` and `recall` of drawn images, by features `float[images, F]`."""
    return {"frechet_distance": frechet_distance(true, drawn), **precision_and_recall(true, drawn)}


def _squared_radii(x: np.ndarray, num_neighbours: int) -> np.ndarray:
    """From each image to its k-th nearest other one; the nearest of all is itself."""
    return np.sort(_squared_distances(x, x), axis=1)[:, num_neighbours]


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[of a, of b]. By differences: the usual |a|^2 - 2 a.b + |b|^2 leaves equal images apart."""
    return np.stack([((b - one) ** 2).sum(axis=1) for one in a])


def _checked(a: np.ndarray, b: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < least:
        raise ValueError(
            f"features of {a.shape} and {b.shape}: give [images, F] of equal F, and at least {least} images each"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("features are not finite: the encoder diverged, evaluate an earlier step (--steps)")
    return a, b
