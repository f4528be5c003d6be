"""Likelihood of the text that training never saw: perplexity, and how well captions are expected, by source.

The validation split of every source, on the fixed plan that training's own validation uses. Where pictures stand
before their captions, this is caption likelihood.
"""

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from unihetero_jax import distributed
from unihetero_jax.config import Config
from unihetero_jax.data.mixture import validation_batches
from unihetero_jax.data.tokenizer import Tokenizer


def held_out_likelihood(
    config: Config,
    log_probs: Callable[[dict[str, np.ndarray]], np.ndarray],
    tokenizer: Tokenizer,
    own_rows: Callable[[int], Sequence[int]] = range,
) -> dict[str, dict[str, Any]]:
    """Of every source's validation split, on process 0 (the others get nothing):

    nll_per_token: mean negative log-likelihood of the supervised tokens, in nats; standard_error of it, rows being
    independent; perplexity: its exponential; num_tokens, num_rows. A model that gave a number that is not finite has
    nll_per_token None. Sources without supervised text are left out.

    Args:
        config: `data` and `eval.batch_rows`, `eval.validation_rows` are used.
        log_probs, own_rows: see `runner.Model`.
        tokenizer: the run's.
    """
    batch_rows = config.eval.batch_rows
    own = list(own_rows(batch_rows))
    results = {}
    for name in config.data.sources:
        rows: dict[int, tuple[float, int]] = {}
        for number, arrays in enumerate(validation_batches(config, tokenizer, name, own)):
            mask = arrays["text_loss_mask"]
            sums = np.where(mask, log_probs(arrays), 0).sum(axis=1, dtype=np.float64)
            for row, total, count in zip(own, sums, mask.sum(axis=1), strict=True):
                rows[number * batch_rows + row] = (float(total), int(count))
        merged: dict[str, tuple[float, int]] = {}
        for text in distributed.gather(f"held-out-{name}", json.dumps(rows)):
            merged |= json.loads(text)  # processes that hold the same row found the same
        if counted := [pair for pair in merged.values() if pair[1]]:  # a source of pictures alone has no text
            results[name] = _summary(np.array(counted))
    return results


def _summary(rows: np.ndarray) -> dict[str, Any]:
    """From (sum of log-probabilities, tokens) of each row; a ratio of two sums over rows."""
    if not np.isfinite(rows).all():
        return {"nll_per_token": None, "num_tokens": int(rows[:, 1].sum()), "num_rows": len(rows)}
    total, count = (float(x) for x in rows.sum(axis=0))
    mean = -total / count
    spread = float(np.square(-rows[:, 0] - mean * rows[:, 1]).sum())
    return {
        "nll_per_token": mean, "standard_error": math.sqrt(spread) / count, "perplexity": math.exp(min(mean, 700.0)),
        "num_tokens": int(count), "num_rows": len(rows),
    }  # fmt: skip
