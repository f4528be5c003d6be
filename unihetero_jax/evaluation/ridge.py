"""Ridge regression: the linear map from one space to another by which embeddings are judged and probed."""

from collections.abc import Callable

import numpy as np

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Relative to the mean square of the inputs."""

LinearMap = Callable[[np.ndarray], np.ndarray]
"""float[..., inputs] to float64[..., outputs]."""


def ridge(inputs: np.ndarray, outputs: np.ndarray, strength: float) -> LinearMap:
    """The map with an intercept that minimises `mean |x W - y|^2 + strength * mean square of x * |W|^2`.

    Args:
        inputs: float[n, d].
        outputs: float[n, k].
        strength: of the penalty; 0 or more.
    """
    x_mean, y_mean = inputs.mean(axis=0), outputs.mean(axis=0)
    x, y = inputs - x_mean, outputs - y_mean
    gram = x.T @ x / len(x)
    penalty = strength * np.trace(gram) / len(gram) * np.eye(len(gram))
    weights = np.linalg.solve(gram + penalty, x.T @ y / len(x))
    return lambda values: (values - x_mean) @ weights + y_mean


def best_ridge(inputs: np.ndarray, outputs: np.ndarray, error: Callable[[np.ndarray, np.ndarray], float]) -> LinearMap:
    """Of `STRENGTHS`, the one with the least `error(predicted, wanted)` on the last fifth; then fitted on all rows."""
    cut = max(len(inputs) * 4 // 5, 1)

    def held_out(strength: float) -> float:
        return error(ridge(inputs[:cut], outputs[:cut], strength)(inputs[cut:]), outputs[cut:])

    return ridge(inputs, outputs, min(STRENGTHS, key=held_out))
