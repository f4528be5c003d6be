"""Our attention against `jax.nn.dot_product_attention`: forward and gradient, the two timed in turn in one process.

    python -m benchmarks.attention [--rounds=15] [--out=FILE]

Shapes: (rows, positions, query heads, key/value heads, values of a head) of the encoder and decoder of
`experiments/real_small.py` and of the decoders of `benchmarks/train_step.py`, four segments a row. Needs an otherwise
idle machine.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.interleave import Timing
from benchmarks.results_file import describe_run, write_results
from unihetero_jax.model.attention import attend, decoder_mask

SHAPES = {
    "real_small encoder": (16, 144, 4, 4, 24),
    "real_small decoder": (16, 88, 4, 2, 32),
    "tiny1 decoder": (1, 512, 8, 4, 32),
    "100m1 decoder": (1, 512, 10, 5, 64),
}
NUM_SEGMENTS = 4


def library(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """The same function from jax.nn."""
    return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None]).reshape(*query.shape[:2], -1)


def make_run(function: Callable[..., jax.Array], shape: tuple[int, ...]) -> Callable[[], tuple[Any, ...]]:
    """The compiled gradient of a sum over the output by query, key and value, on random arrays."""
    rows, length, query_heads, key_heads, head_dim = shape
    rng = np.random.default_rng(0)
    arrays = [
        jnp.asarray(rng.standard_normal((rows, length, heads, head_dim)), jnp.float32)
        for heads in (query_heads, key_heads, key_heads)
    ]
    segments = jnp.broadcast_to(1 + jnp.arange(length) * NUM_SEGMENTS // length, (rows, length))
    mask = decoder_mask(segments, jnp.zeros_like(segments))
    gradient = jax.jit(jax.grad(lambda q, k, v: jnp.sum(function(q, k, v, mask) ** 2), (0, 1, 2)))
    return lambda: jax.block_until_ready(gradient(*arrays))


def measure(shape: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Both functions in turn; the ratio of their medians, above 1 where ours is faster."""
    runs = {"ours": make_run(attend, shape), "jax.nn": make_run(library, shape)}
    for ours, theirs in zip(runs["ours"](), runs["jax.nn"](), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    timings = {name: Timing(tuple(values)) for name, values in seconds.items()}
    ratio = timings["jax.nn"].median / timings["ours"].median
    return {name: timing.to_json() for name, timing in timings.items()} | {"ratio": ratio}


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", default="benchmarks/results/attention.json")
    flags = parser.parse_args()
    run = describe_run(("jax", "jaxlib"))
    results = {name: measure(shape, flags.rounds) for name, shape in SHAPES.items()}
    print(f"{'':22}{'ours':>10}{'jax.nn':>10}{'ratio':>8}")
    for name, found in results.items():
        ours, theirs = (1e3 * found[arm]["median_s"] for arm in ("ours", "jax.nn"))
        print(f"{name:22}{ours:>7.1f} ms{theirs:>7.1f} ms{found['ratio']:>7.2f}x")
    write_results(flags.out, run, {"results": results})


if __name__ == "__main__":
    main()
